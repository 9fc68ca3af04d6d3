"""Defences: what a client does to its update before it shares it, and what a server can choose in
the model.

The first are plain functions ``ClientUpdate -> ClientUpdate`` and compose by nesting; the update
handed in is left as it is, and names, shapes and devices stay:

    shared = to_precision(gaussian_noise(clip(update, 1.0), 1e-4, seed=0), torch.bfloat16)

The others change a model in place and return it. Each says what it does *not* protect against.
Chapter 06 measures them against attacks that do not know about them, chapters 07 and 11 against
some that do. A guarantee comes with clipping and noise alone: chapter 11, and ``aprillab.privacy``.
"""

from .client import clip, gaussian_noise, prune, quantize, sign, to_precision, update_norm, withhold
from .server import freeze_position, no_position, use_sinusoidal

__all__ = [
    "clip",
    "freeze_position",
    "gaussian_noise",
    "no_position",
    "prune",
    "quantize",
    "sign",
    "to_precision",
    "update_norm",
    "use_sinusoidal",
    "withhold",
]
