"""What an attacker who knows the defence knows of each entry of an update: its error, said aloud.

A defence that is published, or read off the update, tells how far an entry may be from the
client's:

    Gaussian noise         σ
    rounding to levels     lies evenly within half a step δ:          δ/√12
    the same, at random    within a step, near values more often:     δ/√6 on the average
    signs times a mean m   |g| is as half a normal curve's:           m √(π/2 − 1)
    set to zero            lies evenly within ±t, t the threshold:    t/√3

The attacks weigh each entry by its error (:mod:`~aprillab.attacks.closed_forms.weighted_patches`).
An entry that is zero and may not be was set to zero: it lies within ±√3 times its error, and how
large such entries are is found from how many of them there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..update import ClientUpdate, UpdateError

_MOST_BITS = 24  # of a level: float32 holds no more, and defenses.quantize rounds to no more
_OFF_LEVELS = 4.0  # roundings by which an entry may miss its level
_ENOUGH = 100  # entries of a tensor that tell whether each tensor was pruned by itself


def told_errors(
    update: ClientUpdate,
    *,
    noise: float | None = None,
    pruned: bool = False,
    bits: int | None = None,
    stochastic: bool = False,
) -> ClientUpdate:
    """The same update with the ``errors`` that a known defence leaves in its entries.

    What is told adds up: the squares do. Hand the result to
    :func:`~aprillab.embedding_closed_form`, or to :func:`~aprillab.invert`. A norm that was clipped
    is a factor, which no attack minds.

    Parameters
    ----------
    update : ClientUpdate
        As it was shared. Errors that it has already stay, and are added to.
    noise : float, optional
        Standard deviation of Gaussian noise in each entry, in the update's own units: ``sigma`` of
        :func:`~aprillab.defenses.gaussian_noise`, or noise multiplier times clipping norm. For
        noise alone ``embedding_closed_form(..., noise=sigma)`` does more.
    pruned : bool
        Whether small entries were set to zero, as by :func:`~aprillab.defenses.prune`. Which, and
        the threshold, are read off the update: zeros, and the smallest magnitude that is not; of
        all tensors together, or of each tensor where all have the same share of zeros.
    bits : int from 1 to 24, optional
        Of :func:`~aprillab.defenses.quantize`: the step is the tensor's largest entry over
        2^(bits − 1) − 1. 1 is :func:`~aprillab.defenses.sign`.
    stochastic : bool
        Whether entries were rounded up or down at random; with ``bits`` from 2.

    Returns
    -------
    ClientUpdate
        With ``errors``: one standard deviation an entry, of the gradients' shapes, float32 (float64
        for float64 gradients). At least the rounding of the entry's own format.

    Raises
    ------
    ValueError
        If nothing is told, ``noise`` is not positive and finite, or ``bits`` is out of range or
        does not go with ``stochastic``.
    UpdateError
        If an entry is not finite, everything was set to zero, or the entries are not on the
        levels of ``bits``.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> update = al.ClientUpdate({"weight": torch.tensor([3.0, -4.0]), "bias": torch.tensor([1.0, 2.0])})
    >>> known = told_errors(al.defenses.prune(update, 0.5), pruned=True)
    >>> known.errors["bias"]  # both within ±3
    tensor([1.7321, 1.7321])
    """
    _check_told(noise, pruned, bits, stochastic)
    for name, g in update.gradients.items():
        if not bool(torch.isfinite(g).all()):
            raise UpdateError(f"told_errors: {name} is not finite, and its step or threshold cannot be read off it")
    thresholds = _thresholds(update) if pruned else {}
    errors = {}
    for name, g in update.gradients.items():
        wide = torch.float64 if g.dtype == torch.float64 else torch.float32
        variance = _of_rounding(g, wide)
        if noise is not None:
            variance += noise**2
        if bits is not None:
            variance += _of_levels(name, g, bits, stochastic=stochastic, exact=noise is None).to(wide)
        if pruned:
            variance += torch.where(g == 0, thresholds[name] ** 2 / 3, 0.0)
        if update.errors is not None:
            variance += update.errors[name].to(wide).square()
        errors[name] = variance.sqrt()
    return replace(update, errors=errors)


def _check_told(noise: float | None, pruned: bool, bits: int | None, stochastic: bool) -> None:
    """Refuse what tells nothing, or contradicts itself."""
    if noise is None and not pruned and bits is None:
        raise ValueError("told_errors: nothing is told. Say noise=sigma, pruned=True, or bits=…")
    if noise is not None and (isinstance(noise, bool) or not 0 < noise < math.inf):
        raise ValueError(f"noise={noise!r} is the noise's standard deviation in each entry, positive and finite")
    if bits is not None and (isinstance(bits, bool) or bits != int(bits) or not 1 <= bits <= _MOST_BITS):
        raise ValueError(f"bits={bits!r} must be a whole number from 1 (signs) to {_MOST_BITS}")
    if stochastic and (bits is None or bits < 2):
        raise ValueError(f"stochastic=True is a way to round to levels: it goes with bits from 2, not bits={bits}")


def _of_rounding(g: Tensor, wide: torch.dtype) -> Tensor:
    """Variance of each entry's rounding: its own, and that of the arithmetic behind it."""
    own = torch.finfo(g.dtype).eps / math.sqrt(12) * g.to(wide)
    return own.square() + torch.finfo(wide).eps ** 2 * g.to(wide).square().mean()


def _thresholds(update: ClientUpdate) -> Mapping[str, float]:
    """The smallest magnitude that stayed, by tensor."""
    smallest, shares = {}, []
    for name, g in update.gradients.items():
        kept = g[g != 0].abs()
        smallest[name] = float(kept.min()) if len(kept) else math.inf
        if g.numel() >= _ENOUGH:
            shares.append((len(kept) / g.numel(), 1 / g.numel()))
    least = min(smallest.values(), default=math.inf)
    if least == math.inf:
        raise UpdateError("told_errors: every entry is zero, so that no threshold can be read off the update")
    if not _one_share(shares):
        return dict.fromkeys(smallest, least)
    most = max(t for t in smallest.values() if t < math.inf)  # where nothing stayed
    return {name: min(t, most) for name, t in smallest.items()}


def _one_share(shares: list[tuple[float, float]]) -> bool:
    """Whether some tensors kept the same share each, up to one entry, and not everything."""
    if len(shares) < 2 or min(share for share, _ in shares) == 1.0:
        return False
    finest = min(shares, key=lambda share: share[1])[0]
    return finest > 0 and all(abs(share - finest) <= entry + 1e-12 for share, entry in shares)


def _of_levels(name: str, g: Tensor, bits: int, *, stochastic: bool, exact: bool) -> Tensor:
    """Variance of each entry that was rounded to levels: one number, which depends on the tensor."""
    size = g.abs().double()
    largest = size.max() if len(g.flatten()) else torch.zeros((), dtype=torch.float64)
    if bits == 1:
        if exact and bool((((size - largest).abs() > _miss(g) * largest) & (size > 0)).any()):
            raise UpdateError(f"told_errors: {name} is not of one magnitude, so that bits=1 (signs) is not it")
        return (math.pi / 2 - 1) * largest.square()
    levels = 2 ** (bits - 1) - 1
    step = largest / levels
    if exact and step > 0 and bool(((size / step).frac() - 0.5).abs().min() < 0.5 - levels * _miss(g)):
        raise UpdateError(
            f"told_errors: {name} has entries off the {2 * levels + 1} levels of bits={bits}: it was rounded to "
            "others, or changed since (then say its noise, too)"
        )
    return step.square() / (6 if stochastic else 12)


def _miss(g: Tensor) -> float:
    """By how much of the largest entry one may miss its level."""
    return _OFF_LEVELS * torch.finfo(g.dtype).eps
