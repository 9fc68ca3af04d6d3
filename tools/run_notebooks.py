"""Run notebooks from top to bottom and write their outputs into them.

    python tools/run_notebooks.py                                   # all of notebooks/
    python tools/run_notebooks.py notebooks/00_start_here.ipynb

Each runs in a fresh kernel, in its own folder. A notebook that fails stays as it was. What differs
from one machine to the next (versions, timings, an editor's marks) is left out, so that a second
run changes little; so are the widgets' states, since GitHub shows no notebook that holds them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python", "pygments_lexer": "ipython3"}
# What an author says about a notebook or a cell stays; what a tool notes down goes.
KEPT_OF_NOTEBOOK = ("title", "authors", "license")
KEPT_OF_CELL = ("tags", "jupyter", "editable", "deletable", "slideshow")


class NotebookError(RuntimeError):
    """A notebook that cannot be read or did not run to its end; the message names it, the
    cell and the reason.
    """


def normalize(notebook: NotebookNode) -> None:
    """Leave out, in place, what is not the notebook's content.

    Parameters
    ----------
    notebook : NotebookNode
        Of format 4. Notebook metadata becomes the kernel, the language and the keys of
        ``KEPT_OF_NOTEBOOK`` (so that ``widgets`` goes); cell metadata keeps ``KEPT_OF_CELL``. An
        output that only a live widget could show is removed; one that has a picture, HTML or other
        data besides keeps these.
    """
    kept = {key: notebook.metadata[key] for key in KEPT_OF_NOTEBOOK if key in notebook.metadata}
    notebook.metadata = NotebookNode(kernelspec=NotebookNode(KERNEL), language_info=NotebookNode(LANGUAGE), **kept)
    for cell in notebook.cells:
        cell.metadata = NotebookNode({key: cell.metadata[key] for key in KEPT_OF_CELL if key in cell.metadata})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _only_a_widget(output)]
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET_VIEW, None)


def _only_a_widget(output: NotebookNode) -> bool:
    """Whether nothing is left of the output, the widget's repr aside, once its kernel is gone."""
    data = output.get("data", {})
    return WIDGET_VIEW in data and set(data) <= {WIDGET_VIEW, "text/plain"}


def run(path: Path, *, timeout: float = 600) -> float:
    """Execute one notebook and write it back.

    Parameters
    ----------
    path : Path
    timeout : float
        Seconds that a single cell may take.

    Returns
    -------
    float
        Seconds it took.

    Raises
    ------
    NotebookError
        If it is no notebook, a cell raises or takes too long, or the kernel dies. The file
        is then unchanged.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise NotebookError(f"{path} cannot be read as a notebook: {error}") from error
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
    )
    start = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError as error:
        cell = next(i for i, cell in enumerate(notebook.cells) if _failed(cell))
        raise NotebookError(f"{path}, cell {cell}: {error.ename}: {error.evalue}\n{error.traceback}") from error
    except (CellTimeoutError, DeadKernelError) as error:
        raise NotebookError(f"{path}: {error}") from error
    seconds = time.perf_counter() - start
    normalize(notebook)
    nbformat.validate(notebook)
    # An interrupted write must not cost the author a chapter.
    beside = path.with_name(f".{path.name}.new")
    nbformat.write(notebook, beside)
    os.replace(beside, path)
    return seconds


def _failed(cell: NotebookNode) -> bool:
    expected = "raises-exception" in cell.metadata.get("tags", [])
    return not expected and any(output.output_type == "error" for output in cell.get("outputs", []))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run notebooks and write their outputs into them.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one cell (default: %(default)s)")
    options = parser.parse_args(arguments)
    paths = options.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb"))
    if not paths:
        print("there is no notebook in notebooks/", file=sys.stderr)
        return 1
    failures = 0
    for path in paths:
        try:
            seconds = run(path, timeout=options.timeout)
        except NotebookError as error:
            print(error, file=sys.stderr)
            failures += 1
        else:
            print(f"{path.name:40} {seconds:6.1f} s {path.stat().st_size / 1e3:8.0f} kB", flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
