"""Several updates of one picture: a narrow model inverted from two rounds, and what rounds
gain against noise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from torch import nn

import aprillab as al
from aprillab import viz

from .._rows import fill, made, read
from .._runner import Claim, Description, between
from .._tables import grouped, markdown
from .clients import only, pixels_of, played, update_of

FILE = "sharing_less_rounds.csv"
ROUNDS, AVERAGED = (1, 2, 3, 6), (1, 4, 16, 64)
SIGMAS = (1e-5, 1e-4, 1e-3)
NOISY_VICTIMS = ("astronaut", "coffee", "retina", "coins")
RATE, NOISY_RATE = 0.1, 0.01  # of the server's step
DELTA = 1e-5
NARROW = "DeiT-Ti/16 at 224"
SMALL = "32×32, patch 4, d = 192"
_SHAPES: dict[str, dict[str, int]] = {
    NARROW: {"image_size": 224, "patch_size": 16, "width": 192, "depth": 12, "heads": 3, "classes": 1000},
    SMALL: {"image_size": 32, "patch_size": 4, "width": 192, "depth": 4, "heads": 3, "classes": 10},
}


class Case(NamedTuple):
    """One client's picture and noise; its rows are the numbers of rounds."""

    model: str
    victim: str
    sigma: float


@dataclass(frozen=True)
class Row:
    """One attack; ``epsilon`` is what the rounds cost in privacy, at δ = 1e-5.

    ``promised`` is the PSNR in dB of one round under noise σ/√T: what averaging alone would give.
    """

    model: str
    victim: str
    sigma: float
    rounds: int
    epsilon: float | None = None
    promised: float | None = None
    psnr: float | None = None
    predicted_psnr: float | None = None
    exact: bool | None = None
    seconds: float | None = None
    note: str = ""


def cases(quick: bool) -> Iterator[Case]:
    victims, noisy = (al.victims()[:1], NOISY_VICTIMS[:1]) if quick else (al.victims(), NOISY_VICTIMS)
    yield from (Case(NARROW, victim, 0.0) for victim in victims)
    yield from (Case(SMALL, victim, sigma) for sigma in SIGMAS for victim in noisy)


def attacked(case: Case) -> Iterator[Row]:
    """The first rounds of one client, attacked together, for several numbers of rounds."""
    model, sent = (al.VisionTransformer(**_SHAPES[case.model], seed=0) for _ in range(2))
    anatomy, noisy = al.dissect(model), case.sigma > 0
    # What the patch-embedding system reads, and the head for the label: the rest would
    # fill the memory.
    kept = {*anatomy.tensor_names()} if noisy else None
    sigma, numbers, rate = (case.sigma, AVERAGED, NOISY_RATE) if noisy else (None, ROUNDS, RATE)
    found: list[al.Round] = []
    for one in played(sent, anatomy, case.victim, max(numbers), rate=rate, sigma=sigma, kept=kept):
        found.append(one)
        if (T := len(found)) not in numbers:
            continue
        row = Row(*case, rounds=T)
        if noisy:
            row = replace(row, epsilon=epsilon_of(case.sigma, T), promised=promised(model, case, T, kept))
        try:
            # Under noise the replay has nothing to say: most tensors are not kept.
            result = al.embedding_closed_form(model, found, anatomy=anatomy, verify=not noisy, strict=False)
        except al.AttackNotApplicable as refusal:
            yield replace(row, note=f"refused: {refusal.reason}")
            continue
        yield replace(
            row, psnr=_psnr(result, case.victim, anatomy), predicted_psnr=result.predicted_psnr, exact=result.exact,
            seconds=result.seconds, note="" if result.exact else result.reason,
        )  # fmt: skip


def promised(model: nn.Module, case: Case, rounds: int, kept: set[str] | None) -> float:
    """The PSNR of the first round under noise σ/√T, of another seed."""
    anatomy = al.dissect(model)
    update = al.defenses.clip(update_of(model, anatomy, pixels_of(case.victim, anatomy)), 1.0)
    update = only(al.defenses.gaussian_noise(update, case.sigma / math.sqrt(rounds), seed=10_000 + rounds), kept)
    return _psnr(al.embedding_closed_form(model, update, verify=False, strict=False), case.victim, anatomy)


def _psnr(result: al.Reconstruction, victim: str, anatomy: al.Anatomy) -> float:
    return float(al.psnr(result.pixels[0], pixels_of(victim, anatomy)[0].double()))


def epsilon_of(sigma: float, rounds: int, delta: float = DELTA) -> float:
    """ε of so many Gaussian mechanisms of sensitivity 1 and deviation σ, together: one with σ/√T.

    By the exact condition of Balle and Wang (ICML 2018, Theorem 8); in logarithms, for ε may be
    10⁵.

    >>> round(epsilon_of(1.0, 1), 2), round(epsilon_of(0.1, 1)), round(epsilon_of(2.0, 4), 2)
    (4.38, 92, 4.38)
    """
    mu = math.sqrt(rounds) / sigma

    def excess(epsilon: float) -> float:
        a, b = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return float(ndtr(a)) - math.exp(epsilon + float(log_ndtr(b))) - delta

    return float(brentq(excess, 0.0, mu**2 / 2 + 20 * mu + 20, xtol=1e-9 * mu**2 + 1e-9))


def measure(folder: Path, options: argparse.Namespace) -> None:
    fill(folder / FILE, Row, cases(options.quick), attacked, key=Case._fields, workers=options.workers)


# --- Its share of the page ----------------------------------------------------------------------------------------


def by_rounds(group: pd.DataFrame) -> dict[str, str]:
    """The table's cells for so many rounds."""
    done = group[group.psnr.notna()]
    if done.empty:
        return {"runs": str(len(group)), "median dB": "refused"}
    return {
        "runs": str(len(done)), "median dB": f"{done.psnr.median():.1f}", "least": f"{done.psnr.min():.1f}",
        "most": f"{done.psnr.max():.1f}", "predicted": f"{done.predicted_psnr.median():.1f}",
        "exact": f"{done.exact.eq(True).sum()}", "attack s": f"{done.seconds.median():.1f}",
    }  # fmt: skip


def noise_table(noisy: pd.DataFrame) -> pd.DataFrame:
    """For each σ and number of rounds: the median PSNR, that of one round under σ/√T, and ε."""
    lines = []
    for (sigma, rounds), group in noisy.groupby(["sigma", "rounds"]):
        epsilon = group.epsilon.iloc[0]
        lines.append(
            {
                "σ": f"{sigma:g}", "rounds T": f"{rounds}", "median dB": f"{group.psnr.median():.1f}",
                "one round, σ/√T": f"{group.promised.median():.1f}",
                "predicted dB": f"{group.predicted_psnr.median():.1f}", "ε at δ = 1e-5": f"{epsilon:.3g}",
            }
        )  # fmt: skip
    return pd.DataFrame(lines)


def describe(folder: Path, options: argparse.Namespace) -> Description:
    rows = read(folder / FILE, Row)
    clean, noisy = rows[rows.sigma == 0], rows[rows.sigma > 0]
    medians = clean.groupby("rounds").psnr.median()
    one, two, six = (float(medians.get(number, math.nan)) for number in (1, 2, 6))
    ahead = {sigma: (group.psnr - group.promised).median() for sigma, group in noisy.groupby("sigma")}
    several = noisy[noisy.rounds.gt(1) & noisy.sigma.isin(SIGMAS[:-1])].assign(gain=noisy.psnr - noisy.promised)
    worst = several.groupby(["sigma", "rounds"]).gain.median().min()
    seen = min((ahead.get(sigma, math.nan) for sigma in SIGMAS[:-1]), default=math.nan)
    wrong = rows[rows.exact.eq(True) & ~(rows.psnr >= al.EXACT_TO_8_BITS_DB)]
    fields = {
        "rounds_made": made(folder / FILE), "rounds": markdown(grouped(clean, ("model", "rounds"), by_rounds)),
        "noise": markdown(noise_table(noisy)), "rounds_one": one, "rounds_two": two, "rounds_six": six,
        "noise_ahead": seen, "noise_worst": worst, "noise_lost": ahead.get(SIGMAS[-1], math.nan),
        "noise_epsilon": epsilon_of(SIGMAS[-1], 1), "noise_epsilon_64": epsilon_of(SIGMAS[-1], 64),
        "noise_optimistic": (noisy.predicted_psnr - noisy.psnr).max(),
    }  # fmt: skip
    return fields, [
        between("Two rounds give {rounds_two:.0f} dB", two, least=70),
        between("six {rounds_six:.0f}", six, least=85),
        between("One update does not determine the picture", clean[clean.rounds == 1].exact.eq(True).sum(), most=0.5),
        between("at least what averaging promises", seen, least=0),
        between("at the least favourable", worst, least=-2),
        between("rounds fall behind what averaging promises", ahead.get(SIGMAS[-1], math.nan), most=0),
        Claim("and none of these is called exact below 58.9 dB", len(wrong), wrong.empty),
    ]  # fmt: skip


# --- Its panels of the figure -------------------------------------------------------------------------------------


def panel_of_rounds(ax: Axes, folder: Path) -> None:
    """PSNR over rounds, a line a victim and their median."""
    clean = read(folder / FILE, Row).query("sigma == 0 and psnr == psnr")
    for _, one in clean.groupby("victim"):
        ax.plot(one.rounds, one.psnr, color="0.8", linewidth=0.8, zorder=1)
    medians = clean.groupby("rounds").psnr.median()
    ax.plot(medians.index, medians, color=viz.COLOURS["blue"], marker="o", markersize=5, linewidth=2)
    ax.axhline(al.EXACT_TO_8_BITS_DB, color="0.5", linestyle=":", linewidth=1)
    ax.set(xlabel="rounds", ylabel="PSNR in dB", title=NARROW, xticks=ROUNDS, ylim=(0, 145))


def panel_of_noise(ax: Axes, folder: Path) -> None:
    """Median PSNR over rounds for each σ; dashed, one round under σ/√T."""
    noisy = read(folder / FILE, Row).query("sigma > 0 and psnr == psnr")
    looks = zip(("green", "orange", "red"), "sD^", strict=True)
    for (sigma, group), (colour, marker) in zip(noisy.groupby("sigma"), looks, strict=False):
        medians = group.groupby("rounds")[["psnr", "promised"]].median()
        line = {"color": viz.COLOURS[colour], "label": f"σ = $10^{{{round(math.log10(float(sigma)))}}}$"}
        ax.plot(medians.index, medians.psnr, marker=marker, markersize=5, **line)
        ax.plot(medians.index, medians.promised, color=viz.COLOURS[colour], linestyle="--", linewidth=1, zorder=0)
    ax.set_xscale("log")
    ax.set(xlabel="rounds", title="under noise, norm ≤ 1", xticks=AVERAGED, ylim=(5, 45))
    ax.set_xticks(AVERAGED, map(str, AVERAGED))
    ax.minorticks_off()
    ax.legend(loc="upper left", fontsize=9, handletextpad=0.4, frameon=False)
