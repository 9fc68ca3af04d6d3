"""Models by name: their shape, their position embedding, and weights of a file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import aprillab
from aprillab.anatomy import dissect, tensors_of
from aprillab.attacks import AttackNotApplicable
from aprillab.commands.round import play_round
from aprillab.data import load_victim
from aprillab.metrics import psnr
from aprillab.models import sinusoidal_1d, sinusoidal_2d
from aprillab.training import train
from aprillab.zoo import ModelError, build_model


def test_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"pip install 'aprillab\[timm\]'"):
        build_model("timm:vit_tiny_patch16_224", image_size=32)


@pytest.mark.parametrize("name", ["april", "prenorm", "timm:vit_tiny_patch16_224"])
def test_position_of_a_built_model(name: str) -> None:
    learned, *fixed = (
        build_model(name, image_size=32, position=position)
        for position in ("learned", "frozen", "sinusoidal", "sinusoidal-2d")
    )
    where = dissect(learned).position
    embedding, *others = (dict(model.named_parameters())[where] for model in (learned, *fixed))
    assert embedding.requires_grad
    assert not any(other.requires_grad for other in others)
    assert torch.equal(embedding, others[0])
    rows, width = embedding.shape[-2:]
    grid = round((rows - 1) ** 0.5)
    assert torch.allclose(others[1][0], sinusoidal_1d(rows, width).float())
    assert torch.allclose(others[2][0], sinusoidal_2d((grid, grid), width).float())
    for model in fixed:
        same = [n for n, p in learned.named_parameters() if n != where and torch.equal(p, tensors_of(model)[n])]
        assert len(same) == len(list(learned.parameters())) - 1


def test_no_position() -> None:
    own, other = (build_model(name, image_size=32, position="none") for name in ("prenorm", "vit_b_32"))
    assert dissect(own).position is None
    assert torch.equal(own.head.weight, build_model("prenorm", image_size=32).head.weight)
    assert not other.encoder.pos_embedding.any()
    assert not other.encoder.pos_embedding.requires_grad


def test_shape_of_a_built_model() -> None:
    shape = {"image_size": 28, "patch_size": 7, "width": 32, "depth": 3, "heads": 2, "mlp_ratio": 1.5}
    model = build_model("april", channels=1, classes=10, **shape)
    assert model.patch_embedding.weight.shape == (32, 1, 7, 7)
    assert (len(model.blocks), model.heads, model.blocks[0].mlp[0].out_features) == (3, 2, 48)
    partly = build_model("prenorm", image_size=32, depth=1)
    assert (partly.patch_size, partly.width, partly.heads, len(partly.blocks)) == (4, 384, 6, 1)
    for name, options, fragment in (
        ("vit_b_32", {"width": 64, "channels": 1}, "width, channels: only april and prenorm"),
        ("prenorm", {"image_size": 32, "heads": 5}, "width=384 is not a multiple of heads=5"),
        ("prenorm", {"image_size": 32, "patch_size": 5}, "patch_size=5 does not tile"),
        ("prenorm", {"image_size": 32, "depth": 0}, "depth=0 must be positive"),
        ("prenorm", {"channels": 2}, "channels=2"),
        ("prenorm", {"image_size": 32, "width": 66, "heads": 2, "position": "sinusoidal-2d"}, "multiple of 4"),
        ("prenorm", {"position": "spiral"}, "'spiral' is none of learned"),
    ):
        with pytest.raises(ModelError, match=fragment):
            build_model(name, **options)


# --- Weights of a file --------------------------------------------------------------------------------------------

SHAPE = {"image_size": 8, "patch_size": 4, "width": 32, "depth": 1, "heads": 2, "classes": 5}


@pytest.mark.parametrize("position", ["learned", "frozen", "sinusoidal", "none"])
def test_checkpoints_come_back(tmp_path: Path, position: str) -> None:
    """Whether the trained model had its fixed table as a buffer, a frozen parameter, or not at all."""
    model = aprillab.VisionTransformer(**SHAPE, position=position, seed=8)
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "trained.safetensors"
    train(model, images, torch.arange(6) % 5, epochs=1, batch_size=3, checkpoint=file, progress=False)
    built = build_model("prenorm", **SHAPE, position=position, weights=file, dtype=torch.float64)
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensors_of(built)[name], tensor.double()), name
    assert not built.training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in built.named_parameters() if p.requires_grad} == trained
    wrong = {"learned": "none", "frozen": "learned", "sinusoidal": "learned", "none": "sinusoidal"}[position]
    with pytest.raises(ModelError, match=r"trained\.safetensors: .*position"):
        build_model("prenorm", **SHAPE, position=wrong, weights=file)


def test_state_dicts_of_other_libraries(tmp_path: Path) -> None:
    save_file(build_model("vit_b_32", image_size=32, classes=7, seed=5).state_dict(), tmp_path / "vit.safetensors")
    built = build_model("vit_b_32", image_size=32, classes=7, position="frozen", weights=tmp_path / "vit.safetensors")
    same = build_model("vit_b_32", image_size=32, classes=7, seed=5)
    assert all(torch.equal(tensors_of(built)[name], weight) for name, weight in tensors_of(same).items())
    for options, fragment in (
        ({"classes": 6}, "do not fit"),
        ({"classes": 7, "position": "sinusoidal"}, "not the one of position='sinusoidal'"),
        ({"classes": 7, "position": "none"}, "not the one of position='none'"),
    ):
        with pytest.raises(ModelError, match=fragment):
            build_model("vit_b_32", image_size=32, weights=tmp_path / "vit.safetensors", **options)


def test_a_head_of_zeros_from_a_file_stays(tmp_path: Path) -> None:
    model = aprillab.VisionTransformer(**SHAPE)
    torch.nn.init.zeros_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "zero.safetensors")
    assert not build_model("prenorm", **SHAPE, weights=tmp_path / "zero.safetensors").head.weight.any()


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "pickle.pt")
    for name in ("pickle.pt", "absent.safetensors"):
        with pytest.raises(ModelError, match=f"{name}: not a readable safetensors file"):
            build_model("prenorm", **SHAPE, weights=tmp_path / name)


def test_weights_follow_the_seed() -> None:
    one, two, other = (build_model("timm:vit_tiny_patch16_224", image_size=32, seed=seed) for seed in (3, 3, 4))
    for name, weight in tensors_of(one).items():
        assert torch.equal(weight, tensors_of(two)[name]), name
    assert not torch.equal(one.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_zero_head_of_torchvision_is_woken() -> None:
    model = build_model("vit_b_32", image_size=32, classes=10)
    assert 0.015 < model.heads.head.weight.std() < 0.025
    assert psnr(play_round(model, load_victim("coffee", 32), 9).reconstruction.pixels[0], coffee()) > 90
    with pytest.raises(AttackNotApplicable, match="first attention does not read"):
        play_round(model, load_victim("coffee", 32), 0, attack="april")


def coffee() -> Tensor:
    return load_victim("coffee", 32, dtype=torch.float64)
