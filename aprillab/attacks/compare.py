"""How far a picture's gradient is from an update: with one factor for all tensors, or with one for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

_ROUNDING = 1e3  # ε: an entry this much smaller than other tensors' is rounding
_PART = 2**16  # entries compared at a time: in float64 they stay in the processor's cache


def compare(
    mine: Mapping[str, Tensor], shared: Mapping[str, Tensor], reads: list[str] | None = None
) -> tuple[float, float]:
    """‖s g' − g‖ / ‖g‖ with the best s, the largest of all tensors' together and of each in ``reads``; and s.

    >>> g = {"weight": torch.tensor([1.0, 2.0])}
    >>> compare({"weight": torch.tensor([0.5, 1.0])}, g)
    (0.0, 2.0)
    """
    pairs = {name: (mine[name], g.to(mine[name].device)) for name, g in shared.items() if name in mine}
    sums = {name: _sums(_squares, a, b) for name, (a, b) in pairs.items()}
    squares = sum(of_mine for _, of_mine, _ in sums.values())
    factor = sum(product for product, _, _ in sums.values()) / squares if squares > 0 else 0.0
    misses = {
        name: (_sums(partial(_missed, factor), a, b)[0] ** 0.5, sums[name][2] ** 0.5)
        for name, (a, b) in pairs.items()
    }
    size = sum(b**2 for _, b in misses.values()) ** 0.5
    worst = [sum(a**2 for a, _ in misses.values()) ** 0.5 / max(size, 1e-300)]
    worst += [
        a / b for name in reads or () if name in misses and (b := misses[name][1]) > 0 for a in [misses[name][0]]
    ]
    return max(worst), factor


def _sums(of: Callable[[Tensor, Tensor], tuple[Tensor, ...]], mine: Tensor, shared: Tensor) -> list[float]:
    """Sums over the entries of g' and g, in float64, a part after the other."""
    parts = zip(mine.flatten().split(_PART), shared.flatten().split(_PART), strict=True)
    return torch.stack([torch.stack(of(a.double(), b.double())) for a, b in parts]).sum(0).tolist()


def _squares(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (a * b).sum(), a.square().sum(), b.square().sum()


def _missed(factor: float, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return ((factor * a).sub_(b).square_().sum(),)


def own_factors(mine: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> tuple[float, float]:
    """As :func:`compare`, with a factor for each tensor: the r.m.s. of the tensors' misses, weighted by the root
    of their entries' number; and the largest factor over the least.
    """
    missed, size, factors = 0.0, 0.0, []
    # A key's bias has no gradient but rounding, which no factor makes another's.
    entries = {name: float(t.double().square().mean()) ** 0.5 for name, t in mine.items()}
    eps = max(torch.finfo(t.dtype).eps for t in mine.values())
    least = _ROUNDING * eps * max(entries.values())
    for name, g in shared.items():
        if not entries.get(name, 0.0) > least or not g.any():
            continue
        a, b = mine[name].double(), g.to(mine[name].device).double()
        factor = float((a * b).sum() / a.square().sum())
        length = float(b.norm())
        # The norms say nothing once each has a factor; the numbers of entries do, a little.
        weight = b.numel() ** 0.5
        missed, size = missed + float((factor * a - b).norm() / length) ** 2 * weight, size + weight
        factors.append(abs(factor))
    return (missed / size) ** 0.5 if size else 1.0, max(factors) / max(min(factors), 1e-300) if factors else 1.0
