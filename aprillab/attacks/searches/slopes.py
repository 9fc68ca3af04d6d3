"""The distances of objectives.py with their slopes ∂D/∂g' in closed form.

The search asks hundreds of times how far gradients g' are from the same targets g, and where downhill is.
Here the targets' sizes are computed once, and a distance yields D, the residual and the slope in two or
three passes over the gradients; autograd would take some ten. Tested equal to autograd's.
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
    scale : float
    """

    distance: Tensor
    residual: Tensor
    slopes: Sequence[Tensor]
    scale: float


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


def _sizes(tensors: Sequence[Tensor]) -> Tensor:
    """Norms of k tensors, (k,)."""
    return torch.stack(torch._foreach_norm(list(tensors)))


def _l2(targets: Sequence[Tensor], _: float) -> Matcher:
    size = _sizes(targets).norm()

    def match(gradients: Sequence[Tensor]) -> Match:
        differences = torch._foreach_sub(list(gradients), list(targets))
        norm = _sizes(differences).norm()
        return Match(norm.square(), norm / size, differences, 2.0)  # ∂D/∂g' = 2 (g' − g)

    return match


def _relative_l2(targets: Sequence[Tensor], eps: float) -> Matcher:
    size, weights = _sizes(targets).norm(), relative_weights(targets, eps)
    factors = weights.tolist()

    def match(gradients: Sequence[Tensor]) -> Match:
        differences = torch._foreach_sub(list(gradients), list(targets))
        norms = _sizes(differences)
        torch._foreach_mul_(differences, factors)  # ∂D/∂g'_j = 2/k · w_j (g'_j − g_j), of k tensors
        return Match((weights * norms.square()).mean(), norms.norm() / size, differences, 2 / len(factors))

    return match


def _balanced_l2(targets: Sequence[Tensor], eps: float) -> Matcher:
    size, weights = _sizes(targets).norm(), relative_weights(targets, eps)

    def match(gradients: Sequence[Tensor]) -> Match:
        slopes = torch._foreach_sub(list(gradients), list(targets))
        norms = _sizes(slopes)
        # Of each tensor w ‖g' − g‖² and 1 + w ‖g'‖²: D_j is twice their ratio
        relative, both = weights * norms.square(), 1 + weights * _sizes(gradients).square()
        # ∂D/∂g'_j = 4/k · (a_j (g'_j − g_j) − b_j g'_j), of k tensors
        a, b = weights / both, weights * relative / both.square()
        torch._foreach_mul_(slopes, a.tolist())
        torch._foreach_sub_(slopes, torch._foreach_mul(list(gradients), b.tolist()))
        return Match((2 * relative / both).mean(), norms.norm() / size, slopes, 4 / len(norms))

    return match


def _l2_l1(targets: Sequence[Tensor], _: float, l1_weight: float = 0.01) -> Matcher:
    size = _sizes(targets).norm()

    def match(gradients: Sequence[Tensor]) -> Match:
        differences = torch._foreach_sub(list(gradients), list(targets))
        norm, absolute = _sizes(differences).norm(), torch.stack(torch._foreach_norm(differences, 1)).sum()
        slopes = torch._foreach_sign(differences)
        torch._foreach_mul_(slopes, l1_weight / 2)
        torch._foreach_add_(slopes, differences)  # ∂D/∂g' = 2 (g' − g) + w sign(g' − g)
        return Match(norm.square() + l1_weight * absolute, norm / size, slopes, 2.0)

    return match


def _cosine(targets: Sequence[Tensor], _: float) -> Matcher:
    flat, size = [target.flatten() for target in targets], _sizes(targets).norm()
    coarse = torch.finfo(size.dtype).eps ** 0.5

    def match(gradients: Sequence[Tensor]) -> Match:
        # g'·g and ‖g'‖², of a tensor one after the other, while it is in the cache
        products = [(x @ y, x @ x) for x, y in zip((g.flatten() for g in gradients), flat, strict=True)]
        dot, square = (torch.stack(column).sum() for column in zip(*products, strict=True))
        square = square.clamp_min(torch.finfo(size.dtype).tiny)
        norm = square.sqrt()
        distance = 1 - dot / (norm * size)
        relative = (square - 2 * dot + size.square()) / size.square()  # ‖g' − g‖² / ‖g‖²
        if relative < coarse:
            # So near a match half of the digits have cancelled: take the difference itself.
            difference = _sizes(torch._foreach_sub(list(gradients), list(targets))).norm()
            distance = (difference.square() - (norm - size).square()) / (2 * norm * size)
            relative = (difference / size).square()
        # ∂D/∂g' = −(g − (g'·g / ‖g'‖²) g') / (‖g'‖ ‖g‖)
        slopes = torch._foreach_sub(list(targets), list(gradients), alpha=float(dot / square))
        return Match(distance, relative.sqrt(), slopes, -1 / float(norm * size))

    return match


def _by_autograd(distance: Distance, targets: Sequence[Tensor]) -> Matcher:
    size = _sizes(targets).norm()

    def match(gradients: Sequence[Tensor]) -> Match:
        leaves = [gradient.detach().requires_grad_() for gradient in gradients]
        with torch.enable_grad():
            value = distance(leaves, targets)
            slopes = torch.autograd.grad(value, leaves, materialize_grads=True)
        differences = torch._foreach_sub(list(gradients), list(targets))
        return Match(value.detach(), _sizes(differences).norm() / size, slopes, 1.0)

    return match


MATCHERS: dict[str, Callable[[Sequence[Tensor], float], Matcher]] = {
    "l2": _l2,
    "relative_l2": _relative_l2,
    "balanced_l2": _balanced_l2,
    "l2_l1": _l2_l1,
    "cosine": _cosine,
}
"""For each name in :data:`~aprillab.attacks.searches.objectives.DISTANCES`: targets and ε to a matcher."""
