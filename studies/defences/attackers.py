"""What an attacker makes of an update whose defence it knows, and how it chooses among its own
attempts.

It tries each system that applies, and plays the client with each picture that came out, under
the same defence: a replay. If one explains half of the update's energy or more, noise apart, it
keeps the one that explains most; otherwise no replay tells them apart, and it trusts the attack
that knows the defence. It never sees the picture. The best of all, by the picture, is kept
beside it as the oracle's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import aprillab as al

from .clients import ADAM, PLAYED, TOGETHER, WITHHELD, Cell, Shared, adam_step, defended
from .victims import Scene

PLAIN, KNOWN, TOLD, SPAN = "plain", "noise known", "errors told", "span"
_ENOUGH = 0.5  # explained by a replay that is to decide
_FAINT = 1e-2  # noise multiplier above which the span is below the noise


@dataclass(frozen=True)
class Attempt:
    """One attack's picture (C, H, W) in [0, 1], and what it expects of it."""

    attack: str
    pixels: Tensor
    predicted: float
    explained: float = math.nan  # share of the update's energy that a replay explains


@dataclass(frozen=True)
class Attacked:
    """The attempt that the attacker kept, all that it made, and the seconds."""

    chosen: Attempt
    every: tuple[Attempt, ...]
    seconds: float


class NothingFound(Exception):
    """No attack applies; the message has the reasons."""


def attacked(stage: Scene, cell: Cell, shared: Shared, label: Tensor) -> Attacked:
    """The attacker's picture; ``label`` (1,) is known to it.

    Raises
    ------
    NothingFound
        If every attack refuses.
    """
    start, found, refusals = time.perf_counter(), list[Attempt](), list[str]()
    for attack, options in _attempts(cell, shared):
        try:
            result = _run(stage, attack, shared, options)
        except (al.AttackNotApplicable, al.UpdateError, torch.linalg.LinAlgError) as refusal:
            refusals.append(f"{attack}: {refusal}")
            continue
        pixels = result.pixels[0].double().nan_to_num(0.5).clamp(0, 1)
        found.append(Attempt(attack, pixels, float(result.predicted_psnr)))
    if not found:
        raise NothingFound("; ".join(refusals))
    if cell.defence not in TOGETHER:  # the others' pictures are not known
        found = [_replayed(stage, cell, shared, label, one) for one in found]
    return Attacked(kept(found), tuple(found), time.perf_counter() - start)


def kept(found: Sequence[Attempt]) -> Attempt:
    """The attempt that the attacker keeps.

    >>> some = [Attempt(PLAIN, torch.zeros(1, 2, 2), 20.0, 0.3), Attempt(TOLD, torch.ones(1, 2, 2), 15.0)]
    >>> kept(some).attack
    'errors told'
    """
    best = max(found, key=lambda one: one.explained if one.explained == one.explained else -math.inf)
    if best.explained >= _ENOUGH:
        return best
    return next((one for one in found if one.attack in (KNOWN, TOLD)), found[0])


def _attempts(cell: Cell, shared: Shared) -> Iterator[tuple[str, dict[str, Any]]]:
    if cell.defence != WITHHELD:
        yield PLAIN, {}
        if shared.deviation:
            yield KNOWN, {"noise": shared.deviation}
        if shared.told:
            yield TOLD, shared.told
    if cell.defence not in TOGETHER and cell.multiplier <= _FAINT:
        yield SPAN, {}


def _run(stage: Scene, attack: str, shared: Shared, options: dict[str, Any]) -> al.Reconstruction:
    common: dict[str, Any] = {"anatomy": stage.anatomy, "strict": False, "verify": False}
    if attack == SPAN:
        return al.span_closed_form(stage.model, shared.update, **common)
    if attack == TOLD:
        return al.embedding_closed_form(stage.model, al.told_errors(shared.update, **options), **common)
    return al.embedding_closed_form(stage.model, shared.update, **common, **options)


def _replayed(stage: Scene, cell: Cell, shared: Shared, label: Tensor, one: Attempt) -> Attempt:
    """With the squared distance of its own update, defended as the client's was, to what was seen."""
    pixels = one.pixels[None].to(stage.pixels.dtype)
    if cell.defence == ADAM:
        again = adam_step(stage, pixels, label)
    else:
        own = al.client_update(stage.model, stage.input_of(pixels), label)
        again = defended(own, cell, None, clip=shared.clip) if cell.defence in PLAYED or shared.clip else own
    seen = shared.update.gradients
    off = sum(float((again.gradients[name].double() - seen[name].double()).square().sum()) for name in seen)
    noise = shared.deviation**2 * sum(gradient.numel() for gradient in seen.values())
    energy = al.defenses.update_norm(shared.update) ** 2 - noise if shared.clip is None else shared.clip**2
    return replace(one, explained=1 - (off - noise) / max(energy, 1e-300))
