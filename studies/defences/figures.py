"""The figures: accuracy against what attackers reach, and the pictures themselves. The latter are played again."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

import aprillab as al
from aprillab import viz

from .._rows import read
from . import accuracy
from .attackers import NothingFound, attacked
from .clients import BATCH, BFLOAT16, BITS, NOISE, NONE, PRUNING, SIGN, Cell, seed_of, shared_by
from .tables import grid_rows, named, of
from .victims import DIGITS, EPOCHS, GALLERY, PHOTOGRAPHS, TRAINED, UNTRAINED, World, scene

ACCURACY_FILE = "defences_accuracy.csv"
DP = "DP-SGD"
#: Colour, marker and words of each defence of the accuracy study, and its name in the grid.
LOOKS = {
    "none": ("black", "*", "none"),
    DP: ("blue", "o", "DP-SGD: ε of the training"),
    "noise": ("sky", "s", "noise on each update: σ"),
    "prune": ("orange", "v", "pruning: % kept"),
    "quantize": ("green", "D", "bits an entry"),
    "sign": ("red", "P", "signs"),
    "bfloat16": ("purple", "X", "bfloat16"),
    "batch": ("yellow", "^", "pictures a batch"),
}
_GRID = {
    "none": NONE, "noise": NOISE, "prune": PRUNING, "quantize": BITS, "sign": SIGN, "bfloat16": BFLOAT16,
    "batch": BATCH,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A defence in the figure: shares in %, decibels; ``promised`` is the theorem's for the whole training."""

    defence: str
    strength: float
    accuracy: float
    median: float
    most: float
    named: float
    promised: float | None
    words: str


def points(rows: pd.DataFrame, costs: pd.DataFrame) -> Iterator[Point]:
    """A point for each defence and strength that both studies have; of the digits, at both moments."""
    rows = of(rows, world=DIGITS)
    for (defence, strength), runs in costs.groupby(["defence", "strength"], sort=False, dropna=False):
        share = 100 * float(runs.accuracy.mean())
        if defence == DP:
            yield _private(strength, share, runs.iloc[0], rows)
            continue
        here = _cell_rows(rows, defence, strength)
        if len(here):
            rate = 100 * named(here, "rank_gradients")
            words = _words(defence, strength)
            yield Point(defence, strength, share, here.shown.median(), here.shown.max(), rate, None, words)


def _cell_rows(rows: pd.DataFrame, defence: str, strength: float) -> pd.DataFrame:
    """The grid's rows of a cell of the accuracy study."""
    here = of(rows, defence=_GRID[defence])
    wanted = 100 * (1 - strength) if defence == "prune" else 0.0 if defence == "none" else strength
    return here[np.isclose(here.strength, wanted, rtol=1e-6, atol=1e-12)]


def _private(epsilon: float, share: float, run: pd.Series, rows: pd.DataFrame) -> Point:
    """DP-SGD before the attacker whom ε is promised against: it knows all other pictures of the step."""
    sigma = float(run.noise_multiplier)
    words = "ε = ∞" if math.isinf(epsilon) else f"ε = {epsilon:g}"
    if not sigma > 0:
        here = of(rows, defence=NONE)
        return Point(DP, epsilon, share, here.shown.median(), here.shown.max(), 100.0, None, words)
    cells = of(rows, defence=NOISE).groupby("strength")
    found = {
        "median": cells.shown.median(), "most": cells.shown.max(),
        "named": 100 * cells.rank_gradients.agg(lambda ranks: (ranks == 1).mean()),
    }  # fmt: skip
    at = {name: float(np.interp(math.log(sigma), np.log(each.index), each)) for name, each in found.items()}
    rate = float(run.batch) / _TRAINED_ON
    promised = 100 * al.privacy.success_bound(
        1 / GALLERY, sigma, rounds=round(float(run.epochs) / rate), sample_rate=rate
    )
    return Point(DP, epsilon, share, at["median"], at["most"], at["named"], promised, words)


_TRAINED_ON = 4000  # digits of MNIST-5k


def _words(defence: str, strength: float) -> str:
    if defence in ("none", "sign", "bfloat16"):
        return ""
    if defence == "prune":
        return f"{100 * strength:g} %"
    return f"{strength:g}"


# --- Accuracy against attacks -------------------------------------------------------------------------------------


def accuracy_figure(found: list[Point], blind: float) -> Figure:
    """Accuracy over the decibels, and over the share named."""
    fig, axes = viz.figure(1, 2, size=(10.4, 5.2))
    left, right = axes[0]
    for point in found:
        look = _look(point.defence)
        left.plot([point.median, point.most], [point.accuracy] * 2, color=look["color"], linewidth=1, alpha=0.6)
        left.plot(point.median, point.accuracy, **look)
        right.plot(point.named, point.accuracy, **look)
        if point.promised is not None:
            right.plot(
                point.promised, point.accuracy, **look | {"fillstyle": "none", "markeredgecolor": look["color"]}
            )
            right.plot([point.named, point.promised], [point.accuracy] * 2, color=look["color"], linewidth=0.8,
                       linestyle=":")  # fmt: skip
        _write(left, point, point.median)
        _write(right, point, point.named)
    for x, words in ((blind, "mean digit"), (al.EXACT_TO_8_BITS_DB, "exact to 8 bits")):
        left.axvline(x, color="0.5", linestyle=":", linewidth=1)
        left.annotate(words, (x, 2), xytext=(4, 0), textcoords="offset points", fontsize=8, color="0.35")
    left.set(xlabel="PSNR of the best reconstruction in dB: median, line to the greatest", xlim=(0, 140))
    left.set(ylabel="test accuracy in %", ylim=(0, 100), title="can it be seen?")
    right.set(xlabel="named among a hundred by its gradient, % (one round)", xlim=(-4, 108), ylim=(0, 100))
    right.set(title="can it be named?")
    fig.legend(handles=_handles(found), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return fig


def _look(defence: str) -> dict[str, Any]:
    colour, marker, _ = LOOKS[defence]
    size = {"*": 13, "P": 8, "X": 8}.get(marker, 7)
    return {
        "color": viz.COLOURS[colour], "marker": marker, "markersize": size, "linestyle": "",
        "markeredgecolor": "0.25", "markeredgewidth": 0.6,
    }  # fmt: skip


def _write(ax: Axes, point: Point, x: float) -> None:
    if point.words:
        weight = "bold" if point.defence == DP else "normal"
        ax.annotate(point.words, (x, point.accuracy), xytext=(5, 4), textcoords="offset points", fontsize=8,
                    fontweight=weight)  # fmt: skip


def _handles(found: list[Point]) -> list[Line2D]:
    used = dict.fromkeys(point.defence for point in found)
    handles = [Line2D([], [], label=LOOKS[defence][2], **_look(defence)) for defence in used]
    if any(point.promised is not None for point in found):
        hollow = _look(DP) | {"fillstyle": "none", "markeredgecolor": viz.COLOURS["blue"]}
        handles.append(Line2D([], [], label="DP-SGD: no attacker above, all rounds", **hollow))
    return handles


# --- The pictures -------------------------------------------------------------------------------------------------

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


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    """Both figures; the first if there is the accuracy study's file."""
    figures = {"defences_pictures.png": viz.to_png(pictures_figure(options), dpi=120)}
    if (folder / ACCURACY_FILE).is_file():
        rows = grid_rows(folder)
        found = list(points(rows, read(folder / ACCURACY_FILE, accuracy.Row)))
        blind = float(of(rows, world=DIGITS).blind.median())
        figures["defences.png"] = viz.to_png(accuracy_figure(found, blind), dpi=150)
    return figures
