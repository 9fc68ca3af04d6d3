"""The rows of the grid by cell, and the page's tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aprillab.privacy import unbiased_mse_bound

from .._rows import read
from .._tables import markdown
from .bounds import INFORMATION_FILE, MATCHING_FILE, Information, Matching
from .clients import MEANINGS, NOISE, STRENGTHS, TOGETHER
from .grid import FILE, Row
from .victims import DIGITS, PHOTOGRAPHS, TRAINED, UNTRAINED

#: The worlds of the tables, and their names there.
WORLDS = {
    (DIGITS, UNTRAINED): "digits", (DIGITS, TRAINED): "digits, trained", (PHOTOGRAPHS, UNTRAINED): "photographs",
}  # fmt: skip
WAYS = {"rank_picture": "picture", "rank_features": "features", "rank_gradients": "gradients"}
FEW = 0.1  # share named below which a way of naming counts as stopped: chance is a hundredth


def grid_rows(folder: Path) -> pd.DataFrame:
    """The grid's file, by :func:`with_blind_guesses`."""
    return with_blind_guesses(read(folder / FILE, Row))


def with_blind_guesses(rows: pd.DataFrame) -> pd.DataFrame:
    """An update of which no attack made a picture counts as the blind guess, and names nobody by
    it.
    """
    rows, nothing = rows.copy(), rows.psnr.isna()
    rows["shown"] = rows.psnr.where(~nothing, rows.blind)
    rows["rank_picture"] = rows.rank_picture.where(~nothing, 50.5)
    return rows


def of(rows: pd.DataFrame, **chosen: Any) -> pd.DataFrame:
    """The rows with these values."""
    for name, value in chosen.items():
        rows = rows[rows[name] == value]
    return rows


def of_world(rows: pd.DataFrame, world: tuple[str, str]) -> pd.DataFrame:
    return of(rows, world=world[0], when=world[1])


def most_seen(rows: pd.DataFrame) -> float:
    """The greatest PSNR of a victim, and in a batch or sum of any picture in it."""
    together = rows.defence.isin(TOGETHER)
    return float(rows.shown.where(~together, rows.nearest).max())


def named(rows: pd.DataFrame, way: str) -> float:
    """Share of the victims that are named first of the gallery."""
    return float((rows[way] == 1).mean()) if len(rows) else math.nan


def decibels(mse: float) -> float:
    return -10 * math.log10(mse) if mse > 0 else math.inf


# --- Tables by defence --------------------------------------------------------------------------------------------


def by_defence(rows: pd.DataFrame, defences: Sequence[str]) -> str:
    """A line for each strength: PSNR median and greatest, SSIM, and the three shares, in each
    world.
    """
    lines = []
    for defence in defences:
        for strength in STRENGTHS[defence]:
            cell = of(rows, defence=defence, strength=strength)
            if len(cell):
                lines.append(_line(defence, strength, cell, several=len(defences) > 1))
    return markdown(pd.DataFrame(lines).dropna(axis=1, how="all"))


def _line(defence: str, strength: float, cell: pd.DataFrame, *, several: bool) -> dict[str, Any]:
    noisy = cell.epsilon.notna().any()
    found: dict[str, Any] = {"defence": defence} if several else {}
    found |= {MEANINGS[defence] if not several else "strength": f"{strength:g}"}
    found["ε"] = _short(cell.epsilon.iloc[0]) if noisy else None
    for world, name in WORLDS.items():
        here = of_world(cell, world)
        if not len(here):
            continue
        most, without = most_seen(here), int(here.psnr.isna().sum())
        found[f"{name}: dB"] = f"{here.shown.median():.1f} ({most:.1f})" + (f", {without} none" if without else "")
        found[f"SSIM, {name}"] = f"{here.ssim.median():.2f}" if here.ssim.notna().any() else "–"
        found[f"named, {name}"] = " / ".join(f"{100 * named(here, way):.0f}" for way in WAYS)
    return found


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def beyond_pictures(rows: pd.DataFrame) -> str:
    """For each defence and world the least strength that leaves no name in the picture, and
    what is left then.
    """
    return markdown(pd.DataFrame(list(_ends(rows))))


def _ends(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for defence, strengths in STRENGTHS.items():
        if defence == "none":
            continue
        line: dict[str, Any] = {"defence": defence, "strength is": MEANINGS[defence]}
        for world, name in WORLDS.items():
            here = of_world(of(rows, defence=defence), world)
            line[name] = _end(here, strengths)
        yield line


def stopped_at(rows: pd.DataFrame, strengths: Sequence[float], way: str = "rank_picture") -> float | None:
    """The first strength from which on at most a tenth is named in this way; None if there is none."""
    found = None
    for strength in reversed(strengths):
        if not named(of(rows, strength=strength), way) <= FEW:
            break
        found = strength
    return found


def _end(rows: pd.DataFrame, strengths: Sequence[float]) -> str:
    strength = stopped_at(rows, strengths)
    if strength is None:
        return "not stopped"
    cell = of(rows, strength=strength)
    left = f"{100 * named(cell, 'rank_features'):.0f} / {100 * named(cell, 'rank_gradients'):.0f} %"
    return f"{strength:g}; named all the same {left}"


# --- Bounds -------------------------------------------------------------------------------------------------------


def bounds_table(folder: Path, rows: pd.DataFrame, world: tuple[str, str]) -> str:
    """σ for σ: decibels of the lines that theory draws, what the attacker reached, and names."""
    information = of_world(read(folder / INFORMATION_FILE, Information), world)
    matching = of_world(read(folder / MATCHING_FILE, Matching), world)
    noisy = of_world(of(rows, defence=NOISE), world)
    return markdown(pd.DataFrame([_bound(s, information, of(matching, sigma=s), of(noisy, strength=s))
                                  for s in sorted(noisy.strength.unique())]))  # fmt: skip


def _bound(sigma: float, information: pd.DataFrame, matching: pd.DataFrame, noisy: pd.DataFrame) -> dict[str, Any]:
    def line(mse: float) -> str:
        return f"{decibels(mse * sigma**2):.1f}"

    hcr = unbiased_mse_bound(sigma)
    return {
        "σ": f"{sigma:g}",
        "ε": _short(noisy.epsilon.iloc[0]),
        "reached: median (most) dB": f"{noisy.shown.median():.1f} ({noisy.shown.max():.1f})",
        "chosen model dB": line(information.chosen.median()),
        "this model, whole dB": line(information.cramer_rao.median())
        if information.cramer_rao.notna().any()
        else None,
        "this model, mean dB": line(information.mean_bound.median()),
        "any model dB": f"{decibels(hcr):.1f}" if hcr else "∞",
        "named in the grid %": f"{100 * named(noisy, 'rank_gradients'):.0f}",
        "best attacker %": f"{100 * float(np.mean(matching.rate)):.1f}",
        "no attacker above %": f"{100 * matching.bound.iloc[0]:.1f}",
    }
