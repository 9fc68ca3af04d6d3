"""The patch-embedding system: what only this attack does."""

import pytest
import torch
from attacked import db, make, private

import aprillab as al
from aprillab.attacks.closed_forms.linear_algebra import thin_svd
from aprillab.attacks.closed_forms.patch_embedding import noise_variance, predicted_mse, solve_patches


def test_embedding_needs_no_weights():
    model, other = make("prenorm", seed=0), make("prenorm", seed=1)
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    assert db(al.invert(other, update, attack="embedding"), pixels) > 150


def test_an_off_by_one_in_the_prefix_cannot_pass():
    model = make("prenorm")
    with pytest.raises(ValueError, match="position_prefix"):
        al.dissect(model, position_prefix=0)


# --- Its steps: tensors in, tensors out -----------------------------------------------------------


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_patches_are_found_again():
    G, X = normal(5, 9), normal(5, 12, seed=1)
    torch.testing.assert_close(solve_patches(G.T @ X, *thin_svd(G.T)), X)


def test_noisy_patches_are_those_of_least_squares():
    G, dW = normal(5, 9), normal(9, 12, seed=1)
    expected = torch.linalg.lstsq(G.T, dW).solution
    torch.testing.assert_close(solve_patches(dW, *thin_svd(G.T)), expected)


def test_the_noise_is_measured_and_the_error_predicted():
    """(4.8) and (4.7) against 200 draws, the mean within 5 % of the truth."""
    n, d, p, sigma = 5, 9, 12, 1e-3
    G, X = normal(n, d), normal(n, p, seed=1)
    U, s, Vt = thin_svd(G.T)
    noises, errors = [], []
    for seed in range(200):
        dW = G.T @ X + sigma * normal(d, p, seed=10 + seed)
        found = solve_patches(dW, U, s, Vt)
        noises.append(noise_variance(dW - G.T @ found, n, 1e-16, 1.0))
        errors.append(float((found - X).square().mean()))
    assert sum(noises) / len(noises) == pytest.approx(sigma**2, rel=0.05)
    assert predicted_mse(sigma**2, s) == pytest.approx(sum(errors) / len(errors), rel=0.05)


def test_predicted_mse_by_hand():
    assert predicted_mse(2.0, torch.tensor([1.0, 0.5])) == 2.0 * (1 + 4) / 2


def test_no_residual_does_not_mean_no_noise():
    nothing = torch.zeros(9, 12, dtype=torch.float64)
    assert noise_variance(nothing, 5, 1e-7, 3.0) == pytest.approx((3e-7) ** 2)
    # As many equations as unknowns: a residual says nothing, however large.
    assert noise_variance(nothing + 1, 9, 1e-7, 3.0) == pytest.approx((3e-7) ** 2)
