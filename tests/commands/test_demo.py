"""``aprillab demo``: three rounds, their table and their figure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from command_line import Run
from PIL import Image
from torch import Tensor
from torchvision.models import VisionTransformer

from aprillab.commands import demo
from aprillab.commands.demo import SCENES, demo_figure
from aprillab.commands.round import play_round
from aprillab.data import load_victim
from aprillab.metrics import psnr
from aprillab.zoo import build_model

TITLES = tuple(scene.title for scene in SCENES)


def small_vit(name: str, *, image_size: int, position: str, seed: int) -> torch.nn.Module:
    """``build_model``, with a torchvision model of 16 patches in the place of ViT-B/16."""
    if name != "vit_b_16":
        return build_model(name, image_size=image_size, position=position, seed=seed)
    with torch.random.fork_rng(devices=[]):
        model = VisionTransformer(image_size, 8, num_layers=2, num_heads=4, hidden_dim=256, mlp_dim=256)
        torch.nn.init.normal_(model.heads.head.weight, std=0.02)
    model.encoder.pos_embedding.requires_grad_(position == "learned")
    return model.eval()


def test_demo_plays_three_attacks(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_victim("astronaut", 32)
    monkeypatch.setattr(demo, "photograph", lambda name, size: small if size == 224 else None)
    monkeypatch.setattr(demo, "build_model", small_vit)
    code, out, err = run("demo", "--out", "new/folder/demo.png")
    assert (code, err) == (0, "")
    rows = [re.split(" {2,}| (?=all)", line) for line in out.splitlines() if line.startswith(TITLES)]
    assert [tuple(row[:3]) for row in rows] == [
        ("APRIL's closed form", "architecture A", "all gradients"),
        ("patch-embedding system", "torchvision ViT-B/16", "all gradients"),
        ("span attack", "the same ViT-B/16", "all but position"),
    ]
    for row in rows:
        score, similarity, attack_seconds, gradient_seconds = map(float, row[3:7])
        assert score > 60
        assert 0.99 < similarity <= 1 + 1e-9
        assert attack_seconds < 10
        assert gradient_seconds < 10
        assert row[7] == "yes"
    for text in (
        "random weights, float32, one image, 32×32",
        "warm up",
        "people who said yes",
        "new/folder/demo.png",
    ):
        assert text in out
    with Image.open(tmp_path / "new/folder/demo.png") as figure:
        assert figure.format == "PNG"
        assert figure.width > 2.2 * figure.height


def test_demo_figure_shows_the_pictures_it_was_given() -> None:
    pixels = load_victim("coffee", 32)
    model = build_model("prenorm", image_size=32)
    played = play_round(model, pixels, 3)
    axes = demo_figure(pixels, [(SCENES[1], played)]).axes
    shown = [Tensor(ax.images[0].get_array().astype("float64")).permute(2, 0, 1) for ax in axes]
    assert torch.allclose(shown[0].double(), pixels.double(), atol=1e-7)
    assert psnr(shown[1].double().clamp(0, 1), pixels.double()) > 90
    assert axes[1].get_xlabel() == f"PSNR {played.psnr:.1f} dB"
