"""timm's Vision Transformers: VisionTransformer (ViT, DeiT, DINOv2, CLIP, SigLIP), Eva, BEiT, CaiT.

Much research code (DINO, DINOv2, MAE) has the same names in classes of its own: what looks like them
is read like them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...preprocessing import HALF, Preprocessing
from ..record import Anatomy, Rows, UnknownModelError, tensors_of
from .parts import (
    PROJECTIONS,
    Exchanged,
    between,
    first_of,
    fused,
    head_of,
    norm_names,
    of_the_identity,
    pair,
    wrong_size,
)

#: Blocks whose attention reads norm1 of the tokens, and those whose attention reads the tokens and
#: whose norm1 stands behind it.
_PRENORM = ("Block", "LayerScaleBlock", "EvaBlock", "NestedTensorBlock")
_POSTNORM = ("ResPostBlock", "EvaBlockPostNorm")
#: In the order of the sequence, where a model has them.
_TOKENS = ("cls_token", "dist_token", "reg_token", "register_tokens")


def read_timm(model: nn.Module, image_size: tuple[int, int] | None) -> Anatomy:
    """A model with ``patch_embed.proj``, ``pos_embed`` and ``blocks``, and its prefix tokens."""
    m: Any = model
    names = tensors_of(model)
    _check_stem(m, names)
    patch = tuple(names["patch_embed.proj.weight"].shape[-2:])
    own = getattr(m.patch_embed, "img_size", None) or image_size
    if own is None:
        raise UnknownModelError("this model has no image size of its own: give dissect(model, image_size=…)")
    own = pair(own)
    # CaiT's class token comes after the blocks.
    prefix = () if type(m).__name__ == "Cait" else tuple(name for name in _TOKENS if name in names)
    position = first_of(names, "pos_embed")
    stored = (own[0] // patch[0], own[1] // patch[1])
    rows = 0 if position is None else names[position].shape[-2] - stored[0] * stored[1]
    config = getattr(m, "pretrained_cfg", None) or {}
    remark = ""
    if not any(base.__module__.startswith("timm.") for base in type(m).__mro__):
        remark = f"{type(m).__name__} is read like timm's VisionTransformer, for it has the same names"
    elif position is None and _has_relative(m, names):
        remark = "its positions are relative or rotary: it has no absolute position embedding"
    return Anatomy(
        family="timm",
        image_size=image_size or own,
        patch_weight="patch_embed.proj.weight",
        patch_bias=first_of(names, "patch_embed.proj.bias"),
        **head_of(model, "head"),
        position=position,
        position_prefix=rows,
        resizes=bool(getattr(m, "dynamic_img_size", False)) or hasattr(m, "interpolate_pos_encoding"),
        resampling=None if image_size in (None, own) else _resampling(m, names, stored, rows, image_size),
        prefix=prefix,
        **attention_of(names),
        **norms_of(m, names),
        heads=getattr(getattr(m.blocks[0], "attn", None), "num_heads", None),
        preprocessing=Preprocessing(tuple(config["mean"]), tuple(config["std"])) if "mean" in config else HALF,
        remark=remark,
    )


def _check_stem(m: Any, names: Mapping[str, Tensor]) -> None:
    """Refuse what does not embed the patches of the image by one convolution."""
    if any(name.startswith("patch_embed.backbone") for name in names):
        raise UnknownModelError("this timm model embeds the patches of a CNN's feature map, not those of the image")
    if "patch_embed.proj.weight" not in names or names["patch_embed.proj.weight"].ndim != 4:
        raise UnknownModelError("this timm model has no convolution patch_embed.proj (a hybrid or linear stem?)")
    if not isinstance(getattr(m.patch_embed, "norm", None), nn.Identity | None):
        raise UnknownModelError("this timm model normalizes the embedded patches before it adds their position")


def attention_of(names: Mapping[str, Tensor]) -> dict[str, Any]:
    """The first attention's projections: fused, fused with separate biases, or one by one."""
    attention, found = "blocks.0.attn", dict[str, Rows]()
    for tensor, suffix in (("weight", ""), ("bias", "_bias")):
        if (name := f"{attention}.qkv.{tensor}") in names:
            found |= fused(name, len(names[name]) // 3, suffix)
        for part in PROJECTIONS:
            one = first_of(names, f"{attention}.{part[0]}_proj.{tensor}", f"{attention}.{part[0]}_{tensor}")
            if one is not None:
                found[f"{part}{suffix}"] = Rows(one)
    return found


def norms_of(m: Any, names: Mapping[str, Tensor]) -> dict[str, Any]:
    """What stands between the tokens and the first attention."""
    first, kind = m.blocks[0], type(m.blocks[0]).__name__
    before = getattr(m, "norm_pre", None)
    found: dict[str, Any] = {"first_block": "unknown"}
    if kind in _POSTNORM and isinstance(before, nn.Identity | None) and hasattr(first, "attn"):
        return {"first_block": "postnorm"}
    if hasattr(first, "norm1"):
        found |= norm_names(names, "blocks.0.norm1")
        if kind in _PRENORM and hasattr(first, "attn"):
            found["first_block"] = between(before, first.norm1)
    if not isinstance(before, nn.Identity | None):
        found |= norm_names(names, "norm_pre", "embedding_norm")
    return found


def _has_relative(m: Any, names: Mapping[str, Tensor]) -> bool:
    return any("relative_position" in name for name in names) or getattr(m, "rope", None) is not None


def _resampling(
    m: Any, names: Mapping[str, Tensor], stored: tuple[int, int], rows: int, image_size: tuple[int, int]
) -> Tensor | None:
    """R: the library's own interpolation of the identity, with its float32."""
    patch = names["patch_embed.proj.weight"].shape[-2:]
    grid = (image_size[0] // patch[0], image_size[1] // patch[1])
    if grid == stored or "pos_embed" not in names:
        return None
    identity = of_the_identity(names["pos_embed"].shape[-2], names["pos_embed"])
    if hasattr(m, "interpolate_pos_encoding"):  # DINO, DINOv2: always
        tokens = identity.new_zeros(1, rows + grid[0] * grid[1], identity.shape[-1])
        with torch.no_grad():
            return type(m).interpolate_pos_encoding(Exchanged(m, pos_embed=identity), tokens, *image_size)[0].double()
    if not getattr(m, "dynamic_img_size", False):
        raise wrong_size("timm", pair(m.patch_embed.img_size), image_size, "dynamic_img_size=False")
    # Not imported above: timm is optional, and here it is certainly there.
    resample = importlib.import_module("timm.layers").resample_abs_pos_embed
    return resample(identity, new_size=list(grid), old_size=list(stored), num_prefix_tokens=rows)[0].double()


def looks_like_timm(module: nn.Module) -> bool:
    """Whether a module has the names of timm's VisionTransformer: ``patch_embed.proj``, a convolution with
    kernel = stride; ``pos_embed``, a row a token; ``blocks``, the first with ``norm1`` and ``attn.qkv``.
    """
    m: Any = module
    proj = getattr(getattr(m, "patch_embed", None), "proj", None)
    position, blocks = getattr(m, "pos_embed", None), getattr(m, "blocks", None)
    if not isinstance(proj, nn.Conv2d) or proj.kernel_size != proj.stride or max(proj.kernel_size) < 2:
        return False
    if (
        not isinstance(position, Tensor)
        or position.ndim != 3
        or not isinstance(blocks, nn.Sequential | nn.ModuleList)
    ):
        return False
    return len(blocks) > 0 and hasattr(blocks[0], "norm1") and hasattr(getattr(blocks[0], "attn", None), "qkv")
