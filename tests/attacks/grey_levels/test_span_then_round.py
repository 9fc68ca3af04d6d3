"""Whole grey levels in what the span leaves open: found, verified, or said not to be."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grey_pictures import client, photographs, vit
from torch import Tensor, nn

import aprillab as al
from aprillab.attacks.grey_levels import rounds
from aprillab.attacks.grey_levels import span_then_round as attack
from aprillab.attacks.grey_levels.rounds import Rounds
from aprillab.attacks.grey_levels.span_then_round import span_then_round
from aprillab.attacks.result import AttackNotApplicable, Reconstruction
from aprillab.defenses import gaussian_noise, to_precision, withhold
from aprillab.metrics import match_batch
from aprillab.models import sinusoidal_2d
from aprillab.preprocessing import HALF, IMAGENET
from aprillab.update import client_update


def quietly(*arguments: Any, **options: Any) -> Reconstruction:
    return span_then_round(*arguments, progress=False, **options)


def settling(patch: pytest.MonkeyPatch, spoil: Callable[[Rounds], None]) -> None:
    """Let something be done to the patches each time some were settled."""
    settle = rounds.settle

    def spoilt(state: Rounds, *arguments: Any, **options: Any) -> int:
        taken = settle(state, *arguments, **options)
        spoil(state)
        return taken

    patch.setattr(rounds, "settle", spoilt)
    patch.setattr(attack, "settle", spoilt)


# --- From the span alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["prenorm", "april"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinusoids_fall_without_a_search(block: str, dtype: torch.dtype) -> None:
    model, pixels = vit(block=block).to(dtype), photographs("coffee")
    update = client(model, pixels)
    result = quietly(model, update, max_evaluations=0)
    assert torch.equal((255 * result.pixels).round(), (255 * pixels).round())  # every level of every pixel
    assert result.exact
    assert result.labels.tolist() == [1]
    numbers = result.diagnostics
    assert numbers["settled"].shape == (1, 16)
    assert numbers["settled_by_span"] == 16
    assert (numbers["stopped"], numbers["evaluations"], numbers["loss"]) == ("settled", 0, None)
    assert numbers["residual"] < 30 * torch.finfo(dtype).eps
    assert "16 of 16 patches were settled" in result.reason
    assert result.history == []


def test_it_knows_more_than_the_span_attack() -> None:
    model, pixels = vit(), photographs("rocket")
    update = client(model, pixels)
    alone = al.span_closed_form(model, update, strict=False)
    assert al.psnr(alone.pixels, pixels).item() < 30
    assert not alone.exact
    assert quietly(model, update, max_evaluations=0).exact


def test_channels_may_have_scales_of_their_own() -> None:
    model, pixels = vit(image_size=8), photographs("chelsea", size=8)
    update = client(model, pixels, IMAGENET)
    result = quietly(model, update, preprocessing=IMAGENET, max_evaluations=0)
    assert result.exact
    assert torch.equal((255 * result.pixels).round(), (255 * pixels).round())


def test_other_numbers_of_levels() -> None:
    model = vit(image_size=8)
    pixels = (15 * photographs("coffee", size=8)).round() / 15
    update = client(model, pixels)
    assert quietly(model, update, levels=16, max_evaluations=0).exact
    assert quietly(model, update, levels=256, max_evaluations=0).exact  # 15 divides 255
    assert not quietly(model, update, levels=100, max_evaluations=0).exact


def test_a_picture_off_the_grid_is_not_called_exact() -> None:
    model, pixels = vit(image_size=8), photographs("coffee", size=8)
    dithered = pixels + (torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0)).double() - 0.5) / 255
    result = quietly(model, client(model, dithered), max_evaluations=0)
    assert not result.exact
    assert not result.diagnostics["settled"].any()


def test_a_coarse_gradient_verifies_nothing() -> None:
    model, pixels = vit(image_size=8), photographs("coffee", size=8)
    coarse = to_precision(client(model, pixels), torch.bfloat16)
    result = quietly(model, coarse, max_evaluations=0)
    assert not result.exact
    assert not {c.name: c.holds for c in result.conditions}["precision verifies a picture"]
    assert "verifies no picture" in result.reason


def test_invert_takes_it_by_name_and_says_where_it_would_go_on() -> None:
    model, pixels = vit(), photographs("coffee")
    update = client(model, pixels)
    assert al.invert(model, update, attack="span_then_round", max_evaluations=0, progress=False).exact
    assert "whole grey levels" in al.invert(model, update).diagnostics["attacks"]["span_then_round"]


# --- With a search ------------------------------------------------------------------------------------------------


def test_2d_sinusoids_fall_with_a_search() -> None:
    """Their span is ambiguous at any precision, whole levels or not: differences of
    patches are whole too.
    """
    model = vit(width=96, seed=3, position_values=sinusoidal_2d((4, 4), 96))
    pixels = photographs("chelsea")
    update = client(model, pixels)
    alone = quietly(model, update, max_evaluations=0)
    assert not alone.exact
    assert alone.diagnostics["stopped"] == "evaluations"
    assert 0 <= alone.diagnostics["settled_by_span"] < 16
    result = quietly(model, update, max_evaluations=600)
    assert result.exact
    assert torch.equal((255 * result.pixels).round(), (255 * pixels).round())
    assert result.diagnostics["evaluations"] == len(result.history) > 0
    assert [entry["evaluation"] for entry in result.history] == list(range(1, len(result.history) + 1))
    settled = [entry["settled"] for entry in result.history]
    assert settled == sorted(settled)
    assert settled[0] == result.diagnostics["settled_by_span"]


@pytest.mark.slow
def test_a_batch_of_two_falls_bit_by_bit() -> None:
    model = vit(image_size=16, patch_size=8, width=64, position="frozen")
    pixels = photographs("chelsea", "coffee")
    update = client(model, pixels)
    result = quietly(model, update, max_evaluations=900)
    assert result.exact
    order = match_batch(result.pixels, pixels)
    assert torch.equal((255 * result.pixels[order]).round(), (255 * pixels).round())
    assert sorted(result.labels.tolist()) == [1, 2]
    assert result.diagnostics["batch_size"] == 2
    assert result.diagnostics["settled"].shape == (2, 4)


def test_ctrl_c_returns_the_best_so_far() -> None:
    model = vit(position_values=sinusoidal_2d((4, 4), 64))
    seen: list[dict[str, Any]] = []

    def press(entry: dict[str, Any], images: Tensor) -> None:
        seen.append(entry)
        assert images.shape == (1, 3, 16, 16)
        if len(seen) == 5:
            raise KeyboardInterrupt

    near: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds.Grid, "near", lambda self, distance: near.append(distance))
        result = quietly(model, client(model, photographs("coffee")), callback=press)
    assert result.diagnostics["stopped"] == "interrupted"
    assert not near  # no lattice is waited for
    assert len(seen) == len(result.history) == 5
    assert result.images.isfinite().all()
    assert not result.exact


def test_ctrl_c_between_two_searches_returns_the_best_so_far() -> None:
    model = vit(position_values=sinusoidal_2d((4, 4), 64))

    def press(self: rounds.Grid, distance: float) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds.Grid, "near", press)
        result = quietly(model, client(model, photographs("coffee")))
    assert result.diagnostics["stopped"] == "interrupted"
    assert result.diagnostics["evaluations"] == len(result.history) > 0
    assert not result.exact


def test_the_time_is_limited() -> None:
    model = vit(position_values=sinusoidal_2d((4, 4), 64))
    update = client(model, photographs("coffee"))
    result = quietly(model, update, max_seconds=0.0)
    assert result.diagnostics["stopped"] == "seconds"
    assert result.diagnostics["evaluations"] == 0

    def slow(*_: Any, **__: Any) -> Reconstruction:
        time.sleep(0.3)
        raise AttackNotApplicable("match_gradients", "no picture with a finite loss was found")

    with pytest.MonkeyPatch.context() as patch:  # the time is over before the search has seen anything
        patch.setattr(attack, "match_gradients", slow)
        assert quietly(model, update, max_seconds=0.3).diagnostics["stopped"] == "seconds"
        with pytest.raises(AttackNotApplicable, match="finite loss"):
            quietly(model, update)


def test_the_callers_model_and_generator_are_left_alone() -> None:
    model, pixels = vit(position_values=sinusoidal_2d((4, 4), 64)), photographs("coffee")
    update = client(model, pixels)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = quietly(model, update, max_evaluations=30, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(one.images, quietly(model, update, max_evaluations=30, seed=1).images)


# --- The verdict --------------------------------------------------------------------------------------------------


def test_the_verdict_is_made_of_conditions() -> None:
    model, pixels = vit(image_size=8), photographs("coffee", size=8)
    update = client(model, pixels)
    result = quietly(model, update, max_evaluations=0)
    assert [condition.name for condition in result.conditions] == [
        "every patch settled",
        "replayed gradient is the update",
        "precision verifies a picture",
    ]
    assert result.conditions_hold
    assert result.exact
    settled, replayed, precision = (condition.numbers for condition in result.conditions)
    assert (settled["settled"], settled["patches"], settled["directions"]) == (4, 4, 48)
    assert replayed["residual"] == result.diagnostics["residual"] < replayed["rounding"]
    assert precision["precision"] == "float32"
    off = pixels + 0.4 / 255  # no level is whole
    failed = quietly(model, client(model, off), max_evaluations=0)
    assert not failed.conditions[0].holds
    assert "every patch settled fails: 0 of 4" in failed.reason
    assert not failed.exact


def test_a_verdict_without_labels_says_what_was_not_replayed() -> None:
    model, pixels = vit(image_size=8), photographs("coffee", size=8)
    update = client(model, pixels)
    result = quietly(model, withhold(update, ["head.weight", "head.bias"]), max_evaluations=0)
    assert result.labels is None
    assert result.diagnostics["settled"].all()
    assert [condition.holds for condition in result.conditions] == [True, False, True]
    assert "not replayed, for the labels are not known" in result.reason
    assert not result.exact


def test_train_mode_is_mentioned() -> None:
    model, pixels = vit(image_size=8), photographs("coffee", size=8)
    result = quietly(model.train(), client(model, pixels), max_evaluations=0)
    assert "train mode" in result.reason


# --- Refusals -----------------------------------------------------------------------------------------------------


def test_large_patches_are_refused_with_their_number() -> None:
    model = vit(image_size=20, patch_size=10)
    with pytest.raises(AttackNotApplicable, match="300 pixels a patch"):
        quietly(model, client(model, photographs("coffee", size=20)))


def test_one_level_is_none() -> None:
    model = vit(image_size=8)
    with pytest.raises(ValueError, match="levels=1"):
        quietly(model, client(model, photographs("coffee", size=8)), levels=1)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"recipe": "aprill"}, ValueError, "recipe='aprill'"),
        ({"labels": "optimize"}, ValueError, "labels='optimize'"),
        ({"labels": torch.tensor([1.0])}, ValueError, "1 integers"),
        ({"labels": torch.tensor([1, 2]), "batch_size": 1}, ValueError, "batch_size=1"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options: dict[str, Any], error: type, text: str) -> None:
    model = vit(image_size=8)
    with pytest.raises(error, match=text):
        quietly(model, client(model, photographs("coffee", size=8)), **options)


# --- The replay ---------------------------------------------------------------------------------------------------


def test_the_replay_is_the_clients_own() -> None:
    """Its loss, and its choice of what to share; a frozen copy of the model will do."""
    model, pixels = vit(image_size=8), photographs("coffee", size=8)

    def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)

    update = client_update(model, HALF.to_input(pixels).float(), torch.tensor([1]), loss=smoothed)
    label = torch.tensor([1])
    assert quietly(model, update, labels=label, loss=smoothed, max_evaluations=0).exact
    assert not quietly(model, update, labels=label, max_evaluations=0).exact
    frozen = vit(image_size=8).requires_grad_(False)
    assert quietly(frozen, update, labels=label, loss=smoothed, max_evaluations=0).exact
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_one_wrong_level_cannot_hide_in_the_whole_gradient() -> None:
    model, pixels = vit(image_size=8), photographs("coffee", size=8)
    update = client(model, pixels)
    right = quietly(model, update, max_evaluations=0)

    def wrong(state: Rounds) -> None:
        state.patches[0, 1, 7] += 1

    with pytest.MonkeyPatch.context() as patch:
        settling(patch, wrong)
        once = quietly(model, update, max_evaluations=0)
    assert right.exact
    assert not once.exact
    assert once.diagnostics["settled"].all()
    assert once.diagnostics["residual"] > 100 * right.diagnostics["residual"]


# --- Doubt ----------------------------------------------------------------------------------------------------------


def test_a_wrong_patch_is_doubted_again() -> None:
    """All settled, but the replayed gradient differs: the attack goes on rather than claim."""
    model, pixels = vit(image_size=8), photographs("coffee", size=8)
    update = client(model, pixels)

    calls = []

    def wrong_at_first(state: Rounds) -> None:
        if not calls:
            state.patches[0, 2, 5] += 1
        calls.append(1)

    with pytest.MonkeyPatch.context() as patch:
        settling(patch, wrong_at_first)
        once = quietly(model, update, max_evaluations=0)
        assert not once.exact
        assert once.diagnostics["residual"] > 1e-5
        calls.clear()
        again = quietly(model, update, max_evaluations=600)
    assert again.exact
    assert torch.equal((255 * again.pixels).round(), (255 * pixels).round())


def test_doubt_ends_where_the_gradient_itself_is_off() -> None:
    """Noise above rounding: the pictures are right, the replay says no, and doubting
    them brings them back.
    """
    model, pixels = vit(image_size=8), photographs("coffee", size=8)
    noisy = gaussian_noise(client(model, pixels), 1e-5, relative=True, seed=0)
    result = quietly(model, noisy, max_evaluations=3000)
    assert result.diagnostics["stopped"] == "settled"
    assert result.diagnostics["evaluations"] < 3000
    assert torch.equal((255 * result.pixels).round(), (255 * pixels).round())
    assert not result.exact
