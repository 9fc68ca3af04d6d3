"""A check that needs no original: does the reconstruction produce the update it was taken from?"""

from __future__ import annotations

import torch
from torch import nn

from ..update import ClientUpdate, client_update
from .result import Reconstruction


def gradient_residual(model: nn.Module, update: ClientUpdate, reconstruction: Reconstruction) -> float | None:
    """Relative distance ‖∇w' − ∇w‖ / ‖∇w‖ between the reconstruction's gradient and the client's.

    The attacker plays the client with the picture it found. A small value does not prove the picture right (twin
    data, chapter 05); a large one proves it wrong, or the label, or the model. Costs one gradient.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate
    reconstruction : Reconstruction, whose labels must be known

    Returns
    -------
    float or None
        None where the labels are not known. Rounding alone leaves about 1e-6 in float32, 1e-15 in float64.
    """
    if reconstruction.labels is None:
        return None
    parameter = next(model.parameters())
    images = reconstruction.images.to(parameter)
    replayed = client_update(model, images, reconstruction.labels.to(parameter.device))
    common = [name for name in update.gradients if name in replayed.gradients]
    squares = [
        (replayed.gradients[name].double() - update.gradients[name].to(parameter.device, torch.float64))
        .square()
        .sum()
        for name in common
    ]
    total = [update.gradients[name].double().square().sum() for name in common]
    return float((sum(squares) / sum(total).clamp_min(1e-300)) ** 0.5)  # type: ignore[union-attr]
