"""Markdown tables of the studies' pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from aprillab import viz
from aprillab.comparison.figures import picture_pages
from aprillab.comparison.records import Case, Row, read_rows

from ._rows import StudyError

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


# --- Studies that are comparisons ---------------------------------------------------------------------------------


def comparison_frame(path: Path, parts: Mapping[str, Sequence[Case]]) -> pd.DataFrame:
    """The rows of the cases, a column for each field of row and case; ``row`` is the row itself."""
    known = {row.case: row for row in read_rows(path)}
    rows = [(part, known[case]) for part, cases in parts.items() for case in cases if case in known]
    if not rows:
        raise StudyError(f"{path} has no row of this study: without --report it is measured")
    return pd.DataFrame([vars(row.case) | vars(row) | {"part": part, "row": row} for part, row in rows])


def comparison_made(frame: pd.DataFrame) -> str:
    """Versions, machine and threads of a comparison's rows, in words."""
    made = dict.fromkeys(zip(*(frame[n] for n in ("aprillab", "torch", "python", "machine", "threads")), strict=True))
    return "; then ".join("aprillab {}, torch {}, Python {}, {}, {} thread(s)".format(*facts) for facts in made)


def comparison_pictures(path: Path, rows: Sequence[Row]) -> dict[str, bytes]:
    """The first page of the rows' pictures; none where they are no more, as in the repository."""
    if not path.with_name(f"{path.stem}_pictures").is_dir():
        return {}
    return {f"{path.stem}.png": viz.to_png(picture_pages(rows, path, lines=12)[0], dpi=110)}
