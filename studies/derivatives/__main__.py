"""Ways to the gradient of gradient matching: `python -m studies.derivatives`.

Writes derivatives.csv, derivatives_attacks.csv, derivatives_profile.csv and derivatives.md: what
ways there are to one evaluation of gradient matching (ways.py explains them), how long they take,
how exact they are, and whether a search with another one gets as far. It spends minutes in
torch.compile, which needs a C++ compiler; `--no-compile` leaves that out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .._runner import run_study, study_parser
from .matching import measure_attacks, measure_profile
from .page import describe
from .times import MODELS, compiled_rows, measure_times


def measure(folder: Path, options: argparse.Namespace) -> None:
    quick = options.quick
    models = list(MODELS)[: 1 if quick else None]
    measure_times(folder / "derivatives.csv", 3 if quick else 15, models, not (quick or options.no_compile))
    measure_profile(folder / "derivatives_profile.csv", 20 if quick else 300)
    measure_attacks(folder / "derivatives_attacks.csv", (5,) if quick else (5, 3, 0), 20 if quick else 600)


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("derivatives", __doc__, alone="milliseconds are what it measures")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out; it takes minutes")
    parser.add_argument("--compiled", nargs=3, metavar=("MODEL", "DTYPE", "REPETITIONS"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.compiled:
        name, dtype, repetitions = options.compiled
        print(json.dumps([asdict(row) for row in compiled_rows(name, dtype, int(repetitions))]))
        return
    run_study("derivatives", options, measure=measure, describe=describe)


if __name__ == "__main__":
    main()
