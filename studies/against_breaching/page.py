"""The page: rates, races, and what they say about the two goals."""

from __future__ import annotations

import argparse
import math
from itertools import starmap
from pathlib import Path

import pandas as pd

from .._rows import made, origin, read
from .._runner import Claim, Description, between
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


def ratio_of(rates: pd.DataFrame, dtype: str) -> float:
    """Evaluations per processor second of ours over breaching's, with the same objective and optimizer."""
    rate = rates.groupby(["side", "attack", "dtype"]).cpu_rate.median()
    return rate["aprillab", "inverting_gradients", dtype] / rate["breaching", "invertinggradients", dtype]


def _rate_verdict(dtype: str, ratio: float) -> str:
    goal = f"the goal of 1.5 is {'met' if ratio >= 1.5 else 'missed'}"
    rate = "- Evaluations per second with the same objective and optimizer"
    return f"{rate}, {dtype}: {ratio:.2f} times breaching's; {goal}."


def raced(runs: pd.DataFrame) -> dict[str, str]:
    """What one attack did on its digits."""
    reached = runs[runs.cpu_to_bar.map(math.isfinite)]
    return {
        "digits": str(len(runs)),
        f"{BAR:.0f} dB": f"{len(reached)} of {len(runs)}",
        "processor s to it": f"{reached.cpu_to_bar.median():.1f}" if len(reached) else "–",
        "at most": f"{reached.cpu_to_bar.max():.1f}" if len(reached) else "–",
        "evaluations": f"{runs.evaluations.min():.0f} to {runs.evaluations.max():.0f}",
        "processor s in all": f"{runs.cpu.min():.0f} to {runs.cpu.max():.0f}",
        "best on the way, dB": f"{runs.best_psnr.max():.1f}",
    }


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "against_breaching.csv"
    runs, settings = read(path, Run), origin(path)["settings"]
    rates, races = (runs[runs.part == part] for part in ("rate", "race"))
    base, ours = base_rates(rates), races[races.side == "aprillab"]
    theirs = races[races.side == "breaching"]
    signed = theirs[theirs.attack == "invertinggradients"]
    ratios = {dtype: ratio_of(rates, dtype) for dtype in ("float32", "float64")}
    times = {digit: runs.cpu.max() for digit, runs in signed.groupby("digit")}
    longer = min(
        times[digit] / least for digit, least in zip(ours.digit, ours.cpu_to_bar, strict=True) if digit in times
    )
    fields = settings | {
        "made": made(path), "version": runs.version[runs.side == "breaching"].max(), "bar": BAR,
        "changed": "; ".join(f"{name}: `{' '.join(changes)}`" for name, (_, changes) in THEIRS.items() if changes),
        "verdicts": "\n".join(starmap(_rate_verdict, ratios.items())),
        "rounds": rates["round"].nunique(), "rates": rates_table(rates), "races": races_table(races),
        "attacks": markdown(grouped(races, ("side", "attack", "dtype"), raced).rename(columns={"side": "package"})),
        "digits": ours.digit.nunique(), "median": f"{ours.cpu_to_bar.median():.1f}",
        "slowest": f"{ours.cpu_to_bar.max():.1f}", "signed": signed.digit.nunique(),
        "steps": f"{signed.evaluations.min():.0f}", "longer": f"{longer:.0f}",
    }  # fmt: skip
    return fields, [
        Claim("the same objective and optimizer", base.to_dict(), len(base) == 2 and bool(base.notna().all())),
        between("ours finds every digit", ours.cpu_to_bar.max(), most=60),
        between("none of breaching's finds one", theirs.best_psnr.max(), most=BAR),
        between("times as long", longer, least=10),
    ]
