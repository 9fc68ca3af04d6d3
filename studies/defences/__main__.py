"""Defences that hold, and what they cost: `python -m studies.defences`.

Noise from 1e-8 to 10 times the clipping norm, clipping, pruning, few bits, dithered pixels,
batches, secure sums, Adam: each before the attacker who knows it, who reconstructs, and who only
names one of a hundred pictures; and what the theorems say of noise. Writes defences_grid.csv,
defences_information.csv and defences_matching.csv, and from them and from defences_accuracy.csv the
page defences.md and its figures.

    python -m studies.defences              # some twenty minutes of one thread
    python -m studies.defences --large      # and a few defences on ViT-B/16 at 224: half an hour more
    python -m studies.defences --accuracy   # and accuracy under the defences first: an hour more
    python -m studies.defences --quick      # the smallest study that has every part
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .._runner import run_study, study_parser
from . import accuracy, accuracy_clipping, bounds, figures, grid, page


def measure(folder: Path, options: argparse.Namespace) -> None:
    if options.accuracy:
        accuracy.measure_accuracy(folder, options)
        accuracy_clipping.measure_clipping(folder, options)
    grid.measure(folder, options)
    bounds.measure(folder, options)


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("defences", __doc__)
    parser.add_argument("--large", action="store_true", help="ViT-B/16 too")
    parser.add_argument("--accuracy", action="store_true", help="measure accuracy too, with the options below")
    parser.add_argument("--checkpoints", type=Path, help="folder for the trained weights of the digits' model")
    accuracy.add_arguments(parser)
    options = accuracy.checked(parser, parser.parse_args(argv))
    run_study("defences", options, measure=measure, describe=page.describe, draw=figures.draw)


if __name__ == "__main__":
    main()
