"""The book's source: every page of the repository that the book has, copied with links that
lead inside the book.

A page keeps its place: ``notebooks/README.md`` is ``notebooks/README`` in the book, so that most
relative links hold as they are. Links to code lead to the API reference, links to other files to a
page that shows the file. Nothing here needs Sphinx, and no module of the package is imported: what
it says of a module is read from the source.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path, PurePosixPath

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

ROOT = Path(__file__).resolve().parents[1]

#: Pages of the repository that are pages of the book, at the same place.
PAGES = (
    "notebooks/*.md",
    "data/README.md",
    "data/results/*.md",
    "studies/README.md",
    "aprillab/attacks/README.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE-PROSE.md",
)
PICTURES = ("data/results/*.png", "docs/demo.png")
#: The book's own pages, from docs/, at its root.
OWN = "docs/*.md"
CHAPTERS = "notebooks/*.ipynb"
PARTS = {"I · The leak": range(5), "II · Attack and defence": range(5, 9), "III · In the field": range(9, 13)}
APPENDICES = "Appendices"
#: Rooms that no program calls: the command line, and the checks of exercises, which would
#: tell the solutions.
LEFT_OUT = ("__main__", "commands", "exercises")

#: Under a figure that moves in Jupyter alone.
SLIDERS = """```{admonition} Sliders
This figure needs Python behind it and moves in Jupyter only, which `make lab` opens. A static one beside it shows the
same at a few places.
```"""

_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\()([^()\s]+)(\))")
_CODE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)", re.M | re.S)
_TAG = re.compile(r"\\tag\{(\w+\.\d+)\}")


class BookError(RuntimeError):
    """What keeps the book from being built: the page, the place, and what to do."""


def write_source(folder: Path, root: Path = ROOT) -> int:
    """Write the book's source into ``folder``, which is emptied first.

    Returns
    -------
    int
        How many pages it has.

    Raises
    ------
    BookError
        If a link leads nowhere, a chapter has no row in the syllabus, or the folder
        holds something else.
    """
    if folder.exists():
        if not (folder / "conf.py").exists():
            raise BookError(f"{folder} is not a source of the book (no conf.py), and would be emptied: name another")
        shutil.rmtree(folder)
    shutil.copytree(root / "docs", folder, ignore=shutil.ignore_patterns("__pycache__", "*.png", "*.md", "workshop"))
    book = Book(root, folder)
    for pattern in PICTURES:
        for path in sorted(root.glob(pattern)):
            book.copy(path.relative_to(root).as_posix())
    for pattern in PAGES:
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            book.write(name, book.relinked(one_title(path.read_text(encoding="utf-8")), name))
    equations = equations_of(root)
    for path in sorted(root.glob(CHAPTERS)):
        name = path.relative_to(root).as_posix()
        notebook = chapter_page(nbformat.read(path, as_version=4), path.name, equations)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = book.relinked(cell.source, name)
        book.write(name, nbformat.writes(notebook))
        book.copy(name, f"extra/downloads/{path.name}")
    fillings = {"<!-- chapters -->": chapter_map(root), "<!-- modules -->": room_list(root)}
    for path in sorted(root.glob(OWN)):
        name, text = path.name, path.read_text(encoding="utf-8")
        for mark, filling in fillings.items():
            text = text.replace(mark, filling)
        book.write(name, book.relinked(text, f"docs/{name}", name))
    for module, path in modules(root).items():
        book.write(f"api/{module}.rst", api_page(module, path, root))
    book.show_linked_files()
    return len(book.pages)


class Book:
    """The folder that is being written, and the files that its pages link to."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder, self.modules = root, folder, modules(root)
        self.pages: set[str] = set()
        self.shown: set[str] = set()
        self.own = {path.relative_to(root).as_posix() for pattern in PAGES for path in root.glob(pattern)}
        self.own |= {
            path.relative_to(root).as_posix() for pattern in (*PICTURES, CHAPTERS) for path in root.glob(pattern)
        }

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        self.pages.add(name)

    def copy(self, name: str, to: str | None = None) -> None:
        path = self.folder / (to or name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.root / name, path)

    def relinked(self, text: str, name: str, to: str | None = None) -> str:
        """Markdown of the file ``name`` with links as they have to be on the page
        ``to`` of the book.
        """

        def replaced(match: re.Match[str]) -> str:
            target, mark, anchor = match[2].partition("#")
            if re.match(r"[a-z]+:", target) or not target:
                return match[0]
            return f"{match[1]}{self._place(target, name, to or name)}{mark}{anchor}{match[3]}"

        return outside_code(text, lambda prose: _LINK.sub(replaced, prose))

    def _place(self, target: str, name: str, to: str) -> str:
        """Where a relative link of the file ``name`` leads on the page ``to``."""
        found = os.path.normpath(PurePosixPath(name).parent / target).replace(os.sep, "/")
        path = self.root / found
        if found.startswith("..") or not path.exists():
            raise BookError(f"{name} links to {target}, and there is no such file")
        if path in self.root.glob(OWN):
            page = path.name
        elif found in self.own:
            page = found
        elif (
            module := ".".join(PurePosixPath(found).with_suffix("").parts).removesuffix(".__init__")
        ) in self.modules:
            page = f"api/{module}.rst"
        else:
            self.shown.add(found)
            page = f"shown/{found}.md"
        return os.path.relpath(page, PurePosixPath(to).parent).replace(os.sep, "/")

    def show_linked_files(self) -> None:
        """A page for each file, or for all files of a folder, that a page links to and that
        is no page itself.
        """
        for found in sorted(self.shown):
            path = self.root / found
            files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _readable(file))
            text = f"---\norphan: true\n---\n\n# {found}\n"
            for file in files:
                inner = file.relative_to(self.root).as_posix()
                language = {".py": "python", ".toml": "toml", ".cff": "yaml"}.get(file.suffix, "text")
                text += f"\n## {inner}\n" if path.is_dir() else ""
                text += f"\n``````{language}\n{file.read_text(encoding='utf-8').rstrip()}\n``````\n"
            self.write(f"shown/{found}.md", text)


def _readable(path: Path) -> bool:
    return path.suffix in (".py", ".toml", ".md", ".txt") and "__pycache__" not in path.parts


# --- Markdown ---------------------------------------------------------------------------------------------------


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """``change`` applied to a Markdown text whose fences and code spans are hidden from it.

    Examples
    --------
    >>> outside_code("a `a` [`a`](a)", lambda prose: prose.replace("a", "b"))
    'b `a` [`a`](b)'
    """
    hidden: list[str] = []

    def hide(match: re.Match[str]) -> str:
        hidden.append(match[0])
        return f"\0{len(hidden) - 1}\0"

    changed = change(_CODE.sub(hide, text))
    return re.sub("\0([0-9]+)\0", lambda match: hidden[int(match[1])], changed)


def one_title(text: str) -> str:
    """The text with every heading after a second title one level deeper, so that the
    page has one title.

    Examples
    --------
    >>> one_title("# A" + chr(10) + "## a" + chr(10) + "# B" + chr(10) + "## b").split(chr(10))
    ['# A', '## a', '## B', '### b']
    """
    titles, fenced, lines = 0, False, []
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        titles += not fenced and line.startswith("# ")
        lines.append(f"#{line}" if titles > 1 and not fenced and re.match(r"#+ ", line) else line)
    return "\n".join(lines)


# --- Chapters ---------------------------------------------------------------------------------------------------


def equations_of(root: Path) -> set[str]:
    """The numbers of all equations in the chapters: ``4.3``."""
    cells = (cell for path in root.glob(CHAPTERS) for cell in nbformat.read(path, as_version=4).cells)
    return {number for cell in cells if cell.cell_type == "markdown" for number in _TAG.findall(cell.source)}


def chapter_page(notebook: NotebookNode, name: str, equations: set[str]) -> NotebookNode:
    """A chapter as the book shows it: a line on where it runs, sliders explained, equations
    that can be linked to.
    """
    page = deepcopy(notebook)
    cells, page.cells = page.cells, []
    for cell in cells:
        page.cells.append(cell)
        if cell.cell_type == "markdown":
            cell.source = linked_equations(cell.source, equations)
        elif "setup" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("hide-cell")
        elif cell.cell_type == "code" and moves_in_jupyter(cell):
            page.cells.append(new_markdown_cell(SLIDERS))
    link = f'<a href="../downloads/{name}" download>Download the notebook</a>'
    page.cells.insert(
        1,
        new_markdown_cell(
            f'<p class="run-it">{link}, or run it from the repository with <code>make lab</code>. '
            "What is printed and drawn here is from one run of it.</p>"
        ),
    )
    return page


def moves_in_jupyter(cell: NotebookNode) -> bool:
    """Whether a code cell shows a widget: a committed notebook holds a still picture
    of it, or nothing.
    """
    shows = re.search(r"^(?:widgets\.)?(?:sliders|interactive_output)\(", cell.source, re.M) is not None
    return shows and not any(output.output_type == "stream" for output in cell.outputs)


def linked_equations(text: str, equations: set[str]) -> str:
    """Every displayed equation with a number gets an anchor, and every ``(4.3)`` in
    prose a link to it.
    """

    def link(match: re.Match[str]) -> str:
        number = match[1]
        return f"[({number})](#{anchor_of(number)})" if number in equations else match[0]

    def prose(text: str) -> str:
        pieces = re.split(r"(\$\$[^$]+\$\$|\$[^$]+\$|!?\[[^\]]*\]\([^)]*\)|^#+ .*$|^<.*$)", text, flags=re.M)
        # Even pieces are plain; what the pattern caught, formulas, links, headings and HTML, stays.
        pieces[::2] = [re.sub(r"(?<![\w\])])\((\w+\.\d+)\)", link, piece) for piece in pieces[::2]]
        return "".join(pieces)

    def anchored(match: re.Match[str]) -> str:
        number = _TAG.search(match[0])
        return f"({anchor_of(number[1])})=\n{match[0]}" if number else match[0]

    text = outside_code(text, prose)
    return outside_code(text, lambda piece: re.sub(r"^\$\$.+?\$\$$", anchored, piece, flags=re.M | re.S))


def anchor_of(number: str) -> str:
    """
    Examples
    --------
    >>> anchor_of("4.3")
    'eq-4-3'
    """
    return f"eq-{number.replace('.', '-')}"


def chapter_map(root: Path) -> str:
    """The chapters by part, each with what its row of the syllabus promises, and the part's
    table of contents.
    """
    syllabus = (root / "notebooks" / "README.md").read_text(encoding="utf-8")
    row = re.compile(r"^\| \[(\w+) · ([^\]]+)\]\(([^)]+)\) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", re.M)
    rows = {match[3]: match for match in row.finditer(syllabus)}
    notebooks = sorted(path.name for path in root.glob(CHAPTERS))
    if unknown := set(notebooks) - set(rows):
        raise BookError(
            f"notebooks/README.md has no row for {', '.join(sorted(unknown))}: the book's map is made of it"
        )
    text = ""
    for part in (*PARTS, APPENDICES):
        chapters = [name for name in notebooks if part_of(name) == part]
        if not chapters:
            continue
        text += f"### {part}\n\n"
        for name in chapters:
            number, title, _, promise, reading, exercises = (cell.strip() for cell in rows[name].groups())
            minutes = f"{reading} to read; exercises: {exercises}"
            text += f"**[{number} · {title}](../notebooks/{name})** — afterwards you can {promise}. *{minutes}.*\n\n"
        listed = "".join(f"notebooks/{Path(name).stem}\n" for name in chapters)
        text += f"```{{toctree}}\n:hidden:\n:caption: {part}\n\n{listed}```\n\n"
    return text


def part_of(name: str) -> str:
    """
    Examples
    --------
    >>> part_of("04_unmodified_vits.ipynb"), part_of("A1_float32.ipynb")
    ('I · The leak', 'Appendices')
    """
    return next((part for part, numbers in PARTS.items() if name[:2] in {f"{n:02}" for n in numbers}), APPENDICES)


# --- API reference ----------------------------------------------------------------------------------------------


def modules(root: Path) -> dict[str, Path]:
    """Module by name, ``aprillab.attacks.evidence``, and its file; the rooms of ``LEFT_OUT``
    are not among them.
    """
    found = {}
    for path in sorted((root / "aprillab").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[1] not in LEFT_OUT:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def first_sentence(path: Path) -> str:
    """The first paragraph of a module's docstring, as one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def room_list(root: Path) -> str:
    """The package's rooms as a list, and their table of contents."""
    rooms = {name: path for name, path in modules(root).items() if name.count(".") <= 1}
    text = ""
    for name, path in rooms.items():
        # Docstrings are written for Sphinx: code in two backticks, which Markdown reads
        # alike, and roles.
        summary = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", first_sentence(path))
        text += f"- [`{name}`](../{path.relative_to(root).as_posix()}): {summary}\n"
    listed = "".join(f"api/{name}\n" for name in rooms)
    return f"{text}\n```{{toctree}}\n:hidden:\n\n{listed}```\n"


def api_page(module: str, path: Path, root: Path) -> str:
    """A module's page: its docstring, its members, and for a folder the list of its modules."""
    room = module.count(".") <= 1
    text = "" if room else ":orphan:\n\n"
    title = module if room else module.rpartition(".")[2]
    text += f"{title}\n{'=' * len(title)}\n\n"
    if not room:
        above = module.rpartition(".")[0]
        text += f"In :doc:`{above} <{above}>`.\n\n"
    if path.name != "__init__.py":
        return f"{text}.. automodule:: {module}\n   :members:\n   :ignore-module-all:\n"
    text += f".. automodule:: {module}\n\n"
    known = modules(root)
    below = {name: inner for name, inner in known.items() if name.rpartition(".")[0] == module}
    text += _table((f":doc:`{name} <{name}>`", first_sentence(inner)) for name, inner in below.items())
    exported = list(_exported(module, path))
    if exported:
        text += f"What ``{module}`` has by name:\n\n"
        text += _table(
            (f":doc:`{name} <{inner}>`" if inner in known else f":py:obj:`{name} <{inner}>`", first)
            for name, inner, first in ((name, f"{source}.{name}", f":doc:`{source}`") for name, source in exported)
        )
    return text


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"   * - {left}\n     - {right}\n" for left, right in rows)
    return f".. list-table::\n   :widths: 40 60\n\n{lines}\n" if lines else ""


def _exported(module: str, path: Path) -> Iterator[tuple[str, str]]:
    """Names that a folder's ``__init__`` takes from its modules and shows in ``__all__``,
    each with its module.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    shown: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            shown = set(ast.literal_eval(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            source = f"{module}.{node.module}" if node.module else module
            yield from ((alias.name, source) for alias in node.names if alias.name in shown)
