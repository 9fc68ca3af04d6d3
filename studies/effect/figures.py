"""The figures of the study."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import aprillab as al
from aprillab import viz
from aprillab.comparison.records import read_pictures

from .measure import DTYPES, MODELS, POSITIONS, TWINS, Study, study_of
from .page import COMPARED, NAMES, chosen, rows_of, scores, twins

COLOURS = dict(zip(COMPARED, ("blue", "orange", "green", "purple", "red", "black"), strict=True))
MARKERS = {"float64": "o", "float32": "v"}
TOP = 400.0  # dB, above float64's own limit, with room for words


def effect_figure(rows: pd.DataFrame, study: Study) -> Figure:
    """PSNR over the moment in training: embeddings in columns, architectures in lines."""
    fig, axes = viz.figure(len(MODELS), len(POSITIONS), size=(7.9, 6.2))
    for line, (model, letter) in zip(axes, MODELS.items(), strict=True):
        for ax, position in zip(line, POSITIONS, strict=True):
            _panel(ax, chosen(rows, model=model, position=position), study)
        line[0].set_ylabel(f"architecture {letter}\nPSNR in dB")
        for ax in line[1:]:
            ax.set_yticklabels([])
    for ax, position in zip(axes[0], POSITIONS, strict=True):
        ax.set_title(NAMES.get(position, position), fontweight="bold", fontsize=10)
    axes[0, 0].annotate("exact to 8 bits", (-0.45, al.EXACT_TO_8_BITS_DB + 5), color="0.35", fontsize=9)
    look: dict[str, Any] = {"linestyle": "", "markersize": 8}
    dots = [Line2D([], [], marker="s", color=viz.COLOURS[colour], label=attack, **look)
            for attack, colour in COLOURS.items()]  # fmt: skip
    shapes = [Line2D([], [], marker=marker, color="0.4", label=dtype, **look) for dtype, marker in MARKERS.items()]
    fig.legend(
        handles=dots + shapes, loc="outside lower center", ncols=5, columnspacing=0.9, handletextpad=0.1,
        frameon=False,
    )  # fmt: skip
    return fig


def _panel(ax: Axes, rows: pd.DataFrame, study: Study) -> None:
    """One architecture and embedding; attacks that do not apply are named."""
    step = 0.07  # between the columns of an attack's two precisions
    for x, when in enumerate(study.moments):
        for i, attack in enumerate(COMPARED):
            for j, dtype in enumerate(DTYPES):
                found = scores(chosen(rows, when=when, attack=attack, dtype=dtype)).clip(0, 320)
                place = x + step * (2 * i + j - len(COMPARED) + 0.5) + (0.02 if j == 0 else -0.02)
                colour = viz.COLOURS[COLOURS[attack]]
                ax.scatter([place] * len(found), found, s=7, alpha=0.3, color=colour, linewidths=0)
                if len(found):
                    look: dict[str, Any] = {"marker": MARKERS[dtype], "s": 46, "edgecolors": "white"}
                    ax.scatter([place], [found.median()], color=colour, linewidths=0.8, **look)
    ax.axhline(al.EXACT_TO_8_BITS_DB, color="0.6", linestyle=":", linewidth=1, zorder=0)
    for x in range(1, len(study.moments)):
        ax.axvline(x - 0.5, color="0.93", linewidth=1, zorder=0)
    ax.set(xlim=(-0.5, len(study.moments) - 0.5), ylim=(0, TOP), yticks=range(0, 301, 100))
    ax.set(xticks=range(len(study.moments)), xticklabels=study.moments)
    tried = rows.groupby("attack").refused.all()
    if refused := [attack for attack in COMPARED if tried.get(attack, False)]:
        ax.text(
            0.97, 1.0, "do not apply:\n" + "\n".join(refused), transform=ax.transAxes, ha="right", va="top",
            fontsize=9, color="0.35",
        )  # fmt: skip


TWIN_LOOKS = {"learned": ("blue", "o"), "frozen": ("orange", "s"), "sinusoidal": ("black", "D")}


def twins_figure(found: pd.DataFrame, path: Path) -> Figure:
    """Where searches began and ended in loss and PSNR, and the pictures of two victims."""
    fig, axes = viz.figure(2, 7, size=(9.4, 4.2))
    place = axes[0, 0].get_gridspec()
    for ax in axes[:, :3].flat:
        ax.remove()
    _losses(fig.add_subplot(place[:, :3]), found)
    for line, victim in zip(axes[:, 3:], shown_twins(found), strict=False):
        for ax, position in zip(line[1:], TWINS, strict=True):
            runs = chosen(found, position=position)
            shown = [run for run in runs.itertuples() if (*run.victims, run.seed) == victim][:1]
            kept = read_pictures(path, shown[0].row.case) if shown else None
            if kept is None:
                ax.text(0.5, 0.5, "not kept" if shown else "not run", ha="center", va="center", color="0.4")
                continue
            viz.draw(line[0], kept[0][0])
            viz.draw(ax, kept[1][0])
            ax.set_xlabel(f"loss {shown[0].loss:.0e}\n{shown[0].psnr:.1f} dB")
    for ax, head in zip(axes[0, 3:], ("private", *TWINS), strict=True):
        ax.set_title(NAMES.get(head, head), fontweight="bold")
    for ax in axes[:, 3:].flat:
        ax.spines[:].set_visible(False)
        ax.set(xticks=[], yticks=[])
        ax.set_box_aspect(1)
    return fig


def _losses(ax: Axes, found: pd.DataFrame) -> None:
    for position, (name, marker) in TWIN_LOOKS.items():
        runs, colour = chosen(found, position=position), viz.COLOURS[name]
        for run in runs.itertuples():
            ax.plot([run.first_loss, run.loss], [run.first_psnr, run.psnr], color=colour, alpha=0.18, linewidth=1)
            ax.plot(run.first_loss, run.first_psnr, marker, color="white", markeredgecolor=colour, markersize=4)
        if len(runs):
            ax.plot(
                runs.loss, runs.psnr, marker, color=colour, markersize=7, alpha=0.75, markeredgecolor="white",
                label=NAMES.get(position, position),
            )  # fmt: skip
    ax.axhline(al.EXACT_TO_8_BITS_DB, color="0.6", linestyle=":", linewidth=1, zorder=0)
    ax.annotate(
        "exact to 8 bits", (0.98, al.EXACT_TO_8_BITS_DB), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", color="0.35", fontsize=10, ha="right",
    )  # fmt: skip
    ax.set(xscale="log", xlabel="loss, first (hollow) and last (filled)", ylabel="PSNR in dB")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper right", frameon=False, handletextpad=0.2)


def shown_twins(found: pd.DataFrame) -> list[tuple[str, int]]:
    """Victim and seed of two lines of pictures: first those whose learned run reached 30 dB."""
    runs = chosen(found, position="learned")
    runs = runs.iloc[(runs.psnr < 30).argsort(kind="stable")]
    seen: dict[str, int] = {}
    for run in runs.itertuples():
        seen.setdefault(run.victims[0], run.seed)
    return list(seen.items())[:2]


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    """Without the twins' pictures, as in the repository, their figure is left as it is."""
    study, path = study_of(folder, options), folder / "effect.csv"
    rows = rows_of(path, study)
    drawn = {"effect.png": viz.to_png(effect_figure(rows, study), dpi=150)}
    if path.with_name("effect_pictures").is_dir():
        drawn["effect_twins.png"] = viz.to_png(twins_figure(twins(rows, path), path), dpi=150)
    return drawn
