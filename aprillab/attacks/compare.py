"""How far a picture's gradient is from an update: with one factor for all tensors, or
with one for each.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDING = 1e3  # ε: an entry this much smaller than other tensors' is rounding
_PART = 2**16  # entries compared at a time: in float64 they stay in the processor's cache
_SAMPLE = 2**12  # entries of each tensor that tell the factor nearly
_CANCELS = 1e6  # a square whose terms are so many times larger has lost six of float64's sixteen digits


def compare(
    mine: Mapping[str, Tensor], shared: Mapping[str, Tensor], reads: list[str] | None = None
) -> tuple[float, float]:
    """‖s g' − g‖ / ‖g‖ with the best s, the largest of all tensors' together and of each
    in ``reads``; and s.

    >>> g = {"weight": torch.tensor([1.0, 2.0])}
    >>> compare({"weight": torch.tensor([0.5, 1.0])}, g)
    (0.0, 2.0)
    """
    pairs = {name: (mine[name], g.to(mine[name].device)) for name, g in shared.items() if name in mine}
    factor, sums = _with_best_factor(pairs)
    misses = {name: (one.missed(factor), one.shared**0.5) for name, one in sums.items()}
    size = sum(b**2 for _, b in misses.values()) ** 0.5
    worst = [sum(a**2 for a, _ in misses.values()) ** 0.5 / max(size, 1e-300)]
    worst += [
        a / b for name in reads or () if name in misses and (b := misses[name][1]) > 0 for a in [misses[name][0]]
    ]
    return max(worst), factor


def own_factors(mine: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> tuple[float, float]:
    """As :func:`compare`, with a factor for each tensor: the r.m.s. of the tensors' misses,
    weighted by the root of their entries' number; and the largest factor over the least.
    """
    missed, size, factors = 0.0, 0.0, []
    # A key's bias has no gradient but rounding, which no factor makes another's.
    entries = {name: _norm(t) / t.numel() ** 0.5 for name, t in mine.items()}
    eps = max(torch.finfo(t.dtype).eps for t in mine.values())
    least = _ROUNDING * eps * max(entries.values())
    for name, g in shared.items():
        if not entries.get(name, 0.0) > least or not g.any():
            continue
        factor, sums = _with_best_factor({name: (mine[name], g.to(mine[name].device))})
        # The norms say nothing once each has a factor; the numbers of entries do, a little.
        weight = g.numel() ** 0.5
        missed += sums[name].missed(factor) ** 2 / sums[name].shared * weight
        size += weight
        factors.append(abs(factor))
    return (missed / size) ** 0.5 if size else 1.0, max(factors) / max(min(factors), 1e-300) if factors else 1.0


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


# --- Sums over the entries ----------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Of one tensor, with what a factor f misses, Δ = g − f g': f, Σ g'², Σ g², Σ g'Δ and Σ Δ²."""

    near: float
    mine: float
    shared: float
    across: float
    left: float

    def moved(self, factor: float) -> float:
        """‖(s − f) g'‖², by which another factor s moves the miss."""
        return (factor - self.near) ** 2 * self.mine

    def missed(self, factor: float) -> float:
        """‖s g' − g‖ = ‖(s − f) g' − Δ‖."""
        return max(self.left - 2 * (factor - self.near) * self.across + self.moved(factor), 0.0) ** 0.5


def _with_best_factor(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[float, dict[str, _Sums]]:
    """The s of least Σ ‖s g' − g‖² over pairs of g' and g, and the sums that tell each pair's miss.

    A sample gives so good a factor that one look at all entries does; where it was of another
    factor than the rest, a second one.
    """
    near = _best([_sums(0.0, a.flatten()[:_SAMPLE], b.flatten()[:_SAMPLE]) for a, b in pairs.values()])
    near = near if math.isfinite(near) else 0.0
    sums = {name: _sums(near, *pair) for name, pair in pairs.items()}
    factor = _best(sums.values())
    if any(one.moved(factor) > _CANCELS * one.missed(factor) ** 2 for one in sums.values()):
        sums = {name: _sums(factor, *pair) for name, pair in pairs.items()}
        factor = _best(sums.values())
    return factor, sums


def _sums(near: float, mine: Tensor, shared: Tensor) -> _Sums:
    """In float64, a part after the other."""
    found = []
    for part, other in zip(mine.flatten().split(_PART), shared.flatten().split(_PART), strict=True):
        a, b = part.double(), other.double()
        miss = torch.sub(b, a, alpha=near)
        found += [a.dot(a), b.dot(b), a.dot(miss), miss.dot(miss)]
    squares, of_shared, across, left = torch.stack(found).view(-1, 4).sum(0).tolist()
    return _Sums(near, squares, of_shared, across, left)


def _best(sums: Collection[_Sums]) -> float:
    """The factor of least squares; 0 where all of g' is zero."""
    squares = sum(one.mine for one in sums)
    return next(iter(sums)).near + sum(one.across for one in sums) / squares if squares > 0 else 0.0
