"""Rounds of searching and rounding: what is settled so far, and the steps that settle more.

:func:`~aprillab.attacks.grey_levels.span_then_round.span_then_round` takes these steps in turn:

1. :func:`verify` replays the gradient of the pictures once all patches are settled;
2. :func:`doubt_half` takes back a half of them where that is not the client's;
3. :func:`~aprillab.attacks.grey_levels.whole_patches.try_whole_patches` where a search is stuck;
4. :func:`search` matches gradients in the directions that are open in the patches not settled;
5. :func:`round_result` rounds what the search found, and settles the patches that come out clear.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...update import ClientUpdate
from ..replay import Loss, replay, residual_of
from ..result import Reconstruction
from ..searches.coordinates import Coordinates
from ..searches.objectives import relative_l2
from .grid import Grid
from .lattice import ReducedLattice

# Measured in data/results/calibration.md (`python -m studies.calibration`), unless said otherwise.
# R.m.s. levels by which the search may be off; 32 and 64 as well would settle a fifth more.
NEAR = (0.25, 1.0, 2.0, 4.0, 8.0, 16.0)
# Times a distance that a patch may be off: up to 2 none is settled wrongly, at 3 six of 1 309 are,
# and without a limit 81 of 1 495.
FAR = 1.5
# Deviations², the mean over what the span knows. A dithered picture's nearest whole patches have
# 466 000 and more. The truth has up to 2 231 in the hardest settings, so that right patches can be
# refused there; of those that the other conditions let pass none was.
MISFIT = 100.0
# Of the next one's squared distance. Near a guess none of 1 112 was wrong, at 0.75 one of 1 132.
# Where 12 pixels a patch leave many whole patches as probable, 29 of 1 024 were, and at 0.25 none.
RATIO = 0.5
RATIO_ALONE = RATIO / 2  # without a search: 5 of 270 were wrong, at 0.5 nine of 307
ROUNDING = 30  # ε: rounding leaves up to 14 of a replay, one wrong level 75 at 224×224
# Evaluations before the first rounding, for each image, and between two: budgets, not measured.
_FIRST, _ROUND = 150, 60
_LEAST_SECONDS = 0.1  # that a search is given, so that it sees at least one picture: not measured
# A search is stuck that settles less than one of 20 open patches and does not halve its loss, which
# is what match_gradients' patience asks for: not measured.
_HARDLY_ANY, _HARDLY_NEARER = 20, 2


# --- What the attack has so far -------------------------------------------------------------------


@dataclass(frozen=True)
class Deadline:
    """A moment by which to be done, or none.

    Attributes
    ----------
    end : float
        The moment on the clock of ``time.perf_counter()``, in seconds; infinite for none.
    """

    end: float = math.inf

    @classmethod
    def after(cls, seconds: float | None, start: float | None = None) -> Deadline:
        """So many seconds after a start, by default now; None for no limit.

        >>> Deadline.after(None).passed
        False
        >>> Deadline.after(0).passed
        True
        """
        start = time.perf_counter() if start is None else start
        return cls(math.inf if seconds is None else start + seconds)

    @property
    def seconds_left(self) -> float:
        """0 once it has passed, infinite where there is no limit."""
        return max(self.end - time.perf_counter(), 0.0)

    @property
    def passed(self) -> bool:
        return time.perf_counter() >= self.end


@dataclass
class Rounds:
    """What is settled, the best guess at the rest, and how the rounds went.

    Attributes
    ----------
    grid : Grid
    settled : Tensor (B, n) of bool
    patches : Tensor (B, n, p), in levels
        Whole where settled, elsewhere the best guess.
    generator : torch.Generator, of all that is drawn
    labels : Tensor (B,) or None where they are not known yet
    labels_from : str, where they come from
    stuck : bool
        The last search settled hardly any patch and came hardly nearer.
    trials : int
        Gradients spent on whole-level patches.
    best_loss, last_loss : float
        Of the searches since a patch was doubted or a whole one put in; of the last search.
    history : list of dict, an entry for each evaluation of all searches
    doubted : list of (pictures, which of their patches were kept)
    lattices : dict
        Of :meth:`Grid.near`, by distance; each is reduced when it is first needed.
    """

    grid: Grid
    settled: Tensor
    patches: Tensor
    generator: torch.Generator
    labels: Tensor | None
    labels_from: str
    stuck: bool = False
    trials: int = 0
    best_loss: float = math.inf
    last_loss: float = math.inf
    history: list[dict[str, Any]] = field(default_factory=list)
    doubted: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    lattices: dict[float, ReducedLattice] = field(default_factory=dict)

    @classmethod
    def of(cls, grid: Grid, batch_size: int, seed: int, labels: Tensor | None, labels_from: str) -> Rounds:
        """Nothing settled, every image the span's."""
        patches = grid.centres.T.expand(batch_size, -1, -1).clone()
        return cls(
            grid=grid,
            settled=torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device),
            patches=patches,
            generator=torch.Generator().manual_seed(seed),
            labels=labels,
            labels_from=labels_from,
        )

    @property
    def batch_size(self) -> int:
        return len(self.settled)

    @property
    def unsettled(self) -> int:
        """How many patches are not settled."""
        return int((~self.settled).sum())

    def near(self, distance: float) -> ReducedLattice:
        """:meth:`Grid.near`, reduced once."""
        if distance not in self.lattices:
            self.lattices[distance] = self.grid.near(distance)
        return self.lattices[distance]


def settle(
    rounds: Rounds,
    lattice: ReducedLattice,
    centres: Tensor,
    *,
    ratio: float = RATIO,
    guesses: Tensor | None = None,
    far: float = math.inf,
) -> int:
    """Round the patches that are not settled, and settle those that come out clear.

    Parameters
    ----------
    rounds : Rounds
    lattice : ReducedLattice
    centres : Tensor (p, B·n), in levels
        What to round.
    ratio : float
        The nearest whole patch must be at no more than this of the next one's squared distance.
    guesses : Tensor (p, B·n), optional
        Patches from which the result may be no further than ``far`` (r.m.s., levels).

    Returns
    -------
    int
        How many were settled.
    """
    grid, places = rounds.grid, (~rounds.settled.flatten()).nonzero().flatten()  # (m,) of B·n
    points, distances = lattice.nearest(centres[:, places])  # (m, 2, p), (m, 2)
    best = points[:, 0]
    # Clear is what explains the patch far better than the next whole levels do, …
    clear = distances[:, 0] < ratio * distances[:, 1]
    # … is not far from where the search was, …
    if guesses is not None:
        clear &= (best - guesses.T[places]).square().mean(1) < far**2
    # … agrees with what the span knows, …
    clear &= grid.misfit(best.T, places % grid.centres.shape[1]) < MISFIT
    # … and consists of levels that there are.
    clear &= ((best >= 0) & (best < grid.levels)).all(1)
    rounds.patches.flatten(0, 1)[places[clear]] = best[clear]
    rounds.settled.view(-1)[places[clear]] = True
    return int(clear.sum())


# --- 1. Verify ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """The client's part, played by the server: the gradient of other pictures."""

    client: nn.Module
    update: ClientUpdate
    grid: Grid
    patch_weight: str
    loss: Loss

    @property
    def eps(self) -> float:
        """Of the update's precision."""
        return torch.finfo(self.update.dtype).eps

    @property
    def rounding(self) -> float:
        """What rounding alone may leave of :meth:`residual`."""
        return ROUNDING * self.eps

    def gradients(self, patches: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What the client would share, had it these patches (B, n, p), in levels, and labels."""
        return replay(self.client, self.grid.images(patches), labels, loss=self.loss)

    def residual(self, patches: Tensor, labels: Tensor | None) -> float | None:
        """‖g' − g‖ / ‖g‖ of all gradients, or of the worst pixel's, whichever is larger.

        A pixel of the patches, such as the first one's green, has a column of the patch embedding's
        gradient to itself. One wrong level in one patch shows there, and is lost in the whole
        gradient. A column is compared with the columns' r.m.s., for its own may be zero.
        None where the labels are not known.
        """
        if labels is None:
            return None
        mine, shared = self.gradients(patches, labels), self.update.gradients.get(self.patch_weight)
        if shared is None:
            return residual_of(mine, self.update)
        columns = shared.to(self.grid.centres).flatten(1)  # (d, p)
        off = (mine[self.patch_weight].to(columns).flatten(1) - columns).square().sum(0)  # (p,)
        worst = float((off.max() / columns.square().sum(0).mean().clamp_min(1e-300)).sqrt())
        return max(residual_of(mine, self.update), worst)

    def mismatch(self, labels: Tensor) -> Callable[[Tensor], float]:
        """The distance that gradient matching minimizes, as a function of patches (B, n, p)."""

        def distance(patches: Tensor) -> float:
            mine = self.gradients(patches, labels)
            targets = [self.update.gradients[name].to(gradient) for name, gradient in mine.items()]
            return float(relative_l2(list(mine.values()), targets, eps=self.eps))

        return distance


def verify(rounds: Rounds, replay: Replay) -> bool:
    """Whether there is nothing more to find out about pictures whose patches are all settled.

    Their gradient is the client's; or the labels are not known, and it cannot be computed; or it is
    not, and doubting has brought back the same pictures, so that noise was added to the gradient.
    """
    residual = replay.residual(rounds.patches, rounds.labels)
    return residual is None or residual <= replay.rounding or same_pictures_came_back(rounds)


def same_pictures_came_back(rounds: Rounds) -> bool:
    """Whether they did after each of their halves had been doubted: doubting them is in vain."""
    return sum(torch.equal(rounds.patches, before) for before, _ in rounds.doubted) >= 2


# --- 2. Doubt -------------------------------------------------------------------------------------


def doubt_half(rounds: Rounds) -> None:
    """Doubt a random half of what is settled, and the other half if the same pictures came back."""
    if rounds.doubted and torch.equal(rounds.patches, rounds.doubted[-1][0]):
        kept = ~rounds.doubted[-1][1]
    else:
        kept = torch.rand(rounds.settled.shape, generator=rounds.generator).to(rounds.patches) < 0.5
    rounds.doubted.append((rounds.patches.clone(), kept))
    rounds.settled &= kept
    rounds.stuck, rounds.best_loss = True, math.inf


# --- 4. Search ------------------------------------------------------------------------------------


def search(
    rounds: Rounds,
    match: Callable[..., Reconstruction],
    coordinates: Coordinates,
    *,
    max_evaluations: int,
    deadline: Deadline,
) -> Reconstruction:
    """Match gradients in the open directions of the patches that are not settled.

    Parameters
    ----------
    rounds : Rounds
    match : :func:`~aprillab.match_gradients` with all that stays the same in every round
    coordinates : Coordinates, of the span's patches
    max_evaluations : int, what is left of them
    deadline : Deadline
    """
    planned = _ROUND if rounds.history else _FIRST * rounds.batch_size
    seconds = None if deadline.end == math.inf else max(deadline.seconds_left, _LEAST_SECONDS)
    result = match(
        labels=rounds.labels,
        coordinates=_open_patches(rounds, coordinates),
        start=rounds.grid.images(_initial_guess(rounds, coordinates)),
        max_evaluations=min(planned, max_evaluations),
        max_seconds=seconds,
    )
    if rounds.labels is None:
        rounds.labels, rounds.labels_from = result.labels, result.diagnostics["labels"]
    return result


def _open_patches(rounds: Rounds, coordinates: Coordinates) -> Coordinates:
    """Coordinates in which settled patches stay as they are."""
    settled = rounds.grid.tiling.patches(rounds.grid.images(rounds.patches))
    origin = torch.where(rounds.settled[..., None], settled, coordinates.origin)
    return replace(coordinates, origin=origin, free=(~rounds.settled).to(origin))


def _initial_guess(rounds: Rounds, coordinates: Coordinates) -> Tensor:
    """Patches (B, n, p) to start a round from."""
    if rounds.batch_size > 1 and not rounds.history:  # the span gives all images the same picture
        shape = (*rounds.settled.shape, len(coordinates.basis))
        z = torch.randn(shape, generator=rounds.generator, dtype=torch.float64).to(rounds.patches)
        return rounds.grid.patches(coordinates.images_of(z))
    if rounds.batch_size > 1 or not rounds.stuck:
        return rounds.patches
    # A random half of what is not settled begins anew, smooth; the other half stays.
    half = torch.rand(rounds.settled.shape, generator=rounds.generator).to(rounds.patches) < 0.5
    anew = rounds.grid.smoothest(rounds.patches[0], ~rounds.settled[0])[None]
    return torch.where((~rounds.settled & half)[..., None], anew, rounds.patches)


def counting_callback(
    rounds: Rounds, callback: Callable[[dict[str, Any], Tensor], None] | None, start: float
) -> Callable[[dict[str, Any], Tensor], None]:
    """A callback that counts evaluations and seconds over all rounds, and tells the caller's."""

    def count(entry: dict[str, Any], images: Tensor) -> None:
        entry["evaluation"] = len(rounds.history) + 1
        entry["seconds"] = time.perf_counter() - start
        entry["settled"] = int(rounds.settled.sum())
        rounds.history.append(entry)
        if callback is not None:
            callback(entry, images)

    return count


# --- 5. Round -------------------------------------------------------------------------------------


def round_result(rounds: Rounds, result: Reconstruction, deadline: Deadline) -> None:
    """Take over what the search found, and round it while there is time.

    The search may be off by any distance, so patches are rounded near it at one distance after the
    other. Where nothing settles and the loss is worse than before, the guess of before stays.
    """
    before, guess, loss = rounds.unsettled, rounds.patches, result.diagnostics["loss"]
    found = torch.where(rounds.settled[..., None], rounds.patches, rounds.grid.patches(result.images))
    rounds.patches = found
    guesses, taken = found.flatten(0, 1).T, 0  # (p, B·n)
    for distance in NEAR:
        if rounds.unsettled and not deadline.passed:
            centres = rounds.grid.near_centres(distance, guesses)
            taken += settle(rounds, rounds.near(distance), centres, guesses=guesses, far=FAR * distance)
    if not taken and loss > rounds.best_loss:
        rounds.patches = guess
    else:
        rounds.best_loss = loss
    rounds.stuck = taken < max(1, before // _HARDLY_ANY) and loss > rounds.last_loss / _HARDLY_NEARER
    rounds.last_loss = loss
