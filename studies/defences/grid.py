"""The grid: every defence at every strength, in every world, eight victims each."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

import aprillab as al

from .._rows import fill
from .attackers import NothingFound, attacked
from .clients import SIGN, Cell, Shared, cells, seed_of, shared_by
from .names import by_features, by_gradients, by_picture
from .victims import DIGITS, EPOCHS, GALLERY, LARGE, PHOTOGRAPHS, TRAINED, UNTRAINED, Scene, World, scene

FILE = "defences_grid.csv"
SMALL_WORLDS = (
    World(DIGITS, UNTRAINED, 0), World(DIGITS, TRAINED, 0), World(PHOTOGRAPHS, UNTRAINED, 0),
    World(DIGITS, UNTRAINED, 1), World(DIGITS, TRAINED, 1), World(PHOTOGRAPHS, UNTRAINED, 1),
)  # fmt: skip
LARGE_WORLDS = (World(LARGE, UNTRAINED, 0),)
QUICK_WORLDS = SMALL_WORLDS[:3]


class Case(NamedTuple):
    """One cell of one world: all its victims."""

    world: str
    when: str
    seed: int
    defence: str
    strength: float


@dataclass(frozen=True)
class Row:
    """One victim's update, attacked.

    ``epsilon`` is that of one round at δ = 1e-5, one picture more or less; ``norm`` the gradient's
    before anything is done to it. ``psnr``, ``ssim`` and ``predicted`` are of the picture that the
    attacker kept, by a replay that explains the share ``explained`` of the update, or as the one
    that knows. ``oracle`` is the best PSNR of all that it tried. ``nearest`` is the PSNR against
    that picture of a batch which comes nearest, ``blind`` that of the mean of the gallery's other
    pictures. The ranks are the victim's among the gallery, from 1.
    """

    world: str
    when: str
    seed: int
    defence: str
    strength: float
    victim: str
    epsilon: float | None = None
    norm: float | None = None
    attack: str = ""
    psnr: float | None = None
    ssim: float | None = None
    predicted: float | None = None
    explained: float | None = None
    oracle: float | None = None
    oracle_attack: str = ""
    nearest: float | None = None
    blind: float | None = None
    rank_picture: float | None = None
    rank_features: float | None = None
    rank_gradients: float | None = None
    seconds: float | None = None
    note: str = ""


def worlds(options: argparse.Namespace) -> tuple[World, ...]:
    if options.quick:
        return QUICK_WORLDS
    return (*SMALL_WORLDS, *(LARGE_WORLDS if options.large else ()))


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for world in worlds(options):
        yield from (Case(*world, *cell) for cell in cells(world, options.quick))


def measured(checkpoints: Path | None, gallery: int, epochs: int, victims: int, case: Case) -> Iterator[Row]:
    """The cell's rows, a victim each."""
    world, cell = World(*case[:3]), Cell(*case[3:])
    stage = scene(world, checkpoints, gallery, epochs)
    updates = [shared_by(stage, cell, k, seed_of(world, cell, k)) for k in range(min(victims, stage.victims))]
    features = stage.features().sign() if cell.defence == SIGN else stage.features()
    matched = by_gradients(stage, cell, updates) if world.world != LARGE else [math.nan] * len(updates)
    for k, (shared, rank) in enumerate(zip(updates, matched, strict=True)):
        row = Row(
            *case, victim=stage.names[k], norm=shared.norm,
            epsilon=al.privacy.epsilon(cell.multiplier) if cell.multiplier else None,
            blind=float(al.psnr(stage.blind(k).double(), stage.pixels[k].double())),
        )  # fmt: skip
        if world.world != LARGE:
            row = replace(row, rank_features=by_features(shared.update, stage, features, k), rank_gradients=rank)
        yield scored(row, stage, cell, shared, k)


def scored(row: Row, stage: Scene, cell: Cell, shared: Shared, victim: int) -> Row:
    """The row with what the attacker's picture is worth."""
    try:
        found = attacked(stage, cell, shared, stage.labels[victim : victim + 1])
    except NothingFound as reasons:
        return replace(row, note=f"refused: {reasons}")
    truth, pixels = stage.pixels[victim].double(), found.chosen.pixels
    scores = al.score(pixels, truth)
    best = max(found.every, key=lambda one: float(al.psnr(one.pixels, truth)))
    behind = torch.cat([truth[None], stage.others[: cell.images - 1].double()])
    return replace(
        row, attack=found.chosen.attack, psnr=float(scores.psnr), ssim=float(scores.ssim),
        predicted=found.chosen.predicted, explained=found.chosen.explained,
        oracle=float(al.psnr(best.pixels, truth)), oracle_attack=best.attack,
        nearest=max(float(al.psnr(pixels, one)) for one in behind), seconds=found.seconds,
        rank_picture=by_picture(pixels, stage.pixels, victim) if len(stage.pixels) >= GALLERY else None,
    )  # fmt: skip


def measure(folder: Path, options: argparse.Namespace) -> None:
    epochs, victims = (1, 2) if options.quick else (EPOCHS, 8)
    measures = functools.partial(measured, options.checkpoints, GALLERY, epochs, victims)
    settings = {"gallery": GALLERY, "epochs": epochs, "victims": victims}
    fill(
        folder / FILE, Row, cases(options), measures, key=Case._fields, settings=settings, workers=options.workers,
        together=lambda case: case[:3],
    )  # fmt: skip
