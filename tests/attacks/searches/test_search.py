"""The search: budgets, restarts, patience, what is recorded, and what survives NaN and Ctrl-C."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from search_tools import attacked, quietly, randn, small_vit
from torch import nn

from aprillab.attacks.result import AttackNotApplicable
from aprillab.attacks.searches import objectives
from aprillab.attacks.searches.recipes import APRIL, GRADINVERSION, Adam, Priors, Recipe
from aprillab.preprocessing import HALF
from aprillab.update import ClientUpdate


@pytest.mark.parametrize("recipe", [APRIL, replace(APRIL, optimizer=Adam(), restarts=3), GRADINVERSION])
def test_the_evaluation_budget_is_kept(recipe: Recipe) -> None:
    model = small_vit()
    _, update = attacked(model)
    calls = []
    distance = lambda g, t: (calls.append(1), objectives.l2(g, t))[1]  # noqa: E731
    result = quietly(model, update, recipe=replace(recipe, distance=distance), max_evaluations=20)
    assert 18 <= len(calls) <= 20
    assert result.diagnostics["evaluations"] == len(calls)
    assert result.diagnostics["stopped"] == "evaluations"
    assert result.history[-1]["evaluation"] == len(calls)


def test_the_time_budget_is_kept() -> None:
    model = small_vit()
    _, update = attacked(model)
    result = quietly(model, update, max_evaluations=None, max_seconds=0.5)
    assert result.diagnostics["stopped"] == "seconds"
    assert 0.4 < result.seconds < 3
    assert result.diagnostics["evaluations"] > 3
    with pytest.raises(ValueError, match="max_evaluations"):
        quietly(model, update, max_evaluations=None)


def test_restarts_share_the_budget_and_the_best_is_kept() -> None:
    model = small_vit()
    _, update = attacked(model)
    result = quietly(model, update, recipe=Recipe(restarts=3), max_evaluations=90)
    runs = result.diagnostics["restarts"]
    assert [run["evaluations"] for run in runs] == [30, 30, 30]
    assert {entry["restart"] for entry in result.history} == {0, 1, 2}
    assert len({entry["loss"] for entry in result.history if entry["evaluation"] in (1, 31, 61)}) == 3
    best = min(range(3), key=lambda k: runs[k]["loss"])
    assert result.diagnostics["best_restart"] == best
    assert result.diagnostics["loss"] == runs[best]["loss"] == min(e["loss"] for e in result.history)
    again = quietly(model, update, recipe=Recipe(), start=result.images, max_evaluations=1)
    assert again.diagnostics["loss"] == pytest.approx(result.diagnostics["loss"])


def test_group_consistency_draws_restarts_together() -> None:
    model = small_vit()
    _, update = attacked(model)
    spreads = {}
    for weight in (1e-9, 10.0):
        recipe = Recipe(priors=Priors(group_consistency=weight), optimizer=Adam(learning_rate=0.05), restarts=3)
        result = quietly(model, update, recipe=recipe, max_evaluations=90)
        spreads[weight] = result.history[-1]["terms"]["group_consistency"]
    assert spreads[10.0] < spreads[1e-9] / 10


def test_ctrl_c_returns_the_best_so_far() -> None:
    model = small_vit()
    _, update = attacked(model)

    def press(entry: dict, images: torch.Tensor) -> None:
        if entry["evaluation"] == 12:
            raise KeyboardInterrupt

    result = quietly(model, update, recipe=replace(APRIL, restarts=4), max_evaluations=500, callback=press)
    assert result.diagnostics["stopped"] == "interrupted"
    assert "interrupted" in result.reason
    assert result.diagnostics["evaluations"] == len(result.history) == 12
    assert result.diagnostics["loss"] == min(entry["loss"] for entry in result.history)


def test_ctrl_c_before_the_first_evaluation_ends_is_not_swallowed_into_nonsense() -> None:
    model = small_vit()
    _, update = attacked(model)

    def distance(g: tuple, t: list) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(AttackNotApplicable, match="interrupted") as refusal:
        quietly(model, update, recipe=Recipe(distance=distance))
    assert refusal.value.numbers == {"stopped": "interrupted"}


def test_a_nan_on_the_way_is_survived() -> None:
    model = small_vit()
    _, update = attacked(model)
    calls = []

    def distance(g: tuple, t: list) -> torch.Tensor:
        calls.append(1)
        value = objectives.relative_l2(g, t)
        return value * math.nan if len(calls) in (1, 20) else value

    result = quietly(model, update, recipe=replace(APRIL, distance=distance), max_evaluations=120)
    assert result.diagnostics["divergences"] == 2
    assert result.diagnostics["evaluations"] == 120
    assert len(result.history) == 118
    assert all(math.isfinite(entry["loss"]) for entry in result.history)
    losses = [entry["loss"] for entry in result.history]
    assert result.diagnostics["loss"] == min(losses) < losses[18]
    # It went on from the best before the NaN, not from anew.
    assert losses[18] == pytest.approx(min(losses[:18]))


def test_nothing_but_nan_is_an_error() -> None:
    model = small_vit()
    _, update = attacked(model)
    with pytest.raises(AttackNotApplicable, match="no picture with a finite loss"):
        quietly(model, update, recipe=Recipe(distance=lambda g, t: objectives.l2(g, t) * math.nan))


def test_snapshots() -> None:
    model = small_vit()
    _, update = attacked(model)
    result = quietly(model, update, snapshots=4, max_evaluations=10)
    assert ["images" in entry for entry in result.history] == [i % 4 == 0 for i in range(10)]
    assert result.history[4]["images"].shape == (1, 1, 4, 4)
    assert {"evaluation", "restart", "loss", "terms", "seconds"} <= set(result.history[0])


# --- Patience ----------------------------------------------------------------------------------------------------


def scripted(*restarts: list[float], rest: float = 9.0) -> objectives.Distance:
    """A distance whose values are read out one by one, whatever the pictures; its gradient is zero."""
    values = iter([value for losses in restarts for value in losses])

    def distance(gradients: tuple, targets: list) -> torch.Tensor:
        return next(values, rest) + 0.0 * gradients[0].sum()

    return distance


def played(
    update: ClientUpdate, model: nn.Module, script: objectives.Distance, parts: dict, **options: object
) -> object:
    """Adam, which stays where it is when the slope is zero; a position term would have one of its
    own.
    """
    return quietly(model, update, recipe=Recipe(distance=script, optimizer=Adam(), **parts), **options)


def test_patience_gives_up_what_does_not_halve_and_spends_the_rest_on_the_best() -> None:
    model = small_vit()
    _, update = attacked(model)
    flat = [8.0, 7.0, 6.0, 5.9, 5.8, 5.7]  # not halved in five evaluations after the first
    # Halved at its 6th evaluation, five after the first, and at its 9th; from there on it creeps.
    slow = [6.0, 5.5, 5.0, 4.5, 4.0, 2.9, 2.8, 2.7, 1.4, 1.3, 1.2, 1.1, 1.05, 1.0]
    rising = [7.0] * 6
    script = scripted(flat, slow, rising, [0.9 - 0.01 * i for i in range(50)])
    pictures: list[torch.Tensor] = []
    result = played(
        update, model, script, {"restarts": 3, "patience": 5}, max_evaluations=40,
        callback=lambda _, images: pictures.append(images.clone()),
    )  # fmt: skip
    runs = result.diagnostics["restarts"]
    assert [run["evaluations"] for run in runs] == [6, 14, 6, 14]
    assert [run["ended"] for run in runs] == ["patience", "patience", "patience", "evaluations"]
    assert [run["loss"] for run in runs] == pytest.approx([5.7, 1.0, 7.0, 0.77])
    assert [entry["restart"] for entry in result.history] == [0] * 6 + [1] * 14 + [2] * 6 + [1] * 14
    assert result.diagnostics["best_restart"] == 1
    assert result.diagnostics["evaluations"] == 40
    # The last run began where the best one ended.
    torch.testing.assert_close(pictures[26], pictures[19])
    assert not torch.allclose(pictures[26], pictures[25])
    assert torch.equal(result.images, pictures[-1])


def test_what_keeps_halving_has_the_whole_budget() -> None:
    model = small_vit()
    _, update = attacked(model)
    halving = [2.0 ** -(i / 3) for i in range(60)]  # every fourth evaluation below half of a milestone
    result = played(update, model, scripted(halving), {"restarts": 3, "patience": 4}, max_evaluations=60)
    assert [run["evaluations"] for run in result.diagnostics["restarts"]] == [60]
    assert result.diagnostics["stopped"] == "evaluations"


def test_no_restart_is_begun_after_one_that_matches() -> None:
    model = small_vit()
    pixels, update = attacked(model)
    start = HALF.to_input(pixels) + 1e-5 * randn(*pixels.shape, seed=5)
    result = played(
        update, model, scripted(rest=1.0), {"restarts": 3, "patience": 4}, start=start, max_evaluations=20
    )
    assert result.diagnostics["residual"] < 1e-3
    assert [run["ended"] for run in result.diagnostics["restarts"]] == ["patience", "evaluations"]
    assert {entry["restart"] for entry in result.history} == {0}


def test_a_budget_smaller_than_the_number_of_restarts_is_for_the_first() -> None:
    model = small_vit()
    _, update = attacked(model)
    result = played(update, model, scripted(rest=1.0), {"restarts": 5, "patience": 80}, max_evaluations=2)
    assert [run["evaluations"] for run in result.diagnostics["restarts"]] == [2]
    for parts in ({}, {"priors": Priors(group_consistency=1e-9), "patience": 80}):  # here each needs a share
        with pytest.raises(ValueError, match="each of 5 restarts"):
            quietly(model, update, recipe=Recipe(restarts=5, **parts), max_evaluations=2)


@pytest.mark.parametrize("parts", [{"restarts": 1}, {"restarts": 2, "priors": Priors(group_consistency=1e-9)}])
def test_patience_is_idle_where_no_other_restart_waits(parts: dict) -> None:
    model = small_vit()
    _, update = attacked(model)
    result = played(update, model, scripted(rest=1.0), {"patience": 2, **parts}, max_evaluations=12)
    assert [run["evaluations"] for run in result.diagnostics["restarts"]] == [12]
    assert result.diagnostics["stopped"] == "evaluations"


def test_ctrl_c_under_patience_keeps_the_best_of_all_restarts() -> None:
    model = small_vit()
    _, update = attacked(model)

    def press(entry: dict, images: torch.Tensor) -> None:
        if entry["evaluation"] == 9:
            raise KeyboardInterrupt

    script = scripted([2.0] * 4, [3.0] * 6)
    result = played(update, model, script, {"restarts": 3, "patience": 3}, max_evaluations=60, callback=press)
    assert result.diagnostics["stopped"] == "interrupted"
    assert [run["ended"] for run in result.diagnostics["restarts"]] == ["patience", "patience", "interrupted"]
    assert (result.diagnostics["loss"], result.diagnostics["best_restart"]) == (2.0, 0)
