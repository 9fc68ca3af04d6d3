"""One round of federated learning played from both sides, and scored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anatomy import dissect
from ..attacks.invert import invert
from ..attacks.result import Reconstruction
from ..metrics import psnr, ssim
from ..update import client_update, logits_of


@dataclass(frozen=True)
class Round:
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


def play_round(model: nn.Module, pixels: Tensor, label: int, *, attack: str = "auto") -> Round:
    """Be the client with one private picture, then the server that attacks what the client shares.

    Parameters
    ----------
    model : nn.Module
    pixels : Tensor of shape (C, H, W), in [0, 1]
    label : int
    attack : {"auto", "embedding", "april", "span"}, as in :func:`aprillab.invert`

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
    update = client_update(model, images, torch.tensor([label], device=images.device))
    found = invert(model, update, attack=attack, anatomy=anatomy)
    original = pixels.to(found.pixels)
    return Round(
        reconstruction=found,
        psnr=float(psnr(found.pixels[0], original)),
        ssim=float(ssim(found.pixels[0], original)),
        gradient_seconds=float(update.seconds or 0.0),
        label=label,
    )
