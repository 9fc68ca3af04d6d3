"""Gradient matching, fairly asked: `python -m studies.fair_matching` writes
fair_matching.csv and .md.

Chapter 05 takes APRIL's recipe apart at 100 evaluations. Five questions that this leaves open:

- baselines: what becomes of DLG, Inverting Gradients, TAG and GradInversion with the position term, and with ten
  times the evaluations?
- distances: is it the distance itself that decides, or its size beside the position term's?
- optimizers: is L-BFGS in front for good, or for the first 200 evaluations?
- whole: does the paper's cosine of the whole embedding fail at every weight, beside every distance, and where the
  model reads the mean of its tokens and no class token outweighs the patches?
- seams: where the embedding's gradient is withheld, does a prior on the seams of patches, after GradViT's, put them
  in their places?

MNIST-5k digits 5 and 7, 28×28 pixels in 16 patches of 7×7, on chapter 05's victim: pre-norm ViT of
width 64 with 2 blocks and 4 heads, random weights, float64. No attack learns its PSNR.

    python -m studies.fair_matching            # about half an hour on one thread
    python -m studies.fair_matching --quick    # a search of each part on a small model; keeps no file
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

import aprillab as al

from ._rows import fill, made, origin, read
from ._runner import Claim, Description, between, run_study, study_parser
from ._tables import formatted, grouped, markdown
from .position_term import rearranged

PATCH = 7  # pixels
SHORT, MEDIUM, LONG = 200, 1000, 2000  # evaluations
SEEDS = (0, 1, 2)  # of the noise a search begins with; the weights are chapter 05's, of seed 0
DIGITS = (2507, 3507)  # indices of MNIST-5k: a five and a seven
GOOD = 30.0  # dB: the digit is there, a few grey levels off
# Chapter 05's recipe with one start and nothing rearranged, so that one part at a time is compared.
BASE = replace(al.RECIPES["april"], position_term=al.PositionTerm(), restarts=1, patience=None)
# A distance's size at a random picture, roughly: the weight that makes the position
# term count as much.
SCALES = {"relative_l2": 1.0, "balanced_l2": 1.0, "cosine": 1.0, "l2": 1000.0, "l2_l1": 1000.0}
BASELINES = ("dlg", "inverting_gradients", "tag", "gradinversion")
SEAMS = (0.0, 0.01, 0.1, 1.0)  # weights of the prior
FORGETFUL = "adam, β₂ = 0.9"  # of ten steps: a memory of a thousand slows Adam down
OPTIMIZERS: dict[str, al.LBFGS | al.Adam] = {
    "lbfgs": al.LBFGS(),
    "signed_adam": al.Adam(learning_rate=0.1, signed=True, schedule=True),
    "adam": al.Adam(learning_rate=0.1, schedule=True),
    FORGETFUL: al.Adam(learning_rate=0.1, schedule=True, beta2=0.9),
}


# --- What is measured ---------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One search. ``alpha`` is the position term's weight, or the seams' in that part."""

    part: str
    recipe: str
    alpha: float
    term: str
    head: str
    evaluations: int
    index: int
    seed: int


def cases() -> list[Case]:
    """The short searches first; two digits for the distances, one for the others."""
    places = [(index, seed) for index in DIGITS for seed in SEEDS]
    one = places[: len(SEEDS)]
    of_distances = [*((name, SCALES[name]) for name in ("relative_l2", "balanced_l2", "cosine", "l2")), ("l2", 1.0)]
    heads = ("class token", "mean")
    swept = [("balanced_l2", alpha, "whole", head) for head in heads for alpha in (0.1, 1.0, 10.0, 100.0)]
    swept += [("balanced_l2", 1.0, "per_token", heads[1])]  # for the class token's head it stands among the distances
    swept += [("cosine", 1.0, "whole", heads[0]), ("cosine", 100.0, "whole", heads[0])]
    swept += [("l2", SCALES["l2"], "whole", heads[0])]

    def baselines(budget: int, where: Sequence[tuple[int, int]]) -> list[Case]:
        weights = {name: SCALES[str(al.RECIPES[name].distance)] for name in BASELINES}
        return [
            Case("baselines", name, alpha, term, heads[0], budget, *place)
            for place in where
            for name in BASELINES
            for alpha, term in ((0.0, "none"), (weights[name], "per_token"))
        ]

    return [
        *(Case("distances", *d, "per_token", heads[0], SHORT, *place) for d in of_distances for place in places),
        *(
            Case("optimizers", name, 1.0, "per_token", heads[0], budget, *place)
            for budget in (SHORT, MEDIUM)
            for name in OPTIMIZERS
            if (name, budget) != (FORGETFUL, SHORT)
            for place in one
        ),
        *baselines(SHORT, one),
        *(Case("whole", *setting, SHORT, *place) for setting in swept for place in one),
        *(Case("seams", "seams", a, "none", heads[0], SHORT, *place) for a in SEAMS for place in one),
        *(Case("whole", "balanced_l2", 0.0, "none", head, SHORT, *place) for head in heads for place in one),
        *baselines(LONG, one),
    ]


@dataclass(frozen=True)
class Row:
    """One search. The columns are explained on the page."""

    part: str
    recipe: str
    alpha: float
    term: str
    head: str
    evaluations: int
    index: int
    seed: int
    psnr: float
    psnr_rearranged: float
    residual: float
    loss: float
    stopped: str
    cpu_seconds: float


def recipe_of(case: Case) -> al.Recipe:
    """The published recipe, or chapter 05's with the case's part exchanged."""
    term = None if case.term == "none" else al.PositionTerm(weight=case.alpha, per_token=case.term == "per_token")
    if case.part == "baselines":
        return replace(al.RECIPES[case.recipe], position_term=term)
    if case.part == "optimizers":
        return replace(BASE, position_term=term, optimizer=OPTIMIZERS[case.recipe])
    if case.part == "seams":
        return replace(BASE, position_term=term, priors=al.Priors(seams=case.alpha))
    return replace(BASE, position_term=term, distance=case.recipe)


def search(sizes: dict[str, int], case: Case) -> list[Row]:
    """One case, scored against the private picture from outside."""
    pictures, labels = al.mnist5k(dtype=torch.float64)
    pixels, label = pictures[case.index], labels[case.index]
    model = al.VisionTransformer(
        image_size=28, patch_size=PATCH, channels=1, heads=4, classes=10, class_token=case.head == "class token",
        position="frozen" if case.part == "seams" else "learned", seed=0, **sizes,
    ).double()  # fmt: skip
    update = al.client_update(model, al.HALF.to_input(pixels[None]), label[None])
    began = time.process_time()
    result = al.match_gradients(
        model, update, recipe=recipe_of(case), seed=case.seed, max_evaluations=case.evaluations, progress=False
    )
    seconds, numbers = time.process_time() - began, result.diagnostics
    if numbers["stopped"] == "interrupted":  # match_gradients returns its best at Ctrl-C
        raise KeyboardInterrupt
    in_places = rearranged(result.pixels[0], pixels, PATCH)
    row = Row(
        **case._asdict(), psnr=float(al.psnr(result.pixels[0], pixels)),
        psnr_rearranged=float(al.psnr(in_places, pixels)), residual=numbers["residual"], loss=numbers["loss"],
        stopped=numbers["stopped"], cpu_seconds=seconds,
    )  # fmt: skip
    return [row]


def measure(folder: Path, options: argparse.Namespace) -> None:
    todo, sizes = cases(), {"width": 64, "depth": 2}
    if options.quick:
        short = {SHORT: 3, MEDIUM: 4, LONG: 5}
        todo = [case._replace(evaluations=short[case.evaluations]) for case in todo if case[-2:] == (DIGITS[0], 0)]
        sizes = {"width": 16, "depth": 1}
    fill(
        folder / "fair_matching.csv", Row, todo, partial(search, sizes), key=Case._fields, settings=sizes,
        workers=options.workers,
    )  # fmt: skip


# --- What is reported ---------------------------------------------------------------------------------------------


def spread(values: pd.Series) -> str:
    """The median, and the least and greatest where they differ."""
    low, high = f"{values.min():.1f}", f"{values.max():.1f}"
    return f"{values.median():.1f}" if low == high else f"{values.median():.1f} ({low} to {high})"


def line(runs: pd.DataFrame) -> dict[str, Any]:
    """Of the searches of one setting."""
    return {
        "dB": spread(runs.psnr), "in their places": spread(runs.psnr_rearranged),
        "30 dB or more": f"{int((runs.psnr >= GOOD).sum())} of {len(runs)}",
        "residual": f"{runs.residual.median():.0e}",
    }  # fmt: skip


def table(rows: pd.DataFrame, **names: str) -> str:
    """A line for each setting; ``names`` are the columns that tell them apart, and their headings."""
    shown = formatted(rows, alpha="g")
    return markdown(grouped(shown, list(names), line).rename(columns=names))


TERMS = ("none", "per_token")
TABLES = {  # of each part: the columns that tell its settings apart, and their headings
    "baselines": {"evaluations": "evaluations", "recipe": "recipe", "term": "position term"},
    "distances": {"recipe": "distance", "alpha": "α"},
    "optimizers": {"recipe": "optimizer", "evaluations": "evaluations"},
    "whole": {"head": "read out", "recipe": "distance", "term": "term", "alpha": "α"},
    "seams": {"alpha": "weight of the seams"},
}


def of(rows: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """The rows that have these values."""
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    return rows


def numbers(parts: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """The numbers that the page's sentences have."""
    distances, whole, seams = parts["distances"], parts["whole"], parts["seams"]
    optimizers, baselines = parts["optimizers"], parts["baselines"]
    budgets = sorted(set(baselines.evaluations))
    without, helped = (of(baselines, term=term).groupby(["evaluations", "recipe"]).psnr.max() for term in TERMS)
    best = helped[budgets[-1]]
    late = of(optimizers, evaluations=optimizers.evaluations.max()).groupby("recipe").psnr
    found = {key: int((runs.psnr >= GOOD).sum()) for key, runs in distances.groupby(["recipe", "alpha"])}
    mean = of(whole, head="mean")
    return {
        "without_most": without.max() + 1, "short_most": helped[budgets[0]].max(),
        "gain_least": (best - without[budgets[-1]]).min(), "dlg_best": best["dlg"],
        "with_words": ", ".join(f"{name} {best[name]:.0f} dB" for name in BASELINES),
        "signed_least": late.min()["signed_adam"], "lbfgs_least": late.min()["lbfgs"],
        "adam_most": late.max()["adam"] + 1, "forgetful_least": late.min()[FORGETFUL],
        "l2_good": found["l2", SCALES["l2"]], "l2_unbalanced": found["l2", 1.0],
        "relative_good": found["relative_l2", 1.0], "balanced_good": found["balanced_l2", 1.0],
        "cosine_good": found["cosine", 1.0], "whole_class": of(whole, head="class token", term="whole").psnr.max(),
        "whole_mean": of(mean, term="whole", alpha=1.0).psnr.min(), "none_mean": of(mean, term="none").psnr.max(),
        "tokens_mean": of(mean, term="per_token").psnr.min(), "seams_most": seams[seams.alpha > 0].psnr.max(),
        "seams_without": of(seams, alpha=0.0).psnr.max(),
    }  # fmt: skip


def claims(parts: dict[str, pd.DataFrame], found: dict[str, Any]) -> list[Claim]:
    """What the page says of the numbers."""
    balanced = [found[f"{name}_good"] for name in ("l2", "relative", "balanced", "cosine")]
    adams = (found["adam_most"], found["lbfgs_least"], found["signed_least"], found["forgetful_least"])
    means = (found["none_mean"], found["whole_mean"], found["tokens_mean"])
    return [
        between("no published recipe finds the digit", found["without_most"], most=15),
        between("every recipe gets nearer", found["gain_least"], least=0.5),
        between("finds it", found["dlg_best"], least=GOOD),
        Claim("Plain L2 with α = 1 finds none of six", found["l2_unbalanced"], found["l2_unbalanced"] == 0),
        Claim("not what decides. Six searches", balanced, min(balanced) >= 5),
        between("signed Adam has caught up", found["lbfgs_least"] - found["signed_least"], most=5),
        Claim("more than either", adams, adams[0] < 35 and adams[3] > max(adams[:3])),
        between("nothing at any of the weights", found["whole_class"], most=15),
        Claim("works better", means, means[0] < 20 < 60 < means[1] < means[2]),
        between("It moves nothing", found["seams_most"], most=found["seams_without"] + 1),
    ]


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "fair_matching.csv"
    rows = read(path, Row)
    parts = dict(list(rows.groupby("part")))
    budgets = sorted(set(parts["baselines"].evaluations))
    tables = {f"{part}_table": table(parts[part], **names) for part, names in TABLES.items()}
    seeds = [sorted(set(of(parts["baselines"], evaluations=budget).seed)) for budget in (budgets[0], budgets[-1])]
    fields = tables | origin(path)["settings"] | {
        "short": SHORT, "medium": MEDIUM, "long": budgets[-1], "searches": len(rows), "made": made(path),
        "short_seeds": ", ".join(map(str, seeds[0])), "long_seeds": ", ".join(map(str, seeds[1])),
        "cpu_minutes": rows.cpu_seconds.sum() / 60,
    }  # fmt: skip
    found = numbers(parts)
    return fields | found, claims(parts, found)


def main(argv: Sequence[str] | None = None) -> None:
    options = study_parser("fair_matching", __doc__).parse_args(argv)
    run_study("fair_matching", options, measure=measure, describe=describe)


if __name__ == "__main__":
    main()
