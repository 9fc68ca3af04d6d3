"""APRIL's closed form: its identity, its damping, its own conditions."""

from dataclasses import replace

import pytest
import torch
from attacked import SHAPE, attack, db, make, private
from hypothesis import given, settings
from hypothesis import strategies as st

import aprillab as al
from aprillab.anatomy import Tiling
from aprillab.attacks.closed_forms.april import (
    Diagonal,
    _solve_in_two_steps,
    choose_damping,
    damped,
    diagonal,
    patches_from,
    remaining_error,
    stack_rows,
    tokens_from,
)
from aprillab.attacks.closed_forms.april_system import System
from aprillab.attacks.closed_forms.linear_algebra import row_space_basis


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4]),
    per_head=st.integers(12, 24),
    patch=st.sampled_from([2, 4]),
    channels=st.sampled_from([1, 3]),
    bias=st.booleans(),
    class_token=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_aprils_identity(heads, per_head, patch, channels, bias, class_token, seed):
    """Gᵀ Z = W_Qᵀ∂W_Q + W_Kᵀ∂W_K + W_Vᵀ∂W_V for any shape, in float64."""
    model = make(
        "april", image_size=8, patch_size=patch, width=heads * per_head, heads=heads, channels=channels, bias=bias,
        class_token=class_token, seed=seed,
    )  # fmt: skip
    pixels = private(model, seed=seed)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([1]))
    tokens = model.embed(al.HALF.to_input(pixels))[0].detach()  # (tokens, d)
    G = update.gradients["position_embedding"][0]  # (tokens, d)
    M = al.attention_product(al.dissect(model), dict(model.named_parameters()), update.gradients).detach()
    torch.testing.assert_close(G.T @ tokens, M, rtol=1e-9, atol=1e-12 * float(M.abs().max()) + 1e-18)


def test_april_plain_and_damped_agree_in_float64():
    model = make("april")
    pixels = private(model)
    plain = attack(model, pixels, "april", regularization="none")
    damped = attack(model, pixels, "april")
    torch.testing.assert_close(plain.images, damped.images, rtol=1e-7, atol=1e-7)
    assert plain.diagnostics["damping"] == 0.0


def test_april_damping_helps_in_float32():
    model = al.VisionTransformer(image_size=64, patch_size=8, width=192, depth=4, heads=3, classes=10, block="april")
    gains = []
    for victim in ("rocket", "retina", "chelsea"):
        pixels = al.load_victim(victim, 64)[None]
        plain = attack(model, pixels, "april", regularization="none")
        damped = attack(model, pixels, "april")
        gains.append(db(damped, pixels) - db(plain, pixels))
    assert min(gains) > -1
    assert max(gains) > 3


@pytest.mark.parametrize("victim", ["clock", "rocket", "chelsea"])
def test_the_plain_solve_knows_how_bad_it_is(victim):
    """The clock's smallest singular values leave errors beyond 1/12 of the range: they count as
    large as they are.
    """
    model = al.VisionTransformer(image_size=64, patch_size=8, width=192, depth=2, heads=6, classes=10, block="april")
    pixels = al.load_victim(victim, 64)[None]
    plain = attack(model, pixels, "april", regularization="none")
    assert abs(plain.predicted_psnr - db(plain, pixels)) < 2.5
    assert db(plain, pixels) < 60


def test_april_with_more_pixels_than_width():
    """p = 192 > d = 96: the second step alone loses 96 directions of a patch, the patch
    gradient's rows have them.
    """
    model = make("april", image_size=32, patch_size=8)
    pixels = private(model)
    alone = attack(model, pixels, "april", systems="attention")
    assert alone.diagnostics["directions_lost"] == 96
    assert not alone.exact
    assert "pixels determined" in alone.reason
    assert db(alone, pixels) < 20
    assert alone.predicted_psnr < 20
    plain = attack(model, pixels, "april", systems="attention", regularization="none")
    assert plain.predicted_psnr < 20
    default = attack(model, pixels, "april")
    assert default.diagnostics["systems"] == "row_space"
    assert default.diagnostics["directions_lost"] == 0
    assert db(default, pixels) > 100
    assert default.exact, default.reason
    assert db(attack(model, pixels, "april", systems="both"), pixels) > 100


def test_april_refuses_a_residual_block():
    model = make("prenorm")
    with pytest.raises(al.AttackNotApplicable, match="LayerNorm"):
        attack(model, private(model), "april")


def test_april_without_the_patch_embeddings_gradient():
    model = make("april")
    pixels = private(model)
    assert db(attack(model, pixels, "april", withhold=["patch_embedding.weight"]), pixels) > 150
    with pytest.raises(al.AttackNotApplicable, match="row_space"):
        attack(model, pixels, "april", withhold=["patch_embedding.weight"], systems="row_space")


def test_april_unknown_options():
    model = make("april")
    with pytest.raises(ValueError, match="regularization"):
        attack(model, private(model), "april", regularization="magic")
    with pytest.raises(ValueError, match="systems"):
        attack(model, private(model), "april", systems="all")


def test_a_shallow_model_gives_a_deficient_gradient():
    """One block read at the class token: the rows of G are spanned by two vectors a head,
    and one for token 0.
    """
    model = make("april", depth=1)
    result = attack(model, private(model), "april")
    assert result.diagnostics["rank"] <= 2 * SHAPE["heads"] + 1
    assert not result.exact
    assert "rank" in result.reason


# --- Its steps: tensors in, tensors out -----------------------------------------------------------


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def system_of(patches=5, width=9, pixels=6, prefix=1, seed=0):
    """System (3.1) and (3.2) of random patches, and the patches."""
    X, W_e = normal(patches, pixels, seed=seed), normal(width, pixels, seed=seed + 1)
    G, E = normal(patches + prefix, width, seed=seed + 2), normal(patches + prefix, width, seed=seed + 3)
    Z = E.clone()
    Z[prefix:] += X @ W_e.T
    return System(G.T @ Z, G, E, W_e, prefix, Tiling.square(1, (1, patches))), Z, X


def test_tokens_and_patches_are_found_again():
    system, Z, X = system_of()
    found = tokens_from(system.G, system.M)
    torch.testing.assert_close(found, Z)
    torch.testing.assert_close(patches_from(found[1:], system.E[1:], system.W_e), X)


def test_tokens_of_noisy_equations_are_those_of_least_squares():
    system, _, _ = system_of()
    M = system.M + 0.1 * normal(9, 9, seed=7)
    found = tokens_from(system.G, M)
    torch.testing.assert_close(system.G @ (system.G.T @ found - M), torch.zeros(6, 9, dtype=torch.float64))


def test_the_two_steps_expect_the_error_they_make():
    """(A1.7) with the patches' rows: the class token's, large here, must not stand in for
    the smallest of them.
    """
    (n, d, p), sigma, draws = (6, 30, 10), 1e-4, 60
    system, _, X = system_of(n, d, p)
    basis = torch.linalg.qr(normal(d, n + 1, seed=5)).Q.T  # (n + 1, d)
    scales = torch.logspace(2, -2, n + 1, dtype=torch.float64)
    G = scales[:, None] * basis
    Z = torch.cat([system.E[:1], X @ system.W_e.T + system.E[1:]])
    ratios = []
    for seed in range(draws):
        solution = _solve_in_two_steps(replace(system, G=G, M=G.T @ Z + sigma * normal(d, d, seed=seed)))
        ratios.append(float((solution.X - X).square().mean() / solution.error.mean()))
    assert abs(sum(ratios) / draws - 1) < 0.15
    assert solution.mean_square_error(1e9) == pytest.approx(float(solution.error.mean()))
    assert solution.mean_square_error(1e-9) == 1e-9  # no picture is worse than one of which nothing is known


def test_patches_that_the_embedding_does_not_see_whole_are_the_shortest():
    """p > d: of all x with W_e x = z the pseudoinverse's has no part that W_e does not see."""
    W_e, Z = normal(4, 7), normal(3, 4, seed=1)
    X = patches_from(Z, torch.zeros_like(Z), W_e)
    torch.testing.assert_close(X, (torch.linalg.pinv(W_e) @ Z.T).T)


@pytest.mark.parametrize("pixels", [6, 9])
def test_the_diagonal_system_is_the_two_step_solve(pixels):
    system, _, X = system_of(pixels=pixels)
    X0 = normal(5, pixels, seed=9)
    parts = diagonal(system, system.known(X0), torch.eye(pixels).double())
    torch.testing.assert_close(X0 + parts.patches(damped(parts.a, parts.b, 0.0)), X)
    Z = tokens_from(system.G, system.M)
    torch.testing.assert_close(X, patches_from(Z[1:], system.E[1:], system.W_e))
    assert parts.spare == 9 * 9 - 5 * pixels
    assert parts.rest >= 0


def test_the_row_space_brings_back_what_the_embedding_does_not_see():
    """p = 12 > d = 9: all pixels are too many unknowns, those in the span of the n = 5 patches are
    not.
    """
    system, _, X = system_of(pixels=12)
    B = system.known(torch.zeros_like(X))
    everywhere = diagonal(system, B, torch.eye(12).double())
    assert everywhere.a.shape == (5, 12)
    assert not everywhere.a[:, 9:].any()
    basis = row_space_basis(system.G_p.T @ X, 5, 1e-12)
    assert basis.shape == (12, 5)
    inside = diagonal(system, B, basis)
    torch.testing.assert_close(inside.patches(damped(inside.a, inside.b, 0.0)), X)


def test_stacking_the_patch_embeddings_rows_solves_what_attention_alone_cannot():
    system, _, X = system_of(pixels=12)
    X0 = torch.zeros_like(X)
    parts = diagonal(system, system.known(X0), torch.eye(12).double())
    both = stack_rows(parts, system, system.G_p.T @ X, X0)
    torch.testing.assert_close(both.patches(damped(both.a, both.b, 0.0)), X)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5, 4.0])
def test_damped_minimizes_its_sum_of_squares(damping):
    a, b = normal(4, 3), normal(4, 3, seed=1)
    y = damped(a, b, damping)
    slope = 2 * a * (a * y - b) + 2 * damping * y
    torch.testing.assert_close(slope, torch.zeros_like(slope))


def test_nothing_is_divided_by_nothing():
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    assert damped(zeros, torch.ones_like(zeros), 0.0).tolist() == zeros.tolist()


def test_the_chosen_damping_is_near_the_best():
    """Over seeds cross-validation, which sees no original, loses little against the λ that does."""
    candidates = [10.0**k for k in range(-12, 3)]
    ratios = []
    for seed in range(10):
        a = torch.logspace(0, -5, 400, dtype=torch.float64).reshape(20, 20)
        truth, noise = normal(20, 20, seed=seed), 1e-3 * normal(20, 20, seed=100 + seed)
        spare_noise = 1e-3 * normal(400, seed=200 + seed)
        b = a * truth + noise

        def error(damping, a=a, b=b, truth=truth):
            return float((damped(a, b, damping) - truth).square().mean())

        chosen = choose_damping(a, b, float(spare_noise.square().sum()), 400, candidates)
        ratios.append(error(chosen) / min(error(damping) for damping in candidates))
    assert max(ratios) < 1.5  # at most 1.8 dB above the best
    assert error(1e-12) > 100 * error(chosen)  # and the choice matters


def test_without_noise_nothing_is_damped():
    a, truth = torch.logspace(0, -5, 100, dtype=torch.float64).reshape(10, 10), normal(10, 10)
    candidates = [10.0**k for k in range(-20, 1)]
    assert choose_damping(a, a * truth, 0.0, 100, candidates) == min(candidates)


def test_the_error_that_remains_is_the_one_that_is_made():
    """(A1.7) against the mean over 200 draws of noise: within 10 % for every singular value
    undamped.
    """
    a, sigma, draws = torch.logspace(0, -3, 12, dtype=torch.float64).reshape(3, 4), 1e-2, 200
    y = normal(3, 4)
    errors = torch.stack([(damped(a, a * y + sigma * normal(3, 4, seed=k), 0.0) - y).square() for k in range(draws)])
    empty = torch.zeros(0)
    parts = Diagonal(a, a * y, sigma**2 * 50, 50, empty, empty, empty, empty, empty, empty)
    ratio = errors.mean(0) / remaining_error(parts, 0.0)
    assert abs(float(ratio.mean()) - 1) < 0.1
    assert remaining_error(replace(parts, a=torch.zeros_like(a)), 0.0).isinf().all()
