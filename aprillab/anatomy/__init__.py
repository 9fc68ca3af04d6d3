"""Where a Vision Transformer keeps what an attack reads: :func:`dissect` returns an :class:`Anatomy`."""

from .dissect import Anatomy, Rows, UnknownModelError, dissect, tensors_of

__all__ = ["Anatomy", "Rows", "UnknownModelError", "dissect", "tensors_of"]
