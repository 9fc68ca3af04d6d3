"""Bounds on reconstruction: above the best attackers we can simulate, and tight where they should
be.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from aprillab import client_update
from aprillab.defenses import clip, gaussian_noise
from aprillab.privacy import (
    chosen_model_mse,
    chosen_model_success,
    epsilon,
    fano_bound,
    gradient_distances,
    identification_rate,
    success_bound,
    success_bound_dp,
    success_bound_rdp,
    unbiased_mse_bound,
)

KAPPAS = (0.5, 1 / 256, 1e-6)
SIGMAS = (0.2, 0.5, 1.0, 2.0, 10.0)


def test_two_opposite_gradients_reach_the_bound() -> None:
    """The attacker who names a sign is right with probability Φ(μ), and that is the
    bound for κ = 1/2.
    """
    y = 1 + 1.5 * np.random.default_rng(0).standard_normal(400_000)
    assert (y > 0).mean() == pytest.approx(success_bound(0.5, 1.5), abs=0.003)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_best_attacker_on_orthogonal_gradients_stays_below_every_bound(sigma: float) -> None:
    distances = gradient_distances(torch.eye(256))
    rate = identification_rate(distances, sigma, samples=20)
    error = 3 * 0.5 / math.sqrt(20 * 256)
    assert rate <= success_bound(1 / 256, sigma) + error
    assert rate <= fano_bound(256, sigma) + error
    # … and not far below the tightest: the bound says something.
    assert success_bound(1 / 256, sigma) <= 2 * rate + 2 * error


def test_sampled_rounds_against_the_best_attacker() -> None:
    """Two opposite gradients, each round with probability q: the attacker sums
    log-likelihood ratios.
    """
    sigma, q, rounds, runs = 0.7, 0.3, 6, 200_000
    generator = np.random.default_rng(1)
    score = np.zeros(runs)
    for _ in range(rounds):
        y = sigma * generator.standard_normal(runs) + (generator.random(runs) < q)

        def log_density(sign: int, y: np.ndarray = y) -> np.ndarray:
            return np.logaddexp(math.log(1 - q), math.log(q) + (sign * 2 * y - 1) / (2 * sigma**2))

        score += log_density(1) - log_density(-1)
    rate = float((score > 0).mean())
    bound = success_bound(0.5, sigma, rounds=rounds, sample_rate=q)
    assert bound - 0.1 < rate <= bound + 0.005
    assert bound < success_bound(0.5, sigma, rounds=rounds)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_simulated_rounds_agree_with_the_formulas_at_their_ends(kappa: float) -> None:
    nearly_all = success_bound(kappa, 1.5, rounds=4, sample_rate=1 - 1e-9)
    assert nearly_all == pytest.approx(success_bound(kappa, 1.5, rounds=4), abs=0.006)
    # One sampled round, computed, and simulated as a first of two of which the second all
    # but never happens.
    from aprillab.privacy.bounds import _privacy_losses

    losses = np.sort(_privacy_losses(0.8, 0.4, 1, 200_000, seed=2))[::-1]
    simulated = np.searchsorted(np.cumsum(np.exp(-losses)) / len(losses), kappa) / len(losses)
    assert simulated == pytest.approx(success_bound(kappa, 0.8, sample_rate=0.4), abs=0.006)


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_bounds_that_know_less_allow_more(kappa: float, sigma: float) -> None:
    tight = success_bound(kappa, sigma)
    assert kappa < tight <= 1
    for delta in (1e-9, 1e-5, 1e-2):
        assert tight <= success_bound_dp(kappa, epsilon(sigma, delta=delta), delta) * (1 + 1e-9)
    orders = 1 + np.geomspace(1e-3, 1e3, 200)
    over_orders = min(success_bound_rdp(kappa, a, a / (2 * sigma**2)) for a in orders)
    assert tight <= over_orders
    # At its best order Rényi's bound for normal noise is a Chernoff bound.
    far = math.sqrt(max(0.0, math.log(1 / kappa))) - 1 / sigma / math.sqrt(2)
    assert over_orders == pytest.approx(math.exp(-(max(0.0, far) ** 2)), rel=0.01)


def test_rounds_are_less_noise_in_every_bound() -> None:
    assert success_bound(0.01, 10.0, rounds=25) == success_bound(0.01, 2.0)
    assert fano_bound(100, 10.0, rounds=25) == fano_bound(100, 2.0)
    assert unbiased_mse_bound(10.0, rounds=25) == unbiased_mse_bound(2.0)
    assert chosen_model_mse(3.0, 10.0, rounds=25) == pytest.approx(chosen_model_mse(3.0, 2.0))


def test_fano_ends_at_chance_and_at_certainty() -> None:
    assert fano_bound(256, 1e4) == pytest.approx(1 / 256, rel=0.01)
    assert fano_bound(256, 0.3) == 1.0
    # Of two candidates h(e) ≥ log 2 − I, by hand: I = 1/8 at σ = 2.
    e = 1 - fano_bound(2, 2.0)
    assert -e * math.log(e) - (1 - e) * math.log(1 - e) == pytest.approx(math.log(2) - 1 / 8)


def test_an_unbiased_attacker_stays_above_its_bound() -> None:
    """One pixel, whose gradient runs from −C to C: the attacker scales back, with variance σ²/4."""
    for sigma in SIGMAS:
        assert unbiased_mse_bound(sigma) <= sigma**2 / 4
    assert unbiased_mse_bound(100.0) == pytest.approx(100**2 / 16, rel=1e-3)
    assert unbiased_mse_bound(2.0, span=2.0) == pytest.approx(4 * unbiased_mse_bound(2.0))
    assert unbiased_mse_bound(1e-3) == 0.0


def test_a_server_that_chooses_the_model_leaves_the_predicted_error() -> None:
    """The whole way: a dense layer, clipping, noise, four rounds, and the picture scaled back."""
    sigma, rounds, bound = 0.01, 4, 0.5
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = nn.Sequential(nn.Flatten(), nn.Linear(768, 1, bias=False, dtype=torch.float64))
    update = client_update(layer, picture, torch.tensor([0.0]), loss=lambda logits, _: logits.sum())
    size = float(picture.norm())
    errors = []
    for run in range(40):
        shared = [
            gaussian_noise(clip(update, bound), sigma * bound, seed=rounds * run + i).gradients["1.weight"]
            for i in range(rounds)
        ]
        errors.append(float((torch.stack(shared).mean(0) * size / bound - picture.flatten()).square().mean()))
    expected = chosen_model_mse(size, sigma, rounds=rounds)
    assert np.mean(errors) == pytest.approx(expected, rel=0.03)
    for quantile in (0.25, 0.75):
        share = chosen_model_success(float(np.quantile(errors, quantile)), size, 768, sigma, rounds=rounds)
        assert share == pytest.approx(quantile, abs=0.25)


def test_thirty_four_decibels_at_a_ten_thousandth() -> None:
    size = math.sqrt(3 * 224 * 224 * 0.25)
    assert -10 * math.log10(chosen_model_mse(size, 1e-4)) == pytest.approx(34.2, abs=0.1)
    median = chosen_model_mse(size, 1e-4)
    assert chosen_model_success(median, size, 3 * 224 * 224, 1e-4) == pytest.approx(0.5, abs=0.01)
    # In one pixel the error is χ² with one degree of freedom.
    assert chosen_model_success(1.0, 1.0, 1, 1.0) == pytest.approx(2 * norm.cdf(1) - 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: success_bound(0.0, 1.0), "chance of a blind guess"),
        (lambda: success_bound(1.0, 1.0), "chance of a blind guess"),
        (lambda: success_bound(0.1, 0.0), "without noise nothing is proved"),
        (lambda: success_bound(0.1, 1.0, rounds=0), "whole number"),
        (lambda: success_bound(0.1, 1.0, rounds=2, sample_rate=0.5, samples=0), "samples=0"),
        (lambda: success_bound_rdp(0.1, 1.0, 1.0), "must be above 1"),
        (lambda: success_bound_rdp(0.1, 2.0, -1.0), "not negative"),
        (lambda: success_bound_dp(0.1, -1.0), "must not be negative"),
        (lambda: success_bound_dp(0.1, 1.0, 1.0), "probability below 1"),
        (lambda: fano_bound(1, 1.0), "from 2 up"),
        (lambda: unbiased_mse_bound(1.0, span=0.0), "span=0.0"),
        (lambda: chosen_model_mse(0.0, 1.0), "norm=0.0"),
        (lambda: chosen_model_success(-1.0, 1.0, 1, 1.0), "mse=-1.0"),
    ],
)
def test_arguments_without_sense_are_refused(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()
