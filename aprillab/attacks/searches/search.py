"""The search of gradient matching: budgets, restarts, the best so far.

A :class:`Search` counts and remembers; an optimizer (optimizers.py) calls ``search.evaluate`` until
it raises. How restarts share the budget is one function a policy: :func:`together`,
:func:`equal_shares`, :func:`with_patience`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..result import Reconstruction
from .optimizers import minimize
from .problem import Evaluation, Problem
from .starts import Variables, first_guess, last_guess

_DIVERGENCES = 6  # a restart is given up after so many: its step is a million times smaller then
_MATCHED = 1e-3  # relative residual from which another restart is not worth its time


class Stop(Exception):
    """Ends a restart: its budget is spent, its patience over, or the tolerance reached; says which.

    An exception, because torch's L-BFGS leaves no other way out of its closure.
    """


class Diverged(Exception):
    """Loss or slope is not finite."""


class Rearranged(Exception):
    """Patches were moved, and the loss fell: the descent begins anew from there."""


@dataclass(frozen=True)
class Budget:
    """Evaluations and seconds over all restarts; infinite where there is no limit."""

    evaluations: float = math.inf
    seconds: float = math.inf


@dataclass
class Counters:
    """What has been spent."""

    began: float  # time.perf_counter()
    evaluations: int = 0
    restart: int = 0  # the number of the present one, or of the first of those that run together
    divergences: int = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


@dataclass(frozen=True)
class Best:
    """The lowest loss seen, and what belongs to it: R restarts that ran together."""

    loss: float
    images: Tensor  # (R, B, C, H, W)
    logits: Tensor | None  # (R, B, classes)
    distances: Tensor  # (R,)
    residuals: Tensor  # (R,)
    token_gradients: Tensor | None  # (R, …, tokens, d)
    terms: dict[str, float]
    evaluation: int
    restart: int

    @property
    def chosen(self) -> int:
        """Which of the restarts has the least distance."""
        return int(self.distances.argmin())


@dataclass
class Log:
    """What is told of the search on its way.

    Attributes
    ----------
    bar : tqdm
    callback : (entry, images) to None, optional
    snapshots : int
        Keep the pictures every so many evaluations; 0 for never.
    history : list of dict, an entry for each evaluation
    restarts : list of dict
        For each restart that ended its loss, its evaluations, and what ended it.
    """

    bar: Any
    callback: Callable[[dict[str, Any], Tensor], None] | None = None
    snapshots: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[dict[str, Any]] = field(default_factory=list)

    def enter(self, entry: dict[str, Any], pictures: Tensor, lowest: float) -> None:
        """One evaluation, the best pictures (B, C, H, W) of its restart, the lowest loss of all."""
        if self.snapshots and len(self.history) % self.snapshots == 0:
            entry["images"] = pictures.float().cpu().clone()
        self.history.append(entry)
        if not self.bar.disable:
            self.bar.update(entry["evaluation"] - self.bar.n)
            self.bar.set_postfix(loss=f"{lowest:.2e}", refresh=False)
        if self.callback is not None:
            self.callback(entry, pictures)


@dataclass
class Search:
    """What changes during a search."""

    problem: Problem
    start: str | Tensor  # "noise", "grey", or pictures
    budget: Budget
    tolerance: float
    counters: Counters
    log: Log
    best: Best | None = None  # of all restarts
    best_here: Best | None = None  # of the present one
    limits: Budget = field(default_factory=Budget)  # where the present restart ends
    patience: float = math.inf  # evaluations in which the loss must halve, or this restart is given up
    milestone: tuple[float, int] = (math.inf, 0)  # the loss when it last halved, and the evaluation
    rearranged_at: int = 0  # the evaluation at which moving patches was last thought of

    @property
    def lowest(self) -> float:
        """The lowest loss of this restart so far."""
        return math.inf if self.best_here is None else self.best_here.loss

    @property
    def evaluations_left(self) -> float:
        """How many this restart may still make."""
        return self.limits.evaluations - self.counters.evaluations

    def run_one(self, variables: Variables, share: float = 1.0) -> str:
        """One restart, with a share of the budget that is left. Returns what ended it."""
        spent = self.counters
        self.limits = Budget(
            spent.evaluations + max(self.budget.evaluations - spent.evaluations, 0) * share,
            spent.seconds + max(self.budget.seconds - spent.seconds, 0) * share,
        )
        self.best_here, self.milestone = None, (math.inf, spent.evaluations)
        self.rearranged_at = spent.evaluations
        before, ended = spent.evaluations, "interrupted"
        try:
            ended = self._descend(variables)
        finally:
            self.log.restarts.append({"loss": self.lowest, "evaluations": spent.evaluations - before, "ended": ended})
        return ended

    def _descend(self, variables: Variables) -> str:
        """One restart, begun again from its best point where it diverges (with a smaller
        step) or patches move.
        """
        count, step = len(variables[0]), self.problem.recipe.optimizer.learning_rate
        divergences = 0
        while divergences < _DIVERGENCES:
            try:
                minimize(self, variables, step)
                self._rearrange()
                return "stalled"
            except Stop as stop:
                return str(stop)
            except Rearranged:
                pass
            except Diverged:
                divergences += 1
                self.counters.divergences += 1
                step /= 10
            if self.best_here is not None:
                variables = self.variables_of(self.best_here)
            else:  # nothing finite yet: other noise
                number = 1000 * divergences + self.counters.restart
                variables = first_guess(self.problem, self.start, number, count)
        return "diverged"

    def variables_of(self, best: Best) -> Variables:
        """Unknowns and logits at the best point."""
        return self.problem.unknowns_of(best.images), None if best.logits is None else best.logits.clone()

    def evaluate(self, unknowns: Tensor, logits: Tensor | None) -> Tensor:
        """One evaluation: loss and slope (into ``.grad``), counted, recorded and checked
        against the limits.
        """
        found = self._measure(unknowns, logits)
        for variable, slope in zip((unknowns, logits), found.slopes, strict=False):
            variable.grad = slope.contiguous()  # type: ignore[union-attr]  # L-BFGS takes views of it
        self._check_progress(found.loss.item(), float(found.residuals.min()))
        return found.loss

    def _measure(self, unknowns: Tensor, logits: Tensor | None) -> Evaluation:
        """One evaluation, counted and recorded."""
        spent = self.counters
        if spent.evaluations + len(unknowns) > self.limits.evaluations:
            raise Stop("evaluations")
        if spent.seconds >= self.limits.seconds:
            raise Stop("seconds")
        found = self.problem.evaluate(unknowns, logits)
        spent.evaluations += len(unknowns)
        loss = found.loss.item()
        if not (math.isfinite(loss) and all(bool(slope.isfinite().all()) for slope in found.slopes)):
            raise Diverged
        best_here, best = self._keep(found, loss, logits)
        entry: dict[str, Any] = {"evaluation": spent.evaluations, "restart": spent.restart, "loss": loss}
        entry |= {"terms": found.terms, "seconds": spent.seconds}
        self.log.enter(entry, best_here.images[best_here.chosen], best.loss)
        return found

    def _keep(self, found: Evaluation, loss: float, logits: Tensor | None) -> tuple[Best, Best]:
        """The best of the present restart and of all, this evaluation included."""
        best_here, best = self.best_here, self.best
        if best_here is None or loss < best_here.loss:
            best_here = Best(
                loss, found.images.clone(), None if logits is None else logits.detach().clone(), found.distances,
                found.residuals, found.token_gradients, found.terms, self.counters.evaluations, self.counters.restart,
            )  # fmt: skip
        if best is None or best_here.loss < best.loss:
            best = best_here
        self.best_here, self.best = best_here, best
        return best_here, best

    def _check_progress(self, loss: float, residual: float) -> None:
        """End the restart where the gradient is matched or the loss has not halved for too long."""
        if residual <= self.tolerance:
            raise Stop("tolerance")
        if loss < self.milestone[0] / 2:
            self.milestone = (loss, self.counters.evaluations)
        if self.counters.evaluations - self.milestone[1] >= self.patience:
            raise Stop("patience")
        wait = self.problem.rearrange
        if wait is not None and self.counters.evaluations - max(self.milestone[1], self.rearranged_at) >= wait:
            self._rearrange()

    def _rearrange(self) -> None:
        """Put the patches of the best picture where their tokens' gradients fit, if
        that lowers the loss.

        Raises
        ------
        Rearranged
            If it does.
        """
        best = self.best_here
        if self.problem.rearrange is None or best is None or best.token_gradients is None:
            return
        self.rearranged_at = self.counters.evaluations
        images = self.problem.in_their_places(best.images[0], best.token_gradients[0])
        if images is None:
            return
        unknowns, logits = self.problem.unknowns_of(images[None]), best.logits
        trial = self._measure(unknowns.requires_grad_(), None if logits is None else logits.clone().requires_grad_())
        if trial.loss.item() < best.loss:
            raise Rearranged


# --- How restarts share the budget --------------------------------------------------------------------------------


def run(search: Search, earlier: Reconstruction | None = None) -> str:
    """The whole search, or what follows on an earlier one. Returns what ended it."""
    recipe = search.problem.recipe
    try:
        if earlier is not None:
            return search.run_one(last_guess(search.problem, earlier))
        if recipe.together:
            return together(search)
        return with_patience(search) if recipe.impatient else equal_shares(search)
    except KeyboardInterrupt:
        return "interrupted"


def together(search: Search) -> str:
    """All restarts at once, drawn to their mean."""
    return search.run_one(first_guess(search.problem, search.start, 0, search.problem.recipe.restarts))


def equal_shares(search: Search) -> str:
    """One restart after the other, each with its share of what is left of the budget."""
    count, ended = search.problem.recipe.restarts, "stalled"
    for number in range(count):
        search.counters.restart = number
        ended = search.run_one(first_guess(search.problem, search.start, number, 1), 1 / (count - number))
        if ended == "tolerance":
            break
    return ended


def with_patience(search: Search) -> str:
    """Each restart until its loss no longer halves; in the end the best one has what is left."""
    recipe = search.problem.recipe
    search.patience = math.inf if recipe.patience is None else recipe.patience
    ended = "stalled"
    for number in range(recipe.restarts):
        search.counters.restart = number
        ended = search.run_one(first_guess(search.problem, search.start, number, 1))
        if ended in ("tolerance", "evaluations", "seconds"):
            return ended
        if search.best is not None and float(search.best.residuals.min()) < _MATCHED:
            break
    if search.best is None:
        return ended
    search.patience, search.counters.restart = math.inf, search.best.restart
    return search.run_one(search.variables_of(search.best))


def continue_from(search: Search, earlier: Reconstruction) -> None:
    """Take over the history and the budget that an earlier search has used.

    Raises
    ------
    ValueError
        If its pictures have another shape, or it has used up the budget of both.
    """
    if tuple(earlier.images.shape) != search.problem.shape:
        raise ValueError(
            f"start: the pictures of {earlier.attack} have shape {tuple(earlier.images.shape)}, "
            f"the update those of {search.problem.shape}"
        )
    numbers = earlier.diagnostics
    for name, limit, used in (
        ("max_evaluations", search.budget.evaluations, numbers["evaluations"]),
        ("max_seconds", search.budget.seconds, earlier.seconds),
    ):
        if used >= limit:
            raise ValueError(
                f"{name}={limit} is the budget of both searches together, and the one to go on from has used "
                f"{used:.6g}: give more, or start from its images for a new search"
            )
    search.log.history, search.log.restarts = list(earlier.history), list(numbers["restarts"])
    search.counters = Counters(
        began=search.counters.began - earlier.seconds,
        evaluations=numbers["evaluations"],
        restart=numbers["best_restart"],
        divergences=numbers["divergences"],
    )
