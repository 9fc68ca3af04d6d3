"""Clients whose pictures are known: what the span says of them, and the truth in whole levels."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

import aprillab as al
from aprillab.attacks.closed_forms.span import solve_span
from aprillab.attacks.closed_forms.span_solution import SpanSolution
from aprillab.attacks.grey_levels.grid import Grid
from aprillab.attacks.grey_levels.rounds import Replay
from aprillab.models import patchify, sinusoidal_2d

VICTIMS = ("astronaut", "chelsea", "coffee", "rocket")
NAMES = {"frozen": "random", "sinusoidal": "1-D", "sinusoidal-2d": "2-D"}  # of the embeddings
NOISE = 1e-5  # of the update's r.m.s., where the precision is called "noise"


@dataclass(frozen=True)
class Setting:
    """A model, and what becomes of its update."""

    position: str  # "frozen" (random), "sinusoidal" (1-D) or "sinusoidal-2d"
    image: int  # pixels a side
    patch: int
    width: int
    precision: str = "float32"  # or "float64", "float16", "noise"
    batch: int = 1
    depth: int = 2
    dithered: bool = False  # by one level from end to end, so that none is whole

    def __str__(self) -> str:
        batch = f", batch of {self.batch}" if self.batch > 1 else ""
        size = f"{self.image}×{self.image}, patch {self.patch}, d = {self.width}"
        return f"{NAMES[self.position]}{batch}, {size}, {self.precision}{', dithered' if self.dithered else ''}"


@dataclass(frozen=True, eq=False)
class Victim:
    """A client's update, what the span says of it, and the truth."""

    model: al.VisionTransformer
    update: al.ClientUpdate
    labels: Tensor
    solution: SpanSolution
    grid: Grid
    truth: Tensor  # (B, n, p), levels

    @property
    def replay(self) -> Replay:
        loss = torch.nn.functional.cross_entropy
        return Replay(self.model, self.update, self.grid, "patch_embedding.weight", loss)


@functools.lru_cache(maxsize=8)  # of what two or three measurements in a row share
def victim(setting: Setting, number: int) -> Victim:
    """The client with the ``number``-th photograph, and in a batch those after it."""
    names = [VICTIMS[(number + i) % len(VICTIMS)] for i in range(setting.batch)]
    side, dtype = setting.image // setting.patch, torch.float64 if setting.precision == "float64" else torch.float32
    table = sinusoidal_2d((side, side), setting.width) if setting.position == "sinusoidal-2d" else None
    model = al.VisionTransformer(
        image_size=setting.image, patch_size=setting.patch, width=setting.width, depth=setting.depth,
        heads=setting.width // 32, classes=10, position=setting.position.removesuffix("-2d"), position_values=table,
    ).to(dtype)  # fmt: skip
    pixels = torch.stack([al.load_victim(name, setting.image, dtype=torch.float64) for name in names])
    if setting.dithered:
        noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        pixels = pixels + (noise - 0.5) / 255
    labels = torch.arange(setting.batch) + number
    update = al.client_update(model, al.HALF.to_input(pixels).to(dtype), labels)
    if setting.precision == "float16":
        update = al.defenses.to_precision(update, torch.float16)
    elif setting.precision == "noise":
        update = al.defenses.gaussian_noise(update, NOISE, relative=True, seed=number)
    solution = solve_span(model, update, anatomy=al.dissect(model), batch_size=setting.batch, strict=False)
    truth = (255 * patchify(pixels, setting.patch)).round()
    return Victim(model, update, labels, solution, Grid.of(solution, al.HALF, 256), truth)
