"""Checks for chapter 00, start here."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .feedback import Feedback, run, stop


def check_grey_levels(function: Callable[[float], float]) -> Feedback:
    """Exercise 0.1: ``function(decibels)`` is the root-mean-square error of that PSNR in
    grey levels, 0 to 255.
    """

    def body() -> str:
        for decibels in (20.0, 22.0, 40.0, 58.9, 0.0, 90.3):
            _expect_levels(function(decibels), decibels)
        return "Right: 25.5 grey levels at 20 dB, 2.55 at 40, and 0.29 at 58.9, which is what rounding costs."

    return run(body)


def _expect_levels(answer: object, decibels: float) -> None:
    if isinstance(answer, bool) or not (
        isinstance(answer, int | float) or (isinstance(answer, Tensor) and answer.numel() == 1)
    ):
        stop(f"The error should be one number, not a {type(answer).__name__}. Is there a return at the end?")
    value = float(answer)  # type: ignore[arg-type]
    root = 10 ** (-decibels / 20)
    right = 255 * root
    if abs(value - right) <= 1e-6 * right:
        return
    mistakes = {
        "That is in units of the full range, from 0 to 1; the question asks for grey levels.": root,
        "That is the mean squared error, not yet its root.": 255 * root**2,
        "That is the mean squared error, in units of the full range, not yet its root.": root**2,
        "That is the mean squared error in squared grey levels, not yet its root.": right**2,
        "The root comes first, then the factor 255: it is a factor of the error, not of its square.": 255**0.5 * root,
        "Do not round: the error is a mean over pixels, and not a whole number of levels.": float(round(right)),
        "White is level 255, so the range is 255 levels wide.": 256 * root,
        "That has the wrong sign: more dB are a smaller error.": 255 / root,
        "That is the exponential; decibels are powers of ten.": 255 * math.exp(-decibels / 20),
    }
    for message, wrong in mistakes.items():
        if abs(value - wrong) <= 1e-6 * abs(wrong):
            stop(f"{message} For {decibels:g} dB yours is {value:.4g}, right is {right:.4g}.")
    stop(f"For {decibels:g} dB yours is {value:.4g}, right is {right:.4g}.")
