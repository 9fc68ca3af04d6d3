"""Arguments of ``aprillab map``."""

from __future__ import annotations

from typing import Any

from ..messages import EXIT_CODES
from .types import add_own_model, part, whole


def add_arguments(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    command = commands.add_parser(
        "map",
        help="what a model would give away, by which tensors are shared; needs no update",
        description="For each group of tensors, and the usual combinations: if these and only these are shared,\n"
        "which closed form applies to an update of one image, and by which count. Nothing is attacked.",
        epilog=EXIT_CODES,
    )
    add_own_model(command, "that clients are given")
    command.add_argument(
        "--rank", type=whole(1), default=8, metavar="R",
        help="of LoRA's adapters on queries and values, where the model has none (%(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--part", default=[], action="append", type=part, metavar="PART=TENSOR",
        help="for a model aprillab does not know, as in aprillab audit (repeat)",
    )  # fmt: skip
    command.add_argument(
        "--format", choices=("text", "markdown", "json"), default="text", help="of what is printed (%(default)s)"
    )
