"""One round of federated learning played from both sides, and scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import dissect
from ..attacks.catalogue import ATTACKS
from ..attacks.invert import invert
from ..attacks.replay import Loss
from ..attacks.result import Reconstruction
from ..metrics import psnr, ssim
from ..update import client_update, logits_of


@dataclass(frozen=True)
class Played:
    """What the attacker got in one round, and how near it is, which only whoever holds the original
    can tell.

    Attributes
    ----------
    reconstruction : Reconstruction
    psnr, ssim : float
        Against the original, on pixels in [0, 1]; dB, and at most 1.
    gradient_seconds : float
        Wall-clock time of the client's forward and backward pass, after one forward pass to warm
        up.
    label : int
        The true one.
    """

    reconstruction: Reconstruction
    psnr: float
    ssim: float
    gradient_seconds: float
    label: int


def play_round(
    model: nn.Module,
    pixels: Tensor,
    label: int,
    *,
    attack: str = "auto",
    loss: Loss | None = None,
    judging: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
) -> Played:
    """Be the client with one private picture, then the server that attacks what the client shares.

    Parameters
    ----------
    model : nn.Module
    pixels : Tensor of shape (C, H, W), in [0, 1]
    label : int
    attack : "auto" or a key of :data:`~aprillab.attacks.ATTACKS`
    loss : (logits, labels) to a scalar, optional
        The client's, which the server knows then; default is cross-entropy, which a search assumes
        and a closed form need not.
    judging : mapping, optional
        ``strict`` and ``verify`` of :func:`aprillab.invert`, for ``"auto"`` and the closed forms.
    search : mapping, optional
        Options of an attack that searches, such as ``max_evaluations``, for these.

    Raises
    ------
    AttackNotApplicable
        If no such attack applies.

    Examples
    --------
    >>> import aprillab as al
    >>> model = al.VisionTransformer(image_size=16, patch_size=4, width=64, depth=1, heads=2, classes=10)
    >>> played = play_round(model, al.load_victim("coffee", 16), 3)
    >>> played.psnr > 59, played.label
    (True, 3)
    """
    anatomy = dissect(model)
    images = anatomy.preprocessing.to_input(pixels[None].to(next(model.parameters())))  # (1, C, H, W)
    logits_of(model, images)  # The first pass pays for set-up and memory, which no later one does.
    labels = torch.tensor([label], device=images.device)
    update = client_update(model, images, labels, loss=loss or nn.functional.cross_entropy)
    if attack in ATTACKS and ATTACKS[attack].searches:
        options = {**(search or {}), **({} if loss is None else {"loss": loss})}
        found = ATTACKS[attack].function(model, update, anatomy=anatomy, **options)
    else:
        found = invert(model, update, attack=attack, anatomy=anatomy, loss=loss, **(judging or {}))
    original = pixels.to(found.pixels)
    return Played(
        reconstruction=found,
        psnr=float(psnr(found.pixels[0], original)),
        ssim=float(ssim(found.pixels[0], original)),
        gradient_seconds=float(update.seconds or 0.0),
        label=label,
    )
