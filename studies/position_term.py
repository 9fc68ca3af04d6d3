"""Does the position term help? `python -m studies.position_term` writes position_term.csv, .md,
.png.

APRIL (Lu et al., CVPR 2022) adds α · (1 − cos) of the position embedding's gradients to what
gradient matching minimizes. Here the same search, from the same noise, on the same update, for
several α: how many runs end at 30 dB or more, and after how many evaluations is the picture that
good for the first time? The attack never learns its PSNR: it runs to the end of its budget, and its
best picture so far is scored from outside, every ten evaluations.

MNIST-5k test digits, 28×28 pixels in 16 patches of 7×7; pre-norm ViT of width 128 with 4 blocks and
4 heads, random weights, learned position embedding whose gradient is shared, float64.

    python -m studies.position_term            # about twenty minutes on one thread
    python -m studies.position_term --quick    # one victim, one seed, two settings, 40 evaluations
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest
from torch import Tensor, nn

import aprillab as al
from aprillab import viz

from ._rows import fill, made, origin, read
from ._runner import Claim, Description, between, run_study, study_parser
from ._tables import formatted, markdown

GOOD = 30.0  # dB: the digit is there, a few grey levels off
EVERY = 10  # evaluations between two scores
# APRIL's recipe as it was when the rows were measured; what it has become since,
# data/results/digits.md says.
MEASURED_WITH = replace(al.RECIPES["april"], distance="relative_l2", position_term=None, restarts=1)


# --- What is measured ---------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """Weight of the position term; the mean of the tokens' cosines, or one cosine of the whole."""

    alpha: float
    term: str = "per_token"

    @property
    def label(self) -> str:
        return f"{self.alpha:g}" + (", whole" if self.term == "whole" else "")


@dataclass(frozen=True)
class Study:
    """How much is measured."""

    settings: tuple[Setting, ...] = (*map(Setting, (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)), Setting(1.0, "whole"))
    digits: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    seeds: tuple[int, ...] = (0,)
    evaluations: int = 400
    width: int = 128
    depth: int = 4


SMALLEST = Study(settings=(Setting(0.0), Setting(1.0)), digits=(3,), seeds=(0,), evaluations=40)


@dataclass(frozen=True)
class Row:
    """One search. The columns are explained on the page."""

    alpha: float
    term: str
    victim: str
    seed: int
    psnr: float
    psnr_rearranged: float
    distance: float
    evaluations_to_30: int | None
    evaluations: int
    seconds: float


def rearranged(picture: Tensor, pixels: Tensor, patch_size: int) -> Tensor:
    """A picture (C, H, W) with its patches where they fit ``pixels`` best, each place used once."""
    patches, truth = (al.patchify(x[None], patch_size)[0] for x in (picture, pixels))  # (n, p)
    moved, places = linear_sum_assignment((patches[:, None] - truth).square().sum(-1).numpy())
    height, width = pixels.shape[1:]
    return al.unpatchify(patches[moved[places.argsort()]][None], patch_size, (height, width))[0]


def attack(
    model: nn.Module, update: al.ClientUpdate, pixels: Tensor, setting: Setting, *, seed: int, evaluations: int
) -> dict[str, Any]:
    """A search scored against the victim's ``pixels`` (C, H, W): the measured columns of a row."""
    anatomy = al.dissect(model)
    preprocessing, patch_size = anatomy.preprocessing, al.tensors_of(model)[anatomy.patch_weight].shape[-1]
    reached: list[int] = []

    def score(entry: dict[str, Any], images: Tensor) -> None:
        if entry["evaluation"] % EVERY or reached:
            return
        if float(al.psnr(preprocessing.to_pixels(images)[0], pixels)) >= GOOD:
            reached.append(entry["evaluation"])

    term = al.PositionTerm(weight=setting.alpha, per_token=setting.term == "per_token") if setting.alpha else None
    result = al.match_gradients(
        model, update, recipe=replace(MEASURED_WITH, position_term=term), seed=seed,
        max_evaluations=evaluations, callback=score, progress=False,
    )  # fmt: skip
    if result.diagnostics["stopped"] == "interrupted":  # match_gradients returns its best at Ctrl-C
        raise KeyboardInterrupt
    return {
        "psnr": float(al.psnr(result.pixels[0], pixels)),
        "psnr_rearranged": float(al.psnr(rearranged(result.pixels[0], pixels, patch_size), pixels)),
        "distance": result.diagnostics["terms"]["distance"],
        "evaluations_to_30": reached[0] if reached else None,
        "evaluations": result.diagnostics["evaluations"],
        "seconds": result.seconds,
    }


class Case(NamedTuple):
    """A row's values in the columns that tell rows apart."""

    alpha: float
    term: str
    victim: str
    seed: int


def search(study: Study, case: Case) -> list[Row]:
    pictures, labels = al.mnist5k("test", dtype=torch.float64)
    label = int(case.victim.removeprefix("digit "))
    pixels = pictures[labels == label][0]
    model = al.VisionTransformer(
        image_size=28, patch_size=7, channels=1, width=study.width, depth=study.depth, heads=4, classes=10,
        seed=case.seed,
    ).double()  # fmt: skip
    update = al.client_update(model, al.HALF.to_input(pixels[None]), torch.tensor([label]))
    setting = Setting(case.alpha, case.term)
    return [Row(*case, **attack(model, update, pixels, setting, seed=case.seed, evaluations=study.evaluations))]


def measure(folder: Path, options: argparse.Namespace) -> None:
    """All settings of one victim and seed in turn."""
    study = SMALLEST if options.quick else Study()
    places = itertools.product(study.seeds, study.digits, study.settings)
    cases = [Case(*setting, f"digit {digit}", seed) for seed, digit, setting in places]
    settings = {name: getattr(study, name) for name in ("evaluations", "width", "depth")}
    fill(
        folder / "position_term.csv", Row, cases, partial(search, study), key=Case._fields, settings=settings,
        workers=options.workers,
    )  # fmt: skip


# --- What is reported ---------------------------------------------------------------------------------------------


def reach(runs: pd.DataFrame) -> pd.Series:
    """Evaluations to 30 dB for the first time, by victim and seed; infinite where never."""
    return runs.set_index(["victim", "seed"]).evaluations_to_30.fillna(math.inf).astype(float)


def by_setting(rows: pd.DataFrame) -> dict[Setting, pd.DataFrame]:
    """Rows by setting, "per_token" first and by α."""
    return {Setting(alpha, term): runs for (term, alpha), runs in rows.groupby(["term", "alpha"])}


def summarize(runs: pd.DataFrame, without: pd.DataFrame) -> dict[str, Any]:
    """One setting against the runs ``without`` the term, on the same victims and seeds.

    ``earlier`` and ``later`` count those at which it gets to 30 dB before, or after, α = 0 does
    (neither where both or none do at once); ``p`` is the two-sided sign test of the two, 1 where
    there is nothing to compare.
    """
    mine, good = reach(runs), runs[runs.psnr >= GOOD]
    other = reach(without).reindex(mine.index)  # NaN, neither earlier nor later, where there is none
    earlier, later = int((mine < other).sum()), int((mine > other).sum())
    interval = binomtest(len(good), len(runs)).proportion_ci(method="wilson")
    medians = runs[["psnr", "psnr_rearranged", "distance"]].median()
    return medians.to_dict() | {
        "runs": len(runs), "good": len(good), "low": 100 * interval.low, "high": 100 * interval.high,
        "evaluations": mine.median(), "evaluations_of_good": reach(good).median() if len(good) else math.inf,
        "earlier": earlier, "later": later,
        "p": float(binomtest(earlier, earlier + later).pvalue) if earlier + later else 1.0,
    }  # fmt: skip


def summaries(rows: pd.DataFrame) -> pd.DataFrame:
    """:func:`summarize` by setting."""
    groups = by_setting(rows)
    without = groups.get(Setting(0.0), rows[:0])
    return pd.DataFrame([s._asdict() | {"label": s.label} | summarize(runs, without) for s, runs in groups.items()])


def number(evaluations: float) -> str:
    return "never" if math.isinf(evaluations) else f"{evaluations:.0f}"


def table_of(found: pd.DataFrame) -> str:
    shown = formatted(found, psnr=".1f", psnr_rearranged=".1f", distance=".1g", p=".2g", low=".0f", high=".0f")
    compared = found.label != Setting(0.0).label
    return markdown(pd.DataFrame({
        "α": found.label,
        "≥ 30 dB": found.good.astype(str) + " of " + found.runs.astype(str),
        "95 % interval": shown.low + " to " + shown.high + " %",
        "evaluations to 30 dB: of those": found.evaluations_of_good.map(number),
        "of all": found.evaluations.map(number), "median dB": shown.psnr, "rearranged": shown.psnr_rearranged,
        "median distance": shown.distance,
        "earlier · later than α = 0": (found.earlier.astype(str) + " · " + found.later.astype(str)).where(compared),
        "p": shown.p.where(compared),
    }))  # fmt: skip


LOOKS = {"per_token": ("blue", "o", 0.0, "token by token"), "whole": ("red", "s", 0.28, "whole embedding")}


def chart(rows: pd.DataFrame, evaluations: int) -> Figure:
    """Success rate, and evaluations to 30 dB of every run, against α."""
    found, groups = summaries(rows), by_setting(rows)
    fig, axes = viz.figure(1, 2, size=(9.0, 3.8))
    rate, speed = axes[0]
    alphas = sorted(set(found.alpha))
    never = 1.12 * evaluations
    for term, mine in found.groupby("term", sort=False):
        colour, marker, shift, label = LOOKS[str(term)]
        x, share = [alphas.index(alpha) + shift for alpha in mine.alpha], 100 * mine.good / mine.runs
        rate.errorbar(
            x, share, yerr=[share - mine.low, mine.high - share], fmt=marker, color=viz.COLOURS[colour], ecolor="0.6",
            elinewidth=1, capsize=3, label=label,
        )  # fmt: skip
        for place, s in zip(x, mine.itertuples(), strict=True):
            ys = reach(groups[Setting(s.alpha, s.term)]).clip(upper=never)
            spread = [place + 0.16 * (i / max(len(ys) - 1, 1) - 0.5) for i in range(len(ys))]
            speed.scatter(spread, ys, s=20, marker=marker, color=viz.COLOURS[colour], alpha=0.55, linewidths=0)
            speed.plot([place - 0.13, place + 0.13], [min(s.evaluations, never)] * 2, color="black", linewidth=1.6)
    ticks = range(0, evaluations + 1, max(evaluations // 4, 1))
    rate.set(ylim=(-4, 104), ylabel="runs that end at 30 dB or more, %")
    rate.legend(loc="upper left", fontsize=10, frameon=False)
    speed.axhline(1.05 * evaluations, color="0.8", linewidth=1)
    speed.set(ylim=(0, 1.2 * evaluations), ylabel="evaluations to 30 dB")
    speed.set_yticks([*ticks, never], [*map(str, ticks), "never"])
    for ax in (rate, speed):
        ax.set_xticks(range(len(alphas)), [f"{a:g}" for a in alphas])
        ax.set(xlim=(-0.5, len(alphas) - 0.4), xlabel="weight α of the position term")
    return fig


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "position_term.csv"
    rows = read(path, Row)
    found = summaries(rows)
    by_label = {row.label: row for row in found.itertuples()}
    tokens = found[found.term == "per_token"]
    best = by_label[tokens.sort_values(["good", "evaluations"], ascending=[False, True]).label.iloc[0]]
    most = by_label[tokens.sort_values("alpha").label.iloc[-1]]
    same, whole = by_label["1"], by_label.get("1, whole", best)
    missed = rows[(rows.alpha == 0) & (rows.psnr < GOOD)][["distance", "psnr", "psnr_rearranged"]].median()
    fields = origin(path)["settings"] | {
        "best": best, "most": most, "without": by_label["0"], "whole": whole, "same": same, "missed": missed,
        "listed": "; ".join(f"α = {s.label}: {s.good} of {s.runs}" for s in tokens.itertuples()),
        "alt": " ".join(f"α = {s.label}: {s.good} of {s.runs} succeed, median {number(s.evaluations)} evaluations."
                        for s in found.itertuples()),
        "best_evaluations": number(best.evaluations), "misses": by_label["0"].runs - by_label["0"].good,
        "table": table_of(found), "searches": len(rows), "victims": ", ".join(sorted(set(rows.victim))),
        "seeds": ", ".join(map(str, sorted(set(rows.seed)))), "made": made(path),
    }  # fmt: skip
    return fields, [
        between("a low loss", missed.distance, most=1e-2),
        between("and another picture", missed.psnr, most=15),
        between("the patches are nearly right, their places wrong", missed.psnr_rearranged, least=missed.psnr + 15),
        Claim("Too much hurts", (most.good, best.good), most.good < best.good),
        between("The term is then nearly the whole loss, and the other gradients wait", most.distance, least=0.1),
        Claim("How the cosine is taken decides as much", (whole.good, same.good), whole.good < same.good),
    ]


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    path = folder / "position_term.csv"
    return {"position_term.png": viz.to_png(chart(read(path, Row), origin(path)["settings"]["evaluations"]), dpi=150)}


def main(argv: Sequence[str] | None = None) -> None:
    options = study_parser("position_term", __doc__).parse_args(argv)
    run_study("position_term", options, measure=measure, describe=describe, draw=draw)


if __name__ == "__main__":
    main()
