"""The command that runs notebooks and writes their outputs into them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[2]
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "tools/run_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, *sources: str, metadata: dict | None = None) -> Path:
    cells = [new_markdown_cell("# A chapter"), *(new_code_cell(source) for source in sources)]
    nbformat.write(new_notebook(cells=cells, metadata=metadata or {}), path)
    return path


def test_normalize_keeps_the_content_and_drops_the_traces(tool: ModuleType) -> None:
    cell = new_code_cell(
        "x",
        metadata={"tags": ["exercise"], "execution": {"iopub.execute_input": "noon"}, "vscode": {"id": 3}},
        outputs=[
            new_output("display_data", {WIDGET: {"model_id": "gone"}, "text/plain": "IntSlider()"}),
            new_output("display_data", {WIDGET: {"model_id": "gone"}, "text/plain": "strip", "image/png": "AAAA"}),
            new_output("stream", name="stdout", text="23 dB\n"),
        ],
    )
    metadata = {
        "widgets": {"state": {}},
        "title": "Start here",
        "language_info": {"name": "python", "version": "3.99"},
        "vscode": {},
    }
    notebook = new_notebook(cells=[cell], metadata=metadata)
    tool.normalize(notebook)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info", "title"}
    assert notebook.metadata.title == "Start here"
    assert "version" not in notebook.metadata.language_info
    assert notebook.cells[0].metadata == {"tags": ["exercise"]}
    picture, text = notebook.cells[0].outputs
    assert picture.data == {"text/plain": "strip", "image/png": "AAAA"}
    assert text.text == "23 dB\n"


@pytest.mark.slow
def test_outputs_are_written_and_a_second_run_changes_nothing(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "beside.txt").write_text("found")
    sources = ("import pathlib, sys", "print(pathlib.Path('beside.txt').read_text(), sys.executable)")
    path = write(tmp_path / "00_test.ipynb", *sources, metadata={"widgets": {"state": {}}})
    assert tool.main([str(path)]) == 0
    first = path.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[2].outputs[0].text == f"found {sys.executable}\n"
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2]
    assert "widgets" not in notebook.metadata
    assert tool.main([str(path)]) == 0
    assert path.read_bytes() == first
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00_test.ipynb", "beside.txt"]


@pytest.mark.slow
def test_notebook_that_fails_stays_as_it_was(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write(tmp_path / "01_bad.ipynb", "x = 1", "1 / 0")
    good = write(tmp_path / "02_good.ipynb", "6 * 7")
    before = bad.read_bytes()
    assert tool.main([str(bad), str(good)]) == 1
    assert bad.read_bytes() == before
    said = capsys.readouterr().err
    assert "01_bad.ipynb, cell 2: ZeroDivisionError" in said
    assert nbformat.read(good, as_version=4).cells[1].outputs[0].data["text/plain"] == "42"


def test_file_that_is_no_notebook_is_named(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "torn.ipynb"
    path.write_text('{"cells": [')
    assert tool.main([str(path)]) == 1
    assert "torn.ipynb cannot be read as a notebook" in capsys.readouterr().err
    assert path.read_text() == '{"cells": ['
