"""What the defences of the position embedding stop: `python -m studies.effect`.

Writes effect.csv, effect_curves.csv, effect_weights.csv, effect_heads.csv, effect_twins.csv, .md
and .png. Every attack of the package on the same updates: position embedding learned, frozen,
sinusoidal in one and two dimensions, or none; architectures A ("april") and B ("prenorm"); float64
and float32; weights at initialization, early and late in training. The private pictures are
MNIST-5k test digits, which no model was trained on. And from the same rows the twins: where a
search that looks successful ends with another picture.

Searches are the expensive part, so they get a part of the grid: measure.py's `plan` says which, and
the table says "not run" where nothing was. Models are trained here, for as long as the study says,
and kept in a folder that git ignores.

    python -m studies.effect            # an hour on one thread
    python -m studies.effect --quick    # the smallest study that has every part
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .._runner import run_study, study_parser
from .figures import draw
from .measure import CHECKPOINTS, measure
from .page import describe


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("effect", __doc__)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the weights (%(default)s)")
    run_study("effect", parser.parse_args(argv), measure=measure, describe=describe, draw=draw)


if __name__ == "__main__":
    main()
