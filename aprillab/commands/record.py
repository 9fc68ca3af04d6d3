"""``aprillab record``: which exercises are solved, as a page to hand in."""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..exercises.record import Chapter, RecordError, read_chapter
from ..version import __version__
from .files import made, writable_file, write
from .messages import CommandError, note, patience

WORDS = {
    "solved": "✓ solved",
    "wrong": "✗ not yet",
    "stub": "not begun",
    "not run": "not run",
    "changed": "not counted",
}
AS_SAVED = "Read from the notebooks as they were saved. Nothing was run, and saved outputs can be edited."
AS_RUN = "Each notebook was run from top to bottom in a fresh kernel, and this is what its checks answered."


def run(arguments: argparse.Namespace) -> int:
    """Read, or run and read, and write the page; returns 0."""
    page = writable_file(arguments.out)
    data = writable_file(arguments.json) if arguments.json else None
    chapters = read_all(notebooks(arguments.notebooks), run_first=arguments.run)
    facts = {
        "format": 1, "aprillab": __version__, "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "name": arguments.name, "run": arguments.run, **totals(chapters), "chapters": list(map(as_data, chapters)),
    }  # fmt: skip
    with made(page.parent):
        print("wrote", write(page, page_of(facts, chapters).encode()))
        if data:
            print("wrote", write(data, f"{json.dumps(facts, indent=2, ensure_ascii=False)}\n".encode()))
    print(f"{facts['solved']} of {facts['exercises']} exercises, {facts['points']} of {facts['of']} points")
    return 0


def notebooks(names: Iterable[str]) -> list[Path]:
    """The files that these names stand for: files, folders' notebooks, and patterns that no shell expanded.

    Raises
    ------
    CommandError
        If a name stands for no notebook.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        here = Path(path.anchor or ".")
        files = [path] if path.is_file() else sorted(path.glob("*.ipynb") if path.is_dir() else _matching(here, name))
        if not files:
            raise CommandError(f"{name}: no such notebook, and no folder that has any")
        found += files
    return list({file.resolve(): file for file in found}.values())


def _matching(folder: Path, pattern: str) -> list[Path]:
    return list(folder.glob(pattern.removeprefix(folder.anchor))) if re.search(r"[*?\[]", pattern) else []


def read_all(paths: Sequence[Path], *, run_first: bool) -> list[Chapter]:
    """Every notebook that has exercises; of the others there is a note."""
    chapters = []
    with patience("still running notebooks") as step:
        for path in paths:
            if run_first:
                step(path.name)
            try:
                chapter = read_chapter(path, run=run_first)
            except RecordError as error:
                raise CommandError(str(error)) from error
            if chapter.exercises:
                chapters.append(chapter)
            else:
                note(f"{path}: has no exercise with a check, and is left out")
    return chapters


def totals(chapters: Sequence[Chapter]) -> dict[str, int]:
    """Numbers over all chapters."""
    return {
        "solved": sum(chapter.solved for chapter in chapters),
        "exercises": sum(len(chapter.exercises) for chapter in chapters),
        "points": sum(chapter.points for chapter in chapters),
        "of": sum(chapter.worth for chapter in chapters),
    }


def as_data(chapter: Chapter) -> dict[str, Any]:
    """A chapter for JSON: its fields, and points beside stars."""
    facts = asdict(chapter)
    for exercise, row in zip(chapter.exercises, facts["exercises"], strict=True):
        row |= {"points": exercise.points, "of": exercise.worth}
    return facts


def page_of(facts: dict[str, Any], chapters: Sequence[Chapter]) -> str:
    """The page, in Markdown."""
    who = f"{facts['name']} · " if facts["name"] else ""
    text = (
        f"# Record of solved exercises\n\n{who}{facts['date']} · aprillab {facts['aprillab']}\n\n"
        f"**{facts['solved']} of {facts['exercises']} exercises, {facts['points']} of {facts['of']} points.** "
        f"*{AS_RUN if facts['run'] else AS_SAVED}*\n"
    )
    for chapter in chapters:
        text += f"\n## {chapter.title}\n\n{chapter.solved} of {len(chapter.exercises)} exercises, "
        text += f"{chapter.points} of {chapter.worth} points. `{chapter.file}`, SHA-256 `{chapter.sha256}`\n\n"
        text += "| exercise | title | stars | points | state | the check said |\n|---|---|---|---|---|---|\n"
        for exercise in chapter.exercises:
            cells = (exercise.number, exercise.title, exercise.stars, f"{exercise.points} of {exercise.worth}")
            words = (WORDS[exercise.state], exercise.message if exercise.state != "stub" else "")
            text += "| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, *words)) + " |\n"
    return text
