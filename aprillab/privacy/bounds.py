"""What noise proves about reconstruction: no attacker, whatever it knows and computes, does better.

**Setting of all of them.** Each round the server sees the sum of gradients, each of norm at most
C, plus normal noise of deviation σC in every entry; T such rounds. One image is the target. The
attacker is *informed*: it knows the model, every other image, and everything else but the target,
of which it has a prior (what pictures it may be, and how probable each is). It chooses its
estimate with all that.

**κ, the blind guess.** The chance of the best guess *without* any update to be right, in the sense
of "right" that is asked about: 1/M for one of M candidates that are equally probable; for "error at
most η" the largest share of the prior that lies within η of one picture. A bound says how far an
update can lift κ. For photographs under an error in pixels nobody knows κ; that is the bounds'
weakness, not noise's.

**μ, the signal.** √T/σ: the norm C of a gradient in units of the noise's deviation, after T rounds.
The comparison is with an update that lacks the image, a distance of at most C; so σ here is the
same as in :func:`~aprillab.privacy.epsilon`.

The proofs are short and written down with each function. All bounds but the unbiased attacker's
hold for every attacker; whether one comes near is for attacks to show.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammainc, ndtr, ndtri

from .accounting import check_counts


def success_bound(
    kappa: float,
    noise_multiplier: float,
    *,
    rounds: int = 1,
    sample_rate: float = 1.0,
    samples: int = 100_000,
    seed: int = 0,
) -> float:
    """The most probable that any attacker's reconstruction can be right: the tightest bound here.

    Proof. Let z be the target, S_z the updates for which the attacker's estimate counts as right,
    P_z the updates' law with z and Q without. B(k) is the power of the best test of Q against P at
    level k. Then P(right) = E_z P_z(S_z) ≤ E_z B(Q(S_z)) ≤ B(E_z Q(S_z)) ≤ B(κ), since B is
    concave and grows, and under Q the estimate is a blind guess. For normal noise
    B(κ) = Φ(Φ⁻¹(κ) + μ), (11.7).

    Parameters
    ----------
    kappa : float in (0, 1)
        Chance of the best guess without an update: 1/M for one of M.
    noise_multiplier : float, σ
    rounds : int, T
        All with the same target. Later rounds may depend on earlier ones.
    sample_rate : float in (0, 1]
        Below 1 (Poisson sampling, unseen by the attacker) more than one round is simulated.
    samples : int
        Simulated runs, where they are needed: the answer is then an estimate, with a standard error
        of at most 0.5/√samples.
    seed : int, of the simulation

    Returns
    -------
    float in [κ, 1]

    Raises
    ------
    ValueError
        If an argument makes no sense.

    References
    ----------
    Hayes, Mahloujifar & Balle, NeurIPS 2023, arXiv:2302.07225 (there the blow-up function, with the
    simulation for DP-SGD). Kaissis, Hayes, Ziller & Rueckert 2023, arXiv:2307.03928: the same as
    1 − f(κ), f the trade-off function. That rounds may depend on earlier ones: Dong, Roth & Su
    2022, arXiv:1905.02383.

    Examples
    --------
    One of 256 digits, one round, a thousand rounds:

    >>> round(success_bound(1 / 256, 1.0), 3), round(success_bound(1 / 256, 10.0, rounds=1000), 3)
    (0.048, 0.692)
    """
    mu = _signal(noise_multiplier, rounds)
    _check_kappa(kappa)
    check_counts(sample_rate, rounds, 0.5)
    if sample_rate == 1:
        return float(ndtr(ndtri(kappa) + mu))
    if rounds == 1:  # the likelihood ratio grows with the one number that counts
        return float((1 - sample_rate) * kappa + sample_rate * ndtr(ndtri(kappa) + mu))
    losses = np.sort(_privacy_losses(noise_multiplier, sample_rate, rounds, samples, seed))[::-1]
    # Under Q, an event has the probability that its exp(−loss) has under P: no second simulation,
    # and no rare events.
    with np.errstate(over="ignore"):
        level = np.cumsum(np.exp(-losses)) / samples
    return max(kappa, float(np.searchsorted(level, kappa, side="right")) / samples)


def success_bound_rdp(kappa: float, order: float, divergence: float) -> float:
    """The same from Rényi differential privacy, for mechanisms of which no more is known.

    (κ e^ε)^((α−1)/α), capped at 1. Proof: by Hölder's inequality P(S) ≤ (Q(S) e^ε)^((α−1)/α) if the
    Rényi divergence of order α of P from Q is at most ε; the rest as for :func:`success_bound`.

    Parameters
    ----------
    kappa : float in (0, 1)
    order : float, α > 1
    divergence : float, ε of that order, in nats, of updates with the target from those without

    References
    ----------
    Balle, Cherubin & Hayes, IEEE S&P 2022, arXiv:2201.04845.

    Examples
    --------
    >>> round(success_bound_rdp(1 / 256, 3.33, 3.33 / 2), 3)  # normal noise, σ = 1, near the best order
    0.066
    """
    _check_kappa(kappa)
    if not 1 < order < math.inf or not divergence >= 0:
        raise ValueError(f"order={order} must be above 1, and divergence={divergence} not negative")
    return min(1.0, math.exp(min(0.0, (math.log(kappa) + divergence) * (order - 1) / order)))


def success_bound_dp(kappa: float, epsilon: float, delta: float = 0.0) -> float:
    """The same from (ε, δ) alone: κ e^ε + δ, capped at 1. That is differential privacy's
    definition, applied to "the estimate is right" and averaged over the prior.

    References
    ----------
    Balle, Cherubin & Hayes, IEEE S&P 2022, arXiv:2201.04845 (δ = 0).

    Examples
    --------
    At ε = 8 nothing is proved any more about one of 256:

    >>> round(success_bound_dp(1 / 256, 1.0, 1e-5), 3), success_bound_dp(1 / 256, 8.0, 1e-5)
    (0.011, 1.0)
    """
    _check_kappa(kappa)
    if not epsilon >= 0 or not 0 <= delta < 1:
        raise ValueError(f"epsilon={epsilon} must not be negative, and delta={delta} is a probability below 1")
    return min(1.0, math.exp(min(700.0, math.log(kappa) + epsilon)) + delta)


def fano_bound(candidates: int, noise_multiplier: float, *, rounds: int = 1) -> float:
    """The most probable that one of M equally probable candidates is identified, by information.

    Proof. The update carries at most μ²/2 nats about the target: the mean divergence from the law
    without it. Fano's inequality, log M − μ²/2 ≤ h(e) + e log(M − 1), then bounds the chance of
    error e from below. It is looser than :func:`success_bound` for M of some hundred, and holds for
    a secret of log M nats that is but part of the picture.

    Parameters
    ----------
    candidates : int, M ≥ 2
    noise_multiplier : float, σ
    rounds : int, T

    References
    ----------
    Guo, Sablayrolles & Sanjabi, ICML 2023, arXiv:2210.13662 (there also with sampling, left out
    here).

    Examples
    --------
    >>> round(fano_bound(256, 1.0), 3), round(fano_bound(256, 2.0), 3)
    (0.173, 0.065)
    """
    if candidates < 2 or candidates != int(candidates):
        raise ValueError(f"candidates={candidates} must be a whole number from 2 up")
    information = _signal(noise_multiplier, rounds) ** 2 / 2
    log_m = math.log(candidates)

    def slack(error: float) -> float:
        entropy = -sum(p * math.log(p) for p in (error, 1 - error) if p > 0)
        return entropy + error * math.log(candidates - 1) - (log_m - information)

    if slack(0.0) >= 0:
        return 1.0
    return 1 - brentq(slack, 0.0, 1 - 1 / candidates, xtol=1e-14)


def unbiased_mse_bound(noise_multiplier: float, *, rounds: int = 1, span: float = 1.0) -> float:
    """The least mean squared error of an *unbiased* attacker, per pixel, for any model.

    span² / (4 (exp(4T/σ²) − 1)). Proof: the Hammersley-Chapman-Robbins inequality for each pixel
    alone, moved by at least half its span, which moves the gradient by at most 2C; χ² of the shift
    is exp((2C)²T/(σC)²) − 1. Clipped to a range or drawn to a prior, an estimate is biased, and the
    bound says nothing: with much noise a grey picture beats it.

    Parameters
    ----------
    noise_multiplier : float, σ
    rounds : int, T
    span : float
        Between a pixel's least and largest value, 1 for pixels in [0, 1].

    Returns
    -------
    float, in units of ``span`` squared

    References
    ----------
    Guo, Karrer, Chaudhuri & van der Maaten, ICML 2022, arXiv:2201.12383. Their bound for one model
    and picture is :func:`~aprillab.privacy.cramer_rao_mse`.

    Examples
    --------
    >>> round(unbiased_mse_bound(2.0), 3), round(unbiased_mse_bound(10.0), 2)
    (0.145, 6.13)
    """
    exponent = (2 * _signal(noise_multiplier, rounds)) ** 2
    if not 0 < span < math.inf:
        raise ValueError(f"span={span} must be positive and finite")
    return span**2 / (4 * math.expm1(exponent)) if exponent < 700 else 0.0


# --- A server that chooses the model, without a prior ---------------------------------------------------------


def chosen_model_mse(norm: float, noise_multiplier: float, *, rounds: int = 1) -> float:
    """Mean squared error, per pixel, of the best attacker without a prior that may choose the
    model: σ²‖x‖²/T, (11.8).

    *This is an attack, and a line to draw beside others.* The server sends a model in which a
    weight's gradient is the picture x times a large number, as in one row of a dense layer.
    Clipped to C, it is C x/‖x‖; with the noise, and scaled by ‖x‖/C, every pixel has error σ‖x‖.
    The norm ‖x‖ is taken as known. That no attacker without a prior does better is what the paper
    says for this class of attacks; here it was not proved again. A prior, if only that pixels lie
    in [0, 1], does better.

    Parameters
    ----------
    norm : float, ‖x‖
        L2 norm of the picture that the layer reads, in the units in which the error is wanted.
    noise_multiplier : float, σ
    rounds : int, T

    Returns
    -------
    float, in the units of ``norm`` squared

    References
    ----------
    Riess, Schwethelm, Kaiser et al. 2024, arXiv:2402.12861 (first Ziller et al.).

    Examples
    --------
    The PSNR of pixels in [0, 1] of mean square 1/4, at 224×224:

    >>> norm = (3 * 224 * 224 / 4) ** 0.5
    >>> [round(-10 * math.log10(chosen_model_mse(norm, sigma)), 1) for sigma in (1e-4, 1e-3, 1e-2)]
    [34.2, 14.2, -5.8]
    """
    if not 0 < norm < math.inf:
        raise ValueError(f"norm={norm} must be positive and finite")
    return (norm / _signal(noise_multiplier, rounds)) ** 2


def chosen_model_success(mse: float, norm: float, entries: int, noise_multiplier: float, *, rounds: int = 1) -> float:
    """Chance that the error of :func:`chosen_model_mse`'s attacker is at most ``mse``.

    Its N errors are independent and normal, so that N · MSE/(σ²‖x‖²/T) is χ² with N
    degrees of freedom.

    Parameters
    ----------
    mse : float, in the units of ``norm`` squared
    norm, noise_multiplier, rounds
        As there.
    entries : int, N
        Pixels times channels.

    References
    ----------
    As there: its lower regularized gamma function.

    Examples
    --------
    In many pixels the error is all but certain:

    >>> norm = (3 * 224 * 224 / 4) ** 0.5
    >>> [round(chosen_model_success(10 ** (-db / 10), norm, 3 * 224 * 224, 1e-4), 3) for db in (34.1, 34.3)]
    [1.0, 0.0]
    """
    if mse < 0 or entries < 1:
        raise ValueError(f"mse={mse} must not be negative, and entries={entries} at least 1")
    expected = chosen_model_mse(norm, noise_multiplier, rounds=rounds)
    return float(gammainc(entries / 2, entries * mse / (2 * expected)))


def _privacy_losses(sigma: float, q: float, rounds: int, samples: int, seed: int) -> np.ndarray:
    """log P/Q under P, (samples,), for T rounds: P = (1 − q) N(0, σ²) + q N(1, σ²), Q = N(0, σ²).

    The pair that tells the target best: with a gradient of norm C, and all else known.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    generator = np.random.default_rng(seed)
    losses = np.zeros(samples)
    for _ in range(rounds):
        y = sigma * generator.standard_normal(samples) + (generator.random(samples) < q)
        losses += np.logaddexp(math.log1p(-q), math.log(q) + (2 * y - 1) / (2 * sigma**2))
    return losses


def _signal(noise_multiplier: float, rounds: int) -> float:
    """μ = √T/σ."""
    if not 0 < noise_multiplier < math.inf:
        raise ValueError(
            f"noise_multiplier={noise_multiplier} must be positive and finite: without noise nothing is proved"
        )
    check_counts(1.0, rounds, 0.5)
    return math.sqrt(rounds) / noise_multiplier


def _check_kappa(kappa: float) -> None:
    if not 0 < kappa < 1:
        raise ValueError(f"kappa={kappa} is the chance of a blind guess, between 0 and 1: 1/M for one of M")
