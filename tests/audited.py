"""A client whose update is audited: a small model, a photograph, and what it shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aprillab.anatomy import dissect
from aprillab.data import load_victim
from aprillab.models import VisionTransformer
from aprillab.update import ClientUpdate, client_update

SIZE, LABEL = 16, 6
POSITION = "position_embedding"
ATTENTION = [f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value")]


def vit(**options: object) -> VisionTransformer:
    """16 patches of 48 numbers, width 64, 10 classes."""
    shape = {"image_size": SIZE, "patch_size": 4, "width": 64, "depth": 2, "heads": 4, "classes": 10}
    return VisionTransformer(**{**shape, "seed": 1, **options})


def photograph(dtype: torch.dtype = torch.float32, channels: int = 3) -> Tensor:
    return load_victim("coffee", SIZE, dtype=dtype, channels=channels)


def update_of(model: nn.Module, pictures: Tensor | None = None, **options: object) -> ClientUpdate:
    """What a client with the photograph (or ``pictures``, labels counted from 6 on) shares."""
    pictures = photograph()[None] if pictures is None else pictures
    images = dissect(model).preprocessing.to_input(pictures.to(next(model.parameters())))
    return client_update(model, images, torch.arange(len(images)) + LABEL, **options)
