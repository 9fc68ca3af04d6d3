"""The optimizers of gradient matching.

Each calls ``search.evaluate`` until it raises or nothing moves any more.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from .problem import Problem
from .recipes import LBFGS, Adam
from .starts import Variables

_STALLED = 1e-3  # of the loss: what L-BFGS must gain after its memory was cleared, or it has stalled


class Descent(Protocol):
    """What an optimizer sees of a search: one restart of it."""

    problem: Problem

    @property
    def lowest(self) -> float:
        """The lowest loss of this restart so far."""

    @property
    def evaluations_left(self) -> float:
        """How many this restart may still make."""

    def evaluate(self, unknowns: Tensor, logits: Tensor | None) -> Tensor:
        """The loss, its slope in ``.grad``; raises what ends the restart."""


def minimize(search: Descent, variables: Variables, learning_rate: float) -> None:
    """Descend from ``variables`` (R, …) by the recipe's optimizer, with this step size
    in place of its own.
    """
    settings = search.problem.recipe.optimizer
    leaves = [variable.requires_grad_() for variable in variables if variable is not None]
    if isinstance(settings, LBFGS):
        _lbfgs(search, variables, leaves, settings, learning_rate)
    else:
        _adam(search, variables, leaves, settings, learning_rate)


def _lbfgs(
    search: Descent, variables: Variables, leaves: list[Tensor], settings: LBFGS, learning_rate: float
) -> None:
    """L-BFGS with a strong-Wolfe line search. Its memory is cleared when it stalls, as
    long as that helps.
    """
    while True:
        before = search.lowest
        optimizer = torch.optim.LBFGS(
            leaves,
            lr=learning_rate,
            max_iter=10**9,
            max_eval=10**9,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=settings.history_size,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: search.evaluate(*variables))
        if not search.lowest < before * (1 - _STALLED):
            return


def _adam(search: Descent, variables: Variables, leaves: list[Tensor], settings: Adam, learning_rate: float) -> None:
    """Adam, on the slope or on its sign, with the step schedule of Inverting Gradients and a
    projection.
    """
    to_input, like = search.problem.preprocessing.to_input, leaves[0].detach()
    # Where pixels of 0 and 1 lie in model-input space, (C, 1, 1)
    dark, bright = (to_input(like.new_full((like.shape[-3], 1, 1), level)) for level in (0.0, 1.0))
    optimizer = torch.optim.Adam(leaves, lr=learning_rate, betas=(0.9, settings.beta2))
    milestones: list[int] = []
    if settings.schedule:
        # The step after evaluation e of n is a tenth from e/n ≥ 3/8 on, and so forth.
        steps = search.evaluations_left / len(leaves[0])
        milestones = [math.ceil(cut * steps) - 1 for cut in (3 / 8, 5 / 8, 7 / 8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    while True:
        if settings.clamp:
            with torch.no_grad():
                leaves[0].clamp_(dark, bright)
        search.evaluate(*variables)
        if settings.signed:
            leaves[0].grad.sign_()  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()
