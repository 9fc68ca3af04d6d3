"""Span first, then whole grey levels: pictures are not any points, their pixels are whole numbers.

Where the span attack leaves a few directions of a patch open, in a sinusoidal embedding or a
batch, the open set is a plane, and almost no point of it has whole levels everywhere. The private
patch has. Lattice reduction finds it (lattice.py), often from the span alone. Where too much is
open for that, gradient matching comes first and narrows the place down, and every patch that is
settled is kept, which helps the search with the rest (rounds.py). Under 2-D sinusoids and in a
batch the open set holds a lattice of whole pictures, so the count (8.4) does not apply; there the
search and the ends of the levels decide, on photographs more often than on digits
(data/results/effect.md). Chapter 08.

We know of no publication that uses the pixels' own grid on gradients. Lattices have met them
before: Li et al. (2024, arXiv 2409.14260) invert a batch through a fully connected layer as a
hidden subset sum (Nguyen and Stern, CRYPTO 1999), where the whole numbers are the zeros and ones
that a ReLU lets through. SPEAR (Dimitrov et al., NeurIPS 2024, arXiv 2403.03945) separates a batch
by the sparsity of the same zeros.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...anatomy import Anatomy, dissect, playable
from ...preprocessing import Preprocessing
from ...update import ClientUpdate, only_one
from ..closed_forms.span import solve_span
from ..closed_forms.span_solution import SpanSolution
from ..labels import assumed_batch_size, labels_or_none
from ..reading import read_update
from ..replay import as_shared
from ..result import AttackNotApplicable, Condition, Reconstruction, shown_if
from ..searches.coordinates import Coordinates
from ..searches.match import match_gradients
from ..searches.problem import Loss
from ..searches.recipes import Recipe, recipe_of
from ..searches.span_then_match import FROM_THE_SPAN, open_coordinates
from .grid import Grid
from .rounds import (
    RATIO_ALONE,
    Deadline,
    Replay,
    Rounds,
    counting_callback,
    doubt_half,
    round_result,
    search,
    settle,
    verify,
)
from .whole_patches import try_whole_patches, worth_trying

# Pixels a patch. A reduction cannot be interrupted, and takes longer with more pixels and with more
# open directions: on one thread 1 s for 192 and 3 s for 300 where 16 patches are behind it
# (data/results/calibration.md); tried once by hand with 64, 9 and 23 s, and 51 s for 432.
_LARGEST = 256
_COARSEST = 1e-4  # rounding of a replay: 4e-6 in float32, 0.03 in float16, where a wrong level is lost


def span_then_round(
    model: nn.Module,
    update: ClientUpdate,
    *,
    recipe: str | Recipe = FROM_THE_SPAN,
    labels: Tensor | Literal["recover"] | None = None,
    batch_size: int | None = None,
    levels: int = 256,
    seed: int = 0,
    max_evaluations: int = 1200,
    max_seconds: float | None = None,
    loss: Loss = nn.functional.cross_entropy,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    callback: Callable[[dict[str, Any], Tensor], None] | None = None,
    progress: bool = True,
) -> Reconstruction:
    """Find pictures of whole grey levels in what the span attack leaves open.

    For updates without the position embedding's gradient (its values are public) from which
    :func:`span_closed_form` alone gets no sharp picture: fixed sinusoids, and batches. What it
    knows besides: that the client's pixels were whole levels when they were normalized. That is so
    after decoding, cropping, flipping, or resizing to 8 bits, and not after resizing or blending in
    floating point.

    A patch is settled when the nearest whole levels agree with the span, and explain it at least
    twice as well as the next, if the search among them keeps a next one at all. While some are not,
    rounds of gradient matching in the open directions alternate with rounding. A search that
    settles no more and comes no nearer begins half of its unsettled patches anew, from the
    smoothest picture that the span allows; in a batch, or where few are left, it tries the
    smoothest whole-level patches of each place by their gradient and goes on from the best.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate
    recipe : key of :data:`~aprillab.RECIPES`, or :class:`~aprillab.Recipe`
        Of the search; default is APRIL's with one start.
    labels : int64 Tensor of shape (B,), or "recover" (default)
    batch_size : int, optional
        B; default is the number of labels, else what the client says, else 1.
    levels : int
        From 0 to ``levels`` − 1 for pixels from 0 to 1: 256 for 8-bit pictures.
    seed : int
        Of what begins anew, and of a batch's first guess.
    max_evaluations : int
        Of the search, in all; 0 for none: the span's patches are rounded, and that is all.
    max_seconds : float, optional
        Looked at by the search and before each lattice is reduced, which takes seconds.
    loss : callable, the client's, (logits, labels) to a scalar
    dtype : torch.dtype, optional
        To match in; default is the update's own precision, float32 at least.
    device, anatomy, preprocessing
        As in :func:`~aprillab.embedding_closed_form`.
    callback : (history entry, images) to None, called at every evaluation
        It may raise KeyboardInterrupt to end the search.
    progress : bool, show a progress bar of the settled patches

    Returns
    -------
    Reconstruction
        ``exact`` is True only if all three ``conditions`` hold: every patch is settled; the
        client's gradient, computed again from the pictures, is the update to rounding, as a whole
        and for each pixel's weights of the patch embedding; and the update is in float32 or
        better. ``diagnostics``:
        ``settled`` (B, n) of bool, ``settled_by_span`` (how many before any search),
        ``open_directions``, ``residual`` (the larger of the two), ``evaluations``, ``trials``
        (gradients spent on whole-level patches), ``span``, and ``stopped``: "settled",
        "evaluations", "seconds" or "interrupted". ``history`` is the search's, with ``settled``,
        the number of settled patches.

    Raises
    ------
    AttackNotApplicable
        Where the span attack does not apply (the width does not matter here), or a patch has more
        than 256 pixels.
    ValueError
        If ``levels`` < 2, the labels are not B whole numbers, or as ``match_gradients``.
    UpdateError
        If the update does not belong to the model.

    Examples
    --------
    A picture under a fixed sinusoidal embedding, from a float32 gradient, without any search:

    >>> import aprillab as al
    >>> sizes = {"image_size": 16, "patch_size": 4, "width": 64, "depth": 2, "heads": 4}
    >>> model = al.VisionTransformer(**sizes, classes=6, position="sinusoidal")
    >>> pixels = al.load_victim("coffee", 16)[None]
    >>> update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([1]))
    >>> result = al.span_then_round(model, update, max_evaluations=0, progress=False)
    >>> levels = (255 * pixels).round().double()
    >>> result.exact, int((255 * result.pixels - levels).abs().max())
    (True, 0)
    """
    start = time.perf_counter()
    # Check what the caller says, and whether the span attack applies.
    anatomy = anatomy or dissect(model)
    preprocessing = preprocessing or anatomy.preprocessing
    update = read_update(model, only_one("span_then_round", update), anatomy).update
    batch_size = assumed_batch_size(update, labels, batch_size)
    _check(levels, labels, batch_size)
    solution = solve_span(model, update, anatomy=anatomy, batch_size=batch_size, strict=False, device=device)
    _check_patch_size(solution)

    # Solve: round what the span says, then search and round in turns.
    grid = Grid.of(solution, preprocessing, levels)
    rounds = Rounds.of(grid, batch_size, seed, *_known_labels(model, update, anatomy, labels, batch_size))
    if batch_size == 1:
        settle(rounds, grid.smooth, grid.smooth_centres(), ratio=RATIO_ALONE)
    numbers = {"settled_by_span": int(rounds.settled.sum()), "span": solution.numbers}
    client = as_shared(model, update)
    replay = Replay(client, update, grid, anatomy.patch_weight, loss)
    coordinates, numbers["open_directions"] = open_coordinates(solution)
    dtype = dtype or (torch.float64 if update.dtype == torch.float64 else torch.float32)
    match = partial(
        match_gradients, model, update, recipe=recipe_of(recipe), batch_size=batch_size, seed=seed, loss=loss,
        tolerance=replay.eps, dtype=dtype, device=device, anatomy=anatomy, preprocessing=preprocessing,
        progress=False, callback=counting_callback(rounds, callback, start),
    )  # fmt: skip
    with (
        playable(client, replace(anatomy, root="")),
        tqdm(total=rounds.settled.numel(), desc="settled patches", unit=" patch", disable=not progress) as bar,
    ):
        deadline = Deadline.after(max_seconds, start)
        numbers["stopped"] = _alternate(rounds, replay, match, coordinates, max_evaluations, deadline, bar)

        # Report what was verified, and the pictures.
        return _report(rounds, replay, {**numbers, "dtype": str(dtype).removeprefix("torch.")}, preprocessing, start)


def _alternate(
    rounds: Rounds,
    replay: Replay,
    match: Callable[..., Reconstruction],
    coordinates: Coordinates,
    max_evaluations: int,
    deadline: Deadline,
    bar: tqdm,
) -> str:
    """Verify, doubt, try whole patches, search and round in turns; returns what ended it."""
    try:
        while True:
            bar.update(int(rounds.settled.sum()) - bar.n)
            # 1. Where all is settled, the pictures must have the client's gradient.
            if not rounds.unsettled and verify(rounds, replay):
                return "settled"
            left = max_evaluations - len(rounds.history)
            if left <= 0 or deadline.passed:
                return "evaluations" if left <= 0 else "seconds"
            # 2. If they have not, a patch was settled wrongly, or the gradient is not what it was.
            if not rounds.unsettled:
                doubt_half(rounds)
            # 3. In a batch, or where few are left, a stuck search goes on from whole patches.
            elif worth_trying(rounds) and rounds.labels is not None:  # a search has found them
                try_whole_patches(rounds, replay.mismatch(rounds.labels), deadline)
            # 4. Where in the open directions the picture is, the gradient says.
            result = search(rounds, match, coordinates, max_evaluations=left, deadline=deadline)
            interrupted = result.diagnostics["stopped"] == "interrupted"
            # 5. Whole patches lie near; who has pressed Ctrl-C does not wait for lattices.
            round_result(rounds, result, Deadline.after(0) if interrupted else deadline)
            if interrupted:
                return "interrupted"
    except KeyboardInterrupt:
        return "interrupted"
    except AttackNotApplicable:
        if not deadline.passed:
            raise
        return "seconds"  # too late for a single evaluation


# --- Check ----------------------------------------------------------------------------------------


def _check(levels: int, labels: Tensor | str | None, batch_size: int) -> None:
    """Before anything that takes time."""
    if levels < 2:
        raise ValueError(f"levels={levels}: whole levels from 0 to levels − 1 need at least 2")
    if isinstance(labels, str) and labels != "recover":
        raise ValueError(f'labels={labels!r}: give them as a tensor, or leave them to "recover"')
    if isinstance(labels, Tensor) and (labels.shape != (batch_size,) or labels.dtype.is_floating_point):
        raise ValueError(
            f"labels must be {batch_size} integers (batch_size={batch_size}), "
            f"not {tuple(labels.shape)} of {labels.dtype}"
        )


def _check_patch_size(solution: SpanSolution) -> None:
    p = len(solution.patches)
    if p > _LARGEST:
        raise AttackNotApplicable(
            "span_then_round",
            f"{p} pixels a patch are a lattice of {p} dimensions, and reducing more than {_LARGEST} can take minutes",
            pixels_per_patch=p,
        )


def _known_labels(
    model: nn.Module, update: ClientUpdate, anatomy: Anatomy, labels: Tensor | str | None, batch_size: int
) -> tuple[Tensor | None, str]:
    """Labels known before any search, and their source; those of a batch the search finds."""
    given = labels if isinstance(labels, Tensor) else None
    known, known_from = labels_or_none(model, update, anatomy, given)
    return (None if batch_size > 1 and given is None else known), known_from


# --- Report ---------------------------------------------------------------------------------------


def _report(
    rounds: Rounds, replay: Replay, numbers: dict[str, Any], preprocessing: Preprocessing, start: float
) -> Reconstruction:
    """The pictures, and a verdict from what was verified of them."""
    residual = replay.residual(rounds.patches, rounds.labels)
    conditions = _conditions(rounds, replay, residual, numbers["open_directions"])
    images = rounds.grid.images(rounds.patches)
    return Reconstruction(
        attack="span_then_round",
        images=images,
        pixels=preprocessing.to_pixels(images),
        labels=rounds.labels,
        exact=all(condition.holds for condition in conditions),
        reason="; ".join(
            f"{condition.name}{'' if condition.holds else ' fails'}: {condition.text}" for condition in conditions
        ),
        diagnostics={
            **numbers,
            "settled": rounds.settled.clone(),
            "levels": rounds.grid.levels,
            "residual": residual,
            "evaluations": len(rounds.history),
            "trials": rounds.trials,
            "loss": min((entry["loss"] for entry in rounds.history), default=None),
            "labels": rounds.labels_from,
            "batch_size": rounds.batch_size,
            "precision": str(replay.update.dtype).removeprefix("torch."),
        },
        seconds=time.perf_counter() - start,
        history=rounds.history,
        conditions=conditions,
    )


def _conditions(rounds: Rounds, replay: Replay, residual: float | None, opened: int) -> tuple[Condition, ...]:
    """What a picture of whole levels rests on."""
    settled, patches = int(rounds.settled.sum()), rounds.settled.numel()
    replayed = "their gradient differs from the client's by {residual:.1e} (rounding: {rounding:.1e})"
    if residual is None:
        replayed = "not replayed, for the labels are not known"
    if replay.client.training:
        replayed += "; the model is in train mode: had it dropout, no replay could be like the client's"
    return (
        Condition(
            "every patch settled",
            shown_if(settled == patches),
            {"settled": settled, "patches": patches, "open": opened, "directions": len(rounds.grid.centres)},
            "{settled} of {patches} patches were settled, "
            "where the span left {open} of {directions} directions a patch open",
        ),
        Condition(
            "replayed gradient is the update",
            "not checked" if residual is None else shown_if(residual <= replay.rounding),
            {"rounding": replay.rounding} | ({} if residual is None else {"residual": residual}),
            replayed,
        ),
        Condition(
            "precision verifies a picture",
            shown_if(replay.rounding < _COARSEST),
            {"rounding": replay.rounding, "precision": str(replay.update.dtype).removeprefix("torch.")},
            "{precision} rounds to {rounding:.1e}"
            + ("" if replay.rounding < _COARSEST else ", and so coarse a gradient verifies no picture"),
        ),
    )
