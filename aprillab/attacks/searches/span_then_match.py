"""Span first, matching after: the search begins where linear algebra ends, and only where that left something open.

The span attack says of every direction in a patch how uncertain it is. For a frozen embedding nothing is left to ask.
For sinusoids in float32, or for more than one image, most directions are known to rounding and a few are open; a
search over all pixels would spend its time on what is known. So gradient matching runs in coordinates whose rows are
longer where more is uncertain: it starts from the span's picture and moves where the span could not see. Chapter 07.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, dissect
from ...preprocessing import Preprocessing
from ...update import ClientUpdate
from ..closed_forms.span import solve_span
from ..closed_forms.span_solution import SpanSolution
from ..labels import assumed_batch_size
from ..result import Reconstruction
from .coordinates import Coordinates
from .match import match_gradients

# In model-input space, where pixels are of the order of 1.
_LONGEST = 0.5  # as far as a picture may be off
_SHORTEST = 1e-6
_KNOWN = 1e-5  # what is known so well is left to the last
_OPEN = 1e-3  # a direction counts as open where the picture may be wrong by so much


def span_then_match(
    model: nn.Module,
    update: ClientUpdate,
    *,
    labels: Tensor | Literal["recover", "optimize"] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    **options: Any,
) -> Reconstruction:
    """Match gradients from the span attack's picture, in the directions that the span left open.

    For updates without the position embedding's gradient from which :func:`span_closed_form` alone gets no sharp
    picture: fixed sinusoids in float32, and batches. The position embedding's values are public.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate
    labels : int64 Tensor of shape (B,), or "recover" (default) or "optimize"
        As in ``match_gradients``.
    batch_size : int, optional
        B; default is the number of labels, else what the client says, else 1.
    seed : int
        Of the noise that sets the images of a batch apart at the start: the span gives them all the same picture.
    dtype : torch.dtype, optional
        To match in; default is the update's own precision, float32 at least. Float64 costs about twice the time.
    device, anatomy, preprocessing
        As in :func:`~aprillab.attacks.closed_forms.patch_embedding.embedding_closed_form`.
    **options
        Of :func:`~aprillab.attacks.searches.match.match_gradients`: budgets, priors, progress, callback, …

    Returns
    -------
    Reconstruction
        As of ``match_gradients``, ``exact`` always False. ``diagnostics["span"]`` has the numbers of the span attack,
        ``["open_directions"]`` how many of a patch's p directions it left open.

    Raises
    ------
    AttackNotApplicable
        Where the span attack does not apply (the width does not matter here), or the search finds nothing finite.
    UpdateError, ValueError
        As ``match_gradients``.
    """
    start = time.perf_counter()
    anatomy = anatomy or dissect(model)
    batch_size = assumed_batch_size(update, labels, batch_size)
    solution = solve_span(model, update, anatomy=anatomy, batch_size=batch_size, strict=False, device=device)
    coordinates, opened = open_coordinates(solution)
    images = solution.images.expand(batch_size, -1, -1, -1)
    if batch_size > 1:
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, solution.patches.shape[1], len(coordinates.basis))
        z = torch.randn(shape, generator=generator, dtype=torch.float64).to(coordinates.basis)
        images = coordinates.images_of(z)
    spent = time.perf_counter() - start
    if dtype is None:
        dtype = torch.float64 if update.dtype == torch.float64 else torch.float32
    result = match_gradients(
        model,
        update,
        labels=labels,
        batch_size=batch_size,
        coordinates=coordinates,
        init=images,
        seed=seed,
        dtype=dtype,
        device=device,
        anatomy=anatomy,
        preprocessing=preprocessing,
        **{"tolerance": torch.finfo(update.dtype).eps, "restarts": 1, **options},
    )
    p = len(coordinates.basis)
    return replace(
        result,
        attack="span_then_match",
        reason=f"the span left {opened} of {p} directions a patch open, and the search went on; {result.reason}",
        diagnostics={**result.diagnostics, "span": solution.numbers, "open_directions": opened},
        seconds=spent + result.seconds,  # of an earlier search too, where this one resumed it
    )


def open_coordinates(solution: SpanSolution) -> tuple[Coordinates, int]:
    """Coordinates around the span's patches, and how many of their directions are open.

    A row is √(τ/2) long, τ the error to be expected in its direction. Rows of length τ, the preconditioner that
    suggests itself, make the search blind where the span was too sure of itself; rows of equal length make it start
    blind everywhere. Measured between them: data/results/hybrid.md.
    """
    directions, deviations = solution.directions()
    lengths = (_LONGEST * deviations).sqrt().clamp_max(_LONGEST)
    lengths = torch.where(deviations > _KNOWN, lengths, _SHORTEST)
    coordinates = Coordinates(
        solution.patches.T, lengths[:, None] * directions, solution.patch_size, solution.image_size
    )
    return coordinates, int((deviations > _OPEN).sum())
