"""What one noisy update says about each pixel: Fisher's information, and the error that it leaves.

The update is y = g(x) + σC ξ, with x the picture, g its clipped gradient and ξ standard normal.
With the Jacobian J = ∂g/∂x (parameters × pixels) the information about x is

    F = T Jᵀ J / (σC)²,

for this model, this picture, known label and T rounds at these weights. It is local: it says how
well x is told from its neighbours, nothing about pictures far away with the same gradient. Its
inverse is what the best linear attack would leave if the gradient were linear around x.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..update import UpdateError, logits_of


def pixel_information(
    model: nn.Module,
    image: Tensor,
    label: Tensor,
    *,
    clip: float,
    noise_multiplier: float,
    rounds: int = 1,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    at_once: int = 16,
) -> Tensor:
    """F of one picture, whole: for pictures and models that are small.

    Parameters
    ----------
    model : nn.Module, left as it is
    image : Tensor of shape (1, C, H, W), in model-input space
    label : Tensor of one target, taken as known
    clip : float, C
        The gradient is scaled down to it if it is longer, and that is part of g.
    noise_multiplier : float, σ
    rounds : int, T
    loss : (logits, labels) to a scalar
    at_once : int
        Columns of J that are computed together, for memory.

    Returns
    -------
    float64 Tensor of shape (n, n), n = C·H·W
        Per square of the input's unit. J takes n times the model's memory, and n
        forward-mode passes.

    Raises
    ------
    ValueError
        If a number makes no sense.
    UpdateError
        If no parameter is trained, or the gradient is not finite.

    Examples
    --------
    The gradient of a dense layer's weight is the picture itself, so each pixel has 1/(σC)²:

    >>> layer = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
    >>> picture, summed = torch.full((1, 1, 2, 2), 0.5), lambda logits, _: logits.sum()
    >>> pixel_information(layer, picture, torch.tensor([0]), clip=10.0, noise_multiplier=0.1, loss=summed).diagonal()
    tensor([1., 1., 1., 1.], dtype=torch.float64)
    """
    gradient = _clipped_gradient(model, image, label, clip, loss)
    scale = _scale(clip, noise_multiplier, rounds)
    unit = torch.eye(image.numel(), dtype=image.dtype, device=image.device).reshape(-1, *image.shape)
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        columns = torch.cat([_pushed(gradient, image, part) for part in unit.split(at_once)])
    information = torch.zeros(len(columns), len(columns), dtype=torch.float64, device=image.device)
    for part in columns.split(2**16, dim=1):
        information += part.double() @ part.double().mT
    return information * scale


def mean_pixel_information(
    model: nn.Module,
    image: Tensor,
    label: Tensor,
    *,
    clip: float,
    noise_multiplier: float,
    rounds: int = 1,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    probes: int = 16,
    seed: int = 0,
) -> float:
    """The mean of F's diagonal, by probing: for large models. 1 over it bounds the error from
    below.

    tr F/n = E‖J v‖² T/(n σ²C²) over vectors v of random signs (Hutchinson). By the inequality of
    means tr F⁻¹/n ≥ n/tr F, so that the unbiased attacker's mean squared error is at least the
    inverse of what is returned: Guo et al.'s bound. It is far below :func:`cramer_rao_mse` where
    some pixels are known much better than others.

    Parameters
    ----------
    model, image, label, clip, noise_multiplier, rounds, loss
        As for :func:`pixel_information`.
    probes : int
        Passes; the relative error falls with their root.
    seed : int

    References
    ----------
    Guo, Karrer, Chaudhuri & van der Maaten, ICML 2022, arXiv:2201.12383.

    Examples
    --------
    >>> layer = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
    >>> picture, summed = torch.full((1, 1, 2, 2), 0.5), lambda logits, _: logits.sum()
    >>> mean_pixel_information(layer, picture, torch.tensor([0]), clip=10.0, noise_multiplier=0.1, loss=summed)
    1.0
    """
    if probes < 1:
        raise ValueError(f"probes={probes} must be at least 1")
    gradient = _clipped_gradient(model, image, label, clip, loss)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        for _ in range(probes):
            signs = torch.randint(0, 2, image.shape, generator=generator).to(image) * 2 - 1
            total += float(_pushed(gradient, image, signs[None]).double().square().sum())
    return total / (probes * image.numel()) * _scale(clip, noise_multiplier, rounds)


def cramer_rao_mse(information: Tensor, prior: float | Tensor = 0.0) -> float:
    """The least mean squared error per pixel that this information allows: tr (F + P)⁻¹/n.

    With ``prior=0`` it is the Cramér-Rao bound, for *unbiased* attackers: infinite if some
    direction of the picture leaves no trace. With a prior it is van Trees' bound for *all*
    attackers, and for the mean over pictures drawn from the prior: F is then the mean of
    theirs, and the prior's density must be smooth and vanish at the ends of its range. (That
    of [0, 1] does not.)

    Parameters
    ----------
    information : Tensor of shape (n, n), F
    prior : float or Tensor of shape (n, n), P
        The prior's own information: the inverse of the covariance for a normal one; a number stands
        for that many times the identity, 1/s² for independent pixels of variance s².

    Returns
    -------
    float, in squares of the input's unit

    References
    ----------
    Guo, Karrer, Chaudhuri & van der Maaten, ICML 2022, arXiv:2201.12383 (without a prior).

    Examples
    --------
    >>> known = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    >>> cramer_rao_mse(known), cramer_rao_mse(known, prior=4.0)
    (inf, 0.225)
    """
    if information.ndim != 2 or information.shape[0] != information.shape[1]:
        raise ValueError(f"information of shape {tuple(information.shape)}: a square, (n, n), is wanted")
    n = len(information)
    total = information.double()
    total = total + (prior if isinstance(prior, Tensor) else prior * torch.eye(n).to(total))
    values = torch.linalg.eigvalsh(total)
    if float(values.min()) <= n * torch.finfo(torch.float64).eps * float(values.max()):
        return math.inf
    return float((1 / values).mean())


def _clipped_gradient(
    model: nn.Module, image: Tensor, label: Tensor, clip: float, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """x ↦ g(x), (N,), for torch.func."""
    if len(image) != 1 or len(label) != 1:
        raise ValueError(f"{len(image)} images and {len(label)} labels: one of each")
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UpdateError("no parameter of the model is trained: there is no gradient")

    def loss_of(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(logits_of(_Called(model, weights), x), label)

    def gradient(x: Tensor) -> Tensor:
        whole = torch.cat([g.flatten() for g in torch.func.grad(loss_of)(trained, x).values()])
        norm = whole.norm()
        return torch.where(norm > clip, clip / norm, torch.ones_like(norm)) * whole

    if not bool(gradient(image).isfinite().all()):
        raise UpdateError("the picture's gradient is not finite, or zero")
    return gradient


class _Called(nn.Module):
    """A model with other weights in its place, for ``logits_of``."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.call = (model, weights)

    def forward(self, images: Tensor) -> Tensor:
        """The model's output."""
        return torch.func.functional_call(*self.call, (images,))


def _pushed(gradient: Callable[[Tensor], Tensor], image: Tensor, directions: Tensor) -> Tensor:
    """J v for each direction, (k, N)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # torch's own use
        return torch.func.vmap(lambda v: torch.func.jvp(gradient, (image,), (v,))[1])(directions)


def _scale(clip: float, noise_multiplier: float, rounds: int) -> float:
    """T/(σC)²."""
    for name, value in (("clip", clip), ("noise_multiplier", noise_multiplier), ("rounds", rounds)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be positive and finite")
    return rounds / (noise_multiplier * clip) ** 2
