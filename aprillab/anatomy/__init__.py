"""Where a Vision Transformer keeps what an attack reads: :func:`dissect` returns an
:class:`Anatomy`.
"""

from .adapters import what_adapters
from .dissect import dissect
from .playing import hooked, playable
from .positions import likely_size, position_gradient, position_values
from .record import Anatomy, Rows, UnknownModelError, tensors_of
from .tiling import Tiling

__all__ = [
    "Anatomy",
    "Rows",
    "Tiling",
    "UnknownModelError",
    "dissect",
    "hooked",
    "likely_size",
    "playable",
    "position_gradient",
    "position_values",
    "tensors_of",
    "what_adapters",
]
