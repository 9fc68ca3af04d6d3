"""Which of M pictures was it: against a formula, a brute-force attacker, and the bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

from aprillab import UpdateError, VisionTransformer, client_update
from aprillab.defenses import clip
from aprillab.privacy import (
    clipped_gradients,
    gradient_distances,
    identification_rate,
    identification_rates,
    success_bound,
)

TINY = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 16, "depth": 1, "heads": 2, "classes": 3}


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 3


def test_gradients_are_those_a_client_of_one_picture_shares() -> None:
    model, (images, labels) = VisionTransformer(**TINY), pictures(4)
    rows = clipped_gradients(model, images, labels, 0.7)
    for row, image, label in zip(rows, images.split(1), labels.split(1), strict=True):
        shared = clip(client_update(model, image, label), 0.7).gradients
        assert torch.allclose(row, torch.cat([g.flatten() for g in shared.values()]), atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_short_gradients_stay_short() -> None:
    model, (images, labels) = VisionTransformer(**TINY), pictures(2)
    rows = clipped_gradients(model, images, labels, 1e6)
    assert 0 < float(rows.norm(dim=1).max()) < 1e3


def test_distances_are_euclidean() -> None:
    rows = torch.randn(5, 70_000, generator=torch.Generator().manual_seed(0))
    expected = (rows[:, None].double() - rows[None].double()).norm(dim=-1)
    assert torch.allclose(gradient_distances(rows), expected)


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_equal_distances_against_the_integral(noise: float) -> None:
    """Orthogonal unit gradients: the right score exceeds all M − 1 others, ∫ φ(x) Φ(x + 1/s)^(M−1)."""
    m, samples = 20, 3000
    expected = quad(lambda x: norm.pdf(x) * norm.cdf(x + 1 / noise) ** (m - 1), -10, 10)[0]
    rate = identification_rate(gradient_distances(torch.eye(m)), noise, samples=samples)
    assert rate == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(samples * m))


def test_the_attacker_in_the_space_of_gradients_does_the_same() -> None:
    """Brute force: noise on the gradients themselves, nearest candidate, each candidate's own rate."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((6, 30)) * np.array([0.1, 0.2, 0.5, 1, 1, 2])[:, None]
    runs, noise = 20_000, 1.5
    expected = []
    for k, row in enumerate(rows):
        y = row + noise * generator.standard_normal((runs, 30))
        nearest = (rows**2).sum(1) - 2 * y @ rows.T
        expected.append((nearest.argmin(1) == k).mean())
    rates = identification_rates(gradient_distances(torch.from_numpy(rows)), noise, samples=20_000)
    assert rates.numpy() == pytest.approx(np.array(expected), abs=0.02)


def test_rounds_average_the_noise() -> None:
    distances = gradient_distances(torch.eye(10))
    once, often = (identification_rate(distances, s, rounds=r, seed=1) for s, r in ((0.5, 1), (5.0, 100)))
    assert once == pytest.approx(often, abs=1e-12)
    # Different weights each round: distances add up in squares.
    assert identification_rate(10 * distances, 5.0, seed=1) == pytest.approx(often, abs=1e-12)


def test_no_noise_identifies_and_twins_share() -> None:
    rows = torch.eye(4)[[0, 1, 2, 2]]
    rates = identification_rates(gradient_distances(rows), 1e-3, samples=2000)
    assert rates[:2].tolist() == [1.0, 1.0]
    assert rates[2:].numpy() == pytest.approx(0.5, abs=0.05)
    assert identification_rates(torch.zeros(4, 4), 1.0, samples=1).tolist() == [0.25] * 4


@pytest.mark.parametrize("sigma", [0.2, 1.0, 4.0])
def test_pictures_stay_below_the_bound(sigma: float) -> None:
    model, (images, labels) = VisionTransformer(**TINY), pictures(32)
    distances = gradient_distances(clipped_gradients(model, images, labels, 0.1))
    rate = identification_rate(distances, sigma * 0.1, samples=500)
    assert 1 / 32 - 0.02 < rate <= success_bound(1 / 32, sigma) + 0.02


def test_what_makes_no_sense_is_refused() -> None:
    model, (images, labels) = VisionTransformer(**TINY), pictures(2)
    with pytest.raises(ValueError, match="clip=0"):
        clipped_gradients(model, images, labels, 0.0)
    with pytest.raises(ValueError, match="2 images and 1 labels"):
        clipped_gradients(model, images, labels[:1], 1.0)
    with pytest.raises(ValueError, match=r"each row is 2 images.*Clip image by image: images.flatten\(0, 1\)"):
        clipped_gradients(model, images[None], labels[None], 1.0)
    with pytest.raises(ValueError, match="also for one image"):
        clipped_gradients(model, images[0], labels[:1], 1.0)
    with pytest.raises(UpdateError, match="no parameter"):
        clipped_gradients(nn.Sequential(nn.Flatten()), images, labels, 1.0)
    with pytest.raises(UpdateError, match="image 1 is not finite"):
        clipped_gradients(model, images * torch.tensor([1.0, math.nan])[:, None, None, None], labels, 1.0)
    with pytest.raises(ValueError, match="one row a candidate"):
        gradient_distances(torch.ones(3))
    square = gradient_distances(torch.eye(3))
    for distances, words in (
        (square[:2], "a square"),
        (square + torch.eye(3), "zeros on the diagonal"),
        (square * math.nan, "finite"),
        (-square, "not negative"),
        (square.triu(), "symmetric"),
    ):
        with pytest.raises(ValueError, match=words):
            identification_rates(distances, 1.0)
    for options, words in (({"noise": 0.0}, "noise=0.0"), ({"rounds": 0}, "rounds=0"), ({"samples": 0}, "samples=0")):
        with pytest.raises(ValueError, match=words):
            identification_rates(square, **{"noise": 1.0, **options})
