"""Arguments of ``aprillab demo``."""

from __future__ import annotations

from typing import Any

from ..messages import EXIT_CODES
from .types import PHOTO


def add_arguments(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    demo = commands.add_parser(
        "demo",
        help="one photograph, three attacks: a table and demo.png",
        description="Attack the gradient of one photograph in three ways: APRIL's closed form on architecture A,\n"
        "the patch-embedding system on torchvision's ViT-B/16, and the span attack on the same with its position\n"
        "embedding frozen. Random weights, float32, 224×224.",
        epilog=EXIT_CODES,
    )
    demo.add_argument("--out", default="demo.png", metavar="PNG", help="the figure to write (%(default)s)")
    demo.add_argument("--photo", default="astronaut", metavar="PHOTO", help=f"{PHOTO} (%(default)s)")
