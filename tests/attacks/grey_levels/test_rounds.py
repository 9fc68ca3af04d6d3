"""The steps between two rounds: deadline, settling, verifying, doubting, searching, taking over."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from grey_pictures import client, grid_of, photographs, rounds_of, vit
from torch import Tensor, nn

from aprillab.anatomy import Tiling
from aprillab.attacks.grey_levels.grid import Grid
from aprillab.attacks.grey_levels.rounds import (
    Deadline,
    Replay,
    Rounds,
    counting_callback,
    doubt_half,
    round_result,
    same_pictures_came_back,
    search,
    settle,
    verify,
)
from aprillab.attacks.replay import residual_of
from aprillab.attacks.result import Reconstruction
from aprillab.attacks.searches.coordinates import Coordinates
from aprillab.models import VisionTransformer, patchify, sinusoidal_2d
from aprillab.update import ClientUpdate

Setting = tuple[VisionTransformer, ClientUpdate, Grid, Tensor]
ALL = torch.ones(1, 16, dtype=torch.bool)


@pytest.fixture(scope="module")
def setting() -> Setting:
    """2-D sinusoids: the span leaves directions open that no lattice closes without a guess."""
    model, pixels = vit(position_values=sinusoidal_2d((4, 4), 64)), photographs("coffee")
    update = client(model, pixels)
    return model, update, grid_of(model, update), (255 * patchify(pixels, 4)).round()


def found_by_search(grid: Grid, patches: Tensor, loss: float) -> Reconstruction:
    images = grid.images(patches)
    return Reconstruction("match_gradients", images, images, None, False, "", {"loss": loss}, 0.0)


# --- Deadline -----------------------------------------------------------------------------------------------------


def test_a_deadline_passes() -> None:
    soon = Deadline.after(0.05)
    assert not soon.passed
    assert 0 < soon.seconds_left <= 0.05
    time.sleep(0.06)
    assert soon.passed
    assert soon.seconds_left == 0


def test_a_deadline_counts_from_its_start() -> None:
    assert Deadline.after(1.0, start=time.perf_counter() - 2.0).passed
    assert Deadline.after(3.0, start=time.perf_counter() - 2.0).seconds_left == pytest.approx(1.0, abs=0.2)


def test_no_deadline_never_passes() -> None:
    none = Deadline.after(None)
    assert none == Deadline()
    assert not none.passed
    assert none.seconds_left == math.inf


# --- Settle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "expected"), [(0.5, 16), (100.0, 0)])
def test_what_lies_far_off_is_not_settled(setting: Setting, offset: float, expected: int) -> None:
    *_, grid, truth = setting
    rounds = rounds_of(grid, patches=torch.zeros_like(truth))
    guesses = truth[0].T + offset
    taken = settle(rounds, rounds.near(2.0), grid.near_centres(2.0, guesses), guesses=guesses, far=1.5 * 2.0)
    assert taken == expected
    assert rounds.unsettled == 16 - expected
    assert torch.equal(rounds.patches, truth if expected else torch.zeros_like(truth))


def test_settled_patches_are_not_rounded_again(setting: Setting) -> None:
    *_, grid, truth = setting
    kept = torch.arange(16)[None] < 5
    rounds = rounds_of(grid, patches=torch.full_like(truth, 7.0), settled=kept)
    guesses = truth[0].T
    assert settle(rounds, rounds.near(1.0), grid.near_centres(1.0, guesses), guesses=guesses, far=1.5) == 11
    assert (rounds.patches[kept] == 7).all()
    assert torch.equal(rounds.patches[~kept], truth[~kept])


def test_levels_that_do_not_exist_are_not_settled(setting: Setting) -> None:
    """The same patches, 200 levels up: whole, near the guess, and outside of 0 … 255 in some pixel."""
    *_, grid, truth = setting
    shifted = Grid(
        centres=grid.centres + 200, directions=grid.directions, deviations=grid.deviations, scale=grid.scale,
        offset=grid.offset, levels=256, tiling=grid.tiling,
    )  # fmt: skip
    guesses = truth[0].T + 200
    rounds = rounds_of(shifted)
    settle(rounds, rounds.near(1.0), shifted.near_centres(1.0, guesses), guesses=guesses, far=1.5)
    inside = (truth + 200 < 256).all(2)
    assert torch.equal(rounds.settled, inside)


def test_a_patch_that_contradicts_the_span_is_not_settled(setting: Setting) -> None:
    *_, grid, truth = setting
    rounds = rounds_of(grid)

    class Stubborn:
        """Returns a wrong whole patch, with no other near."""

        def nearest(self, centres: Tensor) -> tuple[Tensor, Tensor]:
            points = (truth[0] + torch.eye(48)[7])[:, None].expand(-1, 2, -1)
            return points, torch.tensor([1.0, torch.inf]).expand(16, 2)

    assert settle(rounds, Stubborn(), grid.centres) == 0  # type: ignore[arg-type]


def test_each_lattice_is_reduced_once(setting: Setting) -> None:
    rounds = rounds_of(setting[2])
    assert rounds.near(1.0) is rounds.near(1.0)
    assert set(rounds.lattices) == {1.0}


# --- Verify -------------------------------------------------------------------------------------------------------


def replay_of(setting: Setting) -> Replay:
    model, update, grid, _ = setting
    return Replay(model, update, grid, "patch_embedding.weight", nn.functional.cross_entropy)


def test_the_truth_is_verified_and_one_wrong_level_is_not(setting: Setting) -> None:
    replay, truth = replay_of(setting), setting[-1]
    rounds = rounds_of(setting[2], patches=truth, settled=ALL)
    assert verify(rounds, replay)
    rounds.patches[0, 3, 11] += 1
    assert not verify(rounds, replay)
    right, wrong = replay.residual(truth, rounds.labels), replay.residual(rounds.patches, rounds.labels)
    assert right is not None
    assert wrong is not None
    assert right < replay.rounding == 30 * torch.finfo(torch.float32).eps < wrong
    distance = replay.mismatch(torch.tensor([1]))
    assert distance(truth) < distance(rounds.patches)


def test_one_wrong_level_shows_in_a_large_picture_too() -> None:
    """784 patches of 8×8: in the patch embedding's gradient as a whole it would pass for rounding."""
    model, pixels = vit(image_size=224, patch_size=8, width=48, depth=1, heads=2), photographs("coffee", size=224)
    update, truth = client(model, pixels), (255 * patchify(pixels, 8)).round()
    full = torch.full((192,), 127.5, dtype=torch.float64)
    grid = Grid(truth[0].T, torch.eye(192).double(), full, full, full, 256, Tiling.square(8, (224, 224)))
    replay = Replay(model, update, grid, "patch_embedding.weight", nn.functional.cross_entropy)
    label = torch.tensor([1])
    assert replay.residual(truth, label) == pytest.approx(0, abs=replay.rounding)
    wrong = truth.clone()
    wrong[0, 400, 100] += 1
    name = replay.patch_weight
    whole = residual_of({name: replay.gradients(wrong, label)[name]}, update, name)
    assert whole < replay.rounding < (replay.residual(wrong, label) or 0)


def test_without_labels_there_is_nothing_to_replay(setting: Setting) -> None:
    rounds = rounds_of(setting[2], patches=setting[-1], settled=ALL)
    rounds.labels = None
    assert replay_of(setting).residual(rounds.patches, None) is None
    assert verify(rounds, replay_of(setting))


# --- Doubt --------------------------------------------------------------------------------------------------------


def test_both_halves_are_doubted_and_then_no_more(setting: Setting) -> None:
    rounds = rounds_of(setting[2], patches=setting[-1], settled=ALL)
    rounds.patches[0, 0, 0] += 1  # so that the replay fails
    doubt_half(rounds)
    first = rounds.settled.clone()
    assert 0 < first.sum() < 16
    assert rounds.stuck
    rounds.settled = ALL.clone()  # the same pictures come back
    assert not same_pictures_came_back(rounds)
    doubt_half(rounds)
    assert torch.equal(rounds.settled, ~first)
    rounds.settled = ALL.clone()
    assert same_pictures_came_back(rounds)
    assert verify(rounds, replay_of(setting))
    rounds.patches[0, 0, 0] -= 1
    assert not same_pictures_came_back(rounds)


# --- Search -------------------------------------------------------------------------------------------------------


def coordinates_of(grid: Grid) -> Coordinates:
    return Coordinates(grid.tiling.patches(grid.images(grid.centres.T[None]))[0], torch.eye(48).double(), grid.tiling)


def record_calls(grid: Grid, calls: list[dict[str, Any]]) -> Any:
    def match(**options: Any) -> Reconstruction:
        calls.append(options)
        result = found_by_search(grid, rounds_of(grid).patches, 1.0)
        return Reconstruction(
            result.attack, result.images, result.pixels, torch.tensor([4]), False, "", {"labels": "optimized"}, 0.0
        )

    return match


def test_a_search_gets_what_is_left_and_hands_over_its_labels(setting: Setting) -> None:
    grid, calls = setting[2], []
    rounds = rounds_of(grid)
    rounds.labels = None
    search(rounds, record_calls(grid, calls), coordinates_of(grid), max_evaluations=1000, deadline=Deadline())
    assert (calls[0]["max_evaluations"], calls[0]["max_seconds"], calls[0]["labels"]) == (150, None, None)
    assert rounds.labels is not None
    assert (rounds.labels.tolist(), rounds.labels_from) == ([4], "optimized")
    rounds.history.append({})
    search(rounds, record_calls(grid, calls), coordinates_of(grid), max_evaluations=1000, deadline=Deadline.after(9))
    assert calls[1]["max_evaluations"] == 60
    assert 8 < calls[1]["max_seconds"] <= 9
    search(rounds, record_calls(grid, calls), coordinates_of(grid), max_evaluations=7, deadline=Deadline.after(0))
    assert (calls[2]["max_evaluations"], calls[2]["max_seconds"]) == (7, 0.1)


def test_settled_patches_are_where_the_search_stays(setting: Setting) -> None:
    *_, grid, truth = setting
    calls: list[dict[str, Any]] = []
    kept = torch.arange(16)[None] % 2 == 0
    rounds = rounds_of(grid, patches=torch.where(kept[..., None], truth, grid.centres.T), settled=kept)
    search(rounds, record_calls(grid, calls), coordinates_of(grid), max_evaluations=1, deadline=Deadline())
    known = calls[0]["coordinates"]
    assert torch.equal(known.free, (~kept).double())
    images = known.images_of(torch.ones(1, 16, 48, dtype=torch.float64))
    torch.testing.assert_close(grid.patches(images)[kept], truth[kept])
    torch.testing.assert_close(grid.patches(calls[0]["start"]), rounds.patches)


def test_a_stuck_search_begins_some_of_the_unsettled_anew(setting: Setting) -> None:
    *_, grid, truth = setting
    calls: list[dict[str, Any]] = []
    kept = torch.arange(16)[None] < 4
    rounds = rounds_of(grid, patches=truth + ~kept[..., None] * 20.0, settled=kept)
    rounds.stuck = True
    search(rounds, record_calls(grid, calls), coordinates_of(grid), max_evaluations=1, deadline=Deadline())
    moved = ((grid.patches(calls[0]["start"]) - rounds.patches).abs() > 1e-6).any(2)
    assert 0 < moved.sum() < 12
    assert not moved[kept].any()


def test_a_batch_starts_from_different_pictures(setting: Setting) -> None:
    grid, calls = setting[2], []
    rounds = rounds_of(grid, batch=2)
    search(rounds, record_calls(grid, calls), coordinates_of(grid), max_evaluations=1, deadline=Deadline())
    one, other = calls[0]["start"]
    assert (one - other).abs().max() > 0.1
    assert calls[0]["max_evaluations"] == 1
    rounds.history.append({})
    search(rounds, record_calls(grid, calls), coordinates_of(grid), max_evaluations=1, deadline=Deadline())
    torch.testing.assert_close(grid.patches(calls[1]["start"]), rounds.patches)


def test_evaluations_are_counted_over_all_rounds(setting: Setting) -> None:
    rounds, seen = rounds_of(setting[2], settled=torch.arange(16)[None] < 3), []
    for _ in range(2):  # two searches, each counting from 1
        count = counting_callback(rounds, lambda entry, images: seen.append(entry), start=0.0)
        for number in (1, 2):
            count({"evaluation": number, "loss": 0.5}, torch.zeros(1))
    assert [entry["evaluation"] for entry in rounds.history] == [1, 2, 3, 4]
    assert {entry["settled"] for entry in rounds.history} == {3}
    assert seen == rounds.history


# --- Round --------------------------------------------------------------------------------------------------------


def test_what_a_search_finds_is_rounded(setting: Setting) -> None:
    *_, grid, truth = setting
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounds = rounds_of(grid)
    round_result(rounds, found_by_search(grid, truth + noise, 1e-3), Deadline())
    assert torch.equal(rounds.patches, truth)
    assert not rounds.unsettled
    assert (rounds.stuck, rounds.best_loss, rounds.last_loss) == (False, 1e-3, 1e-3)


def test_without_time_it_is_taken_over_as_it_is(setting: Setting) -> None:
    *_, grid, truth = setting
    rounds = rounds_of(grid)
    round_result(rounds, found_by_search(grid, truth + 0.3, 1e-3), Deadline.after(0))
    assert rounds.unsettled == 16
    assert not rounds.lattices
    torch.testing.assert_close(rounds.patches, truth + 0.3)


def test_a_worse_loss_that_settles_nothing_is_forgotten(setting: Setting) -> None:
    *_, grid, truth = setting
    rounds = rounds_of(grid)
    round_result(rounds, found_by_search(grid, truth + 60, 1e-3), Deadline.after(0))
    round_result(rounds, found_by_search(grid, truth - 60, 2e-3), Deadline.after(0))
    torch.testing.assert_close(rounds.patches, truth + 60)
    assert (rounds.stuck, rounds.best_loss, rounds.last_loss) == (True, 1e-3, 2e-3)
    round_result(rounds, found_by_search(grid, truth - 30, 5e-4), Deadline.after(0))  # less than half of the last
    torch.testing.assert_close(rounds.patches, truth - 30)
    assert not rounds.stuck


def test_rounds_start_with_the_spans_picture(setting: Setting) -> None:
    grid = setting[2]
    rounds = Rounds.of(grid, 3, 0, None, "")
    assert rounds.patches.shape == (3, 16, 48)
    assert torch.equal(rounds.patches[2], grid.centres.T)
    assert rounds.unsettled == 48
    assert rounds.batch_size == 3
