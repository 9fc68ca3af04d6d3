"""The patch-embedding system: what only this attack does."""

import pytest
import torch
from attacked import db, make, private

import aprillab as al
from aprillab.attacks.closed_forms.linear_algebra import thin_svd
from aprillab.attacks.closed_forms.patch_embedding import (
    least_singular_value,
    most_probable,
    noise_variance,
    predicted_mse,
    solve_patches,
    without_decay,
)


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


def least_squares(dW, G):
    U, s, Vt = thin_svd(G.T)
    return solve_patches(U.T @ dW, s, Vt)


def test_patches_are_found_again():
    G, X = normal(5, 9), normal(5, 12, seed=1)
    torch.testing.assert_close(least_squares(G.T @ X, G), X)


def test_noisy_patches_are_those_of_least_squares():
    G, dW = normal(5, 9), normal(9, 12, seed=1)
    expected = torch.linalg.lstsq(G.T, dW).solution
    torch.testing.assert_close(least_squares(dW, G), expected)


def test_the_noise_is_measured_and_the_error_predicted():
    """(4.8) and (4.7) against 200 draws, the mean within 5 % of the truth."""
    n, d, p, sigma = 5, 9, 12, 1e-3
    G, X = normal(n, d), normal(n, p, seed=1)
    U, s, Vt = thin_svd(G.T)
    noises, errors = [], []
    for seed in range(200):
        dW = G.T @ X + sigma * normal(d, p, seed=10 + seed)
        found = solve_patches(U.T @ dW, s, Vt)
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


# --- What is known of noisy patches ---------------------------------------------------------------


GREY = torch.zeros(12, dtype=torch.float64), 1.0


def test_without_noise_the_most_probable_patches_are_those_of_least_squares():
    G, X = normal(5, 9), normal(5, 12, seed=1)
    found = most_probable(G.T @ X, G, 1e-16, 1e-16, GREY)
    torch.testing.assert_close(found.X, X, rtol=0, atol=1e-12)
    assert found.rank == 5
    assert found.mse < 1e-25


def test_directions_that_are_not_seen_are_grey_and_expected_to_be_as_the_last_that_are():
    """More patches than the width: 9 directions of 12 are seen, the rest may be anything."""
    G, X = normal(12, 9), normal(12, 12, seed=1)
    found = most_probable(G.T @ X, G, 1e-12, 1e-12, GREY)
    error = float((found.X - X).square().mean())
    assert found.rank == 9
    assert error == pytest.approx(3 / 12, rel=0.5)
    assert 0.3 * error < found.mse < 3 * error
    unseen = X - torch.linalg.pinv(G.T) @ (G.T @ X)
    torch.testing.assert_close(X - found.X, unseen, rtol=0, atol=1e-8)


@pytest.mark.parametrize("level", [1e-3, 1e-2, 1e-1, 1.0])
def test_under_noise_the_damped_patches_are_nearer_and_their_error_is_foreseen(level):
    """200 draws of noise in both gradients; the sum's singular values spread over three orders."""
    n, d, p = 8, 40, 12
    G = torch.logspace(0, -3, n, dtype=torch.float64)[:, None] * normal(n, d)
    plain, damped, foreseen = [], [], []
    for seed in range(200):
        X = normal(n, p, seed=3 + 7 * seed)
        dW = G.T @ X
        entry = level * float(G.square().mean()) ** 0.5
        noisy_G = G + entry * normal(n, d, seed=1000 + seed)
        noisy_dW = dW + level * float(dW.square().mean()) ** 0.5 * normal(d, p, seed=5000 + seed)
        found = most_probable(noisy_dW, noisy_G, level, entry, GREY)
        plain.append(float((least_squares(noisy_dW, noisy_G) - X).square().mean()))
        damped.append(float((found.X - X).square().mean()))
        foreseen.append(found.mse)
    mean = sum(damped) / len(damped)
    assert mean < (1.2 if level < 1e-2 else 1.0) * sum(plain) / len(plain)
    assert mean < 1.2  # never much worse than grey
    assert 0.4 * mean < sum(foreseen) / len(foreseen) < 2.5 * mean


def test_a_singular_value_counts_from_what_noise_alone_has():
    """Bai and Yin: pure noise of variance 1 in n × d numbers reaches √n + √d."""
    noise = normal(30, 80)
    s = torch.linalg.svdvals(noise)
    assert s[0] < least_singular_value(s, noise.shape, 0.1, 1.0) < 1.2 * float(s[0])
    assert least_singular_value(s, noise.shape, 1e-9, 1.0) == pytest.approx(1e-9 * float(s[0]))


def test_weight_decay_is_seen_in_what_the_patches_cannot_explain():
    G, X, W = normal(5, 30), normal(5, 12, seed=1), normal(30, 12, seed=2)
    clean = without_decay(G.T @ X + 0.3 * W, G, W)
    torch.testing.assert_close(clean, G.T @ X, rtol=0, atol=1e-12)


# --- The attack -----------------------------------------------------------------------------------


def test_strict_or_the_best_there_is():
    """More patches than the width: what is seen of them, the rest in grey, and so marked."""
    model = make("prenorm", image_size=32, patch_size=4, width=48)
    pixels = al.load_victim("coffee", 32, dtype=torch.float64)[None]
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    with pytest.raises(al.AttackNotApplicable, match="strict=False"):
        al.embedding_closed_form(model, update)
    found = al.embedding_closed_form(model, update, strict=False)
    assert found.diagnostics["missing"] == 64 - 47
    assert not found.exact
    assert not found.determined
    assert abs(found.predicted_psnr - db(found, pixels)) < 8
    assert db(found, pixels) > 15


def test_a_grey_picture_leaves_no_gradient_of_the_patch_embedding_and_is_exact():
    for block in ("prenorm", "april"):
        model = make(block)
        pixels = torch.full((1, 3, 16, 16), 0.5, dtype=torch.float64)
        found = al.invert(
            model, al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3])), attack="embedding"
        )
        assert found.exact, found.reason
        assert torch.equal(found.pixels, pixels)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([3, 4]), r"shape \(2,\)"),
        (torch.tensor([-1]), "classes 0 to 6"),
        (torch.tensor([7]), "classes 0 to 6"),
        (torch.tensor([3.0]), "float32"),
        ([3], "list"),
        (3, "int"),
    ],
)
def test_labels_that_cannot_be_are_refused(labels, words):
    model = make("prenorm")
    update = al.client_update(model, al.HALF.to_input(private(model)), torch.tensor([3]))
    for name in ("embedding", "span"):
        with pytest.raises(ValueError, match=words):
            al.invert(model, update, attack=name, labels=labels)
    with pytest.raises(al.UpdateError, match="batch_size=2"):
        al.invert(model, al.ClientUpdate(update.gradients, batch_size=2), labels=torch.tensor([3]))
