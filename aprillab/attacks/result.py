"""What an attack returns, and what it raises when it cannot work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..metrics import EXACT_TO_8_BITS_DB
from ..preprocessing import Preprocessing


class AttackNotApplicable(ValueError):
    """The attack's conditions do not hold.

    Attributes
    ----------
    attack : str
        The function that refused.
    reason : str
        Which condition failed, with its numbers.
    numbers : dict
        The numbers alone.
    """

    def __init__(self, attack: str, reason: str, **numbers: float | str) -> None:
        super().__init__(f"{attack} does not apply: {reason}")
        self.attack, self.reason, self.numbers = attack, reason, numbers


@dataclass(frozen=True)
class Reconstruction:
    """The pictures an attack brought back, and how far to trust them without having seen the originals.

    Attributes
    ----------
    attack : str
        Name of the function that made it.
    images : Tensor of shape (B, C, H, W)
        In model-input space, float64.
    pixels : Tensor of shape (B, C, H, W)
        In [0, 1], clamped.
    labels : Tensor of shape (B,) or None
        Recovered or handed over; ``diagnostics["labels"]`` says which.
    exact : bool
        True only when the attack's conditions were verified on this very update *and* the error predicted from
        its residuals stays below half a grey level of an 8-bit picture.
    reason : str
        Why it is exact, or which condition failed, with the numbers.
    diagnostics : dict
        Ranks, condition numbers, residuals, precision, ``predicted_psnr`` (dB, seen without the original).
    seconds : float
        Wall-clock time of the attack.
    history : list of dict
        One entry for each recorded step; empty for the closed forms.
    """

    attack: str
    images: Tensor
    pixels: Tensor
    labels: Tensor | None
    exact: bool
    reason: str
    diagnostics: Mapping[str, Any]
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)


def decibels(mean_square: float) -> float:
    """Peak signal-to-noise ratio in dB for a mean squared error of pixels in [0, 1]."""
    return math.inf if mean_square <= 0 else -10 * math.log10(mean_square)


def predicted_psnr(mean_square: float, preprocessing: Preprocessing) -> float:
    """PSNR in dB of pixels in [0, 1] whose mean squared error in model-input space is ``mean_square``."""
    return decibels(mean_square * sum(std**2 for std in preprocessing.std) / len(preprocessing.std))


def verdict(conditions: Mapping[str, tuple[bool, str]], predicted_psnr: float) -> tuple[bool, str]:
    """``exact`` and ``reason`` from named conditions ``(holds, numbers)`` and the predicted PSNR in dB."""
    failed = [f"{name} fails ({numbers})" for name, (holds, numbers) in conditions.items() if not holds]
    trust = f"predicted PSNR {predicted_psnr:.1f} dB"
    if failed:
        return False, "; ".join([*failed, trust])
    if predicted_psnr < EXACT_TO_8_BITS_DB:
        return False, (
            f"all conditions hold, but the gradient's precision limits the picture: {trust}, "
            f"below the {EXACT_TO_8_BITS_DB:.1f} dB of an 8-bit rounding"
        )
    return True, "; ".join([f"{name}: {numbers}" for name, (_, numbers) in conditions.items()] + [trust])
