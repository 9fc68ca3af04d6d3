"""How far the search gets that starts where the span attack ends: `python -m studies.hybrid`.

Writes hybrid.csv, hybrid_curves.csv, hybrid.md and hybrid.png. Random weights, float32 gradients,
no gradient of the position embedding, labels recovered by the attack. Every search has the same
budget; nothing is tuned to a victim.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from aprillab.comparison.cases import Case, cross
from aprillab.comparison.run import run

from ._runner import Description, between, run_study, study_parser
from ._tables import comparison_frame, comparison_made, comparison_pictures, grouped, markdown

EVALUATIONS, SECONDS = 300, 150.0
VICTIMS = ("astronaut", "chelsea", "coffee", "rocket")
ATTACKS = ("span", "span_then_match")


def parts(quick: bool = False) -> dict[str, list[Case]]:
    """The study's cases by the question they answer."""
    if quick:
        tiny: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 48, "depth": 2, "heads": 2}
        two: dict[str, Any] = {"victims": VICTIMS[:2], "positions": ("frozen",), "batch_sizes": (2,)}
        return {
            "4 patches": cross(victims=VICTIMS[:1], attacks=ATTACKS, positions=("sinusoidal",), **tiny),
            "a batch of 2": cross(attacks=ATTACKS, **two, **tiny),
        }
    found: dict[str, list[Case]] = {}
    for patch in (8, 4):
        for width, heads in ((192, 3), (384, 6)):
            positions = ("sinusoidal", "sinusoidal-2d") if patch == 8 else ("sinusoidal",)
            found[f"32×32, {(32 // patch) ** 2} patches, d = {width}"] = cross(
                victims=VICTIMS, attacks=(*ATTACKS, "match:april") if (patch, width) == (8, 192) else ATTACKS,
                positions=positions, image_size=32, patch_size=patch, width=width, depth=4, heads=heads,
            )  # fmt: skip
    large: dict[str, Any] = {"attacks": ATTACKS, "patch_size": 8, "width": 384, "depth": 4, "heads": 6}
    for size in (2, 4):
        found[f"batch of {size}, 32×32, 16 patches, d = 384"] = cross(
            victims=VICTIMS, positions=("frozen",), batch_sizes=(size,), image_size=32, **large
        )
    found["64×64, 64 patches, d = 384"] = cross(
        victims=VICTIMS[:2], positions=("sinusoidal",), image_size=64, **large
    )
    found["224×224, 196 patches, ViT-B/16"] = cross(
        victims=VICTIMS[:1], attacks=ATTACKS, models=("vit_b_16",), positions=("sinusoidal",), image_size=224
    )
    return found


def measure(folder: Path, options: argparse.Namespace) -> None:
    budget = (10, None) if options.quick else (EVALUATIONS, SECONDS)
    for cases in parts(options.quick).values():
        run(
            cases,
            path=folder / "hybrid.csv",
            max_evaluations=budget[0],
            max_seconds=budget[1],
            workers=options.workers,
        )


# --- The page -----------------------------------------------------------------------------------------------------


def summary(group: pd.DataFrame) -> dict[str, str | None]:
    """The table's cells for one part, embedding and attack."""
    return {
        "updates": str(len(group)),
        "median dB": f"{group.psnr.median():.1f}" if group.psnr.count() else "refused",
        "least": f"{group.psnr.min():.1f}" if group.psnr.count() else None,
        "most": f"{group.psnr.max():.1f}" if group.psnr.count() else None,
        "median loss": f"{group.loss.median():.1e}" if group.loss.count() else None,
        "evaluations": f"{group.evaluations.median():.0f}" if group.evaluations.count() else None,
        "seconds": f"{group.seconds.median():.1f}",
    }


def ranges(rows: pd.DataFrame) -> str:
    """One sentence a setting: from what to what the search lifts the picture."""

    def span(values: pd.Series) -> str:
        return " to ".join(dict.fromkeys(f"{v:.0f}" for v in (values.min(), values.max()))) + " dB"

    sentences = []
    for name, group in rows.groupby("part", sort=False):
        before, after = (group[group.attack == attack].psnr.dropna() for attack in ATTACKS)
        if len(before) and len(after):
            sentences.append(f"- {name}: the span alone {span(before)}, then matched {span(after)}")
    return "\n".join(sentences)


def describe(folder: Path, options: argparse.Namespace) -> Description:
    rows = comparison_frame(folder / "hybrid.csv", parts(options.quick))
    table = grouped(rows, ("part", "position", "attack"), summary)
    fields = {
        "max_evaluations": rows.max_evaluations.iloc[0],
        "max_seconds": rows.max_seconds.astype(float).iloc[0],
        "made": comparison_made(rows),
        "table": markdown(table.rename(columns={"part": "setting", "position": "embedding"})),
        "ranges": ranges(rows),
    }
    searched = rows[(rows.attack == ATTACKS[1]) & (rows.image_size == 32)]
    few, many = (searched[searched.part.str.contains(f" {n} patches, d")].psnr for n in (16, 64))
    return fields, [
        between("sharp with 16 patches", few.median(), least=60),
        between("with wrong patches in some places with 64", many.median(), most=40),
    ]


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    rows = comparison_frame(folder / "hybrid.csv", parts(options.quick))
    small = [row for row in rows.row if row.case.image_size <= 32 and row.case.victims[0] in VICTIMS[:2]]
    shown = [row for row in small if len(row.case.victims) == 1 and row.case.attack in ATTACKS]
    return comparison_pictures(folder / "hybrid.csv", shown)


def main(argv: Sequence[str] | None = None) -> None:
    options = study_parser("hybrid", __doc__).parse_args(argv)
    run_study("hybrid", options, measure=measure, describe=describe, draw=draw)


if __name__ == "__main__":
    main()
