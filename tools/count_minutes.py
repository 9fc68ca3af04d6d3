"""Count minutes and exercises in the notebooks, and write them where the course's
pages repeat them.

    python tools/count_minutes.py             # rewrite notebooks/README.md, and the map of chapter 00
    python tools/count_minutes.py --check     # only say what would change; exit status 1 if anything

A chapter's header says how long it takes to read and run, its exercises' headings say how long each
of them takes. The syllabus has both in a row for each chapter, its plans add them up, and the map
of chapter 00 has their sum.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"

_HEADER = re.compile(r"(\d+)(?: minutes)? to read(?: and run)?, (\d+) for")
_EXERCISE = re.compile(r"^### Exercise (\w+\.\d+) · (.+) · (?:★☆☆|★★☆|★★★) · (\d+) minutes$", re.M)
_ROW = re.compile(r"^(\| \[(\w+) · [^]]+\]\((\w+\.ipynb)\) \|.*\| )(\d+) min \| (\d+), (\d+) min( \|.*)$", re.M)
_PLAN_ROW = re.compile(r"^\| [^|]+ \| ((?:\w\d(?:, )?)+) \|", re.M)
_SUM = re.compile(r"(\*\*By the notebooks:\*\* )[\d.]+( hours to read and run, )[\d.]+( for the exercises)")
_NAMED = re.compile(r"(\*\*By the notebooks:\*\* )\d+( minutes for the exercises named)")


@dataclass(frozen=True)
class Minutes:
    """What a chapter says of itself.

    Attributes
    ----------
    reading : int or None
        Minutes to read and run; None where its header does not say.
    exercises : dict of int
        Minutes by "number · title", in order.
    """

    reading: int | None
    exercises: dict[str, int]


def minutes_of(path: Path) -> Minutes:
    """Minutes of one notebook, from its text."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    header = _HEADER.search(texts[0]) if texts else None
    each = {f"{number} · {title}": int(minutes) for number, title, minutes in _EXERCISE.findall("\n".join(texts))}
    return Minutes(int(header[1]) if header else None, each)


def counted(syllabus: str, found: dict[str, Minutes]) -> str:
    """The syllabus with every number as the notebooks have it.

    Parameters
    ----------
    syllabus : str
        Markdown: rows of chapters, and plans, each below a heading of third level.
    found : dict of Minutes
        By the notebook's file name. A row without a notebook stays as it is, and is
        added up as it stands.
    """

    def row(match: re.Match[str]) -> str:
        chapter = found.get(match[3])
        if chapter is None:
            return match[0]
        reading, each = chapter.reading or int(match[4]), chapter.exercises
        return f"{match[1]}{reading} min | {len(each)}, {sum(each.values())} min{match[7]}"

    text = _ROW.sub(row, syllabus)
    rows = {match[2]: (int(match[4]), int(match[6])) for match in _ROW.finditer(text)}
    exercises = {name: minutes for chapter in found.values() for name, minutes in chapter.exercises.items()}
    first, *sections = re.split(r"(?=^### )", text, flags=re.M)
    return first + "".join(_with_sums(section, rows, exercises) for section in sections)


def _with_sums(section: str, rows: dict[str, tuple[int, int]], exercises: dict[str, int]) -> str:
    """A plan with its sums: over the chapters that its second column names, or over all
    without such a column.
    """
    named = {name for cell in _PLAN_ROW.findall(section) for name in cell.split(", ")} or set(rows)
    reading, solving = (sum(rows[name][i] for name in named) / 60 for i in (0, 1))
    section = _SUM.sub(rf"\g<1>{reading:.1f}\g<2>{solving:.1f}\g<3>", section)
    each = [exercises[name] for name in exercises if f"Exercise {name}" in section]
    return _NAMED.sub(rf"\g<1>{sum(each)}\g<2>", section)


def mapped(source: str, found: dict[str, Minutes]) -> str:
    """A cell of chapter 00 with the map's minutes, exercises included, as the notebooks have them."""

    def row(match: re.Match[str]) -> str:
        chapter = found.get(match[2])
        if chapter is None or chapter.reading is None:
            return match[0]
        return f"{match[1]}{chapter.reading + sum(chapter.exercises.values())}{match[4]}"

    return re.sub(r"(\]\((\w+\.ipynb)\) \|[^|]+\| )(\d+)( \|)", row, source)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    check = parser.parse_args(arguments).check
    found = {path.name: minutes_of(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    syllabus = NOTEBOOKS / "README.md"
    pages = {syllabus: counted(syllabus.read_text(encoding="utf-8"), found)}
    for path in NOTEBOOKS.glob("00_*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = mapped("".join(cell["source"]), found).splitlines(keepends=True)
        pages[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    changed = [path for path, text in pages.items() if path.read_text(encoding="utf-8") != text]
    for path in changed:
        if not check:
            path.write_text(pages[path], encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'has other numbers than the notebooks' if check else 'written'}")
    return int(check and bool(changed))


if __name__ == "__main__":
    raise SystemExit(main())
