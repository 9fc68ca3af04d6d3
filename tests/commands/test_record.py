"""``aprillab record``: what checks answered, read from notebooks or from a run, as a page and as
JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import nbformat
import notebook_tools as tools
import pytest
from command_line import Run, is_one_error
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

SETUP = "import torch\nimport aprillab as al\nfrom aprillab.exercises import chapter00 as ex"


def answered(text: str) -> NotebookNode:
    """A check's answer as a notebook keeps it: plain text, and a box of HTML beside it."""
    return new_output("execute_result", {"text/plain": text, "text/html": f"<div>{text}</div>"}, execution_count=1)


def exercise(
    number: str, stars: str, *outputs: NotebookNode, call: str = "ex.check_grey_levels(psnr)"
) -> list[NotebookNode]:
    return [
        new_markdown_cell(f"### Exercise {number} · A | B · {stars} · 5 minutes\n\nThe task."),
        new_code_cell("def psnr(*given):\n    raise NotImplementedError", metadata={"tags": ["exercise-stub"]}),
        new_code_cell(call, metadata={"tags": ["exercise-check"]}, outputs=list(outputs)),
    ]


def save(path: Path, *cells: NotebookNode) -> Path:
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 00 · A chapter"), *cells]), path)
    return path


@pytest.fixture
def handed_in(tmp_path: Path) -> Path:
    return save(
        tmp_path / "00_a.ipynb",
        *exercise("0.1", "★☆☆", answered("✓ Right, in\n  two lines.")),
        *exercise("0.2", "★★☆", answered("✗ A transpose.")),
        *exercise("0.3", "★★★", answered("✗ Still a stub: replace the line that raises NotImplementedError.")),
        *exercise("0.4", "★★★", answered("✓ So it says."), call="print('✓')"),
        *exercise("0.5", "★★☆", new_output("stream", name="stdout", text="✓ printed")),
        *exercise("0.6", "★★☆", new_output("display_data", {"text/plain": "<HTML>"}), answered("✓ Beside a figure.")),
        *exercise("0.7", "★☆☆", answered("✓ As it says."), call="ex.check_what_nobody_asked(psnr)"),
    )


def test_the_page_says_what_is_solved_and_what_it_is_worth(run: Run, handed_in: Path) -> None:
    code, out, err = run("record", handed_in, "--name", "Ada", "--json", "record.json")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["wrote record.md", "wrote record.json", "2 of 7 exercises, 3 of 16 points"]
    page = Path("record.md").read_text(encoding="utf-8")
    assert "Ada · 20" in page
    assert "**2 of 7 exercises, 3 of 16 points.** *Read from the notebooks as they were saved." in page
    assert "## 00 · A chapter" in page
    digest = hashlib.sha256(handed_in.read_bytes()).hexdigest()
    assert f"`00_a.ipynb`, SHA-256 `{digest}`" in page
    for row in (
        r"| 0.1 | A \| B | ★☆☆ | 1 of 1 | ✓ solved | Right, in two lines. |",
        r"| 0.2 | A \| B | ★★☆ | 0 of 2 | ✗ not yet | A transpose. |",
        r"| 0.3 | A \| B | ★★★ | 0 of 4 | not begun |  |",
        r"| 0.4 | A \| B | ★★★ | 0 of 4 | not counted | the check's cell does not call a check of the course |",
        r"| 0.5 | A \| B | ★★☆ | 0 of 2 | not run |  |",
        r"| 0.6 | A \| B | ★★☆ | 2 of 2 | ✓ solved | Beside a figure. |",
        r"| 0.7 | A \| B | ★☆☆ | 0 of 1 | not counted | the check's cell does not call a check of the course |",
    ):
        assert row in page.splitlines(), page
    facts = json.loads(Path("record.json").read_text(encoding="utf-8"))
    assert (facts["name"], facts["run"], facts["solved"], facts["points"], facts["of"]) == ("Ada", False, 2, 3, 16)
    (chapter,) = facts["chapters"]
    assert chapter["sha256"] == digest
    assert [row["state"] for row in chapter["exercises"]] == [
        "solved", "wrong", "stub", "changed", "not run", "solved", "changed",
    ]  # fmt: skip
    assert [row["points"] for row in chapter["exercises"]] == [1, 0, 0, 0, 0, 2, 0]


def test_the_course_is_found_whole_and_unsolved(run: Run) -> None:
    code, _, _ = run("record", tools.NOTEBOOKS, "--json", "record.json")
    facts = json.loads(Path("record.json").read_text(encoding="utf-8"))
    expected = sum(len(tools.tagged(tools.read(path), "exercise-check")) for path in tools.NOTEBOOKS.glob("*.ipynb"))
    assert (code, facts["solved"], facts["exercises"]) == (0, 0, expected)
    assert {row["state"] for chapter in facts["chapters"] for row in chapter["exercises"]} == {"stub"}


@pytest.mark.slow
def test_a_run_finds_edited_outputs_out(run: Run, tmp_path: Path) -> None:
    (stated,) = tools.exercises(tools.read("00"))
    claimed = exercise("0.1", "★☆☆", answered("✓ Believe me."))
    solved = exercise("0.2", "★★☆", call=f"ex.{stated.check}({stated.name})")
    solved[1].source = stated.solution
    path = save(tmp_path / "00_a.ipynb", new_code_cell(SETUP), *claimed, new_code_cell("1 / 0"), *solved)
    before = path.read_bytes()
    assert run("record", path)[1].endswith("1 of 2 exercises, 1 of 3 points\n")
    assert run("record", path, "--run", "--json", "record.json")[1].endswith("1 of 2 exercises, 2 of 3 points\n")
    assert path.read_bytes() == before
    assert "was run from top to bottom in a fresh kernel" in Path("record.md").read_text(encoding="utf-8")
    facts = json.loads(Path("record.json").read_text(encoding="utf-8"))
    assert facts["run"] is True
    assert [row["state"] for row in facts["chapters"][0]["exercises"]] == ["stub", "solved"]
    assert facts["chapters"][0]["sha256"] == hashlib.sha256(before).hexdigest()


def test_files_folders_and_patterns(run: Run, handed_in: Path, tmp_path: Path) -> None:
    save(tmp_path / "01_b.ipynb", *exercise("1.1", "★☆☆", answered("✓ Yes.")))
    save(tmp_path / "02_c.ipynb", new_code_cell("play()"))
    for names in ([tmp_path], ["*.ipynb"], [handed_in, "0*.ipynb"], [tmp_path / "0?_*.ipynb", tmp_path]):
        code, out, err = run("record", *names)
        assert (code, out.splitlines()[-1]) == (0, "3 of 8 exercises, 4 of 17 points"), names
        assert "02_c.ipynb: has no exercise with a check" in err
    assert Path("record.md").read_text(encoding="utf-8").count("\n## ") == 2


def test_bad_input_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ipynb").write_text("no notebook")
    (tmp_path / "list.ipynb").write_text("[]")
    for name, words in (
        ("gone.ipynb", "no such notebook"),
        ("empty", "no such notebook"),
        ("gone/*.ipynb", "no such notebook"),
        ("text.ipynb", "this is no notebook"),
        ("list.ipynb", "this is no notebook"),
    ):
        code, out, err = run("record", tmp_path / name)
        assert (code, out) == (2, "")
        is_one_error(err, name, words)
        assert not Path("record.md").exists()
    code, _, err = run("record")
    assert code == 2
    is_one_error(err, "NOTEBOOK")


def test_without_jupyter_it_says_what_to_install(run: Run, handed_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbclient", None)
    assert run("record", handed_in)[0] == 0
    code, _, err = run("record", handed_in, "--run")
    assert code == 2
    is_one_error(err, 'pip install -e ".[lab]"')
