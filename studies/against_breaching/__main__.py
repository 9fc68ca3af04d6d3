"""aprillab against the package breaching, on one model, update and machine.

Writes against_breaching.csv and .md. breaching lives in an environment of its own (recipe:
studies/README.md):

    python -m studies.against_breaching --python PATH/TO/ITS/bin/python

Every run, ours or theirs, is a process of its own with one thread that reads the victim's model and
update from files and attacks; ours and theirs take turns. An evaluation is one gradient distance
with its gradient to the picture, line searches included. breaching's are counted by a hook on its
objective. Both sides are told the label, except where the attack looks for it itself. In the race to
30 dB each has its own budget: breaching's presets 24 000 steps of signed Adam, or 1 200 of L-BFGS with
up to 25 evaluations each; ours 2 000 evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence

from .._runner import run_study, study_parser
from .measure import measure
from .page import describe


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("against_breaching", __doc__, alone="it is a race, in seconds of the processor")
    parser.add_argument("--python", help="the Python of an environment with breaching")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate-seconds", type=float, default=8.0)
    parser.add_argument(
        "--seconds", type=float, default=1800.0, help="of the processor, at most, in the race to 30 dB"
    )
    parser.add_argument("--digits", type=int, nargs="+", default=list(range(10)))
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.rate_seconds, options.seconds, options.digits = 1, 1.0, 3.0, [5]
    if not options.python and not options.report:
        parser.error("--python is needed: the Python of an environment with breaching (see studies/README.md)")
    run_study("against_breaching", options, measure=measure, describe=describe)


if __name__ == "__main__":
    main()
