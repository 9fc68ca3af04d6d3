"""Where a Vision Transformer keeps what an attack reads: one place that knows every library's names.

``dissect(model)`` returns an :class:`Anatomy`, names only, no tensors; the attacks look the names up in the
model (its weights) and in the update (its gradients).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from .. import models
from ..preprocessing import HALF, IMAGENET, UNIT, Preprocessing


class UnknownModelError(ValueError):
    """The model is not a Vision Transformer that :func:`dissect` knows; the message says what was looked for."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a named tensor: fused projections keep queries, keys and values in one.

    Attributes
    ----------
    name : str
    start, stop : int or None
        ``tensor[start:stop]``; None for the whole.
    """

    name: str
    start: int | None = None
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Rows:
        """Read ``"block.qkv.weight"`` or ``"block.qkv.weight[0:384]"``."""
        match = re.fullmatch(r"([^\[\]]+)(?:\[(\d*):(\d*)\])?", text.strip())
        if match is None:
            raise ValueError(f"{text!r} is neither 'name' nor 'name[start:stop]'")
        name, start, stop = match.groups()
        return cls(name, int(start) if start else None, int(stop) if stop else None)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """These rows in ``tensors``; None where the name is not among them."""
        tensor = tensors.get(self.name)
        return None if tensor is None else tensor[self.start : self.stop]

    def __str__(self) -> str:
        if self.start is self.stop is None:
            return self.name
        start, stop = ("" if end is None else end for end in (self.start, self.stop))
        return f"{self.name}[{start}:{stop}]"


@dataclass(frozen=True)
class Anatomy:
    """Names of a ViT's parts, as in ``model.state_dict()``, and the sizes that go with them.

    Attributes
    ----------
    family : str
        Which library's model it is, for messages.
    image_size : (int, int)
        Height and width in pixels.
    patch_weight, patch_bias : str, str or None
        Patch embedding: weight of shape (d, C, P, P), bias of shape (d,).
    head_weight, head_bias : str or None
        The classifier: (classes, d) and (classes,).
    position : str or None
        Position embedding, parameter or buffer, of shape (…, rows, d).
    position_prefix : int
        Its rows before the first patch (class token, registers); 0 where only patches are embedded.
    prefix : tuple of str
        Parameters of the tokens before the patches: class token, distillation token, registers.
    query, key, value, query_bias, key_bias, value_bias : Rows or None
        The first attention's projections, (d, d) and (d,).
    norm_weight, norm_bias : str or None
        LayerNorm before the first attention, (d,) each; None in architecture A.
    first_block : {"april", "prenorm", "unknown"}
        What stands between the tokens and the first attention: nothing, one LayerNorm, something else.
    heads : int or None
    preprocessing : Preprocessing
        Pixels to model input, as the library's own recipe for this model has it (public knowledge).
    """

    family: str
    image_size: tuple[int, int]
    patch_weight: str
    patch_bias: str | None = None
    head_weight: str | None = None
    head_bias: str | None = None
    position: str | None = None
    position_prefix: int = 0
    prefix: tuple[str, ...] = ()
    query: Rows | None = None
    key: Rows | None = None
    value: Rows | None = None
    query_bias: Rows | None = None
    key_bias: Rows | None = None
    value_bias: Rows | None = None
    norm_weight: str | None = None
    norm_bias: str | None = None
    first_block: str = "unknown"
    heads: int | None = None
    preprocessing: Preprocessing = UNIT

    def tensor_names(self) -> set[str]:
        """Names of all tensors of the model that an attack may read."""
        found = {name for field in _NAME_FIELDS if (name := getattr(self, field)) is not None}
        found |= {rows.name for field in _ROW_FIELDS if (rows := getattr(self, field)) is not None}
        return found | set(self.prefix)

    def names(self) -> dict[str, str]:
        """Part to tensor name, for every part the model has: what a report or an error prints."""
        found = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Rows):
                found[field.name] = str(value)
            elif field.name == "prefix" and value:
                found[field.name] = ", ".join(value)
            elif field.name in _NAME_FIELDS and value is not None:
                found[field.name] = value
        return found


_NAME_FIELDS = ("patch_weight", "patch_bias", "head_weight", "head_bias", "position", "norm_weight", "norm_bias")
_ROW_FIELDS = ("query", "key", "value", "query_bias", "key_bias", "value_bias")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of ``model`` by name, detached: what the server holds."""
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def dissect(model: nn.Module, **parts: Any) -> Anatomy:
    """Find the parts of a Vision Transformer that an attack reads.

    Known are this package's :class:`~aprillab.models.VisionTransformer`, torchvision's ``VisionTransformer``
    (``vit_b_16`` and alike), timm's ``VisionTransformer`` (``vit_*``, ``deit*``, with distillation or register
    tokens) and transformers' ``ViTForImageClassification``, alone or inside a wrapper such as
    ``nn.Sequential(normalize, vit)``.

    Parameters
    ----------
    model : nn.Module
    **parts
        Fields of :class:`Anatomy` by name, to correct what was found or to describe a model that is not
        known. A projection may be given as ``"name"`` or ``"name[start:stop]"``. For an unknown model at
        least ``patch_weight`` and ``image_size`` (an int or a pair) are needed.

    Returns
    -------
    Anatomy

    Raises
    ------
    UnknownModelError
        If the model is not known and ``parts`` do not describe it.
    ValueError
        If a part that was handed over has an unknown field, names a tensor the model does not have, or one whose
        shape does not fit the others.
    """
    known = {field.name for field in fields(Anatomy)}
    if wrong := sorted(set(parts) - known):
        raise ValueError(f"dissect: no part is called {', '.join(wrong)}; there are {', '.join(sorted(known))}")
    given = {name: _as_field(name, value) for name, value in parts.items()}
    anatomy = _recognize(model)
    if anatomy is not None:
        anatomy = replace(anatomy, **given)
    elif {"patch_weight", "image_size"} <= set(given):
        anatomy = Anatomy(**{"family": "described by the caller", **given})
    else:
        raise UnknownModelError(_what_was_looked_for(model))
    _check(model, anatomy)
    return anatomy


def _as_field(name: str, value: Any) -> Any:
    """A part as the caller wrote it, in the type of its field."""
    if name in _ROW_FIELDS and isinstance(value, str):
        return Rows.parse(value)
    if name == "image_size":
        return (value, value) if isinstance(value, int) else tuple(value)
    if name == "prefix":
        return (value,) if isinstance(value, str) else tuple(value)
    return value


def _check(model: nn.Module, anatomy: Anatomy) -> None:
    """Every name must be a tensor of the model, and the tensors must have the shapes the attacks read."""
    tensors = tensors_of(model)
    wanted = [getattr(anatomy, f) for f in _NAME_FIELDS] + list(anatomy.prefix)
    wanted += [getattr(anatomy, f).name for f in _ROW_FIELDS if getattr(anatomy, f) is not None]
    if missing := [name for name in wanted if name is not None and name not in tensors]:
        raise ValueError(
            f"{type(model).__name__} has no tensor called {', '.join(missing)}; "
            f"its tensors are {', '.join(list(tensors)[:12])}, … ({len(tensors)} in all)"
        )
    shape = tuple(tensors[anatomy.patch_weight].shape)
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f"patch_weight {anatomy.patch_weight!r} must have shape (d, C, P, P), not {shape}")
    if any(size % shape[-1] for size in anatomy.image_size):
        raise ValueError(f"patches of {shape[-1]} pixels do not tile an image of {anatomy.image_size}")
    _check_shapes(anatomy, tensors)


def _check_shapes(anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> None:
    """The parts must fit the patch embedding's width d and each other."""
    d, _, patch, _ = tensors[anatomy.patch_weight].shape
    for part in ("patch_bias", "norm_weight", "norm_bias"):
        name = getattr(anatomy, part)
        if name is not None and tensors[name].shape != (d,):
            raise ValueError(f"{part} {name!r} must have shape {(d,)}, not {tuple(tensors[name].shape)}")
    for triple, tail in ((_ROW_FIELDS[:3], (d,)), (_ROW_FIELDS[3:], ())):
        rows = [getattr(anatomy, part) for part in triple if getattr(anatomy, part) is not None]
        shapes = [tuple(tensors[r.name][r.start : r.stop].shape) for r in rows]
        if any(shape != shapes[0] or not shape[0] or shape[1:] != tail for shape in shapes):
            seen = ", ".join(f"{r} {shape}" for r, shape in zip(rows, shapes, strict=True))
            raise ValueError(f"{', '.join(triple)} must be rows of one shape, {('m', *tail)}, not {seen}")
    if anatomy.position is not None:
        shape, prefix = tensors[anatomy.position].shape, anatomy.position_prefix
        n = (anatomy.image_size[0] // patch) * (anatomy.image_size[1] // patch)
        if shape[-1] != d or shape[:-1].numel() != prefix + n:
            raise ValueError(
                f"position {anatomy.position!r} must have position_prefix + patches = {prefix} + {n} rows of "
                f"width {d}, not shape {tuple(shape)}"
            )


def _recognize(model: nn.Module) -> Anatomy | None:
    """The anatomy of the first ViT among the model and its submodules, with names from the outermost model."""
    for prefix, module in model.named_modules():
        for base in type(module).__mro__:
            reader = _READERS.get(f"{base.__module__}.{base.__name__}")
            if reader is not None:
                return _with_prefix(reader(module), f"{prefix}." if prefix else "")
    return None


def _with_prefix(anatomy: Anatomy, prefix: str) -> Anatomy:
    """The same anatomy seen from a model that holds the ViT as a submodule."""
    changes: dict[str, Any] = {"prefix": tuple(prefix + name for name in anatomy.prefix)}
    for field in _NAME_FIELDS:
        if (name := getattr(anatomy, field)) is not None:
            changes[field] = prefix + name
    for field in _ROW_FIELDS:
        if (rows := getattr(anatomy, field)) is not None:
            changes[field] = replace(rows, name=prefix + rows.name)
    return replace(anatomy, **changes)


def _what_was_looked_for(model: nn.Module) -> str:
    kernels = [
        f"{name}.weight {tuple(m.weight.shape)}"
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride and m.kernel_size[0] > 1
    ]
    seen = "; ".join(kernels[:3]) if kernels else "none"
    return (
        f"{type(model).__module__}.{type(model).__name__} is not a Vision Transformer known to aprillab. "
        f"Looked for, in the model and its submodules: {', '.join(sorted(_READERS))}. "
        f"Convolutions that could be a patch embedding "
        f"(kernel = stride): {seen}. Name the parts yourself: dissect(model, patch_weight=…, image_size=…, "
        "position=…, query=…, key=…, value=…, …)."
    )


def _fused(name: str, width: int) -> tuple[Rows, Rows, Rows]:
    """Queries, keys and values stacked in this order in one tensor of 3·width rows."""
    return Rows(name, 0, width), Rows(name, width, 2 * width), Rows(name, 2 * width, 3 * width)


def _own(model: nn.Module) -> Anatomy:
    """aprillab.models.VisionTransformer."""
    assert isinstance(model, models.VisionTransformer)
    names, attention, bias = tensors_of(model), "blocks.0.attention", model.patch_embedding.bias is not None
    parts = {part: Rows(f"{attention}.{part}.weight") for part in ("query", "key", "value")}
    biases = {f"{part}_bias": Rows(f"{attention}.{part}.bias") for part in ("query", "key", "value") if bias}
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


def _torchvision(model: nn.Module) -> Anatomy:
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
    query, key, value = _fused(f"{block}.self_attention.in_proj_weight", width)
    query_bias, key_bias, value_bias = _fused(f"{block}.self_attention.in_proj_bias", width)
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
        query=query,
        key=key,
        value=value,
        query_bias=query_bias,
        key_bias=key_bias,
        value_bias=value_bias,
        norm_weight=f"{block}.ln_1.weight",
        norm_bias=f"{block}.ln_1.bias",
        first_block="prenorm",
        heads=m.encoder.layers[0].num_heads,
        preprocessing=IMAGENET,
    )


def _timm(model: nn.Module) -> Anatomy:
    """timm's VisionTransformer and VisionTransformerDistilled, with whatever prefix tokens they have."""
    m: Any = model
    names = tensors_of(model)
    if "patch_embed.proj.weight" not in names or names["patch_embed.proj.weight"].ndim != 4:
        raise UnknownModelError("this timm model has no convolution patch_embed.proj (a hybrid or linear stem?)")
    if any(name.startswith("patch_embed.backbone") for name in names):
        raise UnknownModelError("this timm model embeds the patches of a CNN's feature map, not those of the image")
    if not isinstance(getattr(m.patch_embed, "norm", None), nn.Identity | None):
        raise UnknownModelError("this timm model normalizes the embedded patches before it adds their position")
    has: Callable[[str], str | None] = lambda name: name if name in names else None  # noqa: E731
    # Order of the tokens in timm's sequences: class token, then distillation token or registers.
    prefix = tuple(name for name in ("cls_token", "dist_token", "reg_token") if name in names)
    prefix_tokens = sum(names[name].shape[1] for name in prefix)
    position = has("pos_embed")
    size, patch = m.patch_embed.img_size, names["patch_embed.proj.weight"].shape[-1]
    only_patches = position is not None and names[position].shape[-2] == (size[0] // patch) * (size[1] // patch)
    fused = "blocks.0.attn.qkv.weight" in names
    width = len(names["blocks.0.attn.qkv.weight"]) // 3 if fused else 0
    query, key, value = _fused("blocks.0.attn.qkv.weight", width) if fused else (None, None, None)
    biased = "blocks.0.attn.qkv.bias" in names
    query_bias, key_bias, value_bias = _fused("blocks.0.attn.qkv.bias", width) if biased else (None, None, None)
    norm = has("blocks.0.norm1.weight")
    # timm's ResPostBlock has a norm1 too, but behind the attention; parallel blocks have no `attn`.
    first = m.blocks[0]
    plain = type(first).__name__ == "Block" and isinstance(first.norm1, nn.LayerNorm) and norm is not None
    plain = plain and fused and isinstance(m.norm_pre, nn.Identity)
    config = getattr(m, "pretrained_cfg", None) or {}
    return Anatomy(
        family="timm",
        image_size=tuple(size),
        patch_weight="patch_embed.proj.weight",
        patch_bias=has("patch_embed.proj.bias"),
        head_weight=has("head.weight"),
        head_bias=has("head.bias"),
        position=position,
        position_prefix=0 if only_patches else prefix_tokens,
        prefix=prefix,
        query=query,
        key=key,
        value=value,
        query_bias=query_bias,
        key_bias=key_bias,
        value_bias=value_bias,
        norm_weight=norm,
        norm_bias=has("blocks.0.norm1.bias"),
        first_block="prenorm" if plain else "unknown",
        heads=getattr(getattr(first, "attn", None), "num_heads", None),
        preprocessing=Preprocessing(tuple(config["mean"]), tuple(config["std"])) if "mean" in config else HALF,
    )


def _transformers(model: nn.Module) -> Anatomy:
    """ViTForImageClassification; the attention's names changed between versions 4 and 5 of the library."""
    m: Any = model
    names = tensors_of(model)
    new = "vit.layers.0.attention.q_proj.weight" in names
    block = "vit.layers.0" if new else "vit.encoder.layer.0"
    attention = f"{block}.attention" if new else f"{block}.attention.attention"
    part = ("q_proj", "k_proj", "v_proj") if new else ("query", "key", "value")
    query, key, value = (Rows(f"{attention}.{name}.weight") for name in part)
    biases = [Rows(f"{attention}.{n}.bias") if f"{attention}.{n}.bias" in names else None for n in part]
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
        query=query,
        key=key,
        value=value,
        query_bias=biases[0],
        key_bias=biases[1],
        value_bias=biases[2],
        norm_weight=f"{block}.layernorm_before.weight",
        norm_bias=f"{block}.layernorm_before.bias",
        first_block="prenorm",
        heads=m.config.num_attention_heads,
        preprocessing=HALF,
    )


_READERS: dict[str, Callable[[nn.Module], Anatomy]] = {
    "aprillab.models.VisionTransformer": _own,
    "torchvision.models.vision_transformer.VisionTransformer": _torchvision,
    "timm.models.vision_transformer.VisionTransformer": _timm,
    "transformers.models.vit.modeling_vit.ViTForImageClassification": _transformers,
}
