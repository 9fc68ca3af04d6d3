"""Do a model's tokens reach its first attention as the equations have it? One look, with noise for a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, position_values
from ..result import Condition, shown_if

_NAME = "tokens as the equations have them"
_LARGEST_MISS = 1e-2  # autocast leaves 0.004; dropout of one number in a hundred 0.1


class _Seen(Exception):
    """Ends the forward pass once the tokens are seen."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


def tokens_as_read(model: nn.Module, anatomy: Anatomy, weights: Mapping[str, Tensor]) -> Condition:
    """Whether what stands before the first attention is fed W_e x + b_e + E, patch by patch.

    It is not where tokens pass a dropout, or something that ``dissect`` does not know of. The
    forward pass ends there, so it costs the embedding of one picture.

    Parameters
    ----------
    model : nn.Module, in the client's mode
    anatomy : Anatomy
    weights : tensors of the model by name
    """
    owner = anatomy.embedding_norm_weight or anatomy.norm_weight or (anatomy.query.name if anatomy.query else "")
    kernel, tiling = weights[anatomy.patch_weight].flatten(1), anatomy.tiling
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(1, tiling.count, kernel.shape[1], generator=generator).to(kernel)
    picture = tiling.images(patches)
    try:
        seen = _tokens_before(model, owner.rpartition(".")[0], picture, anatomy)
    # The model is the user's, and so is whatever its forward pass raises.
    except Exception as error:
        seen, why = None, f"the model could not be run ({type(error).__name__})"
    else:
        why = "the module before the first attention was not reached"
    expected = patches[0].double() @ kernel.double().T + places_of(anatomy, weights)
    if seen is None or seen.shape[-1] != expected.shape[-1] or seen.numel() < expected.numel():
        return Condition(_NAME, "not checked", {}, f"not checked: {why}")
    tokens = seen.double().reshape(-1, seen.shape[-1])[-len(expected) :]
    miss = float((tokens - expected).norm() / expected.norm())
    words = "those of a picture of noise miss W_e x + b_e + E by {miss:.1e} before the first attention"
    if miss > _LARGEST_MISS and model.training:
        words += "; the model is in training mode: dropout on the tokens does that"
    return Condition(_NAME, shown_if(miss <= _LARGEST_MISS), {"miss": miss}, words)


def places_of(anatomy: Anatomy, weights: Mapping[str, Tensor]) -> Tensor:
    """b_e + E_i, one patch a row (n, d), float64."""
    places = position_values(anatomy, weights)[anatomy.position_prefix :]
    return places if anatomy.patch_bias is None else places + weights[anatomy.patch_bias].double()


def _tokens_before(model: nn.Module, name: str, picture: Tensor, anatomy: Anatomy) -> Tensor | None:
    """What the module ``name`` is given when the model reads a picture."""

    def look(_: nn.Module, given: tuple[Any, ...]) -> None:
        raise _Seen(given[0].detach())

    handle = model.get_submodule(name).register_forward_pre_hook(look)
    try:
        with torch.random.fork_rng(devices=[picture.device] if picture.is_cuda else []), torch.no_grad():
            model.get_submodule(anatomy.root)(picture)
    except _Seen as seen:
        return seen.tokens
    finally:
        handle.remove()
    return None
