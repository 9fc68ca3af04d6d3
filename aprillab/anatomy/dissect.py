"""Where a Vision Transformer keeps what an attack reads: one place that knows every library's
names.

``dissect(model)`` returns an :class:`Anatomy`, names only, no tensors; the attacks look the names
up in the model (its weights) and in the update (its gradients).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn

from .readers import READERS
from .record import NAME_FIELDS, ROW_FIELDS, Anatomy, Rows, UnknownModelError, tensors_of


def dissect(model: nn.Module, **parts: Any) -> Anatomy:
    """Find the parts of a Vision Transformer that an attack reads.

    Known are this package's :class:`~aprillab.models.VisionTransformer`, torchvision's
    ``VisionTransformer`` (``vit_b_16`` and alike), timm's ``VisionTransformer`` (``vit_*``,
    ``deit*``, with distillation or register tokens) and transformers'
    ``ViTForImageClassification``, alone or inside a wrapper such as ``nn.Sequential(normalize,
    vit)``.

    Parameters
    ----------
    model : nn.Module
    **parts
        Fields of :class:`Anatomy` by name, to correct what was found or to describe a model that is
        not known. A projection may be given as ``"name"`` or ``"name[start:stop]"``. For an unknown
        model at least ``patch_weight`` and ``image_size`` (an int or a pair) are needed.

    Returns
    -------
    Anatomy

    Raises
    ------
    UnknownModelError
        If the model is not known and ``parts`` do not describe it.
    ValueError
        If a part that was handed over has an unknown field, names a tensor the model does not have,
        or one whose shape does not fit the others.

    Examples
    --------
    >>> import torchvision, aprillab as al
    >>> anatomy = al.dissect(torchvision.models.VisionTransformer(32, 8, 1, 2, 64, 64))
    >>> anatomy.position, anatomy.position_prefix
    ('encoder.pos_embedding', 1)
    >>> str(anatomy.key)
    'encoder.layers.encoder_layer_0.self_attention.in_proj_weight[64:128]'
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
    if name in ROW_FIELDS and isinstance(value, str):
        return Rows.parse(value)
    if name == "image_size":
        return (value, value) if isinstance(value, int) else tuple(value)
    if name == "prefix":
        return (value,) if isinstance(value, str) else tuple(value)
    return value


def _check(model: nn.Module, anatomy: Anatomy) -> None:
    """Every name must be a tensor of the model, and the tensors must have the shapes the attacks
    read.
    """
    tensors = tensors_of(model)
    wanted = [getattr(anatomy, f) for f in NAME_FIELDS] + list(anatomy.prefix)
    wanted += [getattr(anatomy, f).name for f in ROW_FIELDS if getattr(anatomy, f) is not None]
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
    for triple, tail in ((ROW_FIELDS[:3], (d,)), (ROW_FIELDS[3:], ())):
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
    """The anatomy of the first ViT among the model and its submodules, with names from the
    outermost model.
    """
    for prefix, module in model.named_modules():
        for base in type(module).__mro__:
            reader = READERS.get(f"{base.__module__}.{base.__name__}")
            if reader is not None:
                return _with_prefix(reader(module), f"{prefix}." if prefix else "")
    return None


def _with_prefix(anatomy: Anatomy, prefix: str) -> Anatomy:
    """The same anatomy seen from a model that holds the ViT as a submodule."""
    changes: dict[str, Any] = {"prefix": tuple(prefix + name for name in anatomy.prefix)}
    for field in NAME_FIELDS:
        if (name := getattr(anatomy, field)) is not None:
            changes[field] = prefix + name
    for field in ROW_FIELDS:
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
        f"Looked for, in the model and its submodules: {', '.join(sorted(READERS))}. "
        f"Convolutions that could be a patch embedding "
        f"(kernel = stride): {seen}. Name the parts yourself: dissect(model, patch_weight=…, image_size=…, "
        "position=…, query=…, key=…, value=…, …)."
    )
