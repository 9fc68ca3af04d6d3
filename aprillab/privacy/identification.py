"""Which of M known pictures was it? The attacker who need not reconstruct, only recognize.

It has M candidates and the model, so it has their M clipped gradients g₁ … g_M. It sees one of
them plus normal noise, in one round or several, and names the nearest. For equally probable
candidates nobody can do better: the nearest is the most probable. How often that succeeds depends
on the distances between the gradients alone, in units of the noise; noise that leaves no picture
may leave every name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..update import UpdateError, logits_of
from .accounting import check_single_images


def clipped_gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    clip: float,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> Tensor:
    """The gradient of each image, as a client with one image would share it: clipped, without
    noise.

    Parameters
    ----------
    model : nn.Module
        As it stands, in the mode it is in; left unchanged. Dropout would make distances random.
    images : Tensor of shape (M, C, H, W), in model-input space
    labels : Tensor of M targets
    clip : float, C
        Gradients of a larger L2 norm are scaled down to it, smaller ones stay as they are.
    loss : (logits, labels) to a scalar, of one image

    Returns
    -------
    Tensor of shape (M, N), in the model's dtype
        N is the number of trained parameters: M times the model in memory.

    Raises
    ------
    ValueError
        If ``clip`` is not positive and finite, images and labels do not go together, or a row of
        ``images`` is several: clipping their gradient as a whole bounds none of them.
    UpdateError
        If no parameter is trained, or a gradient is not finite.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> clipped_gradients(model, images, torch.tensor([0, 1, 2]), 0.5).norm(dim=1)
    tensor([0.5000, 0.5000, 0.5000])
    """
    if not 0 < clip < math.inf:
        raise ValueError(f"clip={clip} must be positive and finite")
    check_single_images(images)
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: as many of one as of the other, and some")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UpdateError("no parameter of the model is trained: there is no gradient to tell pictures apart by")
    rows = []
    with torch.enable_grad():
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            gradients = torch.autograd.grad(loss(logits_of(model, image), label), trained, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in gradients]))
            norm = rows[-1].double().norm()
            if not bool(norm.isfinite()):
                raise UpdateError(f"the gradient of image {len(rows) - 1} is not finite")
            rows[-1] *= min(1.0, clip / max(float(norm), torch.finfo(norm.dtype).tiny))
    return torch.stack(rows)


def gradient_distances(gradients: Tensor) -> Tensor:
    """Euclidean distances between the rows of (M, N), as float64 of shape (M, M).

    Several rounds at different weights count together as the root of the sum of their squares.

    Examples
    --------
    >>> gradient_distances(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    tensor([[0., 5.],
            [5., 0.]], dtype=torch.float64)
    """
    if gradients.ndim != 2:
        raise ValueError(f"gradients of shape {tuple(gradients.shape)}: one row a candidate is wanted, (M, N)")
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=gradients.device)
    for part in gradients.split(2**16, dim=1):  # in float64, a part of the entries at a time
        centred = part.double() - part.double().mean(0)
        gram += centred @ centred.mT
    own = gram.diagonal()
    # Differences of products: distances below 1e-8 of the gradients' size are rounding.
    return (own[:, None] + own - 2 * gram).clamp(min=0).fill_diagonal_(0).sqrt()


def identification_rates(
    distances: Tensor, noise: float, *, rounds: int = 1, samples: int = 2000, seed: int = 0
) -> Tensor:
    """How often the best attacker names each candidate when it is the one, by simulation.

    Only M numbers of the noise matter, its projections on the gradients; they are drawn with the
    covariance that the distances say, so that the gradients themselves are not needed.

    Parameters
    ----------
    distances : Tensor of shape (M, M)
        Between the clipped gradients: :func:`gradient_distances`.
    noise : float
        Deviation of the noise in an entry, in the gradients' units: noise multiplier times C.
    rounds : int
        With the same picture at the same weights and fresh noise: the mean has noise/√rounds. For
        different weights give the distances of all rounds together, and ``rounds=1``.
    samples : int
        Simulated updates a candidate: a rate's standard error is at most 0.5/√samples.
    seed : int

    Returns
    -------
    float64 Tensor of shape (M,), on the CPU
        Their mean is the rate for a candidate drawn at random; candidates with one
        gradient share theirs.

    Raises
    ------
    ValueError
        If the distances are not such, or a number makes no sense.

    Examples
    --------
    Two candidates, two units of noise apart: Φ(1) = 0.841

    >>> rates = identification_rates(torch.tensor([[0.0, 2.0], [2.0, 0.0]]), 1.0, samples=100_000)
    >>> [round(float(rate), 2) for rate in rates]
    [0.84, 0.84]
    """
    _check_distances(distances)
    if not 0 < noise < math.inf:
        raise ValueError(f"noise={noise} must be positive and finite, in the gradients' units")
    for name, value in (("rounds", rounds), ("samples", samples)):
        if value != int(value) or value < 1:
            raise ValueError(f"{name}={value} must be a whole number from 1 up")
    d = distances.detach().cpu().double() * (math.sqrt(rounds) / noise)
    m = len(d)
    # Gram matrix of the gradients around their mean, in units of the noise: −½ J D² J.
    gram = -0.5 * d.square()
    gram = gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean()
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt()  # rows: the candidates, as points in M dimensions
    generator = torch.Generator().manual_seed(seed)
    right = torch.zeros(m, dtype=torch.float64)
    for _ in range(samples):
        # One draw of noise for every candidate in turn. Column k: how near an update of k is
        # to each candidate.
        scores = gram - 0.5 * gram.diagonal()[:, None]
        scores = scores + root @ torch.randn(m, m, dtype=torch.float64, generator=generator)
        top = scores == scores.amax(0)  # several: one of them is named, by lot
        right += top.diagonal() / top.sum(0)
    return right / samples


def identification_rate(
    distances: Tensor, noise: float, *, rounds: int = 1, samples: int = 2000, seed: int = 0
) -> float:
    """How often the best attacker names the right one of M equally probable candidates.

    The mean of :func:`identification_rates`, with its arguments and errors. No more than
    :func:`~aprillab.privacy.success_bound` of 1/M allows, up to the simulation's error.

    Examples
    --------
    Far below the noise, all are alike:

    >>> round(identification_rate(1e-3 * (1 - torch.eye(10)), 1.0), 1)
    0.1
    """
    return float(identification_rates(distances, noise, rounds=rounds, samples=samples, seed=seed).mean())


def _check_distances(distances: Tensor) -> None:
    shape = tuple(distances.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 2:
        raise ValueError(f"distances of shape {shape}: a square, (M, M), of at least two candidates is wanted")
    if not bool(distances.isfinite().all()) or bool((distances < 0).any()):
        raise ValueError("distances must be finite and not negative")
    if not torch.allclose(distances, distances.mT) or bool(distances.diagonal().any()):
        raise ValueError("distances must be symmetric, with zeros on the diagonal")
