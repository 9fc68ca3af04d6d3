"""The study of gradient matching on real ViTs, on a tiny one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import aprillab as al
from aprillab.anatomy import Tiling
from aprillab.attacks.searches.rearrange import rearranged
from studies import real_vits
from studies._rows import read


def test_every_recipe_runs_with_the_position_term_and_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real_vits.main(["--quick", "--out", str(tmp_path)])
    rows = read(tmp_path / "real_vits.csv", real_vits.Row)
    unmoved = rows.recipe == real_vits.UNMOVED
    assert unmoved.sum() == 1  # in float32, with the term
    assert len(rows[~unmoved]) == 2 * 2 * len(al.RECIPES)
    assert set(rows[~unmoved].recipe) == set(al.RECIPES)
    assert (rows[~unmoved].groupby("recipe").position_term.nunique() == 2).all()
    assert set(rows.precision) == {"float32", "float64"}
    assert rows.psnr.between(0, 100).all()
    assert (rows.evaluations <= 6).all()
    page = (tmp_path / "real_vits.md").read_text(encoding="utf-8")
    assert all(name in page for name in al.RECIPES)
    places = read(tmp_path / "real_vits_places.csv", real_vits.Places)
    assert (places.in_place >= places.small).all()
    assert places.at_home.between(0, 1).all()
    with Image.open(tmp_path / "real_vits_tiles.png") as tiles:  # with the term and without, six recipes
        assert tiles.size == (6 * real_vits.TILE, 2 * real_vits.TILE)
    capsys.readouterr()


def test_a_picture_in_another_order_is_the_photograph_once_its_patches_are_placed(tmp_path: Path) -> None:
    case = real_vits.Case("model", "coffee", 0, "float32", "dlg", True)
    truth, tiling = al.load_victim("coffee", real_vits.THUMBNAIL)[None], Tiling.square(8, (112, 112))
    order = torch.randperm(14 * 14, generator=torch.Generator().manual_seed(0))
    order[order == 0], order[0] = order[0].item(), 0  # one patch stays
    (tmp_path / real_vits.PICTURES).mkdir()
    shuffled = rearranged(truth, order, tiling)
    to_pil_image(shuffled[0]).save(real_vits.picture_of(tmp_path, case))
    (found,) = real_vits.placed(case, folder=tmp_path)
    assert found.small < 25
    assert found.in_place > 50  # up to 8 bits
    assert found.at_home == pytest.approx(float((order == torch.arange(14 * 14)).double().mean()))


def test_a_recipe_keeps_all_but_its_position_term() -> None:
    for name, recipe in al.RECIPES.items():
        assert real_vits.recipe_of(name, False).position_term is None
        assert real_vits.recipe_of(name, True).distance == recipe.distance
    assert real_vits.recipe_of(real_vits.UNMOVED, True).position_term == al.PositionTerm()
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
