"""``aprillab map``: the leak map of the user's own model, as text, Markdown and JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import Run, is_one_error

from aprillab.commands import cli

MODULE = """
import torch
from torch import nn
from aprillab import VisionTransformer

SHAPE = dict(image_size=16, patch_size=4, width=80, depth=2, heads=4, classes=10)
def build(): return VisionTransformer(**SHAPE)
class Stranger(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.place, self.out = nn.Conv2d(3, 64, 4, 4), nn.Parameter(torch.randn(16, 64)), nn.Linear(64, 10)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("clients_model:build", *more)``: exit code, stdout, stderr, in a folder with that
    module.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clients_model.py").write_text(MODULE)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.delitem(sys.modules, "clients_model", raising=False)
        code = cli.main(["map", "--model", *words])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return call


def test_text_has_every_row_with_its_count(run: Run) -> None:
    code, out, err = run("clients_model:build")
    assert (code, err) == (0, "")
    assert "both embeddings frozen: span attack, one round\n    p + tokens + 1 = 66 ≤ 80 = d" in out
    assert "head only: no closed form" in out
    assert "LoRA of rank 8 on q, v: span attack, one round after the first" in out
    assert max(map(len, out.splitlines())) <= 118


def test_markdown_and_json_are_the_same_map(run: Run) -> None:
    markdown = run("clients_model:build", "--format", "markdown", "--rank", "2")[1]
    assert "| both embeddings frozen | **span attack** | p + tokens + 1 = 66 ≤ 80 = d | one round |" in markdown
    found = json.loads(run("clients_model:build", "--format", "json", "--rank", "2")[1])
    rows = {row["shared"]: row for row in found["rows"]}
    assert found["facts"]["patches"] == 16
    assert rows["both embeddings frozen"]["attack"] == "span"
    assert rows["head only"]["attack"] is None
    assert rows["LoRA of rank 2 on q, v"]["rounds"] == 4
    assert all(f"| {name} |" in markdown for name in rows)


def test_a_model_that_is_described(run: Run) -> None:
    code, _, err = run("clients_model:Stranger")
    assert code == 2
    is_one_error(err, "--part patch_weight=… --part image_size=…")
    code, out, _ = run("clients_model:Stranger", "--part", "patch_weight=stem.weight", "--part", "image_size=16",
                       "--part", "position=place")  # fmt: skip
    assert code == 0
    assert "all: patch-embedding system, one round\n    n = 16 ≤ 64 = d" in out


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["clients_model:none"], "has no 'none'"),
        (["clients_model"], "is not of the form MODULE:FUNCTION"),
        (["clients_model:build", "--rank", "0"], "'0' is no whole number from 1 up"),
        (["clients_model:build", "--format", "csv"], "'csv'"),
    ],
)
def test_bad_input_is_one_line(run: Run, words: list[str], fragment: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    is_one_error(err, fragment)
