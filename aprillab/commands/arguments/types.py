"""Types of command-line arguments, for argparse's ``type=``, and options that several commands have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..losses import loss
from .names import ATTACKS

PHOTO = "a picture file, or one of the victims that come along"

#: A name, or means and standard deviations.
Normalization = str | tuple[tuple[float, ...], tuple[float, ...]]


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


def size(text: str) -> tuple[int, int]:
    """Height and width in pixels: one number for a square, or two with an x between.

    >>> size("224"), size("160x224")
    ((224, 224), (160, 224))
    """
    numbers = text.lower().replace("×", "x").split("x")
    try:
        height, width = map(whole(1), numbers * 2 if len(numbers) == 1 else numbers)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a whole number from 1 up nor height and width such as 160x224"
        ) from None
    return height, width


def attack(text: str) -> str:
    """The name of an attack; ``match`` is short for ``match:april``.

    >>> attack("match"), attack("span")
    ('match:april', 'span')
    """
    name = "match:april" if text == "match" else text
    if name not in ATTACKS:
        raise argparse.ArgumentTypeError(f"there is no attack {text!r}; there are {', '.join(ATTACKS)}")
    return name


def attacks(text: str) -> list[str]:
    """Attacks between commas, or ``all``.

    >>> attacks("span,match"), len(attacks("all")) == len(ATTACKS)
    (['span', 'match:april'], True)
    """
    return list(ATTACKS) if text == "all" else listed(attack)(text)


def one_of(what: str, names: Sequence[str]) -> Callable[[str], str]:
    """One of some names.

    >>> one_of("precision", ["float32", "float64"])("float32")
    'float32'
    """

    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{what} {text!r} is none of {', '.join(names)}")
        return text

    return read


def normalization(text: str) -> Normalization:
    """A known preprocessing's name, or mean and standard deviation: of all channels, or of each.

    >>> normalization("half"), normalization("0.5,0.25"), normalization("0/0/0,1/1/1")[1]
    ('half', ((0.5,), (0.25,)), (1.0, 1.0, 1.0))
    """
    if text in ("unit", "half", "imagenet"):
        return text
    try:
        mean, std = (tuple(map(float, part.split("/"))) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither unit, half, imagenet nor MEAN,STD such as 0.5,0.5 or "
            "0.485/0.456/0.406,0.229/0.224/0.225"
        ) from None
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: means must be finite, standard deviations positive and finite")
    return mean, std


def part(text: str) -> tuple[str, Any]:
    """One field of an Anatomy: whole numbers are numbers, a comma separates the names of several
    prefix tokens.

    >>> part("position=pos"), part("image_size=224"), part("prefix=cls,reg")
    (('position', 'pos'), ('image_size', 224), ('prefix', ('cls', 'reg')))
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form PART=TENSOR")
    if value.isdecimal():
        return name, int(value)
    return name, tuple(value.split(",")) if name == "prefix" else value


def setting(text: str) -> tuple[str, bool | int | float | str]:
    """A key and its value: a number where it looks like one, true or false, or else a text.

    >>> setting("local-steps=5"), setting("learning-rate=1e-3"), setting("optimizer=adamw")
    (('local-steps', 5), ('learning-rate', 0.001), ('optimizer', 'adamw'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, {"true": True, "false": False}.get(value.lower(), value)


def add_own_model(command: argparse.ArgumentParser, weights: str) -> None:
    """The option that names one's own model, for ``audit`` and ``map``; ``weights`` says with which."""
    command.add_argument(
        "--model", required=True, metavar="MODULE:FUNCTION",
        help=f"a function without arguments that returns the model, with the weights {weights}; imported from the "
        "current folder too, and run",
    )  # fmt: skip


def add_judging(command: argparse.ArgumentParser, *, strict: bool) -> None:
    """Options on what is asked of a picture before it is shown, for ``invert`` and ``audit``."""
    shown = "--strict" if strict else "--no-strict"
    command.add_argument(
        "--strict", action=argparse.BooleanOptionalAction, default=strict,
        help="--strict: an attack whose linear system is too small refuses; --no-strict: it shows the picture "
        f"that the system leaves, and says what is missing ({shown})",
    )  # fmt: skip
    command.add_argument(
        "--no-verify", dest="verify", action="store_false",
        help="skip the replay: faster, and no picture is called exact, for it was not played back",
    )  # fmt: skip
    command.add_argument(
        "--loss", type=loss, metavar="L",
        help="the client's, for the replay; see below (unknown, or cross-entropy where one is needed)",
    )  # fmt: skip
