"""Flower's own protections, tried: `python -m studies.protections`.

LocalDpMod, fixed and adaptive clipping on either side, SecAgg+ with three clients: what the server
sees, what the closed forms get from it, and what it costs. Flower's own code, in one process
without a network (needs the extra "federation"). Writes protections_*.csv, and from them
protections.md and protections.png.

    python -m studies.protections              # some ten minutes of one thread
    python -m studies.protections --quick      # the smallest study that has every part
    python -m studies.protections --processes  # and SecAgg+ by real processes, whose seconds are on the page
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .._runner import Claim, Description, run_study, study_parser
from . import clipping, noise, pictures, processes, secure

#: Each measures, and describes its share of the page.
PARTS = (noise, clipping, secure)


def measure(folder: Path, options: argparse.Namespace) -> None:
    for part in PARTS:
        part.measure(folder, options)
    if options.processes:
        processes.measure(folder, options)


def describe(folder: Path, options: argparse.Namespace) -> Description:
    fields: dict[str, object] = {}
    claims: list[Claim] = []
    for part in (*PARTS, processes):
        more, claimed = part.describe(folder, options)
        fields |= more
        claims += claimed
    return fields, claims


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("protections", __doc__, alone="seconds are among what it measures")
    parser.add_argument("--processes", action="store_true", help="time SecAgg+ by real processes, too: some minutes")
    options = parser.parse_args(argv)
    run_study("protections", options, measure=measure, describe=describe, draw=pictures.draw)


if __name__ == "__main__":
    main()
