"""Ten thousand random small worlds: what is called exact, what crashes, what is refused. Run
`python -m studies.fuzz`; it writes fuzz.csv and fuzz.md.

A seed makes a model, a client and its update: shapes, widths below and above every count,
precision, batches, pictures, withheld tensors, and what may happen to an update between client and
server. Every closed form and `invert` attack it. Nothing may be called exact that is not, nothing
may crash, and what is determined in float64 may not be refused.

    python -m studies.fuzz                                # 10 000 configurations
    python -m studies.fuzz --configurations 100 --seed 5  # seeds 5 to 104
    python -m studies.fuzz --show 17                      # what one seed's world is, and what becomes of it
    python -m studies.fuzz --quick                        # 60 configurations; keeps no file
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from aprillab.attacks.catalogue import CLOSED_FORMS

from .._rows import fill
from .._runner import run_study, study_parser
from .client import play
from .measure import Row, attacked, oracle, outcome
from .page import describe
from .worlds import draw

QUICK = 60


def measure(folder: Path, options: argparse.Namespace) -> None:
    count = QUICK if options.quick else options.configurations
    cases = [(seed,) for seed in range(options.seed, options.seed + count)]
    fill(folder / "fuzz.csv", Row, cases, attacked, key=("seed",), workers=options.workers)


def show(seed: int) -> None:
    """Print a world and what becomes of it, with tracebacks."""
    world = draw(seed)
    print(f"{world.model}\n{world.tampering}")
    print(f"{world.dtype}; pictures {', '.join(world.pictures)}; withheld {world.withheld}, frozen {world.frozen}; ")
    print(f"same pictures {world.same_pictures}, same labels {world.same_labels}, says its batch {world.says_batch}")
    shared = play(world)
    best = oracle(world)
    print("float64, nothing done: " + ("all refuse" if best is None else f"{best:.1f} dB"))
    for name in (*CLOSED_FORMS, "invert"):
        found = outcome(shared, name)
        numbers = "" if found.psnr is None else f", predicted {found.predicted:.1f} dB, true {found.psnr:.1f} dB"
        print(f"{name}: {found.outcome}{numbers} {found.replay or ''}{found.trace or found.note}")
        print("".join(f"    {line}\n" for line in found.conditions), end="")


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("fuzz", __doc__)
    parser.add_argument("--configurations", type=int, default=10_000, metavar="N", help="how many seeds (10000)")
    parser.add_argument("--seed", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--show", type=int, metavar="SEED", help="one configuration, printed; writes nothing")
    options = parser.parse_args(argv)
    if options.show is not None:
        show(options.show)
    else:
        run_study("fuzz", options, measure=measure, describe=describe)


if __name__ == "__main__":
    main()
