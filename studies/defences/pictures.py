"""The pictures that the attacker keeps, under one defence after another. They are played again."""

from __future__ import annotations

import argparse
import math

from matplotlib.figure import Figure
from torch import Tensor

import aprillab as al
from aprillab import viz

from .attackers import NothingFound, attacked
from .clients import BATCH, BITS, NOISE, NONE, PRUNING, SIGN, Cell, seed_of, shared_by
from .victims import DIGITS, EPOCHS, GALLERY, PHOTOGRAPHS, TRAINED, UNTRAINED, World, scene

_SHOWN = (
    Cell(NONE, 0.0), Cell(NOISE, 1e-6), Cell(NOISE, 1e-5), Cell(NOISE, 1e-4), Cell(NOISE, 1e-3), Cell(NOISE, 1e-2),
    Cell(PRUNING, 50.0), Cell(PRUNING, 90.0), Cell(PRUNING, 99.0), Cell(BITS, 8.0), Cell(BITS, 4.0), Cell(SIGN, 1.0),
    Cell(BATCH, 2.0), Cell(BATCH, 8.0),
)  # fmt: skip
_LINES = ((World(DIGITS, TRAINED, 0), 3), (World(DIGITS, UNTRAINED, 0), 3), (World(PHOTOGRAPHS, UNTRAINED, 0), 0))


def _title(cell: Cell) -> str:
    if cell.defence == NOISE:
        return f"σ = $10^{{{round(math.log10(cell.strength))}}}$"
    words = {
        NONE: "no defence", PRUNING: f"{cell.strength:g} % pruned", BITS: f"{cell.strength:g} bits", SIGN: "signs",
        BATCH: f"batch of {cell.strength:g}",
    }  # fmt: skip
    return words[cell.defence]


def pictures_figure(options: argparse.Namespace) -> Figure:
    """One victim a line, a defence a column: what the attacker keeps, with its PSNR."""
    epochs = 1 if options.quick else EPOCHS
    fig, axes = viz.figure(len(_LINES), len(_SHOWN) + 1, size=(15.0, 4.1))
    for number, (line, (world, victim)) in enumerate(zip(axes, _LINES, strict=True)):
        stage = scene(world, options.checkpoints, GALLERY, epochs)
        truth = stage.pixels[victim].double()
        viz.draw(line[0], truth.float(), "the picture")
        for ax, cell in zip(line[1:], _SHOWN, strict=True):
            shared = shared_by(stage, cell, victim, seed_of(world, cell, victim))
            try:
                found: Tensor | None = attacked(stage, cell, shared, stage.labels[victim : victim + 1]).chosen.pixels
            except NothingFound:
                found = None
            words = "" if number else f"{_title(cell)}\n"
            psnr = "none" if found is None else f"{float(al.psnr(found, truth)):.0f} dB"
            viz.draw(ax, truth.new_ones(truth.shape).float() if found is None else found.float(), words + psnr)
        for ax in line:
            ax.title.set_fontsize(9)
    return fig
