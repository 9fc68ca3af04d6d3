"""Fixed position embeddings, and how independent their vectors are modulo the patches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.defenses import freeze_position

PRECISIONS = ("float64", "float32", "float16", "bfloat16")


# --- Position embeddings ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    """A fixed position embedding.

    ``scale`` is the standard deviation of a random one and the factor on a sinusoidal one;
    ``speed`` the angle in radians by which the fastest feature turns from one place to the next, 1
    in the usual table. ``table`` is the precision in which its values are stored, "" for that of
    the model.
    """

    kind: str
    scale: float = 1.0
    base: float = math.nan
    speed: float = math.nan
    table: str = ""
    precisions: tuple[str, ...] = PRECISIONS

    def __str__(self) -> str:
        if self.kind == "learned":
            return "learned, then frozen"
        if self.kind == "random":
            return f"random, deviation {self.scale:.3g}"
        parts = [f"{self.kind} sinusoids, base {self.base:g}"]
        parts += [f"scale {self.scale:g}"] if self.scale != 1 else []
        parts += [f"speed {self.speed:g}"] if self.speed != 1 else []
        parts += [f"stored in {self.table}"] if self.table else []
        return ", ".join(parts)


def sinusoids(kind: str, base: float = 1e4, speed: float = 1.0, **options: Any) -> Embedding:
    return Embedding(kind, base=base, speed=speed, **options)


def sines(places: int, width: int, base: float, speed: float) -> Tensor:
    """(places, width), float64: the usual table with places counted in steps of ``speed``."""
    angle = speed * torch.arange(places, dtype=torch.float64)[:, None]
    angle = angle * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def values(embedding: Embedding, grid: int, width: int, seed: int) -> Tensor:
    """The table (1 + grid², width), float64, rounded as it is stored; class token first."""
    if embedding.kind == "random":
        generator = torch.Generator().manual_seed(1_000 + seed)
        table = torch.randn(grid**2 + 1, width, generator=generator, dtype=torch.float64)
    elif embedding.kind == "1-D":
        table = sines(grid**2 + 1, width, embedding.base, embedding.speed)
    elif embedding.kind == "2-D":
        side = sines(grid, width // 2, embedding.base, embedding.speed)
        table = torch.cat([side.repeat_interleave(grid, 0), side.repeat(grid, 1)], dim=1)
        table = torch.cat([table.new_zeros(1, width), table])
    else:
        raise ValueError(f"kind={embedding.kind!r} has no formula")
    table = embedding.scale * table
    return table.to(getattr(torch, embedding.table)).double() if embedding.table else table


def with_position(model: nn.Module, table: Tensor) -> nn.Module:
    """The model with its position embedding set to ``table``, in its precision, and frozen."""
    name = al.dissect(model).position or ""
    with torch.no_grad():
        dict(model.named_parameters())[name].copy_(table)
    return freeze_position(model)


# --- What is measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Independence:
    """How independent the positions of the patches are: singular values, largest first, float64.

    ``positions`` (n,) are those of the vectors C (E_i + b_e); ``modulo`` (n,) those of what is left
    of them when the image of C W_e is projected out. Values below ``floor`` (the rounding of this
    float64 computation) may be zero.
    """

    positions: Tensor
    modulo: Tensor

    @property
    def floor(self) -> float:
        return torch.finfo(torch.float64).eps * float(self.positions[0])

    @property
    def least(self) -> float:
        return float(self.modulo[-1])

    @property
    def condition(self) -> float:
        return float(self.modulo[0]) / max(self.least, 1e-300)

    def rank(self, eps: float) -> int:
        """How many vectors stay independent to a relative ``eps``; 4 ``floor`` is the finest."""
        return int((self.modulo > max(eps * float(self.positions[0]), 4 * self.floor)).sum())

    def digits(self, error: float) -> float:
        """log₁₀ of the least singular value over an error: the decimal digits it leaves."""
        return math.log10(max(self.least, self.floor) / error)

    def mean_digits(self, error: float) -> float:
        """The same with all singular values, 1/σ² averaged, instead of the least alone."""
        return -0.5 * math.log10(float((error / self.modulo.clamp_min(self.floor)).square().mean()))


def independence(model: nn.Module, pixel_space: Tensor | None = None) -> Independence:
    """Measure the second half of the span attack's condition (chapter 07, after (7.6)) on any ViT.

    Parameters
    ----------
    model : nn.Module
        Any that :func:`aprillab.dissect` knows, with a position embedding. The mean over features
        is removed (C) where a LayerNorm stands before the first attention; its weight and bias are
        not looked at.
    pixel_space : Tensor of shape (p, k), optional
        A basis of the space the patches lie in, where more is known than that they have p pixels:
        the row space of the patch embedding's gradient, say. Without it the image of all p pixels
        is removed, which needs no victim; where p ≥ d it is everything, and nothing is left.

    Returns
    -------
    Independence

    Raises
    ------
    ValueError
        If the model has no position embedding.
    """
    anatomy = al.dissect(model)
    if anatomy.position is None:
        raise ValueError(f"{type(model).__name__} has no position embedding")
    weights = al.tensors_of(model)
    image = weights[anatomy.patch_weight].double().flatten(1)  # (d, p)
    image = image if pixel_space is None else image @ pixel_space.to(image)
    e = weights[anatomy.position].double().flatten(0, -2)[anatomy.position_prefix :]  # (n, d)
    e = e if anatomy.patch_bias is None else e + weights[anatomy.patch_bias].double()
    if anatomy.first_block == "prenorm":
        image, e = image - image.mean(0), e - e.mean(1, keepdim=True)
    U, s, _ = torch.linalg.svd(image, full_matrices=False)
    basis = U[:, s > 1e-12 * s[0]]  # (d, rank)
    left = e.T - basis @ (basis.T @ e.T)  # (d, n)
    left = left - basis @ (basis.T @ left)  # twice is enough: what the first left over by rounding
    return Independence(torch.linalg.svdvals(e), torch.linalg.svdvals(left))
