"""What the tests need of notebooks: cells by tag, exercises with their parts, code of folded
solutions, a lint.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbformat import NotebookNode

import aprillab as al
from aprillab.exercises import Feedback

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"

PARTS = ("exercise-stub", "exercise-check", "exercise-hints", "exercise-solution")
MAX_LINES, MAX_BYTES, MIN_EXERCISES = 30, 2_000_000, 4
MAX_WIDTH = 100  # characters of a line of code, and of a printed one

#: The task of an exercise, in a box; hints and solution, folded, each with a mark of its own.
BOX = re.compile(r'### .+\n\n<div class="alert alert-info">\n\n.+\n\n</div>\s*', re.S)
MARKS = {"exercise-hints": "◇ Hint", "exercise-solution": "◆ Solution"}
FOLDED = "hide-input"
APPENDIX = re.compile(r"[A-Z]\d_")


def read(path: str | Path) -> NotebookNode:
    """A notebook by path, or by the start of its name in notebooks/ ("02", say)."""
    if isinstance(path, str):
        (path,) = NOTEBOOKS.glob(f"{path}*.ipynb")
    return nbformat.read(path, as_version=4)


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    """The cells that carry ``tag``, in order."""
    return [cell for cell in notebook.cells if tag in tags(cell)]


# --- Exercises ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exercise:
    """One exercise: its function's name, its check's name, and the code of stub and solution."""

    title: str
    name: str
    check: str
    stub: str
    solution: str


def solution_code(markdown: str) -> str:
    """The one python fence of a folded solution."""
    fences = re.findall(r"^```python\n(.*?)^```", markdown, re.M | re.S)
    assert len(fences) == 1, f"a solution needs one ```python fence, this has {len(fences)}: {markdown[:80]}"
    return fences[0]


def exercises(notebook: NotebookNode) -> list[Exercise]:
    """The exercises of a notebook, from their tagged cells."""
    found = []
    columns = [tagged(notebook, part) for part in PARTS]
    titles = re.findall(r"^### (Exercise .+)$", "\n".join(c.source for c in notebook.cells), re.M)
    for title, stub, check, _, solution in zip(titles, *columns, strict=True):
        call = re.fullmatch(r"ex\.(check_\w+)\((\w+)\)", check.source.strip().splitlines()[-1])
        assert call, f"{title}: the last line of its check should be ex.check_…(function)"
        found.append(Exercise(title, call[2], call[1], stub.source, solution_code(solution.source)))
    return found


def function_of(code: str, name: str) -> Callable[..., Any]:
    """The function ``name`` that ``code`` defines, given ``torch`` and ``al`` alone."""
    names: dict[str, Any] = {"torch": torch, "al": al}
    exec(compile(code, f"<{name}>", "exec"), names)
    return names[name]


def feedback(exercise: Exercise, checks: Any, code: str) -> Feedback:
    """What the exercise's check, from the module ``checks``, answers to ``code``."""
    return getattr(checks, exercise.check)(function_of(code, exercise.name))


def mutate(code: str, old: str, new: str) -> str:
    """``code`` with ``old``, which must be there, replaced by ``new``."""
    assert old in code, f"{old!r} is not in the solution:\n{code}"
    return code.replace(old, new)


def definitions(notebook: NotebookNode) -> dict[str, Any]:
    """What a notebook's cells import and define, without running the rest: functions, classes,
    lambdas, CONSTANTS.

    Stubs and checks are left out. A figure's callback can so be tried at states that the
    notebook does not show.
    """
    kept: list[ast.stmt] = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and not set(PARTS) & set(tags(cell)):
            kept += [statement for statement in ast.parse(cell.source).body if _defines(statement)]
    names: dict[str, Any] = {"torch": torch, "al": al, "device": "cpu"}
    exec(compile(ast.Module(kept, []), "<notebook>", "exec"), names)
    return names


def _defines(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign):
        # A matrix is an upper-case name too: a constant is one that is written out.
        named = [name.id for target in statement.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        literal = not any(isinstance(part, ast.Name | ast.Call) for part in ast.walk(statement.value))
        return isinstance(statement.value, ast.Lambda) or (literal and all(name.isupper() for name in named))
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


# --- Lint -----------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """A heading's anchor as GitHub and JupyterLab make it, lower case."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    """What a link into this file may point to: headings and explicit ids."""
    if path.suffix == ".ipynb":
        text = "\n\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#{1,6} +(.+?) *#*$", text, re.M)
    return {slug(heading) for heading in headings} | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


def lint(path: Path) -> list[str]:
    """What is wrong with a notebook as a reader gets it, in words; empty if nothing is."""
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    wrong = [
        *_lint_outputs(code),
        *_lint_page(notebook),
        *_lint_exercises(notebook, path),
        *_lint_links(notebook, path),
        *_lint_names(notebook, path),
    ]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            wrong += lint_mathematics(cell.source)
    if path.stat().st_size > MAX_BYTES:
        wrong.append(f"{path.stat().st_size} bytes, more than {MAX_BYTES}")
    if "widgets" in notebook.metadata:
        wrong.append("metadata.widgets: GitHub shows no such notebook")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        wrong.append("not the outputs of one run in order")
    if not code or "setup" not in tags(code[0]) or len(tagged(notebook, "setup")) != 1:
        wrong.append("the first code cell, and no other, is tagged setup")
    for cell in code:
        if (lines := cell.source.count("\n") + 1) > MAX_LINES:
            wrong.append(f"a cell of {lines} lines: {cell.source[:60]!r}")
    return wrong


def _lint_outputs(code: list[NotebookNode]) -> list[str]:
    wrong = []
    for cell in code:
        start = repr(cell.source[:60])
        for output in cell.outputs:
            data = output.get("data", {})
            images = re.findall(r"<img\b[^>]*>", "".join(data.get("text/html", "")))
            if output.output_type == "error":
                wrong.append(f"an error output: {start}")
            if output.get("name") == "stderr" and re.search(r"Warning|Traceback", output.text):
                wrong.append(f"a warning in the output: {start}")
            if not all(re.search(r'\balt="[^"]{20,}"', image) for image in images):
                wrong.append(f"a picture without an alternative text of 20 letters: {start}")
            if not images and any(kind.startswith("image/") for kind in data):
                wrong.append(f"a bare picture, without alternative text: {start}")
            if re.search(r"(?:/home/|/root/|/tmp/|/Users/|[A-Z]:\\Users)", json.dumps(data) + output.get("text", "")):
                wrong.append(f"a path of the author's machine: {start}")
    return wrong


def _lint_page(notebook: NotebookNode) -> list[str]:
    """What does not look as it does in the other chapters: boxes, marks, folded cells, lines
    that are too long.
    """
    wrong = []
    for cell in notebook.cells:
        start = repr(cell.source[:60])
        printed = [output.text for output in cell.get("outputs", []) if output.output_type == "stream"]
        if any(len(line) > MAX_WIDTH for text in printed for line in text.splitlines()):
            wrong.append(f"a printed line of more than {MAX_WIDTH} characters: {start}")
        if cell.cell_type == "code" and any(len(line) > MAX_WIDTH for line in cell.source.splitlines()):
            wrong.append(f"a line of code of more than {MAX_WIDTH} characters: {start}")
        if (FOLDED in tags(cell)) != cell.metadata.get("jupyter", {}).get("source_hidden", False):
            wrong.append(
                f"{FOLDED} folds a cell in the book, jupyter.source_hidden in JupyterLab: both, or none: {start}"
            )
        shown = "".join(output.get("data", {}).get("text/html", "") for output in cell.get("outputs", []))
        if cell.cell_type == "code" and "sliders(" in cell.source and "<img" not in shown:
            wrong.append(f"sliders that leave no still picture: {start}")
        if "setup" in tags(cell) and FOLDED not in tags(cell):
            wrong.append(f"a set-up cell that is not folded: {start}")
        if cell.source.startswith("### Exercise ") and not BOX.fullmatch(cell.source):
            wrong.append(f"a task that is not in a box: {start}")
        for tag, mark in MARKS.items():
            summaries = re.findall(r"<summary>(.*?)</summary>", cell.source) if tag in tags(cell) else []
            if not all(summary.startswith(mark) for summary in summaries):
                wrong.append(f"{mark} is how a fold's summary begins: {start}")
    return wrong


def _lint_exercises(notebook: NotebookNode, path: Path) -> list[str]:
    wrong = []
    found = [part for cell in notebook.cells for part in PARTS if part in tags(cell)]
    count = found.count("exercise-stub")
    if found != list(PARTS) * count:
        wrong.append("stub, check, hints and solution do not follow each other in every exercise")
    if ("00" < path.name[:2] < "09" or APPENDIX.match(path.name)) and count < MIN_EXERCISES:
        wrong.append(f"{count} exercises, fewer than {MIN_EXERCISES}")
    number = re.match(r"\d\d|[A-Z]\d", path.name)
    chapter = number[0].lstrip("0") or "0" if number else "0"
    headers = re.findall(r"^### Exercise (.+)$", "\n".join(c.source for c in notebook.cells), re.M)
    for number, header in enumerate(headers, 1):
        if not re.fullmatch(rf"{chapter}\.{number} · .+ · (?:★☆☆|★★☆|★★★) · \d+ minutes", header):
            wrong.append(f"header of exercise {chapter}.{number}: {header!r}")
    if len(headers) != count:
        wrong.append(f"{len(headers)} headers for {count} exercises")
    for cell in tagged(notebook, "exercise-stub"):
        if "raise NotImplementedError" not in cell.source:
            wrong.append(f"a stub that raises nothing: {cell.source[:60]!r}")
    return wrong


def _lint_links(notebook: NotebookNode, path: Path) -> list[str]:
    wrong = []
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        if re.search(r"!\[\s*\]\(", cell.source):
            wrong.append(f"a picture without alternative text: {cell.source[:60]!r}")
        for target in re.findall(r"\]\(([^)\s]+)\)", cell.source):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            there = (path.parent / file) if file else path
            if not there.exists():
                wrong.append(f"a link to {target}, which does not exist")
            elif anchor and anchor.lower() not in anchors(there):
                wrong.append(f"a link to {target}, but {there.name} has no such heading")
    return wrong


def _lint_names(notebook: NotebookNode, path: Path) -> list[str]:
    """Of each "`name` in [file](../file.py)": the name is still defined in that file."""
    wrong = []
    named = r"((?:`[\w.]+`(?:, | and )?)+),? in \[[^]]+\]\(([^)\s]+\.py)\)"
    for cell in notebook.cells:
        for names, target in re.findall(named, cell.source) if cell.cell_type == "markdown" else ():
            if not (path.parent / target).exists():
                continue  # _lint_links says so
            code = (path.parent / target).read_text(encoding="utf-8")
            for name in re.findall(r"(\w+)`", names):
                if not re.search(rf"^ *(def|class) {name}\b|^{name}\b.* =", code, re.M):
                    wrong.append(f"{name} is not defined in {target}")
    return wrong


# --- Lint of mathematics --------------------------------------------------------------------------------------

#: What MathJax, in JupyterLab's set of packages, knows and a chapter may use. A misspelt macro
#: shows as red text.
_MACROS = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi varpi rho varrho
    sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega
    ell hbar imath jmath Re Im partial nabla infty emptyset varnothing forall exists neg top bot prime star

    arccos arcsin arctan arg cos cosh cot det dim exp gcd inf ker lim liminf limsup ln log max min Pr sin sinh sup
    tan tanh operatorname

    sum prod int oint bigcup bigcap bigoplus bigotimes bigodot limits nolimits
    pm mp times div cdot ast circ bullet oplus ominus otimes oslash odot cup cap setminus wedge vee land lor dagger
    le leq ge geq ne neq ll gg lt gt approx sim simeq cong equiv propto prec succ mid parallel perp
    in notin ni subset subseteq supset supseteq not
    to gets mapsto leftarrow rightarrow leftrightarrow longleftarrow longrightarrow longmapsto uparrow downarrow
    Leftarrow Rightarrow Leftrightarrow Longleftarrow Longrightarrow Longleftrightarrow implies iff hookrightarrow
    dots ldots cdots vdots ddots colon

    hat widehat tilde widetilde bar vec dot ddot check overline underline overbrace underbrace overset underset
    stackrel mathrm mathbf mathbb mathcal mathit mathsf mathtt boldsymbol text textbf textit
    frac tfrac dfrac binom sqrt boxed phantom substack tag displaystyle textstyle
    quad qquad hspace

    left right middle big Big bigg Bigg bigl bigr bigm Bigl Bigr Bigm biggl biggr Biggl Biggr
    vert Vert lvert rvert lVert rVert langle rangle lfloor rfloor lceil rceil lbrace rbrace lbrack rbrack
    begin end hline
    , ; : ! | { } \\ % # & _ $
"""
MACROS = frozenset([*_MACROS.split(), " ", "\n"])

_ENVIRONMENTS = """
    matrix pmatrix bmatrix Bmatrix vmatrix Vmatrix smallmatrix array cases aligned gathered split
    equation equation* align align* gather gather* multline multline*
"""
ENVIRONMENTS = frozenset(_ENVIRONMENTS.split())

_STRETCHED = re.compile(
    r"""\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])      # is followed by a delimiter:
        (?!\s*(?: [()\[\]|./<>]
             | \\[{}|]
             | \\(?:[lr]?[vV]ert|[lr](?:angle|floor|ceil|brace|brack)|[Uu]parrow|[Dd]ownarrow)(?![A-Za-z])))""",
    re.VERBOSE,
)
_SCANNED = re.compile(r"\\(begin|end)\s*\{([^{}]*)\}|\\(left|right)(?![A-Za-z])|\\(?:[A-Za-z]+|.|\n)|([{}])", re.S)


def formulas(markdown: str) -> tuple[list[tuple[str, bool]], list[str]]:
    """The formulas of a Markdown text as (TeX, displayed?), code left out, and what is
    wrong with its dollars.
    """
    text = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.M | re.S)
    text = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text, flags=re.S)
    found: list[tuple[str, bool]] = []

    def displayed(match: re.Match[str]) -> str:
        found.append((match[1], True))
        return ""

    text = re.sub(r"(?<!\\)\$\$(.+?)(?<!\\)\$\$", displayed, text, flags=re.S)
    wrong = []
    for paragraph in re.split(r"\n\s*\n", text):
        pieces = re.split(r"(?<!\\)\$", paragraph)
        found += [(piece, False) for piece in pieces[1::2]]
        if len(pieces) % 2 == 0:
            wrong.append(f"a $ that is not closed in its paragraph: {paragraph.strip()[:60]!r}")
    return found, wrong


def lint_mathematics(markdown: str) -> list[str]:
    """What MathJax would refuse in a Markdown text: unknown macros and environments,
    what does not balance.
    """
    found, wrong = formulas(markdown)
    for tex, displayed in found:
        start = " ".join(tex.split())[:60]
        if not tex.strip():
            wrong.append("an empty formula")
        for macro in dict.fromkeys(re.findall(r"\\([A-Za-z]+|.|\n)", tex)):
            if macro not in MACROS:
                wrong.append(f"\\{macro} is no macro that a chapter may use: ${start}$")
        if r"\tag" in tex and not displayed:
            wrong.append(f"\\tag in a formula within a line: ${start}$")
        if _STRETCHED.search(tex):
            wrong.append(f"no delimiter after a \\left, \\right or \\big: ${start}$")
        wrong += [f"{problem}: ${start}$" for problem in _unbalanced(tex)]
    return wrong


def _unbalanced(tex: str) -> list[str]:
    """Braces, \\left with \\right, \\begin with \\end: each closes the one that was opened last."""
    closes = {"}": "{", "right": "left", "end": "begin"}
    opened: list[tuple[str, str]] = []
    for match in _SCANNED.finditer(tex):
        kind, name = match[1] or match[3] or match[4], match[2] or ""
        if match[1] and name not in ENVIRONMENTS:
            return [f"unknown environment {name!r}"]
        if kind in closes.values():
            opened.append((kind, name))
        elif kind and (not opened or opened.pop() != (closes[kind], name)):
            return [f"{kind}{f' {name}' if name else ''} closes nothing"]
    return [f"{kind}{f' {name}' if name else ''} is not closed" for kind, name in opened[-1:]]
