"""timm's NaFlexVit, whose patch embedding is a linear layer of flattened patches, or a convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...preprocessing import HALF, Preprocessing
from ..record import Anatomy, UnknownModelError, tensors_of
from .parts import Exchanged, first_of, head_of, pair
from .timm import attention_of, norms_of


def read_naflex(model: nn.Module, image_size: tuple[int, int] | None) -> Anatomy:
    """NaFlexVit takes pictures of any size; one that fills the embedding's grid is taken for its own."""
    m: Any = model
    embeds, names = m.embeds, tensors_of(model)
    if embeds.norm_input is not None:
        raise UnknownModelError(
            "this NaFlexVit normalizes the flattened patches before it embeds them: the linear systems would give "
            "normalized patches, with their mean and contrast lost"
        )
    if not isinstance(embeds.norm, nn.Identity):
        raise UnknownModelError("this NaFlexVit normalizes the embedded patches before it adds their position")
    patch, position = pair(embeds.patch_size), first_of(names, "embeds.pos_embed")
    grid = tuple(embeds.pos_embed_grid_size or ())
    size = image_size or (grid[0] * patch[0], grid[1] * patch[1]) if grid or image_size else None
    if size is None:
        raise UnknownModelError("this NaFlexVit has no image size of its own: give dissect(model, image_size=…)")
    wanted = (size[0] // patch[0], size[1] // patch[1])
    config = getattr(m, "pretrained_cfg", None) or {}
    return Anatomy(
        family="timm",
        image_size=size,
        patch_weight="embeds.proj.weight",
        patch_bias=first_of(names, "embeds.proj.bias"),
        patch_size=patch,
        pixel_order="h w c" if embeds.is_linear and getattr(embeds, "channels_last", True) else "c h w",
        **head_of(model, "head"),
        position=position,
        resizes=position is not None,
        resampling=None if position is None or wanted == grid else _resampling(embeds, wanted),
        prefix=tuple(name for name in ("embeds.cls_token", "embeds.reg_token") if name in names),
        **attention_of(names),
        **norms_of(m, names),
        heads=getattr(getattr(m.blocks[0], "attn", None), "num_heads", None),
        preprocessing=Preprocessing(tuple(config["mean"]), tuple(config["std"])) if "mean" in config else HALF,
        remark=""
        if position
        else "its positions are factorized or rotary: it has no table with a row for each patch",
    )


def _resampling(embeds: Any, grid: tuple[int, int]) -> Tensor:
    """R: timm's own interpolation of the identity."""
    stored = embeds.pos_embed.detach()
    count = stored.shape[1] * stored.shape[2]
    identity = torch.eye(count).to(stored).reshape(1, *stored.shape[1:3], count)
    tokens = torch.zeros(1, grid[0] * grid[1], count).to(stored)
    with torch.no_grad():
        type(embeds)._apply_learned_pos_embed(Exchanged(embeds, pos_embed=identity), tokens, list(grid))
    return tokens[0].double()
