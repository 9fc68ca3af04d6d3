"""``aprillab compare``: its files, its page that names the command, and bad input in one line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aprillab.attacks.catalogue import ATTACKS
from aprillab.commands import cli
from aprillab.comparison.records import read_pictures, read_rows
from aprillab.data import read_picture

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
    # Where rows are computed is no part of the command in the page; and where none is missing,
    # nobody is asked.
    assert command(*again, "--dask", "tcp://127.0.0.1:1") == 0
    assert (folder / "tiny.md").read_text() == page
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
        (["--jobs", "0"], "'0' is no whole number from 1 up"),
        (["--jobs", "2", "--dask", "tcp://127.0.0.1:1"], "2 jobs and Dask: give one"),
        (["--dask", "abacus://here", "--device", "abacus"], "no Dask scheduler answers at abacus://here"),
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
    assert command(*FLAGS, "--out", tmp_path / "new/deeper", *options) == 2
    assert not list(tmp_path.iterdir())


# --- Pictures of one's own -----------------------------------------------------------------------------------------

SPAN = ["--attacks", "span", "--positions", "frozen", *FLAGS]


def test_pictures_of_one_s_own_beside_victims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / "holiday.png", seed=0)
    assert command("--victims", "holiday.png,coffee", "--batch-sizes", "1,2", *SPAN, "--out", "found") == 0
    rows = read_rows(tmp_path / "found/compare.csv")
    assert [row.case.victims for row in rows] == [("holiday.png",), ("coffee",), ("holiday.png", "coffee")]
    assert rows[0].psnr > 59
    private, found, _ = read_pictures(tmp_path / "found/compare.csv", rows[0].case)
    assert torch.equal(private, read_picture(tmp_path / "holiday.png", 8)[None])
    assert torch.equal(found, private)
    capsys.readouterr()
    # Another picture under the name is another update.
    save_picture(tmp_path / "holiday.png", seed=1)
    assert command("--victims", "holiday.png", *SPAN, "--out", "found") == 2
    assert "holiday.png has changed since the rows" in capsys.readouterr().err
    assert command("--victims", "holiday.png", *SPAN, "--out", "found", "--again") == 0


@pytest.mark.parametrize(
    ("victim", "fragment"),
    [("absent.jpg", "absent.jpg"), ("words.jpg", "not a picture"), ("a+b.png", "a plus parts the pictures")],
)
def test_files_that_are_no_victims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], victim: str, fragment: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.jpg").write_text("words")
    save_picture(tmp_path / "a+b.png")
    assert command("--victims", victim, *SPAN, "--out", "found") == 2
    error = capsys.readouterr().err
    assert fragment in error.splitlines()[-1]
    assert not (tmp_path / "found").exists()


def save_picture(path: Path, seed: int = 0) -> None:
    levels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)


# --- A folder in which another comparison is -----------------------------------------------------------------------


def test_rows_of_another_command_stay_and_the_page_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--victims", "coffee,rocket", *SPAN, "--out", tmp_path) == 0
    first, shown = (tmp_path / "compare.md").read_text(), capsys.readouterr()
    assert "besides" not in first + shown.err
    assert command("--victims", "coffee,rocket", "--seeds", "1", *SPAN, "--out", tmp_path) == 0
    shown = capsys.readouterr()
    assert len(read_rows(tmp_path / "compare.csv")) == 4
    sentence = "compare.csv has 2 rows of other settings besides"
    assert sentence in (tmp_path / "compare.md").read_text()
    assert sentence in shown.err
    assert "another's are made by: aprillab compare --victims coffee,rocket" in shown.err
    assert command("--victims", "coffee,rocket", "--again", "--seeds", "1", *SPAN, "--out", tmp_path) == 0
    assert "begun anew" in capsys.readouterr().err
    assert len(read_rows(tmp_path / "compare.csv")) == 2


def test_foreign_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "compare.csv").write_text("a,b\n1,2\n")
    assert command("--attacks", "span", *FLAGS, "--out", tmp_path) == 2
    assert "its columns are not this version's" in capsys.readouterr().err.splitlines()[-1]
    assert command("--attacks", "span", "--again", *FLAGS, "--out", tmp_path) == 0
