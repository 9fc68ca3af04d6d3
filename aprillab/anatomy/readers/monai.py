"""MONAI's Vision Transformer, for pictures (``spatial_dims=2``)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..record import Anatomy, UnknownModelError, tensors_of
from .parts import between, first_of, fused, head_of, norm_names


def read_monai(model: nn.Module, image_size: tuple[int, int] | None) -> Anatomy:
    """monai.networks.nets.ViT; it keeps no image size, so a square is taken where none is named."""
    m: Any = model
    names, stem, attention = tensors_of(model), "patch_embedding.patch_embeddings", "blocks.0.attn.qkv"
    layer = m.patch_embedding.patch_embeddings
    linear = isinstance(layer, nn.Sequential)  # proj_type="perceptron": Rearrange, Linear
    weight = names[f"{stem}.1.weight" if linear else f"{stem}.weight"]
    if not linear and weight.ndim != 4:
        raise UnknownModelError("this MONAI ViT reads volumes (spatial_dims=3); the attacks read pictures")
    sizes = dict(getattr(layer[0], "axes_lengths", {})) if linear else {}
    if linear and sizes.keys() != {"p1", "p2"}:
        raise UnknownModelError(
            "this MONAI ViT flattens patches of other than two dimensions: name its parts yourself"
        )
    patch = (sizes["p1"], sizes["p2"]) if linear else (weight.shape[2], weight.shape[3])
    patches = m.patch_embedding.position_embeddings.shape[-2]
    side = math.isqrt(patches)
    if image_size is None and side * side != patches:
        raise UnknownModelError(f"this MONAI ViT has {patches} patches, no square: give dissect(model, image_size=…)")
    name = f"{stem}.1" if linear else stem
    rows = {}
    for tensor, suffix in (("weight", ""), ("bias", "_bias")):
        if (both := f"{attention}.{tensor}") in names:
            rows |= fused(both, len(names[both]) // 3, suffix)
    return Anatomy(
        family="monai",
        image_size=image_size or (side * patch[0], side * patch[1]),
        patch_weight=f"{name}.weight",
        patch_bias=first_of(names, f"{name}.bias"),
        patch_size=patch,
        pixel_order="h w c" if linear else "c h w",
        **head_of(model, "classification_head"),
        position="patch_embedding.position_embeddings",
        prefix=tuple(token for token in ("cls_token",) if token in names),
        **rows,
        **norm_names(names, "blocks.0.norm1"),
        first_block=between(None, m.blocks[0].norm1),
        heads=m.blocks[0].attn.num_heads,
    )
