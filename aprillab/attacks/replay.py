"""A check that needs no original: does the reconstruction produce the update it was taken from?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..update import ClientUpdate, client_update, fitted
from .result import Reconstruction

Loss = Callable[[Tensor, Tensor], Tensor]


def gradient_residual(
    model: nn.Module,
    update: ClientUpdate,
    reconstruction: Reconstruction,
    *,
    loss: Loss = nn.functional.cross_entropy,
) -> float | None:
    """Relative distance ‖∇w' − ∇w‖ / ‖∇w‖ between the reconstruction's gradient and the client's.

    The attacker plays the client with the picture it found. A small value does not prove the
    picture right (twin data, chapter 05); a large one proves it wrong, or the label, or the model.
    Costs one gradient.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate
    reconstruction : Reconstruction, whose labels must be known
    loss : the client's, (logits, labels) to a scalar

    Returns
    -------
    float or None
        None where the labels are not known. Rounding alone leaves about 1e-6 in float32, 1e-15 in
        float64.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import torch, aprillab as al
    >>> shape = {"image_size": 16, "patch_size": 4, "width": 64, "depth": 1, "heads": 2, "classes": 10}
    >>> model = al.VisionTransformer(**shape)
    >>> pixels = al.load_victim("coffee", 16)[None]
    >>> update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    >>> found = al.invert(model, update, verify=False)
    >>> gradient_residual(model, update, found) < 1e-5
    True
    >>> round(gradient_residual(model, update, replace(found, labels=torch.tensor([4]))), 1)
    3.3
    """
    if reconstruction.labels is None:
        return None
    update = fitted(model, update, finite=())
    client = as_shared(model, update)
    return residual_of(replay(client, reconstruction.images, reconstruction.labels, loss=loss), update)


def as_shared(model: nn.Module, update: ClientUpdate) -> nn.Module:
    """The model if its trainable parameters are those of the update, else a copy for which that is
    so.
    """
    wanted = {name: name in update.gradients for name, _ in model.named_parameters()}
    if all(parameter.requires_grad == wanted[name] for name, parameter in model.named_parameters()):
        return model
    copied = copy.deepcopy(model)
    for name, parameter in copied.named_parameters():
        parameter.requires_grad_(wanted[name])
    return copied


def replay(client: nn.Module, images: Tensor, labels: Tensor, *, loss: Loss) -> dict[str, Tensor]:
    """The gradients of other pictures, on the client's device and in its precision; no random state
    is changed.
    """
    parameter = next(client.parameters())
    with torch.random.fork_rng(devices=[parameter.device] if parameter.is_cuda else []):
        update = client_update(client, images.to(parameter), labels.to(parameter.device), loss=loss)
    return dict(update.gradients)


def residual_of(gradients: Mapping[str, Tensor], update: ClientUpdate, *names: str) -> float:
    """‖g' − g‖ / ‖g‖ over the tensors called ``names``, by default all that are in both."""
    off, size = [], []
    for name in names or update.gradients:
        if name in gradients:
            mine, shared = gradients[name].double(), update.gradients[name].to(gradients[name].device).double()
            off.append((mine - shared).square().sum())
            size.append(shared.square().sum())
    return float((torch.stack(off).sum() / torch.stack(size).sum().clamp_min(1e-300)) ** 0.5)
