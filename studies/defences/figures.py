"""The chapter's figure: accuracy against what attackers reach."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import aprillab as al
from aprillab import viz

from .._rows import read
from . import accuracy
from .bounds import MATCHING_FILE, Matching
from .clients import BATCH, BFLOAT16, BITS, NOISE, NONE, PRUNING, SIGN
from .pictures import pictures_figure
from .tables import grid_rows, most_seen, named, of
from .victims import DIGITS, GALLERY

ACCURACY_FILE = "defences_accuracy.csv"
DP = "DP-SGD"
#: Colour, marker and words of each defence of the accuracy study, and its name in the grid.
LOOKS = {
    "none": ("black", "*", "none"),
    DP: ("blue", "o", "DP-SGD, ε of the training"),
    "noise": ("sky", "s", "noise on each update"),
    "prune": ("orange", "v", "pruning"),
    "quantize": ("green", "D", "few bits"),
    "sign": ("red", "P", "signs"),
    "bfloat16": ("purple", "X", "bfloat16"),
    "batch": ("yellow", "^", "batches"),
}
_GRID = {
    "none": NONE, "noise": NOISE, "prune": PRUNING, "quantize": BITS, "sign": SIGN, "bfloat16": BFLOAT16,
    "batch": BATCH,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A defence in the figure: shares in %, decibels; ``promised`` is the theorem's for
    the whole training.
    """

    defence: str
    strength: float
    accuracy: float
    median: float
    most: float
    named: float
    promised: float | None
    words: str


def points(rows: pd.DataFrame, costs: pd.DataFrame, matching: pd.DataFrame) -> Iterator[Point]:
    """A point for each defence and strength that both studies have; of the digits, at both moments."""
    rows, matching = of(rows, world=DIGITS), of(matching, world=DIGITS)
    for (defence, strength), runs in costs.groupby(["defence", "strength"], sort=False, dropna=False):
        share = 100 * float(runs.accuracy.mean())
        if defence == DP:
            yield _private(strength, share, runs.iloc[0], rows, matching)
            continue
        here = _cell_rows(rows, defence, strength)
        if len(here):
            rate = 100 * named(here, "rank_gradients")
            words = _words(defence, strength)
            yield Point(defence, strength, share, here.shown.median(), most_seen(here), rate, None, words)


def _cell_rows(rows: pd.DataFrame, defence: str, strength: float) -> pd.DataFrame:
    """The grid's rows of a cell of the accuracy study."""
    here = of(rows, defence=_GRID[defence])
    wanted = 100 * (1 - strength) if defence == "prune" else 0.0 if defence == "none" else strength
    return here[np.isclose(here.strength, wanted, rtol=1e-6, atol=1e-12)]


def _private(epsilon: float, share: float, run: pd.Series, rows: pd.DataFrame, matching: pd.DataFrame) -> Point:
    """DP-SGD before the attacker whom ε is promised against: it knows all other
    pictures of the step.

    Between the grid's σ straight lines are drawn, over their logarithms; the share named is
    the simulated one.
    """
    sigma = float(run.noise_multiplier)
    words = "ε = ∞" if math.isinf(epsilon) else f"ε = {epsilon:g}"
    if not sigma > 0:
        here = of(rows, defence=NONE)
        return Point(DP, epsilon, share, here.shown.median(), here.shown.max(), 100.0, None, words)
    cells = of(rows, defence=NOISE).groupby("strength")
    found = {
        "median": cells.shown.median(), "most": cells.shown.max(),
        "named": 100 * matching.groupby("sigma").rate.mean(),
    }  # fmt: skip
    at = {name: float(np.interp(math.log(sigma), np.log(each.index), each)) for name, each in found.items()}
    rate = float(run.batch) / _TRAINED_ON
    promised = 100 * al.privacy.success_bound(
        1 / GALLERY, sigma, rounds=round(float(run.epochs) / rate), sample_rate=rate
    )
    return Point(DP, epsilon, share, at["median"], at["most"], at["named"], promised, words)


_TRAINED_ON = 4000  # digits of MNIST-5k


def _words(defence: str, strength: float) -> str:
    words = {"noise": "σ = {:g}", "prune": "{:.3g} % kept", "quantize": "{:g} bits", "batch": "{:g} pictures"}
    return words.get(defence, "").format(100 * strength if defence == "prune" else strength)


# --- The figure ---------------------------------------------------------------------------------------------------

_TOP = 60.0  # dB, above which everything is drawn at one place
_TURNS = (0, 1, 11, 2, 10, 6, 5, 7, 3, 9, 4, 8)  # twelfths of a circle, the most readable first
_TICKS = (20, 40, 60, 70, 80, 85, 90, 92, 94, 96, 98)


def accuracy_figure(found: list[Point], blind: float) -> Figure:
    """Accuracy over the decibels, and over the share named. Errors are logarithmic."""
    fig, axes = viz.figure(1, 2, size=(11.0, 6.0))
    left, right = axes[0]
    errors = [100 - point.accuracy for point in found]
    for ax in (left, right):
        ax.set(yscale="log", ylim=(max(errors) * 1.25, min(errors) / 1.35))
        ticks = [tick for tick in _TICKS if min(errors) / 1.35 < 100 - tick < max(errors) * 1.25]
        ax.set_yticks([100 - tick for tick in ticks], [f"{tick} %" for tick in ticks])
        ax.minorticks_off()
    left.set(xlabel="PSNR of the reconstruction in dB: median, line to the greatest", xlim=(2, _TOP + 3))
    left.set_xticks(range(10, 61, 10), ["10", "20", "30", "40", "50", "60\nand more"])
    left.set(ylabel="test accuracy", title="Can it be seen?")
    left.axvline(blind, color="0.5", linestyle=":", linewidth=1)
    left.annotate("blind guess", (blind, 0.01), xycoords=("data", "axes fraction"), xytext=(4, 0),
                  textcoords="offset points", fontsize=8, color="0.35")  # fmt: skip
    right.set(xlabel="named among a hundred by its gradient in one step, in %", xlim=(-14, 116))
    right.set_title("Can it be named?")
    for point in found:
        _draw(left, right, point)
    _place(left, [(point, min(point.median, _TOP), min(point.most, _TOP)) for point in found])
    _place(right, [(point, point.named, point.promised or point.named) for point in found])
    fig.legend(handles=_handles(found), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return fig


def _draw(left: Axes, right: Axes, point: Point) -> None:
    look, y = _look(point.defence), 100 - point.accuracy
    colour, line = look["color"], {"linewidth": 1.2, "zorder": 1}
    left.plot([min(point.median, _TOP), min(point.most, _TOP)], [y, y], color=colour, alpha=0.7, **line)
    left.plot(min(point.median, _TOP), y, **look)
    right.plot(point.named, y, **look)
    if point.promised is not None:
        right.plot([point.named, point.promised], [y, y], color=colour, linestyle=":", **line)
        right.plot(point.promised, y, **look | {"fillstyle": "none", "markeredgecolor": colour})


def _look(defence: str) -> dict[str, Any]:
    colour, marker, _ = LOOKS[defence]
    size = {"*": 13, "P": 8, "X": 8}.get(marker, 7)
    return {
        "color": viz.COLOURS[colour], "marker": marker, "markersize": size, "linestyle": "",
        "markeredgecolor": "0.25", "markeredgewidth": 0.6,
    }  # fmt: skip


def _place(ax: Axes, marks: Sequence[tuple[Point, float, float]]) -> None:
    """Write each point's words beside it and within the axes, where no other words,
    point or line lie.

    A mark is a point, where it lies, and where its line ends.
    """
    ax.figure.draw_without_rendering()
    scale = ax.figure.dpi / 72
    spots = [[ax.transData.transform((x, 100 - point.accuracy)) / scale for x in ends] for point, *ends in marks]
    taken = [(x - 5, y - 5, x + 5, y + 5) for ends in spots for x, y in ends[:1]]
    taken += [(min(x, end) - 1, y - 1, max(x, end) + 1, y + 1) for (x, y), (end, _) in spots]
    (left, bottom), (right, top) = ax.bbox.get_points() / scale
    for ((x, y), _), (point, at, _) in zip(spots, marks, strict=True):
        if not point.words:
            continue
        wide, high = 4.7 * len(point.words) + 2, 9.0
        for far, turn in itertools.product((9, 13, 18, 24, 32, 42, 55), _TURNS):
            dx, dy = far * math.cos(math.pi * turn / 6), far * math.sin(math.pi * turn / 6)
            low = x + dx - (wide if dx < -3 else 0 if dx > 3 else wide / 2), y + dy - high / 2
            box = (*low, low[0] + wide, low[1] + high)
            within = left < box[0] and box[2] < right + 10 and bottom < box[1] and box[3] < top
            if within and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        ax.annotate(
            point.words, (at, 100 - point.accuracy), xytext=(low[0] - x, low[1] - y + 1.5), fontsize=8, color="0.1",
            textcoords="offset points", fontweight="bold" if point.defence == DP else "normal",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "0.6"} if far > 13 else None,
        )  # fmt: skip


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _handles(found: list[Point]) -> list[Line2D]:
    used = dict.fromkeys(point.defence for point in found)
    handles = [Line2D([], [], label=LOOKS[defence][2], **_look(defence)) for defence in used]
    if any(point.promised is not None for point in found):
        hollow = _look(DP) | {"fillstyle": "none", "markeredgecolor": viz.COLOURS["blue"]}
        handles.append(Line2D([], [], label="no attacker above, all rounds", **hollow))
    return handles


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    """Both figures; the first if there is the accuracy study's file."""
    figures = {"defences_pictures.png": viz.to_png(pictures_figure(options), dpi=120)}
    if (folder / ACCURACY_FILE).is_file():
        rows = grid_rows(folder)
        costs, matching = read(folder / ACCURACY_FILE, accuracy.Row), read(folder / MATCHING_FILE, Matching)
        found = list(points(rows, costs, matching))
        blind = float(of(rows, world=DIGITS).blind.median())
        figures["defences.png"] = viz.to_png(accuracy_figure(found, blind), dpi=150)
    return figures
