"""The page's figure: decibels over L, the race, and one picture out of a batch and out of
a hundred clients.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

import aprillab as al
from aprillab import viz

from .._rows import read as rows_of
from . import looks
from .clients import read, update_of
from .pictures import fished, sum_of
from .records import CLIENTS, FILE, SUM, Case, Row

NAME = "cheating.png"
_A_NAT = 20 * math.log10(math.e)  # dB
#: Model, setting and title of each panel; colour and marker of each batch.
PANELS = (
    ("random", "distinct", "32×32, random weights"), ("digits", "repeated", "trained on digits"),
    ("vit_b_16", "distinct", "ViT-B/16 at 224, random"),
)  # fmt: skip
BATCHES = {8: ("blue", "o"), 32: ("orange", "s"), 64: ("green", "^")}
CHANGES = {"bias": ("black", "o", "as trained"), "scaled by 3, bias": ("sky", "s", "× 3"),
           "scaled by 10, bias": ("red", "D", "× 10")}  # fmt: skip
_LIMIT = 10  # of isolation
_TOP, _CLEAR = 165.0, 10.0  # dB
_VICTIM, _BATCH, _STRENGTHS = 3, 32, (2.0, 5.0, 10.0, 20.0)


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    rows, seen = rows_of(folder / FILE, Row), rows_of(folder / looks.FILE, looks.Row)
    shown = list(strip(clients=3 if options.quick else CLIENTS))
    return {NAME: viz.to_png(figure(rows, seen, shown), dpi=130)}


def figure(rows: pd.DataFrame, seen: pd.DataFrame, shown: list[Shown]) -> Figure:
    with plt.rc_context(viz.STYLE):  # type: ignore[arg-type]
        fig = Figure(figsize=(12.5, 6.9), layout="constrained")
        above, below = fig.subfigures(2, 1, height_ratios=(4.4, 2.3))
        *panels, race = above.subplots(1, len(PANELS) + 1, width_ratios=(1, 1, 1, 1.15))
        for ax, (model, setting, title) in zip(panels, PANELS, strict=True):
            over_strength(ax, rows[rows.model == model], setting)
            ax.set(title=title, xlabel="L in nats", ylim=(0, _TOP), xlim=(0, 42), xticks=(2, 5, 10, 15, 20, 40))
        panels[0].set_ylabel("PSNR of the wanted picture in dB")
        the_race(race, seen[seen.kind == "race"])
        above.legend(handles=_handles(), loc="outside lower center", ncols=6, fontsize=9.5)
        for ax, one in zip(below.subplots(1, len(shown)), shown, strict=True):
            viz.draw(ax, one.pixels, one.words)
            ax.title.set_fontsize(10)
    return fig


def over_strength(ax: Axes, rows: pd.DataFrame, setting: str) -> None:
    """Medians, least and most of the victims; what a picture has that is alone; and the slope of
    e^−L, through the last median of a small batch that is clearly below it.
    """
    fished_ones = rows[(rows.part == "class") & (rows.setting == setting)]
    for batch, (colour, marker) in BATCHES.items():
        psnr = fished_ones[fished_ones.batch == batch].groupby("strength").psnr
        if not len(psnr):
            continue
        middle = psnr.median()
        ax.fill_between(middle.index, psnr.min(), psnr.max(), color=viz.COLOURS[colour], alpha=0.12, linewidth=0)
        ax.plot(middle.index, middle, color=viz.COLOURS[colour], marker=marker, markersize=5.5)
    if not len(alone := rows[rows.part == "alone"].psnr):
        return
    ax.axhline(alone.median(), color="0.25", linestyle=":", linewidth=1.5)
    smallest = fished_ones[fished_ones.batch == min(BATCHES)].groupby("strength").psnr.median()
    if len(below := smallest[smallest < alone.median() - _CLEAR]):
        at, psnr = float(below.index[-1]), float(below.iloc[-1])
        ends = (max(0.0, at - psnr / _A_NAT), at + (_TOP - psnr) / _A_NAT)
        ax.plot(ends, [psnr + _A_NAT * (x - at) for x in ends], color="0.45", linestyle="--", linewidth=1.2, zorder=0)


def the_race(ax: Axes, race: pd.DataFrame) -> None:
    """The best picture of a batch beside the score of the look at it; hollow where the
    weights give it away.
    """
    for change, (colour, marker, _) in CHANGES.items():
        rows = race[race.change == change]
        for by_weights, of in rows.groupby(rows.by_weights.eq(True)):
            face = "none" if by_weights else viz.COLOURS[colour]
            ax.scatter(of.isolation, of.psnr, s=22, marker=marker, facecolors=face, edgecolors=viz.COLOURS[colour])
    ax.axvline(_LIMIT, color="0.25", linestyle=":", linewidth=1.5)
    ax.set(xscale="log", ylim=(0, _TOP), title="The race: a head that looks trained")
    ax.set(xlabel="isolation, the score of the client's look", ylabel="best picture in dB")
    ax.annotate("limit", (_LIMIT, 1), xycoords=("data", "axes fraction"), xytext=(4, -10), textcoords="offset points")
    handles = [
        Line2D([], [], color=viz.COLOURS[colour], marker=marker, linestyle="", markersize=5, label=words)
        for colour, marker, words in CHANGES.values()
    ]
    handles.append(Line2D([], [], color="0.4", marker="o", linestyle="", markersize=5, fillstyle="none"))
    handles[-1].set_label("the weights show it")
    ax.legend(handles=handles, loc="lower right", fontsize=9, handletextpad=0.1, borderaxespad=0)


def _handles() -> list[Line2D]:
    handles = [
        Line2D([], [], color=viz.COLOURS[colour], marker=marker, markersize=5.5, label=f"batch of {batch}")
        for batch, (colour, marker) in BATCHES.items()
    ]
    dashed = Line2D([], [], color="0.45", linestyle="--", label=f"slope of e⁻ᴸ: {_A_NAT:.1f} dB a nat")
    return [*handles, dashed, Line2D([], [], color="0.25", linestyle=":", label="alone, the ceiling of float32")]


# --- Pictures -----------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """Pixels in [0, 1], and what stands above them."""

    pixels: Tensor
    words: str


def strip(clients: int = CLIENTS) -> Iterator[Shown]:
    """The wanted picture, its batch's mean, what comes of the batch at each L, and of
    a sum over clients.
    """
    case = Case("class", "random", "distinct", _STRENGTHS[-1], _BATCH, _VICTIM)
    _, images, _ = fished(case, _BATCH)
    pixels = al.HALF.to_pixels(images)
    truth = pixels[_VICTIM]
    yield Shown(truth, "the wanted picture")
    yield _beside(truth, pixels.mean(0), f"mean of {_BATCH}")
    for strength in _STRENGTHS:
        sent, images, labels = fished(case._replace(strength=strength), _BATCH)
        found = read(sent, update_of(sent, images, labels), preprocessing=al.HALF)
        yield _beside(truth, found.pixels[0], f"of {_BATCH}, L = {strength:g}")
    sent, update, wanted = sum_of(case._replace(part="sum", setting=SUM), clients)
    truth = al.HALF.to_pixels(wanted[None])[0]
    found = read(sent, update, preprocessing=al.HALF)
    yield _beside(truth, found.pixels[0], f"of {clients} clients, L = {_STRENGTHS[-1]:g}")


def _beside(truth: Tensor, found: Tensor, words: str) -> Shown:
    return Shown(found, f"{words}\n{float(al.psnr(found.double(), truth.double())):.0f} dB")
