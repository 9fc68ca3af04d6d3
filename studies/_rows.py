"""The CSV files of a study: filled case by case, read as data frames, their provenance beside them.

What a CSV has is never measured again: to measure anew, remove it.
"""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

import aprillab as al
from aprillab.comparison.records import append_lines, write_lines


class StudyError(Exception):
    """A study that cannot go on, or a page that would not be true; the message says why."""


def fill(
    path: Path,
    record: type,
    cases: Mapping[tuple[Any, ...], Any],
    measure: Callable[[Any], Iterable[Any]],
    *,
    key: Sequence[str],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Measure the cases that the CSV does not have, and append the rows of each as it ends.

    Parameters
    ----------
    path : of the CSV; beside it, provenance.json says by which versions and settings it was made
    record : frozen dataclass whose fields are the columns
    cases : by the values that their rows have in the columns ``key``
    measure : function from a case to its rows, one or more
    key : columns that tell the cases apart
    settings : what else the numbers depend on, the same for all rows

    Raises
    ------
    StudyError
        If the CSV has other columns, or was measured with other settings.
    """
    columns, settings = [f.name for f in fields(record)], dict(settings or {})
    lines = _whole_lines(path, columns)
    before = origin(path) if lines else {"made": [], "settings": settings}
    if before["settings"] != settings:
        raise StudyError(f"{path} has settings {before['settings']}, not {settings}: use another --out, or remove it")
    done = {tuple(line[name] for name in key) for line in lines}
    missing = {place: case for place, case in cases.items() if tuple(map(_text, place)) not in done}
    if missing or not path.is_file():
        write_lines(path, lines, columns)  # a line that was cut short goes
        made = [entry for entry in before["made"] if entry != provenance()]
        _keep_origin(path, {"made": [*made, provenance()], "settings": settings})
    with tqdm(total=len(cases), initial=len(cases) - len(missing), desc=path.stem, unit=" case") as bar:
        for case in missing.values():
            append_lines(path, [{name: _text(getattr(row, name)) for name in columns} for row in measure(case)])
            bar.update()


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
