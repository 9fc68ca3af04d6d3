"""Install the course as a fresh Colab runtime would, and run its chapters there.

    python tools/try_colab.py                     # all chapters, from the wheel
    python tools/try_colab.py 01 03               # these two

In a temporary folder it makes a virtual environment with the ipywidgets, IPython and ipykernel that
Colab ships, and with what else Colab has of the course's requirements: shown from the environment
that runs this script, or, with ``--no-reuse-torch``, installed from the package index. It builds
the wheel. Then it tries both ways that README.md names:

1. A clone beside the notebook. The notebooks' own set-up cell has to install from it and import it,
   in one kernel.
2. The wheel, by the same pip command with the wheel in the clone's place. Each chapter named is
   then run in a kernel of that environment, in a folder with nothing but the notebooks.

It fails if an installation changed the version of any package that was there, if a package came
that Colab does not ship, if ``aprillab`` was not imported from where it should be, or if a cell, or
a widget's callback, raised.

Exit status: 0, all ran; 1, something failed; 3, pip reaches no package index, so that
nothing was tried.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"

#: What Colab's notebook server is made of; installed first, and to stay as it is.
SHIPPED = {"ipywidgets": "7.7.1", "ipython": "7.34.0", "ipykernel": "6.17.1"}
#: Whose versions are printed, besides.
WATCHED = (*SHIPPED, "torch", "numpy", "matplotlib")
NO_INDEX = r"from versions: none|NewConnectionError|Temporary failure in name resolution|Connection refused|timed out"

WHERE = """\
import json, sys, aprillab, ipywidgets, IPython, ipykernel
print(json.dumps({"aprillab": aprillab.__file__, "python": sys.prefix, "ipywidgets": ipywidgets.__version__,
                  "ipython": IPython.__version__, "ipykernel": ipykernel.__version__}))"""


class ColabError(RuntimeError):
    """Something that would go wrong on Colab; the message says what."""


class NoIndexError(ColabError):
    """pip reaches no package index: nothing can be tried."""


@dataclass(frozen=True)
class Ran:
    """One chapter: its name, seconds, what went wrong (empty if nothing), and how many
    widgets it showed.
    """

    name: str
    seconds: float
    errors: list[str]
    widgets: int


# --- The environment ------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """The variables that a process of the new environment gets: nothing of this one's packages."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def call(command: list[str], *, cwd: Path) -> str:
    """Run a command and return what it printed.

    Raises
    ------
    NoIndexError
        If its words are pip's for an index out of reach.
    ColabError
        If it fails otherwise.
    """
    ran = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    if ran.returncode:
        words = f"{' '.join(command)} failed:\n{(ran.stderr or ran.stdout).strip()[-2000:]}"
        raise (NoIndexError if re.search(NO_INDEX, ran.stderr) else ColabError)(words)
    return ran.stdout


def distributions(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that these requirements need, theirs included, by
    name in lower case.

    Parameters
    ----------
    requirements : list of str
        As in pyproject.toml; what their markers exclude is left out.
    """
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            found.setdefault(name, metadata.distribution(name))
        except metadata.PackageNotFoundError:
            continue  # pip will fetch it
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in found[name].requires or []]
    return found


def show(shipped: list[metadata.Distribution], folder: Path) -> None:
    """Fill ``folder`` with links to all that these distributions consist of."""
    folder.mkdir()
    for distribution in shipped:
        names = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for name in names:
            target = Path(str(distribution.locate_file(name)))
            if target.exists() and not (folder / name).exists():
                (folder / name).symlink_to(target, target_is_directory=target.is_dir())


def libraries() -> list[str]:
    """What Colab has of the package's requirements and those of its ``course`` extra, widgets
    aside.
    """
    wanted, extras = [], {"", "course", "timm", "transformers"}
    for requirement in map(Requirement, metadata.distribution("aprillab").requires or []):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            wanted.append(f"{requirement.name}{requirement.specifier}")
    return [text for text in wanted if not text.startswith(("aprillab", "ipywidgets"))]


def make_runtime(folder: Path, *, reuse_torch: bool) -> Path:
    """A virtual environment as Colab's: its Jupyter packages at their versions, and the
    libraries it ships.

    Returns
    -------
    Path
        Its python.
    """
    # Where libraries are shown, so is pip: faster, and no old setuptools hides the one that
    # PyTorch asks for.
    bare = ["--without-pip"] if reuse_torch else []
    call([sys.executable, "-m", "venv", *bare, str(folder / "runtime")], cwd=folder)
    python = folder / "runtime" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pins = [f"{name}=={version}" for name, version in SHIPPED.items()]
    if reuse_torch:
        found = distributions(["aprillab[course]", "ipykernel", "notebook", "jupyterlab", "pip"])
        hidden = {"aprillab", "widgetsnbextension", "jupyterlab-widgets", *SHIPPED}
        show([distribution for name, distribution in found.items() if name not in hidden], folder / "shipped")
        site = call([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).strip()
        # At the end of the path, so that Colab's own versions come first; pip removes
        # nothing from there.
        (Path(site) / "shipped.pth").write_text(f"{folder / 'shipped'}\n", encoding="utf-8")
    call([str(python), "-m", "pip", "install", "-q", *pins, *([] if reuse_torch else libraries())], cwd=folder)
    return python


def versions(python: Path) -> dict[str, str]:
    """The version of each installed distribution, by name in lower case; of several the
    one that is imported.
    """
    script = (
        "import importlib.metadata as m, json\n"
        "found = {}\n"
        "for d in m.distributions(): found.setdefault(d.metadata['Name'].lower().replace('_', '-'), d.version)\n"
        "print(json.dumps(found))"
    )
    return json.loads(call([str(python), "-c", script], cwd=python.parent))


def same_versions(before: dict[str, str], after: dict[str, str]) -> None:
    """Raise ColabError unless ``after`` is ``before`` and aprillab."""
    changed = [f"{name} {old} → {after.get(name)}" for name, old in before.items() if after.get(name) != old]
    if changed:
        raise ColabError(f"the installation changed what Colab ships: {', '.join(changed)}")
    if unknown := sorted(after.keys() - before.keys() - {"aprillab"}):
        raise ColabError(f"the installation brought what Colab does not ship: {', '.join(unknown)}")
    if "aprillab" not in after:
        raise ColabError("the installation left no aprillab")


# --- What is installed ----------------------------------------------------------------------------------------


def sources() -> list[str]:
    """The files and folders that the wheel is built from and an installation from a clone needs."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, wheel = settings["project"], settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    texts = ["pyproject.toml", project["readme"], *project["license-files"]]
    return [*texts, *wheel["packages"], *wheel["force-include"]]


def copy_sources(to: Path) -> Path:
    """What a build needs, as a clone in the folder ``to``."""
    for name in sources():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, to / name)
    return to


def build_wheel(clone: Path, to: Path) -> Path:
    """The wheel of a clone. With hatchling at hand nothing is downloaded for it."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(to), str(clone)]
    if importlib.util.find_spec("hatchling"):
        command.insert(4, "--no-build-isolation")
    call(command, cwd=to)
    (wheel,) = to.glob("aprillab-*.whl")
    return wheel


def setup_cell(notebook: NotebookNode) -> str:
    """The source of a notebook's set-up cell."""
    (cell,) = (cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", []))
    return cell.source


def pip_command(setup: str, *, python: Path, root: str) -> list[str]:
    """The one pip command of the set-up cell, with this python and this ``root``.

    Raises
    ------
    ColabError
        If the cell has no such command, or several.
    """
    calls = [
        node.args[0]
        for node in ast.walk(ast.parse(setup))
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.List)
    ]
    if len(calls) != 1:
        raise ColabError(f"the set-up cell should run one command; it has {len(calls)}")
    names = {"sys": SimpleNamespace(executable=str(python)), "root": root}
    command = eval(compile(ast.Expression(calls[0]), "<set-up cell>", "eval"), names)
    if command[1:4] != ["-m", "pip", "install"]:
        raise ColabError(f"the set-up cell runs no pip install, but {command}")
    return command


# --- Kernels --------------------------------------------------------------------------------------------------


def execute(notebook: NotebookNode, python: Path, *, cwd: Path, timeout: float) -> dict[str, str]:
    """Run a notebook to its end, errors or not, in a kernel of this python; its
    outputs are put into it.

    Returns
    -------
    dict of str
        Where aprillab was imported from, and the kernel's versions.

    Raises
    ------
    ColabError
        If a cell takes longer than ``timeout`` seconds or the kernel dies.
    """
    specs = cwd.parent / "kernels"
    (specs / "colab").mkdir(parents=True, exist_ok=True)
    spec = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Colab",
        "language": "python",
        "env": {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"},
    }
    (specs / "colab" / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    manager = AsyncKernelManager(
        kernel_name="colab",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(specs)], ensure_native_kernel=False),
    )
    notebook.cells.append(new_code_cell(WHERE))
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=timeout,
        allow_errors=True,
        store_widget_state=True,
        resources={"metadata": {"path": str(cwd)}},
    )
    try:
        client.execute(cleanup_kc=True)  # ends the kernel too
    except (CellTimeoutError, DeadKernelError) as error:
        raise ColabError(str(error)) from error
    outputs = notebook.cells.pop().outputs
    return json.loads(outputs[0].text) if outputs and outputs[0].output_type == "stream" else {}


def errors_of(notebook: NotebookNode) -> list[str]:
    """What raised in the cells that ran, and in the callbacks of the widgets they showed."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
                found.append(f"cell {number}: {output.ename}: {output.evalue}")
    for state in widget_states(notebook):
        for output in state.get("outputs", []):
            if output.get("output_type") == "error":
                found.append(f"a widget: {output['ename']}: {output['evalue']}")
    return found


def widget_states(notebook: NotebookNode) -> list[dict]:
    views = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    return [model["state"] for model in views.get("state", {}).values()]


def imported_from(where: dict[str, str], folder: Path) -> list[str]:
    """What is wrong with where a kernel got its packages from; aprillab should be below ``folder``."""
    if not where:
        return ["aprillab cannot be imported"]
    wrong = []
    if not Path(where["aprillab"]).resolve().is_relative_to(folder.resolve()):
        wrong.append(f"aprillab was imported from {where['aprillab']}, not from {folder}")
    wrong += [
        f"{name} {where[name]} instead of {wanted}" for name, wanted in SHIPPED.items() if where[name] != wanted
    ]
    return wrong


def run_chapter(path: Path, python: Path, *, cwd: Path, timeout: float) -> Ran:
    """Run one chapter in ``cwd`` with the aprillab that is installed beside this python."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    start = time.perf_counter()
    try:
        where = execute(notebook, python, cwd=cwd, timeout=timeout)
        errors = errors_of(notebook) + imported_from(where, python.parents[1])
    except ColabError as error:
        errors = [str(error)]
    widgets = sum(state.get("_model_name") == "OutputModel" for state in widget_states(notebook))
    return Ran(path.name, time.perf_counter() - start, errors, widgets)


# --- All of it ------------------------------------------------------------------------------------------------


def chapters(names: list[str]) -> list[Path]:
    """The notebooks whose names start so, all of them if there are no names."""
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    for name in names:
        if not any(path.name.startswith(name) for path in paths):
            raise ColabError(f"there is no chapter {name!r} in {NOTEBOOKS}")
    return [path for path in paths if not names or path.name.startswith(tuple(names))]


def try_all(folder: Path, paths: list[Path], *, reuse_torch: bool, timeout: float) -> bool:
    """Make the runtime in ``folder``, install both ways, run the chapters; print, and return
    whether all is well.
    """
    start = time.perf_counter()

    def say(words: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {words}", flush=True)

    setup = setup_cell(nbformat.read(paths[0], as_version=4))
    python = make_runtime(folder, reuse_torch=reuse_torch)
    before = versions(python)
    wrong = {name: before.get(name) for name, version in SHIPPED.items() if before.get(name) != version}
    if wrong or "aprillab" in before:
        raise ColabError(f"this is no Colab: {wrong or 'aprillab is there before it is installed'}")
    say(f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {before[name]}" for name in WATCHED))

    content = folder / "content"
    content.mkdir()
    clone = copy_sources(content / "aprillab")
    alone = new_notebook(cells=[new_code_cell(setup)])
    where = execute(alone, python, cwd=content, timeout=timeout)
    if problems := errors_of(alone) + imported_from(where, clone):
        raise ColabError(f"the set-up cell, beside a clone: {'; '.join(problems)}")
    same_versions(before, versions(python))
    say("set-up cell beside a clone: installed and imported in one kernel, all versions kept")

    call([str(python), "-m", "pip", "uninstall", "-q", "-y", "aprillab"], cwd=folder)
    wheel = build_wheel(clone, folder)
    command = [word for word in pip_command(setup, python=python, root=str(wheel)) if word != "-e"]
    call(command, cwd=folder)
    same_versions(before, versions(python))
    say(f"pip {' '.join(command[3:-1])} {wheel.name}{command[-1].removeprefix(str(wheel))}: all versions kept")

    upload = folder / "upload"
    upload.mkdir()
    for path in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy(path, upload)
    results = []
    for path in paths:
        ran = run_chapter(upload / path.name, python, cwd=upload, timeout=timeout)
        results.append(ran)
        print(f"{ran.name:36}{ran.seconds:6.1f} s{ran.widgets:3} widgets  {len(ran.errors)} errors", flush=True)
        for error in ran.errors:
            print(f"    {error}", flush=True)
    same_versions(before, versions(python))
    return not any(ran.errors for ran in results)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run chapters as on a fresh Colab runtime.")
    parser.add_argument("chapters", nargs="*", help="the starts of their names, 01 for instance; default: all")
    parser.add_argument(
        "--reuse-torch",
        action=argparse.BooleanOptionalAction,
        default=importlib.util.find_spec("torch") is not None,
        help="show this environment's PyTorch and the like to the new one (default: if it has them)",
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one cell (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="an empty or new folder to work in, kept; default: a temporary one")
    given = parser.parse_args(arguments)
    if sys.version_info[:2] != (3, 11):
        print(
            f"note: Colab's Jupyter packages are meant to be tried on Python 3.11, this is {sys.version.split()[0]}"
        )
    try:
        paths = chapters(given.chapters)
        if given.keep:
            given.keep.mkdir(parents=True, exist_ok=True)
            return int(not try_all(given.keep.resolve(), paths, reuse_torch=given.reuse_torch, timeout=given.timeout))
        with tempfile.TemporaryDirectory(prefix="colab-", ignore_cleanup_errors=True) as folder:
            options = {"reuse_torch": given.reuse_torch, "timeout": given.timeout}
            return int(not try_all(Path(folder).resolve(), paths, **options))
    except NoIndexError as error:
        print(f"pip reaches no package index: {error}", file=sys.stderr)
        return 3
    except ColabError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
