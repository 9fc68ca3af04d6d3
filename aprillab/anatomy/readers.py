"""One reader a library: what it calls the parts of its Vision Transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .. import models
from ..preprocessing import HALF, IMAGENET, Preprocessing
from .record import Anatomy, Rows, UnknownModelError, tensors_of

_PROJECTIONS = ("query", "key", "value")


def _fused(name: str, width: int, suffix: str = "") -> dict[str, Rows]:
    """Queries, keys and values stacked in this order in one tensor of 3·width rows.

    >>> _fused("attn.qkv.weight", 192)["key"]
    Rows(name='attn.qkv.weight', start=192, stop=384)
    """
    return {f"{part}{suffix}": Rows(name, i * width, (i + 1) * width) for i, part in enumerate(_PROJECTIONS)}


def _read_aprillab(model: nn.Module) -> Anatomy:
    """aprillab.models.VisionTransformer."""
    assert isinstance(model, models.VisionTransformer)
    names, attention, bias = tensors_of(model), "blocks.0.attention", model.patch_embedding.bias is not None
    parts = {part: Rows(f"{attention}.{part}.weight") for part in _PROJECTIONS}
    biases = {f"{part}_bias": Rows(f"{attention}.{part}.bias") for part in _PROJECTIONS if bias}
    prenorm = model.block == "prenorm"
    return Anatomy(
        family="aprillab",
        image_size=(model.image_size, model.image_size),
        patch_weight="patch_embedding.weight",
        patch_bias="patch_embedding.bias" if bias else None,
        head_weight="head.weight" if "head.weight" in names else None,
        head_bias="head.bias" if "head.bias" in names else None,
        position=None if model.position_embedding is None else "position_embedding",
        position_prefix=0 if model.class_token is None else 1,
        prefix=() if model.class_token is None else ("class_token",),
        norm_weight="blocks.0.attention_norm.weight" if prenorm else None,
        norm_bias="blocks.0.attention_norm.bias" if prenorm else None,
        first_block=model.block,
        heads=model.heads,
        preprocessing=HALF,
        **parts,
        **biases,
    )


def _read_torchvision(model: nn.Module) -> Anatomy:
    """torchvision.models.VisionTransformer; a convolutional stem is not a patch embedding."""
    m: Any = model
    if not isinstance(m.conv_proj, nn.Conv2d):
        raise UnknownModelError(
            "this torchvision VisionTransformer has a convolutional stem (conv_stem_configs); the attacks need a "
            "patch embedding: one convolution with kernel = stride"
        )
    names = tensors_of(model)
    # Fine-tuners often put one Linear in the place of `heads`.
    head = next((h for h in ("heads.head", "heads") if f"{h}.weight" in names), None)
    block, width = "encoder.layers.encoder_layer_0", m.hidden_dim
    return Anatomy(
        family="torchvision",
        image_size=(m.image_size, m.image_size),
        patch_weight="conv_proj.weight",
        patch_bias="conv_proj.bias" if "conv_proj.bias" in names else None,
        head_weight=None if head is None else f"{head}.weight",
        head_bias=f"{head}.bias" if f"{head}.bias" in names else None,
        position="encoder.pos_embedding",
        position_prefix=1,
        prefix=("class_token",),
        **_fused(f"{block}.self_attention.in_proj_weight", width),
        **_fused(f"{block}.self_attention.in_proj_bias", width, "_bias"),
        norm_weight=f"{block}.ln_1.weight",
        norm_bias=f"{block}.ln_1.bias",
        first_block="prenorm",
        heads=m.encoder.layers[0].num_heads,
        preprocessing=IMAGENET,
    )


def _read_timm(model: nn.Module) -> Anatomy:
    """timm's VisionTransformer and VisionTransformerDistilled, with whatever prefix tokens they
    have.
    """
    m: Any = model
    names = tensors_of(model)
    _check_timm(m, names)
    has: Callable[[str], str | None] = lambda name: name if name in names else None  # noqa: E731
    # Order of the tokens in timm's sequences: class token, then distillation token or registers.
    prefix = tuple(name for name in ("cls_token", "dist_token", "reg_token") if name in names)
    position = has("pos_embed")
    size, patch = m.patch_embed.img_size, names["patch_embed.proj.weight"].shape[-1]
    only_patches = position is not None and names[position].shape[-2] == (size[0] // patch) * (size[1] // patch)
    projections: dict[str, Rows] = {}
    for tensor, suffix in (("weight", ""), ("bias", "_bias")):
        if (fused := f"blocks.0.attn.qkv.{tensor}") in names:
            projections |= _fused(fused, len(names[fused]) // 3, suffix)
    config = getattr(m, "pretrained_cfg", None) or {}
    return Anatomy(
        family="timm",
        image_size=tuple(size),
        patch_weight="patch_embed.proj.weight",
        patch_bias=has("patch_embed.proj.bias"),
        head_weight=has("head.weight"),
        head_bias=has("head.bias"),
        position=position,
        position_prefix=0 if only_patches else sum(names[name].shape[1] for name in prefix),
        prefix=prefix,
        **projections,
        norm_weight=has("blocks.0.norm1.weight"),
        norm_bias=has("blocks.0.norm1.bias"),
        first_block="prenorm" if "query" in projections and _plain_timm(m) else "unknown",
        heads=getattr(getattr(m.blocks[0], "attn", None), "num_heads", None),
        preprocessing=Preprocessing(tuple(config["mean"]), tuple(config["std"])) if "mean" in config else HALF,
    )


def _check_timm(m: Any, names: Mapping[str, Tensor]) -> None:
    """Refuse what does not embed the patches of the image by one convolution."""
    if "patch_embed.proj.weight" not in names or names["patch_embed.proj.weight"].ndim != 4:
        raise UnknownModelError("this timm model has no convolution patch_embed.proj (a hybrid or linear stem?)")
    if any(name.startswith("patch_embed.backbone") for name in names):
        raise UnknownModelError("this timm model embeds the patches of a CNN's feature map, not those of the image")
    if not isinstance(getattr(m.patch_embed, "norm", None), nn.Identity | None):
        raise UnknownModelError("this timm model normalizes the embedded patches before it adds their position")


def _plain_timm(m: Any) -> bool:
    """Whether one LayerNorm, and nothing else, stands between the tokens and the first attention.

    timm's ResPostBlock has a norm1 too, but behind the attention; parallel blocks have no ``attn``.
    """
    first = m.blocks[0]
    plain = type(first).__name__ == "Block" and isinstance(first.norm1, nn.LayerNorm)
    return plain and first.norm1.weight is not None and isinstance(m.norm_pre, nn.Identity)


def _read_transformers(model: nn.Module) -> Anatomy:
    """ViTForImageClassification; the attention's names changed between versions 4 and 5 of the
    library.
    """
    m: Any = model
    names = tensors_of(model)
    new = "vit.layers.0.attention.q_proj.weight" in names
    block = "vit.layers.0" if new else "vit.encoder.layer.0"
    attention = f"{block}.attention" if new else f"{block}.attention.attention"
    parts = dict(zip(_PROJECTIONS, ("q_proj", "k_proj", "v_proj") if new else _PROJECTIONS, strict=True))
    biased = [part for part, name in parts.items() if f"{attention}.{name}.bias" in names]
    size = m.config.image_size
    return Anatomy(
        family="transformers",
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        patch_weight="vit.embeddings.patch_embeddings.projection.weight",
        patch_bias="vit.embeddings.patch_embeddings.projection.bias",
        head_weight="classifier.weight" if "classifier.weight" in names else None,
        head_bias="classifier.bias" if "classifier.bias" in names else None,
        position="vit.embeddings.position_embeddings",
        position_prefix=1,
        prefix=("vit.embeddings.cls_token",),
        **{part: Rows(f"{attention}.{name}.weight") for part, name in parts.items()},
        **{f"{part}_bias": Rows(f"{attention}.{parts[part]}.bias") for part in biased},
        norm_weight=f"{block}.layernorm_before.weight",
        norm_bias=f"{block}.layernorm_before.bias",
        first_block="prenorm",
        heads=m.config.num_attention_heads,
        preprocessing=HALF,
    )


#: By the full name of the model's class, or of one it is derived from.
READERS: dict[str, Callable[[nn.Module], Anatomy]] = {
    "aprillab.models.VisionTransformer": _read_aprillab,
    "torchvision.models.vision_transformer.VisionTransformer": _read_torchvision,
    "timm.models.vision_transformer.VisionTransformer": _read_timm,
    "transformers.models.vit.modeling_vit.ViTForImageClassification": _read_transformers,
}
