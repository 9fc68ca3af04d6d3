"""Parts of an anatomy as a caller writes them, in Python or on the command line."""

from __future__ import annotations

import re
from typing import Any

from ..preprocessing import Preprocessing
from .record import NAME_FIELDS, ROW_FIELDS, TUPLE_FIELDS, Rows

FIRST_BLOCKS = ("april", "postnorm", "prenorm", "two norms", "rmsnorm", "unknown")
_NUMBERS = ("position_prefix", "channels", "heads")


def as_field(name: str, value: Any) -> Any:
    """A part in the type of its field.

    Parameters
    ----------
    name : str
        A field of :class:`Anatomy`.
    value
        Sizes may be a number, a pair or a text such as ``"24x32"``.

    Raises
    ------
    ValueError
        If the value is of no use for that field.

    Examples
    --------
    >>> as_field("image_size", "24x32"), as_field("image_size", 24), as_field("prefix", "cls")
    ((24, 32), (24, 24), ('cls',))
    """
    if value is None:
        return None
    if name in ROW_FIELDS:
        return value if isinstance(value, Rows) else Rows.parse(_text(name, value))
    if name in ("image_size", "patch_size"):
        return _size(name, value)
    if name in _NUMBERS:
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be a whole number, not {value!r}")
        return value
    if name in TUPLE_FIELDS:
        names = (value,) if isinstance(value, str) else value
        return tuple(_text(name, token) for token in names)
    if name in (*NAME_FIELDS, "pixel_order", "first_block"):
        return _one_of(name, _text(name, value))
    if name == "preprocessing" and not isinstance(value, Preprocessing):
        raise ValueError(f"preprocessing must be a Preprocessing, such as aprillab.HALF, not {value!r}")
    return value


def _size(name: str, value: Any) -> tuple[int, int]:
    numbers = [int(n) if n.isdecimal() else 0 for n in re.split("[x×,]", value)] if isinstance(value, str) else value
    sizes = (numbers, numbers) if isinstance(numbers, int) else tuple(numbers)
    sizes = sizes * 2 if len(sizes) == 1 else sizes
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{name} must be a number of pixels or (height, width), not {value!r}")
    return sizes


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be the name of a tensor, not {value!r}")
    return value


def _one_of(name: str, value: str) -> str:
    """The text itself, if it is one that the field may have."""
    if name == "pixel_order" and sorted(value.split()) != ["c", "h", "w"]:
        raise ValueError(f"pixel_order must have the letters c, h and w, as in 'h w c', not {value!r}")
    if name == "first_block" and value not in FIRST_BLOCKS:
        raise ValueError(f"first_block must be one of {', '.join(map(repr, FIRST_BLOCKS))}, not {value!r}")
    return value
