"""This package's Vision Transformer, and torchvision's."""

from __future__ import annotations

from typing import Any

from torch import nn

from ... import models
from ...preprocessing import HALF, IMAGENET
from ..record import Anatomy, Rows, UnknownModelError, tensors_of
from .parts import PROJECTIONS, first_of, fused, head_of, norm_names, wrong_size


def read_aprillab(model: nn.Module, image_size: tuple[int, int] | None) -> Anatomy:
    """aprillab.models.VisionTransformer."""
    assert isinstance(model, models.VisionTransformer)
    size = (model.image_size, model.image_size)
    if image_size not in (None, size):
        raise wrong_size("aprillab", size, image_size, "it does not interpolate its position embedding")
    attention, bias = "blocks.0.attention", model.patch_embedding.bias is not None
    parts: dict[str, Any] = {part: Rows(f"{attention}.{part}.weight") for part in PROJECTIONS}
    biases: dict[str, Any] = {f"{part}_bias": Rows(f"{attention}.{part}.bias") for part in PROJECTIONS if bias}
    return Anatomy(
        family="aprillab",
        image_size=size,
        patch_weight="patch_embedding.weight",
        patch_bias="patch_embedding.bias" if bias else None,
        position=None if model.position_embedding is None else "position_embedding",
        position_prefix=0 if model.class_token is None else 1,
        prefix=() if model.class_token is None else ("class_token",),
        **head_of(model, "head"),
        **(norm_names(tensors_of(model), "blocks.0.attention_norm") if model.block == "prenorm" else {}),
        first_block=model.block,
        heads=model.heads,
        preprocessing=HALF,
        **parts,
        **biases,
    )


def read_torchvision(model: nn.Module, image_size: tuple[int, int] | None) -> Anatomy:
    """torchvision.models.VisionTransformer; a convolutional stem is not a patch embedding."""
    m: Any = model
    if not isinstance(m.conv_proj, nn.Conv2d):
        raise UnknownModelError(
            "this torchvision VisionTransformer has a convolutional stem (conv_stem_configs); the attacks need a "
            "patch embedding: one convolution with kernel = stride"
        )
    size = (m.image_size, m.image_size)
    if image_size not in (None, size):
        raise wrong_size("torchvision", size, image_size, "torchvision interpolates positions in checkpoints alone")
    names = tensors_of(model)
    block, width = "encoder.layers.encoder_layer_0", m.hidden_dim
    return Anatomy(
        family="torchvision",
        image_size=size,
        patch_weight="conv_proj.weight",
        patch_bias=first_of(names, "conv_proj.bias"),
        **head_of(model, "heads"),  # fine-tuners often put one Linear in their place
        position="encoder.pos_embedding",
        position_prefix=1,
        prefix=("class_token",),
        **fused(f"{block}.self_attention.in_proj_weight", width),
        **fused(f"{block}.self_attention.in_proj_bias", width, "_bias"),
        **norm_names(names, f"{block}.ln_1"),
        first_block="prenorm",
        heads=m.encoder.layers[0].num_heads,
        preprocessing=IMAGENET,
    )
