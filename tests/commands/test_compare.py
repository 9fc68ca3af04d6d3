"""``aprillab compare``: its files, its page that names the command, and bad input in one line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aprillab.attacks.catalogue import ATTACKS
from aprillab.commands import cli
from aprillab.comparison.records import read_rows

FLAGS = ["--image-size", "8", "--patch-size", "4", "--width", "32", "--depth", "1", "--heads", "2"]


def command(*arguments: str | Path) -> int:
    return cli.main(["compare", *map(str, arguments)])


def test_command_writes_everything_and_names_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calls: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--victims", "coffee,clock,cell", "--attacks", "span,match:april", "--positions", "learned"]
    options += [*FLAGS, "--max-evaluations", "9", "--batch-sizes", "1,2", "--name", "tiny", "--out", "results"]
    assert command(*options) == 0
    shown = capsys.readouterr()
    assert "8 attacks on 4 updates" in shown.out
    assert "batches of 2: cell left out" in shown.err
    folder = tmp_path / "results"
    assert {file.name for file in folder.iterdir()} == {
        "tiny.csv", "tiny.md", "tiny_curves.csv", "tiny_pictures", "tiny_pictures_1.png", "tiny_curves_1.png",
        "tiny_curves_2.png", "tiny_seconds_1.png", "tiny_seconds_2.png",
    }  # fmt: skip
    page = (folder / "tiny.md").read_text()
    assert all((folder / name).is_file() for name in re.findall(r"\]\(([^)]+)\)", page))
    assert str(tmp_path) not in page
    rows = read_rows(folder / "tiny.csv")
    again = re.search(r"Made by `aprillab compare (.*?)`", page)[1].split()
    assert command(*again) == 0
    assert len(calls) == 8  # the command in the page means the same rows
    assert read_rows(folder / "tiny.csv") == rows


def test_interrupted_command_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(ATTACKS, "april", replace(ATTACKS["april"], function=interrupt))
    assert command("--attacks", "embedding,april", *FLAGS, "--out", tmp_path) == 130
    error = capsys.readouterr().err
    assert "compare.csv has what was done; the same command goes on" in error
    assert error.splitlines()[-1] == "aprillab: error: interrupted"
    assert [row.case.attack for row in read_rows(tmp_path / "compare.csv")] == ["embedding"]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--victims", "nobody"], "no victim 'nobody'"),
        (["--victims", "coffee,"], "no list such as"),
        (["--attacks", "deep"], "no attack 'deep'"),
        (["--positions", "spiral"], "position 'spiral'"),
        (["--models", "vgg16"], "no model 'vgg16'"),
        (["--width", "33"], "width=33"),
        (["--weights", "absent.safetensors"], "absent.safetensors"),
        (["--seeds", "0,many"], "'many' is no whole number"),
        (["--batch-sizes", "3"], "a batch of 3"),
        (["--max-evaluations", "1"], "max_evaluations=1"),
        (["--max-seconds", "-1"], "no positive number"),
        (["--device", "abacus"], "--device abacus"),
        (["--name", "a/b"], "--name a/b"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], fragment: str
) -> None:
    assert command(*FLAGS, "--out", tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert error.count("aprillab: error:") == 1
    assert fragment in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_foreign_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "compare.csv").write_text("a,b\n1,2\n")
    assert command("--attacks", "span", *FLAGS, "--out", tmp_path) == 2
    assert "its columns are not this version's" in capsys.readouterr().err.splitlines()[-1]
    assert command("--attacks", "span", "--again", *FLAGS, "--out", tmp_path) == 0
