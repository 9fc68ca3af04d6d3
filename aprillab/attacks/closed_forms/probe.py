"""Do a model's tokens reach its first attention, and LoRA's factors, as the equations have it? One
look, with noise for a picture.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, position_values
from ...update import logits_of
from ..result import Condition, shown_if

_NAME = "tokens as the equations have them"
_LARGEST_MISS = 1e-2  # autocast leaves 0.004; dropout of one number in a hundred 0.1


class _Seen(Exception):
    """Ends the forward pass once the tokens are seen."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


def tokens_as_read(
    model: nn.Module, anatomy: Anatomy, weights: Mapping[str, Tensor], *, public: bool = False
) -> Condition:
    """Whether what stands before the first attention is fed W_e x + b_e + E, patch by patch.

    It is not where tokens pass a dropout, or something that ``dissect`` does not know of. The
    forward pass ends there, so it costs the embedding of one picture.

    Parameters
    ----------
    model : nn.Module, in the client's mode
    anatomy : Anatomy
    weights : tensors of the model by name
    public : bool
        Whether the tokens before the patches are looked at, too.
    """
    owner = anatomy.embedding_norm_weight or anatomy.norm_weight or (anatomy.query.name if anatomy.query else "")
    kernel, patches = weights[anatomy.patch_weight].flatten(1), _noise_patches(anatomy, weights)
    picture = anatomy.tiling.images(patches[None])
    try:
        seen = _tokens_before(model, owner.rpartition(".")[0], picture, anatomy)
    # The model is the user's, and so is whatever its forward pass raises.
    except Exception as error:
        seen, why = None, f"the model could not be run ({type(error).__name__})"
    else:
        why = "the module before the first attention was not reached"
    wide = torch.promote_types(kernel.dtype, torch.float32)
    expected = (patches.to(wide) @ kernel.to(wide).T).double() + places_of(anatomy, weights)
    if public:
        expected = torch.cat([public_tokens(anatomy, weights).to(expected), expected])
    if seen is None or seen.shape[-1] != expected.shape[-1] or seen.numel() < expected.numel():
        return Condition(_NAME, "not checked", {}, why, measured=False)
    tokens = seen.double().reshape(-1, seen.shape[-1])[-len(expected) :]
    miss = float((tokens - expected).norm() / expected.norm())
    words = "those of a picture of noise miss W_e x + b_e + E by {miss:.1e} before the first attention"
    if miss > _LARGEST_MISS and model.training:
        words += "; the model is in training mode: dropout on the tokens does that"
    return Condition(_NAME, shown_if(miss <= _LARGEST_MISS), {"miss": miss}, words)


def adapters_as_read(model: nn.Module, anatomy: Anatomy, weights: Mapping[str, Tensor]) -> Condition:
    """Whether LoRA's factors A read what the first attention reads: they do not behind a
    dropout of their own.

    Parameters
    ----------
    as :func:`tokens_as_read`; ``anatomy.adapters`` are looked at.
    """
    name = "adapters read the attention's input"
    picture = anatomy.tiling.images(_noise_patches(anatomy, weights)[None])
    owners = [factor.removesuffix(".weight") for factor in anatomy.adapters]
    norm = (anatomy.norm_weight or "").rpartition(".")[0]
    try:
        seen = _passed(model, anatomy, picture, owners, norm)
    # The model is the user's, and so is whatever its forward pass raises.
    except Exception as error:
        words = f"the model could not be run ({type(error).__name__})"
        return Condition(name, "not checked", {}, words, measured=False)
    u = seen.pop(norm, None)
    given = list(seen.values())
    if u is None and given:
        u = given.pop(0)
    if u is None:
        words = "neither the factors nor a norm before the attention are modules that are run"
        return Condition(name, "not checked", {}, words, measured=False)
    if given:
        miss = max(float((x - u).norm() / u.norm()) if x.shape == u.shape else math.inf for x in given)
        words = "what they are given misses it by {miss:.1e}"
    else:  # as in peft's nn.MultiheadAttention, which puts them into one weight
        miss = _outside(model, anatomy, picture, u.flatten(0, -2))
        words = "of a picture of noise their gradients lie outside its span by {miss:.1e}"
    if miss > _LARGEST_MISS and model.training:
        words += "; the model is in training mode: LoRA's dropout does that, and puts the rows outside the span"
    return Condition(name, shown_if(miss <= _LARGEST_MISS), {"miss": miss}, words)


def _outside(model: nn.Module, anatomy: Anatomy, picture: Tensor, u: Tensor) -> float:
    """How much of the adapters' gradients lies outside the span of the tokens u (n + 1, d); 1
    where they are zero.
    """
    factors = [p for name, p in model.named_parameters() if name in anatomy.adapters and p.requires_grad]
    with torch.enable_grad(), torch.random.fork_rng(devices=[picture.device] if picture.is_cuda else []):
        value = logits_of(model.get_submodule(anatomy.root), picture).square().sum()
        found = torch.autograd.grad(value, factors, allow_unused=True) if factors else ()
    rows = [g.double() for g in found if g is not None and g.any()]
    if not rows:
        return 1.0
    D, Q = torch.cat([g / g.norm() for g in rows]), torch.linalg.qr(u.T).Q
    return float((D - D @ Q @ Q.T).norm() / D.norm())


def _passed(
    model: nn.Module, anatomy: Anatomy, picture: Tensor, owners: Collection[str], norm: str
) -> dict[str, Tensor]:
    """What the modules ``owners`` are given, and what the norm gives, by their paths."""
    modules = dict(model.named_modules())
    seen: dict[str, Tensor] = {}
    handles = []
    for path in owners:
        if path in modules:
            look = partial(_note_given, seen, path)
            handles.append(modules[path].register_forward_pre_hook(look))
    if norm:
        handles.append(modules[norm].register_forward_hook(partial(_note_out, seen, norm)))
    try:
        with torch.random.fork_rng(devices=[picture.device] if picture.is_cuda else []), torch.no_grad():
            model.get_submodule(anatomy.root)(picture)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _note_given(seen: dict[str, Tensor], path: str, _: nn.Module, given: tuple[Any, ...]) -> None:
    seen[path] = given[0].detach().double()


def _note_out(seen: dict[str, Tensor], path: str, _: nn.Module, given: tuple[Any, ...], out: Any) -> None:
    seen[path] = out.detach().double()


def _noise_patches(anatomy: Anatomy, weights: Mapping[str, Tensor]) -> Tensor:
    """Patches (n, p) of a picture of noise, always the same."""
    kernel = weights[anatomy.patch_weight].flatten(1)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(anatomy.tiling.count, kernel.shape[1], generator=generator).to(kernel)


def places_of(anatomy: Anatomy, weights: Mapping[str, Tensor]) -> Tensor:
    """b_e + E_i, one patch a row (n, d), float64."""
    places = position_values(anatomy, weights)[anatomy.position_prefix :]
    return places if anatomy.patch_bias is None else places + weights[anatomy.patch_bias].double()


def public_tokens(anatomy: Anatomy, weights: Mapping[str, Tensor]) -> Tensor:
    """The tokens before the patches, class token and registers, with what is added to them, (k, d),
    float64: the server knows them before it has seen any update.
    """
    width = weights[anatomy.patch_weight].shape[0]
    found = [weights[token].double().reshape(-1, width) for token in anatomy.prefix]
    tokens = torch.cat(found) if found else torch.zeros(0, width, dtype=torch.float64)
    places = torch.zeros_like(tokens)
    if anatomy.position is not None and anatomy.position_prefix:
        rows = position_values(anatomy, weights)[: anatomy.position_prefix]
        places = places[: len(tokens)].to(rows)
        places[: min(len(rows), len(tokens))] += rows[: len(tokens)]
    return tokens.to(places) + places


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
