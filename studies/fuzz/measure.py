"""What every closed form, and `invert`, say of a world, and what is true."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aprillab as al
from aprillab.attacks.catalogue import CLOSED_FORMS

from .client import Shared, play
from .worlds import LOSSY, VANISHED, World, draw

PACKAGE = str(Path(al.__file__).parent)
LEAST = 58.9  # dB: below it a picture is not exact to 8 bits, 58.92 dB, give or take the prediction's last digit
UPDATE_REFUSED, REFUSED, CRASHED, NO_UPDATE = "update refused", "refused", "crashed", "no update"


@dataclass(frozen=True)
class Row:
    """What one attack made of a world; a closed form that refuses has none, `invert` always one.

    The columns are explained on the page.
    """

    seed: int
    done: str
    dtype: str
    images: int
    oracle: float | None
    attack: str
    outcome: str
    predicted: float | None = None
    psnr: float | None = None
    residual: float | None = None
    limit: float | None = None
    replay: str = ""
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of one attack; ``trace`` for people."""

    outcome: str
    predicted: float | None = None
    psnr: float | None = None
    replay: Any = None
    note: str = ""
    trace: str = ""
    conditions: tuple[str, ...] = ()


def attacked(case: tuple[int]) -> Iterator[Row]:
    """The rows of a seed's world."""
    world = draw(*case)
    try:
        shared = play(world)
    except al.UpdateError as error:
        yield _row(world, "invert", None, Outcome(NO_UPDATE, note=str(error).partition(":")[0]), 0.0)
        return
    best, vanished = oracle(world), vanishes(world, shared)
    for name in (*CLOSED_FORMS, "invert"):
        start = time.perf_counter()
        found = outcome(shared, name)
        if name == "invert" or found.outcome not in (REFUSED, UPDATE_REFUSED):
            yield _row(world, name, best, found, time.perf_counter() - start, vanished)


def faults(rows: Iterable[Row]) -> list[str]:
    """What may not be: called exact and wrong, crashed, or refused although it is determined."""
    found = []
    for row in rows:
        refused = row.attack == "invert" and row.outcome in (REFUSED, UPDATE_REFUSED)
        if row.outcome == CRASHED:
            found.append(f"{row.attack} crashed: {row.note}")
        elif row.outcome == "exact" and not (row.psnr or 0.0) >= LEAST:
            found.append(f"{row.attack} is called exact, {row.predicted:.1f} dB predicted, {row.psnr:.1f} dB true")
        elif refused and (row.oracle or 0.0) >= LEAST and not loses(row.done):
            found.append(f"refused ({row.note}), and {row.oracle:.1f} dB in float64")
    return found


def loses(done: str) -> bool:
    """Whether something happened to the update after which a refusal can be right."""
    return any(kind in LOSSY for kind in done.split(", "))


def _row(
    world: World, attack: str, best: float | None, found: Outcome, seconds: float, vanished: bool = False
) -> Row:
    replay, done = found.replay, ", ".join(filter(None, (world.kinds(), VANISHED * vanished)))
    return Row(
        seed=world.seed, done=done, dtype=world.dtype, images=1 if world.same_pictures else world.batch,
        oracle=best, attack=attack, outcome=found.outcome, predicted=found.predicted, psnr=found.psnr,
        residual=getattr(replay, "residual", None), limit=getattr(replay, "limit", None),
        replay=getattr(replay, "state", ""), seconds=seconds, note=found.note,
    )  # fmt: skip


def oracle(world: World) -> float | None:
    """The PSNR in dB of the best closed form on the same world, in float64 and with nothing done to
    the update; None if all refuse.
    """
    try:
        shared = play(world.ideal())
    except al.UpdateError:
        return None
    found = [outcome(shared, name).psnr for name in CLOSED_FORMS]
    return max((psnr for psnr in found if psnr is not None), default=None)


def vanishes(world: World, shared: Shared) -> bool:
    """Whether a gradient that closed forms read rounds to zero: all zeros in the update,
    and not in float64.
    """
    anatomy, update = al.dissect(shared.model), shared.update
    reads = {field for attack in CLOSED_FORMS.values() for field in attack.needs}
    names = {getattr(where, "name", where) for where in (getattr(anatomy, field) for field in reads)}
    zero = [name for name in names & set(update.gradients) if not update.gradients[name].any()]
    if not zero:
        return False
    try:
        ideal = play(world.ideal()).update.gradients
    except al.UpdateError:
        return False
    return any(bool(ideal[name].any()) for name in zero if name in ideal)


def outcome(shared: Shared, name: str) -> Outcome:
    """What one attack, or "invert", makes of an update."""
    function: Callable[..., al.Reconstruction] = al.invert if name == "invert" else CLOSED_FORMS[name].function
    try:
        result = function(shared.model, shared.update)
        state = "exact" if result.exact else "determined" if _determined(result) else "not shown"
        words = tuple(f"{c.name}: {getattr(c, 'state', c.holds)} ({c.text})" for c in result.conditions)
        truth = best_psnr(result, shared.pixels)
        return Outcome(state, result.predicted_psnr, truth, getattr(result, "replay", None), conditions=words)
    except al.AttackNotApplicable as refusal:
        return Outcome(REFUSED, note=reason_class(refusal.reason), trace=str(refusal))
    except (al.UpdateError, al.UnknownModelError) as refusal:
        return Outcome(UPDATE_REFUSED, note=reason_class(str(refusal)), trace=str(refusal))
    except Exception as error:  # a crash is what is looked for
        place = _place(error)
        if type(error) is ValueError and _raised_here(error):
            return Outcome(REFUSED, note=reason_class(str(error)), trace=str(error))
        words = " ".join(str(error).split())
        return Outcome(CRASHED, note=f"{type(error).__name__} in {place}: {words[:80]}", trace=traceback.format_exc())


def _determined(result: al.Reconstruction) -> bool:
    return bool(getattr(result, "determined", result.conditions_hold))


def best_psnr(result: al.Reconstruction, pixels: Tensor) -> float:
    """Of the one picture found, against whichever private picture it is nearest to; -inf for NaN."""
    found = result.pixels[0].double()
    nearest = max(float(al.psnr(found, truth)) for truth in pixels)
    return nearest if bool(torch.isfinite(found).all()) else -float("inf")


def _place(error: BaseException) -> str:
    """The last line of the package that a crash went through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "no file of aprillab"


def _raised_here(error: BaseException) -> bool:
    """Whether the package itself raised it, and not something that it called."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)


REASONS = {
    "not shared": ("gradient is shared", "is not shared", "is not in the update"),
    "no such part": ("has no", "without a position embedding"),
    "zero gradient": ("is zero", "are zero"),
    "too narrow": ("needs n", "equations for", "n ≤ d", "> "),
    "first block": ("first attention",),
    "weights sent": ("are weights", "these are weights"),
    "Adam": ("Adam",),
    "not finite": ("NaN",),
}


def reason_class(text: str) -> str:
    """The kinds of reason in a refusal, joined by commas."""
    found = [kind for kind, words in REASONS.items() if any(word in text for word in words)]
    return ", ".join(found) or "other"
