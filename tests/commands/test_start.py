"""How a command starts and ends: without PyTorch where it can, and quietly where it is broken off."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import is_one_error, mind_interruption

import aprillab

ROOT = Path(__file__).resolve().parents[2]

#: In the place of PyTorch: it sends Ctrl-C in the middle of its import, and swallows the exception.
FAKE_TORCH = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
except BaseException:
    pass
raise ImportError("half of it")
"""

PRINTING = """
import sys
from aprillab.commands import cli
cli._main = lambda argv: print("words") or 0
sys.exit(cli.main())
"""


def start(*arguments: str, path: Path = ROOT, **options: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **pipes)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["invert", "--help"], 0),
        (["audit", "--help"], 0),
        (["compare", "--attacks", "deep", "--out", "x"], 2),
        (["invert", "coffee", "--image-size", "0"], 2),
        (["audit", "--model", "m:f", "--update", "u", "--out", "o", "--loss", "hinge"], 2),
        (["destroy"], 2),
        ([], 2),
    ],
)
def test_help_and_wrong_usage_do_without_torch(tmp_path: Path, arguments: list[str], code: int) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('torch was imported')")
    began = time.perf_counter()
    process = start("-m", "aprillab", *arguments, path=tmp_path)
    out, err = process.communicate()
    assert process.returncode == code, err
    assert "torch was imported" not in err
    assert "Traceback" not in err
    if arguments == ["--version"]:
        assert out == f"aprillab {aprillab.__version__}\n"
        assert time.perf_counter() - began < 0.5


@pytest.mark.skipif(os.name == "nt", reason="sends a signal of POSIX")
def test_interruption_while_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(FAKE_TORCH)
    # A shell's background job ignores Ctrl-C, and so do its children: these tests may be one.
    process = start("-m", "aprillab", "invert", "coffee", path=tmp_path, preexec_fn=mind_interruption)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "aprillab: error: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "codes"),
    [
        (["-m", "aprillab", "invert", "--help"], {0, 141}),  # argparse itself keeps quiet about what it cannot write
        (["-c", PRINTING], {141}),
    ],
)
def test_nobody_reads_on(arguments: list[str], codes: set[int]) -> None:
    process = start(*arguments)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() in codes


def test_a_missing_argument_is_one_line_from_the_shell(tmp_path: Path) -> None:
    process = start("-m", "aprillab", "audit", "--model", "m:f", cwd=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 2
    is_one_error(err, "--out", "aprillab audit --help")
