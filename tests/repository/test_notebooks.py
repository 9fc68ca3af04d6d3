"""The notebooks as a reader gets them, and what a class gets of them. That they run is tested by
nbval.
"""

import importlib.util
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nbformat
import notebook_tools as tools
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TASK = '<div class="alert alert-info">\n\nThe task.\n\n</div>'
FOLDED = {"jupyter": {"source_hidden": True}}
PICTURE = '<figure><img alt="A cat, and the same cat again." src="data:image/png;base64,AAAA"></figure>'

pytestmark = pytest.mark.skipif(not PATHS, reason="there is no notebook yet")


def tool_named(name: str) -> ModuleType:
    """A file of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


# --- The course's notebooks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_fit_to_read(path: Path) -> None:
    assert tools.lint(path) == []


def test_the_set_up_cell_is_the_same_everywhere() -> None:
    cells = {tools.tagged(tools.read(path), "setup")[0].source for path in PATHS}
    assert len(cells) == 1


def text_of(path: Path) -> str:
    return "\n".join(cell.source for cell in tools.read(path).cells if cell.cell_type == "markdown")


def test_chapters_are_chained() -> None:
    for before, after in itertools.pairwise(path for path in PATHS if path.name[:2].isdigit()):
        if int(after.name[:2]) != int(before.name[:2]) + 1:
            continue  # a chapter between them is not written yet
        for path, other in ((before, after), (after, before)):
            assert f"]({other.name})" in text_of(path), f"{path.name} does not link to {other.name}"


def test_an_appendix_and_a_chapter_link_to_each_other() -> None:
    for appendix in (path for path in PATHS if tools.APPENDIX.match(path.name)):
        linked = set(re.findall(r"\]\((\d\d_\w+\.ipynb)\)", text_of(appendix)))
        back = [name for name in linked if f"]({appendix.name})" in text_of(tools.NOTEBOOKS / name)]
        assert back, f"no chapter that {appendix.name} links to has a link back"


def test_the_map_has_every_chapter_with_its_own_minutes() -> None:
    rows = dict(re.findall(r"\]\((\w\d_\w+\.ipynb)\) \|[^|]+\| (\d+) \|", text_of(PATHS[0])))
    headers = {path.name: tools.read(path).cells[0].source for path in PATHS[1:] if re.match(r"\w\d_", path.name)}
    said = {
        name: re.search(r"(\d+)(?: minutes)? to read(?: and run)?, (\d+) for", head) for name, head in headers.items()
    }
    assert rows == {name: str(sum(map(int, found.groups()))) for name, found in said.items()}


SYLLABUS = (tools.NOTEBOOKS / "README.md").read_text(encoding="utf-8")


def test_the_syllabus_counts_each_chapters_exercises_and_minutes() -> None:
    rows = re.findall(r"^\| \[[^]]+\]\((\w+)\.ipynb\) .*\| (\d+) min \| (\d+), (\d+) min \|", SYLLABUS, re.M)
    others = re.findall(r"^\| \[[^]]+\]\((\w+)\.ipynb\) .*\| none \|$", SYLLABUS, re.M)
    assert sorted([row[0] for row in rows] + others) == [path.stem for path in PATHS]
    for name, to_read, count, minutes in rows:
        prose = "\n".join(c.source for c in tools.read(name[:2]).cells if c.cell_type == "markdown")
        each = re.findall(r"^### Exercise \w+\.\d+ .*· (\d+) minutes$", prose, re.M)
        header = re.search(r"(\d+)(?: minutes)? to read(?: and run)?, (\d+) for", prose)
        assert (int(count), int(minutes)) == (len(each), sum(map(int, each))), name
        assert header is None or header.groups() == (to_read, minutes), name


@pytest.fixture(scope="module")
def counting() -> ModuleType:
    return tool_named("count_minutes")


def plan(title: str) -> str:
    """The text of one plan, by the start of its heading."""
    (found,) = re.findall(rf"^### {title}.*?(?=^##|\Z)", SYLLABUS, re.M | re.S)
    return found


def test_no_page_has_other_minutes_than_the_notebooks(counting: ModuleType) -> None:
    assert counting.main(["--check"]) == 0, "python tools/count_minutes.py writes them"


@pytest.mark.parametrize(
    ("title", "chapters"),
    [
        ("A two-week module", ["00", "01", "02", "03", "04", "05", "06", "07", "08"]),
        ("A term", ["00", "01", "02", "03", "A1", *(f"{number:02}" for number in range(4, 13))]),
    ],
)
def test_a_plans_hours_are_those_of_the_chapters_it_names(title: str, chapters: list[str]) -> None:
    named = re.findall(r"^\| \d+ \| ([\w, ]+) \|", plan(title), re.M)
    assert list(dict.fromkeys(", ".join(named).split(", "))) == chapters
    minutes = [0, 0]
    for chapter in chapters:
        row = re.search(rf"^\| \[{chapter} · .*\| (\d+) min \| \d+, (\d+) min \|", SYLLABUS, re.M)
        minutes = [total + int(more) for total, more in zip(minutes, row.groups(), strict=True)]
    said = re.search(r"\*\*By the notebooks:\*\* ([\d.]+) hours to read and run, ([\d.]+) for", plan(title))
    assert [float(hours) for hours in said.groups()] == [round(total / 60, 1) for total in minutes]


def test_the_half_day_has_no_exercise_before_its_section() -> None:
    taught: set[tuple[str, str]] = set()
    end, seen, total = 0, 0, 0
    for start, to, what, how in re.findall(r"^\| (\d+)–(\d+) \| (.*?) \|(.*?)\|$", plan("A half-day"), re.M):
        assert int(start) == end
        end = int(to)
        if found := re.match(r"(\d\d), (?:section|Step)s? (\d+)(?:(, | to | and )(\d+))?(?: and (\d+))?", what):
            chapter, *numbers = found[1], *filter(str.isdigit, filter(None, found.groups()[1:]))
            between = range(int(numbers[0]), int(numbers[-1]) + 1) if found[3] == " to " else map(int, numbers)
            taught |= {(chapter, str(number)) for number in between}
        minutes = 0
        for number, title, section in re.findall(r"Exercise (\d+\.\d+) · (.+?) \((?:section|Step) (\d+)\)", how):
            chapter = number.partition(".")[0].zfill(2)
            assert (chapter, section) in taught, f"Exercise {number} before section {section} of {chapter}"
            text = text_of(next(tools.NOTEBOOKS.glob(f"{chapter}_*.ipynb")))
            heading = re.escape(f"{number} · {title}")
            (each,) = re.findall(rf"^### Exercise {heading} · ★.* · (\d+) minutes$", text, re.M)
            above = re.findall(r"^## (.+)$", text[: text.index(f"### Exercise {number} ")], re.M)[-1]
            assert re.match(r"(\d+)?", above)[1] in (None, section), f"Exercise {number} is in section {above}"
            minutes += int(each)
            seen += 1
        assert minutes <= end - int(start)
        total += minutes
    assert (end, seen) == (240, plan("A half-day").count("Exercise "))
    assert f"**By the notebooks:** {total} minutes for the exercises named" in plan("A half-day")


def test_counting_rewrites_rows_plans_and_map(counting: ModuleType) -> None:
    first, second = counting.Minutes(20, {"0.1 · One": 5}), counting.Minutes(30, {"1.1 · Two": 40})
    found = {"00_a.ipynb": first, "01_b.ipynb": second}
    page = (
        "| [00 · A](00_a.ipynb) | see | 1 min | 9, 9 min |\n| [01 · B](01_b.ipynb) | do | 2 min | 9, 9 min |\n"
        "| [02 · C](02_c.ipynb) | not there yet | 60 min | 1, 30 min |\n\n### Plan\n\n| 1 | 00, 02 | all |\n\n"
        "**By the notebooks:** 9.9 hours to read and run, 9.9 for the exercises.\n\n### Short\n\nExercise 1.1 · Two\n"
        "\n**By the notebooks:** 9 minutes for the exercises named.\n"
    )
    text = counting.counted(page, found)
    assert "| see | 20 min | 1, 5 min |" in text
    assert "| do | 30 min | 1, 40 min |" in text
    assert "| not there yet | 60 min | 1, 30 min |" in text
    assert "1.3 hours to read and run, 0.6 for the exercises." in text
    assert "40 minutes for the exercises named" in text
    assert counting.counted(text, found) == text
    assert counting.mapped("| [01 · B](01_b.ipynb) | do | 9 |", found) == "| [01 · B](01_b.ipynb) | do | 70 |"


# --- The lint itself: what it is there to find, it finds --------------------------------------------------------


@pytest.fixture
def sound(tmp_path: Path) -> Callable[..., Path]:
    """``sound(change)``: the path of a flawless chapter 00, changed by ``change(notebook)``."""

    def write(change: Callable[[NotebookNode], object] = lambda notebook: None) -> Path:
        (tmp_path / "bibliography.md").write_text("# Bibliography\n\n## april\n\nThe paper.\n")
        cells = [
            new_markdown_cell("# 00 · A chapter\n\n[paper](bibliography.md#april), [here](#00--a-chapter)"),
            new_code_cell("import torch", metadata=FOLDED | {"tags": ["setup", "hide-input"]}, execution_count=1),
            new_code_cell("show()", execution_count=2, outputs=[new_output("display_data", {"text/html": PICTURE})]),
            new_markdown_cell(f"### Exercise 0.1 · one line · ★☆☆ · 5 minutes\n\n{TASK}"),
            new_code_cell(
                "def f(x):\n    raise NotImplementedError", execution_count=3, metadata={"tags": ["exercise-stub"]}
            ),
            new_code_cell("ex.check_f(f)", execution_count=4, metadata={"tags": ["exercise-check"]}),
            new_markdown_cell(
                "<details><summary>◇ Hint</summary>\n\nOne.\n\n</details>", metadata={"tags": ["exercise-hints"]}
            ),
            new_markdown_cell(
                "```python\ndef f(x):\n    return 2 * x\n```", metadata={"tags": ["exercise-solution"]}
            ),
        ]
        notebook = new_notebook(cells=cells)
        change(notebook)
        nbformat.write(notebook, tmp_path / "00_chapter.ipynb")
        return tmp_path / "00_chapter.ipynb"

    return write


def test_a_sound_notebook_passes(sound: Callable[..., Path]) -> None:
    assert tools.lint(sound()) == []


def append(text: str) -> Callable[[NotebookNode], None]:
    return lambda notebook: notebook.cells.append(new_markdown_cell(text))


def output(kind: str, data: object, **more: object) -> Callable[[NotebookNode], None]:
    return lambda notebook: notebook.cells[2].outputs.append(new_output(kind, data, **more))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda nb: nb.cells[2].update(execution_count=7), "one run in order"),
        (lambda nb: nb.cells[2].update(execution_count=None), "one run in order"),
        (lambda nb: nb.metadata.update(widgets={}), "metadata.widgets"),
        (output("error", None, ename="ValueError", evalue="no", traceback=[]), "error output"),
        (output("stream", None, name="stderr", text="UserWarning: mind"), "warning"),
        (output("stream", None, name="stdout", text="/home/ada/model.pt"), "path of the author's machine"),
        (output("display_data", {"image/png": "AAAA"}), "bare picture"),
        (output("display_data", {"text/html": '<img src="x">'}), "alternative text"),
        (output("display_data", {"text/html": '<img alt="" src="x">'}), "alternative text"),
        (lambda nb: nb.cells[2].update(source="x = 1\n" * 30 + "x"), "31 lines"),
        (lambda nb: nb.cells[1].metadata.update(tags=[]), "setup"),
        (lambda nb: nb.cells[2].metadata.update(tags=["setup"]), "setup"),
        (lambda nb: nb.cells.pop(6), "do not follow each other"),
        (lambda nb: nb.cells.insert(4, nb.cells.pop(7)), "do not follow each other"),
        (lambda nb: nb.cells[4].update(source="def f(x):\n    return 2 * x"), "raises nothing"),
        (lambda nb: nb.cells[3].update(source=f"### Exercise 0.2 · one line · ★☆☆ · 5 minutes\n\n{TASK}"), "header"),
        (lambda nb: nb.cells[3].update(source="### Exercise 0.1 · one · ★☆☆ · 5 minutes\n\nA task."), "not in a box"),
        (lambda nb: nb.cells[6].update(source="<details><summary>Hint</summary>\n\nOne.\n\n</details>"), "◇ Hint"),
        (lambda nb: nb.cells[1].update(metadata={"tags": ["setup"]}), "not folded"),
        (lambda nb: nb.cells[2].update(metadata=FOLDED), "both, or none"),
        (lambda nb: nb.cells[2].update(source="x = 1  # " + "x" * 92), "line of code"),
        (output("stream", None, name="stdout", text="x" * 101), "printed line"),
        (lambda nb: nb.cells[2].update(source="sliders(f)", outputs=[]), "no still picture"),
        (lambda nb: nb.cells[3].update(source="### Exercise 0.1 · one line · 5 minutes"), "header"),
        (lambda nb: nb.cells[3].update(source="The task."), "0 headers for 1"),
        (append("[next](01_next.ipynb)"), "does not exist"),
        (append("[paper](bibliography.md#may)"), "no such heading"),
        (append("[above](#00--another)"), "no such heading"),
        (append("![](https://example.org/cat.png)"), "without alternative text"),
        (append(r"the loss $l$ and $\frac{\partiall l}{\partial W}$"), r"\partiall is no macro"),
        (append("x" * 2_000_000), "bytes"),
    ],
)
def test_the_lint_finds(sound: Callable[..., Path], change: Callable[[NotebookNode], object], word: str) -> None:
    found = tools.lint(sound(change))
    assert any(word in problem for problem in found), found


@pytest.mark.parametrize(
    ("sentence", "wrong"),
    [
        ("`solve` and `Grid.near`, in [a.py](a.py); it adds the refusals", []),
        ("`solve`, `NAMES` and `gone` in [a.py](a.py)", ["gone is not defined in a.py"]),
        ("`al.solved` in [a.py](a.py)", ["solved is not defined in a.py"]),
    ],
)
def test_a_function_that_left_its_file_is_found(sound: Callable[..., Path], sentence: str, wrong: list[str]) -> None:
    path = sound(append(sentence))
    (path.parent / "a.py").write_text(
        "NAMES: list[str] = []\ndef solve(): ...\nclass Grid:\n    def near(self): ...\n"
    )
    assert tools.lint(path) == wrong


@pytest.mark.parametrize(
    ("tex", "word"),
    [
        (r"$\partiall l$", r"\partiall is no macro"),
        (r"$$\frac{\partial l}{\partial W} = \sun_i x_i$$", r"\sun is no macro"),
        (r"$\Partial l$", r"\Partial is no macro"),
        (r"$W\top$ and then $\mathbff{W}$", r"\mathbff is no macro"),
        (r"$\newcommand{\W}{W}$", r"\newcommand is no macro"),
        ("$W\\$", "a $ that is not closed"),
        (r"$$\begin{pmatrx} a \\ b \end{pmatrx}$$", "unknown environment 'pmatrx'"),
        (r"$$\begin{pmatrix} a \\ b \end{bmatrix}$$", "end bmatrix closes nothing"),
        (r"$$\begin{pmatrix} a \\ b$$", "begin pmatrix is not closed"),
        (r"$\frac{a}{b$", "{ is not closed"),
        (r"$\frac{a}b}$", "} closes nothing"),
        (r"$\{a, b}$", "} closes nothing"),
        (r"$\left( a$", "left is not closed"),
        (r"$a \right)$", "right closes nothing"),
        (r"$\left( {a \right)}$", "right closes nothing"),
        (r"$\left a \right)$", "no delimiter"),
        (r"$\big x$", "no delimiter"),
        (r"$x = 1 \tag{1.1}$", r"\tag in a formula within a line"),
        ("a price of $5 in a text", "a $ that is not closed"),
        ("one $x$ and one $y\n\nnext$ paragraph", "a $ that is not closed"),
        ("$$x$$ and $ $", "an empty formula"),
    ],
)
def test_wrong_mathematics_is_found(sound: Callable[..., Path], tex: str, word: str) -> None:
    assert any(word in problem for problem in tools.lint_mathematics(tex)), tools.lint_mathematics(tex)
    assert any(word in problem for problem in tools.lint(sound(append(tex))))


@pytest.mark.parametrize(
    "text",
    [
        r"$$\frac{\partial l}{\partial W} = \sum_{i=1}^n \delta_i x_i^\top \quad\text{for } n \ge 1. \tag{1.1}$$",
        r"$$M = \begin{pmatrix} a & b \\ c & d \end{pmatrix}, \quad \left\lVert \frac{\{a\}}{b} \right\rVert \le 1$$",
        r"$\operatorname{rank} G = n$ and $\big(W^\top\big)^{\!\top}$, $\Big\{a\Big\}$, 5\% of \$5, $\|x\|\,\cdot$",
        r"`$\partiall$` and ``a ` $\sun``",
        "```python\nprice = '$\\partiall'\n```\n\n$x$",
        "no formula, 100 % text",
    ],
)
def test_right_mathematics_passes(text: str) -> None:
    assert tools.lint_mathematics(text) == []


def test_the_course_is_full_of_formulas() -> None:
    cells = [cell.source for path in PATHS for cell in tools.read(path).cells if cell.cell_type == "markdown"]
    assert sum(len(tools.formulas(cell)[0]) for cell in cells) > 500  # or the lint looks past them


def test_the_lint_counts_exercises(sound: Callable[..., Path]) -> None:
    path = sound(lambda nb: nb.cells[3].update(source=f"### Exercise 1.1 · one line · ★☆☆ · 5 minutes\n\n{TASK}"))
    chapter = path.rename(path.with_name("01_chapter.ipynb"))
    assert tools.lint(chapter) == ["1 exercises, fewer than 4"]
    appendix = chapter.rename(path.with_name("A1_chapter.ipynb"))
    assert tools.lint(appendix) == [
        "1 exercises, fewer than 4",
        "header of exercise A1.1: '1.1 · one line · ★☆☆ · 5 minutes'",
    ]


def test_exercises_are_read(sound: Callable[..., Path]) -> None:
    (exercise,) = tools.exercises(tools.read(sound()))
    assert (exercise.name, exercise.check) == ("f", "check_f")
    assert tools.function_of(exercise.solution, "f")(3) == 6
    assert tools.function_of(tools.mutate(exercise.solution, "2 * x", "-x"), "f")(3) == -3
    with pytest.raises(NotImplementedError):
        tools.function_of(exercise.stub, "f")(3)
    with pytest.raises(AssertionError):
        tools.mutate(exercise.solution, "3 * x", "x")


# --- Notebooks for students -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student_tool() -> ModuleType:
    return tool_named("make_student_notebooks")


def test_the_command_writes_them_all(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/make_student_notebooks.py"), "--to", str(tmp_path / "class")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    written = sorted((tmp_path / "class").glob("*.ipynb"))
    assert [path.name for path in written] == [path.name for path in PATHS]
    assert ran.stdout.split() == [str(path) for path in written]
    assert {page.name for page in (ROOT / "notebooks").glob("*.md")} == {
        page.name for page in (tmp_path / "class").glob("*.md")
    }
    assert not list((tmp_path / "class").glob(".*"))
    for path, original in zip(written, PATHS, strict=True):
        student, full = tools.read(path), tools.read(original)
        nbformat.validate(student)
        for part in ("exercise-stub", "exercise-check", "exercise-hints"):
            sources = [cell.source for cell in tools.tagged(student, part)]
            assert sources == [cell.source for cell in tools.tagged(full, part)]
        solutions = tools.tagged(full, "exercise-solution")
        assert len(student.cells) == len(full.cells) - len(solutions)
        text = "\n".join(cell.source for cell in student.cells)
        assert not any(tools.solution_code(cell.source) in text for cell in solutions)
        assert "<summary>Solution" not in text
        code = [cell for cell in student.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in code)


def test_what_students_get_stands_alone(student_tool: ModuleType, tmp_path: Path) -> None:
    student_tool.write_all(tmp_path)
    kept = 0
    for path in tmp_path.iterdir():
        text = text_of(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)|href=[\"']([^\"']+)", re.sub(r"`[^`\n]+`(?!\])", "", text)):
            file = "".join(target).partition("#")[0]
            assert re.match(r"[a-z]+:|$", file) or (tmp_path / file).exists(), f"{path.name} links to {file}"
            kept += file.endswith((".ipynb", ".md"))
    assert kept > 100
    everything = "\n".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    key = (ROOT / "docs/teaching.md").read_text(encoding="utf-8")
    weak = re.findall(r"\(1\) \| (\"[^|]+\")[^|]* \|$", key, re.M)
    assert len(weak) >= 10  # the grading key's last column
    assert not [answer for answer in weak if answer in everything]
    assert "| a good answer |" not in everything


def test_both_names_of_the_folder_are_options(student_tool: ModuleType, tmp_path: Path) -> None:
    assert student_tool.main(["--out", str(tmp_path / "class"), "--no-hints"]) == 0
    assert len(list((tmp_path / "class").glob("*.ipynb"))) == len(PATHS)


def test_hints_can_go_too_and_the_original_stays(student_tool: ModuleType, sound: Callable[..., Path]) -> None:
    notebook = tools.read(sound())
    before = nbformat.writes(notebook)
    student = student_tool.student_version(notebook, hints=False)
    assert [tag for cell in student.cells for tag in tools.tags(cell)] == [
        *("setup", "hide-input", "exercise-stub", "exercise-check"),
    ]
    assert nbformat.writes(notebook) == before


def test_trouble_is_said_in_words(
    student_tool: ModuleType, sound: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sound().parent
    with pytest.raises(student_tool.StudentError, match="originals"):
        student_tool.write_all(folder, source=folder)
    with pytest.raises(student_tool.StudentError, match="no notebook"):
        student_tool.write_all(tmp_path / "to", source=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert student_tool.main(["--to", str(tmp_path / "file" / "below")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    (folder / "01_broken.ipynb").write_text("not a notebook")
    with pytest.raises(student_tool.StudentError, match="01_broken"):
        student_tool.write_all(tmp_path / "to", source=folder)
