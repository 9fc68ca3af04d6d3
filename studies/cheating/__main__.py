"""What a server that cheats gets, and what a client sees of it: `python -m studies.cheating`.

Writes cheating.csv, cheating_looks.csv and cheating_secure.csv, and from them cheating.md and
cheating.png. Float32; solved in float64; no server and no client but functions of this process.
Random weights of a ViT of 32×32 (patch 8, width 192, two blocks, 100 classes), the same trained
on MNIST-5k's digits or on pieces of photographs, and ViT-B/16 at 224, random weights. The
secure sums are by Flower's SecAgg+ (the extra "federation"); without it, those that were
measured are described.

    python -m studies.cheating            # an hour and a half of one thread, half of it ViT-B/16's sum
    python -m studies.cheating --small    # without ViT-B/16
    python -m studies.cheating --quick    # the smallest study that has every part
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .._runner import Description, run_study, study_parser
from . import figures, looks, pictures, secure


def measure(folder: Path, options: argparse.Namespace) -> None:
    pictures.measure(folder, options)
    looks.measure(folder, options)
    secure.measure(folder, options)


def describe(folder: Path, options: argparse.Namespace) -> Description:
    fields, claims = pictures.describe(folder, options)
    more, claimed = looks.describe(folder, options)
    sums, of_sums = secure.describe(folder, options)
    return {**fields, **more, **sums}, [*claims, *claimed, *of_sums]


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("cheating", __doc__)
    parser.add_argument("--small", action="store_true", help="without ViT-B/16")
    options = parser.parse_args(argv)
    options.large = not (options.small or options.quick)
    run_study("cheating", options, measure=measure, describe=describe, draw=figures.draw)


if __name__ == "__main__":
    main()
