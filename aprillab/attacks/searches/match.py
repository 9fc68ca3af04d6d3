"""Gradient matching: look for pictures whose gradient is the one that was shared.

    minimize over x'    D(∇w(x'), ∇w)  +  α·(1 − cos(∇E'_pos, ∇E_pos))  +  priors(x')

Chapter 05 builds it part by part. What is minimized, and how, is a :class:`Recipe` (recipes.py);
the loss stands in problem.py, the search in search.py. A small loss is no proof: other pictures can
have almost the same gradient (twin data), so no result is ever marked exact.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...anatomy import Anatomy
from ...preprocessing import Preprocessing
from ...update import ClientUpdate, fitted, only_one
from ..result import AttackNotApplicable, Reconstruction
from .coordinates import Coordinates
from .pose import pose, undisturbed
from .problem import Loss, Problem
from .recipes import Adam, Recipe, recipe_of
from .search import Best, Budget, Counters, Log, Search, continue_from, run
from .starts import Start, checked_start, is_search

_ENDS = {"interrupted": "was interrupted", "diverged": "diverged again and again"}


class BudgetError(ValueError):
    """``max_evaluations`` is no budget: none where one is needed, or too few."""


def match_gradients(
    model: nn.Module,
    update: ClientUpdate,
    *,
    recipe: str | Recipe = "april",
    labels: Tensor | Literal["recover", "optimize"] | None = None,
    batch_size: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
    coordinates: Coordinates | None = None,
    start: Start = "noise",
    seed: int = 0,
    max_evaluations: int | None = 2000,
    max_seconds: float | None = None,
    tolerance: float | None = None,
    loss: Loss = nn.functional.cross_entropy,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    snapshots: int = 0,
    callback: Callable[[dict[str, Any], Tensor], None] | None = None,
    progress: bool = True,
) -> Reconstruction:
    """Search for pictures whose gradient matches the update's.

    Works for any model that classifies images; gradients that are not in the update are not
    matched.

    Parameters
    ----------
    model : nn.Module
        Copied; the caller's is left as it is. Train or eval mode as the client had it.
    update : ClientUpdate
    recipe : key of :data:`~aprillab.RECIPES`, or :class:`~aprillab.Recipe`
        What is minimized, and how. ``replace(al.RECIPES["april"], row_space=False)`` changes one
        part.
    labels : int64 Tensor of shape (B,), or "recover" or "optimize"
        Known to the attacker; read off the head's gradient (:func:`~aprillab.recover_labels`); or
        unknowns of their own, as in DLG. Default is the recipe's. Where "recover" finds no head
        gradient, they are optimized, and ``diagnostics["labels"]`` says so.
    batch_size : int, optional
        B; default is the number of labels, else what the client says, else 1.
    image_shape : (C, H, W), optional
        Needed for models that :func:`~aprillab.dissect` does not know.
    coordinates : Coordinates, optional
        Where to look for the patches: what another attack knows of them. Overrides the row space.
    start : "noise", "grey", Tensor of shape (B, C, H, W), or Reconstruction
        Noise: normal, of standard deviation 1/4 in pixels, around mid-grey. Grey: mid-grey, with a
        thousandth of that noise (equal patches would stay equal). A tensor: pictures in model-input
        space, from which the first restart begins; the others begin a hundredth of the noise away.
        The result of a closed form: its images, likewise. The result of an earlier search with the
        same recipe: the search goes on, and evaluations, seconds and ``history`` go on counting, so
        budgets are those of both together (for a new search from its pictures, give its
        ``images``).
    seed : int
        The same seed gives the same result on one machine, unless ``max_seconds`` ends the run.
    max_evaluations, max_seconds : budget over all restarts; None for no limit
        An evaluation is one loss with its slope, line search included.
    tolerance : float, optional
        Stop when ‖g' − g‖ / ‖g‖ falls below; default is the update's ε times 10.
    loss : callable, the client's, (logits, labels) to a scalar
    dtype : torch.dtype
        To match in, whatever the update's precision.
    device : where to search; default is where the update lies
    anatomy : Anatomy, optional; default is ``dissect(model)``
    preprocessing : Preprocessing, optional; default is the model family's own
    snapshots : int
        Keep the pictures in ``history`` every so many evaluations; 0 for never.
    callback : (history entry, images) to None, called at every evaluation
        It may raise KeyboardInterrupt to end the search.
    progress : bool, show a progress bar

    Returns
    -------
    Reconstruction
        The pictures of lowest loss seen. ``history`` has for every evaluation: ``evaluation``,
        ``restart``, ``loss``, ``terms`` (before weights), ``seconds``, and ``images`` where a
        snapshot was taken. ``exact`` is always False. ``diagnostics["stopped"]`` is "evaluations",
        "seconds", "tolerance", "stalled", "diverged" or "interrupted".

    Raises
    ------
    ValueError
        If an option is unknown or makes no sense, or the search to go on from has used up the
        budget; a ``BudgetError`` where ``max_evaluations`` is none.
    AttackNotApplicable
        If the image shape cannot be known, or the search yields no finite loss: then its numbers
        have ``stopped``.
    UpdateError
        If the update does not belong to the model.

    Examples
    --------
    >>> from aprillab.models import VisionTransformer
    >>> from aprillab.update import client_update
    >>> sizes = {"image_size": 4, "patch_size": 2, "channels": 1, "classes": 4}
    >>> model = VisionTransformer(**sizes, width=16, depth=1, heads=2, seed=1).double()
    >>> private = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    >>> update = client_update(model, private, torch.tensor([2]))
    >>> found = match_gradients(model, update, max_evaluations=60, progress=False)
    >>> found.labels, found.exact, found.diagnostics["evaluations"]
    (tensor([2]), False, 60)
    """
    began = time.perf_counter()
    # Check
    known = recipe_of(recipe)
    _check_budget(known, max_evaluations, max_seconds)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype}: match in torch.float64 or torch.float32")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size={batch_size} must be a positive whole number")
    if not callable(loss):
        raise ValueError(f"loss must be a function of (logits, labels), not {loss!r:.40}")
    update = fitted(model, only_one("match_gradients", update))
    # Problem
    problem = pose(
        model, update, known, labels=labels, batch_size=batch_size, image_shape=image_shape, coordinates=coordinates,
        loss=loss, dtype=dtype, device=device, anatomy=anatomy, preprocessing=preprocessing, seed=seed,
    )  # fmt: skip
    earlier = start if isinstance(start, Reconstruction) and is_search(start) else None
    eps = torch.finfo(update.dtype).eps
    # Search
    name = known.name
    with (
        undisturbed(problem.device),
        tqdm(total=max_evaluations, desc=f"matching, {name}", unit=" eval", disable=not progress) as bar,
    ):
        search = Search(
            problem,
            start=checked_start(start, problem.shape),
            budget=Budget(max_evaluations or math.inf, math.inf if max_seconds is None else max_seconds),
            tolerance=10 * eps if tolerance is None else tolerance,
            counters=Counters(began),
            log=Log(bar, callback, snapshots),
        )
        if earlier is not None:
            continue_from(search, earlier)
        stopped = run(search, earlier)
    return _report(f"match_gradients({name})", update, search, stopped)


def _check_budget(recipe: Recipe, max_evaluations: int | None, max_seconds: float | None) -> None:
    """Raise where the budget is none, or too small for the restarts."""
    scheduled = isinstance(recipe.optimizer, Adam) and recipe.optimizer.schedule
    if max_evaluations is None:
        if max_seconds is None or scheduled:
            raise BudgetError("max_evaluations: a limit is needed, by the schedule or since max_seconds gives none")
        return
    # With patience a later restart begins only if the ones before leave it something.
    least = 1 if recipe.impatient else recipe.restarts
    if max_evaluations < least:
        raise BudgetError(
            f"max_evaluations={max_evaluations} is less than one for each of {recipe.restarts} restarts"
            if least > 1
            else f"max_evaluations={max_evaluations} must be at least 1"
        )


def _report(attack: str, update: ClientUpdate, search: Search, stopped: str) -> Reconstruction:
    """The best pictures of a search, and how it went."""
    problem, spent, best = search.problem, search.counters, search.best
    if best is None:
        raise AttackNotApplicable(
            "match_gradients",
            f"no picture with a finite loss was found ({spent.divergences} divergences, ended by: {stopped})",
            stopped=stopped,
        )
    images, residual = best.images[best.chosen].double(), float(best.residuals[best.chosen])
    labels = problem.labels
    if labels is None and best.logits is not None:
        labels = best.logits[best.chosen].argmax(-1)
    seconds = spent.seconds
    return Reconstruction(
        attack=attack,
        images=images,
        pixels=problem.preprocessing.to_pixels(images),
        labels=labels,
        exact=False,
        reason=_reason(problem, update, residual, stopped),
        diagnostics={"stopped": stopped, "residual": residual, **_numbers(search, best, update, seconds)},
        seconds=seconds,
        history=search.log.history,
    )


def _numbers(search: Search, best: Best, update: ClientUpdate, seconds: float) -> dict[str, Any]:
    """How the search went, for ``diagnostics``."""
    problem, spent = search.problem, search.counters
    return {
        "loss": best.loss,
        "terms": best.terms,
        "evaluations": spent.evaluations,
        "evaluations_per_second": spent.evaluations / seconds,
        "best_evaluation": best.evaluation,
        "best_restart": best.restart + best.chosen,
        "restarts": search.log.restarts,
        "divergences": spent.divergences,
        "recipe": problem.recipe,
        "labels": problem.labels_how,
        "batch_size": problem.shape[0],
        "matched": len(problem.targets),
        "directions": None if problem.coordinates is None else len(problem.coordinates.basis),
        "seed": problem.seed,
        "precision": _short(update.dtype),
        "dtype": _short(problem.dtype),
        "device": str(problem.device),
        "recorded": "no" if problem.recording is None else problem.recording.words,
        "threads": torch.get_num_threads(),
    }


def _reason(problem: Problem, update: ClientUpdate, residual: float, stopped: str) -> str:
    """Why the result is not exact, in words."""
    notes = []
    if problem.recipe.position_term is not None and problem.position is None:
        notes.append("the position embedding's gradient is not shared, so α has no effect")
    rounding = f"rounding in {_short(update.dtype)}: {torch.finfo(update.dtype).eps:.1e}"
    notes += [
        f"gradients agree up to a relative residual of {residual:.1e} ({rounding})",
        "other pictures can have nearly this gradient (twin data), so a match proves nothing about the pictures",
    ]
    if stopped in _ENDS:
        notes.append(f"the search {_ENDS[stopped]}, and this is the best it saw")
    return "; ".join(notes)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
