"""The span of a gradient in finite precision: strong directions, noise, what a combination costs."""

import pytest
import torch

from aprillab.attacks.closed_forms.noisy_span import (
    mixtures,
    noisy_span,
    outside_tokens,
    row_noise,
    strongest_directions,
)

EPS = torch.finfo(torch.float32).eps


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(rows, width, tokens, noise=1e-7, seed=0):
    """Rows in the span of ``tokens`` tokens of falling size, and noise relative to each row."""
    sizes = torch.logspace(0, -2, tokens, dtype=torch.float64)
    D = normal(rows, tokens, seed=seed) * sizes @ normal(tokens, width, seed=seed + 1)
    return D + noise * D.norm(dim=1, keepdim=True) / width**0.5 * normal(rows, width, seed=seed + 2)


def costs_by_the_whole_decomposition(D, tokens, eps, targets):
    """‖c‖ by (7.7) from full singular value decompositions, as the chapter has it."""
    rows, width = D.shape
    D = D / D.norm(dim=1, keepdim=True)
    Vt = torch.linalg.svd(D, full_matrices=False)[2]
    outside = D - D @ Vt[:tokens].T @ Vt[:tokens]
    D = D / row_noise(outside, width - tokens, eps)[1][:, None]
    s, Vt = torch.linalg.svd(D, full_matrices=False)[1:]
    floor = max(rows**0.5 - width**0.5, 1.0)
    return ((Vt @ targets) / (s**2 + floor**2).sqrt()[:, None]).norm(dim=0)


def test_in_a_small_width_the_costs_are_those_of_the_whole_decomposition():
    """2k ≥ width: nothing is iterated, and what remains goes through a Gram matrix in float32."""
    D, targets = gradient(90, 40, 8), normal(40, 5, seed=9)
    found = noisy_span(D, 8, EPS).coefficients(targets).norm(dim=0)
    torch.testing.assert_close(found, costs_by_the_whole_decomposition(D, 8, EPS, targets), rtol=1e-5, atol=0)


def test_in_a_large_width_they_are_so_within_some_percent():
    """k = 8 + 24 of 120 directions: subspace iteration runs. Tokens' costs, and those of any
    vector.
    """
    D = gradient(360, 120, 8)
    for targets in (normal(120, 5, seed=9), D[:5].T.contiguous()):
        found = noisy_span(D, 8, EPS).coefficients(targets).norm(dim=0)
        torch.testing.assert_close(found, costs_by_the_whole_decomposition(D, 8, EPS, targets), rtol=0.03, atol=0)


@pytest.mark.parametrize(("rows", "width"), [(90, 40), (360, 120), (30, 120)])
def test_the_tokens_singular_values_are_those_of_the_whole_decomposition(rows, width):
    D = gradient(rows, width, 8)
    s, V = strongest_directions(D, 32 if rows > 32 else 30)
    torch.testing.assert_close(s[:8], torch.linalg.svdvals(D)[:8], rtol=1e-3, atol=0)
    torch.testing.assert_close(V.T @ V, torch.eye(V.shape[1]).double())
    torch.testing.assert_close((D @ V).norm(dim=0)[:8], s[:8])


def test_weak_tokens_are_seen_below_the_square_root_of_float64():
    """A Gram matrix would lose a singular value of 1e-10; nothing is squared here."""
    Q, P = torch.linalg.qr(normal(300, 3)).Q, torch.linalg.qr(normal(120, 3, seed=1)).Q
    D = Q * torch.tensor([1.0, 1e-6, 1e-10], dtype=torch.float64) @ P.T
    s = strongest_directions(D, 20)[0]
    torch.testing.assert_close(s[:3], torch.tensor([1.0, 1e-6, 1e-10], dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_start_near_the_directions_gives_the_same_ones():
    D = gradient(360, 120, 8)
    s, V = strongest_directions(D, 32)
    again, V_again = strongest_directions(D, 32, start=D @ V)
    torch.testing.assert_close(again[:8], s[:8], rtol=1e-6, atol=0)
    torch.testing.assert_close(V_again[:, :8] @ V_again[:, :8].T, V[:, :8] @ V[:, :8].T, rtol=0, atol=1e-6)


def test_the_directions_are_deterministic_and_leave_the_generator_alone():
    D = gradient(360, 120, 8)
    state = torch.get_rng_state()
    one = strongest_directions(D, 32)
    with torch.random.fork_rng(devices=[]):
        torch.rand(3)
        two = strongest_directions(D, 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_each_row_is_in_one_mixture_with_a_sign():
    sums = mixtures(torch.eye(7).double(), 3)
    assert sums.abs().tolist() == [[1, 0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1, 0]]
    more = mixtures(torch.eye(50).double(), 80)
    assert more.abs().equal(torch.eye(50).double())
    assert 10 < int((more < 0).sum()) < 40


@pytest.mark.parametrize("width", [180, 300])
def test_what_lies_outside_the_tokens_is_each_rows_noise(width):
    """Mixtures find the directions, and miss them by the noise; at 300 some combinations
    stand for what is left.
    """
    levels = torch.tensor([1e-6, 2e-6, 3e-6]).double()
    D = normal(900, 40) @ normal(40, width, seed=1)
    noise = levels.repeat_interleave(300)[:, None] * normal(900, width, seed=2)
    DV, outside = outside_tokens(D + noise, 40, 64)
    found = (outside.square().sum(1) / (width - 40)).sqrt()
    torch.testing.assert_close(found.view(3, 300).median(1).values, levels, rtol=0.1, atol=0)
    assert DV.shape == (900, 64)
    torch.testing.assert_close(DV[:, :40].norm(dim=1), D.norm(dim=1), rtol=1e-4, atol=0)


def test_rows_are_scaled_to_equal_noise():
    """Rows at noises 1 to 1000 apart: each is measured, the floor for the most precise apart."""
    outside = normal(50, 100) * torch.logspace(-6, -3, 50, dtype=torch.float64)[:, None]
    excess, noise = row_noise(outside, 100, EPS)
    least = 0.1 * noise.median()
    true = torch.logspace(-6, -3, 50, dtype=torch.float64)
    torch.testing.assert_close(noise, true.clamp_min(float(least)), rtol=0.4, atol=0)
    assert excess == pytest.approx(float(outside.square().sum(1).mean().sqrt()))


def test_with_no_dimension_to_spare_noise_is_the_formats():
    excess, noise = row_noise(normal(5, 8), 0, EPS)
    assert excess == 0
    assert noise.tolist() == [EPS] * 5


def test_fewer_rows_than_tokens_leave_nothing_to_measure():
    side = noisy_span(gradient(40, 200, 30), 100, EPS)
    assert side.excess == 0.0
    assert side.gap == 1.0
    assert torch.isfinite(side.coefficients()).all()


def test_tokens_stand_out_and_are_counted():
    found = noisy_span(gradient(360, 120, 8), 8, EPS)
    assert found.above_noise == 8
    assert found.gap > 100
    assert found.excess < 10 * EPS
    crowded = noisy_span(gradient(360, 120, 10), 8, EPS)  # as a second image would have it
    assert crowded.excess > 1e3 * EPS


def test_rows_of_zeros_are_left_out():
    D = gradient(90, 40, 8)
    with_zeros = torch.cat([D, torch.zeros(6, 40).double()])
    targets = normal(40, 3, seed=9)
    expected, found = (noisy_span(rows, 8, EPS) for rows in (D, with_zeros))
    torch.testing.assert_close(found.s, expected.s)
    assert found.coefficients(targets).isfinite().all()
