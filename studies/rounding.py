"""How far whole grey levels go: `python -m studies.rounding`.

Writes rounding.csv, rounding_curves.csv, rounding_limits.csv, rounding.md and rounding.png. Random
weights, no gradient of the position embedding, labels recovered by the attack, photographs of 8-bit
pixels. Every search has the same budget; nothing is tuned to a victim.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from aprillab import (
    HALF,
    ClientUpdate,
    VisionTransformer,
    client_update,
    defenses,
    load_victim,
    psnr,
    span_closed_form,
    span_then_round,
)
from aprillab.comparison.cases import Case, cross
from aprillab.comparison.run import run

from ._rows import fill, read
from ._runner import Description, between, run_study, study_parser
from ._tables import comparison_frame, comparison_made, comparison_pictures, grouped, markdown
from .hybrid import VICTIMS

EVALUATIONS, SECONDS = 4000, 170.0
ATTACKS = ("span", "span_then_round")


def parts(quick: bool = False) -> dict[str, list[Case]]:
    """The study's cases by the question they answer."""
    if quick:
        tiny: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 64, "depth": 2, "heads": 2}
        return {"16 patches": cross(victims=VICTIMS[:1], attacks=ATTACKS, positions=("sinusoidal",), **tiny)}
    found: dict[str, list[Case]] = {}
    both: tuple[tuple[int, dict[str, Any]], ...] = tuple(
        (width, {"victims": VICTIMS, "attacks": ATTACKS, "width": width, "depth": 4, "heads": width // 64})
        for width in (192, 384)
    )
    for width, common in both:
        found[f"32×32, 16 patches, d = {width}"] = cross(
            positions=("sinusoidal", "sinusoidal-2d"), image_size=32, patch_size=8,
            dtypes=("float32", "float64") if width == 192 else ("float32",), **common,
        )  # fmt: skip
    large = both[1][1]
    found["64×64, 64 patches, d = 384"] = cross(positions=("sinusoidal",), image_size=64, patch_size=8, **large)
    for width, common in both:
        name = f"32×32, 64 patches, d = {width}"
        found[name] = cross(positions=("sinusoidal",), image_size=32, patch_size=4, **common)
    for size in (2, 4):
        found[f"batch of {size}, 32×32, 16 patches, d = 384"] = cross(
            positions=("frozen",), batch_sizes=(size,), image_size=32, patch_size=8, **large
        )
    return found


# --- Where it ends: other precisions, noise, pixels that are not whole --------------------------------------------


@dataclass(frozen=True)
class Limit:
    """One photograph under one change; without any search. PSNR in dB."""

    change: str
    victim: str
    span: float
    rounded: float
    settled: int
    patches: int
    exact: bool


def dithered(pixels: Tensor) -> Tensor:
    """Uniform noise of one level from end to end: the least that leaves no whole level."""
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=pixels.dtype)
    return pixels + (noise - 0.5) / 255


def resized(pixels: Tensor) -> Tensor:
    """To 8/9 of the side by a float filter, as augmentations on tensors do."""
    side = pixels.shape[-1] * 8 // 9
    return torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)


UPDATES: dict[str, Callable[[ClientUpdate], ClientUpdate]] = {
    "shared in float16": partial(defenses.to_precision, dtype=torch.float16),
    "shared in bfloat16": partial(defenses.to_precision, dtype=torch.bfloat16),
    **{
        f"noise of {share} of the update's r.m.s.": partial(
            defenses.gaussian_noise, sigma=float(share), relative=True, seed=0
        )
        for share in ("1e-6", "1e-5", "1e-4")
    },
}
PIXELS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels dithered by one level": dithered,
    "pixels resized in floating point": resized,
}
CHANGES = ("none", *UPDATES, *PIXELS)


def limit(width: int, size: int, case: tuple[str, str]) -> list[Limit]:
    """1-D sinusoids in float32, 16 patches: does the change stop the rounding, and what is left?"""
    change, victim = case
    model = VisionTransformer(
        image_size=size, patch_size=size // 4, width=width, depth=4, heads=6, classes=10, position="sinusoidal"
    )
    larger = size + size // 8 if change == "pixels resized in floating point" else size
    pixels = load_victim(victim, larger, dtype=torch.float64)[None]
    pixels = PIXELS.get(change, lambda same: same)(pixels)
    update = client_update(model, HALF.to_input(pixels).float(), torch.tensor([VICTIMS.index(victim)]))
    update = UPDATES.get(change, lambda same: same)(update)
    span = span_closed_form(model, update, strict=False)
    result = span_then_round(model, update, max_evaluations=0, progress=False)
    settled = result.diagnostics["settled"]
    scores = float(psnr(span.pixels, pixels)), float(psnr(result.pixels, pixels))
    return [Limit(change, victim, *scores, int(settled.sum()), settled.numel(), result.exact)]


def measure(folder: Path, options: argparse.Namespace) -> None:
    victims = VICTIMS[:1] if options.quick else VICTIMS
    cases = itertools.product(CHANGES, victims)
    at_the_limits = partial(limit, *((192, 16) if options.quick else (384, 32)))
    fill(
        folder / "rounding_limits.csv", Limit, cases, at_the_limits, key=("change", "victim"), workers=options.workers
    )
    for case in parts(options.quick).values():
        run(
            case, path=folder / "rounding.csv", max_evaluations=EVALUATIONS, max_seconds=SECONDS,
            workers=options.workers,
        )  # fmt: skip


# --- The page -----------------------------------------------------------------------------------------------------


def decibels(value: float) -> str:
    """Equal to the last bit of float64 is not a number of dB that means anything."""
    return "every level" if value > 200 else f"{value:.1f}"


def summary(group: pd.DataFrame) -> dict[str, Any]:
    """By part, embedding, precision and attack: PSNR, and how many are exact."""
    scores = group.psnr_min.dropna()
    middle = scores.quantile(0.5, interpolation="lower")
    return {
        "updates": len(group),
        "median dB": decibels(middle) if len(scores) else "refused",
        "least": decibels(scores.min()) if len(scores) else None,
        "most": decibels(scores.max()) if len(scores) else None,
        "exact": group.exact.eq(True).sum(),
        "evaluations": f"{group.evaluations.median():.0f}" if group.evaluations.count() else None,
        "seconds": f"{group.seconds.median():.1f}",
    }


def limits_line(group: pd.DataFrame) -> dict[str, str]:
    return {
        "span alone, median dB": f"{group.span.median():.1f}",
        "rounded, median dB": decibels(group.rounded.median()),
        "patches settled": f"{group.settled.sum()} of {group.patches.sum()}",
        "exact": f"{group.exact.sum()} of {len(group)}",
    }


def describe(folder: Path, options: argparse.Namespace) -> Description:
    rows = comparison_frame(folder / "rounding.csv", parts(options.quick))
    limits = read(folder / "rounding_limits.csv", Limit)
    table = grouped(rows, ("part", "position", "dtype", "attack"), summary)
    rounded = rows[rows.attack == "span_then_round"]
    fields = {
        "made": comparison_made(rows), "max_evaluations": rows.max_evaluations.iloc[0],
        "max_seconds": rows.max_seconds.iloc[0], "rounded": len(rounded),
        "false": (rounded.exact.eq(True) & (rounded.psnr < 100)).sum(), "photographs": limits.victim.nunique(),
        "table": markdown(table.rename(columns={"part": "setting", "position": "embedding", "dtype": "precision"})),
        "limits": markdown(grouped(limits, ["change"], limits_line)),
    }  # fmt: skip
    shown = rounded[(rounded.image_size == 32) & (rounded.dtype == "float32") & (rounded.position != "frozen")]
    left = limits[limits.rounded < 100].span
    return fields, [
        between("the same as the first in most rows", shown.exact.eq(True).mean(), least=0.5),
        between("A defence that stops the rounding still leaves the picture", left.min(), least=15),
    ]


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    rows = comparison_frame(folder / "rounding.csv", parts(options.quick))
    small = [row for row in rows.row if row.case.image_size <= 32 and row.case.victims[0] in VICTIMS[:2]]
    shown = [row for row in small if len(row.case.victims) == 1 and row.case.dtype == "float32"]
    return comparison_pictures(folder / "rounding.csv", shown)


def main(argv: Sequence[str] | None = None) -> None:
    options = study_parser("rounding", __doc__).parse_args(argv)
    run_study("rounding", options, measure=measure, describe=describe, draw=draw)


if __name__ == "__main__":
    main()
