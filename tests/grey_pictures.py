"""A small ViT, photographs of whole levels and what a client shares of them: for
attacks on grey levels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.anatomy import dissect
from aprillab.attacks.closed_forms.span import solve_span
from aprillab.attacks.grey_levels.grid import Grid
from aprillab.attacks.grey_levels.rounds import Rounds
from aprillab.models import VisionTransformer
from aprillab.preprocessing import HALF, Preprocessing
from aprillab.update import ClientUpdate, client_update


def vit(**options: Any) -> VisionTransformer:
    """16 patches of 48 numbers, 1-D sinusoids, float32."""
    sizes = {
        "image_size": 16, "patch_size": 4, "channels": 3, "width": 64, "depth": 2, "heads": 4, "classes": 6,
        "mlp_ratio": 2.0, "position": "sinusoidal", "seed": 1,
    }  # fmt: skip
    return VisionTransformer(**{**sizes, **options})


def photographs(*names: str, size: int = 16, channels: int = 3) -> Tensor:
    return torch.stack([al.load_victim(name, size, channels=channels, dtype=torch.float64) for name in names])


def client(model: nn.Module, pixels: Tensor, preprocessing: Preprocessing = HALF) -> ClientUpdate:
    """What the client shares; its labels are 1, 2, …"""
    images = preprocessing.to_input(pixels).to(next(model.parameters()).dtype)
    return client_update(model, images, torch.arange(len(pixels)) + 1)


def grid_of(model: nn.Module, update: ClientUpdate, batch: int = 1, preprocessing: Preprocessing = HALF) -> Grid:
    solution = solve_span(model, update, anatomy=dissect(model), batch_size=batch, strict=False)
    return Grid.of(solution, preprocessing, 256)


def rounds_of(grid: Grid, *, batch: int = 1, patches: Tensor | None = None, settled: Tensor | None = None) -> Rounds:
    """A state with some patches settled; default is the start, nothing settled."""
    rounds = Rounds.of(grid, batch, 0, torch.arange(batch) + 1, "known to the attacker")
    rounds.patches = rounds.patches if patches is None else patches.clone()
    rounds.settled = rounds.settled if settled is None else settled.clone()
    return rounds
