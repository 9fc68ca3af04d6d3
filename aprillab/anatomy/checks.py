"""What must hold of an anatomy: names that are tensors, and shapes that fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from .record import NAME_FIELDS, ROW_FIELDS, Anatomy, tensors_of
from .stem import flattening
from .tiling import CONVOLUTION


def with_patch(model: nn.Module, anatomy: Anatomy) -> Anatomy:
    """The same with the patches' size and channels, read off the weight where it has them.

    Raises
    ------
    ValueError
        If there is no such tensor, it is no patch embedding, or what was given contradicts it.
    """
    tensors, name = tensors_of(model), anatomy.patch_weight
    if name not in tensors:
        raise ValueError(_missing(model, tensors, [name]))
    shape = tuple(tensors[name].shape)
    if len(shape) == 4:
        if anatomy.patch_size not in (None, shape[2:]) or anatomy.channels not in (None, shape[1]):
            raise ValueError(
                f"patch_weight {name!r} of shape {shape} has patches of {shape[2]}×{shape[3]} pixels and {shape[1]} "
                f"channels, not patch_size={anatomy.patch_size}, channels={anatomy.channels}"
            )
        if anatomy.pixel_order != CONVOLUTION:
            raise ValueError(f"patch_weight {name!r} is a convolution's: it reads {CONVOLUTION!r}")
        return replace(anatomy, patch_size=shape[2:], channels=shape[1])
    if len(shape) != 2:
        raise ValueError(f"patch_weight {name!r} must have shape (d, C, P, P) or (d, p), not {shape}")
    if anatomy.patch_size is None and (seen := flattening(model, name)) is not None:
        anatomy = replace(anatomy, patch_size=seen[0], pixel_order=seen[1])
    if anatomy.patch_size is None:
        raise ValueError(
            f"patch_weight {name!r} of shape {shape} is a linear map of flattened patches: give patch_size=… and "
            "pixel_order='h w c' (channels last in a patch) or 'c h w'"
        )
    pixels = anatomy.patch_size[0] * anatomy.patch_size[1]
    channels = anatomy.channels or shape[1] // pixels
    if channels * pixels != shape[1]:
        raise ValueError(
            f"patch_weight {name!r} reads {shape[1]} numbers a patch, and patches of {anatomy.patch_size[0]}×"
            f"{anatomy.patch_size[1]} pixels have {pixels} a channel{f', of {channels}' if anatomy.channels else ''}"
        )
    return replace(anatomy, channels=channels)


def check(model: nn.Module, anatomy: Anatomy) -> None:
    """Every name must be a tensor of the model, and the tensors must have the shapes the attacks
    read.

    Raises
    ------
    ValueError
        With the part, the name and the shapes.
    """
    tensors = tensors_of(model)
    wanted = [getattr(anatomy, part) for part in NAME_FIELDS] + [*anatomy.prefix, *anatomy.adapters]
    wanted += [getattr(anatomy, part).name for part in ROW_FIELDS if getattr(anatomy, part) is not None]
    if missing := [name for name in wanted if name is not None and name not in tensors]:
        raise ValueError(_missing(model, tensors, missing))
    (height, width), image = anatomy.tiling.patch_size, anatomy.image_size
    if image[0] % height or image[1] % width:
        size = f"{height}" if height == width else f"{height}×{width}"
        raise ValueError(f"patches of {size} pixels do not tile an image of {image}")
    _check_shapes(anatomy, tensors)
    _check_rows(anatomy, tensors)
    _check_position(anatomy, tensors)


def _check_shapes(anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> None:
    """The vectors must have the patch embedding's width d."""
    d = len(tensors[anatomy.patch_weight])
    for part in ("patch_bias", "norm_weight", "norm_bias", "embedding_norm_weight", "embedding_norm_bias"):
        name = getattr(anatomy, part)
        if name is not None and tensors[name].shape != (d,):
            raise ValueError(f"{part} {name!r} must have shape {(d,)}, not {tuple(tensors[name].shape)}")
    for name in anatomy.prefix:
        if tensors[name].shape[-1] != d:
            raise ValueError(f"prefix {name!r} must have width {d}, not shape {tuple(tensors[name].shape)}")
    for name in anatomy.adapters:
        if tensors[name].ndim != 2 or tensors[name].shape[1] != d:
            raise ValueError(f"adapter {name!r} must have shape (r, {d}), not {tuple(tensors[name].shape)}")
    for part, dimensions in (("head_weight", 2), ("head_bias", 1)):
        name = getattr(anatomy, part)
        if name is not None and tensors[name].ndim != dimensions:
            raise ValueError(f"{part} {name!r} must have {dimensions} dimensions, not {tuple(tensors[name].shape)}")


def _check_rows(anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> None:
    """The projections must read tokens of width d, and be as many rows each."""
    d = len(tensors[anatomy.patch_weight])
    for triple, tail in ((ROW_FIELDS[:3], (d,)), (ROW_FIELDS[3:], ())):
        rows = [getattr(anatomy, part) for part in triple if getattr(anatomy, part) is not None]
        shapes = [tuple(tensors[r.name][r.start : r.stop].shape) for r in rows]
        if any(shape != shapes[0] or not shape[0] or shape[1:] != tail for shape in shapes):
            seen = ", ".join(f"{r} {shape}" for r, shape in zip(rows, shapes, strict=True))
            raise ValueError(f"{', '.join(triple)} must be rows of one shape, {('m', *tail)}, not {seen}")


def _check_position(anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> None:
    """The position embedding must have a row for each patch, or one that is interpolated to it."""
    if anatomy.position is None:
        return
    d, n = len(tensors[anatomy.patch_weight]), anatomy.tiling.count
    shape, prefix = tensors[anatomy.position].shape, anatomy.position_prefix
    rows = shape[:-1].numel()
    tokens = rows if anatomy.resampling is None else len(anatomy.resampling)
    if (
        shape[-1] != d
        or tokens != prefix + n
        or (anatomy.resampling is not None and anatomy.resampling.shape[1] != rows)
    ):
        raise ValueError(
            f"position {anatomy.position!r} must have position_prefix + patches = {prefix} + {n} rows of "
            f"width {d}, not shape {tuple(shape)}"
        )


def _missing(model: nn.Module, tensors: Mapping[str, Tensor], missing: list[str]) -> str:
    return (
        f"{type(model).__name__} has no tensor called {', '.join(missing)}; "
        f"its tensors are {', '.join(list(tensors)[:12])}, … ({len(tensors)} in all)"
    )
