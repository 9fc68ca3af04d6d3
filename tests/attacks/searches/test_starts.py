"""Where a search begins: noise, grey, pictures, a closed form's result, an earlier search."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from search_tools import attacked, quietly, small_vit

from aprillab.attacks.searches import objectives
from aprillab.attacks.searches.recipes import APRIL, Adam, Recipe
from aprillab.preprocessing import HALF


def test_grey_is_flatter_than_noise() -> None:
    model = small_vit()
    _, update = attacked(model)
    spread = {
        start: quietly(model, update, start=start, max_evaluations=1, snapshots=1).history[0]["images"].std().item()
        for start in ("noise", "grey")
    }
    assert spread["noise"] == pytest.approx(0.5, rel=0.4)  # 1/4 of the pixels' range is 1/2 of HALF's
    assert 0 < spread["grey"] < 1e-3


def test_noise_keeps_its_energy_in_the_row_space() -> None:
    model = small_vit(image_size=16, patch_size=8)  # four patches of 64 pixels
    _, update = attacked(model, size=16)
    result = quietly(model, update, max_evaluations=1)
    assert result.diagnostics["directions"] == 4
    assert result.images.std().item() == pytest.approx(0.5, rel=0.4)


def test_a_warm_start_at_the_original_ends_at_once() -> None:
    model = small_vit()
    pixels, update = attacked(model)
    result = quietly(model, update, start=HALF.to_input(pixels))
    assert result.diagnostics["evaluations"] == 1
    assert result.diagnostics["stopped"] == "tolerance"
    assert result.diagnostics["residual"] < 1e-14
    assert result.exact is False


def test_a_closed_forms_result_is_where_to_begin_and_its_images_are_no_search() -> None:
    """Three ways to start: pictures, a result without a search behind it, a search to go on from."""
    model = small_vit()
    _, update = attacked(model)
    one = quietly(model, update, max_evaluations=9)
    closed_form = replace(one, attack="embedding_closed_form", diagnostics={}, history=[])
    begun = [quietly(model, update, start=start, max_evaluations=12) for start in (one.images, closed_form)]
    assert torch.equal(begun[0].images, begun[1].images)
    assert [entry["evaluation"] for entry in begun[0].history] == list(range(1, 13))
    assert begun[0].history[0]["loss"] == pytest.approx(one.diagnostics["loss"])
    gone_on = quietly(model, update, start=one, max_evaluations=12)
    assert gone_on.history[:9] == one.history
    assert len(gone_on.diagnostics["restarts"]) == 2


def test_a_start_with_other_pictures_is_refused() -> None:
    model = small_vit()
    _, update = attacked(model)
    one = quietly(model, update, max_evaluations=2)
    two_pictures = torch.zeros(2, 1, 4, 4)
    for start in (two_pictures, replace(one, images=two_pictures), replace(one, images=two_pictures, diagnostics={})):
        with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\)"):
            quietly(model, update, max_evaluations=9, start=start)


# --- An earlier search -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        (APRIL, {}),
        (replace(APRIL, optimizer=Adam(learning_rate=0.02)), {}),
        (APRIL, {"image_size": 16, "patch_size": 8}),  # the row space's case
    ],
)
def test_a_search_goes_on_where_the_earlier_one_ended(recipe: Recipe, sizes: dict) -> None:
    model = small_vit(**sizes)
    _, update = attacked(model, size=sizes.get("image_size", 4))
    one = quietly(model, update, recipe=recipe, max_evaluations=30)
    assert (one.diagnostics["directions"] == 4) == bool(sizes)
    calls: list[int] = []
    two = quietly(
        model, update, recipe=recipe, max_evaluations=50, start=one,
        callback=lambda entry, _: calls.append(entry["evaluation"]),
    )  # fmt: skip
    assert calls == list(range(31, 51))
    assert [entry["evaluation"] for entry in two.history] == list(range(1, 51))
    assert two.history[:30] == one.history
    assert len(one.history) == 30
    assert two.history[30]["loss"] == pytest.approx(one.diagnostics["loss"], rel=1e-6)
    assert two.diagnostics["loss"] < one.diagnostics["loss"]
    assert two.diagnostics["evaluations"] == 50
    assert two.diagnostics["stopped"] == "evaluations"
    runs = two.diagnostics["restarts"]
    assert [run["evaluations"] for run in runs] == [30, 20]
    assert runs[:1] == one.diagnostics["restarts"]
    assert len(one.diagnostics["restarts"]) == 1
    seconds = [entry["seconds"] for entry in two.history]
    assert seconds == sorted(seconds)
    assert two.seconds >= seconds[-1] > seconds[30] >= one.seconds
    rate = two.diagnostics["evaluations_per_second"]
    assert rate == pytest.approx(50 / two.seconds, rel=1e-6)


def test_what_goes_on_is_the_best_restart() -> None:
    model = small_vit()
    _, update = attacked(model)
    one = quietly(model, update, recipe=Recipe(restarts=3), max_evaluations=60)
    two = quietly(model, update, recipe=Recipe(restarts=3), max_evaluations=70, start=one)
    assert {entry["restart"] for entry in two.history[60:]} == {one.diagnostics["best_restart"]}
    assert two.diagnostics["best_restart"] == one.diagnostics["best_restart"]
    assert [run["evaluations"] for run in two.diagnostics["restarts"]] == [20, 20, 20, 10]
    assert two.history[60]["loss"] == pytest.approx(one.diagnostics["loss"], rel=1e-6)


def test_what_goes_on_after_ctrl_c_remembers_labels_and_divergences() -> None:
    model = small_vit()
    _, update = attacked(model)
    headless = update.without(["head.weight", "head.bias"])
    calls = []

    def distance(g: tuple, t: list) -> torch.Tensor:
        calls.append(1)
        return objectives.relative_l2(g, t) * (math.nan if len(calls) == 5 else 1)

    def press(entry: dict, images: torch.Tensor) -> None:
        if entry["evaluation"] == 60:
            raise KeyboardInterrupt

    recipe = replace(APRIL, distance=distance)
    one = quietly(model, headless, recipe=recipe, callback=press)
    assert (one.diagnostics["stopped"], one.diagnostics["divergences"]) == ("interrupted", 1)
    two = quietly(model, headless, recipe=recipe, max_evaluations=80, start=one)
    assert two.diagnostics["divergences"] == 1
    assert two.labels.tolist() == one.labels.tolist()
    # The logits are not in the result, but its label is: far nearer than a new beginning.
    assert two.history[59]["loss"] < one.history[0]["loss"] / 4
    assert two.history[-1]["evaluation"] == 80


def test_budgets_are_those_of_both_searches_together() -> None:
    model = small_vit()
    _, update = attacked(model)
    one = quietly(model, update, max_evaluations=20)
    with pytest.raises(ValueError, match="max_evaluations=20 is the budget of both"):
        quietly(model, update, max_evaluations=20, start=one)
    with pytest.raises(ValueError, match=r"max_seconds=.* is the budget of both"):
        quietly(model, update, max_seconds=one.seconds / 2, start=one)
    limit = one.seconds + 0.2
    two = quietly(model, update, max_evaluations=None, max_seconds=limit, start=one)
    assert two.diagnostics["stopped"] == "seconds"
    assert limit <= two.seconds < limit + 2
    assert two.diagnostics["evaluations"] > 20
