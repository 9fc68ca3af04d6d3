"""What a server can choose in the model: each changes it in place and returns it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..anatomy.dissect import dissect
from ..models import VisionTransformer, sinusoidal_1d, sinusoidal_2d


def freeze_position(model: nn.Module) -> nn.Module:
    """Train everything but the position embedding, so that no client has a gradient of it to share.

    Its values stay, and they are public: each client was sent them.

    *Does not protect against* :func:`~aprillab.span_closed_form`, which reads the patches from the
    first attention's gradients and those values (float32 is enough for random and trained values;
    chapter 07), nor, for batches, against :func:`~aprillab.span_then_match` and
    :func:`~aprillab.span_then_round`, nor against gradient matching given time, nor does it hide
    the label. Values frozen at a small initialization also tell the model little about position,
    which costs accuracy.

    Parameters
    ----------
    model : nn.Module
        Any that :func:`~aprillab.dissect` knows; changed in place.

    Returns
    -------
    nn.Module
        The same one. A model whose embedding is fixed already (a buffer) is returned as it is.

    Raises
    ------
    ValueError
        If there is no position embedding.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> frozen = al.defenses.freeze_position(model).position_embedding
    >>> frozen.requires_grad, tuple(frozen.shape)
    (False, (1, 5, 24))
    """
    _position(model).requires_grad_(False)
    if isinstance(model, VisionTransformer) and model.position == "learned":
        model.position = "frozen"
    return model


def use_sinusoidal(
    model: nn.Module, kind: Literal["1d", "2d"] = "1d", *, base: float = 10_000.0, scale: float = 1.0
) -> nn.Module:
    """Replace the position embedding's values by sinusoids and freeze them.

    *Does not protect against* :func:`~aprillab.span_then_match`: with 16 patches it restores 1-D
    and 2-D sinusoids' pictures from float32 gradients (chapter 08; larger numbers of patches are
    harder). Nor against :func:`~aprillab.span_then_round`, which restores them bit by bit where
    pixels are whole levels, of 64 patches too if they have many pixels (data/results/rounding.md).
    The span attack alone mostly fails on 1-D sinusoids in float32, whose table has a low numerical
    rank: protection by rounding error, which depends on the fastest frequency, the number of
    patches and even the precision in which the table is stored (data/results/conditioning.md). On
    2-D sinusoids it fails at any precision, for their rank is low exactly.

    Parameters
    ----------
    model : nn.Module
        Any that :func:`~aprillab.dissect` knows; changed in place. The table is (tokens, d) with
        tokens in rows.
    kind : {"1d", "2d"}
        :func:`~aprillab.sinusoidal_1d` counts all tokens in a row, class token first;
        :func:`~aprillab.sinusoidal_2d` codes row and column, and leaves the tokens before the
        patches at zero.
    base : float, the longest wavelength is 2π·base
    scale : float, a factor on all values

    Returns
    -------
    nn.Module
        The same one. A model trained with other values has to be trained anew.

    Raises
    ------
    ValueError
        If there is no position embedding, the kind is unknown, or the width does not suit it.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> al.defenses.use_sinusoidal(model).position_embedding[0, 0, :4]
    tensor([0., 1., 0., 1.])
    """
    if kind not in ("1d", "2d"):
        raise ValueError(f"kind={kind!r} is neither '1d' nor '2d'")
    _check_positive("base", base)
    _check_positive("scale", scale)
    embedding, anatomy = _position(model), dissect(model)
    rows, width = embedding.shape[-2:]
    if kind == "1d":
        table = sinusoidal_1d(rows, width, base)
    else:
        table = sinusoidal_2d(anatomy.tiling.grid, width, base, prefix=anatomy.position_prefix)
    with torch.no_grad():
        embedding.copy_((scale * table).expand_as(embedding))
    if isinstance(model, VisionTransformer):
        model.position = "sinusoidal"
    return freeze_position(model)


def no_position(model: nn.Module) -> nn.Module:
    """Set the position embedding to zero and freeze it: the model no longer knows where a patch
    was.

    *Does not protect against* gradient matching, which then finds the patches but in no order of
    its own: any permutation of them has the same gradient, so the picture comes as a jigsaw. Costs
    accuracy wherever the place of a patch matters.

    Parameters
    ----------
    model : nn.Module
        Any that :func:`~aprillab.dissect` knows; changed in place.

    Returns
    -------
    nn.Module
        The same one.

    Raises
    ------
    ValueError
        If there is no position embedding: nothing to do then.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> float(al.defenses.no_position(model).position_embedding.abs().max())
    0.0
    """
    with torch.no_grad():
        _position(model).zero_()
    return freeze_position(model)


def _position(model: nn.Module) -> Tensor:
    """The position embedding, parameter or buffer, not detached."""
    name = dissect(model).position
    if name is None:
        raise ValueError(f"{type(model).__name__} has no position embedding")
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value} must be positive and finite")
