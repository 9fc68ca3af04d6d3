"""Record gradient matching for chapter 05: `python -m studies.recorded_attack` (or `… scrub`, `…
twins`).

Written to data/results/:

- matching_scrub.csv and .png: loss and PSNR at every evaluation of one attack on a colour
  photograph, and its pictures in one strip, one for each row of the CSV that has a number in the
  column ``frame``;
- matching_twins.csv and .png: where attacks end on the same digits with a learned position
  embedding, with its gradient withheld ("frozen") and with a sinusoidal one; the strip has a
  picture for each row.

Random weights (seed 0), float64 gradients, one image, label recovered, the recipe "april" with one
start. Budgets are evaluations, so the same machine gives the same result; another machine rounds
otherwise, and a search of hundreds of steps then takes another path. PSNR is of pixels clamped to
[0, 1]; the strips are rounded to 8 bits.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import aprillab as al
from aprillab.models import Position

from ._rows import fill
from ._runner import run_study, study_parser

SMALL: dict[str, Any] = {"width": 64, "depth": 2, "heads": 4, "classes": 10, "seed": 0}
DIGIT = {"image_size": 28, "patch_size": 7, "channels": 1, **SMALL}
PHOTOGRAPH = {"image_size": 32, "patch_size": 8, "channels": 3, **SMALL, "width": 96}
DIGITS, SEEDS = (5, 3), (0, 1, 2)
POSITIONS: tuple[Position, ...] = ("learned", "frozen", "sinusoidal")
SCRUB_EVALUATIONS, SCRUB_EVERY, TWIN_EVALUATIONS = 600, 12, 300
# APRIL's recipe as it was when this was recorded, from one start. Its distance and the patches'
# rearranging came later (data/results/digits.md).
ONE_START = replace(al.RECIPES["april"], distance="relative_l2", position_term=al.PositionTerm(), restarts=1)


@dataclass(frozen=True)
class Moment:
    """One evaluation; ``frame`` is its picture's place in the strip."""

    evaluation: int
    loss: float
    psnr: float
    frame: int | None


@dataclass(frozen=True)
class Twin:
    """Where one attack on a digit ended; losses are the recipe's own, PSNR in dB."""

    digit: int
    position: str
    seed: int
    evaluations: int
    first_loss: float
    loss: float
    residual: float
    psnr: float
    stopped: str
    torch: str


def levels(picture: Tensor) -> np.ndarray:
    """A picture (C, H, W) in [0, 1] as 8-bit values (H, W, C), or (H, W) where it is grey."""
    values = picture.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    return np.ascontiguousarray(values.squeeze(-1) if values.shape[-1] == 1 else values)


def matched(*arguments: Any, **options: Any) -> al.Reconstruction:
    """The recipe with one start; it returns its best at Ctrl-C, which is no record."""
    found = al.match_gradients(*arguments, recipe=ONE_START, **options)
    if found.diagnostics["stopped"] == "interrupted":
        raise KeyboardInterrupt
    return found


def recorded(file: Path, evaluations: int, _: object) -> list[Moment]:
    """One attack on a photograph, evaluation by evaluation; its pictures go to ``file``."""
    private = al.load_victim("astronaut", 32, dtype=torch.float64)[None]
    model = al.VisionTransformer(**PHOTOGRAPH).double()
    update = al.client_update(model, al.HALF.to_input(private), torch.tensor([3]))
    scores: list[float] = []
    found = matched(
        model, update, max_evaluations=evaluations, snapshots=SCRUB_EVERY,
        callback=lambda _, images: scores.append(float(al.psnr(al.HALF.to_pixels(images), private))),
    )  # fmt: skip
    rows: list[Moment] = []
    pictures: list[np.ndarray] = []
    for entry, psnr in zip(found.history, scores, strict=True):
        frame = len(pictures) if "images" in entry else None
        rows.append(Moment(entry["evaluation"], entry["loss"], psnr, frame))
        if "images" in entry:
            pictures.append(levels(al.HALF.to_pixels(entry["images"])[0]))
    Image.fromarray(np.concatenate(pictures, axis=1)).save(file, optimize=True)
    return rows


TwinCase = tuple[int, Position, int]


def twin(file: Path, evaluations: int, cases: list[TwinCase], case: TwinCase) -> list[Twin]:
    """One attack on the eighth digit of a class; its picture goes to its place in ``file``."""
    digit, position, seed = case
    images, labels = al.mnist5k(dtype=torch.float64)
    chosen = (labels == digit).nonzero()[7]
    model = al.VisionTransformer(**DIGIT, position=position).double()
    update = al.client_update(model, al.HALF.to_input(images[chosen]), labels[chosen])
    found = matched(model, update, seed=seed, max_evaluations=evaluations)
    number = cases.index(case)
    strip = [np.asarray(Image.open(file))[:, : 28 * number]] if number else []
    Image.fromarray(np.concatenate([*strip, levels(found.pixels[0])], axis=1)).save(file, optimize=True)
    facts = {name: found.diagnostics[name] for name in ("evaluations", "loss", "residual", "stopped")}
    psnr = float(al.psnr(found.pixels, images[chosen]))
    first = found.history[0]["loss"]
    return [Twin(digit, position, seed, first_loss=first, psnr=psnr, torch=torch.__version__, **facts)]


def measure(folder: Path, options: argparse.Namespace) -> None:
    quick, scrub, twins = options.quick, folder / "matching_scrub.csv", folder / "matching_twins.csv"
    if options.record != "twins":
        budget = 2 * SCRUB_EVERY if quick else SCRUB_EVALUATIONS
        whole = partial(recorded, scrub.with_suffix(".png"), budget)
        fill(scrub, Moment, [(1,)], whole, key=("evaluation",), settings={"evaluations": budget})
    if options.record != "scrub":
        budget, few = (5, 1) if quick else (TWIN_EVALUATIONS, None)
        cases = list(itertools.product(DIGITS[:few], POSITIONS, SEEDS[:few]))
        attack = partial(twin, twins.with_suffix(".png"), budget, cases)
        fill(twins, Twin, cases, attack, key=("digit", "position", "seed"), settings={"evaluations": budget})


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(
        "recorded_attack", __doc__, alone="each picture goes beside the one before it, into one file"
    )
    parser.add_argument("record", nargs="?", choices=("scrub", "twins", "both"), default="both")
    options = parser.parse_args(argv)
    run_study("recorded_attack", options, measure=measure)


if __name__ == "__main__":
    main()
