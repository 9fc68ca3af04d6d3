"""transformers' Vision Transformers, with or without their classifier: ViT, DeiT, Dinov2, ViTMSN, BEiT,
CLIP and SigLIP. The names of their layers changed between versions 4 and 5 of the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...preprocessing import HALF, IMAGENET, Preprocessing
from ..record import Anatomy, Rows, UnknownModelError, tensors_of
from .parts import PROJECTIONS, Exchanged, between, first_of, head_of, norm_names, of_the_identity, pair, wrong_size

CLIP = Preprocessing((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

#: By the beginning of the class's name.
_PREPROCESSING = {"DeiT": IMAGENET, "Dinov2": IMAGENET, "ViTMSN": IMAGENET, "CLIP": CLIP}
_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
_LAYERS = ("layers.0", "encoder.layer.0", "encoder.layers.0")
_NORMS = ("layernorm_before", "norm1", "layer_norm1")
_ATTENTIONS = (
    ("attention", ("q_proj", "k_proj", "v_proj")),
    ("attention.attention", PROJECTIONS),
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
)


def read_transformers(model: nn.Module, image_size: tuple[int, int] | None) -> Anatomy:
    """A classifier or its backbone."""
    names, at = tensors_of(model), _places(model)
    size, patch = pair(at.config.image_size), pair(at.config.patch_size)
    count = (size[0] // patch[0]) * (size[1] // patch[1])
    rows = 0 if at.position is None else names[at.position].numel() // names[at.position].shape[-1]
    interpolated = image_size is not None and image_size != size and at.position is not None
    return Anatomy(
        family="transformers",
        image_size=image_size or size,
        patch_weight=f"{at.patches}.weight",
        patch_bias=first_of(names, f"{at.patches}.bias"),
        **head_of(model, "classifier", "cls_classifier"),
        position=at.position,
        position_prefix=max(rows - count, 0),
        resizes=hasattr(model.get_submodule(at.embeddings), "interpolate_pos_encoding"),
        resampling=_resampling(model, at, rows - count, image_size or size) if interpolated else None,
        prefix=tuple(name for token in _TOKENS if (name := f"{at.embeddings}.{token}") in names),
        **_attention(names, at.layer),
        **norm_names(names, at.norm),
        **(norm_names(names, at.before, "embedding_norm") if at.before else {}),
        first_block=between(model.get_submodule(at.before) if at.before else None, model.get_submodule(at.norm)),
        heads=at.config.num_attention_heads,
        preprocessing=next((p for name, p in _PREPROCESSING.items() if type(model).__name__.startswith(name)), HALF),
        remark="" if at.position else "its positions are relative: it has no absolute position embedding",
    )


@dataclass(frozen=True)
class _Places:
    """Paths of the modules, and the name of the position embedding, in this version of the library."""

    embeddings: str
    patches: str
    position: str | None
    layer: str
    norm: str
    before: str | None
    config: Any


def _places(model: nn.Module) -> _Places:
    """Where the parts are; the backbone is the module that holds the embeddings."""
    modules, names = dict(model.named_modules()), tensors_of(model)
    inside = min((path for path, module in modules.items() if hasattr(module, "embeddings")), key=len, default="")
    at = f"{inside}." if inside else ""
    embeddings = f"{at}embeddings"
    layer = first_of(modules, *(f"{at}{path}" for path in _LAYERS))
    patches = first_of(modules, f"{embeddings}.patch_embeddings.projection", f"{embeddings}.patch_embedding")
    norm = first_of(modules, *(f"{layer}.{name}" for name in _NORMS))
    if layer is None or patches is None or norm is None:
        raise UnknownModelError(
            f"this {type(model).__name__} of transformers has other parts than versions 4.44 to 5 have: name them "
            "yourself, dissect(model, patch_weight=…, image_size=…, …) on a wrapper of another class"
        )
    config = modules[inside].config
    return _Places(
        embeddings=embeddings,
        patches=patches,
        position=first_of(names, f"{embeddings}.position_embeddings", f"{embeddings}.position_embedding.weight"),
        layer=layer,
        norm=norm,
        before=first_of(modules, f"{at}pre_layrnorm"),  # CLIP's, spelled so
        config=getattr(config, "vision_config", config),
    )


def _attention(names: dict[str, Tensor], layer: str) -> dict[str, Any]:
    """The first attention's projections, under the names of this version of the library."""
    found = {}
    for attention, parts in _ATTENTIONS:
        for field, name in zip(PROJECTIONS, parts, strict=True):
            for tensor, suffix in (("weight", ""), ("bias", "_bias")):
                if (full := f"{layer}.{attention}.{name}.{tensor}") in names:
                    found[f"{field}{suffix}"] = Rows(full)
    return found


def _resampling(model: nn.Module, at: _Places, prefix: int, image_size: tuple[int, int]) -> Tensor:
    """R: the library's own interpolation of the identity, whatever its version does."""
    embeddings, patch = model.get_submodule(at.embeddings), pair(at.config.patch_size)
    kind = type(embeddings)
    if not hasattr(kind, "interpolate_pos_encoding"):
        why = f"{kind.__name__} of this version of transformers does not interpolate"
        raise wrong_size("transformers", pair(at.config.image_size), image_size, why)
    stored = tensors_of(model)[at.position or ""]
    rows = stored.numel() // stored.shape[-1]
    identity = of_the_identity(rows, stored)
    tokens = identity.new_zeros(1, prefix + (image_size[0] // patch[0]) * (image_size[1] // patch[1]), rows)
    # Under either name: a parameter, or the weight of an nn.Embedding.
    weight = SimpleNamespace(weight=identity[0])
    exchanged = Exchanged(embeddings, position_embeddings=identity, position_embedding=weight)
    with torch.no_grad():
        found = kind.interpolate_pos_encoding(exchanged, tokens, *image_size)
    return found[0].double()
