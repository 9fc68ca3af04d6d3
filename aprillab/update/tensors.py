"""Tensors as people hand them over: ours, or arrays of numpy, JAX and the like."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOATS = ", ".join(map(str, DTYPES))


class UpdateError(ValueError):
    """An update that cannot be used: unreadable, incomplete, misshapen, not finite, contradictory
    or of another model.

    Attributes
    ----------
    missing : tuple of str
        Names of the gradients that are missing, where that is what is wrong.
    """

    def __init__(self, message: str, *, missing: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


def as_tensor(name: str, value: Any) -> Tensor:
    """A tensor or an array as a tensor of its own dtype, without a graph.

    Arrays of float16, float32 and float64 are taken as they lie in memory. What torch cannot hold
    in place is copied: another byte order, long doubles (to float64), JAX's bfloat16, memory that
    is read-only or runs backwards.

    Raises
    ------
    UpdateError
        If ``value`` is neither a tensor nor an array of numbers.
    """
    if isinstance(value, Tensor):
        value = value.detach() if value.requires_grad else value
        return value if value.layout == torch.strided else value.to_dense()
    if value is None:
        raise UpdateError(
            f"{name!r} is None, as p.grad is where no gradient arrived: leave it out, or put torch.zeros_like(p)"
        )
    if hasattr(value, "__array__") or callable(getattr(value, "numpy", None)):
        array = np.asarray(value if hasattr(value, "__array__") else value.numpy())
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.astype(np.float32)).bfloat16()
        if array.dtype.kind in "fiubc":
            return torch.from_numpy(_native(array))
    raise UpdateError(f"{name!r} is a {type(value).__name__}: an update holds tensors or numpy arrays of numbers")


def _native(array: np.ndarray) -> np.ndarray:
    """The array in a dtype, byte order and memory that torch can use in place."""
    dtype = array.dtype.newbyteorder("=")
    if dtype.kind in "fc" and dtype.itemsize > 8 * (1 + (dtype.kind == "c")):
        dtype = np.dtype(np.float64 if dtype.kind == "f" else np.complex128)
    usable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return array.astype(dtype, copy=not usable)


def as_gradient(name: str, value: Any) -> Tensor:
    """A tensor or an array as a tensor in one of :data:`DTYPES`.

    Raises
    ------
    UpdateError
        If it is none, or holds no such floats.
    """
    tensor = as_tensor(name, value)
    if tensor.dtype not in DTYPES:
        remedy = "convert it with .float()" if tensor.dtype.is_floating_point else "leave counters and masks out"
        raise UpdateError(f"{name!r} is {tensor.dtype}; gradients are {_FLOATS}: {remedy}")
    return tensor


def is_zero(tensor: Tensor) -> bool:
    """Whether every entry is zero; a look at one entry settles most cases."""
    return tensor.numel() == 0 or (not bool(tensor[(0,) * tensor.ndim]) and not bool(tensor.any()))


def count_not_finite(tensor: Tensor) -> int:
    """Entries that are NaN or infinite.

    A sum is ten times cheaper than a look at every entry, but a sum of finite numbers may overflow.
    """
    return 0 if bool(torch.isfinite(tensor.sum())) else int((~torch.isfinite(tensor)).sum())
