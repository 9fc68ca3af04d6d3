"""Recipes: illegal ones cannot be written down, and the published ones are what their papers say."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

import aprillab as al
from aprillab.attacks.searches import objectives
from aprillab.attacks.searches.recipes import (
    APRIL,
    DLG,
    GRADINVERSION,
    IDLG,
    INVERTING_GRADIENTS,
    LBFGS,
    RECIPES,
    TAG,
    Adam,
    PositionTerm,
    Priors,
    Recipe,
    recipe_of,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(distance="l3"), "distance='l3' is neither callable nor one of 'l2'"),
        (lambda: Recipe(optimizer="adam"), r"optimizer='adam' must be LBFGS\(…\) or Adam\(…\)"),
        (lambda: Recipe(position_term=1.0), r"position_term=1.0 must be PositionTerm\(…\) or None"),
        (lambda: Recipe(priors=None), r"priors=None must be Priors\(…\)"),
        (lambda: Recipe(labels="guess"), "labels='guess'"),
        (lambda: Recipe(restarts=0), "restarts=0 must be at least 1"),
        (lambda: Recipe(patience=0), "patience=0 must be at least 1, or None"),
        (lambda: Recipe(row_space=True, optimizer=Adam(clamp=True)), "clamp=True works on pixels"),
        (lambda: PositionTerm(weight=0.0), "weight=0.0 of the position term must be > 0"),
        (lambda: PositionTerm(weight=math.inf), "weight=inf"),
        (lambda: Priors(total_variation=math.nan), "total_variation=nan must be a number ≥ 0"),
        (lambda: Priors(box=-1.0), "box=-1.0"),
        (lambda: LBFGS(learning_rate=0.0), "learning_rate=0.0 must be > 0"),
        (lambda: LBFGS(history_size=0), "history_size=0 must be at least 1"),
        (lambda: Adam(learning_rate=-1.0), "learning_rate=-1.0 must be > 0"),
        (lambda: Adam(beta2=1.0), "beta2=1.0 must be at least 0 and less than 1"),
        (lambda: Priors(seams=-0.1), "seams=-0.1 must be a number ≥ 0"),
        (lambda: recipe_of("aprill"), "recipe='aprill' is neither a Recipe nor one of dlg, idlg"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("wrong", [{"schedule": True}, {"clamp": True}, {"signed": True}])
def test_what_belongs_to_adam_cannot_be_said_of_lbfgs(wrong: dict[str, bool]) -> None:
    with pytest.raises(TypeError, match=next(iter(wrong))):
        LBFGS(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="history_size"):
        Adam(history_size=10)  # type: ignore[call-arg]


def test_recipes_are_values() -> None:
    with pytest.raises(FrozenInstanceError):
        APRIL.restarts = 2  # type: ignore[misc]
    changed = replace(APRIL, row_space=False)
    assert (changed.row_space, changed.optimizer, APRIL.row_space) == (False, LBFGS(), True)
    assert recipe_of(changed) is changed
    assert [recipe.name for recipe in RECIPES.values()] == list(RECIPES)
    assert replace(APRIL).name == "april"
    assert changed.name == "custom"
    assert al.RECIPES is RECIPES
    assert al.Recipe is Recipe


def test_the_papers_choices() -> None:
    """Distance, optimizer and priors as the papers have them; iDLG is DLG with the label read off."""
    assert replace(DLG, labels="recover") == IDLG
    assert (DLG.distance, DLG.optimizer) == ("l2", LBFGS())
    assert INVERTING_GRADIENTS.distance == "cosine"
    assert INVERTING_GRADIENTS.optimizer == Adam(learning_rate=0.1, signed=True, schedule=True, clamp=True)
    assert INVERTING_GRADIENTS.priors.total_variation > 0
    assert TAG.distance == "l2_l1"
    assert GRADINVERSION.together
    assert not any(recipe.together for name, recipe in RECIPES.items() if name != "gradinversion")
    assert [name for name, recipe in RECIPES.items() if recipe.position_term] == ["april"]


def test_patience_is_for_restarts_that_wait() -> None:
    assert APRIL.impatient
    assert not replace(APRIL, restarts=1).impatient
    assert not replace(APRIL, patience=None).impatient
    assert not replace(APRIL, priors=Priors(group_consistency=1.0)).impatient


def test_a_distance_of_ones_own() -> None:
    def distance(gradients: Any, targets: Any) -> Any:
        return objectives.l2(gradients, targets)

    assert Recipe(distance=distance).distance is distance
    assert Recipe(distance=distance).name == "custom"
