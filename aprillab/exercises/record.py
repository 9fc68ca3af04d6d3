"""What a reader has solved: the checks' answers, read out of notebooks as they were saved or run.

A notebook's file is JSON, and is read as such: its headings name the exercises, the cells tagged
``exercise-check`` hold what the checks answered. Stored answers can be edited by whoever holds the
file; :func:`executed` runs the notebook first, so that they come from its code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

POINTS = {"★☆☆": 1, "★★☆": 2, "★★★": 4}
STUB = "Still a stub"

_HEADING = re.compile(r"^### Exercise (\w+)\.(\d+) · (.+) · (★☆☆|★★☆|★★★) · \d+ minutes *$", re.M)
_CALL = re.compile(r"ex\.(check_\w+)\(\w+\)")
_ANSWER = re.compile(r"\s*([✓✗]) ?(.*)", re.S)


class RecordError(ValueError):
    """A notebook that cannot be read or run; the message is for people."""


@dataclass(frozen=True)
class Solved:
    """One exercise, and what its check said.

    Attributes
    ----------
    number : str
        "1.2".
    title : str
    stars : str
        "★★☆".
    state : str
        "solved"; "wrong"; "stub" (not begun); "not run" (the cell has no answer); "changed" (the
        check's cell is not the course's, and its answer does not count).
    message : str
        What the check said, without its mark.
    """

    number: str
    title: str
    stars: str
    state: str
    message: str

    @property
    def worth(self) -> int:
        """Points of the exercise: 1, 2 or 4."""
        return POINTS[self.stars]

    @property
    def points(self) -> int:
        """Points earned: what it is worth, or 0."""
        return self.worth if self.state == "solved" else 0


@dataclass(frozen=True)
class Chapter:
    """One notebook's exercises.

    Attributes
    ----------
    file : str
        The file's name.
    title : str
        Its first heading.
    sha256 : str
        Of the file as it was saved.
    exercises : tuple of Solved
    """

    file: str
    title: str
    sha256: str
    exercises: tuple[Solved, ...]

    @property
    def solved(self) -> int:
        return sum(exercise.state == "solved" for exercise in self.exercises)

    @property
    def points(self) -> int:
        return sum(exercise.points for exercise in self.exercises)

    @property
    def worth(self) -> int:
        return sum(exercise.worth for exercise in self.exercises)


def read_chapter(path: Path, *, run: bool = False, timeout: float = 600) -> Chapter:
    """The exercises of one notebook and what their checks answered.

    Parameters
    ----------
    path : Path
    run : bool
        Run the notebook first, in a fresh kernel, and read what came out. The file stays as it is.
    timeout : float
        Seconds that a single cell may take, with ``run``.

    Raises
    ------
    RecordError
        If it is no notebook, or does not run.
    """
    try:
        content = path.read_bytes()
        notebook = json.loads(content)
        cells = notebook["cells"]
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path}: this is no notebook of format 4") from error
    if run:
        cells = executed(content.decode("utf-8"), path.parent, timeout=timeout, name=str(path))
    title = re.search(r"^# (.+)$", "\n".join(_source(cell) for cell in cells), re.M)
    digest = hashlib.sha256(content).hexdigest()
    return Chapter(path.name, title[1].strip() if title else path.stem, digest, tuple(exercises_of(cells)))


def exercises_of(cells: list[Mapping[str, Any]]) -> Iterator[Solved]:
    """Each exercise of a notebook's cells: the last heading before a check belongs to it.

    Examples
    --------
    >>> heading = {"cell_type": "markdown", "source": "### Exercise 1.2 · Divide · ★★☆ · 10 minutes"}
    >>> said = {"output_type": "execute_result", "data": {"text/plain": "✗ A transpose."}}
    >>> check = {"cell_type": "code", "source": "ex.check_invert_linear(invert_linear)",
    ...          "metadata": {"tags": ["exercise-check"]}, "outputs": [said]}
    >>> next(exercises_of([heading, check]))
    Solved(number='1.2', title='Divide', stars='★★☆', state='wrong', message='A transpose.')
    """
    heading = None
    for cell in cells:
        if cell.get("cell_type") == "markdown":
            heading = next(reversed(list(_HEADING.finditer(_source(cell)))), heading)
        elif heading and "exercise-check" in cell.get("metadata", {}).get("tags", []):
            chapter, number, title, stars = heading.groups()
            state, message = _state(cell)
            yield Solved(f"{chapter}.{number}", title, stars, state, message)
            heading = None


def _state(cell: Mapping[str, Any]) -> tuple[str, str]:
    lines = _source(cell).strip().splitlines()
    call = _CALL.fullmatch(lines[-1].strip()) if lines else None
    if call is None or call[1] not in checks():
        return "changed", "the check's cell does not call a check of the course"
    answer = next((found for text in reversed(_texts(cell)) if (found := _ANSWER.fullmatch(text))), None)
    if answer is None:
        return "not run", ""
    message = " ".join(answer[2].split())
    if answer[1] == "✓":
        return "solved", message
    return ("stub" if message.startswith(STUB) else "wrong"), message


@cache
def checks() -> frozenset[str]:
    """Names of all checks that the course has.

    Examples
    --------
    >>> "check_invert_linear" in checks(), "check_anything" in checks()
    (True, False)
    """
    here = Path(__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in here.glob("*.py")]
    return frozenset(name for text in texts for name in re.findall(r"^def (check_\w+)\(", text, re.M))


def _source(cell: Mapping[str, Any]) -> str:
    return _joined(cell.get("source", ""))


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def _texts(cell: Mapping[str, Any]) -> list[str]:
    """What a cell's last line left as plain text; what it printed is left out."""
    shown = [output for output in cell.get("outputs", []) if output.get("output_type") == "execute_result"]
    return [_joined(output.get("data", {}).get("text/plain", "")) for output in shown]


def executed(content: str, folder: Path, *, timeout: float, name: str) -> list[Mapping[str, Any]]:
    """The cells of a notebook after a run from top to bottom in a fresh kernel; errors
    stay in their cells.

    Parameters
    ----------
    content : str
        The notebook's JSON.
    folder : Path
        Where it runs.
    timeout : float
        Seconds for a single cell.
    name : str
        Of the notebook, for messages.

    Raises
    ------
    RecordError
        If nbclient is not installed, a cell takes too long, or the kernel dies.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellTimeoutError, DeadKernelError
    except ImportError:
        raise RecordError('to run notebooks, install Jupyter with the package: pip install -e ".[lab]"') from None
    notebook = nbformat.reads(content, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute()
    except (CellTimeoutError, DeadKernelError) as error:
        raise RecordError(f"{name}: {str(error).splitlines()[0]}") from error
    return json.loads(nbformat.writes(notebook))["cells"]
