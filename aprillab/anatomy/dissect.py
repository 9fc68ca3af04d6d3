"""Where a Vision Transformer keeps what an attack reads: one place that knows every library's
names.

``dissect(model)`` returns an :class:`Anatomy`, names only; the attacks look the names up in the
model (its weights) and in the update (its gradients).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import nn

from ..preprocessing import UNIT
from .adapters import with_adapters, without_adapters
from .checks import check, with_patch
from .given import as_field
from .readers.known import NO_POSITIONS, READERS
from .record import Anatomy, UnknownModelError, tensors_of
from .stem import check_stem
from .wrappers import choose, is_in, last_head, seen_from_outside, vits_in


def dissect(model: nn.Module, *, vit: str | None = None, **parts: Any) -> Anatomy:
    """Find the parts of a Vision Transformer that an attack reads.

    Known are this package's :class:`~aprillab.models.VisionTransformer`; torchvision's
    ``VisionTransformer`` (``vit_b_16`` and alike); timm's ``VisionTransformer`` (``vit_*``,
    ``deit*``, with distillation or register tokens), ``Eva``, ``Beit``, ``Cait`` and ``NaFlexVit``; transformers'
    ViT, DeiT, Dinov2, ViTMSN, BEiT, CLIP and SigLIP, classifiers and backbones; MONAI's ``ViT`` of
    pictures. Each is found alone or inside a wrapper such as ``nn.Sequential(normalize, vit)``,
    ``torch.compile``'s or a module of teacher and student, of which the trained one is read; and with peft's
    adapters in it (LoRA and DoRA on the first attention's projections are named, ``modules_to_save`` are read).

    Parameters
    ----------
    model : nn.Module
    vit : str, optional
        Path of the ViT that is meant, where the model trains several.
    **parts
        Fields of :class:`Anatomy` by name, to correct what was found or to describe a model that is
        not known. A projection may be given as ``"name"`` or ``"name[start:stop]"``. For an unknown
        model at least ``patch_weight`` and ``image_size`` (an int or a pair) are needed, and for a
        linear map of flattened patches ``patch_size`` and ``pixel_order``. For a known model
        ``image_size`` names the size of the pictures, where the library interpolates the position
        embedding for it.

    Returns
    -------
    Anatomy

    Raises
    ------
    UnknownModelError
        If the model is not known and ``parts`` do not describe it, or it trains several ViTs and
        none is named.
    ValueError
        If a part that was handed over has an unknown field, names a tensor the model does not have,
        or one whose shape does not fit the others; or if the model cannot take that image size.

    Examples
    --------
    >>> import torchvision, aprillab as al
    >>> anatomy = al.dissect(torchvision.models.VisionTransformer(32, 8, 1, 2, 64, 64))
    >>> anatomy.position, anatomy.position_prefix
    ('encoder.pos_embedding', 1)
    >>> str(anatomy.key)
    'encoder.layers.encoder_layer_0.self_attention.in_proj_weight[64:128]'
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise UnknownModelError(f"dissect needs a torch.nn.Module, not {kind}: build the model and load its weights")
    known = {field.name for field in fields(Anatomy)} - {"resampling", "vit"}
    if wrong := sorted(set(parts) - known):
        raise ValueError(f"dissect: no part is called {', '.join(wrong)}; there are {', '.join(sorted(known))}, vit")
    given = {name: as_field(name, value) for name, value in parts.items()}
    anatomy = _read(model, vit, given)
    if anatomy is not None:
        anatomy = with_patch(model, replace(anatomy, **given))
    elif {"patch_weight", "image_size"} <= set(given):
        anatomy = with_patch(model, Anatomy(**{"family": "described by the caller", **given}))
        check_stem(model, anatomy)
        if anatomy.head_weight is None:
            width = len(tensors_of(model)[anatomy.patch_weight])
            anatomy = replace(anatomy, **last_head(model, width))
    else:
        raise UnknownModelError(_what_was_looked_for(model))
    check(model, anatomy)
    return anatomy if "preprocessing" in given else _with_fitting_preprocessing(anatomy)


def _read(model: nn.Module, vit: str | None, given: dict[str, Any]) -> Anatomy | None:
    """The anatomy of the ViT that is meant, with names from the outermost model."""
    bare = without_adapters(model)
    vits = vits_in(model, bare)
    if not vits:
        if vit is not None:
            raise UnknownModelError(f"vit={vit!r}: {_what_was_looked_for(model)}")
        return None
    weight = given.get("patch_weight")
    if weight is not None and vit is None:
        if not any(is_in(bare.seen(weight), found.path) for found in vits):
            return None  # the caller describes another part of the model
        vit = weight
    elif vit is not None and vit not in dict(model.named_modules()):
        at = ", ".join(repr(found.path) for found in vits)
        raise UnknownModelError(f"vit={vit!r} is no module of this model; its Vision Transformers are at {at}")
    found, remark = choose(vits, None if vit is None else bare.seen(vit))
    read = found.reader(found.module, given.get("image_size"))
    anatomy = with_adapters(model, seen_from_outside(bare.model, read, found.path, vits), bare)
    return replace(anatomy, remark="; ".join(word for word in (remark, anatomy.remark) if word))


def _with_fitting_preprocessing(anatomy: Anatomy) -> Anatomy:
    """Without the family's recipe where the model's pictures have another number of channels."""
    recipe = anatomy.preprocessing
    if max(len(recipe.mean), len(recipe.std)) in (1, anatomy.channels):
        return anatomy
    word = f"pictures of {anatomy.channels} channels: the model's input is taken for the pixels"
    remark = f"{anatomy.remark}; {word}" if anatomy.remark else word
    return replace(anatomy, preprocessing=UNIT, remark=remark)


def _what_was_looked_for(model: nn.Module) -> str:
    """Why the model is not known, and what its owner can do."""
    name = f"{type(model).__module__}.{type(model).__name__}"
    for module in model.modules():
        for base in type(module).__mro__:
            full = f"{base.__module__}.{base.__name__}"
            reason = next((why for start, why in NO_POSITIONS.items() if full.startswith(start)), None)
            if reason is not None:
                return f"{name} is not a Vision Transformer known to aprillab: {reason}"
    convolutions = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    kernels = [
        f"{path}.weight {tuple(m.weight.shape)}"
        for path, m in convolutions
        if m.kernel_size == m.stride and max(m.kernel_size) > 1
    ]
    without = "al.match_gradients(model, update, image_shape=(C, H, W)) needs no anatomy."
    if convolutions and not kernels and not _attends(model):
        return (
            f"{name} is not a Vision Transformer known to aprillab: it has convolutions and no attention. The "
            f"closed forms read ViTs; {without}"
        )
    return (
        f"{name} is not a Vision Transformer known to aprillab. "
        f"Looked for, in the model and its submodules: {_known_classes()}. "
        f"Convolutions that could be a patch embedding "
        f"(kernel = stride): {'; '.join(kernels[:3]) if kernels else 'none'}. "
        "Name the parts yourself: dissect(model, patch_weight=…, image_size=…, "
        f"position=…, query=…, key=…, value=…, …).{'' if _attends(model) else f' If it is a CNN, {without}'}"
    )


def _known_classes() -> str:
    """Libraries and their classes, a classifier of transformers by its family alone."""
    known: dict[str, dict[str, None]] = {}  # an ordered set each
    for full in READERS:
        library, name = full.partition(".")[0], full.rpartition(".")[2]
        if library != "transformers" or "ForImageClassification" in name:
            known.setdefault(library, {})[name.partition("ForImageClassification")[0]] = None
    return "; ".join(f"{library}'{'s' * (library[-1] != 's')} {', '.join(names)}" for library, names in known.items())


def _attends(model: nn.Module) -> bool:
    """Whether a module is called an attention."""
    words = ("attention", "attn", "qkv", "transformer")
    return any(
        any(word in f"{path} {type(module).__name__}".lower() for word in words)
        for path, module in model.named_modules()
    )
