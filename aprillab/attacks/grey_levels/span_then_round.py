"""Span first, then whole grey levels: the pictures of an update are not any pictures, their pixels are whole numbers.

Where the span attack leaves a few directions of a patch open, in a sinusoidal embedding or a batch, the open set is a
plane, and almost no point of it has whole levels everywhere. The private patch has. Lattice reduction finds it
(lattice.py), often from the span alone; where too much is open for that, gradient matching comes first and narrows
the place down, and every patch that is settled is kept, which helps the search with the rest. Chapter 07.

We know of no publication that uses the pixels' own grid. Lattices have met gradients before: Li et al. (2024, arXiv
2409.14260) invert a batch through a fully connected layer as a hidden subset sum (Nguyen and Stern, CRYPTO 1999),
where the whole numbers are the zeros and ones that a ReLU lets through. SPEAR (Dimitrov et al., NeurIPS 2024, arXiv
2403.03945) separates a batch by the sparsity of the same zeros.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...anatomy import Anatomy, dissect
from ...models import patchify
from ...preprocessing import Preprocessing
from ...update import ClientUpdate
from ..closed_forms.span import solve_span
from ..labels import assumed_batch_size, labels_or_none
from ..replay import as_shared, replay, residual_of
from ..result import AttackNotApplicable, Reconstruction
from ..searches.coordinates import Coordinates
from ..searches.match import match_gradients
from ..searches.objectives import relative_l2
from ..searches.problem import Loss
from ..searches.recipes import Recipe, recipe_of
from ..searches.span_then_match import FROM_THE_SPAN, open_coordinates
from .grid import Grid
from .lattice import ReducedLattice

_LARGEST = 256  # pixels a patch: reducing a lattice of more dimensions takes hours
_NEAR = (0.25, 1.0, 2.0, 4.0, 8.0, 16.0)  # how far, in levels, the search may be off
_FAR = 1.5  # a patch is not settled where it turns out to be so many times further off
_MISFIT = 100.0  # nor where it contradicts the span: mean square in deviations; right ones have up to 21, wrong 500
_RATIO = 0.5  # a patch is settled when the second-best is twice as bad
_FEW = 4  # where so few patches are left, whole-level ones are tried at every place, settled or not
_TRIALS = 300  # of these, each a gradient, between two rounds
_FIRST, _ROUND = 150, 60  # evaluations of the search before the first rounding, and between two


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
    :func:`span_closed_form` alone gets no sharp picture: fixed sinusoids, and batches. What it knows besides: that
    the client's pixels were whole levels when they were normalized. That is so after decoding, cropping, flipping, or
    resizing to 8 bits, and not after resizing or blending in floating point.

    A patch is settled when the nearest whole levels agree with the span, and explain it at least twice as well as the
    next, if the search among them keeps a next one at all. While some are
    not, rounds of gradient matching in the open directions alternate with rounding. A search that settles no more
    and comes no nearer begins half of its unsettled patches anew, from the smoothest picture that the span allows; in
    a batch, or where few are left, it tries the smoothest whole-level patches of each place by their gradient and
    goes on from the best.

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
        Looked at by the search and before each lattice is reduced, which takes up to 10 s.
    loss : callable, the client's, (logits, labels) to a scalar
    dtype : torch.dtype, optional
        To match in; default is the update's own precision, float32 at least.
    device, anatomy, preprocessing
        As in :func:`~aprillab.attacks.closed_forms.patch_embedding.embedding_closed_form`.
    callback : (history entry, images) to None, called at every evaluation
        It may raise KeyboardInterrupt to end the search.
    progress : bool, show a progress bar of the settled patches

    Returns
    -------
    Reconstruction
        ``exact`` is True only if every patch is settled and the client's gradient, computed again from the pictures,
        is the update to rounding, as a whole and in the patch embedding, in float32 or better. ``diagnostics``:
        ``settled`` (B, n) of bool, ``settled_by_span`` (how many before any search), ``open_directions``,
        ``residual`` (the larger of the two), ``evaluations``, ``trials`` (gradients spent on whole-level patches of a
        batch), ``span``. ``history`` is the search's, with ``settled``, the number of settled patches.

    Raises
    ------
    AttackNotApplicable
        Where the span attack does not apply (the width does not matter here), or a patch has more than 256 pixels.
    ValueError
        If ``levels`` < 2, the labels are not B whole numbers, or as ``match_gradients``.
    UpdateError
        If the update does not belong to the model.
    """
    start = time.perf_counter()
    if levels < 2:
        raise ValueError(f"levels={levels}: whole levels from 0 to levels − 1 need at least 2")
    recipe = recipe_of(recipe)
    anatomy = anatomy or dissect(model)
    preprocessing = preprocessing or anatomy.preprocessing
    batch_size = assumed_batch_size(update, labels, batch_size)
    _check(labels, batch_size)
    solution = solve_span(model, update, anatomy=anatomy, batch_size=batch_size, strict=False, device=device)
    p, n = solution.patches.shape
    if p > _LARGEST:
        raise AttackNotApplicable(
            "span_then_round",
            f"{p} pixels a patch are a lattice of {p} dimensions, and reducing more than {_LARGEST} takes hours",
            pixels_per_patch=p,
        )
    grid = Grid.of(solution, preprocessing, levels)
    coordinates, opened = open_coordinates(solution)
    state = _State(
        settled=torch.zeros(batch_size, n, dtype=torch.bool, device=grid.centres.device),
        patches=grid.centres.T.expand(batch_size, -1, -1).clone(),
        generator=torch.Generator().manual_seed(seed),
    )
    if batch_size == 1:
        state.settle(grid, grid.smooth, grid.smooth_centres(), ratio=_RATIO / 2)
    by_span = int(state.settled.sum())
    if dtype is None:
        dtype = torch.float64 if update.dtype == torch.float64 else torch.float32
    found, found_how = labels_or_none(model, update, anatomy, labels if isinstance(labels, Tensor) else None)
    if batch_size > 1 and not isinstance(labels, Tensor):
        found = None  # the search recovers them

    client = as_shared(model, update)
    eps = torch.finfo(update.dtype).eps
    limit = 30 * eps

    def residual_now() -> float | None:
        if found is None:
            return None
        gradients = replay(client, grid.images(state.patches), found, loss=loss)
        return max(residual_of(gradients, update), residual_of(gradients, update, anatomy.patch_weight))

    def mismatch(patches: Tensor) -> float:
        assert found is not None  # a search came before, and it knows or finds labels
        gradients = replay(client, grid.images(patches), found, loss=loss)
        return float(
            relative_l2(*zip(*[(g, update.gradients[k].to(g)) for k, g in gradients.items()], strict=True), eps=eps)
        )

    def late() -> bool:
        return max_seconds is not None and time.perf_counter() - start >= max_seconds

    stopped, residual = "", None
    with tqdm(total=state.settled.numel(), desc="settled patches", unit=" patch", disable=not progress) as bar:
        try:
            while not stopped:
                bar.update(int(state.settled.sum()) - bar.n)
                left = max_evaluations - len(state.history)
                if state.settled.all():
                    residual = residual_now()
                    if residual is None or residual <= limit or state.doubted_in_vain():
                        stopped = "settled"
                        break
                if left <= 0 or late():
                    stopped = "evaluations" if left <= 0 else "seconds"
                    break
                if state.settled.all():
                    state.release()  # some patch was settled wrongly, or the gradient is not what the client computed
                elif state.stuck and (batch_size > 1 or int((~state.settled).sum()) <= _FEW):
                    state.try_whole_patches(grid, mismatch, late)
                spent = time.perf_counter() - start
                result = match_gradients(
                    model,
                    update,
                    recipe=recipe,
                    labels=found,
                    batch_size=batch_size,
                    coordinates=state.coordinates(grid, coordinates),
                    start=grid.images(state.begin(grid, coordinates)),
                    seed=seed,
                    dtype=dtype,
                    device=device,
                    anatomy=anatomy,
                    preprocessing=preprocessing,
                    max_evaluations=min(_ROUND if state.history else _FIRST * batch_size, left),
                    max_seconds=None if max_seconds is None else max(max_seconds - spent, 0.1),
                    tolerance=eps,
                    loss=loss,
                    progress=False,
                    callback=state.listen(callback, start),
                )
                if found is None:
                    found, found_how = result.labels, result.diagnostics["labels"]
                if result.diagnostics["stopped"] == "interrupted":
                    stopped = "interrupted"
                state.searched(grid, result, late if not stopped else lambda: True)
        except KeyboardInterrupt:
            stopped = "interrupted"
        except AttackNotApplicable:
            if not late():
                raise
            stopped = "seconds"  # too late for a single evaluation
    if residual is None or not state.settled.all():
        residual = residual_now()
    images = grid.images(state.patches)
    return Reconstruction(
        attack="span_then_round",
        images=images,
        pixels=preprocessing.to_pixels(images),
        labels=found,
        **_verdict(state, residual, limit, f"the span left {opened} of {p} directions a patch open", model.training),
        diagnostics={
            "settled": state.settled.clone(),
            "settled_by_span": by_span,
            "open_directions": opened,
            "levels": levels,
            "residual": residual,
            "stopped": stopped,
            "evaluations": len(state.history),
            "trials": state.trials,
            "loss": min((entry["loss"] for entry in state.history), default=None),
            "labels": found_how,
            "batch_size": batch_size,
            "span": solution.numbers,
            "precision": str(update.dtype).removeprefix("torch."),
            "dtype": str(dtype).removeprefix("torch."),
        },
        seconds=time.perf_counter() - start,
        history=state.history,
    )


def _check(labels: Tensor | str | None, batch_size: int) -> None:
    """Before anything that takes time."""
    if isinstance(labels, str) and labels != "recover":
        raise ValueError(f'labels={labels!r}: give them as a tensor, or leave them to "recover"')
    if isinstance(labels, Tensor) and (labels.shape != (batch_size,) or labels.dtype.is_floating_point):
        raise ValueError(
            f"labels must be {batch_size} integers (batch_size={batch_size}), "
            f"not {tuple(labels.shape)} of {labels.dtype}"
        )


def _verdict(state: _State, residual: float | None, limit: float, opened: str, training: bool) -> dict[str, Any]:
    settled, patches = int(state.settled.sum()), state.settled.numel()
    text = f"{opened}, and {settled} of {patches} patches were settled"
    if residual is None:
        return {"exact": False, "reason": f"{text}; not replayed, for the labels are not known"}
    text += f"; replayed, their gradient differs from the client's by {residual:.1e} (rounding: {limit:.1e})"
    fine = limit < 1e-4
    if not fine:
        text += "; so coarse a gradient verifies no picture"
    if training:
        text += "; the model is in train mode: had it dropout, no replay could be like the client's"
    return {"exact": settled == patches and residual <= limit and fine, "reason": text}


# --- What the attack has so far -------------------------------------------------------------------


@dataclass
class _State:
    """What is settled, the best guess at the rest, and how the rounds went."""

    settled: Tensor  # (B, n) of bool
    patches: Tensor  # (B, n, p), in levels: those settled, and the best guess at the others
    generator: torch.Generator
    stuck: bool = False
    trials: int = 0
    best_loss: float = math.inf
    last_loss: float = math.inf  # of the round before
    history: list[dict[str, Any]] = field(default_factory=list)
    doubted: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # pictures, and which patches were kept

    def settle(
        self,
        grid: Grid,
        lattice: ReducedLattice,
        centres: Tensor,
        *,
        ratio: float = _RATIO,
        guesses: Tensor | None = None,
        far: float = math.inf,
    ) -> int:
        """Round the patches that are not settled yet, from centres (p, B·n), and settle those that come out clear."""
        open_ = (~self.settled.flatten()).nonzero().flatten()
        points, distances = lattice.nearest(centres[:, open_])
        clear = distances[:, 0] < ratio * distances[:, 1]
        if guesses is not None:
            clear &= (points[:, 0] - guesses.T[open_]).square().mean(1) < far**2
        clear &= grid.misfit(points[:, 0].T, open_ % grid.centres.shape[1]) < _MISFIT
        clear &= ((points[:, 0] >= 0) & (points[:, 0] < grid.levels)).all(1)
        self.patches.flatten(0, 1)[open_[clear]] = points[clear, 0]
        self.settled.view(-1)[open_[clear]] = True
        return int(clear.sum())

    def coordinates(self, grid: Grid, coordinates: Coordinates) -> Coordinates:
        """Where to look for what is not settled."""
        settled = patchify(grid.images(self.patches), grid.patch_size)
        origin = torch.where(self.settled[..., None], settled, coordinates.origin)
        return replace(coordinates, origin=origin, free=(~self.settled).to(origin))

    def begin(self, grid: Grid, coordinates: Coordinates) -> Tensor:
        """Patches (B, n, p) to start a round from."""
        batch = len(self.settled)
        if batch > 1 and not self.history:  # the span gives all images the same picture
            shape = (*self.settled.shape, len(coordinates.basis))
            z = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.patches)
            return grid.patches(coordinates.images_of(z))
        if batch > 1 or not self.stuck:
            return self.patches
        half = torch.rand(self.settled.shape, generator=self.generator).to(self.patches) < 0.5
        anew = grid.smoothest(self.patches[0], ~self.settled[0])[None]
        return torch.where((~self.settled & half)[..., None], anew, self.patches)

    def try_whole_patches(self, grid: Grid, mismatch: Callable[[Tensor], float], late: Callable[[], bool]) -> None:
        """Put whole-level patches where none is settled, as long as the gradient comes nearer to the client's."""
        candidates, last = grid.candidates(), self.trials + _TRIALS
        doubtful = ~self.settled
        if int(doubtful.sum()) <= _FEW:  # what keeps them from settling may be one that is settled wrongly
            doubtful = torch.ones_like(doubtful)
        places = [(b, k) for b, k in doubtful.nonzero().tolist() if len(candidates[k])]
        patches, value = self.patches, mismatch(self.patches)
        best, least = patches, value
        while places and self.trials < last and not late():
            moved = False
            for place in torch.randperm(len(places), generator=self.generator).tolist():
                b, k = places[place]
                for candidate in candidates[k]:
                    if self.trials >= last or late():
                        break
                    trial = patches.clone()
                    trial[b, k] = candidate
                    self.trials += 1
                    if (found := mismatch(trial)) < 0.999 * value:
                        patches, value, moved = trial, found, True
            if value < least:
                best, least = patches, value
            if not moved:  # once more, from candidates drawn at random
                patches = patches.clone()
                for b, k in [place for place in places if not self.settled[place]]:
                    drawn = torch.randint(len(candidates[k]), (1,), generator=self.generator)
                    patches[b, k] = candidates[k][int(drawn)]
                value = mismatch(patches)
        self.settled &= (best == self.patches).all(2)
        self.stuck = best is self.patches  # and if not, the search goes on from the best
        self.patches, self.best_loss = best, math.inf

    def searched(self, grid: Grid, result: Reconstruction, late: Callable[[], bool]) -> None:
        """Take over what the search found, and round it while there is time."""
        before = int((~self.settled).sum())
        loss = result.diagnostics["loss"]
        found = torch.where(self.settled[..., None], self.patches, grid.patches(result.images))
        taken = 0
        guess = self.patches
        self.patches = found
        for distance in _NEAR:
            if not self.settled.all() and not late():
                guesses = found.flatten(0, 1).T
                centres = grid.near_centres(distance, guesses)
                taken += self.settle(grid, grid.near(distance), centres, guesses=guesses, far=_FAR * distance)
        if not taken and loss > self.best_loss:
            self.patches = guess
        else:
            self.best_loss = loss
        self.stuck = taken < max(1, before // 20) and loss > self.last_loss / 2
        self.last_loss = loss

    def doubted_in_vain(self) -> bool:
        """Whether the same pictures came back after each of their halves had been doubted."""
        return sum(torch.equal(self.patches, before) for before, _ in self.doubted) >= 2

    def release(self) -> None:
        """Doubt a random half of what is settled, and the other half if the same pictures come back."""
        if self.doubted and torch.equal(self.patches, self.doubted[-1][0]):
            kept = ~self.doubted[-1][1]
        else:
            kept = torch.rand(self.settled.shape, generator=self.generator).to(self.patches) < 0.5
        self.doubted.append((self.patches.clone(), kept))
        self.settled &= kept
        self.stuck, self.best_loss = True, math.inf

    def listen(self, callback: Callable[[dict[str, Any], Tensor], None] | None, start: float) -> Callable[..., None]:
        """Count evaluations and seconds over all rounds."""

        def listen(entry: dict[str, Any], images: Tensor) -> None:
            entry["evaluation"] = len(self.history) + 1
            entry["seconds"] = time.perf_counter() - start
            entry["settled"] = int(self.settled.sum())
            self.history.append(entry)
            if callback is not None:
                callback(entry, images)

        return listen
