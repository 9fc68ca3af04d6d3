"""The measurements: a function for each question, which yields rows for one setting."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import aprillab as al
from aprillab.attacks.grey_levels import grid as grids
from aprillab.attacks.grey_levels import lattice as lattices
from aprillab.attacks.grey_levels import rounds
from aprillab.attacks.grey_levels.grid import Grid, calibrated, nominal_deviations
from aprillab.attacks.grey_levels.lattice import ReducedLattice, reduced_lattice
from aprillab.attacks.replay import residual_of
from aprillab.attacks.searches import span_then_match as spans
from aprillab.attacks.searches.coordinates import Coordinates

from .victims import Setting, Victim, victim


@dataclass(frozen=True)
class Row:
    """One number."""

    part: str
    setting: str
    quantity: str
    at: float | None  # the value of a constant that was tried, or where on an axis it was measured
    value: float


Add = Callable[[str, float | None, float], Row]  # of one part and setting
Rows = Iterator[Row]


def clients(setting: Setting, count: int) -> Iterator[Victim]:
    """One photograph (or batch) each."""
    return (victim(setting, number) for number in range(count))


# --- Deviations: what the span predicts, and what its error is --------------------------------------


def deviations(add: Add, setting: Setting, count: int) -> Rows:
    """The error of each direction, r.m.s. over the patches, over the deviation predicted for it."""
    ratios: dict[str, list[Tensor]] = {"sure": [], "unsure": []}
    misfits = []
    for one in clients(setting, count):
        directions, nominal = nominal_deviations(one.solution, one.grid.scale)
        # The images of a batch differ in the open directions: their mean is what the span is of.
        error = (directions @ (one.truth.mean(0).T - one.grid.centres)).square().mean(1).sqrt()
        known = one.grid.deviations < one.grid.unknown_above
        for name, group in (("sure", nominal <= grids.SURE), ("unsure", (nominal > grids.SURE) & known)):
            ratios[name].append((error / nominal)[group])
        misfits += [one.grid.misfit(image.T, torch.arange(len(image))) for image in one.truth]
    for name, parts in ratios.items():
        ratio = torch.cat(parts)
        yield add(f"{name}: directions", None, len(ratio))
        if len(ratio):
            yield add(f"{name}: median ratio", None, float(ratio.median()))
            yield add(f"{name}: largest ratio", None, float(ratio.max()))
    yield add("misfit of the truth: largest", None, float(torch.cat(misfits).max()))


# --- Rounding: when is what comes out right? --------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rounded:
    """Patches (m of them) that were rounded, and what tells those that are right."""

    right: Tensor  # of bool: the client's own
    ratio: Tensor  # squared distance of the nearest whole levels over that of the next
    misfit: Tensor  # to what the span knows, deviations²
    off: Tensor  # r.m.s. levels from the guess
    inside: Tensor  # of bool: 0 ≤ level ≤ 255 everywhere

    def clear(self, *, ratio: float, misfit: float = rounds.MISFIT, off: float = math.inf) -> Tensor:
        """Those that ``settle`` in rounds.py would settle."""
        return (self.ratio < ratio) & (self.misfit < misfit) & (self.off < off) & self.inside


def rounded(grid: Grid, lattice: ReducedLattice, centres: Tensor, truth: Tensor, guess: Tensor | None) -> Rounded:
    """Centres (p, B·n) rounded; a patch of a batch is right if it is any image's at its place."""
    points, distances = lattice.nearest(centres)
    best, places = points[:, 0], torch.arange(centres.shape[1]) % truth.shape[1]
    return Rounded(
        right=(best == truth[:, places]).all(2).any(0),
        ratio=distances[:, 0] / distances[:, 1],
        misfit=grid.misfit(best.T, places),
        off=torch.zeros(len(best)) if guess is None else (best - guess.T).square().mean(1).sqrt(),
        inside=((best >= 0) & (best < grid.levels)).all(1),
    )


TRIED: dict[str, tuple[float, ...]] = {
    "ratio": (0.1, 0.25, 0.5, 0.75, 0.9),
    "misfit": (1.0, 10.0, 100.0, math.inf),
    "far": (1.0, 1.5, 2.0, 3.0, math.inf),
    "largest distance": (4.0, 8.0, 16.0, 32.0, 64.0),
}
DISTANCES = (*rounds.NEAR, 32.0, 64.0)  # the attack's, and two that it does not try


def alone(add: Add, setting: Setting, count: int) -> Rows:
    """From the span alone: settled rightly and wrongly, by ratio and by misfit."""
    found = [rounded(v.grid, v.grid.smooth, v.grid.smooth_centres(), v.truth, None) for v in clients(setting, count)]
    yield add("patches", None, sum(len(one.right) for one in found))
    for name in ("ratio", "misfit"):
        for value in TRIED[name]:
            limits = {"ratio": rounds.RATIO_ALONE} | {name: value}
            yield from _settled(add, name, value, ((one, one.clear(**limits)) for one in found))
    for name, parts in (
        ("right", [one.misfit[one.right] for one in found]),
        ("wrong", [one.misfit[~one.right] for one in found]),
    ):
        if len(misfit := torch.cat(parts)):
            yield add(f"misfit of what is {name}: least", None, float(misfit.min()))
            yield add(f"misfit of what is {name}: largest", None, float(misfit.max()))


def near(add: Add, setting: Setting, count: int, evaluations: tuple[int, ...] = (30, 60, 100, 150)) -> Rows:
    """Near what a search finds: settled rightly and wrongly, by the value of each constant."""
    pairs = [(v, guess) for v in clients(setting, count) for guess in guesses(v, evaluations)]
    found = [_rounded_near(v.grid, v.truth, guess) for v, guess in pairs]
    yield add("patches", None, sum(guess.shape[1] for _, guess in pairs))
    for name, values in TRIED.items():
        for value in values:
            options = {"largest" if name == "largest distance" else name: value}
            yield from _settled(add, name, value, (one for each in found for one in first_clear(each, **options)))
    # By how far a guess is off: at which of the attack's distances is the truth the nearest?
    off = torch.cat([_error(guess, v.truth) for v, guess in pairs])
    for least, most in zip((0.0, *DISTANCES), (*DISTANCES, math.inf), strict=True):
        group = (off >= least) & (off < most)
        yield add("off by", most, int(group.sum()))
        for distance in DISTANCES:
            yield add(
                f"right at {distance:g}, off by",
                most,
                int(torch.cat([f[distance].right for f in found])[group].sum()),
            )


@functools.lru_cache(maxsize=32)
def guesses(one: Victim, evaluations: tuple[int, ...]) -> list[Tensor]:
    """The patches (p, B·n) that a search has come to after so many evaluations, if it takes as
    many.
    """
    seen: list[Tensor] = []

    def look(entry: Mapping[str, Any], images: Tensor) -> None:
        if entry["evaluation"] in evaluations:
            seen.append(one.grid.patches(images).flatten(0, 1).T)

    al.span_then_match(
        one.model, one.update, labels=one.labels, max_evaluations=max(evaluations), callback=look, progress=False
    )
    return seen


def _rounded_near(
    grid: Grid, truth: Tensor, guess: Tensor, distances: Iterable[float] = DISTANCES
) -> dict[float, Rounded]:
    return {
        distance: rounded(grid, grid.near(distance), grid.near_centres(distance, guess), truth, guess)
        for distance in distances
    }


def first_clear(
    found: Mapping[float, Rounded],
    *,
    ratio: float = rounds.RATIO,
    misfit: float = rounds.MISFIT,
    far: float = rounds.FAR,
    largest: float = rounds.NEAR[-1],
) -> Iterator[tuple[Rounded, Tensor]]:
    """What each distance settles, in the attack's order: a patch at the first that is clear."""
    done = torch.zeros_like(next(iter(found.values())).right)
    for distance, one in found.items():
        if distance <= largest:
            now = one.clear(ratio=ratio, misfit=misfit, off=far * distance) & ~done
            yield one, now
            done = done | now


def _settled(add: Add, name: str, value: float, found: Iterable[tuple[Rounded, Tensor]]) -> Rows:
    pairs = list(found)
    yield add(f"{name}: right", value, sum(int((now & one.right).sum()) for one, now in pairs))
    yield add(f"{name}: wrong", value, sum(int((now & ~one.right).sum()) for one, now in pairs))


def _error(guess: Tensor, truth: Tensor) -> Tensor:
    """R.m.s. levels from each patch of a guess (p, B·n) to the nearest image's own."""
    places = torch.arange(guess.shape[1]) % truth.shape[1]
    return (guess.T - truth[:, places]).square().mean(2).amin(0).sqrt()


# --- The margins of the deviations ------------------------------------------------------------------

MARGINS: dict[str, tuple[float, ...]] = {
    "sure": (1e-4, 1e-3, 1e-2),
    "safety": (1.0, 3.0, 10.0),
    "too_sure": (1.0, 5.0, 20.0, 80.0),
    "least": (1e-6, 1e-5, 1e-4),
    "unknown_above": (3.0, 10.0, 30.0, 100.0),
}


def margins(add: Add, setting: Setting, count: int, evaluations: int = 150) -> Rows:
    """Settled near what a search has found, with other margins of the deviations."""
    pairs = [(v, guesses(v, (evaluations,))[-1]) for v in clients(setting, count)]
    yield add("patches", None, sum(guess.shape[1] for _, guess in pairs))
    for name, values in MARGINS.items():
        for value in values:
            found = [_rounded_near(_with_margin(v, name, value), v.truth, guess, rounds.NEAR) for v, guess in pairs]
            yield from _settled(add, name, value, (one for each in found for one in first_clear(each)))


def _with_margin(one: Victim, name: str, value: float) -> Grid:
    if name == "unknown_above":
        return replace(one.grid, unknown_above=value)
    nominal = nominal_deviations(one.solution, one.grid.scale)[1]
    return replace(one.grid, deviations=calibrated(nominal, **{name: value}))


# --- The lattice ------------------------------------------------------------------------------------

GUESS_OFF = 4.0  # levels
SEARCHED = {"width": (1, 10, 100, 500, 2000), "slack": (0.5, 2.0, 8.0, 32.0)}  # slack in p deviations²


def lattice(add: Add, setting: Setting, count: int) -> Rows:
    """What reducing costs, and what the search for the nearest loses near a guess.

    The guess is the truth and normal noise of GUESS_OFF levels.
    """
    seconds, shorter, steps = [], dict.fromkeys((6, 8, lattices.BITS), math.inf), []
    right = {(name, value): 0 for name, values in SEARCHED.items() for value in values}
    for one in clients(setting, count):
        rows, began = one.grid.smooth_rows, time.process_time()
        reduced = reduced_lattice(rows)
        seconds.append(time.process_time() - began)
        # The shortest step, compared with that of a basis found from 20 bits.
        best = reduced_lattice(rows, bits=20).triangle.diagonal().abs().min()
        for bits in shorter:
            shortest = reduced_lattice(rows, bits=bits).triangle.diagonal().abs().min()
            shorter[bits] = min(shorter[bits], float(shortest / best))
        guess = one.truth[0].T + GUESS_OFF * _normal(one.truth[0].T)
        reduced, centres = one.grid.near(GUESS_OFF), one.grid.near_centres(GUESS_OFF, guess)
        steps.append(_steps_of_truth(reduced, centres, one.truth[0]))
        for name, value in right:
            options = {"width": int(value)} if name == "width" else {"slack": value * len(centres)}
            points, _ = reduced.nearest(centres, count=1, **options)
            right[name, value] += int((points[:, 0] == one.truth[0]).all(1).sum())
    yield add("dimensions", None, setting.patch**2 * 3)
    yield add("patches", None, sum(step.shape[1] for step in steps))
    yield add("seconds to reduce", None, max(seconds))
    for bits, ratio in shorter.items():
        yield add("shortest step", bits, ratio)
    off = torch.cat([step.flatten() for step in steps])
    for most in (0, 1, 2, 3):
        yield add("truth within", most, float((off <= most).double().mean()))
    for (name, value), number in right.items():
        yield add(f"right by {name}", value, number)


def _normal(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _steps_of_truth(reduced: ReducedLattice, centres: Tensor, truth: Tensor) -> Tensor:
    """How many whole numbers each coordinate (p, n) of the truth is off what its row asks for,
    (8.6).
    """
    target = reduced.rotation.T @ (reduced.root @ centres)
    z = torch.linalg.solve(reduced.basis, truth.T).round()
    middle = z + (target - reduced.triangle @ z) / reduced.triangle.diagonal()[:, None]
    return (z - middle.round()).abs()


def candidates(add: Add, setting: Setting, count: int) -> Rows:
    """Where the truth stands in the lists of smooth whole patches."""
    ranks = []
    for one in clients(setting, count):
        for listed, *own in zip(one.grid.smooth_patches(), *one.truth, strict=True):  # place by place
            for patch in own:
                same = (listed == patch).all(1).nonzero()
                ranks.append(int(same[0]) + 1 if len(same) else math.inf)
    yield add("patches", None, len(ranks))
    for most in (1, 3, grids.LISTED, 50, grids.COUNTED):
        yield add("truth among the first", most, sum(rank <= most for rank in ranks) / len(ranks))


# --- The replay -------------------------------------------------------------------------------------


def replays(add: Add, setting: Setting, count: int) -> Rows:
    """What rounding leaves of the truth's replay, and what one wrong level; in units of ε."""
    generator = torch.Generator().manual_seed(0)
    rounding, whole, by_pixel = [], [], []
    for one in clients(setting, count):
        replay, truth = one.replay, one.truth
        # A client that computes otherwise than the server: in float64, what it shares in float32.
        images = one.grid.images(truth).to(torch.float32).double()
        exact = al.client_update(copy.deepcopy(one.model).double(), images, one.labels)
        elsewhere = replace(one.update, gradients={name: g.float() for name, g in exact.gradients.items()})
        rounding.append((replace(replay, update=elsewhere).residual(truth, one.labels) or 0) / replay.eps)
        for _ in range(10):
            wrong = truth.clone()
            b, k, i = (int(torch.randint(size, (1,), generator=generator)) for size in wrong.shape)
            wrong[b, k, i] += 1
            gradients = replay.gradients(wrong, one.labels)
            whole.append(residual_of(gradients, one.update, replay.patch_weight) / replay.eps)
            by_pixel.append((replay.residual(wrong, one.labels) or 0) / replay.eps)
    yield add("rounding: largest", None, max(rounding))
    yield add("one wrong level, patch embedding as a whole: least", None, min(whole))
    yield add("one wrong level, pixel by pixel: least", None, min(by_pixel))


# --- Photographs ------------------------------------------------------------------------------------


def photographs(add: Add, size: int, count: int) -> Rows:
    """How much neighbours differ, and how far levels are from the middle: r.m.s., by photograph."""
    steps, contrasts = [], []
    for name in al.victims()[: None if count > 1 else 1]:
        levels = 255 * al.load_victim(name, size, dtype=torch.float64)
        both = torch.cat([levels.diff(dim=-1).flatten(), levels.diff(dim=-2).flatten()])
        steps.append(float(both.square().mean().sqrt()))
        contrasts.append(float((levels - 127.5).square().mean().sqrt()))
    for name, found in (("roughness", steps), ("contrast", contrasts)):
        for quantile in (0.0, 0.5, 1.0):
            yield add(name, quantile, float(torch.tensor(found).quantile(quantile)))


# --- The coordinates of the search ------------------------------------------------------------------

Rule = Callable[[Tensor], Tensor]  # lengths of the directions by their deviations, in model input


def root(deviations: Tensor, *, longest: float = spans.LONGEST, known: float = spans.KNOWN) -> Tensor:
    """The attack's own lengths, √(τ/2), with other ends."""
    lengths = (spans.LONGEST * deviations).sqrt().clamp_max(longest)
    return torch.where(deviations > known, lengths, spans.SHORTEST)


def as_predicted(deviations: Tensor) -> Tensor:
    """The preconditioner that suggests itself: as long as the error to be expected, τ."""
    return deviations.clamp(spans.SHORTEST, spans.LONGEST)


def equal(deviations: Tensor) -> Tensor:
    """All open directions equally long."""
    return torch.where(deviations > spans.OPEN, spans.LONGEST, spans.SHORTEST)


RULES: dict[tuple[str, float | None], Rule] = {
    ("√(τ/2)", None): root,
    ("τ", None): as_predicted,
    ("equal", None): equal,
    **{("longest", value): partial(root, longest=value) for value in (0.1, 2.0)},
    **{("known", value): partial(root, known=value) for value in (1e-7, 1e-3)},
}


def lengths(add: Add, setting: Setting, count: int, evaluations: int = 60) -> Rows:
    """PSNR that a search comes to, by the lengths of the directions it goes along."""
    for (name, value), rule in RULES.items():
        for one in clients(setting, min(count, 2)):
            directions, predicted = one.solution.directions()
            basis = rule(predicted)[:, None] * directions
            coordinates = Coordinates(one.solution.patches.T, basis, one.grid.tiling)
            result = al.match_gradients(
                one.model, one.update, labels=one.labels, coordinates=coordinates, start=one.solution.images,
                recipe=spans.FROM_THE_SPAN, dtype=torch.float32, max_evaluations=evaluations, progress=False,
            )  # fmt: skip
            yield add(
                f"dB, {name}", value, float(al.psnr(result.pixels, al.HALF.to_pixels(one.grid.images(one.truth))))
            )
