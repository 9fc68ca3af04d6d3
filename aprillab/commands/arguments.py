"""Types of command-line arguments that several commands share, for argparse's ``type=``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

PHOTO = "a picture file, or one of the victims that come along"


def whole(least: int) -> Callable[[str], int]:
    """A whole number from ``least`` up that fits into 64 bits, as torch's seeds must.

    >>> whole(1)("32")
    32
    """

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} up")
        return value

    return read


def positive(text: str) -> float:
    """A finite number above zero.

    >>> positive("2.5")
    2.5
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def listed(kind: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """Values of one kind between commas, each once.

    >>> listed(int)("3, 1,3")
    [3, 1]
    """

    def read(text: str) -> list[Any]:
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise argparse.ArgumentTypeError(f"{text!r} is no list such as one,two")
        return list(dict.fromkeys(map(kind, parts)))

    return read
