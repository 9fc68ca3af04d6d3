"""Write the exercise notebooks for a class: the course's notebooks without solutions
and without outputs.

    python tools/make_student_notebooks.py                     # all chapters, into student/
    python tools/make_student_notebooks.py --to FOLDER --no-hints

What an exercise needs stays: its task, stub, check and hints. The folder also gets the syllabus and
the bibliography, which the notebooks link to. It stands alone: a link to a file that is not in it
has become plain words. The page for teachers (docs/teaching.md), with discussions and the grading
key, is not copied.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection
from pathlib import Path

import nbformat
from book_pages import outside_code
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "notebooks"

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_ANCHOR = re.compile(r"""<a\s[^>]*?href=["']([^"']+)["'][^>]*>(.*?)</a>""", re.S)


class StudentError(RuntimeError):
    """What kept the notebooks from being written, in words."""


def standing_alone(text: str, files: Collection[str]) -> str:
    """Markdown in which a link to a file that is not among ``files`` has become plain words.

    Examples
    --------
    >>> standing_alone("[one](01.ipynb#a), [two](../b.py), [three](https://x.y), `[four](c)`", {"01.ipynb"})
    '[one](01.ipynb#a), two, [three](https://x.y), `[four](c)`'
    """

    def leads_somewhere(target: str) -> bool:
        return re.match(r"[a-z]+:|#", target) is not None or target.partition("#")[0] in files

    def plain(prose: str) -> str:
        prose = _LINK.sub(lambda match: match[0] if leads_somewhere(match[3]) else match[2], prose)
        return _ANCHOR.sub(lambda match: match[0] if leads_somewhere(match[1]) else match[2], prose)

    return outside_code(text, plain)


def student_version(notebook: NotebookNode, *, hints: bool = True) -> NotebookNode:
    """A copy without the cells tagged ``exercise-solution``, without outputs and execution counts.

    Parameters
    ----------
    notebook : NotebookNode
        Of format 4; left as it is.
    hints : bool
        Keep the folded hints (cells tagged ``exercise-hints``).
    """
    left_out = {"exercise-solution"} | (set() if hints else {"exercise-hints"})
    copy = nbformat.from_dict(notebook)
    copy.metadata.pop("widgets", None)
    copy.cells = [cell for cell in copy.cells if not left_out & set(cell.metadata.get("tags", []))]
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return copy


def write_all(folder: Path, *, hints: bool = True, source: Path = SOURCE) -> list[Path]:
    """Write the student version of every notebook in ``source``, and its Markdown
    pages, into ``folder``.

    No link of what is written leads out of the folder, other than into the web.

    Parameters
    ----------
    folder : Path
        Made if it does not exist; notebooks of the same name in it are written anew.
    hints : bool
    source : Path

    Returns
    -------
    list of Path
        The notebooks written, in order.

    Raises
    ------
    StudentError
        If ``folder`` is where the originals are, cannot be written, or an original is no notebook.
    """
    originals = sorted(source.glob("*.ipynb"))
    if not originals:
        raise StudentError(f"{source}: there is no notebook")
    if folder.resolve() == source.resolve():
        raise StudentError(f"{folder}: these are the originals; name another folder with --to")
    written = []
    pages = sorted(source.glob("*.md"))
    files = {path.name for path in (*originals, *pages)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for page in pages:
            text = standing_alone(page.read_text(encoding="utf-8"), files)
            (folder / page.name).write_text(text, encoding="utf-8")
        for original in originals:
            try:
                notebook = nbformat.read(original, as_version=4)
            except (ValueError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
                raise StudentError(f"{original} cannot be read as a notebook: {error}") from error
            copy = student_version(notebook, hints=hints)
            for cell in copy.cells:
                if cell.cell_type == "markdown":
                    cell.source = standing_alone(cell.source, files)
            nbformat.validate(copy)
            beside = folder / f".{original.name}.new"
            nbformat.write(copy, beside)
            os.replace(beside, folder / original.name)
            written.append(folder / original.name)
    except OSError as error:
        raise StudentError(f"{folder} cannot be written: {error.strerror or error}") from error
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the course's notebooks without solutions and outputs.")
    parser.add_argument(
        "--to", "--out", type=Path, default=ROOT / "student", metavar="FOLDER", help="default: student/"
    )
    parser.add_argument("--no-hints", action="store_true", help="leave the folded hints out too")
    options = parser.parse_args(arguments)
    try:
        written = write_all(options.to, hints=not options.no_hints)
    except StudentError as error:
        print(error, file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
