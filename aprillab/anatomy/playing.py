"""A model as whoever plays its client must call it: on model input, at the picture's own size."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .record import Anatomy

_FLAG = "interpolate_pos_encoding"


@contextmanager
def playable(model: nn.Module, anatomy: Anatomy) -> Iterator[None]:
    """While this lasts, the module at ``anatomy.root`` gives the logits of model input.

    Two things may stand in the way, and both are hooked. A wrapper whose head is beside the ViT can
    have a normalization in front: the ViT is given the wrapper's input as it is. And a model of
    transformers interpolates its position embedding only where its caller sets a flag, as a client
    of pictures of another size has.

    Examples
    --------
    >>> class Doubles(nn.Module):
    ...     def forward(self, images):
    ...         return 2 * images
    >>> import torch
    >>> model = nn.Sequential(Doubles(), nn.Identity(), nn.Flatten())
    >>> with playable(model, Anatomy("mine", (1, 1), "w", root="", vit="1")):
    ...     model(torch.ones(1, 1))
    tensor([[1.]])
    >>> model(torch.ones(1, 1))
    tensor([[2.]])
    """
    handles = hooked(model, anatomy)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hooked(model: nn.Module, anatomy: Anatomy) -> list[Any]:
    """The hooks of :func:`playable`, put on for good; their handles."""
    handles = []
    if anatomy.vit != anatomy.root:
        given: list[Any] = []

        def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
            given[:] = args[:1]

        def instead(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (*given, *args[1:])

        handles.append(model.get_submodule(anatomy.root).register_forward_pre_hook(remember))
        handles.append(model.get_submodule(anatomy.vit).register_forward_pre_hook(instead))
    takes = [m for m in model.modules() if _FLAG in inspect.signature(m.forward).parameters]
    if takes and anatomy.resampling is not None:
        handles.append(takes[0].register_forward_pre_hook(_with_flag, with_kwargs=True))
    return handles


def _with_flag(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {_FLAG: True, **kwargs}
