"""Why sinusoids resist the span attack: `python -m studies.conditioning`.

Writes conditioning.csv, .md and .png. The span attack (chapter 07) reads patch i from a linear
system whose right side is the *value* of its position embedding. Its condition beyond the count of
widths: the E_i + b_e are independent modulo the image of the patch embedding W_e. In exact
arithmetic independent vectors are independent; in finite precision the question is by how much. So
each fixed embedding here comes with the singular values of its vectors modulo that image, and with
the PSNR of the attack from gradients of four precisions.

Random weights, pre-norm ViT, 32×32 pixels, label 3. Then digits, with weights before and after
training.

    python -m studies.conditioning            # about ten minutes on one thread
    python -m studies.conditioning --quick    # the smallest study that has every part
"""

from __future__ import annotations

from collections.abc import Sequence

from .._runner import run_study, study_parser
from .measure import measure
from .page import describe, draw


def main(argv: Sequence[str] | None = None) -> None:
    options = study_parser("conditioning", __doc__).parse_args(argv)
    run_study("conditioning", options, measure=measure, describe=describe, draw=draw)


if __name__ == "__main__":
    main()
