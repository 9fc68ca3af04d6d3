"""What a round really is: `python -m studies.a_round`.

Writes a_round.csv, and from it a_round.md and a_round.png. Clients train by aprillab.federation's
local.py, float32 weights; the server knows what it asked for, and attacks what comes back by
al.invert. Random weights, a head that is not zero. What the state before holds is the model itself.

    python -m studies.a_round            # about half an hour of one thread, and 10 GB for ViT-B/16
    python -m studies.a_round --quick    # the smallest study that has every part
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from .._rows import fill
from .._runner import run_study, study_parser
from . import page
from .clients import LARGE, SMALL, Case, Row, attacked

FILE = "a_round.csv"
VICTIMS, SEEDS = ("astronaut", "coffee", "chelsea", "rocket"), (0, 1)
LARGE_VICTIMS = ("astronaut", "coffee")
STEPS = (1, 5, 20)
RATES = {"SGD": (1.0, 0.1, 0.01), "Adam": (1e-2, 1e-3, 1e-4)}
PLAIN = ("SGD", "momentum 0.9", "Nesterov", "weight decay 0.01")

#: Of a case without model, victim and seed, what most parts have.
_USUAL = {"eps": 0.0, "clip": 0.0, "steps": 1, "rounds": 1, "images": 1, "batch_size": 1, "autocast": ""}


def cell(part: str, optimizer: str, learning_rate: float, **changes: float | str) -> dict[str, float | str]:
    """What the cases of one cell have in common."""
    adam = {"eps": 1e-8} if "Adam" in optimizer else {}
    return {"part": part, "optimizer": optimizer, "learning_rate": learning_rate, **_USUAL, **adam, **changes}


def small_cells() -> Iterator[dict[str, float | str]]:
    for optimizer, steps in itertools.product((*PLAIN, "Adam", "AdamW"), STEPS):
        for rate in RATES["Adam" if "Adam" in optimizer else "SGD"]:
            yield cell("one picture", optimizer, rate, steps=steps)
    for optimizer, rate, steps in itertools.product(("SGD", "momentum 0.9"), (1e-3, 1e-4), STEPS):
        yield cell("one picture", optimizer, rate, steps=steps)  # where the loss takes steps to fall
    yield from (cell("autocast", "SGD", 0.1, steps=steps, autocast="bfloat16") for steps in STEPS)
    yield cell("autocast", "AdamW", 1e-3, eps=1e-6, clip=1.0, autocast="bfloat16")
    for images in (2, 8, 32):
        yield from (cell("batch", "SGD", 0.1, steps=s, images=images, batch_size=images) for s in STEPS)
        yield from (cell("batch", "SGD", rate, steps=images, images=images, batch_size=1) for rate in (0.1, 0.01))
    for eps, steps in itertools.product((1e-8, 1e-6, 1e-4, 1e-2), (1, 2, 5, 20)):
        yield cell("Adam undone", "AdamW", 1e-3, steps=steps, eps=eps, clip=1.0)
    for rate, steps in ((1e-2, 1), (1e-2, 2), (1e-5, 1), (1e-5, 2), (1e-5, 5)):
        yield cell("Adam undone", "AdamW", rate, steps=steps, eps=1e-6, clip=1.0)
    yield from (cell("rounds", "SGD", 0.1, steps=5, rounds=rounds) for rounds in (1, 3))
    yield from (cell("rounds", "AdamW", 1e-3, rounds=rounds, clip=1.0) for rounds in (1, 2, 3, 6))
    yield from (cell("rounds", "AdamW, state kept", 1e-3, rounds=rounds, clip=1.0) for rounds in (2, 3))


def large_cells() -> Iterator[dict[str, float | str]]:
    yield from (cell("ViT-B/16", "SGD", rate) for rate in RATES["SGD"])
    yield cell("ViT-B/16", "SGD", 0.01, steps=5)
    yield cell("ViT-B/16", "momentum 0.9", 0.01, steps=5)
    yield from (cell("ViT-B/16", "AdamW", 1e-3, eps=eps, clip=1.0) for eps in (1e-8, 1e-6))
    yield cell("ViT-B/16", "AdamW", 1e-3, eps=1e-6, clip=1.0, steps=5)


def cases(quick: bool) -> Iterator[Case]:
    """All cases, those of one model together where it is large."""
    cells = list(small_cells())
    if quick:  # the first two cells of each part
        cells = [c for c in cells if [other for other in cells if other["part"] == c["part"]].index(c) < 2]
    victims, seeds = (VICTIMS[:1], SEEDS[:1]) if quick else (VICTIMS, SEEDS)
    for seed in seeds:
        for one, victim in itertools.product(cells, victims):
            yield Case(model=SMALL, victim=victim, seed=seed, **one)  # type: ignore[arg-type]
        if seed == 0 and not quick:
            for one, victim in itertools.product(large_cells(), LARGE_VICTIMS):
                yield Case(model=LARGE, victim=victim, seed=0, **one)  # type: ignore[arg-type]


def measure(folder: Path, options: argparse.Namespace) -> None:
    audited = partial(attacked, audited={(VICTIMS[0], SEEDS[0])})
    fill(folder / FILE, Row, cases(options.quick), audited, key=Case._fields, workers=options.workers)


def main(argv: Sequence[str] | None = None) -> None:
    options = study_parser("a_round", __doc__).parse_args(argv)
    run_study("a_round", options, measure=measure, describe=page.describe, draw=page.draw)


if __name__ == "__main__":
    main()
