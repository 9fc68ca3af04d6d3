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

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..anatomy import Anatomy, dissect
from ..models import patchify, unpatchify
from ..preprocessing import Preprocessing
from ..update import ClientUpdate
from .coordinates import Coordinates
from .hybrid import open_coordinates
from .labels import assumed_batch_size, labels_or_none
from .lattice import ReducedLattice, reduced_lattice
from .matching import match_gradients
from .objectives import relative_l2
from .result import AttackNotApplicable, Reconstruction
from .span import SpanSolution, solve_span
from .verify import as_shared, replay, residual_of

_LARGEST = 256  # pixels a patch: reducing a lattice of more dimensions takes hours
# In grey levels. What the span is less sure of than _SURE it is too sure of, by up to 18 times where we measured it.
_SURE, _TOO_SURE, _SAFETY, _LEAST = 1e-3, 20.0, 3.0, 1e-5
_BLIND = 30.0  # what is known no better than this is not known
_ROUGHNESS, _CONTRAST = 15.0, 60.0  # between neighbours, and around the middle, standard deviations of a picture
_NEAR = (0.25, 1.0, 2.0, 4.0, 8.0, 16.0)  # how far, in levels, the search may be off
_FAR = 1.5  # a patch is not settled where it turns out to be so many times further off
_MISFIT = 100.0  # nor where it contradicts the span: mean square in deviations; right ones have up to 21, wrong 500
_RATIO = 0.5  # a patch is settled when the second-best is twice as bad
_LISTED = 12  # whole-level patches tried at a place where the search of a batch is stuck
_FEW = 4  # places of one image for which this is tried too
_TRIALS = 300  # of these, each a gradient, between two rounds
_FIRST, _ROUND = 150, 60  # evaluations of the search before the first rounding, and between two


def span_then_round(
    model: nn.Module,
    update: ClientUpdate,
    *,
    labels: Tensor | Literal["recover"] | None = None,
    batch_size: int | None = None,
    levels: int = 256,
    seed: int = 0,
    max_evaluations: int = 1200,
    max_seconds: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    callback: Callable[[dict[str, Any], Tensor], None] | None = None,
    progress: bool = True,
    **options: Any,
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
    dtype : torch.dtype, optional
        To match in; default is the update's own precision, float32 at least.
    device, anatomy, preprocessing
        As in :func:`~aprillab.attacks.embedding.embedding_closed_form`.
    callback : (history entry, images) to None, called at every evaluation
        It may raise KeyboardInterrupt to end the search.
    progress : bool, show a progress bar of the settled patches
    **options
        Of :func:`~aprillab.attacks.matching.match_gradients` but ``init``, ``coordinates`` and ``resume``: the
        client's loss, priors, …

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
    TypeError
        If an option is not one of ``match_gradients``.
    UpdateError
        If the update does not belong to the model.
    """
    start = time.perf_counter()
    if levels < 2:
        raise ValueError(f"levels={levels}: whole levels from 0 to levels − 1 need at least 2")
    anatomy = anatomy or dissect(model)
    preprocessing = preprocessing or anatomy.preprocessing
    batch_size = assumed_batch_size(update, labels, batch_size)
    _check(labels, batch_size, options)
    solution = solve_span(model, update, anatomy=anatomy, batch_size=batch_size, strict=False, device=device)
    p, n = solution.patches.shape
    if p > _LARGEST:
        raise AttackNotApplicable(
            "span_then_round",
            f"{p} pixels a patch are a lattice of {p} dimensions, and reducing more than {_LARGEST} takes hours",
            pixels_per_patch=p,
        )
    grid = _Grid.of(solution, preprocessing, levels)
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

    client, loss = as_shared(model, update), options.get("loss", nn.functional.cross_entropy)
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
                    labels=found,
                    batch_size=batch_size,
                    coordinates=state.coordinates(grid, coordinates),
                    init=grid.images(state.begin(grid, coordinates)),
                    seed=seed,
                    dtype=dtype,
                    device=device,
                    anatomy=anatomy,
                    preprocessing=preprocessing,
                    max_evaluations=min(_ROUND if state.history else _FIRST * batch_size, left),
                    max_seconds=None if max_seconds is None else max(max_seconds - spent, 0.1),
                    progress=False,
                    callback=state.listen(callback, start),
                    **{"tolerance": eps, "restarts": 1, **options},
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


_OPTIONS = set(inspect.signature(match_gradients).parameters) - {"init", "coordinates", "resume"}


def _check(labels: Tensor | str | None, batch_size: int, options: dict[str, Any]) -> None:
    """Before anything that takes time."""
    if strangers := set(options) - _OPTIONS:
        raise TypeError(f"span_then_round has no option {', '.join(sorted(strangers))}")
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


# --- What is known of the patches, in grey levels -----------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """The span attack's patches and their errors, in levels; patches are columns."""

    centres: Tensor  # (p, n)
    directions: Tensor  # (p, p), in rows
    deviations: Tensor  # (p,), of the error in each, with a margin
    scale: Tensor  # (p,), levels for one unit of model input
    offset: Tensor  # (p,)
    levels: int
    patch_size: int
    image_size: tuple[int, int]
    reduced: dict[float, ReducedLattice] = field(default_factory=dict)  # by the distance the search may be off
    listed: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, solution: SpanSolution, preprocessing: Preprocessing, levels: int) -> _Grid:
        p = len(solution.patches)
        ones = torch.ones(1, p // solution.patch_size**2, solution.patch_size, solution.patch_size)
        ones = ones.to(solution.patches)
        zero = preprocessing.to_pixels(0 * ones, clamp=False)
        offset = (levels - 1) * patchify(zero, solution.patch_size).flatten()
        scale = (levels - 1) * patchify(preprocessing.to_pixels(ones, clamp=False), solution.patch_size).flatten()
        scale = scale - offset
        s, directions = torch.linalg.svd(solution.root / scale)[1:]
        nominal = solution.variance**0.5 / s.clamp_min(torch.finfo(s.dtype).tiny)
        deviations = torch.where(nominal > _SURE, _TOO_SURE * nominal, _SAFETY * nominal).clamp_min(_LEAST)
        centres = scale[:, None] * solution.patches + offset[:, None]
        return cls(centres, directions, deviations, scale, offset, levels, solution.patch_size, solution.image_size)

    @property
    def known(self) -> Tensor:
        """W (q, p): what the span knows, each row divided by its standard deviation."""
        sure = self.deviations < _BLIND
        return self.directions[sure] / self.deviations[sure, None]

    def misfit(self, patches: Tensor, places: Tensor) -> Tensor:
        """How far patches (p, m) at their places (m,) are from what the span knows: mean squares in deviations."""
        return (self.known @ (patches - self.centres[:, places])).square().mean(0)

    def near(self, distance: float) -> ReducedLattice:
        """The lattice of patches that the span allows, a given distance from a guess."""
        if distance not in self.reduced:
            self.reduced[distance] = reduced_lattice(
                self._with(torch.eye(len(self.centres)).to(self.centres) / distance)
            )
        return self.reduced[distance]

    def near_centres(self, distance: float, guesses: Tensor) -> Tensor:
        """The most probable patches (p, m) near guesses (p, n), before rounding."""
        return self._solve(torch.eye(len(guesses)).to(guesses) / distance, guesses / distance)

    @property
    def smooth(self) -> ReducedLattice:
        """The lattice of patches that the span allows, the smooth ones shorter."""
        if 0.0 not in self.reduced:
            self.reduced[0.0] = reduced_lattice(self._with(self._prior()[0]))
        return self.reduced[0.0]

    def candidates(self) -> list[Tensor]:
        """For each place the smoothest whole-level patches (_LISTED, p) that the span allows."""
        if not self.listed:
            slack = 30.0 * len(self.centres)
            points, distances = self.smooth.nearest(self.smooth_centres(), count=400, width=2000, slack=slack)
            inside = ((points >= 0) & (points < self.levels)).all(2) & distances.isfinite()
            self.listed.extend(p[i][:_LISTED] for p, i in zip(points, inside, strict=True))
        return self.listed

    def smooth_centres(self) -> Tensor:
        prior, wanted = self._prior()
        return self._solve(prior, wanted[:, None].expand(-1, self.centres.shape[1]))

    def _prior(self) -> tuple[Tensor, Tensor]:
        """Rows that say that neighbours resemble each other and no level is far from the middle; their values."""
        p, side = len(self.centres), self.patch_size
        number = torch.arange(p).reshape(-1, side, side)
        eye = torch.eye(p).to(self.centres)
        steps = [eye[number[:, 1:].flatten()] - eye[number[:, :-1].flatten()]]
        steps += [eye[number[:, :, 1:].flatten()] - eye[number[:, :, :-1].flatten()]]
        unit = (self.levels - 1) / 255
        rows = torch.cat([*steps, eye * (_ROUGHNESS / _CONTRAST)]) / (_ROUGHNESS * unit)
        return rows, rows @ torch.full((p,), (self.levels - 1) / 2).to(rows)

    def _with(self, prior: Tensor) -> Tensor:
        return torch.cat([self.known, prior])

    def _solve(self, prior: Tensor, wanted: Tensor) -> Tensor:
        known = self.known
        batch = wanted.shape[1] // self.centres.shape[1]
        right = torch.cat([(known @ self.centres).repeat(1, batch), wanted])
        Q, R = torch.linalg.qr(torch.cat([known, prior]))
        return torch.linalg.solve_triangular(R, Q.T @ right, upper=True)

    def images(self, patches: Tensor) -> Tensor:
        """(B, C, H, W) in model-input space, of patches (B, n, p) in levels."""
        return unpatchify((patches - self.offset) / self.scale, self.patch_size, self.image_size)

    def patches(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`images`."""
        return patchify(images.to(self.centres), self.patch_size) * self.scale + self.offset

    def smoothest(self, patches: Tensor, free: Tensor) -> Tensor:
        """The smoothest picture (n, p) whose free patches are what the span allows and whose others are given."""
        rows = self.directions * self.deviations.clamp(1e-3, 255.0)[:, None]
        origin = torch.where(free[:, None], self.centres.T, patches)
        shape = (len(free), len(rows))

        def slope(flat: Any) -> Any:
            with torch.enable_grad():
                c = torch.as_tensor(flat).to(origin).reshape(shape).requires_grad_()
                moved = origin + (c * free[:, None]) @ rows
                image = unpatchify(moved[None], self.patch_size, self.image_size)
                steps = image.diff(dim=-1).square().sum() + image.diff(dim=-2).square().sum()
                energy = steps / (_ROUGHNESS * (self.levels - 1) / 255) ** 2 + c.square().sum()
            return (torch.autograd.grad(energy, c)[0] / 2).flatten().cpu().numpy()

        still = slope(torch.zeros(shape).flatten())
        hessian = LinearOperator((still.size,) * 2, matvec=lambda v: slope(v) - still, dtype=still.dtype)
        c, _ = cg(hessian, -still, rtol=1e-2, maxiter=200)
        return origin + (torch.as_tensor(c).to(origin).reshape(shape) * free[:, None]) @ rows


# --- What the attack has so far -----------------------------------------------------------------------------------


@dataclass
class _State:
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
        grid: _Grid,
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

    def coordinates(self, grid: _Grid, coordinates: Coordinates) -> Coordinates:
        """Where to look for what is not settled."""
        settled = patchify(grid.images(self.patches), grid.patch_size)
        origin = torch.where(self.settled[..., None], settled, coordinates.origin)
        return replace(coordinates, origin=origin, free=(~self.settled).to(origin))

    def begin(self, grid: _Grid, coordinates: Coordinates) -> Tensor:
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

    def try_whole_patches(self, grid: _Grid, mismatch: Callable[[Tensor], float], late: Callable[[], bool]) -> None:
        """Put whole-level patches where the batch is not settled, as long as its gradient comes nearer."""
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

    def searched(self, grid: _Grid, result: Reconstruction, late: Callable[[], bool]) -> None:
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
