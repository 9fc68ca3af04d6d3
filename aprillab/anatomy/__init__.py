"""Where a Vision Transformer keeps what an attack reads: :func:`dissect` returns an
:class:`Anatomy`.
"""

from .dissect import dissect
from .record import Anatomy, Rows, UnknownModelError, tensors_of

__all__ = ["Anatomy", "Rows", "UnknownModelError", "dissect", "tensors_of"]
