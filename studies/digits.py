"""Which digits does gradient matching find, and what held the others? `python -m studies.digits`
writes digits.csv and digits.md.

Four parts. Held out: twenty digits that nothing was tuned on, by the recipe "april" as it is.
Ablation: twenty others, one start each, with and without the recipe's two cures: the distance that
does not favour weak gradients, and patches put where their tokens' gradients fit. Swapped: ten of
these, the search begun at the private picture itself with two patches exchanged. Starts: one that
needs the new distance, from more noise. No attack learns its PSNR: each stops at a residual or at
the end of its evaluations, and is scored from outside.

MNIST-5k test digits, 28×28 pixels in 16 patches of 7×7; pre-norm ViT of width 128 with 4 blocks and
4 heads, random weights, learned position embedding whose gradient is shared, float64.

    python -m studies.digits            # about half an hour on one thread
    python -m studies.digits --quick    # a digit of each part on a small model; keeps no file
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
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import aprillab as al

from ._rows import fill, made, origin, read
from ._runner import Claim, Description, between, run_study, study_parser
from ._tables import formatted, grouped, markdown

PATCH = 7  # pixels
APRIL = al.RECIPES["april"]
REARRANGE = 30  # evaluations: APRIL's
FOUND, SHARP = 30.0, 100.0  # dB: the digit is there; it is there but for rounding
BUDGET = 1200  # evaluations: 60 s at 20 a second, as one thread makes them with plain autograd
ONE_START = 300  # evaluations of all but the held-out digits
HARD = (700, 1)  # index and seed of a digit that rearranging alone misses
MATCHED, BASIN = 1e-7, 1e-4  # relative residual at which a search ends: some 120 dB; sharp enough to know it is there


# --- What is measured ---------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One search: the digit's index among the test digits (100 a class), and the seeds of
    weights and of noise.
    """

    part: str
    index: int
    seed: int
    noise: int
    distance: str = "balanced_l2"
    rearrange: bool = True


def cases() -> list[Case]:
    victims = [(100 * digit + k, (digit + k) % 2) for k in (0, 1) for digit in range(10)]
    distances = ("relative_l2", "balanced_l2")
    return [
        *(Case("held out", 100 * digit + 90 + seed, seed, seed) for seed in (0, 1) for digit in range(10)),
        *(Case("starts", *HARD, noise, distance) for noise in range(8) for distance in distances),
        *(
            Case("ablation", index, seed, seed, distance, rearrange)
            for index, seed in victims
            for distance in distances
            for rearrange in (False, True)
        ),
        *(Case("swapped", index, seed, seed, rearrange=on) for index, seed in victims[:10] for on in (False, True)),
    ]


@dataclass(frozen=True)
class Row:
    """One search. The columns are explained on the page."""

    part: str
    index: int
    seed: int
    noise: int
    distance: str
    rearrange: bool
    digit: int
    psnr: float
    psnr_rearranged: float
    strength: float
    residual: float
    evaluations: int
    evaluations_to_100: int | None
    cpu_seconds: float
    restarts: int
    stopped: str


def patches_of(picture: Tensor) -> Tensor:
    return al.patchify(picture[None], PATCH)[0]  # (n, p)


def rearranged(picture: Tensor, truth: Tensor) -> Tensor:
    """A picture (C, H, W) with its patches where they fit the truth best, each place used once."""
    patches = patches_of(picture)
    moved, places = linear_sum_assignment((patches[:, None] - patches_of(truth)).square().sum(-1).numpy())
    return al.unpatchify(patches[moved[places.argsort()]][None], PATCH, tuple(truth.shape[1:]))[0]


def swapped(picture: Tensor) -> Tensor:
    """A picture (C, H, W) whose two most different patches have changed places."""
    patches = patches_of(picture)
    far = (patches[:, None] - patches).square().sum(-1)  # (n, n)
    i, j = divmod(int(far.argmax()), len(far))
    patches[[i, j]] = patches[[j, i]]
    return al.unpatchify(patches[None], PATCH, tuple(picture.shape[1:]))[0]


def strength(model: nn.Module, update: al.ClientUpdate, result: al.Reconstruction) -> float:
    """How strong the found pictures' gradients are: the median over tensors of ‖g'‖ / ‖g‖."""
    found = al.client_update(model, result.images, result.labels).gradients
    ratios = [found[name].norm() / shared.norm() for name, shared in update.gradients.items()]
    return float(torch.stack(ratios).median())


def search(sizes: dict[str, int], budget: int, one_start: int, case: Case) -> list[Row]:
    """One case, scored against the private picture."""
    pictures, labels = al.mnist5k("test", dtype=torch.float64)
    pixels, label = pictures[case.index], labels[case.index]
    model = al.VisionTransformer(
        image_size=28, patch_size=PATCH, channels=1, heads=4, classes=10, seed=case.seed, **sizes
    ).double()
    update = al.client_update(model, al.HALF.to_input(pixels[None]), label[None])
    term = al.PositionTerm(rearrange=REARRANGE if case.rearrange else None)
    recipe = replace(APRIL, distance=case.distance, position_term=term)
    held_out, reached = case.part == "held out", []

    def score(entry: dict, images: Tensor) -> None:
        if not reached and float(al.psnr(al.HALF.to_pixels(images)[0], pixels)) >= SHARP:
            reached.append(entry["evaluation"])

    began = time.process_time()
    result = al.match_gradients(
        model, update, recipe=recipe if held_out else replace(recipe, restarts=1), seed=case.noise, callback=score,
        start=al.HALF.to_input(swapped(pixels)[None]) if case.part == "swapped" else "noise",
        max_evaluations=budget if held_out else one_start, tolerance=MATCHED if held_out else BASIN, progress=False,
    )  # fmt: skip
    seconds, numbers = time.process_time() - began, result.diagnostics
    if numbers["stopped"] == "interrupted":  # match_gradients returns its best at Ctrl-C
        raise KeyboardInterrupt
    row = Row(
        **case._asdict(), digit=int(label), psnr=float(al.psnr(result.pixels[0], pixels)),
        psnr_rearranged=float(al.psnr(rearranged(result.pixels[0], pixels), pixels)),
        strength=strength(model, update, result), residual=numbers["residual"], evaluations=numbers["evaluations"],
        evaluations_to_100=reached[0] if reached else None, cpu_seconds=seconds, restarts=len(numbers["restarts"]),
        stopped=numbers["stopped"],
    )  # fmt: skip
    return [row]


def measure(folder: Path, options: argparse.Namespace) -> None:
    todo, settings = cases(), {"width": 128, "depth": 4, "budget": BUDGET, "one_start": ONE_START}
    if options.quick:
        todo = [case for case in todo if case.index in (0, 90) or (case.index == 700 and case.noise == 0)]
        settings = {"width": 32, "depth": 1, "budget": 40, "one_start": 20}
    sizes = {name: settings[name] for name in ("width", "depth")}
    search_one = partial(search, sizes, settings["budget"], settings["one_start"])
    fill(
        folder / "digits.csv", Row, todo, search_one, key=Case._fields, settings=settings, workers=options.workers
    )  # fmt: skip


# --- What is reported ---------------------------------------------------------------------------------------------


def ablation_line(runs: pd.DataFrame) -> dict[str, str]:
    """Of the searches of one setting: how many found the digit, and what the others have found."""
    missed = runs[runs.psnr < FOUND]
    spans = {
        name: f"{missed[name].min():.{digits}f} to {missed[name].max():.{digits}f}" if len(missed) else "–"
        for name, digits in (("psnr", 0), ("psnr_rearranged", 0), ("strength", 2))
    }
    return {"found": f"{len(runs) - len(missed)} of {len(runs)}", **spans}


def held_out_table(rows: pd.DataFrame) -> str:
    names = {
        "digit": "digit", "index": "index", "seed": "seed", "psnr": "dB",
        "evaluations_to_100": "evaluations to 100 dB", "evaluations": "in all",
        "cpu_seconds": "CPU seconds", "restarts": "starts", "stopped": "ended by",
    }  # fmt: skip
    table = formatted(rows[list(names)], psnr=".0f", evaluations_to_100=".0f", cpu_seconds=".0f")
    return markdown(table, list(names.values()))


def ablation_table(rows: pd.DataFrame) -> str:
    shown = rows.assign(rearrange=rows.rearrange.map({True: "yes", False: "no"}))
    table = grouped(shown, ["distance", "rearrange"], ablation_line)
    return markdown(
        table, ["distance", "patches rearranged", "≥ 30 dB", "missed: dB", "in their places", "‖g'‖ / ‖g‖"]
    )


def describe_held_out(runs: pd.DataFrame) -> dict[str, Any]:
    sharp, dull = runs[runs.psnr > SHARP], runs.loc[runs.psnr <= SHARP, ["index", "psnr"]]
    return {
        "sharp": len(sharp), "held_out": len(runs), "lowest": runs.psnr.min(), "held_out_table": held_out_table(runs),
        "missed": ", ".join(f"{index} ({psnr:.0f} dB)" for index, psnr in dull.values) or "none",
        "median_to_100": sharp.evaluations_to_100.median(), "most_to_100": sharp.evaluations_to_100.max(),
        "most": runs.evaluations.max(), "most_seconds": runs.cpu_seconds.max(),
        "rate": runs.evaluations.sum() / runs.cpu_seconds.sum(),
    }  # fmt: skip


def describe_ablation(runs: pd.DataFrame) -> dict[str, Any]:
    found = {key: int((group.psnr >= FOUND).sum()) for key, group in runs.groupby(["distance", "rearrange"])}
    order = runs[(runs.psnr < FOUND) & (runs.distance == "balanced_l2") & ~runs.rearrange]  # the distance alone
    return {
        "victims": len(runs) // max(len(found), 1), "ablation_table": ablation_table(runs),
        "old": found.get(("relative_l2", False)), "distance_alone": found.get(("balanced_l2", False)),
        "rearranging_alone": found.get(("relative_l2", True)), "both": found.get(("balanced_l2", True)),
        "lifted": (order.psnr_rearranged - order.psnr).median(),
    }  # fmt: skip


def describe_starts(swapped_runs: pd.DataFrame, runs: pd.DataFrame) -> dict[str, Any]:
    good, weak = runs[runs.psnr >= FOUND], runs[(runs.psnr < FOUND) & (runs.distance == "relative_l2")]
    back = swapped_runs[swapped_runs.psnr >= FOUND]
    return {
        "kept": int((~back.rearrange).sum()), "moved": int(back.rearrange.sum()), "exchanged": len(swapped_runs) // 2,
        "some": int((good.distance == "relative_l2").sum()), "all": int((good.distance == "balanced_l2").sum()),
        "starts": len(runs) // 2, "weak": weak.strength.median(), "weak_psnr": weak.psnr.median(),
        "weak_rearranged": weak.psnr_rearranged.median(),
    }  # fmt: skip


def claims_of(found: dict[str, Any]) -> list[Claim]:
    single = (found["old"], found["rearranging_alone"], found["distance_alone"])
    places = (found["kept"], found["moved"], found["exchanged"])
    starts = (found["some"], found["all"], found["starts"])
    return [
        Claim("every digit", found["sharp"], found["sharp"] == found["held_out"] == 20),
        between("within the evaluations of 60 s", found["most"], most=BUDGET + 1),
        Claim("neither is enough", (*single, found["both"]), max(single) < found["both"]),
        Claim("both find all", found["both"], found["both"] == found["victims"]),
        Claim("the new distance by itself finds fewer than before", single, single[2] < single[0]),
        between("patches that are nearly right stand in the wrong place", found["lifted"], least=5),
        Claim("every one does", places, places[0] < places[1] == places[2]),
        between("gradients are weak", found["weak"], most=0.8),
        Claim("from every one of them", starts, starts[0] < starts[1] == starts[2]),
    ]


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "digits.csv"
    parts = dict(list(read(path, Row).groupby("part")))
    found = describe_held_out(parts["held out"]) | describe_ablation(parts["ablation"])
    found |= describe_starts(parts["swapped"], parts["starts"])
    return found | origin(path)["settings"] | {"made": made(path)}, claims_of(found)


def main(argv: Sequence[str] | None = None) -> None:
    options = study_parser("digits", __doc__).parse_args(argv)
    run_study("digits", options, measure=measure, describe=describe)


if __name__ == "__main__":
    main()
