"""What tells the rows of cheating.csv apart, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

FILE = "cheating.csv"
NOISE = ("noise 1e-7", "noise 1e-6", "noise 1e-5", "noise 1e-4", "noise 1e-3")
CHANGES = ("none", "clip", *NOISE, "bfloat16", "float16")
TWO, OTHER, MEAN = "two of the class", "two of the class, the other", "two of the class, their mean"
CLIENTS, OF_EACH, SUM = 100, 8, "100 clients"


class Case(NamedTuple):
    """``victim`` is the seed of the batch, and the place of the wanted picture in it."""

    part: str
    model: str
    setting: str
    strength: float
    batch: int
    victim: int


@dataclass(frozen=True)
class Row:
    """``psnr`` of the wanted picture, or the median of those with 30 dB; ``there`` and
    ``sharp`` count a batch's.
    """

    part: str
    model: str
    setting: str
    strength: float
    batch: int
    victim: int
    psnr: float | None = None
    predicted: float | None = None
    one_image: str = ""
    there: int | None = None
    sharp: int | None = None
    told: int | None = None
    rounds: int = 1
