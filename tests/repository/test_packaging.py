"""The package as it is installed: one list of dependencies, bounds that Colab meets, a wheel
with its pictures.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from colab_runtimes import ADDED_ON_COLAB, COLAB
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from aprillab.data import load_victim, victims

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]

DISTRIBUTION_OF = {
    "flint": "python-flint",
    "distributed": "dask",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "IPython": "ipywidgets",
    "matplotlib_inline": "ipywidgets",
    "nbclient": "jupyterlab",
    "nbformat": "jupyterlab",
}


def requirements(*extras: str) -> dict[str, Requirement]:
    """What ``pip install aprillab[extras]`` asks for, by name, extras of extras included."""
    found: dict[str, Requirement] = {}
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            found |= requirements(*sorted(requirement.extras))
        else:
            found[requirement.name] = requirement
    return found


# --- One list -------------------------------------------------------------------------------------------------


def test_conda_environment_leaves_every_version_to_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    python, pip, packages = environment["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert pip == "pip"
    assert list(packages) == ["pip"]
    (editable,) = packages["pip"]
    match = re.fullmatch(r"-e \.\[([a-z,]+)\]", editable)
    assert match, f"{editable!r} is not an editable install of this project with extras"
    assert set(match[1].split(",")) <= set(EXTRAS)


def test_no_package_is_bounded_twice() -> None:
    lists = [PROJECT["dependencies"], *EXTRAS.values()]
    names = [Requirement(text).name for texts in lists for text in texts]
    repeated = {name for name in names if names.count(name) > 1} - {PROJECT["name"]}
    assert not repeated, f"bounded in more than one list: {repeated}"
    # The build's own requirement has to stand apart, so that the two must agree.
    (build,) = PYPROJECT["build-system"]["requires"]
    assert build in EXTRAS["test"]


def test_bounds_are_lower_bounds() -> None:
    for requirement in requirements("test").values():
        operators = {specifier.operator for specifier in requirement.specifier}
        allowed = {">=", "<"} if requirement.name in ("ipywidgets", "flwr") else {">="}
        assert ">=" in operators <= allowed, f"{requirement}: a bound other than {allowed}"


@pytest.mark.parametrize(
    "name",
    ["README.md", "docs/install.md", "docs/your-model.md", "Makefile", "environment.yml", ".github/workflows/ci.yml"],
)
def test_extras_that_documents_name_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for extras in re.findall(r"(?:\.|aprillab)\[([a-z,]+)\]", text):
        assert set(extras.split(",")) <= set(EXTRAS), f"{name} names [{extras}]; there are {sorted(EXTRAS)}"


def imported(folder: str) -> Iterator[tuple[Path, int, bool, str]]:
    """File, line, whether at the file's top level, and distribution, of all that is
    imported from elsewhere.
    """
    for path in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            for module in (module.partition(".")[0] for module in modules):
                if module not in sys.stdlib_module_names and module != "aprillab":
                    yield path.relative_to(ROOT), node.lineno, node in tree.body, DISTRIBUTION_OF.get(module, module)


#: The files that need Flower, each of which says so; `aprillab.federation` imports them when
#: they are asked for.
WITH_FLOWER = {f"aprillab/federation/{name}.py" for name in ("client", "curious", "nearby", "server")}


def test_the_package_imports_only_what_it_declares() -> None:
    base, course, federation = set(requirements()), set(requirements("course")), set(requirements("federation"))
    cluster, lab = set(requirements("cluster")), set(requirements("lab"))
    for path, line, top, distribution in imported("aprillab"):
        # Widgets need the course's packages as soon as they are imported, files of the federation
        # may need Flower.
        eager = top and path.name != "widgets.py"
        brought = (base if eager else course) | (federation if path.parts[1] == "federation" else set())
        brought |= cluster if path.name == "parallel.py" and not eager else set()
        brought |= lab if path.name == "record.py" and not eager else set()
        assert distribution in brought, f"{path}:{line} imports {distribution}, which no extra for it brings"


def test_the_studies_import_only_what_their_extra_brings() -> None:
    declared = set(requirements("studies"))
    # In an environment of their own (studies/README.md), or asked for by name.
    other = {"breaching", "omegaconf", "flwr"}
    for path, line, top, distribution in imported("studies"):
        with_flower = path.parts[1] == "protections" or path.name == "secure_sum.py"
        brought = declared | (set(requirements("federation")) if with_flower else set())
        assert distribution in (brought if top else brought | other), f"{path}:{line} imports {distribution}"


def test_console_script_leads_somewhere() -> None:
    module, _, function = PROJECT["scripts"]["aprillab"].partition(":")
    command = f"import importlib; assert callable(getattr(importlib.import_module({module!r}), {function!r}))"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)


# --- Colab ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", COLAB)
def test_a_colab_runtime_keeps_what_it_has(runtime: str) -> None:
    shipped = COLAB[runtime]
    assert Version(shipped["python"]) in SpecifierSet(PROJECT["requires-python"])
    for name, requirement in requirements("course").items():
        if name in ADDED_ON_COLAB:
            continue
        assert name in shipped, f"{requirement}: Colab does not ship it, so that installing aprillab would add it"
        assert requirement.specifier.contains(shipped[name]), (
            f"{requirement} would replace Colab's {name} {shipped[name]}"
        )


# --- The wheel ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the build backend is not installed: pip install -e .[test]")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_package_the_victims_and_the_licences(wheel: Path) -> None:
    assert wheel.name == f"aprillab-{PROJECT['version']}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    facts = f"aprillab-{PROJECT['version']}.dist-info"
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "aprillab").rglob("*.py")}
    manifest = json.loads((ROOT / "data/victims/manifest.json").read_text(encoding="utf-8"))
    pictures = {f"aprillab/_victims/{entry['file']}" for entry in manifest}
    licences = {f"{facts}/licenses/{name}" for name in PROJECT["license-files"]}
    recording = {f"aprillab/_federation/{path.name}" for path in (ROOT / "data" / "federation").iterdir()}
    assert modules | pictures | licences | recording | {"aprillab/_victims/manifest.json"} <= names
    unknown = {name for name in names if not name.startswith(("aprillab/", f"{facts}/"))}
    assert not unknown, f"besides the package: {unknown}"


@pytest.mark.slow
def test_unpacked_wheel_loads_its_own_victims_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)
    script = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import torch, aprillab.data as data\n"
        "from aprillab.data.victims import _victims_folder\n"
        "pictures, names = data.load_victims()\n"
        "torch.save({'file': data.__file__, 'folder': str(_victims_folder()), 'names': names, "
        "'pictures': pictures}, 'seen.pt')\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=elsewhere, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    seen = torch.load(elsewhere / "seen.pt", weights_only=True)
    assert Path(seen["file"]).is_relative_to(installed)
    assert Path(seen["folder"]) == installed / "aprillab" / "_victims"
    assert seen["names"] == victims()
    for name, picture in zip(seen["names"], seen["pictures"], strict=True):
        assert torch.equal(picture, load_victim(name)), f"{name} is another picture in the wheel"
