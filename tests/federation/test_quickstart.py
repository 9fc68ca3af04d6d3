"""An app that was not written for the course is audited: three lines changed, one command."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from command_line import Run
from commands.conftest import run  # noqa: F401

from aprillab.federation import read_recording, run_nearby
from aprillab.federation.processes import run_federation

HERE = Path(__file__).resolve().parent / "quickstart"
CONFIG = {"num-server-rounds": 2, "fraction-evaluate": 1.0, "local-epochs": 1, "lr": 0.05, "batch-size": 4}
NODES = [{"partition-id": i, "num-partitions": 2} for i in range(2)]


def patched(folder: Path) -> None:
    """Apply ``three_lines.diff``, which only adds lines."""
    target, at = folder, 0
    for line in (folder / "three_lines.diff").read_text(encoding="utf-8").splitlines():
        if line.startswith("+++ b/"):
            target = folder / line.removeprefix("+++ b/")
        elif line.startswith("@@"):
            at = int(line.split("+")[1].split(",")[0]) - 1
        elif not line.startswith("---"):
            lines = target.read_text(encoding="utf-8").splitlines()
            if line.startswith("+"):
                lines.insert(at, line[1:])
                target.write_text("\n".join(lines) + "\n", encoding="utf-8")
            assert lines[at] == line[1:]
            at += 1


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The app in a folder of its own, the current one, and importable."""
    folder = tmp_path / "app"
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "quickstart"]:
        del sys.modules[name]


def run_app() -> dict[str, torch.Tensor]:
    """Both sides in this process; the final model."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "quickstart"]:
        del sys.modules[name]
    from quickstart import client_app, server_app

    torch.manual_seed(0)  # its loaders shuffle
    run_nearby(server_app.app, client_app.app, NODES, CONFIG)
    return torch.load("final_model.pt", weights_only=True)


def test_three_lines_are_three_lines() -> None:
    lines = (HERE / "three_lines.diff").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("+") and not line.startswith("+++") for line in lines) == 3
    assert sum(line.startswith("-") and not line.startswith("---") for line in lines) == 0
    assert not any("aprillab" in path.read_text() for path in (HERE / "quickstart").glob("*_app.py"))


def test_the_app_runs_as_before_and_is_audited(app: Path, run: Run, monkeypatch: Any) -> None:  # noqa: F811
    monkeypatch.chdir(app)
    random.seed(0)
    before = run_app()
    patched(app)
    random.seed(0)
    after = run_app()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = ["--model", "quickstart.task:net", "--preprocessing", "half"]
    code, out, err = run("audit", "--recording", "recording", *model, "--out", "report", "--round", "1")
    assert code == 0, err
    assert "1, round 1: exact." in out
    assert "2, round 1: unclear." in out
    assert "how many local steps 1, 2 took was not sent" in err
    summary = json.loads((app / "report" / "summary.json").read_text(encoding="utf-8"))
    assert {(one["client"], one["leak"]) for one in summary["audits"]} == {("1", "exact"), ("2", "unclear")}
    assert (app / "report" / "1" / "round-1" / "embedding.png").is_file()
    code, out, _ = run("audit", "--recording", "recording", *model, "--out", "other", "--client", "2", "--quiet")
    assert code == 1
    assert [line.split(":")[0] for line in out.splitlines()] == ["2, round 1", "2, round 2", "2, rounds together"]


@pytest.mark.slow
def test_the_app_by_processes_gives_the_updates_that_it_gives_in_one(app: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    patched(app)
    short = {"num-server-rounds": 1, "fraction-evaluate": 0.0}
    seconds = run_federation(app, NODES, log=app / "federation.log", run_config=short, timeout=150)
    real = read_recording(app / "recording")
    log = (app / "federation.log").read_text(encoding="utf-8")
    assert len(real.clients) == 2
    assert "curious server: round 1, kept 2 of 2 replies" in log
    assert "2 results and 0 failures" in log
    assert seconds < 150
    shutil.move("recording", "by_processes")
    run_app()
    here = read_recording(app / "recording").of_client("1")[0]
    # Of the two, the client of one picture takes one step that no shuffling changes.
    (there,) = next(rounds for name in real.clients if (rounds := _moved(app, name))[0].update.batch_size == 1)
    assert all(torch.equal(here.state[name], there.state[name]) for name in here.state)
    for name, gradient in here.update.gradients.items():
        torch.testing.assert_close(there.update.gradients[name], gradient, rtol=1e-4, atol=1e-5)


def _moved(app: Path, name: str) -> list[Any]:
    return read_recording(app / "by_processes").of_client(name)
