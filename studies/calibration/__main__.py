"""What the constants of whole grey levels rest on: `python -m studies.calibration`.

Writes calibration.csv and calibration.md. Random weights, photographs of 8-bit pixels whose true
patches are known, no gradient of the position embedding, labels known. No attack is scored here:
each part measures what one or a few constants of `span_then_round` and `span_then_match` claim, and
what other values would change.

    python -m studies.calibration            # six minutes of one thread
    python -m studies.calibration --quick    # the smallest study that has every part
"""

from __future__ import annotations

from collections.abc import Sequence

from .._runner import run_study, study_parser
from .page import describe
from .plan import measure


def main(argv: Sequence[str] | None = None) -> None:
    options = study_parser("calibration", __doc__).parse_args(argv)
    run_study("calibration", options, measure=measure, describe=describe)


if __name__ == "__main__":
    main()
