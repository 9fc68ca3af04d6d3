"""Which question is asked of which clients."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .._rows import fill
from .measure import (
    Row,
    alone,
    candidates,
    deviations,
    lattice,
    lengths,
    margins,
    near,
    photographs,
    replays,
)
from .victims import Setting

Plan = dict[tuple[str, str], Callable[[], Iterator[Row]]]  # by part and setting

# What the span leaves open and a search narrows down: few whole patches are left, or none for sure.
DECIDED = (
    Setting("sinusoidal-2d", 16, 4, 64),
    Setting("sinusoidal-2d", 16, 4, 96),
    Setting("frozen", 16, 8, 64, batch=2),
    Setting("frozen", 16, 4, 96, batch=2),
    Setting("sinusoidal", 24, 4, 96),
)
# Twelve pixels a patch: so many whole patches are as probable that no rounding can be right.
UNDECIDED = Setting("sinusoidal", 16, 2, 64)
DITHERED = (Setting("sinusoidal", 16, 4, 64, dithered=True), replace(DECIDED[1], dithered=True))
HARD = Setting("sinusoidal", 32, 4, 192)
SPANS = (
    *(
        Setting(position, 32, patch, 192, precision, depth=4)
        for position, patch, precision in itertools.product(
            ("frozen", "sinusoidal", "sinusoidal-2d"), (8, 4), ("float32", "float64", "float16", "noise")
        )
    ),
    *(Setting("frozen", 32, 8, 384, precision, batch=2, depth=4) for precision in ("float32", "float64")),
)
LARGE = tuple(Setting(position, 32, 8, 192, depth=4) for position in ("sinusoidal", "sinusoidal-2d"))


def plan(quick: bool = False) -> Plan:
    """Every case of the study, and what measures it."""
    found: Plan = {}
    count = 1 if quick else 4  # photographs, or batches of them

    def ask(part: str, question: Callable[..., Iterator[Row]], settings: Iterable[Setting], **options: Any) -> None:
        for setting in [DECIDED[0]] if quick else settings:
            add = partial(Row, part, str(setting))
            found[part, str(setting)] = partial(question, add, setting, count, **options)

    ask("deviations", deviations, SPANS)
    ask("alone", alone, (*DECIDED[:2], DECIDED[4], *LARGE, HARD, UNDECIDED, *DITHERED))
    ask("near", near, (*DECIDED, UNDECIDED, DITHERED[1]), **{"evaluations": (30,)} if quick else {})
    ask("margins", margins, (DECIDED[0], DECIDED[3], DECIDED[4]), **{"evaluations": 30} if quick else {})
    ask("lattice", lattice, (DECIDED[4], HARD, LARGE[0], Setting("sinusoidal", 40, 10, 192)))
    ask("candidates", candidates, (DECIDED[2], DECIDED[3], *DECIDED[:2], LARGE[1]))
    ask(
        "replay",
        replays,
        (Setting("frozen", side, patch, 96) for side, patch in ((16, 4), (32, 8), (64, 8), (224, 8))),
    )
    ask("lengths", lengths, LARGE, **{"evaluations": 3} if quick else {})
    for size in (16, 32, 64):
        case = "photographs", f"{size}×{size}"
        found[case] = partial(photographs, partial(Row, *case), size, count)
    return found


def measure(folder: Path, options: argparse.Namespace) -> None:
    cases = plan(options.quick)
    fill(
        folder / "calibration.csv", Row, cases, lambda case: cases[case](), key=("part", "setting"),
        workers=options.workers,
    )  # fmt: skip
