"""ε: against the exact Gaussian mechanism and integrals of our own, back and forth,
and what is refused.
"""

from __future__ import annotations

import math
import sys
import time

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from aprillab.privacy import Guarantee, OpacusMissing, epsilon, guarantee, noise_multiplier
from aprillab.privacy.accounting import MOST_POINTS

ONE_ROUND = {0.01: 5426, 0.1: 91.82, 0.3: 19.13, 0.5: 9.997, 1: 4.377, 2: 1.993, 5: 0.7255, 10: 0.3407}


def delta_by_integral(sigma: float, q: float, eps: float, *, with_image: bool = True) -> float:
    """∫ max(0, p − e^ε p'), with p the density with the image and p' without, or the other way
    round.
    """

    def both(y: float) -> tuple[float, float]:
        without = norm.pdf(y, scale=sigma)
        return (1 - q) * without + q * norm.pdf(y, loc=1, scale=sigma), without

    def excess(y: float) -> float:
        p, other = both(y) if with_image else both(y)[::-1]
        return max(0.0, p - math.exp(eps) * other)

    return quad(excess, -12 * sigma, 1 + 12 * sigma, limit=1000, points=[0.0, 0.5, 1.0])[0]


def epsilon_by_integral(sigma: float, q: float, delta: float) -> float:
    """The larger of both directions."""

    def of(with_image: bool) -> float:
        if delta_by_integral(sigma, q, 0.0, with_image=with_image) <= delta:
            return 0.0
        return brentq(lambda e: delta_by_integral(sigma, q, e, with_image=with_image) - delta, 0, 30, xtol=1e-4)

    return max(of(True), of(False))


@pytest.mark.parametrize(("sigma", "expected"), ONE_ROUND.items())
def test_one_round_costs_what_the_gaussian_mechanism_costs(sigma: float, expected: float) -> None:
    assert epsilon(sigma) == pytest.approx(expected, rel=3e-4)
    assert guarantee(sigma) == Guarantee(epsilon(sigma), "exact")


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_the_exact_epsilon_is_where_the_integral_is_delta(sigma: float, delta: float) -> None:
    assert delta_by_integral(sigma, 1.0, epsilon(sigma, delta=delta)) == pytest.approx(delta, rel=1e-3)


def test_rounds_are_less_noise() -> None:
    assert epsilon(10.0, rounds=400) == pytest.approx(epsilon(0.5), rel=1e-12)
    assert epsilon(0.1, rounds=1000) == pytest.approx(51_348, rel=1e-4)


def test_the_ends_of_the_scale() -> None:
    assert epsilon(1e-8) == pytest.approx(1e16 / 2, rel=1e-6)  # μ²/2, and no overflow
    assert epsilon(1e6) == 0.0  # all of its difference is below δ
    assert epsilon(1.0, delta=1e-300) > epsilon(1.0, delta=1e-100) > epsilon(1.0)


@pytest.mark.parametrize("wanted", [1e-3, 0.1, 1.0, 3.0, 8.0, 1e4])
@pytest.mark.parametrize("rounds", [1, 1000])
def test_the_noise_multiplier_keeps_what_was_asked_for_and_wastes_little(wanted: float, rounds: int) -> None:
    sigma = noise_multiplier(wanted, rounds=rounds)
    assert epsilon(sigma, rounds=rounds) <= wanted
    assert epsilon(sigma * (1 - 1e-4), rounds=rounds) > wanted


# --- Opacus ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "expected"), ONE_ROUND.items())
def test_opacus_agrees_without_sampling(sigma: float, expected: float) -> None:
    pytest.importorskip("opacus")
    exact = epsilon(sigma)
    assert exact - 1e-6 <= epsilon(sigma, accountant="rdp") <= 1.13 * exact
    if sigma >= 0.1:  # at σ = 0.01 its grid ends
        assert exact <= epsilon(sigma, accountant="prv") <= exact + max(0.025, 0.003 * exact)


@pytest.mark.parametrize(("sigma", "q", "delta"), [(0.5, 0.01, 1e-5), (1.0, 0.2, 1e-5), (3.0, 0.5, 1e-6)])
def test_opacus_agrees_with_an_integral_over_one_sampled_round(sigma: float, q: float, delta: float) -> None:
    pytest.importorskip("opacus")
    exact = epsilon_by_integral(sigma, q, delta)
    assert exact <= epsilon(sigma, sample_rate=q, delta=delta, accountant="prv") <= exact + 0.025
    assert exact <= epsilon(sigma, sample_rate=q, delta=delta, accountant="rdp")


@pytest.mark.parametrize(("sigma", "q", "rounds"), [(0.8, 0.1, 20), (2.0, 0.5, 10)])
def test_opacus_agrees_with_simulated_sampled_rounds(sigma: float, q: float, rounds: int) -> None:
    """δ at its ε, both ways round, from the privacy losses of 400 000 simulated runs."""
    pytest.importorskip("opacus")
    from aprillab.privacy.bounds import _privacy_losses

    delta = 1e-2
    eps = epsilon(sigma, sample_rate=q, rounds=rounds, delta=delta, accountant="prv")
    losses = _privacy_losses(sigma, q, rounds, 400_000, seed=0)
    with_image = np.maximum(0, 1 - np.exp(eps - losses)).mean()
    without = np.maximum(0, np.exp(-losses) - np.exp(eps)).mean()
    assert without < with_image == pytest.approx(delta, rel=0.05)


def test_sampling_helps_and_the_least_bound_is_taken() -> None:
    pytest.importorskip("opacus")
    much = guarantee(1.0, sample_rate=0.01, rounds=1000)
    assert much.accountant == "prv"
    assert much.epsilon == pytest.approx(1.84, abs=0.01)
    assert epsilon(1.0, sample_rate=0.01, rounds=1000, accountant="rdp") == pytest.approx(2.1, abs=0.02)
    # Far below 1 the PRV accountant's own error of 0.01 is most of its ε.
    assert guarantee(10.0, sample_rate=1e-4, rounds=10_000).accountant == "rdp"
    # Where both give more than the same rounds without sampling, that is the bound.
    little = guarantee(1e-3, sample_rate=0.5, rounds=10)
    assert little == Guarantee(epsilon(1e-3, rounds=10), "unsampled")


def test_what_takes_all_memory_is_not_tried() -> None:
    pytest.importorskip("opacus")
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"takes all memory: take accountant='auto' or 'rdp'") as refused:
        epsilon(0.1, sample_rate=0.5, rounds=1000, accountant="prv")
    assert f"{MOST_POINTS:.1g}" in str(refused.value)
    assert guarantee(0.1, sample_rate=0.5, rounds=1000).accountant == "rdp"
    assert time.perf_counter() - start < 30


def test_a_sampled_noise_multiplier_keeps_what_was_asked_for() -> None:
    pytest.importorskip("opacus")
    sampled = {"sample_rate": 0.0125, "rounds": 400}
    sigma = noise_multiplier(1.0, **sampled)
    assert sigma == pytest.approx(1.242, abs=0.002)
    assert epsilon(sigma, **sampled) <= 1.0 < epsilon(sigma * (1 - 1e-3), **sampled)


def test_without_opacus_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    assert epsilon(1.0) == pytest.approx(4.377, abs=1e-3)
    with pytest.raises(OpacusMissing, match=r"pip install 'aprillab\[privacy\]'"):
        epsilon(1.0, sample_rate=0.123)
    with pytest.raises(ImportError, match="Opacus is not installed"):
        noise_multiplier(1.0, sample_rate=0.123)


# --- Refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise_multiplier": 0.0}, "without noise there is no guarantee"),
        ({"noise_multiplier": -1.0}, "must be positive and finite"),
        ({"noise_multiplier": math.nan}, "must be positive and finite"),
        ({"sample_rate": 0.0}, "above 0 and at most 1"),
        ({"sample_rate": 1.5}, "above 0 and at most 1"),
        ({"rounds": 0}, "whole number from 1 up"),
        ({"rounds": 2.5}, "whole number from 1 up"),
        ({"delta": 0.0}, "between 0 and 1"),
        ({"delta": 1.0}, "between 0 and 1"),
        ({"accountant": "gdp"}, "one of auto, exact, prv, rdp"),
        ({"accountant": "exact", "sample_rate": 0.5}, "is for sample_rate=1"),
    ],
)
def test_arguments_without_sense_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match="(?i)" + words):
        epsilon(**{"noise_multiplier": 1.0, **options})


@pytest.mark.parametrize("wanted", [0.0, -1.0, math.inf, math.nan])
def test_an_epsilon_that_no_noise_gives_is_refused(wanted: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        noise_multiplier(wanted)
