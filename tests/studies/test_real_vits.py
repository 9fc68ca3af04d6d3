"""The study of gradient matching on real ViTs, on a tiny one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import aprillab as al
from studies import real_vits
from studies._rows import read


def test_every_recipe_runs_with_the_position_term_and_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real_vits.main(["--quick", "--out", str(tmp_path)])
    rows = read(tmp_path / "real_vits.csv", real_vits.Row)
    assert len(rows) == 2 * 2 * len(al.RECIPES)
    assert set(rows.recipe) == set(al.RECIPES)
    assert (rows.groupby("recipe").position_term.nunique() == 2).all()
    assert set(rows.precision) == {"float32", "float64"}
    assert rows.psnr.between(0, 100).all()
    assert (rows.evaluations <= 6).all()
    page = (tmp_path / "real_vits.md").read_text(encoding="utf-8")
    assert all(name in page for name in al.RECIPES)
    capsys.readouterr()


def test_a_recipe_keeps_all_but_its_position_term() -> None:
    for name, recipe in al.RECIPES.items():
        assert real_vits.recipe_of(name, False).position_term is None
        assert real_vits.recipe_of(name, True).distance == recipe.distance
    assert real_vits.recipe_of("dlg", True).position_term == al.RECIPES["april"].position_term


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        real_vits.main(["--out", str(tmp_path)])
    assert not (tmp_path / "real_vits.csv").exists()


def test_a_library_s_model_has_a_head_that_passes_the_gradient_down() -> None:
    model, update, _ = real_vits.shared("timm deit_tiny_patch16_224", "astronaut", 0, "cpu")
    assert al.dissect(model).family == "timm"
    assert update.gradients["pos_embed"].any()
