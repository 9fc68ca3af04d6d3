"""Small models and private batches for all tests. Nothing here touches the global generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aprillab.anatomy import Anatomy, dissect
from aprillab.attacks.catalogue import ATTACKS, Attack
from aprillab.models import VisionTransformer

TINY = {"image_size": 8, "patch_size": 4, "width": 24, "depth": 2, "heads": 3, "classes": 5}


def tiny_vit(dtype: torch.dtype = torch.float64, **options: Any) -> VisionTransformer:
    """Our ViT with 4 patches of 48 numbers, 2 blocks, 5 classes; ``options`` overwrite."""
    return VisionTransformer(**{**TINY, **options}).to(dtype)


def private_batch(model: nn.Module, size: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normal images (B, C, H, W) for ``model`` and labels 0, 1, 2, … modulo its classes."""
    anatomy: Anatomy = dissect(model)
    tensors = dict(model.named_parameters())
    weight = tensors[anatomy.patch_weight]
    shape = (size, weight.shape[1], *anatomy.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    classes = 2 if anatomy.head_weight is None else len(tensors[anatomy.head_weight])
    return images.to(weight), torch.arange(size, device=weight.device) % classes


def randomize(model: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Add normal noise to every parameter: no zero heads, no zero biases, no LayerNorm of ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p), alpha=std)
    return model


@pytest.fixture
def make_vit() -> Callable[..., VisionTransformer]:
    """``make_vit(dtype=float64, **options)``: a tiny ViT of ours."""
    return tiny_vit


@pytest.fixture
def make_batch() -> Callable[..., tuple[Tensor, Tensor]]:
    """``make_batch(model, size=1, seed=0)``: images and labels for any model that can be dissected."""
    return private_batch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the attacks as they are called."""
    called: list[str] = []
    for name, attack in list(ATTACKS.items()):

        def counted(*arguments: Any, attack: Attack = attack, **options: Any) -> Any:
            called.append(attack.name)
            return attack.function(*arguments, **options)

        monkeypatch.setitem(ATTACKS, name, replace(attack, function=counted))
    return called
