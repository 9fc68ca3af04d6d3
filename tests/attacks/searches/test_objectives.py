"""Distances, the position term and priors against direct formulas and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from search_tools import randn

from aprillab.attacks.searches import objectives
from aprillab.attacks.searches.slopes import matcher
from aprillab.preprocessing import HALF, UNIT

SHAPES = ((3, 4), (5,), (2, 3, 2, 2))


GRADIENTS = [randn(*shape, seed=i) for i, shape in enumerate(SHAPES)]


TARGETS = [randn(*shape, seed=10 + i) for i, shape in enumerate(SHAPES)]


def flat(tensors: list[torch.Tensor]) -> list[float]:
    return [value for tensor in tensors for value in tensor.flatten().tolist()]


def test_distances_by_their_formulas() -> None:
    g, t = flat(GRADIENTS), flat(TARGETS)
    squared = sum((a - b) ** 2 for a, b in zip(g, t, strict=True))
    absolute = sum(abs(a - b) for a, b in zip(g, t, strict=True))
    dot = sum(a * b for a, b in zip(g, t, strict=True))
    norms = math.sqrt(sum(a * a for a in g) * sum(b * b for b in t))
    relative = balanced = 0.0
    for one, other in zip(GRADIENTS, TARGETS, strict=True):
        difference = sum((a - b) ** 2 for a, b in zip(flat([one]), flat([other]), strict=True))
        relative += difference / sum(b * b for b in flat([other])) / len(TARGETS)
        both = sum(v * v for v in flat([one])) + sum(b * b for b in flat([other]))
        balanced += 2 * difference / both / len(TARGETS)
    assert objectives.l2(GRADIENTS, TARGETS).item() == pytest.approx(squared)
    assert objectives.l2_l1(GRADIENTS, TARGETS, l1_weight=0.3).item() == pytest.approx(squared + 0.3 * absolute)
    assert objectives.cosine(GRADIENTS, TARGETS).item() == pytest.approx(1 - dot / norms)
    assert objectives.relative_l2(GRADIENTS, TARGETS).item() == pytest.approx(relative)
    assert objectives.balanced_l2(GRADIENTS, TARGETS).item() == pytest.approx(balanced)


@pytest.mark.parametrize("strength", [1e-6, 0.1, 1.0, 10.0])
def test_balanced_l2_gains_nothing_by_weak_gradients(strength: float) -> None:
    """Wrong gradients, orthogonal to the targets, cost 2, weak or strong; relative L2
    prefers the weak ones.
    """
    wrong = [g - t * (g * t).sum() / t.square().sum() for g, t in zip(GRADIENTS, TARGETS, strict=True)]
    trial = [strength * w * t.norm() / w.norm() for w, t in zip(wrong, TARGETS, strict=True)]
    assert objectives.balanced_l2(trial, TARGETS).item() == pytest.approx(2)
    assert objectives.relative_l2(trial, TARGETS).item() == pytest.approx(1 + strength**2)


def test_balanced_l2_near_a_match_is_relative_l2() -> None:
    near = [t + 1e-9 * g for g, t in zip(GRADIENTS, TARGETS, strict=True)]
    assert objectives.balanced_l2(near, TARGETS).item() == pytest.approx(
        objectives.relative_l2(near, TARGETS).item(), rel=1e-8
    )
    zeros = [torch.zeros_like(t).requires_grad_() for t in TARGETS]
    value = objectives.balanced_l2(zeros, TARGETS)
    assert value.item() == pytest.approx(2)
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(value, zeros))


def test_a_tensor_of_rounding_noise_does_not_drown_the_others() -> None:
    noise, other_noise = 1e-17 * randn(6, seed=1), 1e-17 * randn(6, seed=2)
    for distance in (objectives.relative_l2, objectives.balanced_l2):
        with_noise = distance([*TARGETS, other_noise], [*TARGETS, noise])
        assert with_noise.item() < 1e-9


@pytest.mark.parametrize("eps", [None, torch.finfo(torch.float32).eps, 1e-2])
def test_tensors_below_the_rounding_of_what_was_shared_are_left_out(eps: float | None) -> None:
    """Below ε^¾ of the largest norm; ε is the update's, and that of the dtype where none is given."""
    floor = 5.0 * (eps or torch.finfo(torch.float64).eps) ** 0.75
    directions = [g / g.norm() for g in GRADIENTS]
    for factor, others in ((0.99, 0.0), (1.01, 4.0)):
        targets = [5.0 * directions[0], factor * floor * directions[1], 2.0 * directions[2]]
        # Off by the target's own norm, by twice, and by nothing: relative squares of 1, 4 and 0.
        gradients = [2 * targets[0], 3 * targets[1], targets[2]]
        found = objectives.relative_l2(gradients, targets, eps=eps).item()
        assert found == pytest.approx((1 + others) / 3)  # a mean over all tensors, those left out included
        # Relative to ½(4 + 1) and ½(9 + 1) times the target's norm
        found = objectives.balanced_l2(gradients, targets, eps=eps).item()
        assert found == pytest.approx((1 / 2.5 + others / 5) / 3)
    inputs = [g.clone().requires_grad_() for g in gradients]
    targets[1] = 0.5 * targets[1]
    (slope,) = torch.autograd.grad(objectives.relative_l2(inputs, targets, eps=eps), inputs[1])
    assert not slope.any()


@pytest.mark.parametrize("away", [1.0, 1e-7])
@pytest.mark.parametrize("strength", [0.0, 1e-3, 1.0])
def test_the_slope_of_balanced_l2_in_closed_form(away: float, strength: float) -> None:
    """Far from a match and near it, for weak gradients and for none, with a tensor that is left
    out.
    """
    noise = [torch.full((3,), 1e-15, dtype=torch.float64)]
    targets = [*TARGETS, *noise]
    trial = [strength * (t + away * g) for g, t in zip([*GRADIENTS, *noise], targets, strict=True)]
    leaves = [g.clone().requires_grad_() for g in trial]
    value = objectives.balanced_l2(leaves, targets)
    expected = torch.autograd.grad(value, leaves)
    found = matcher("balanced_l2", targets, torch.finfo(torch.float64).eps)(trial)
    assert found.distance.item() == pytest.approx(value.item(), rel=1e-12)
    for slope, other in zip(found.slopes, expected, strict=True):
        torch.testing.assert_close(found.scale * slope, other, rtol=1e-9, atol=0)
    assert not found.slopes[-1].any()


def test_position_cosine_per_token_and_whole() -> None:
    g, t = randn(1, 3, 5, seed=3), randn(1, 3, 5, seed=4)
    t[0, 0] *= 100
    rows = [1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(g[0], t[0], strict=True)]
    assert objectives.position_cosine(g, t).item() == pytest.approx(sum(rows) / 3)
    assert objectives.position_cosine(g, t, per_token=False).item() == pytest.approx(
        1 - float((g * t).sum() / (g.norm() * t.norm()))
    )
    swapped = t[:, [0, 2, 1]]
    # Where the class token's row outweighs the others, only the first of the two sees that two
    # tokens are swapped.
    assert objectives.position_cosine(swapped, t).item() > 0.1
    assert objectives.position_cosine(swapped, t, per_token=False).item() < 1e-3


def test_position_cosine_of_a_zero_row_is_finite() -> None:
    g = randn(1, 3, 5, seed=3)
    g[0, 1] = 0
    g.requires_grad_()
    value = objectives.position_cosine(g, randn(1, 3, 5, seed=4))
    (gradient,) = torch.autograd.grad(value, g)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_priors_by_their_formulas() -> None:
    x = randn(2, 3, 4, 5, seed=5)
    vertical = [abs(float(x[b, c, i + 1, j] - x[b, c, i, j])) for b in range(2) for c in range(3) for i in range(3) for j in range(5)]  # fmt: skip  # noqa: E501
    horizontal = [abs(float(x[b, c, i, j + 1] - x[b, c, i, j])) for b in range(2) for c in range(3) for i in range(4) for j in range(4)]  # fmt: skip  # noqa: E501
    expected = sum(vertical) / len(vertical) + sum(horizontal) / len(horizontal)
    assert objectives.total_variation(x).item() == pytest.approx(expected)
    assert objectives.image_norm(x).item() == pytest.approx(sum(v * v for v in flat([x])) / x.numel())
    pixels = torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.0], dtype=torch.float64).reshape(1, 1, 1, 5)
    assert objectives.outside_box(HALF.to_input(pixels), HALF).item() == pytest.approx((0.25 + 1) / 5)
    group = torch.stack([torch.zeros(1, 1, 2, 2), 2 * torch.ones(1, 1, 2, 2)])
    assert objectives.group_spread(group).item() == pytest.approx(1)


def test_seams_by_their_formula() -> None:
    """Patches of 2 × 3 in pictures of 4 × 6: one seam down, one across; and three seams where
    rows are left over.
    """
    x = randn(2, 3, 4, 6, seed=5)
    across = [float(x[b, c, 2, j] - x[b, c, 1, j]) ** 2 for b in range(2) for c in range(3) for j in range(6)]
    along = [float(x[b, c, i, 3] - x[b, c, i, 2]) ** 2 for b in range(2) for c in range(3) for i in range(4)]
    expected = sum(across) / len(across) + sum(along) / len(along)
    assert objectives.patch_seams(x, (2, 3)).item() == pytest.approx(expected)
    tall = torch.tensor([0.0, 1, 3, 3, 4, 4, 9]).reshape(1, 1, 7, 1)  # steps at 2, 4 and 6: 2, 1 and 5
    assert objectives.patch_seams(tall, (2, 1)).item() == pytest.approx((4 + 1 + 25) / 3)
    assert objectives.patch_seams(x, (4, 6)) == 0  # one patch has no seam


@pytest.mark.parametrize("name", objectives.DISTANCES)
def test_gradients_of_distances(name: str) -> None:
    inputs = tuple(g.clone().requires_grad_() for g in GRADIENTS)
    assert torch.autograd.gradcheck(lambda *g: objectives.DISTANCES[name](g, TARGETS), inputs)


def test_gradients_of_priors() -> None:
    x = randn(2, 1, 3, 3, seed=6).requires_grad_()
    for prior in (objectives.total_variation, objectives.image_norm, lambda v: objectives.outside_box(v, UNIT)):
        assert torch.autograd.gradcheck(prior, (x,))
    assert torch.autograd.gradcheck(lambda v: objectives.patch_seams(v, (2, 1)), (x,))
    g, t = randn(1, 3, 4, seed=7).requires_grad_(), randn(1, 3, 4, seed=8)
    for per_token in (True, False):
        check = lambda v, per=per_token: objectives.position_cosine(v, t, per_token=per)  # noqa: E731
        assert torch.autograd.gradcheck(check, (g,))
    assert torch.autograd.gradcheck(objectives.group_spread, (randn(3, 1, 1, 2, 2).requires_grad_(),))
