"""The page: rates, races, and what they say about the two goals."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pandas as pd

from .._rows import made, origin, read
from .._runner import Claim, Description
from .._tables import formatted, grouped, markdown
from .measure import BAR, Run
from .worker import THEIRS

RATE, CLOCK = "evaluations per processor second", "per second of the clock"
RATIO = "against breaching's invertinggradients, same dtype"
RACE = {
    "digit": "digit", "side": "package", "attack": "attack", "dtype": "dtype", "evaluations": "evaluations",
    "cpu": "processor s", "psnr": "PSNR of the result, dB", "best_psnr": "best on the way",
    "cpu_to_bar": f"processor s to {BAR:.0f} dB", "wall_to_bar": f"clock s to {BAR:.0f} dB",
}  # fmt: skip


def base_rates(rates: pd.DataFrame) -> pd.Series:
    """breaching's evaluations per second with invertinggradients, by dtype."""
    theirs = rates[(rates.side == "breaching") & (rates.attack == "invertinggradients")]
    return theirs.groupby("dtype").cpu_rate.median()


def rates_table(rates: pd.DataFrame) -> str:
    """Medians over the rounds, and their ratio to breaching's same objective and dtype."""
    base = base_rates(rates)

    def line(runs: pd.DataFrame) -> dict[str, str | None]:
        if runs.cpu_rate.isna().all():
            return {RATE: "fails", CLOCK: None, RATIO: f"`{runs.error.iloc[0]}`"}
        rate, ratio = runs.cpu_rate.median(), runs.cpu_rate.median() / base[runs["dtype"].iloc[0]]
        return {RATE: f"{rate:.1f}", CLOCK: f"{runs.wall_rate.median():.1f}", RATIO: f"{ratio:.2f}"}

    return markdown(grouped(rates, ("side", "attack", "dtype"), line).rename(columns={"side": "package"}))


def races_table(races: pd.DataFrame) -> str:
    tenths = dict.fromkeys(("psnr", "best_psnr", "cpu_to_bar", "wall_to_bar"), ".1f")
    table = formatted(races, evaluations=".0f", cpu=".0f", **tenths)[list(RACE)]
    return markdown(table.replace("inf", "never").rename(columns=RACE))


def verdicts(rates: pd.DataFrame, races: pd.DataFrame, seconds: float) -> list[str]:
    """What the tables say about the two goals."""
    lines = []
    rate = rates.groupby(["side", "attack", "dtype"]).cpu_rate.median()
    for dtype in ("float32", "float64"):
        ratio = rate["aprillab", "inverting_gradients", dtype] / rate["breaching", "invertinggradients", dtype]
        lines.append(
            f"- Evaluations per second with the same objective and optimizer, {dtype}: {ratio:.2f} times "
            f"breaching's; the goal of 1.5 is {'met' if ratio >= 1.5 else 'missed'}."
        )
    for digit, runs in races.groupby("digit", sort=False):
        ours, theirs = (runs[runs.side == side] for side in ("aprillab", "breaching"))
        least = ours.cpu_to_bar.min()
        best = theirs.sort_values(["cpu_to_bar", "best_psnr"], ascending=[True, False]).iloc[0]
        if math.isinf(least):
            lines.append(f"- Digit {digit}: ours did not reach {BAR:.0f} dB in {seconds:.0f} s of the processor.")
            continue
        line = f"- Digit {digit}: ours reaches {BAR:.0f} dB after {least:.1f} s of the processor, "
        if math.isinf(best.cpu_to_bar):
            line += (
                f"none of breaching's attacks in the {theirs.cpu.max():.0f} s they had (the best picture, "
                f"{best.attack} in {best['dtype']}, {best.best_psnr:.1f} dB): more than "
                f"{theirs.cpu.max() / least:.1f} times as long. The goal is 10."
            )
        else:
            line += (
                f"breaching's fastest ({best.attack}, {best['dtype']}) after {best.cpu_to_bar:.1f} s: "
                f"{best.cpu_to_bar / least:.1f} times as long. The goal is 10."
            )
        lines.append(line)
    return lines


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "against_breaching.csv"
    runs, settings = read(path, Run), origin(path)["settings"]
    rates, races = (runs[runs.part == part] for part in ("rate", "race"))
    base = base_rates(rates)
    return settings | {
        "made": made(path), "version": runs.version[runs.side == "breaching"].max(), "bar": BAR,
        "changed": "; ".join(f"{name}: `{' '.join(changes)}`" for name, (_, changes) in THEIRS.items() if changes),
        "verdicts": "\n".join(verdicts(rates, races, settings["seconds"])), "rounds": rates["round"].nunique(),
        "rates": rates_table(rates), "races": races_table(races),
    }, [Claim("the same objective and optimizer", base.to_dict(), len(base) == 2 and base.notna().all())]  # fmt: skip
