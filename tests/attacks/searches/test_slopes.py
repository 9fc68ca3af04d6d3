"""Distances with their slopes in closed form: against autograd, and near a match
against exact arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch
from search_tools import attacked, randn, small_vit
from torch import Tensor, nn

from aprillab.attacks.searches import objectives
from aprillab.attacks.searches.pose import pose
from aprillab.attacks.searches.recipes import RECIPES, PositionTerm, Priors, Recipe
from aprillab.attacks.searches.slopes import MATCHERS, matcher

SHAPES = ((3, 4), (5,), (2, 3, 2, 2), ())
GRADIENTS = [randn(*shape, seed=i) for i, shape in enumerate(SHAPES)]
TARGETS = [10.0 ** (-i) * randn(*shape, seed=10 + i) for i, shape in enumerate(SHAPES)]
EPS = torch.finfo(torch.float64).eps


def by_autograd(name: str, gradients: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [gradient.clone().requires_grad_() for gradient in gradients]
    value = objectives.DISTANCES[name](leaves, TARGETS)
    return value.detach(), list(torch.autograd.grad(value, leaves))


def test_every_distance_has_a_matcher() -> None:
    assert set(MATCHERS) == set(objectives.DISTANCES)


@pytest.mark.parametrize("name", MATCHERS)
def test_value_slope_and_residual(name: str) -> None:
    kept = [gradient.clone() for gradient in GRADIENTS]
    found = matcher(name, TARGETS, EPS)(GRADIENTS)
    value, slopes = by_autograd(name, GRADIENTS)
    torch.testing.assert_close(found.distance, value)
    for mine, expected in zip(found.slopes, slopes, strict=True):
        torch.testing.assert_close(found.scale * mine, expected)
    flat, shared = (torch.cat([t.flatten() for t in tensors]) for tensors in (GRADIENTS, TARGETS))
    assert found.residual.item() == pytest.approx(((flat - shared).norm() / shared.norm()).item())
    assert all(torch.equal(a, b) for a, b in zip(GRADIENTS, kept, strict=True))  # nothing is changed in place


@pytest.mark.parametrize("name", MATCHERS)
def test_of_gradients_that_are_views_of_others(name: str) -> None:
    """Autograd hands out transposed and expanded tensors."""
    base = randn(4, 3, seed=5)
    gradients, targets = [base.T, base[:1].expand(4, 3)], [randn(3, 4, seed=6), randn(4, 3, seed=7)]
    found = matcher(name, targets, EPS)(gradients)
    again = matcher(name, targets, EPS)([gradient.contiguous() for gradient in gradients])
    torch.testing.assert_close(found.distance, again.distance)
    for mine, other in zip(found.slopes, again.slopes, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_function_of_ones_own_is_differentiated() -> None:
    found = matcher(partial(objectives.l2_l1, l1_weight=0.3), TARGETS, EPS)(GRADIENTS)
    leaves = [gradient.clone().requires_grad_() for gradient in GRADIENTS]
    value = objectives.l2_l1(leaves, TARGETS, l1_weight=0.3)
    torch.testing.assert_close(found.distance, value.detach())
    for mine, expected in zip(found.slopes, torch.autograd.grad(value, leaves), strict=True):
        torch.testing.assert_close(mine, expected)
    part = matcher(lambda g, t: (g[0] - t[0]).square().sum(), TARGETS, EPS)(GRADIENTS)
    assert not any(slope.any() for slope in part.slopes[1:])  # of what it does not look at, zero


@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9])
def test_the_cosine_keeps_its_digits_near_a_match(step: float) -> None:
    """1 − cos of nearly equal vectors, in exact arithmetic: there the textbook formula has none
    left.
    """
    near = [target + step * randn(*target.shape, seed=20 + i) for i, target in enumerate(TARGETS)]
    found = matcher("cosine", TARGETS, EPS)(near)
    g, t = ([Fraction(v) for tensor in tensors for v in tensor.flatten().tolist()] for tensors in (near, TARGETS))
    dot, square, size = (sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((g, t), (g, g), (t, t)))
    # 1 − c = (1 − c²) / (1 + c), and c = 1 to a relative 1e-6 or better
    expected = float((1 - dot**2 / (square * size)) / 2)
    assert found.distance.item() == pytest.approx(expected, rel=1e-4)
    apart = sum((a - b) ** 2 for a, b in zip(g, t, strict=True))
    assert found.residual.item() == pytest.approx(float(apart / size) ** 0.5, rel=1e-6)


def test_the_cosine_of_zero_gradients_is_finite() -> None:
    found = matcher("cosine", TARGETS, EPS)([torch.zeros_like(target) for target in TARGETS])
    assert found.distance == 1
    assert all(slope.isfinite().all() for slope in found.slopes)


@pytest.mark.parametrize("name", [*RECIPES, "with all priors"])
def test_the_slope_of_the_whole_loss_is_autograds(name: str) -> None:
    """Through coordinates, position term, priors and unknown labels, of restarts together."""
    model = small_vit(image_size=8, patch_size=4)
    _, update = attacked(model, size=8)
    priors = Priors(total_variation=0.3, image_norm=0.2, box=5.0, seams=0.6, group_consistency=0.4)
    every = replace(RECIPES["april"], priors=priors, position_term=PositionTerm(weight=0.7, per_token=False))
    recipe: Recipe = replace(RECIPES.get(name, every), labels="optimize")
    problem = pose(
        model, update, recipe, labels=None, batch_size=1, image_shape=None, coordinates=None,
        loss=nn.functional.cross_entropy, dtype=torch.float64, device=None, anatomy=None, preprocessing=None, seed=0,
    )  # fmt: skip
    unknowns = problem.unknowns_of(randn(2, 1, 1, 8, 8, seed=3)).requires_grad_()
    logits = randn(2, 1, 4, seed=4).requires_grad_()
    found = problem.evaluate(unknowns, logits)

    distance = objectives.DISTANCES[str(recipe.distance)]
    images = problem.images_of(unknowns)
    parts = []
    for x, y in zip(images, logits, strict=True):
        gradients = problem.gradients(x, y)
        value = distance(gradients, problem.targets)
        if problem.position is not None:
            k, term = problem.position.index, problem.position.term
            value = value + term.weight * objectives.position_cosine(
                gradients[k], problem.targets[k], per_token=term.per_token
            )
        parts.append(value)
    whole = torch.stack(parts).mean() + sum(weight * prior for _, weight, prior in problem._priors(images))
    torch.testing.assert_close(found.loss, whole.detach())
    for mine, expected in zip(found.slopes, torch.autograd.grad(whole, [unknowns, logits]), strict=True):
        torch.testing.assert_close(mine, expected)
