"""A forward pass at the picture's own size: what transformers asks of its caller."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .record import Anatomy

_FLAG = "interpolate_pos_encoding"


@contextmanager
def at_its_size(model: nn.Module, anatomy: Anatomy) -> Iterator[None]:
    """While this lasts, a model of transformers interpolates its position embedding unasked.

    Its ``forward`` takes a flag for that, which a client of pictures of another size has set and
    nobody who plays that client can. Nothing is done where the picture has the model's size.

    Examples
    --------
    >>> class Asks(nn.Module):
    ...     def forward(self, images, interpolate_pos_encoding=False):
    ...         return interpolate_pos_encoding
    >>> import torch
    >>> model, resized = Asks(), Anatomy("mine", (8, 8), "w", resampling=torch.eye(1))
    >>> with at_its_size(model, resized):
    ...     model(None)
    True
    >>> model(None)
    False
    """
    handle = None if anatomy.resampling is None else interpolating(model)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def interpolating(model: nn.Module) -> Any:
    """Set the flag at every call of the outermost module that takes it; the hook's handle, or None."""

    def with_flag(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {_FLAG: True, **kwargs}

    for module in model.modules():
        if _FLAG in inspect.signature(module.forward).parameters:
            return module.register_forward_pre_hook(with_flag, with_kwargs=True)
    return None
