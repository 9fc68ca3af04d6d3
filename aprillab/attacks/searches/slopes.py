"""The distances of objectives.py with their slopes ∂D/∂g' in closed form.

The search asks hundreds of times how far gradients g' are from the same targets g, and where
downhill is. Here the targets' sizes are computed once, and a distance yields D, the residual and
the slope in two or three passes over the gradients; autograd would take some ten. Tested equal to
autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .objectives import Distance, relative_weights


@dataclass(frozen=True)
class Match:
    """How far gradients g' are from the targets g.

    Attributes
    ----------
    distance : scalar Tensor
        D.
    residual : scalar Tensor
        ‖g' − g‖ / ‖g‖ over all tensors.
    slopes : sequence of Tensor
        ∂D/∂g' divided by ``scale``, one a tensor: a factor they share costs less after the second
        backward pass, on the picture.
    scale : float, or a scalar Tensor where to ask for the number were to wait for the card
    """

    distance: Tensor
    residual: Tensor
    slopes: Sequence[Tensor]
    scale: float | Tensor


Matcher = Callable[[Sequence[Tensor]], Match]
"""Gradients, in the order of the targets, to how far they are from them."""


def matcher(distance: str | Distance, targets: Sequence[Tensor], eps: float) -> Matcher:
    """The matcher of a distance for these targets.

    Parameters
    ----------
    distance : key of :data:`MATCHERS`, or callable
        A callable is differentiated by autograd.
    targets : sequence of Tensor
        The shared gradients.
    eps : float
        The relative rounding error of the numbers in which they were shared.

    Examples
    --------
    >>> g = [torch.tensor([3.0, 4.0])]
    >>> found = matcher("l2", g, 1e-7)([torch.tensor([3.0, 5.0])])
    >>> found.distance, found.residual, found.scale * found.slopes[0]
    (tensor(1.), tensor(0.2000), tensor([0., 2.]))
    """
    if callable(distance):
        return _by_autograd(distance, targets)
    return MATCHERS[distance](targets, eps)


def _size(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors as one vector, a scalar."""
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


# A tensor at a time in the loops below: what is done to it next finds it in the processor's cache.


def _l2(targets: Sequence[Tensor], _: float) -> Matcher:
    size = _size(targets)

    def match(gradients: Sequence[Tensor]) -> Match:
        norms, slopes = [], []
        for mine, shared in zip(gradients, targets, strict=True):
            difference = mine - shared
            norms.append(difference.norm())
            slopes.append(difference)  # ∂D/∂g' = 2 (g' − g)
        norm = torch.stack(norms).norm()
        return Match(norm.square(), norm / size, slopes, 2.0)

    return match


def _relative_l2(targets: Sequence[Tensor], eps: float) -> Matcher:
    size, weights = _size(targets), relative_weights(targets, eps)
    k, factors = len(targets), weights.tolist()

    def match(gradients: Sequence[Tensor]) -> Match:
        norms, slopes = [], []
        for mine, shared, factor in zip(gradients, targets, factors, strict=True):
            difference = mine - shared
            norms.append(difference.norm())
            slopes.append(difference.mul_(factor))  # ∂D/∂g'_j = 2/k · w_j (g'_j − g_j), of k tensors
        apart = torch.stack(norms)
        return Match((weights * apart.square()).mean(), apart.norm() / size, slopes, 2 / k)

    return match


def _balanced_l2(targets: Sequence[Tensor], eps: float) -> Matcher:
    size, weights, k = _size(targets), relative_weights(targets, eps), len(targets)

    def match(gradients: Sequence[Tensor]) -> Match:
        slopes = [mine - shared for mine, shared in zip(gradients, targets, strict=True)]
        apart, strength = (torch.stack([tensor.norm() for tensor in some]) for some in (slopes, gradients))
        # Of each tensor w ‖g' − g‖² and 1 + w ‖g'‖²: D_j is twice their ratio.
        relative, both = weights * apart.square(), 1 + weights * strength.square()
        # ∂D/∂g'_j = 4/k · (a (g'_j − g_j) − b g'_j), of k tensors
        factors, pulls = weights / both, weights * relative / both.square()
        for difference, mine, a, b in zip(slopes, gradients, factors, pulls, strict=True):
            difference.mul_(a).addcmul_(mine, b, value=-1)
        return Match((2 * relative / both).mean(), apart.norm() / size, slopes, 4 / k)

    return match


def _l2_l1(targets: Sequence[Tensor], _: float, l1_weight: float = 0.01) -> Matcher:
    size = _size(targets)

    def match(gradients: Sequence[Tensor]) -> Match:
        norms, absolute, slopes = [], [], []
        for mine, shared in zip(gradients, targets, strict=True):
            difference = mine - shared
            norms.append(difference.norm())
            absolute.append(difference.norm(1))
            slopes.append(difference.add_(difference.sign(), alpha=l1_weight / 2))  # ∂D/∂g' = 2 (g' − g) + w sign(…)
        norm = torch.stack(norms).norm()
        return Match(norm.square() + l1_weight * torch.stack(absolute).sum(), norm / size, slopes, 2.0)

    return match


def _cosine(targets: Sequence[Tensor], _: float) -> Matcher:
    size, flat = _size(targets), [target.flatten() for target in targets]
    coarse = torch.finfo(size.dtype).eps ** 0.5

    def match(gradients: Sequence[Tensor]) -> Match:
        # g'·g and ‖g'‖²
        products = [(x @ y, x @ x) for x, y in zip((g.flatten() for g in gradients), flat, strict=True)]
        dot, square = (torch.stack(column).sum() for column in zip(*products, strict=True))
        square = square.clamp_min(torch.finfo(size.dtype).tiny)
        norm = square.sqrt()
        distance = 1 - dot / (norm * size)
        relative = (square - 2 * dot + size.square()) / size.square()  # ‖g' − g‖² / ‖g‖²
        # So near a match half of the digits have cancelled: take the difference itself. On CUDA
        # always, since to ask is to wait.
        if size.is_cuda or relative < coarse:
            apart = _size([mine - shared for mine, shared in zip(gradients, targets, strict=True)])
            distance = (apart.square() - (norm - size).square()) / (2 * norm * size)
            relative = (apart / size).square()
        # ∂D/∂g' = −(g − c g') / (‖g'‖ ‖g‖), c = g'·g / ‖g'‖²
        c, scale, pairs = dot / square, -1 / (norm * size), list(zip(gradients, targets, strict=True))
        if size.is_cuda:
            slopes = [torch.addcmul(shared, mine, c, value=-1) for mine, shared in pairs]
            return Match(distance, relative.sqrt(), slopes, scale)
        number = float(c)
        slopes = [torch.sub(shared, mine, alpha=number) for mine, shared in pairs]
        return Match(distance, relative.sqrt(), slopes, float(scale))

    return match


def _by_autograd(distance: Distance, targets: Sequence[Tensor]) -> Matcher:
    size = _size(targets)

    def match(gradients: Sequence[Tensor]) -> Match:
        leaves = [gradient.detach().requires_grad_() for gradient in gradients]
        with torch.enable_grad():
            value = distance(leaves, targets)
            slopes = torch.autograd.grad(value, leaves, materialize_grads=True)
        apart = _size([mine - shared for mine, shared in zip(gradients, targets, strict=True)])
        return Match(value.detach(), apart / size, slopes, 1.0)

    return match


MATCHERS: dict[str, Callable[[Sequence[Tensor], float], Matcher]] = {
    "l2": _l2,
    "relative_l2": _relative_l2,
    "balanced_l2": _balanced_l2,
    "l2_l1": _l2_l1,
    "cosine": _cosine,
}
"""Targets and ε to a matcher, by the names of the distances in objectives.py."""
