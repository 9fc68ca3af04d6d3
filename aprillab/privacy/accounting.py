"""What clipping and Gaussian noise guarantee: ε for a noise multiplier, and a noise multiplier for
ε.

**The mechanism.** The gradient of each image is scaled down to an L2 norm of at most C, the
gradients of the images that take part are added, and every entry of the sum gets normal noise
of deviation σC. σ is the *noise multiplier*. Only the ratio of noise to C counts, so C
appears nowhere below.

**The neighbouring relation: one image more or less.** ε and δ bound how much the odds of any
observation can change when one image is added to what the client has, or taken away: by a factor of
at most exp(ε), but for a probability δ. For one image *replaced* by another the sum moves by up to
2C, so without sampling ask for half the noise multiplier.

**One client instead of one image.** Where a client clips its whole update to C, and every entry
gets noise σC, the same numbers hold for all that the client has: its update is there, or zeros are.
For another update in its place the step is again 2C.

**Clipping the update is not clipping its images.** The mean of B gradients, each clipped to C,
needs noise σC/B. If only the mean is clipped to C, one image may turn the whole of it around, by
2C and not by C/B: the same noise is then worth a noise multiplier of σ/(2B), and that is the one
to ask about here.

**Rounds.** T rounds with the same image, each with fresh noise, count together. So do the steps of
an optimizer. ε is that of everything the server saw, even if later rounds depend on earlier ones.

**Sampling.** A ``sample_rate`` q < 1 means that every image takes part in a round with probability
q, each for itself (Poisson sampling), and that nobody is told who did. A server that sees a
client's own update knows who took part: then q = 1, whatever share of the clients a round has.

Without sampling the answer is exact (Balle & Wang 2018). With sampling Opacus does the accounting,
and is imported only then. All this is promised for real numbers; floating-point noise has gaps.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import erfcx, ndtr
from torch import Tensor

#: Grid points that the PRV accountant may take: 2²² are some 0.6 GB and 5 s. (σ = 0.3 in a thousand
#: rounds without sampling would ask for 10⁸.)
MOST_POINTS = 2**22
_PRV_ERROR = 0.01  # what the PRV accountant may err by, and adds to its ε; more where ε is in the hundreds
_LEAST_PRV_DELTA = 1e-10  # below, its sums are rounding: they start from entries known to 1e-16
# Rényi orders: whole ones are quick. Broken ones matter near 1, where ε is large; each
# takes up to a second.
_WHOLE = (*range(2, 13), 14, 16, 19, 22, 26, 30, 36, 43, 52, 64, 80, 100, 128, 160, 200, 256, 320, 400, 512)
_BROKEN_BELOW = 8  # an order: from there up, broken ones lower ε by 0.3 % at most (six settings tried)
_LARGEST_SIGMA = 1e15  # where a search for σ ends: whatever δ float64 can tell from 0, ε is below 1e-15
_TIGHT = 1e-4  # relative, of a noise multiplier that was searched for; always on the side of more noise

_ACCOUNTANTS = ("auto", "exact", "prv", "rdp")


class OpacusMissing(ImportError):
    """Opacus is not installed, and what was asked for needs it."""


@dataclass(frozen=True)
class Guarantee:
    """ε, and who says so.

    Attributes
    ----------
    epsilon : float
        An upper bound: (ε, δ)-differential privacy holds with it.
    accountant : str
        "exact": the Gaussian mechanism's own ε (without sampling it is the least there is). "prv"
        or "rdp": Opacus' accountant of that name. "unsampled": the exact ε of the same rounds
        without sampling, which sampling can only lower; both accountants gave more, or failed.
    """

    epsilon: float
    accountant: str


def epsilon(
    noise_multiplier: float,
    *,
    sample_rate: float = 1.0,
    rounds: int = 1,
    delta: float = 1e-5,
    accountant: str = "auto",
) -> float:
    """ε of clipping to C and normal noise of deviation ``noise_multiplier`` · C: one
    image more or less.

    The head of this file says in words what is promised, to whom, and what the relation would be
    for a client. :func:`guarantee` says besides which accountant gave the number.

    Parameters
    ----------
    noise_multiplier : float
        σ, the noise's deviation in an entry divided by the clipping norm C. Positive.
    sample_rate : float in (0, 1]
        Probability with which an image takes part in a round.
    rounds : int
        Rounds, or optimizer steps, with fresh noise each.
    delta : float in (0, 1)
        Well below one over the number of images.
    accountant : "auto", "exact", "prv" or "rdp"
        "auto" is exact for a sample rate of 1. Below 1 it takes the least of the PRV accountant
        (if its grid fits in :data:`MOST_POINTS`: above, it can take all memory), the RDP
        accountant, and the exact ε without sampling: each is an upper bound.

    Returns
    -------
    float
        Without a unit: a ratio of odds is at most exp(ε).

    Raises
    ------
    ValueError
        If an argument makes no sense, or the accountant that was named cannot do it.
    OpacusMissing
        If the accountant is Opacus' and Opacus is not installed.

    References
    ----------
    Balle & Wang, ICML 2018, arXiv:1805.06530 (exact). Gopi, Lee & Wutschitz, NeurIPS 2021,
    arXiv:2106.02848 (PRV). Mironov, Talwar & Zhang 2019, arXiv:1908.10530 (RDP).

    Examples
    --------
    >>> [round(epsilon(sigma), 2) for sigma in (0.1, 0.5, 1, 2, 5)]
    [91.82, 10.0, 4.38, 1.99, 0.73]
    >>> round(epsilon(1, rounds=1000))  # noise averages out over rounds
    634
    """
    return guarantee(
        noise_multiplier, sample_rate=sample_rate, rounds=rounds, delta=delta, accountant=accountant
    ).epsilon


def guarantee(
    noise_multiplier: float,
    *,
    sample_rate: float = 1.0,
    rounds: int = 1,
    delta: float = 1e-5,
    accountant: str = "auto",
) -> Guarantee:
    """:func:`epsilon`, and which accountant gave it. Arguments and errors are the same.

    Examples
    --------
    >>> four = guarantee(1.0, rounds=4)
    >>> round(four.epsilon, 2), four.accountant
    (10.0, 'exact')
    """
    check_counts(sample_rate, rounds, delta)
    if not 0 < noise_multiplier < math.inf:
        raise ValueError(
            f"noise_multiplier={noise_multiplier} must be positive and finite: the noise's deviation divided by the "
            "clipping norm. Without noise there is no guarantee"
        )
    if accountant not in _ACCOUNTANTS:
        raise ValueError(f"accountant={accountant!r}: one of {', '.join(_ACCOUNTANTS)}")
    if accountant == "exact" and sample_rate < 1:
        raise ValueError(f"accountant='exact' is for sample_rate=1, not {sample_rate}: take 'auto', 'prv' or 'rdp'")
    # Rounds add up their μ², (11.6); what sampling takes off is an accountant's to say.
    unsampled = _exact(math.sqrt(rounds) / noise_multiplier, delta)
    if accountant == "exact" or (accountant == "auto" and sample_rate == 1):
        return Guarantee(unsampled, "exact")
    sampled = (noise_multiplier, sample_rate, rounds)
    if accountant == "rdp":
        return Guarantee(_rdp(sampled, delta), "rdp")
    if accountant == "prv":
        return Guarantee(_prv(sampled, delta), "prv")
    found = [Guarantee(unsampled, "unsampled")]
    for name, count in (("rdp", _rdp), ("prv", _prv)):
        try:
            found.append(Guarantee(count(sampled, delta), name))
        except ValueError:
            continue  # too large for this one: another's bound stands
    return min(found, key=lambda one: one.epsilon)


def noise_multiplier(epsilon: float, *, sample_rate: float = 1.0, rounds: int = 1, delta: float = 1e-5) -> float:
    """The least noise multiplier that keeps ε: :func:`epsilon` of it is at most what was asked for.

    Parameters
    ----------
    epsilon : float, positive
    sample_rate, rounds, delta
        As in :func:`epsilon`, whose accountants are used as "auto" has them.

    Returns
    -------
    float
        σ, to a ten-thousandth, rounded towards more noise.

    Raises
    ------
    ValueError
        If an argument makes no sense.
    OpacusMissing
        If ``sample_rate`` is below 1 and Opacus is not installed.

    Examples
    --------
    >>> round(noise_multiplier(3.0), 2), round(noise_multiplier(3.0, rounds=100), 2)
    (1.39, 13.91)
    """
    check_counts(sample_rate, rounds, delta)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} must be positive and finite: 0 would need infinite noise")
    # Sampling can only help, so that this much is always enough.
    enough = _search(lambda s: _exact(math.sqrt(rounds) / s, delta), epsilon, math.sqrt(rounds))
    if sample_rate == 1:
        return enough

    def by_rdp(sigma: float) -> float:
        return min(_rdp((sigma, sample_rate, rounds), delta), _exact(math.sqrt(rounds) / sigma, delta))

    near = _search(by_rdp, epsilon, enough, at_most=enough)
    return _search(
        lambda s: guarantee(s, sample_rate=sample_rate, rounds=rounds, delta=delta).epsilon,
        epsilon, near, at_most=near, step=1.15,
    )  # fmt: skip


def _search(
    count: Callable[[float], float],
    wanted: float,
    start: float,
    *,
    at_most: float = _LARGEST_SIGMA,
    step: float = 2.0,
) -> float:
    """The least σ with count(σ) ≤ wanted, to ``_TIGHT`` and never below; ``count`` falls with σ."""
    high = start
    while count(high) > wanted:
        if high >= at_most * (1 + _TIGHT):
            raise ValueError(f"epsilon={wanted} is not kept by a noise multiplier of {high:.3g}: allow more")
        high = min(high * step, at_most * (1 + _TIGHT))
    low = high / step
    while count(low) <= wanted:
        high, low = low, low / step

    def excess(log_sigma: float) -> float:
        return math.log(max(count(math.exp(log_sigma)), 1e-12) / wanted)

    # A tenth of the tolerance here, so that what is added after it is no more than promised.
    sigma = math.exp(brentq(excess, math.log(low), math.log(high), xtol=_TIGHT / 10, rtol=1e-12))
    while count(sigma) > wanted:
        sigma *= 1 + _TIGHT / 5
    return sigma


# --- The accountants ------------------------------------------------------------------------------------------


def _exact(mu: float, delta: float) -> float:
    """ε of the Gaussian mechanism whose noise is 1/μ of the sensitivity (Balle & Wang 2018, theorem
    8).

    There δ = Φ(a) − exp(ε) Φ(−b), (11.5), with a = μ/2 − ε/μ and b = μ/2 + ε/μ. Since
    ε = (b² − a²)/2, the second term is ½ erfcx(b/√2) exp(−a²/2), which neither overflows nor
    cancels for any μ.
    """

    def excess(a: float) -> float:
        return float(ndtr(a) - 0.5 * erfcx((mu - a) / math.sqrt(2)) * math.exp(-a * a / 2)) - delta

    if excess(mu / 2) <= 0:
        return 0.0
    a = brentq(excess, -40.0, mu / 2, xtol=1e-13, rtol=1e-13)
    return max(0.0, mu * (mu / 2 - a))


_Sampled = tuple[float, float, int]  # σ, q, T: an entry of an Opacus accountant's history


@functools.lru_cache(maxsize=256)  # a search asks for the same again
def _rdp(sampled: _Sampled, delta: float) -> float:
    """Opacus' RDP accountant, over orders that reach further than its own. Infinite
    where it overflows.
    """
    accountant = opacus("accountants").RDPAccountant()
    accountant.history = [sampled]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of the best order at an end of the list: the bound holds all the same
        try:
            found, order = accountant.get_privacy_spent(delta=delta, alphas=list(_WHOLE))
            if order < _BROKEN_BELOW:  # the best one lies within one of it
                near = [order + step for step in (-0.75, -0.5, -0.25, 0.25, 0.5)]
                near = [1 + 2.0**-i for i in (6, 5, 4, 3)] + near if order == 2 else near
                broken, _ = accountant.get_privacy_spent(delta=delta, alphas=near)
                found = np.nanmin([found, broken])
        except (ValueError, OverflowError, ArithmeticError):
            return math.inf
    return max(0.0, float(found)) if not math.isnan(found) else math.inf


@functools.lru_cache(maxsize=256)
def _prv(sampled: _Sampled, delta: float) -> float:
    """Opacus' PRV accountant, if its grid is small enough; ValueError otherwise."""
    sigma, _, rounds = sampled
    if delta < _LEAST_PRV_DELTA:
        raise ValueError(f"delta={delta}: the PRV accountant computes to {_LEAST_PRV_DELTA}; take accountant='rdp'")
    least = _rdp(sampled, delta)
    error = min(0.5, max(_PRV_ERROR, least / 1000))
    # As its authors choose the grid: up to the ε of a far smaller δ, in steps of the error's
    # share in a round.
    reach = _rdp(sampled, delta / 4000)
    points = 2 * (reach + 3) / error * math.sqrt(rounds * math.log(12_000 / delta) / 2)
    if points > MOST_POINTS:
        raise ValueError(
            f"the PRV accountant would need {points:.1g} points for noise_multiplier={sigma} in {rounds} rounds, and "
            f"with more than {MOST_POINTS:.1g} it takes all memory: take accountant='auto' or 'rdp'"
        )
    accountant = opacus("accountants").PRVAccountant()
    accountant.history = [sampled]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            found = float(accountant.get_epsilon(delta, eps_error=error))
        except (RuntimeError, ValueError, OverflowError) as failed:
            raise ValueError(f"the PRV accountant failed ({failed}): take accountant='auto' or 'rdp'") from failed
    if not math.isfinite(found):
        raise ValueError(f"the PRV accountant found {found}: take accountant='auto' or 'rdp'")
    return max(0.0, found)


def opacus(module: str) -> Any:
    """A module of Opacus, which the package does without until it is asked for."""
    try:
        from importlib import import_module

        return import_module(f"opacus.{module}")
    except ImportError as error:
        raise OpacusMissing(
            "Opacus is not installed. It counts ε under sampling and trains with DP-SGD: "
            "pip install 'aprillab[privacy]'"
        ) from error


def check_single_images(images: Tensor) -> None:
    """Refuse stacks of batches: a gradient of several images can only be clipped as a whole."""
    if images.ndim == 4:
        return
    shape = tuple(images.shape)
    if images.ndim == 5:
        raise ValueError(
            f"images of shape {shape}: each row is {shape[1]} images, and their gradient together. To clip "
            f"that bounds none of them: one may turn the whole of it around, by 2C and not by 2C/{shape[1]}. "
            "Clip image by image: images.flatten(0, 1), with a label for each"
        )
    raise ValueError(f"images of shape {shape}: (number, channels, height, width) is wanted, also for one image")


def check_counts(sample_rate: float, rounds: int, delta: float) -> None:
    if not 0 < sample_rate <= 1:
        raise ValueError(
            f"sample_rate={sample_rate} is a probability, above 0 and at most 1: batch size over number of images"
        )
    if isinstance(rounds, bool) or rounds != int(rounds) or rounds < 1:
        raise ValueError(f"rounds={rounds} must be a whole number from 1 up")
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} is a probability, between 0 and 1: well below one over the number of images")
