"""The page of the study: its tables, its line, its figure, its claims."""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import aprillab as al
from aprillab import viz

from .._rows import made, origin, read
from .._runner import Claim, Description, between
from .._tables import grouped, markdown
from .independence import PRECISIONS
from .measure import FULL, Row

MANY, FEW, DIGIT = "32×32, 64 patches", "32×32, 16 patches", "digits, 16 patches"
TABLE = "1-D sinusoids, base 10000"
STORED, HALVED = f"{TABLE}, stored in float32", f"{TABLE}, stored in bfloat16"
# The decimal digits by which the PSNR is predicted: a column, and in words 10 to its power.
PREDICTORS = {
    "digits_condition": "1 / (condition · ε)",
    "digits_eps": "σ_least / (ε · token norm)",
    "digits": "σ_least / (noise · token norm)",
    "digits_mean": "the same, 1/σ² averaged",
}


# --- Tables -------------------------------------------------------------------------------------------------------


def relative(values: pd.Series) -> str:
    """The median of σ_least/σ_largest, which float64 does not tell from zero below its ε."""
    median = values.median()
    return "< 2e-16" if median < torch.finfo(torch.float64).eps else f"{median:.0e}"


def summary_line(runs: pd.DataFrame) -> dict[str, str]:
    """Singular values, ranks and PSNR by precision, of one embedding."""
    by = {p: runs[runs.precision == p] for p in PRECISIONS}
    sigma = [relative(by[p].sigma_relative) if len(by[p]) else "–" for p in FULL]
    rank = [f"{by[p]['rank'].quantile(interpolation='lower')}" if len(by[p]) else "–" for p in PRECISIONS]
    psnr = {
        f"{p} dB": f"{by[p].psnr.median():.0f} ({by[p].psnr.min():.0f})" if len(by[p]) else "–" for p in PRECISIONS
    }
    return {
        "rank at most": f"{runs.rank_bound.iloc[0]} of {runs.patches.iloc[0]}",
        "σ_least/σ_largest, model in float64 · float32": " · ".join(sigma),
        "rank at ε of float64 · 32 · 16 · bf16": " · ".join(rank),
        **{f"{p} dB": text for p, text in zip(PRECISIONS, psnr, strict=True)},
    }


def summary(rows: pd.DataFrame) -> str:
    """One Markdown table a section."""
    tables = []
    for section, part in rows.groupby("section", sort=False):
        table = grouped(part, ("embedding", "weights"), summary_line).rename(
            columns={"embedding": "position embedding"}
        )
        tables.append(f"### {section}\n\n{markdown(table)}")
    return "\n\n".join(tables)


class Line(NamedTuple):
    """PSNR ≈ ``offset`` + 20 · digits, dB, over the ``rows``; ``slope`` is a free one."""

    rows: int
    slope: float
    offset: float
    spread: float
    largest: float


def line(rows: pd.DataFrame, predictor: str) -> Line:
    """Offset and median absolute deviation of 20 dB a decade, and the least-squares slope."""
    rows = rows[rows[predictor] > 1]
    digits, psnr = rows[predictor], rows.psnr
    offset = (psnr - 20 * digits).median()
    residuals = (psnr - 20 * digits - offset).abs()
    slope = psnr.cov(digits) / digits.var() if len(rows) > 1 else math.nan
    return Line(len(rows), slope, offset, residuals.median(), residuals.max())


def predictors(rows: pd.DataFrame) -> str:
    """The Markdown table that compares candidates for the number that predicts the PSNR."""
    lines = []
    for name, formula in PREDICTORS.items():
        for section, part in rows.groupby("section", sort=False):
            if (found := line(part, name)).rows:
                numbers = (f"{found.slope:.1f}", f"{found.offset:.0f}", f"{found.spread:.1f}", f"{found.largest:.0f}")
                lines.append((formula, section, found.rows, *numbers))
    heads = (
        "10 to the digits",
        "setting",
        "rows",
        "slope dB/decade",
        "offset dB",
        "median deviation dB",
        "largest dB",
    )
    return markdown(pd.DataFrame(lines, columns=heads))


# --- The figure ---------------------------------------------------------------------------------------------------

COLOURS = {"random": "blue", "learned": "green", "1-D": "red", "1-D, stored coarser": "orange", "2-D": "black"}
NAMES = {"random": "random", "learned": "learned", "1-D": "1-D sinusoids", "2-D": "2-D sinusoids"}
NAMES["1-D, stored coarser"] = "1-D, table rounded"
MARKERS = dict(zip(PRECISIONS, "osD^", strict=True))
LEFT, BAND = -6.5, -8.5  # ends of the axis for digits, and of the band for what has none


def kind_of(row: pd.Series) -> str:
    """The kind, with 1-D tables stored more coarsely than the client computes apart."""
    finer = row.kind == "1-D" and row.table not in ("", "float32" if row.precision != "float64" else "float64")
    return "1-D, stored coarser" if finer else str(row.kind)


def scatter(rows: pd.DataFrame) -> Figure:
    """PSNR over the digits the gradient's noise leaves of the least singular value, all rows."""
    fig, axes = viz.figure(size=(6.6, 4.6))
    ax = axes[0, 0]
    kinds = rows.apply(kind_of, axis=1)
    jitter = random.Random(0)
    ax.axvspan(BAND, LEFT, color="0.93", linewidth=0)
    for kind, colour in COLOURS.items():
        for precision, marker in MARKERS.items():
            points = rows[(kinds == kind) & (rows.precision == precision)]
            # An exact dependence has no digits: what is computed is the rounding of the singular
            # values.
            xs = [
                max(digits, LEFT + 0.2) if independent else jitter.uniform(BAND + 0.2, LEFT - 0.2)
                for digits, independent in zip(points.digits, points.rank_bound == points.patches, strict=True)
            ]
            look: dict[str, Any] = {"color": viz.COLOURS[colour], "alpha": 0.45, "linewidths": 0}
            ax.scatter(xs, points.psnr, s=13, marker=marker, **look)
    offset = line(rows, "digits").offset
    ax.plot([0, 15], [offset, offset + 300], color="0.35", linewidth=1, zorder=0)
    ax.annotate("20 dB a digit", (9.5, offset + 190), (9.7, offset + 143), color="0.3", fontsize=10)
    ax.axhline(al.EXACT_TO_8_BITS_DB, color="0.6", linestyle=":", linewidth=1, zorder=0)
    ax.annotate("exact to 8 bits", (LEFT + 0.2, al.EXACT_TO_8_BITS_DB + 4), color="0.35", fontsize=10)
    ax.annotate("exactly\ndependent", ((LEFT + BAND) / 2, 105), color="0.3", fontsize=10, ha="center", rotation=90)
    ax.set(xlim=(BAND, 15.5), ylim=(0, 330), xticks=range(-6, 16, 3))
    ax.set(xlabel="digits left of the least singular value", ylabel="PSNR of the span attack, dB")
    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 6}
    dots = [Line2D([], [], **dot, color=viz.COLOURS[colour], label=NAMES[kind])
            for kind, colour in COLOURS.items() if (kinds == kind).any()]  # fmt: skip
    shapes = [Line2D([], [], **(dot | {"marker": marker, "markersize": 5}), color="0.4", label=precision)
              for precision, marker in MARKERS.items()]  # fmt: skip
    place: dict[str, Any] = {"loc": "upper left", "fontsize": 10, "handletextpad": 0.1, "frameon": False}
    ax.add_artist(ax.legend(handles=dots, bbox_to_anchor=(0.085, 1.02), **place))
    ax.legend(handles=shapes, bbox_to_anchor=(0.39, 1.02), **place)
    return fig


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    return {"conditioning.png": viz.to_png(scatter(read(folder / "conditioning.csv", Row)), dpi=150)}


# --- The page -----------------------------------------------------------------------------------------------------


def decibels(rows: pd.DataFrame) -> dict[str, float]:
    """Median PSNR in dB of the settings that the page speaks of, by its names for them."""
    places = {
        "few": (FEW, TABLE, "float32"), "few_64": (FEW, TABLE, "float64"), "many_64": (MANY, TABLE, "float64"),
        "stored": (MANY, STORED, "float64"), "halved": (MANY, HALVED, "float32"),
        "halved_few": (FEW, HALVED, "float32"), "fast": (FEW, f"{TABLE}, speed 1.5", "float32"),
        "faster": (FEW, f"{TABLE}, speed 2", "float32"), "fastest": (FEW, f"{TABLE}, speed 3", "float32"),
        "learned": (DIGIT, "learned, then frozen", "float32"), "digit": (DIGIT, STORED, "float32"),
        "digit_64": (DIGIT, STORED, "float64"),
    }  # fmt: skip
    known = rows[(rows.section != DIGIT) | (rows.weights == "trained")]
    medians = known.groupby(["section", "embedding", "precision"]).psnr.median()
    return {name: medians.get(place, math.nan) for name, place in places.items()}


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "conditioning.csv"
    rows = read(path, Row)
    db = decibels(rows)
    short, full = rows[rows["rank"] < rows.patches], rows[rows["rank"] == rows.patches]
    twins = rows[rows.rank_bound < rows.patches].psnr
    usual = (rows.kind == "1-D") & (rows.speed == 1) & (rows.scale == 1) & (rows.table == "")
    bases = rows[usual & (rows.section == FEW) & (rows.precision == "float32")].psnr
    fit, textbook = (
        {name: line(rows[rows.section == place], number) for name, place in (("few", FEW), ("many", MANY))}
        for number in ("digits", "digits_condition")
    )
    photographs = ~rows.victim.str.startswith("digit")
    fields = origin(path)["settings"] | {
        "db": argparse.Namespace(**db), "short": len(short), "short_best": short.psnr.max(), "full": len(full),
        "passed": (full.psnr > 40).sum(), "halves": ((full.psnr <= 40) & ~full.precision.isin(FULL)).sum(),
        "base": bases.median(), "base_least": bases.min(), "base_most": bases.max(),
        "twins_most": twins.max(), "twins": twins.median(), "fit": fit, "textbook": textbook,
        "summary": summary(rows), "predictors": predictors(rows), "attacks": len(rows),
        "seeds": rows.seed.nunique(), "victims": ", ".join(sorted(set(rows.victim[photographs]))), "made": made(path),
    }  # fmt: skip
    return fields, [*claims_of_embeddings(db, bases, twins), *claims_of_digits(rows, fit, textbook)]


def claims_of_embeddings(db: dict[str, float], bases: pd.Series, twins: pd.Series) -> list[Claim]:
    speeds = [db[name] for name in ("few", "fast", "faster", "fastest")]
    rounded = min(db[name] for name in ("stored", "halved", "halved_few"))
    return [
        between("holds the attack to {db.few:.0f} dB", db["few"], most=30),
        between("the same weights, picture and attack give {db.few_64:.0f} dB", db["few_64"], least=100),
        between("With 64 patches even float64 carries too few", db["many_64"], most=30),
        between("they tell the patches apart better than the sinusoids do", rounded, least=60),
        between("The base of a 1-D table decides little", bases.max() - bases.min(), most=15),
        Claim("The fastest frequency decides", speeds, speeds == sorted(speeds) and speeds[-1] > 100),
        between("no precision, base, scale, speed or storage lifts", twins.max(), most=30),
        between("falls in float32 ({db.learned:.0f} dB)", db["learned"], least=60),
        between("resists there ({db.digit:.0f} dB)", db["digit"], most=30),
        between("falls in float64 ({db.digit_64:.0f} dB)", db["digit_64"], least=100),
    ]


def claims_of_digits(rows: pd.DataFrame, fit: dict[str, Line], textbook: dict[str, Line]) -> list[Claim]:
    independent = rows["rank"] == rows.patches
    eps = rows.precision.map({p: torch.finfo(getattr(torch, p)).eps for p in PRECISIONS})
    noise = (rows.noise / eps).groupby(rows.precision).median()
    read = rows[(rows.section != DIGIT) & (rows.digits > 1)]
    offsets = (read.psnr - 20 * read.digits).groupby(read.section)
    worst = read.loc[offsets.transform(lambda found: (found - found.median()).abs()).groupby(read.section).idxmax()]
    left, spent = rows[rows.digits > 0].psnr, rows[rows.digits < 0].psnr
    small = rows[(rows.kind == "random") & (rows.scale < 0.01)].condition
    slopes, spreads = [f.slope for f in fit.values()], [(f.spread, textbook[name].spread) for name, f in fit.items()]
    flat = "the largest deviations are a flat picture (`rocket`) under small random embeddings"
    kinds = set(zip(worst.victim, worst.kind, worst.scale, strict=True))
    return [
        between("The numerical rank says when", rows[~independent].psnr.max(), most=40),
        between("of {full} with full rank, {passed} passed 40 dB", (rows[independent].psnr > 40).mean(), least=0.8),
        Claim("follows 20 dB a digit", slopes, all(18 < slope < 22 for slope in slopes)),
        between("over almost 300 dB", left.max() - spent.min(), least=290),
        Claim("The textbook's condition number · ε misses", spreads, all(a < b for a, b in spreads)),
        between("leaves about one ε in a row", noise.get("float32", math.nan), 0.5, 1.5),
        between("rounding a finished gradient a fifth", noise.reindex(PRECISIONS[2:]).median(), 0.15, 0.25),
        between("A small random table is well conditioned", small.max(), most=1000),
        Claim(flat, kinds, kinds == {("rocket", "random", 0.002)}),
        between("rise along a line from about 20 to 310 dB", left.max(), 300, 320),
        between("they lie flat between 8 and 35 dB", spent.min(), 7.5),
        between("they lie flat between 8 and 35 dB", spent.max(), most=35.5),
    ]
