"""Markdown tables of the studies' pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from aprillab.comparison.records import Row

Line = Callable[[pd.DataFrame], dict[str, Any]]


def grouped(frame: pd.DataFrame, names: Sequence[str], line: Line) -> pd.DataFrame:
    """A line for each group of rows: its values of ``names``, and what ``line`` makes of it."""
    groups = frame.groupby(list(names), sort=False, dropna=False)
    return pd.DataFrame([dict(zip(names, key, strict=True)) | line(group) for key, group in groups])


def markdown(frame: pd.DataFrame, names: Sequence[str] | None = None) -> str:
    """A Markdown table, with ``names`` for the columns' own; "–" for what is missing.

    Cells are not padded, so that one changed number changes one line.
    """
    frame = frame.set_axis(names, axis=1) if names else frame
    cells = frame.astype(object).where(frame.notna(), "–")
    return cells.to_markdown(index=False, disable_numparse=True, stralign=None, numalign=None)


def formatted(frame: pd.DataFrame, **formats: str) -> pd.DataFrame:
    """The frame with these columns as text, each by its format; what is missing stays missing."""
    return frame.assign(**{name: frame[name].map(f"{{:{form}}}".format, "ignore") for name, form in formats.items()})


def comparison_frame(parts: dict[str, Iterable[Row]]) -> pd.DataFrame:
    """Rows of a comparison, a column for each field of row and case; ``row`` is the row itself."""
    return pd.DataFrame(
        [vars(row.case) | vars(row) | {"part": name, "row": row} for name, rows in parts.items() for row in rows]
    )


def comparison_made(frame: pd.DataFrame) -> str:
    """Versions, machine and threads of a comparison's rows, in words."""
    made = dict.fromkeys(zip(*(frame[n] for n in ("aprillab", "torch", "python", "machine", "threads")), strict=True))
    return "; then ".join("aprillab {}, torch {}, Python {}, {}, {} thread(s)".format(*facts) for facts in made)
