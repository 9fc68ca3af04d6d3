"""What the readers share: parts by the first name that a model has, and what a norm is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..record import Rows

PROJECTIONS = ("query", "key", "value")


def fused(name: str, width: int, suffix: str = "") -> dict[str, Any]:
    """Queries, keys and values stacked in this order in one tensor of 3·width rows.

    >>> fused("attn.qkv.weight", 192)["key"]
    Rows(name='attn.qkv.weight', start=192, stop=384)
    """
    return {f"{part}{suffix}": Rows(name, i * width, (i + 1) * width) for i, part in enumerate(PROJECTIONS)}


def first_of(names: Collection[str], *wanted: str) -> str | None:
    """The first of the wanted names that is there.

    >>> first_of({"b", "c"}, "a", "b", "c")
    'b'
    """
    return next((name for name in wanted if name in names), None)


def pair(size: Any) -> tuple[int, int]:
    """Height and width, of a number or two.

    >>> pair(8), pair([8, 12])
    ((8, 8), (8, 12))
    """
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def head_of(model: nn.Module, *paths: str) -> dict[str, Any]:
    """Names of the last linear layer in the first of the modules ``paths`` that the model has.

    >>> head_of(nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))}), "head")
    {'head_weight': 'head.2.weight', 'head_bias': 'head.2.bias'}
    """
    modules = dict(model.named_modules())
    path = first_of(modules, *paths)
    return {} if path is None else last_linear(modules[path], path)


def last_linear(module: nn.Module, path: str) -> dict[str, Any]:
    """Names of the last linear layer of a module that stands at ``path``; empty where it has none."""
    linear = [(name, m) for name, m in module.named_modules(prefix=path) if isinstance(m, nn.Linear)]
    if not linear:
        return {}
    name, layer = linear[-1]
    dot = f"{name}." if name else ""
    return {"head_weight": f"{dot}weight", "head_bias": None if layer.bias is None else f"{dot}bias"}


def norm_names(names: Mapping[str, Tensor], path: str, field: str = "norm") -> dict[str, Any]:
    """Weight and bias of a norm at ``path``, under the fields of the anatomy."""
    return {f"{field}_{part}": first_of(names, f"{path}.{part}") for part in ("weight", "bias")}


def between(before_blocks: nn.Module | None, before_attention: nn.Module) -> str:
    """``first_block`` of a pre-norm block, from the norms in front of it.

    >>> between(None, nn.LayerNorm(4)), between(nn.LayerNorm(4), nn.LayerNorm(4)), between(None, nn.BatchNorm1d(4))
    ('prenorm', 'two norms', 'unknown')
    """
    none = before_blocks is None or isinstance(before_blocks, nn.Identity)
    if isinstance(before_attention, nn.LayerNorm):
        return "prenorm" if none else "two norms" if isinstance(before_blocks, nn.LayerNorm) else "unknown"
    # nn.RMSNorm, timm's RmsNorm, transformers' …RMSNorm: none is derived from another.
    rms = type(before_attention).__name__.lower().startswith("rms") and hasattr(before_attention, "weight")
    return "rmsnorm" if rms and none else "unknown"


def of_the_identity(rows: int, like: Tensor) -> Tensor:
    """An identity of ``rows`` in the dtype of the embedding, whose interpolation is R."""
    return torch.eye(rows, dtype=like.dtype, device=like.device)[None]


class Exchanged:
    """A module with some of its attributes exchanged, for a method of its class that reads them.

    >>> Exchanged(nn.Linear(2, 3), in_features=7).in_features, Exchanged(nn.Linear(2, 3)).in_features
    (7, 2)
    """

    def __init__(self, module: nn.Module, **attributes: Any) -> None:
        self._module = module
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def wrong_size(family: str, takes: tuple[int, int], asked: tuple[int, int], why: str) -> ValueError:
    """The refusal of a picture size that the model cannot take."""
    return ValueError(
        f"image_size={asked[0]}×{asked[1]}: this {family} model takes pictures of {takes[0]}×{takes[1]} only ({why})"
    )
