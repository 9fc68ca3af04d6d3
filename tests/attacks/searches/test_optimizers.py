"""The optimizers: the fields that are Adam's own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from search_tools import attacked, quietly, small_vit

from aprillab.attacks.searches.recipes import Adam, Priors, Recipe


def test_clamp_keeps_pixels_in_range() -> None:
    model = small_vit()
    _, update = attacked(model)
    outside: list[float] = []
    for clamp in (True, False):
        outside.append(0.0)
        quietly(
            model, update, recipe=Recipe(optimizer=Adam(learning_rate=0.5, clamp=clamp)), max_evaluations=20,
            callback=lambda _, images: outside.append(max(outside.pop(), images.abs().max().item())),
        )  # fmt: skip
    assert outside[0] <= 1 + 1e-12 < outside[1]


def test_the_schedule_cuts_the_step_to_a_tenth_three_times() -> None:
    """Adam's first steps are as long as its learning rate: with a constant slope all of them are."""
    model = small_vit()
    _, update = attacked(model)
    pictures: list[torch.Tensor] = []
    constant = lambda g, t: 0.0 * g[0].sum()  # noqa: E731
    slope = Priors(image_norm=1.0)
    quietly(
        model, update, recipe=Recipe(distance=constant, priors=slope, optimizer=Adam(signed=True, schedule=True)),
        start=torch.full((1, 1, 4, 4), 9.0, dtype=torch.float64), max_evaluations=16,
        callback=lambda _, images: pictures.append(images.clone()),
    )  # fmt: skip
    steps = [(a - b).mean().item() for a, b in pairwise(pictures)]
    # After evaluations 1 to 5, from 6 = 3/8 · 16, from 10 = 5/8 · 16, and from 14 = 7/8 · 16 on.
    assert steps == pytest.approx([0.1] * 5 + [0.01] * 4 + [0.001] * 4 + [0.0001] * 2, rel=1e-6)


def last_step(beta2: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """The hundredth step of Adam, after ten on a slope of 100 and the others on one of 1."""
    model, pictures = small_vit(), []
    _, update = attacked(model)
    slopes = enumerate([100.0] * 10 + [1.0] * 90)

    def flattening(images: torch.Tensor) -> torch.Tensor:
        k, slope = next(slopes)
        return slope * (images - images.detach()).sum() - k  # the lowest loss is always the last

    monkeypatch.setattr("aprillab.attacks.searches.objectives.image_norm", flattening)
    constant = lambda g, t: 0.0 * g[0].sum()  # noqa: E731
    quietly(
        model, update, max_evaluations=100, callback=lambda _, images: pictures.append(images.clone()),
        recipe=Recipe(distance=constant, priors=Priors(image_norm=1.0), optimizer=Adam(beta2=beta2)),
    )  # fmt: skip
    return (pictures[-2] - pictures[-1]).mean().item()


def test_a_short_memory_lets_steps_keep_their_length_where_slopes_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """With β₂ = 0.9 the divisor forgets the steep beginning."""
    assert last_step(0.9, monkeypatch) > 0.05
    assert 0 < last_step(0.999, monkeypatch) < 0.005
