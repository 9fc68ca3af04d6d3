"""What is left to an attacker where less is shared, and what rounds add: `python -m
studies.sharing_less`.

Writes sharing_less_frozen.csv, sharing_less_rounds.csv, sharing_less_lora.csv, leak_map.csv,
features.csv, and from them sharing_less.md, sharing_less.png and leak_map.png. Random weights, a
head that is not zero, a batch of one.

    python -m studies.sharing_less            # about two hours of one thread
    python -m studies.sharing_less --quick    # the smallest study that has every part
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from aprillab import viz

from .._runner import Claim, Description, run_study, study_parser
from . import frozen_embeddings, leak_page, lora, rounds

#: Each measures, and describes its share of the page.
PARTS = (frozen_embeddings, rounds, lora, leak_page)


def measure(folder: Path, options: argparse.Namespace) -> None:
    for part in PARTS:
        part.measure(folder, options)


def describe(folder: Path, options: argparse.Namespace) -> Description:
    fields: dict[str, object] = {}
    claims: list[Claim] = []
    for part in PARTS:
        more, claimed = part.describe(folder, options)
        fields |= more
        claims += claimed
    return fields, claims


def figure(folder: Path) -> Figure:
    """Three panels: rounds of a narrow model, LoRA over rounds, noise."""
    fig, axes = viz.figure(1, 3, size=(8.8, 3.5))
    rounds.panel_of_rounds(axes[0, 0], folder)
    lora.panel(axes[0, 1], folder)
    rounds.panel_of_noise(axes[0, 2], folder)
    return fig


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    return {"sharing_less.png": viz.to_png(figure(folder), dpi=150), **leak_page.draw(folder)}


def main(argv: Sequence[str] | None = None) -> None:
    options = study_parser("sharing_less", __doc__).parse_args(argv)
    run_study("sharing_less", options, measure=measure, describe=describe, draw=draw)


if __name__ == "__main__":
    main()
