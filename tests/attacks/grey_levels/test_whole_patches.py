"""Coordinate descent over whole-level patches, with a mismatch that is known."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from aprillab.attacks.grey_levels.rounds import Deadline, Rounds
from aprillab.attacks.grey_levels.whole_patches import (
    Attempt,
    coordinate_descent,
    try_whole_patches,
    worth_trying,
)

TRUTH = torch.tensor([[[3.0, 1.0], [0.0, 2.0], [5.0, 5.0]]])  # one image of three patches of two pixels


def distance(patches: Tensor) -> float:
    """Zero at the truth."""
    return float((patches - TRUTH).square().sum())


def candidates(*places: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(listed).reshape(-1, 2) for listed in places]


LISTS = candidates([[3.0, 1.0], [9.0, 9.0]], [[7.0, 7.0], [0.0, 2.0]], [[5.0, 5.0], [5.0, 6.0]])


def rounds_with(lists: list[Tensor], patches: Tensor, settled: list[bool]) -> Rounds:
    grid = SimpleNamespace(candidates=lists)
    generator = torch.Generator().manual_seed(0)
    return Rounds(grid, torch.tensor([settled]), patches, generator, torch.tensor([1]), "", stuck=True)  # type: ignore[arg-type]


def test_one_pass_keeps_the_best_candidate_of_each_place() -> None:
    start = Attempt(torch.zeros_like(TRUTH), distance(torch.zeros_like(TRUTH)))
    after = coordinate_descent(start, [(0, 2), (0, 0), (0, 1)], LISTS, distance, lambda: False)
    assert torch.equal(after.patches, TRUTH)
    assert after.mismatch == 0
    assert not start.patches.any()  # left as it was


def test_a_candidate_must_come_nearer_by_a_thousandth() -> None:
    start = Attempt(TRUTH, 1.0)
    assert coordinate_descent(start, [(0, 1)], LISTS, lambda patches: 0.9995, lambda: False) is start
    assert coordinate_descent(start, [(0, 1)], LISTS, lambda patches: 0.998, lambda: False).mismatch == 0.998


def test_a_pass_ends_when_the_trials_are_exhausted() -> None:
    left = iter([False, False, False, True])
    start = Attempt(torch.zeros_like(TRUTH), distance(torch.zeros_like(TRUTH)))
    after = coordinate_descent(start, [(0, 0), (0, 1), (0, 2)], LISTS, distance, lambda: next(left))
    assert torch.equal(after.patches[0, 0], TRUTH[0, 0])  # two trials
    assert torch.equal(after.patches[0, 1], torch.zeros(2))  # one, of a candidate that is worse


def test_the_best_pictures_are_kept_and_nothing_is_called_settled_that_moved() -> None:
    wrong = TRUTH.clone()
    wrong[0, 1] = 7.0
    rounds = rounds_with(LISTS, wrong, [True, True, False])  # patch 1 was settled wrongly
    try_whole_patches(rounds, distance, Deadline())
    assert torch.equal(rounds.patches, TRUTH)
    assert rounds.settled.tolist() == [[True, False, False]]
    assert not rounds.stuck
    assert rounds.trials == 300


def test_without_an_improvement_the_search_stays_stuck_and_the_pictures_stay() -> None:
    rounds = rounds_with(candidates([[9.0, 9.0]], [[8.0, 8.0]], []), TRUTH + 0.1, [False, False, False])
    try_whole_patches(rounds, distance, Deadline())
    assert torch.equal(rounds.patches, TRUTH + 0.1)
    assert rounds.stuck


def test_candidates_drawn_at_random_lead_out_of_a_minimum() -> None:
    """Two patches that must change at once: each change by itself is worse, both
    together are right.
    """
    start = torch.tensor([[[1.0, 3.0], [2.0, 0.0], [5.0, 5.0]]])

    def coupled(patches: Tensor) -> float:
        first, second = torch.equal(patches[0, 0], TRUTH[0, 0]), torch.equal(patches[0, 1], TRUTH[0, 1])
        return 0.0 if first and second else 2.0 if first or second else 1.0

    lists = candidates([[3.0, 1.0], [1.0, 3.0]], [[0.0, 2.0], [2.0, 0.0]], [])
    rounds = rounds_with(lists, start, [False, False, True])
    try_whole_patches(rounds, coupled, Deadline())
    assert torch.equal(rounds.patches, TRUTH)
    assert not rounds.stuck


def test_where_nothing_is_listed_or_no_time_is_left_nothing_is_tried() -> None:
    for lists, deadline in ((candidates([], [], []), Deadline()), (LISTS, Deadline.after(0))):
        rounds = rounds_with(lists, torch.zeros_like(TRUTH), [False, False, False])
        try_whole_patches(rounds, distance, deadline)
        assert (rounds.trials, rounds.stuck) == (0, True)


def test_where_many_are_left_only_unsettled_places_are_tried() -> None:
    truth = torch.arange(12.0).reshape(1, 6, 2)
    lists = [patch[None] for patch in truth[0]]
    patches = truth + 100
    rounds = rounds_with(lists, patches, [True, False, False, False, False, False])
    try_whole_patches(rounds, lambda patches: float((patches - truth).abs().sum()), Deadline())
    assert torch.equal(rounds.patches[0, 0], patches[0, 0])
    assert torch.equal(rounds.patches[0, 1:], truth[0, 1:])


def test_they_are_worth_it_in_a_batch_or_near_the_end() -> None:
    many = Rounds(None, torch.zeros(1, 16, dtype=torch.bool), TRUTH, torch.Generator(), None, "")  # type: ignore[arg-type]
    assert not worth_trying(many)
    many.stuck = True
    assert not worth_trying(many)
    many.settled = torch.arange(16)[None] < 12
    assert worth_trying(many)
    many.settled = torch.zeros(2, 8, dtype=torch.bool)
    assert worth_trying(many)
