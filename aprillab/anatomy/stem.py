"""What stands around a patch embedding that the caller names: other layers, or the one that flattens."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from .record import Anatomy, UnknownModelError


def check_stem(model: nn.Module, anatomy: Anatomy) -> None:
    """Refuse a patch embedding with other layers around it in an ``nn.Sequential``.

    Raises
    ------
    UnknownModelError
        If a layer with parameters stands before it, or a norm behind it.
    """
    path = anatomy.patch_weight.rpartition(".")[0]
    outer, _, own = path.rpartition(".")
    stem = model.get_submodule(outer)
    if not path or not isinstance(stem, nn.Sequential):
        return
    names = [name for name, _ in stem.named_children()]
    before, behind = stem[: names.index(own)], stem[names.index(own) + 1 :]
    for layer in before:
        if _is_norm(layer):
            raise UnknownModelError(
                f"{outer}: a {type(layer).__name__} reads the flattened patch before {path}: the linear systems "
                "would give normalized patches, with their mean and contrast lost"
            )
        if any(True for _ in layer.parameters()):
            raise UnknownModelError(f"{outer}: {path} reads what a {type(layer).__name__} makes of the picture")
    for layer in behind:
        if _is_norm(layer) or any(True for _ in layer.parameters()):
            raise UnknownModelError(
                f"{outer}: a {type(layer).__name__} stands between {path} and the position embedding: a token is not "
                "linear in its patch"
            )


def _is_norm(layer: nn.Module) -> bool:
    return "norm" in type(layer).__name__.lower()


def flattening(model: nn.Module, weight: str) -> tuple[tuple[int, int], str] | None:
    """Patch size and pixel order of the einops ``Rearrange`` in front of a linear patch embedding.

    Returns
    -------
    ((int, int), str) or None
        None where there is none, or it is no cut of pictures into rows of patches.
    """
    path = weight.rpartition(".")[0]
    stem = model.get_submodule(path.rpartition(".")[0])
    for layer in stem.children() if isinstance(stem, nn.Sequential) else ():
        pattern = getattr(layer, "pattern", None)
        if type(layer).__name__ == "Rearrange" and isinstance(pattern, str):
            return _read_pattern(pattern, dict(getattr(layer, "axes_lengths", {})))
    return None


def _read_pattern(pattern: str, sizes: dict[str, int]) -> tuple[tuple[int, int], str] | None:
    """As :func:`flattening`, of einops' pattern and the lengths that go with it.

    >>> _read_pattern("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", {"p1": 4, "p2": 8})
    ((4, 8), 'h w c')
    """
    left, right = (list(_axes(side)) for side in pattern.partition("->")[::2])
    if [len(axes) for axes in left] != [1, 1, 2, 2] or [len(axes) for axes in right] != [1, 2, 3]:
        return None
    (_, (channel,), (row, y), (column, x)), (_, grid, flat) = left, right
    letters = {channel: "c", y: "h", x: "w"}
    if grid != (row, column) or set(flat) != set(letters) or not {y, x} <= set(sizes):
        return None
    return (sizes[y], sizes[x]), " ".join(letters[axis] for axis in flat)


def _axes(side: str) -> Iterator[tuple[str, ...]]:
    """The axes of one side of a pattern, those in brackets together."""
    for group in re.findall(r"\([^)]*\)|[^\s()]+", side):
        yield tuple(group.strip("()").split())
