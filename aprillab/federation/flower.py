"""Flower, which not everybody has: what is said where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

OLDEST = "1.42"


class FlowerMissing(ImportError):
    """Flower is not installed, or too old."""


def need_flower() -> None:
    """Raise a clear error where Flower's present interface is not there.

    Raises
    ------
    FlowerMissing
        With what to install.
    """
    if find_spec("flwr") is None:
        raise FlowerMissing(f"Flower is not installed. {_REMEDY}")
    if find_spec("flwr.serverapp") is None:
        raise FlowerMissing(f"this Flower is older than {OLDEST}, and its interface another. {_REMEDY}")


_REMEDY = (
    'pip install "aprillab[federation]" brings it, best into an environment of its own: it takes older versions of '
    "rich, typer, packaging and protobuf than others want, so do not install it into Colab's own. What a federation "
    "left can be read without it: aprillab.federation.read_recording"
)
