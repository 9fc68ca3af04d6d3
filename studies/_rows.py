"""The CSV files of a study: filled case by case, read as data frames, their provenance beside them.

What a CSV has is never measured again: to measure anew, remove it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import platform
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

import aprillab as al
from aprillab.comparison.parallel import HERE, Failure, Workers, attempt, connected, failed
from aprillab.comparison.records import append_lines, write_lines


class StudyError(Exception):
    """A study that cannot go on, or a page that would not be true; the message says why."""


def fill(
    path: Path,
    record: type,
    cases: Iterable[tuple[Any, ...]],
    measure: Callable[[Any], Iterable[Any]],
    *,
    key: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    workers: Workers = HERE,
    together: Callable[[Any], Hashable] | None = None,
) -> None:
    """Measure the cases that the CSV does not have, and append the rows of each as it ends.

    With several workers the cases end in any order; at the end their rows are brought into the
    order of the cases, so that the CSV is one process's.

    Parameters
    ----------
    path : of the CSV; beside it, provenance.json says by which versions and settings it was made
    record : frozen dataclass whose fields are the columns
    cases : tuples of the values that their rows have in the columns ``key``
    measure : function from a case to its rows, one or more
    key : columns that tell the cases apart
    settings : what else the numbers depend on, the same for all rows
    workers : the processes that measure
    together : what neighbours must have in common to go to one worker, since they share what is
        costly; by default each case goes alone

    Raises
    ------
    StudyError
        If the CSV has other columns, or was measured with other settings.
    WorkersError
        If there are no such workers, or if cases failed in them; then all others have their rows.
    """
    columns, settings = [f.name for f in fields(record)], dict(settings or {})
    lines = _whole_lines(path, columns)
    before = origin(path) if lines else {"made": [], "settings": settings}
    if before["settings"] != settings:
        raise StudyError(f"{path} has settings {before['settings']}, not {settings}: use another --out, or remove it")
    done = {tuple(line[name] for name in key) for line in lines}
    cases = list(cases)
    missing = [case for case in cases if tuple(map(_text, case)) not in done]
    bar = tqdm(total=len(cases), initial=len(cases) - len(missing), desc=path.stem, unit=" case")
    with connected(workers if missing else HERE) as spread, bar:
        if missing or not path.is_file():
            write_lines(path, lines, columns)  # a line that was cut short goes
            made = [entry for entry in before["made"] if entry != provenance()]
            _keep_origin(path, {"made": [*made, *([provenance()] if workers.here else [])], "settings": settings})
        if workers.here:
            for case in missing:
                append_lines(path, _lines_of(measure, columns, case))
                bar.update()
            return
        alone = itertools.count()  # no two numbers are the same
        groups = [list(group) for _, group in itertools.groupby(missing, together or (lambda case: next(alone)))]
        try:
            with contextlib.closing(spread(partial(_measured, measure, columns, workers), groups)) as measured:
                _keep_measured(path, settings, groups, measured, bar)
        finally:
            texts = [tuple(map(_text, case)) for case in cases]
            write_lines(path, _in_order(_whole_lines(path, columns), texts, key), columns)


def _lines_of(measure: Callable[[Any], Iterable[Any]], columns: Sequence[str], case: Any) -> list[dict[str, str]]:
    return [{name: _text(getattr(row, name)) for name in columns} for row in measure(case)]


# --- Several workers ----------------------------------------------------------------------------------------------

Lines = list[dict[str, str]]


def _measured(
    measure: Callable[[Any], Iterable[Any]], columns: Sequence[str], workers: Workers, cases: Sequence[Any]
) -> tuple[str, list[Lines | Failure]]:
    """In a worker: what measured, and each case's lines."""
    return f"{provenance()}, {workers}", [attempt(_lines_of, measure, columns, case) for case in cases]


def _keep_measured(
    path: Path, settings: Mapping[str, Any], groups: Sequence[Sequence[Any]], measured: Iterable[tuple[int, Any]],
    bar: tqdm,
) -> None:  # fmt: skip
    failures: list[tuple[str, Failure]] = []
    for number, result in measured:
        where, found = ("", [result] * len(groups[number])) if isinstance(result, Failure) else result
        if where and where not in (before := origin(path)["made"]):
            _keep_origin(path, {"made": [*before, where], "settings": settings})
        for case, lines in zip(groups[number], found, strict=True):
            if isinstance(lines, Failure):
                failures.append((", ".join(map(_text, case)), lines))
                tqdm.write(f"{failures[-1][0]} failed: {lines.words}", file=sys.stderr)
            else:
                append_lines(path, lines)
                bar.update()
    if failures:
        raise failed(failures)


def _in_order(lines: Lines, cases: Sequence[tuple[str, ...]], key: Sequence[str]) -> Lines:
    """The lines with those of these cases in the cases' order, in the places that they have.

    A line of none of the cases belongs to the case before it, as the second of its rows may.
    """
    order, blocks = {case: i for i, case in enumerate(cases)}, list[tuple[int | None, Lines]]()
    for line in lines:
        place = order.get(tuple(line[name] for name in key))
        if blocks and (place is None or place == blocks[-1][0]):
            blocks[-1][1].append(line)
        else:
            blocks.append((place, [line]))
    ours = iter(sorted((block for block in blocks if block[0] is not None), key=lambda block: block[0] or 0))
    return [line for place, own in blocks for line in (own if place is None else next(ours)[1])]


def read(path: Path, record: type) -> pd.DataFrame:
    """The rows of a CSV, a column for each field; what is missing is NaN, and an empty text ""."""
    if not path.is_file():
        raise StudyError(f"there is no {path}: without --report it is measured")
    texts = dict.fromkeys((f.name for f in fields(record) if f.type == "str"), str)
    frame = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=["", "nan"])
    return frame.fillna(dict.fromkeys(texts, ""))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _whole_lines(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of a CSV but for one that was cut short at the end."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    if (found := reader.fieldnames) and list(found) != list(columns):
        raise StudyError(
            f"{path} has columns {', '.join(found)}, not {', '.join(columns)}: remove it to measure anew"
        )
    return list(reader)


# --- Where a CSV comes from ---------------------------------------------------------------------------------------


def provenance() -> str:
    """Versions, machine and threads of this process."""
    versions = f"aprillab {al.__version__}, torch {torch.__version__}, torchvision {version('torchvision')}"
    python, threads = platform.python_version(), torch.get_num_threads()
    return f"{versions}, Python {python}, {platform.machine()}, {threads} thread(s)"


def origin(path: Path) -> dict[str, Any]:
    """``made``, the provenances of a CSV's rows, and ``settings``, as :func:`fill` kept them."""
    return _origins(path.parent).get(path.name, {"made": [], "settings": {}})


def made(path: Path) -> str:
    """The provenances of a CSV in words."""
    return "; then ".join(origin(path)["made"])


def _origins(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / "provenance.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _keep_origin(path: Path, entry: dict[str, Any]) -> None:
    origins = dict(sorted((_origins(path.parent) | {path.name: entry}).items()))
    text = json.dumps(origins, indent=1, ensure_ascii=False)
    (path.parent / "provenance.json").write_text(text + "\n", encoding="utf-8")
