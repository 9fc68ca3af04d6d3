"""Figures of a comparison: what the attacks returned, how the searches went, what quality costs in
seconds.

All take rows of :func:`aprillab.comparison.run.run` and the path of their CSV, beside which curves
and pictures lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .. import viz
from ..metrics import EXACT_TO_8_BITS_DB
from .cases import Case
from .records import Point, Row, read_curves, read_pictures

#: Columns that tell one line of pictures from the next, where they differ at all.
_VARYING = ("model", "weights", "position", "dtype", "labels")
_COLOURS = [colour for name, colour in viz.COLOURS.items() if name != "yellow"]  # too pale for a line
_MARKERS = "osD^vPX*<>h8"


def picture_pages(rows: Sequence[Row], path: Path, *, lines: int = 8) -> list[Figure]:
    """Grids of pictures: a line for each victim and setting of the first seed, a column for each
    attack.

    The private picture comes first. Below each other one is its own PSNR in dB, in bold where exact
    to 8 bits.

    Parameters
    ----------
    rows : Row
    path : of their CSV
    lines : int, the most on a page
    """
    first = min(row.case.seed for row in rows)
    rows = [row for row in rows if row.case.seed == first]
    varying = [name for name in _VARYING if len({getattr(row.case, name) for row in rows}) > 1]
    attacks = list(dict.fromkeys(row.case.attack for row in rows))
    updates: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        updates.setdefault((row.case.update, row.case.labels), {})[row.case.attack] = row
    pictures = [
        (found, place) for found in updates.values() for place in range(next(iter(found.values())).case.batch_size)
    ]
    return [_page(pictures[i : i + lines], attacks, varying, path) for i in range(0, len(pictures), lines)]


def _page(
    pictures: Sequence[tuple[Mapping[str, Row], int]], attacks: Sequence[str], varying: Sequence[str], path: Path
) -> Figure:
    """Each line is what the attacks made of one update, by name, at one place of its batch."""
    columns = 1 + len(attacks)
    fig, axes = viz.figure(len(pictures), columns, size=(1.7 * columns + 1.2, 1.95 * len(pictures) + 0.5))
    for line, (found, place) in zip(axes, pictures, strict=True):
        kept = {attack: shown for attack, row in found.items() if (shown := read_pictures(path, row.case))}
        for ax in line:
            ax.set(xticks=[], yticks=[], aspect="equal")
            ax.spines[:].set_visible(False)
        if kept:
            viz.draw(line[0], next(iter(kept.values()))[0][place])
        for ax, attack in zip(line[1:], attacks, strict=True):
            if attack in kept:
                decibels = float(kept[attack][2][place])
                viz.draw(ax, kept[attack][1][place])
                ax.set_xlabel(f"{decibels:.1f} dB", fontweight="bold" if decibels >= EXACT_TO_8_BITS_DB else "normal")
            elif attack in found:
                why = "refused" if found[attack].psnr is None else "not kept"
                ax.text(0.5, 0.5, why, ha="center", va="center", color="0.4", transform=ax.transAxes)
        case = next(iter(found.values())).case
        words = [case.victims[place], *(str(getattr(case, name)) for name in varying)]
        words += [f"batch of {case.batch_size}"] if case.batch_size > 1 else []
        line[0].set_ylabel("\n".join(words), rotation=0, ha="right", va="center", labelpad=8)
    for ax, head in zip(axes[0], ["private", *attacks], strict=True):
        ax.set_title(head.replace(":", ":\n"), fontweight="bold", fontsize=10.5)
    return fig


def curves(rows: Sequence[Row], path: Path) -> Figure | None:
    """Loss, relative to its first value, and PSNR over the evaluations of each search; None if
    there was no search.

    A column for each position embedding, two lines of panels for each precision. Thin: single runs.
    Thick: their median, for which a run that has ended keeps its last value.
    """
    points = read_curves(path)
    runs = {
        row.case: points[key]
        for row in rows
        if (key := (row.case.update, row.case.attack, row.case.labels)) in points
    }
    if not runs:
        return None
    attacks = list(dict.fromkeys(row.case.attack for row in rows))
    positions = list(dict.fromkeys(case.position for case in runs))
    dtypes = list(dict.fromkeys(case.dtype for case in runs))
    fig, axes = viz.figure(
        2 * len(dtypes), len(positions), size=(2.9 * len(positions) + 1.2, 4.6 * len(dtypes) + 0.8)
    )
    for i, dtype in enumerate(dtypes):
        losses, decibels = axes[2 * i : 2 * i + 2]
        for j, position in enumerate(positions):
            here = {case: run for case, run in runs.items() if (case.dtype, case.position) == (dtype, position)}
            _draw_searches(losses[j], decibels[j], here, attacks)
            losses[j].set(yscale="log", title=f"{position}, {dtype}")
            decibels[j].set_xlabel("evaluations")
        losses[0].set_ylabel("loss / first loss")
        decibels[0].set_ylabel("PSNR in dB")
        _same_range(losses)
        _same_range(decibels)
    _legend(fig, attacks, {case.attack for case in runs})
    return fig


def _draw_searches(
    losses: Axes, decibels: Axes, runs: Mapping[Case, Sequence[Point]], attacks: Sequence[str]
) -> None:
    """The searches of one setting: relative loss in one panel, PSNR in the other, each attack with
    its look.
    """
    for attack in attacks:
        group = [run for case, run in runs.items() if case.attack == attack]
        look = _look(attack, attacks)
        _with_median(losses, [_relative_loss(run) for run in group], look)
        _with_median(decibels, [[(p.evaluation, p.psnr) for p in run] for run in group], look)


def seconds(rows: Sequence[Row]) -> Figure | None:
    """PSNR of each run against the attack's seconds; None if all were refused.

    A column for each position embedding, a line for each precision.
    """
    attacks = list(dict.fromkeys(row.case.attack for row in rows))
    rows = [row for row in rows if row.psnr is not None and not math.isnan(row.psnr)]
    if not rows:
        return None
    positions = list(dict.fromkeys(row.case.position for row in rows))
    dtypes = list(dict.fromkeys(row.case.dtype for row in rows))
    fig, axes = viz.figure(len(dtypes), len(positions), size=(2.9 * len(positions) + 1.2, 3.0 * len(dtypes) + 0.8))
    for i, dtype in enumerate(dtypes):
        for j, position in enumerate(positions):
            ax = axes[i, j]
            for row in rows:
                if (row.case.dtype, row.case.position) == (dtype, position):
                    colour, marker = _look(row.case.attack, attacks)
                    level = min(row.psnr or 0.0, 320.0)  # float64's own limit, for the infinite ones
                    ax.plot(
                        row.seconds, level, marker, color=colour, markersize=7, markeredgecolor="white", alpha=0.9
                    )
            ax.axhline(EXACT_TO_8_BITS_DB, color="0.5", linestyle=":", zorder=0)
            ax.set(xscale="log", title=f"{position}, {dtype}")
        axes[i, 0].set_ylabel("PSNR in dB")
        axes[i, 0].annotate(
            "exact to 8 bits", (0.03, EXACT_TO_8_BITS_DB), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", color="0.4", fontsize=9,
        )  # fmt: skip
    for ax in axes[-1]:
        ax.set_xlabel("seconds")
    everywhere = [row.seconds for row in rows]
    for ax in axes.flat:
        ax.set_xlim(min(everywhere) / 2, max(everywhere) * 2)
    _same_range(list(axes.flat), least_top=1.15 * EXACT_TO_8_BITS_DB)
    _legend(fig, attacks, {row.case.attack for row in rows})
    return fig


def _relative_loss(run: Sequence[Point]) -> list[tuple[float, float]]:
    return [(point.evaluation, point.loss / run[0].loss) for point in run]


def _with_median(ax: Axes, runs: Sequence[Sequence[tuple[float, float]]], look: tuple[str, str]) -> None:
    """Runs of (x, y), and the median of their y at every x of any of them."""
    colour, marker = look
    if not runs:
        return
    for run in runs:
        ax.plot(*zip(*run, strict=True), color=colour, linewidth=0.8, alpha=0.35 if len(runs) > 1 else 0)
    at = sorted({x for run in runs for x, _ in run})
    # np.interp keeps the last value beyond a run's end, and the first before its beginning.
    values = np.array([np.interp(at, *np.array(run).T) for run in runs])
    every = max(1, len(at) // 6)
    ax.plot(at, np.median(values, axis=0), color=colour, marker=marker, markevery=every, markersize=5, linewidth=2)


def _look(attack: str, attacks: Sequence[str]) -> tuple[str, str]:
    """Colour and marker by the place among all attacks, so that an attack has the same in every
    figure.
    """
    i = attacks.index(attack)
    return _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]


def _same_range(axes: Sequence[Axes], least_top: float = -math.inf) -> None:
    """One range of y for panels that are to be compared."""
    limits = [ax.get_ylim() for ax in axes]
    for ax in axes:
        ax.set_ylim(min(low for low, _ in limits), max(least_top, *(high for _, high in limits)))
        ax.spines[["top", "right"]].set_visible(False)


def _legend(fig: Figure, attacks: Sequence[str], drawn: set[str]) -> None:
    handles = []
    for attack in filter(drawn.__contains__, attacks):
        colour, marker = _look(attack, attacks)
        handles.append(Line2D([], [], color=colour, marker=marker, label=attack))
    fig.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
