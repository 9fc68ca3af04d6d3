"""Span first, matching after: the search begins where linear algebra ends, in what that left open.

The span attack says of every direction in a patch how uncertain it is. For a frozen embedding
nothing is left to ask. For sinusoids in float32, or for more than one image, most directions are
known to rounding and a few are open; a search over all pixels would spend its time on what is
known. So gradient matching runs in coordinates whose rows are longer where more is uncertain: it
starts from the span's picture and moves where the span could not see. Chapter 08.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, dissect
from ...preprocessing import Preprocessing
from ...update import ClientUpdate, only_one
from ..closed_forms.span import solve_span
from ..closed_forms.span_solution import SpanSolution
from ..labels import assumed_batch_size
from ..result import Reconstruction
from .coordinates import Coordinates
from .match import match_gradients
from .problem import Loss
from .recipes import APRIL, PositionTerm, Recipe, recipe_of

# In model-input space, where pixels are of the order of 1. Lengths τ do worst in
# data/results/calibration.md (`python -m studies.calibration`); equal ones do best under 1-D
# sinusoids, and these under 2-D ones.
LONGEST = 0.5  # half of the way from grey to white: 0.1 does worse, 2 the same
SHORTEST = 1e-6  # as good as fixed: a hundredth of an 8-bit level would be 8e-5
KNOWN = 1e-5  # τ, a thousandth of a level: from 1e-7 to 1e-3 the search comes to the same
OPEN = 1e-3  # τ, an eighth of a level: only counted, nothing depends on it

FROM_THE_SPAN = replace(APRIL, distance="relative_l2", position_term=PositionTerm(), restarts=1, patience=None)
"""APRIL's recipe with one start, the span's picture, and with the distance that
data/results/hybrid.md measured.
"""


def span_then_match(
    model: nn.Module,
    update: ClientUpdate,
    *,
    recipe: str | Recipe = FROM_THE_SPAN,
    labels: Tensor | Literal["recover", "optimize"] | None = None,
    batch_size: int | None = None,
    start: Reconstruction | None = None,
    seed: int = 0,
    max_evaluations: int | None = 2000,
    max_seconds: float | None = None,
    tolerance: float | None = None,
    loss: Loss = nn.functional.cross_entropy,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    snapshots: int = 0,
    callback: Callable[[dict[str, Any], Tensor], None] | None = None,
    progress: bool = True,
) -> Reconstruction:
    """Match gradients from the span attack's picture, in the directions that the span left open.

    For updates without the position embedding's gradient from which :func:`span_closed_form` alone
    gets no sharp picture: fixed sinusoids in float32, and batches. The position embedding's values
    are public.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate
    recipe : key of :data:`~aprillab.RECIPES`, or :class:`~aprillab.Recipe`
        Default is APRIL's with one start. The row space is not used: the span's coordinates are.
    labels : int64 Tensor of shape (B,), or "recover" or "optimize"
        As in :func:`~aprillab.match_gradients`, and so are all options that are not described here.
    batch_size : int, optional
        B; default is the number of labels, else what the client says, else 1.
    start : Reconstruction, optional
        An earlier result of this function to go on from.
    seed : int
        Of the noise that sets the images of a batch apart at the start: the span gives them all the
        same picture.
    tolerance : float, optional
        Stop when ‖g' − g‖ / ‖g‖ falls below; default is the update's ε.
    dtype : torch.dtype, optional
        To match in; default is the update's own precision, float32 at least. Float64 costs about
        twice the time.

    Returns
    -------
    Reconstruction
        As of ``match_gradients``, ``exact`` always False. ``diagnostics["span"]`` has the numbers
        of the span attack, ``["open_directions"]`` how many of a patch's p directions it left open.

    Raises
    ------
    AttackNotApplicable
        Where the span attack does not apply (the width does not matter here), or the search finds
        nothing finite.
    UpdateError, ValueError
        As ``match_gradients``.
    """
    began = time.perf_counter()
    recipe = recipe_of(recipe)
    # What the span knows, and where it left something open (8.3)
    anatomy = anatomy or dissect(model)
    update = only_one("span_then_match", update)
    batch_size = assumed_batch_size(update, labels, batch_size)
    solution = solve_span(model, update, anatomy=anatomy, batch_size=batch_size, strict=False, device=device)
    coordinates, opened = open_coordinates(solution)
    images = _first_pictures(solution, coordinates, batch_size, seed)
    spent = time.perf_counter() - began
    # The search there
    if dtype is None:
        dtype = torch.float64 if update.dtype == torch.float64 else torch.float32
    result = match_gradients(
        model, update, recipe=recipe, labels=labels, batch_size=batch_size, coordinates=coordinates,
        start=images if start is None else start, seed=seed, max_evaluations=max_evaluations, max_seconds=max_seconds,
        tolerance=torch.finfo(update.dtype).eps if tolerance is None else tolerance, loss=loss, dtype=dtype,
        device=device, anatomy=anatomy, preprocessing=preprocessing, snapshots=snapshots, callback=callback,
        progress=progress,
    )  # fmt: skip
    p = len(coordinates.basis)
    return replace(
        result,
        attack="span_then_match",
        reason=f"the span left {opened} of {p} directions a patch open, and the search went on; {result.reason}",
        diagnostics={**result.diagnostics, "span": solution.numbers, "open_directions": opened},
        seconds=spent + result.seconds,  # of an earlier search too, where this one goes on from it
    )


def _first_pictures(solution: SpanSolution, coordinates: Coordinates, batch_size: int, seed: int) -> Tensor:
    """The span's picture (1, C, H, W); for a batch, B of them, apart in the open directions."""
    if batch_size == 1:
        return solution.images
    shape = (batch_size, solution.patches.shape[1], len(coordinates.basis))  # (B, n, k)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return coordinates.images_of(noise.to(coordinates.basis))


def open_coordinates(solution: SpanSolution) -> tuple[Coordinates, int]:
    """Coordinates around the span's patches, and how many of their directions are open.

    A row is √(τ/2) long, τ the error to be expected in its direction. Rows of length τ, the
    preconditioner that suggests itself, make the search blind where the span was too sure of
    itself; rows of equal length make it start blind everywhere. Measured between them:
    data/results/hybrid.md.
    """
    directions, deviations = solution.directions()
    lengths = (LONGEST * deviations).sqrt().clamp_max(LONGEST)
    lengths = torch.where(deviations > KNOWN, lengths, SHORTEST)
    coordinates = Coordinates(solution.patches.T, lengths[:, None] * directions, solution.tiling)
    return coordinates, int((deviations > OPEN).sum())
