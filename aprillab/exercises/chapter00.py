"""Checks for chapter 00, start here."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .feedback import Feedback, run, stop


def check_psnr(function: Callable[[Tensor, Tensor], float]) -> Feedback:
    """Exercise 0.1: ``function(reconstruction, original)`` is the PSNR in dB of pixels in [0, 1]."""

    def body() -> str:
        zeros, tenth = torch.zeros(1, 4, 4, dtype=torch.float64), torch.full((1, 4, 4), 0.1, dtype=torch.float64)
        _expect_decibels(function(tenth, zeros), tenth, zeros)
        generator = torch.Generator().manual_seed(0)
        for channels, size in ((3, 8), (1, 28)):
            original = torch.rand(channels, size, size, generator=generator, dtype=torch.float64)
            noise = 0.05 * torch.randn(original.shape, generator=generator, dtype=torch.float64)
            _expect_decibels(function(original + noise, original), original + noise, original)
        return "Right: every factor of ten in the mean squared error is 10 dB."

    return run(body)


def _expect_decibels(answer: object, x: Tensor, y: Tensor) -> None:
    if isinstance(answer, Tensor) and answer.numel() != 1:
        stop(f"The PSNR should be one number, not shape {tuple(answer.shape)}: is a mean missing?")
    if not isinstance(answer, (int, float, Tensor)):
        stop(f"The PSNR should be a number, but it is a {type(answer).__name__}. Is there a return at the end?")
    value = float(answer)  # type: ignore[arg-type]
    error = (x - y).square()
    right = -10 * math.log10(float(error.mean()))
    if abs(value - right) < 1e-6:
        return
    mistakes = {
        "That has the wrong sign: a smaller error must give more dB.": -right,
        "That is the power of ten alone: a decibel is a tenth of it, so the factor is 10.": right / 10,
        "That is twice too large: 20 log₁₀ belongs to the root of the mean squared error, 10 log₁₀ to the mean "
        "squared error itself.": 2 * right,
        "That is the natural logarithm; decibels use log₁₀.": right * math.log(10),
        "That takes the sum of the squares where the mean is asked for.": -10 * math.log10(float(error.sum())),
        "That is the mean absolute error's; PSNR squares the error first.": -10
        * math.log10(float((x - y).abs().mean())),
        "That is the mean squared error, not yet its logarithm.": float(error.mean()),
    }
    for message, wrong in mistakes.items():
        if abs(value - wrong) < 1e-6:
            stop(f"{message} Yours is {value:.4g}, right is {right:.4g} dB.")
    stop(f"For one of the cases yours is {value:.4g}, right is {right:.4g} dB.")
