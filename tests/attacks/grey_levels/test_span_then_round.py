"""Whole grey levels in what the span leaves open: found, verified, or said not to be."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.anatomy import dissect
from aprillab.attacks.closed_forms.span import solve_span
from aprillab.attacks.grey_levels import span_then_round as rounding
from aprillab.attacks.grey_levels.grid import Grid
from aprillab.attacks.grey_levels.span_then_round import _State, span_then_round
from aprillab.attacks.result import AttackNotApplicable, Reconstruction
from aprillab.attacks.searches.coordinates import Coordinates
from aprillab.defenses import gaussian_noise, to_precision
from aprillab.metrics import match_batch
from aprillab.models import VisionTransformer, patchify, sinusoidal_2d
from aprillab.preprocessing import HALF, IMAGENET, Preprocessing
from aprillab.update import ClientUpdate, client_update


def vit(**options: Any) -> VisionTransformer:
    sizes = {
        "image_size": 16, "patch_size": 4, "channels": 3, "width": 64, "depth": 2, "heads": 4, "classes": 6,
        "mlp_ratio": 2.0, "position": "sinusoidal", "seed": 1,
    }  # fmt: skip
    return VisionTransformer(**{**sizes, **options})


def photographs(*names: str, size: int = 16, channels: int = 3) -> Tensor:
    return torch.stack([al.load_victim(name, size, channels=channels, dtype=torch.float64) for name in names])


def client(model: nn.Module, pixels: Tensor, preprocessing: Preprocessing = HALF) -> ClientUpdate:
    images = preprocessing.to_input(pixels).to(next(model.parameters()).dtype)
    return client_update(model, images, torch.arange(len(pixels)) + 1)


def quietly(*arguments: Any, **options: Any) -> Reconstruction:
    return span_then_round(*arguments, progress=False, **options)


def grid_of(model: nn.Module, update: ClientUpdate, batch: int = 1, preprocessing: Preprocessing = HALF) -> Grid:
    solution = solve_span(model, update, anatomy=dissect(model), batch_size=batch, strict=False)
    return Grid.of(solution, preprocessing, 256)


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
    grid = grid_of(model, update, preprocessing=IMAGENET)
    images = IMAGENET.to_input(pixels)
    torch.testing.assert_close(grid.patches(images), 255 * patchify(pixels, 4))
    torch.testing.assert_close(grid.images(grid.patches(images)), images)


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
    assert "verifies no picture" in result.reason


def test_invert_takes_it_by_name_and_says_where_it_would_go_on() -> None:
    model, pixels = vit(), photographs("coffee")
    update = client(model, pixels)
    assert al.invert(model, update, attack="span_then_round", max_evaluations=0, progress=False).exact
    assert "whole grey levels" in al.invert(model, update).diagnostics["attacks"]["span_then_round"]


# --- With a search ------------------------------------------------------------------------------------------------


def test_2d_sinusoids_fall_with_a_search() -> None:
    """Their span is ambiguous at any precision, whole levels or not: differences of patches are whole too."""
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

    result = quietly(model, client(model, photographs("coffee")), callback=press)
    assert result.diagnostics["stopped"] == "interrupted"
    assert len(seen) == len(result.history) == 5
    assert result.images.isfinite().all()
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
        patch.setattr(rounding, "match_gradients", slow)
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
    settle = _State.settle

    def wrong(self: _State, *arguments: Any, **options: Any) -> int:
        taken = settle(self, *arguments, **options)
        self.patches[0, 1, 7] += 1
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding._State, "settle", wrong)
        once = quietly(model, update, max_evaluations=0)
    assert right.exact
    assert not once.exact
    assert once.diagnostics["settled"].all()
    assert once.diagnostics["residual"] > 100 * right.diagnostics["residual"]


# --- What it is made of -------------------------------------------------------------------------------------------


def settled_state(grid: Grid, settled: Tensor, patches: Tensor) -> _State:
    return _State(settled=settled, patches=patches.clone(), generator=torch.Generator().manual_seed(0))


def test_the_smoothest_picture_keeps_what_is_settled_and_what_the_span_knows() -> None:
    model, pixels = vit(), photographs("chelsea")
    grid = grid_of(model, client(model, pixels))
    truth = 255 * patchify(pixels, 4)[0]
    free = torch.arange(16) % 3 > 0
    picture = grid.smoothest(torch.where(free[:, None], grid.centres.T, truth), free)
    assert torch.equal(picture[~free], truth[~free])
    known = grid.deviations < 1e-2
    assert known.any()
    off = (picture[free] - grid.centres.T[free]) @ grid.directions[known].T
    assert off.abs().max() < 0.1

    def roughness(patches: Tensor) -> float:
        image = HALF.to_pixels(grid.images(patches[None]), clamp=False)
        return float(image.diff(dim=-1).square().sum() + image.diff(dim=-2).square().sum())

    start = torch.where(free[:, None], grid.centres.T, truth)
    assert roughness(picture) < roughness(start)


def test_settled_patches_stay_where_they_are_in_the_search() -> None:
    basis = torch.eye(12, dtype=torch.float64)
    free = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    origin = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = Coordinates(origin, basis, 2, (4, 4), free).to(basis)
    coefficients = torch.ones(1, 2, 4, 12, dtype=torch.float64)
    moved = patchify(known.images_of(coefficients)[0], 2) - origin
    torch.testing.assert_close(moved, free[..., None].double().expand(-1, -1, 12))
    pictures = known.images_of(coefficients)
    torch.testing.assert_close(known.coefficients_of(pictures)[0], free[..., None].double().expand(-1, -1, 12))
    noise = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    assert not known.coefficients_of_noise(noise)[free == 0].any()


def test_a_wrong_patch_is_doubted_again() -> None:
    """All settled, but the replayed gradient differs: the attack goes on rather than claim."""
    model, pixels = vit(image_size=8), photographs("coffee", size=8)
    update = client(model, pixels)

    calls = []
    settle = _State.settle

    def wrong_at_first(self: _State, grid: Grid, *arguments: Any, **options: Any) -> int:
        taken = settle(self, grid, *arguments, **options)
        if not calls:
            self.patches[0, 2, 5] += 1
        calls.append(taken)
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding._State, "settle", wrong_at_first)
        once = quietly(model, update, max_evaluations=0)
        assert not once.exact
        assert once.diagnostics["residual"] > 1e-5
        calls.clear()
        again = quietly(model, update, max_evaluations=600)
    assert again.exact
    assert torch.equal((255 * again.pixels).round(), (255 * pixels).round())


def test_what_lies_far_off_is_not_settled() -> None:
    model, pixels = vit(position_values=sinusoidal_2d((4, 4), 64)), photographs("coffee")
    grid = grid_of(model, client(model, pixels))
    truth = (255 * patchify(pixels, 4)).round()
    for offset, expected in ((0.5, 16), (100.0, 0)):
        state = settled_state(grid, torch.zeros(1, 16, dtype=torch.bool), torch.zeros_like(truth))
        guesses = truth[0].T + offset
        taken = state.settle(grid, grid.near(2.0), grid.near_centres(2.0, guesses), guesses=guesses, far=1.5 * 2.0)
        assert taken == expected
        assert int(state.settled.sum()) == expected
        if expected:
            assert torch.equal(state.patches, truth)


def test_candidates_are_whole_inside_and_hold_the_truth() -> None:
    model = vit(image_size=16, patch_size=8, width=64, position="frozen")
    pixels = photographs("chelsea", "coffee")
    grid = grid_of(model, client(model, pixels), 2)
    truth = 255 * patchify(pixels, 8)
    lists = grid.candidates()
    assert len(lists) == 4
    for place, listed in enumerate(lists):
        assert torch.equal(listed, listed.round())
        assert listed.min() >= 0
        assert listed.max() <= 255
        for image in truth:
            assert (listed == image[place].round()).all(1).any()


def test_doubt_ends_where_the_gradient_itself_is_off() -> None:
    """Noise above rounding: the pictures are right, the replay says no, and doubting them brings them back."""
    model, pixels = vit(image_size=8), photographs("coffee", size=8)
    noisy = gaussian_noise(client(model, pixels), 1e-5, relative=True, seed=0)
    result = quietly(model, noisy, max_evaluations=3000)
    assert result.diagnostics["stopped"] == "settled"
    assert result.diagnostics["evaluations"] < 3000
    assert torch.equal((255 * result.pixels).round(), (255 * pixels).round())
    assert not result.exact
