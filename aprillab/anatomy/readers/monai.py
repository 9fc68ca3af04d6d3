"""MONAI's Vision Transformer, for pictures (``spatial_dims=2``)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..record import Anatomy, UnknownModelError, tensors_of
from .parts import between, fused, head_of, norm_names


def read_monai(model: nn.Module, image_size: tuple[int, int] | None) -> Anatomy:
    """monai.networks.nets.ViT; it keeps no image size, so a square is taken where none is named."""
    m: Any = model
    names, stem = tensors_of(model), _stem(model)
    height, width = stem["patch_size"]
    patches = int(m.patch_embedding.position_embeddings.shape[-2])
    side = math.isqrt(patches)
    if image_size is None and side * side != patches:
        raise UnknownModelError(f"this MONAI ViT has {patches} patches, no square: give dissect(model, image_size=…)")
    rows: dict[str, Any] = {}
    for tensor, suffix in (("weight", ""), ("bias", "_bias")):
        if (both := f"blocks.0.attn.qkv.{tensor}") in names:
            rows |= fused(both, len(names[both]) // 3, suffix)
    return Anatomy(
        family="monai",
        image_size=image_size or (side * height, side * width),
        **stem,
        **head_of(model, "classification_head"),
        position="patch_embedding.position_embeddings",
        prefix=tuple(token for token in ("cls_token",) if token in names),
        **rows,
        **norm_names(names, "blocks.0.norm1"),
        first_block=between(None, m.blocks[0].norm1),
        heads=m.blocks[0].attn.num_heads,
    )


def _stem(model: Any) -> dict[str, Any]:
    """The patch embedding: a convolution, or Rearrange and a linear layer (proj_type="perceptron")."""
    path, layer = "patch_embedding.patch_embeddings", model.patch_embedding.patch_embeddings
    if not isinstance(layer, nn.Sequential):
        if layer.weight.ndim != 4:
            raise UnknownModelError("this MONAI ViT reads volumes (spatial_dims=3); the attacks read pictures")
        size = tuple(layer.weight.shape[2:])
        return {"patch_weight": f"{path}.weight", "patch_bias": f"{path}.bias", "patch_size": size}
    sizes = dict(getattr(layer[0], "axes_lengths", {}))
    if sizes.keys() != {"p1", "p2"}:
        raise UnknownModelError(
            "this MONAI ViT flattens patches of other than two dimensions: name its parts yourself"
        )
    return {
        "patch_weight": f"{path}.1.weight",
        "patch_bias": f"{path}.1.bias",
        "patch_size": (sizes["p1"], sizes["p2"]),
        "pixel_order": "h w c",
    }
