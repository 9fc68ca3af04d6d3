"""What stands around the package: the README and its commands, the Makefile, continuous
integration, the citation.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from notebook_tools import anchors

import aprillab
from aprillab.data import load_victim

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: What the front page had no room for.
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.M)[1].split())

needs_make = pytest.mark.skipif(
    shutil.which("make") is None or os.name == "nt", reason="needs GNU make and a POSIX shell"
)


# --- README ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("*.md"), ROOT / "data/README.md", *ROOT.glob("notebooks/*.md"), *ROOT.glob("docs/**/*.md")],
    ids=lambda path: path.name,
)
def test_links_within_the_repository_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            file, _, heading = target.partition("#")
            assert (path.parent / file).exists(), f"{path.name} links to {target}"
            if heading and file.endswith(".md"):
                assert heading in anchors(path.parent / file), f"{path.name} links to {target}"


def test_pictures_have_alternative_texts() -> None:
    pictures = re.findall(r"!\[([^\]]*)\]\(", README)
    assert pictures
    assert all(len(alternative) > 40 for alternative in pictures)


def test_readme_starts_with_the_two_commands() -> None:
    first = re.search(r"^```\n(.*?)^```", README, re.M | re.S)[1]
    assert re.findall(r"^make (\w+)", first, re.M) == ["demo", "test"]
    assert README.index("docs/demo.png") < README.index(first)


def test_the_front_page_is_short() -> None:
    assert len(README.split()) < 1500  # half of what it once had; the rest is in docs/
    for name in ("install", "your-model", "attacks", "measured", "teaching"):
        assert f"](docs/{name}.md" in README
        assert re.search(rf"^{name}$", DOCS["index"], re.M), f"the book's table of contents lacks {name}"


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", ".ci/run", "notebooks/README.md", "docs/install.md", "docs/teaching.md"]
)
def test_make_commands_that_documents_name_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.M))
    assert named
    assert named <= TARGETS


def test_chapter_table_knows_every_notebook() -> None:
    named = re.findall(r"^\| \[[^]]+\]\(notebooks/(\w+\.ipynb)\) \| \S.* \|$", README, re.M)
    assert sorted(named) == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_functions_that_readme_and_book_name_exist() -> None:
    named = {name for text in (README, *DOCS.values()) for name in re.findall(r"\bal\.(\w+)", text)}
    assert {"client_update", "invert"} <= named
    missing = {name for name in named if not hasattr(aprillab, name)}
    assert not missing, f"somebody speaks of al.{', al.'.join(sorted(missing))}"


def test_one_version_everywhere() -> None:
    assert aprillab.__version__ == PROJECT["version"]
    assert set(re.findall(r"aprillab-(\d[\d.]*)-py3", DOCS["install"])) == {PROJECT["version"]}


@pytest.mark.slow
def test_round_of_the_book_ends_in_an_audit(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```", DOCS["your-model"], re.M | re.S)
    (then,) = re.findall(r"^```\n(python federated.py\n.*?)^```", DOCS["your-model"], re.M | re.S)
    from torchvision.utils import save_image

    save_image(load_victim("coffee"), tmp_path / "holiday.jpg")
    whole, short = "vit_b_16(num_classes=10)", "VisionTransformer(224, 16, 3, 12, 768, 3072, num_classes=10)"
    assert whole in snippet
    (tmp_path / "federated.py").write_text(snippet.replace(whole, short), encoding="utf-8")  # three blocks of twelve
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for line in then.splitlines():
        program, *words = shlex.split(line)
        command = [sys.executable, *(["-m", "aprillab"] if program == "aprillab" else []), *words]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    facts = json.loads((tmp_path / "audit/report.json").read_text(encoding="utf-8"))
    assert facts["leak"] in ("exact", "close")
    assert facts["labels"]["labels"] == [3]
    from aprillab.data import read_picture
    from aprillab.metrics import psnr

    shown = read_picture(tmp_path / "audit" / facts["attacks"]["embedding"]["picture"])
    assert psnr(shown, read_picture(tmp_path / "holiday.jpg")) > 40


def test_commands_of_readme_and_book_are_commands() -> None:
    from aprillab.commands import cli

    fenced = re.findall(r"^```([^\n]*)\n(.*?)^```$", "\n".join([README, *DOCS.values()]), re.M | re.S)
    shells = [text for language, text in fenced if not language]
    commands = [line for text in shells for line in re.findall(r"^(?:\.venv\S+)?aprillab (.+)$", text, re.M)]
    assert len(commands) >= 10
    for line in commands:
        cli._parser().parse_args(shlex.split(line))


# --- Makefile and continuous integration -------------------------------------------------------------------------


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, and an environment in which everything looks installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".venv").mkdir()
    os.utime(tmp_path / "pyproject.toml", (1000, 1000))
    for stamp in (".created", ".installed-base", ".installed-lab", ".installed-test"):
        (tmp_path / ".venv" / stamp).touch()
    return tmp_path


@needs_make
def test_help_is_the_default_and_lists_every_command(checkout: Path) -> None:
    shown = make(checkout)
    assert shown.returncode == 0
    assert set(re.findall(r"^  make ([a-z]+) +\S", shown.stdout, re.M)) == TARGETS


@needs_make
def test_nothing_is_installed_twice_until_the_dependencies_change(checkout: Path) -> None:
    commands = make(checkout, "-n", "demo").stdout
    assert "aprillab demo --out demo.png" in commands
    assert "pip install" not in commands
    os.utime(checkout / "pyproject.toml")
    os.utime(checkout / ".venv" / ".installed-base", (1000, 1000))
    assert "pip install --disable-pip-version-check --no-compile -e ." in make(checkout, "-n", "demo").stdout


@needs_make
def test_demo_needs_no_extra_and_test_needs_its_own(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    demo, test = (make(checkout, "-n", target).stdout for target in ("demo", "test"))
    assert re.findall(r"pip install .*-e (.*)", demo) == ["."]
    assert re.findall(r"pip install .*-e (.*)", test) == ['".[test]"']
    for commands in (demo, test):  # by all cores, once pip has put the files there
        assert 0 < commands.index("pip install") < commands.index("-m compileall -qq -j 0 .venv/lib || true")
    for command in ("ruff check .", "ruff format --check .", "mypy aprillab", "pytest tests"):
        assert command in test


@needs_make
def test_pytorch_for_the_cpu_comes_first_and_from_its_own_index(checkout: Path) -> None:
    address = "TORCH_INDEX=https://index.example/cpu"
    assert "keeps the PyTorch that it has" in make(checkout, "-n", "demo", address).stdout
    shutil.rmtree(checkout / ".venv")
    for target in ("demo", "lab", "test"):
        shown = make(checkout, "-n", target, address).stdout
        installed = re.findall(r"pip install --disable-pip-version-check --no-compile (.*)", shown)
        assert installed[0] == "torch torchvision --index-url https://index.example/cpu"
        assert all("--index-url" not in line for line in installed[1:])
        assert "keeps the PyTorch" not in shown
    assert "torch torchvision" not in make(checkout, "-n", "demo").stdout


@needs_make
def test_notebooks_are_tested_once_there_are_some(checkout: Path) -> None:
    assert "nbval" not in make(checkout, "-n", "test").stdout
    (checkout / "notebooks").mkdir()
    (checkout / "notebooks" / "00_start_here.ipynb").touch()
    assert "--nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks" in make(checkout, "-n", "test").stdout


@needs_make
@pytest.mark.parametrize("kind", ["missing", "old"])
def test_python_that_is_too_old_or_missing_is_said_in_words(checkout: Path, kind: str) -> None:
    shutil.rmtree(checkout / ".venv")
    python = checkout / "python-of-old"
    if kind == "old":
        # It fails the version check as Python 3.10 would, and would leave a trace if asked
        # for an environment.
        python.write_text(
            '#!/bin/sh\ncase "$1" in -c) exit 1;; --version) echo Python 3.10.1;; *) mkdir .venv;; esac\n'
        )
        python.chmod(0o755)
    refused = make(checkout, "demo", f"PYTHON={python}")
    assert refused.returncode != 0
    assert "Python 3.11 or newer" in refused.stderr
    assert "make demo PYTHON=" in refused.stderr
    if kind == "old":
        assert "Python 3.10.1" in refused.stderr
    assert not (checkout / ".venv").exists()


def test_makefile_and_pyproject_want_the_same_python() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    assert "sys.version_info < (3, 11)" in MAKEFILE


def test_continuous_integration_runs_the_two_commands() -> None:
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make ")] == ["make demo", "make test"]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    systems = {entry["os"] for entry in workflow["jobs"]["make"]["strategy"]["matrix"]["include"]}
    assert systems == {"ubuntu-latest", "macos-latest"}
    assert "bash .ci/run" in [step.get("run") for step in workflow["jobs"]["make"]["steps"]]
    windows = " ".join(step.get("run", "") for step in workflow["jobs"]["windows"]["steps"])
    for command in (
        "aprillab demo --out demo.png",
        "ruff check .",
        "ruff format --check .",
        "mypy aprillab",
        "pytest",
    ):
        assert command in windows


# --- Citation and issue form ----------------------------------------------------------------------------------


def test_citation_has_its_fields_and_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    for field in ("message", "title", "abstract"):
        assert isinstance(citation[field], str)
        assert citation[field].strip()
    assert citation["type"] == "software"
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == [{"name": PROJECT["authors"][0]["name"]}]
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Lu", "Zhang", "Zhao", "He", "Cheng"]
    assert paper["identifiers"][0]["value"] == "arXiv:2112.14087"
    for fact in (paper["title"], "2112.14087", "10051", PROJECT["version"]):
        assert fact in re.sub(r"\s*\n> ", " ", README), f"the README's citation lacks {fact}"


def test_changelog_knows_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\d+\.\d+\.\d+)", changelog, re.M)[1] == PROJECT["version"]


def test_issue_form_asks_for_chapter_cell_and_environment() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/problem.yml").read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    questions = {item["id"]: item for item in form["body"] if item["type"] != "markdown"}
    for name in ("chapter", "cell", "environment"):
        assert questions[name]["validations"]["required"] is True
        assert questions[name]["attributes"]["label"]
