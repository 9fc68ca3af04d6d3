"""The command line at large: help, wrong usage, exit codes, and no traceback for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import SMALL, Run, is_one_error

import aprillab
from aprillab.commands import cli, invert

ROOT = Path(__file__).resolve().parents[2]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--version"], [f"aprillab {aprillab.__version__}"]),
        (["--help"], ["demo", "invert", "audit", "compare", "Exit codes: 0", "people who said yes"]),
        (["demo", "--help"], ["demo.png", "span attack", "Exit codes"]),
        (["invert", "--help"], ["difference magnified", "attack_seconds", "timm:NAME", "S/8 pixels"]),
        (["compare", "--help"], ["match:april", "mnist:K", "late/{position}-{seed}", "goes on where"]),
        (["audit", "--help"], ["MODULE:FUNCTION", "model.named_parameters()", "torch.save", "--withheld"]),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in expected), arguments
        assert max(map(len, shown.splitlines())) <= 118


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["destroy"], "invalid choice"),
        (["invert"], "PHOTO"),
        (["invert", "coffee", "--attack", "deep"], "'deep'"),
        (["invert", "coffee", "--dtype", "float16"], "float32"),
        (["invert", "coffee", "--image-size", "0"], "'0' is neither a whole number from 1 up nor"),
        (["invert", "coffee", "--seed", "-1"], "--seed"),
        (["invert", "coffee", "--seed", "many"], "'many' is no whole number from 0 up"),
        (["audit", "--model", "m:f", "--out", "o"], "--update"),
        (["audit", "--model", "m:f", "--update", "u", "--out", "o", "--preprocessing", "loud"], "imagenet"),
        (["audit", "--model", "m:f", "--update", "u", "--out", "o", "--preprocessing", "0.5,-1"], "positive"),
        (["audit", "--model", "m:f", "--update", "u", "--out", "o", "--part", "position"], "PART=TENSOR"),
    ],
)
def test_wrong_usage_is_one_line(run: Run, arguments: list[str], fragment: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    is_one_error(err, fragment, "--help")


def test_no_command_shows_the_help(run: Run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("usage: aprillab")


def test_interruption_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(invert, "play_round", interrupt)
    code, _, err = run("invert", "coffee", *SMALL)
    assert code == 130
    is_one_error(err, "interrupted")


def test_lack_of_memory_is_no_traceback_and_a_bug_is_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(message: str) -> Callable[..., None]:
        def play(*_: object, **__: object) -> None:
            raise RuntimeError(message)

        return play

    monkeypatch.setattr(invert, "play_round", fail("DefaultCPUAllocator: can't allocate memory"))
    code, _, err = run("invert", "coffee", *SMALL)
    assert code == 2
    is_one_error(err, "not enough memory")
    monkeypatch.setattr(invert, "play_round", fail("a bug of ours"))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli.main(["invert", "coffee", *SMALL])


def test_as_a_process_from_another_folder(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "aprillab", "invert", "coffee", *SMALL, "--attack", "april", "--json", "-"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1
    assert json.loads(ran.stdout)["attack"] is None
    is_one_error(ran.stderr, "first_block")
    assert not list(tmp_path.iterdir())
