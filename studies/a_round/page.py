"""The study's page and figure."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

import aprillab as al
from aprillab import viz

from .._rows import made, read
from .._runner import Claim, Description, between
from .._tables import grouped, markdown
from .clients import KEPT, Row

FILE = "a_round.csv"


def table(
    rows: pd.DataFrame, names: Sequence[str], *, stands: bool = False, grey: bool = False, loss: bool = False
) -> str:
    """A line for each cell: PSNR and prediction over its runs, how many are exact, the audit's
    word.
    """

    def line(group: pd.DataFrame) -> dict[str, str]:
        done = group[group.psnr.notna()]
        found = {"runs": str(len(group))}
        if len(done) < len(group):
            found["runs"] += f", {len(group) - len(done)} refused"
        found |= {
            "attack": ", ".join(done.attack.unique()), "median dB": _db(done.psnr.median()),
            "least": _db(done.psnr.min()), "predicted": _db(done.predicted_psnr.median()),
            "exact": str(int(done.exact.eq(True).sum())),
        }  # fmt: skip
        if stands:
            found["as it stands"] = _db(group.linear.median())
        if grey:
            found["a grey picture"] = _db(group.grey.median())
        if loss:
            found["loss after"] = f"{group.loss_after.median():.1g}" if len(done) else "–"
        return found | {"audit": ", ".join(word for word in group.trust.unique() if word)}

    titles = {"learning_rate": "η", "eps": "ε", "batch_size": "a step"}
    texts = rows.assign(**{name: rows[name].map("{:g}".format) for name in ("learning_rate", "eps")})
    return markdown(grouped(texts, names, line).rename(columns=titles).astype(object).replace("", None))


def _db(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"


def median(rows: pd.DataFrame, **chosen: float | str) -> float:
    """The median PSNR of a cell."""
    return float(of(rows, **chosen).psnr.median())


def of(rows: pd.DataFrame, **chosen: float | str) -> pd.DataFrame:
    """The rows with these values."""
    for name, value in chosen.items():
        rows = rows[rows[name] == value]
    return rows


def describe(folder: Path, options: argparse.Namespace) -> Description:
    rows = read(folder / FILE, Row)
    rows["first"] = rows.optimizer.str.startswith("Adam")
    wrong = rows[rows.exact.eq(True) & ~(rows.psnr >= al.EXACT_TO_8_BITS_DB)]
    fields = {
        "made": made(folder / FILE), "runs": len(rows), "exact": int(rows.exact.eq(True).sum()),
        "exact_least": rows[rows.exact.eq(True)].psnr.min(),
    }  # fmt: skip
    claims = [Claim("none of these is below 58.9 dB", len(wrong), wrong.empty)]
    for part in (_one_picture, _autocast, _batches, _undone, _rounds, _large):
        more, claimed = part(rows)
        fields |= more
        claims += claimed
    return fields, claims


def _one_picture(rows: pd.DataFrame) -> Description:
    rows = of(rows, part="one picture")
    sgd, adam = rows[~rows["first"]], rows[rows["first"]]
    usual = sgd[sgd.learning_rate >= 0.01]
    slow, unproven = sgd[sgd.learning_rate < 0.01], usual[usual.exact.eq(False)]
    medians = usual.groupby(["optimizer", "learning_rate", "steps"]).psnr.median()
    fields = {
        "one_sgd": table(sgd, ("optimizer", "steps", "learning_rate"), loss=True),
        "one_adam": table(adam, ("optimizer", "steps", "learning_rate"), stands=True),
        "one_least": usual.psnr.min(), "one_most": usual.psnr.max(), "one_runs": len(usual),
        "one_exact": int(usual.exact.eq(True).sum()), "one_unproven": len(unproven),
        "one_before": usual.loss_before.median(),
        "one_lowest": medians.min(), "one_highest": medians.max(),
        "one_slow_least": slow.psnr.min(), "one_slow_runs": len(slow),
        "one_slow_exact": int(slow.exact.eq(True).sum()),
        "one_optimistic": (sgd.predicted_psnr - sgd.psnr).max(),
        "adam_most": adam.psnr.max(), "adam_median": adam.psnr.median(), "adam_stands": adam.linear.median(),
    }  # fmt: skip
    return fields, [
        between("of these runs are exact", usual.exact.eq(True).mean(), least=0.95),
        Claim("the picture is as right", unproven.psnr.min(), bool(unproven.psnr.ge(100).all())),
        between("Local steps, momentum, Nesterov and decay protect nothing", usual.psnr.min(), least=58.9),
        between("was never more than 5 dB too high", (sgd.predicted_psnr - sgd.psnr).max(), most=5),
        between("no run is above 25 dB", adam.psnr.max(), most=25),
        Claim("and none is called exact", int(adam.exact.eq(True).sum()), not adam.exact.eq(True).any()),
    ]  # fmt: skip


def _autocast(rows: pd.DataFrame) -> Description:
    rows = of(rows, part="autocast")
    sgd = of(rows, optimizer="SGD")
    fields = {
        "autocast": table(rows, ("optimizer", "steps", "learning_rate"), loss=True),
        "autocast_median": sgd.psnr.median(), "autocast_least": sgd.psnr.min(),
        "autocast_adam": of(rows, optimizer="AdamW").psnr.median(),
    }  # fmt: skip
    return fields, [between("A forward pass in bfloat16 costs more", sgd.psnr.median(), least=30, most=80)]


def _batches(rows: pd.DataFrame) -> Description:
    rows = of(rows, part="batch")
    pairs = rows[(rows.images == 2) & (rows.batch_size == 1)]
    whole, single = rows[rows.batch_size == rows.images], rows[rows.batch_size == 1]
    fields = {
        "batch": table(rows, ("images", "batch_size", "steps", "learning_rate"), grey=True),
        "batch_median": whole.psnr.median(), "batch_most": whole.psnr.max(),
        "single_median": single.psnr.median(), "single_most": single.psnr.max(),
        "batch_words": ", ".join(sorted({word for word in rows.trust if word})),
        "batch_gain": (rows.psnr - rows.grey).median(), "batch_gain_most": (rows.psnr - rows.grey).max(),
        "batch_two": (pairs.psnr - pairs.grey).median(),
    }  # fmt: skip
    return fields, [
        Claim("No batch is called exact", int(rows.exact.eq(True).sum()), not rows.exact.eq(True).any()),
        between("what comes back is a mixture", rows.psnr.median(), most=20),
        between("never 3 dB too high", (rows.predicted_psnr - rows.psnr).max(), most=3),
        between("no better than grey", (rows.psnr - rows.grey).median(), most=3),
    ]


def _undone(rows: pd.DataFrame) -> Description:
    rows = of(rows, part="Adam undone")
    first, later = rows[rows.steps == 1], rows[rows.steps > 1]
    at = {eps: median(first, learning_rate=1e-3, eps=eps) for eps in (1e-8, 1e-6, 1e-4, 1e-2)}
    after = {
        (eps, s): median(later, learning_rate=1e-3, eps=eps, steps=s) for eps in (1e-6, 1e-2) for s in (2, 5, 20)
    }
    fields = {
        "undone": table(rows, ("eps", "learning_rate", "steps"), stands=True, loss=True),
        "first_8": at[1e-8], "first_6": at[1e-6], "first_4": at[1e-4], "first_2": at[1e-2],
        "later_6": after[1e-6, 2], "later_2": after[1e-2, 2], "later_2_5": after[1e-2, 5],
        "later_2_20": after[1e-2, 20], "later_stands": later.linear.median(),
        "later_optimistic": (later.predicted_psnr - later.psnr).max(),
    }  # fmt: skip
    several = later[later.eps <= 1e-6]
    return fields, [
        between("{first_8:.0f} dB at ε = 1e-8", at[1e-8], least=25),
        between("{first_6:.0f} at 1e-6", at[1e-6], least=60),
        between("two steps of the usual ε leave nothing", several.psnr.median(), most=20),
        between("{later_2:.0f} dB after two steps", after[1e-2, 2], least=25),
        Claim("none of several steps is called exact", int(later.exact.sum()), not later.exact.eq(True).any()),
        Claim("and none a mixture", ", ".join(later.trust.unique()), "mixture" not in set(later.trust)),
    ]


def _rounds(rows: pd.DataFrame) -> Description:
    rows = of(rows, part="rounds")
    reset, kept, sgd = (of(rows, optimizer=name) for name in ("AdamW", KEPT, "SGD"))
    found = {T: median(reset, rounds=T) for T in (1, 2, 3, 6)}
    merged = reset.merge(reset[reset.rounds == 1], on=["victim", "seed"], suffixes=("", "_one"))
    gain = (merged.psnr - merged.psnr_one)[merged.rounds > 1]
    fields = {
        "rounds": table(rows, ("optimizer", "rounds", "steps", "learning_rate"), loss=True),
        "reset_one": found[1], "reset_two": found[2], "reset_three": found[3], "reset_six": found[6],
        "reset_gain": gain.median(), "reset_worst": gain.min(),
        "kept_refused": int(kept.psnr.isna().sum()), "kept_runs": len(kept),
        "kept_note": next(iter(kept.note), "").partition(": ")[2].partition(": check")[0],
        "rounds_sgd": sgd[sgd.rounds > 1].psnr.median(), "rounds_sgd_one": sgd[sgd.rounds == 1].psnr.median(),
    }  # fmt: skip
    wrong = kept[kept.exact.eq(True)]
    return fields, [
        between("each round is a first step", gain.median(), least=0),
        Claim("none is called exact", len(wrong), wrong.empty),
    ]


def _large(rows: pd.DataFrame) -> Description:
    rows = of(rows, part="ViT-B/16")
    if rows.empty:  # too small a study
        names = ("large", "large_1", "large_01", "large_001", "large_five", "large_momentum", "large_8", "large_6")
        return dict.fromkeys((*names, "large_later"), math.nan), []
    sgd = {rate: median(rows, optimizer="SGD", steps=1, learning_rate=rate) for rate in (1, 0.1, 0.01)}
    five = {name: median(rows, optimizer=name, steps=5, learning_rate=0.01) for name in ("SGD", "momentum 0.9")}
    first = {eps: median(rows, optimizer="AdamW", steps=1, eps=eps) for eps in (1e-8, 1e-6)}
    fields = {
        "large": table(rows, ("optimizer", "steps", "learning_rate", "eps"), stands=True, loss=True),
        "large_1": sgd[1], "large_01": sgd[0.1], "large_001": sgd[0.01], "large_five": five["SGD"],
        "large_momentum": five["momentum 0.9"], "large_8": first[1e-8], "large_6": first[1e-6],
        "large_later": median(rows, optimizer="AdamW", steps=5),
    }  # fmt: skip
    return fields, [
        between("the smaller η, the larger their share", sgd[1] - sgd[0.01], least=10),
        between("{large_001:.0f} dB at η = 0.01", sgd[0.01], least=40, most=75),
        between("{large_6:.0f} dB at ε = 1e-6", first[1e-6], least=50),
    ]


# --- The figure ---------------------------------------------------------------------------------------------------


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    rows = read(folder / FILE, Row)
    fig, axes = viz.figure(1, 3, size=(8.8, 3.4))
    _panel(axes[0, 0], of(rows, part="one picture", learning_rate=0.1), "steps", "optimizer", "one picture, η = 0.1")
    _panel(axes[0, 1], of(rows, part="Adam undone", learning_rate=1e-3), "steps", "eps", "AdamW undone, ε")
    adam = of(rows, part="rounds", optimizer="AdamW")
    _panel(axes[0, 2], adam, "rounds", "optimizer", "first steps, ε = 1e-8")
    axes[0, 0].set_ylabel("PSNR in dB")
    return {"a_round.png": viz.to_png(fig, dpi=150)}


def _panel(ax: Axes, rows: pd.DataFrame, across: str, by: str, title: str) -> None:
    """Median PSNR over steps or rounds, a line for each value of ``by``."""
    looks = zip(viz.COLOURS.values(), "osD^v<>", strict=False)
    for (value, group), (colour, marker) in zip(rows.groupby(by, sort=False), looks, strict=False):
        medians = group.groupby(across).psnr.median()
        label = f"{value:g}" if isinstance(value, float) else value
        ax.plot(medians.index, medians, color=colour, marker=marker, markersize=5, label=label)
    ax.axhline(al.EXACT_TO_8_BITS_DB, color="0.5", linestyle=":", linewidth=1)
    ax.set(xlabel={"steps": "local steps", "rounds": "rounds"}[across], title=title, ylim=(0, 155))
    ax.set_xscale("log")
    ticks = sorted(set(rows[across]))
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    ax.legend(fontsize=8, frameon=False, loc="best")
