"""The step of a search that is stuck: patches of whole levels, tried by their gradient.

A search that moves all pixels at once can end where patches have changed places, and the way out
leads uphill. Whole-level patches that the span allows and that are smooth are a short list for each
place (:attr:`Grid.candidates`), and putting one in is a step of any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .rounds import Deadline, Rounds

# Budgets and a tolerance by reasoning, not measured.
_FEW = 4  # patches left for which all places are tried, settled ones too: 12 candidates each
_TRIALS = 300  # gradients between two rounds: two passes over 12 places of 12 candidates
_BETTER = 0.999  # a change below a thousandth is no reason to go on from elsewhere


class Attempt(NamedTuple):
    """Pictures on trial, and how far their gradient is from the client's."""

    patches: Tensor  # (B, n, p)
    mismatch: float


Place = tuple[int, int]  # (image, patch)


def worth_trying(rounds: Rounds) -> bool:
    """Whether the search is stuck, in a batch or with few patches left."""
    return rounds.stuck and (rounds.batch_size > 1 or rounds.unsettled <= _FEW)


def try_whole_patches(rounds: Rounds, mismatch: Callable[[Tensor], float], deadline: Deadline) -> None:
    """Put whole-level patches where none is settled, as long as the gradient comes nearer.

    1. Coordinate descent: at one place after the other, the best of its candidates replaces what
       is there. Where few patches are left, at the settled places too: what keeps the others from
       settling may be one that was settled wrongly.
    2. While a pass over the places comes nearer, another follows it.
    3. When none does, the places that are not settled draw candidates at random, and the next pass
       starts from there. The best of all passes stays.

    Parameters
    ----------
    rounds : Rounds
    mismatch : patches (B, n, p) to a float, one gradient each
    deadline : Deadline
    """
    candidates, last = rounds.grid.candidates, rounds.trials + _TRIALS
    doubtful = torch.ones_like(rounds.settled) if rounds.unsettled <= _FEW else ~rounds.settled
    places = [(b, k) for b, k in doubtful.nonzero().tolist() if len(candidates[k])]
    unsettled = [place for place in places if not rounds.settled[place]]

    def exhausted() -> bool:
        return rounds.trials >= last or deadline.passed

    def tried(patches: Tensor) -> float:
        rounds.trials += 1
        return mismatch(patches)

    current = best = Attempt(rounds.patches, mismatch(rounds.patches))
    improved = False
    while places and not exhausted():
        order = [places[i] for i in torch.randperm(len(places), generator=rounds.generator).tolist()]
        after = coordinate_descent(current, order, candidates, tried, exhausted)
        if after.mismatch < best.mismatch:
            best, improved = after, True
        if after.mismatch < current.mismatch:
            current = after
        else:
            patches = _drawn(after.patches, unsettled, candidates, rounds.generator)
            current = Attempt(patches, mismatch(patches))
    rounds.settled &= (best.patches == rounds.patches).all(2)
    rounds.patches, rounds.best_loss = best.patches, math.inf
    rounds.stuck = not improved  # if it is not, the search goes on from the best


def coordinate_descent(
    attempt: Attempt,
    places: list[Place],
    candidates: list[Tensor],
    mismatch: Callable[[Tensor], float],
    exhausted: Callable[[], bool],
) -> Attempt:
    """One pass: at each place in turn, the candidates of which the gradient comes nearer are kept.

    Parameters
    ----------
    attempt : Attempt, where to begin
    places : list of (image, patch)
    candidates : for each patch a Tensor (c, p) of whole levels
    mismatch : patches (B, n, p) to a float
    exhausted : () to bool, asked before each trial
    """
    for b, k in places:
        for candidate in candidates[k]:
            if exhausted():
                return attempt
            patches = attempt.patches.clone()
            patches[b, k] = candidate
            value = mismatch(patches)
            if value < _BETTER * attempt.mismatch:
                attempt = Attempt(patches, value)
    return attempt


def _drawn(patches: Tensor, places: list[Place], candidates: list[Tensor], generator: torch.Generator) -> Tensor:
    """A copy of the pictures with a random candidate at each of the places."""
    patches = patches.clone()
    for b, k in places:
        patches[b, k] = candidates[k][int(torch.randint(len(candidates[k]), (1,), generator=generator))]
    return patches
