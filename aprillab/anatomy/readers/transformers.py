"""transformers' Vision Transformers, with or without their classifier: ViT, DeiT, Dinov2, ViTMSN, BEiT,
CLIP and SigLIP. The names of their layers changed between versions 4 and 5 of the library.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...preprocessing import HALF, IMAGENET, Preprocessing
from ..record import Anatomy, Rows, UnknownModelError, tensors_of
from .parts import PROJECTIONS, between, first_of, head_of, norm_names, of_the_identity, pair, wrong_size

CLIP = Preprocessing((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

#: By the beginning of the class's name.
_PREPROCESSING = {"DeiT": IMAGENET, "Dinov2": IMAGENET, "ViTMSN": IMAGENET, "CLIP": CLIP}
_LAYERS = ("layers.0", "encoder.layer.0", "encoder.layers.0")
_NORMS = ("layernorm_before", "norm1", "layer_norm1")
_ATTENTIONS = (
    ("attention", ("q_proj", "k_proj", "v_proj")),
    ("attention.attention", PROJECTIONS),
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
)


def read_transformers(model: nn.Module, image_size: tuple[int, int] | None) -> Anatomy:
    """A classifier or its backbone; the backbone is the module that holds the embeddings."""
    m: Any = model
    names, modules = tensors_of(model), dict(model.named_modules())
    inside = min((path for path, module in modules.items() if hasattr(module, "embeddings")), key=len, default="")
    at = f"{inside}." if inside else ""
    layer = next((f"{at}{path}" for path in _LAYERS if f"{at}{path}" in modules), None)
    if layer is None:
        raise UnknownModelError(f"this {type(m).__name__} has none of the layers {', '.join(_LAYERS)}")
    embeddings = f"{at}embeddings"
    patches = first_of(modules, f"{embeddings}.patch_embeddings.projection", f"{embeddings}.patch_embedding") or ""
    tokens = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    position = first_of(names, f"{embeddings}.position_embeddings", f"{embeddings}.position_embedding.weight")
    norm = first_of(modules, *(f"{layer}.{name}" for name in _NORMS)) or ""
    before = f"{at}pre_layrnorm"  # CLIP's, spelled so
    config = modules[inside].config
    config = getattr(config, "vision_config", config)
    size, patch = pair(config.image_size), pair(config.patch_size)
    count = (size[0] // patch[0]) * (size[1] // patch[1])
    return Anatomy(
        family="transformers",
        image_size=image_size or size,
        patch_weight=f"{patches}.weight",
        patch_bias=first_of(names, f"{patches}.bias"),
        **head_of(model, "classifier", "cls_classifier"),
        position=position,
        position_prefix=0 if position is None else names[position].numel() // names[position].shape[-1] - count,
        resizes=hasattr(modules[embeddings], "interpolate_pos_encoding"),
        resampling=None
        if image_size in (None, size)
        else _resampling(modules[embeddings], position, names, image_size),
        prefix=tuple(f"{embeddings}.{name}" for name in tokens if f"{embeddings}.{name}" in names),
        **_attention(names, layer),
        **norm_names(names, norm),
        **(norm_names(names, before, "embedding_norm") if before in modules else {}),
        first_block=between(modules.get(before), modules[norm]),
        heads=config.num_attention_heads,
        preprocessing=next((p for name, p in _PREPROCESSING.items() if type(m).__name__.startswith(name)), HALF),
        remark="" if position else "its positions are relative: it has no absolute position embedding",
    )


def _attention(names: dict[str, Tensor], layer: str) -> dict[str, Rows]:
    """The first attention's projections, under the names of this version of the library."""
    found = {}
    for attention, parts in _ATTENTIONS:
        for field, name in zip(PROJECTIONS, parts, strict=True):
            for tensor, suffix in (("weight", ""), ("bias", "_bias")):
                if (full := f"{layer}.{attention}.{name}.{tensor}") in names:
                    found[f"{field}{suffix}"] = Rows(full)
    return found


class _WithIdentity:
    """The embeddings of a model, the position embedding exchanged for the identity."""

    def __init__(self, embeddings: nn.Module, identity: Tensor):
        self._embeddings = embeddings
        self.position_embeddings = identity  # (1, rows, rows)
        self.position_embedding = SimpleNamespace(weight=identity[0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embeddings, name)


def _resampling(
    embeddings: Any, position: str | None, names: dict[str, Tensor], image_size: tuple[int, int]
) -> Tensor | None:
    """R: the library's own interpolation of the identity, whatever its version does."""
    if position is None:
        return None
    stored, patch = names[position], pair(embeddings.patch_size)
    rows = stored.numel() // stored.shape[-1]
    kernel = type(embeddings)
    if not hasattr(kernel, "interpolate_pos_encoding"):
        size = pair(embeddings.image_size)
        raise wrong_size("transformers", size, image_size, f"{kernel.__name__} does not interpolate")
    identity = of_the_identity(rows, stored)
    prefix = rows - embeddings_count(embeddings)
    tokens = identity.new_zeros(1, prefix + (image_size[0] // patch[0]) * (image_size[1] // patch[1]), rows)
    with torch.no_grad():
        found = kernel.interpolate_pos_encoding(_WithIdentity(embeddings, identity), tokens, *image_size)
    return found[0].double()


def embeddings_count(embeddings: Any) -> int:
    """Patches of the size the model was made for."""
    inner = getattr(embeddings, "patch_embeddings", embeddings)
    return int(inner.num_patches)
