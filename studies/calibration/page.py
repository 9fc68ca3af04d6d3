"""The page of the study: its tables and its claims."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from aprillab.attacks.grey_levels import grid as grids
from aprillab.attacks.grey_levels import rounds

from .._rows import made, read
from .._runner import Claim, Description
from .._tables import markdown
from .measure import Row
from .plan import DECIDED, DITHERED, HARD, LARGE, UNDECIDED

FEW_WHOLE = tuple(map(str, (*DECIDED, *LARGE, HARD)))  # settings in which a rounding can be right
NAMES = {"inf": "none", "largest distance": "NEAR up to", "ratio": "RATIO", "misfit": "MISFIT", "far": "FAR"}


def total(rows: pd.DataFrame, quantity: str, at: float | None = None, settings: Iterable[str] = FEW_WHOLE) -> float:
    """A quantity summed over settings."""
    found = rows[(rows.quantity == quantity) & rows.setting.isin(list(settings))]
    return float((found if at is None else found[found["at"] == at]).value.sum())


def values(rows: pd.DataFrame, quantity: str) -> pd.Series:
    """A quantity of all settings, by setting."""
    return rows[rows.quantity == quantity].set_index("setting").value


def tried(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each value of each constant: settled rightly and wrongly."""
    lines = []
    right = rows[rows.quantity.str.endswith(": right")]
    for quantity, at in dict.fromkeys(zip(right.quantity, right["at"], strict=True)):
        name = quantity.removesuffix(": right")
        line = {"constant": NAMES.get(name, name.upper()), "value": "none" if math.isinf(at) else f"{at:g}"}
        line["right"], line["wrong"] = (f"{total(rows, f'{name}: {what}', at):.0f}" for what in ("right", "wrong"))
        if not (undecided := rows[rows.setting == str(UNDECIDED)]).empty:
            line["wrong, 12 pixels"] = f"{total(undecided, f'{name}: wrong', at, [str(UNDECIDED)]):.0f}"
        lines.append(line)
    return pd.DataFrame(lines)


def wide(rows: pd.DataFrame, form: str) -> pd.DataFrame:
    """A line for each setting, a column for each quantity and where it was measured."""
    names = [q if pd.isna(at) else f"{q} {at:g}" for q, at in zip(rows.quantity, rows["at"], strict=True)]
    table = rows.assign(name=names).groupby(["setting", "name"], sort=False).value.mean().unstack(sort=False)
    return table.map(form.format, na_action="ignore").reset_index()


# --- The claims of the template ---------------------------------------------------------------------


def counted(rows: pd.DataFrame, name: str, what: str, ats: Iterable[float]) -> dict[float, float]:
    """How many were settled ("right" or "wrong"), by the value of a constant."""
    return {at: total(rows, f"{name}: {what}", at) for at in ats}


def margin_claims(spans: pd.DataFrame, margins: pd.DataFrame) -> list[Claim]:
    median, largest = (values(spans, f"unsure: {what} ratio").max() for what in ("median", "largest"))
    right = counted(margins, "too_sure", "right", (1.0, 5.0, 20.0, 80.0))
    plateau = [right[at] for at in (5.0, 20.0, 80.0)]
    wrong = margins[margins.quantity.str.endswith(": wrong")].value.sum()
    return [
        Claim("is a typical one and no bound", (median, largest), median > 10 and largest > 100),
        Claim("Without a factor (1) fewer patches are settled", right, right[1.0] < right[20.0]),
        Claim("from 5 to 80 nearly the same", right, max(plateau) - min(plateau) <= 3),
        Claim("nothing is settled wrongly at any value", wrong, wrong == 0),
    ]


def rounding_claims(spans: pd.DataFrame, near: pd.DataFrame, alone: pd.DataFrame) -> list[Claim]:
    far = counted(near, "far", "wrong", (1.5, 2.0, math.inf))
    more, wrong = (counted(near, "largest distance", what, (16.0, 64.0)) for what in ("right", "wrong"))
    truth = values(spans, "misfit of the truth: largest").max()
    dithered = values(alone, "misfit of what is wrong: least").filter(items=[str(one) for one in DITHERED]).min()
    misfit = [
        counted(rows, "misfit", what, (rounds.MISFIT, math.inf))
        for rows in (near, alone)
        for what in ("right", "wrong")
    ]
    settled_wrongly = total(near, "ratio: wrong", rounds.RATIO)
    return [
        Claim("Near a search's pictures none was settled wrongly", settled_wrongly, settled_wrongly == 0),
        Claim("up to twice the distance none is wrong", far, far[1.5] == far[2.0] == 0 < far[math.inf]),
        Claim("would settle more, and none wrongly", (more, wrong), more[64.0] > more[16.0] and wrong[64.0] == 0),
        Claim("The truth's own misfit passes the bound", truth, truth > rounds.MISFIT),
        Claim("nearest whole patches is larger by far", dithered, dithered > 100 * truth),
        Claim("was turned away by it", misfit, all(len(set(each.values())) == 1 for each in misfit)),
    ]


def lattice_claims(lattice: pd.DataFrame) -> list[Claim]:
    within = lattice[(lattice.quantity == "truth within") & (lattice["at"] == 3)].value.min()
    width = {at: total(lattice, "right by width", at, [str(HARD)]) for at in (1.0, 100.0, 500.0, 2000.0)}
    others = lattice[(lattice.quantity == "right by width") & (lattice.setting != str(HARD))]
    slack = lattice[lattice.quantity == "right by slack"]
    return [
        Claim("99 % of the truth's coordinates and more", within, within > 0.99),
        Claim(
            "A wider search finds more in the hardest setting",
            width,
            list(width.values()) == sorted(set(width.values())),
        ),
        Claim("nothing more in the others", None, bool((others.groupby("setting").value.nunique() == 1).all())),
        Claim("SLACK makes no difference", None, bool((slack.groupby("setting").value.nunique() == 1).all())),
    ]


def replay_claims(replay: pd.DataFrame) -> list[Claim]:
    rounding = values(replay, "rounding: largest").max()
    whole, pixel = (
        values(replay, f"one wrong level, {how}: least").min()
        for how in ("patch embedding as a whole", "pixel by pixel")
    )
    return [
        Claim("is lost in the patch embedding's gradient as a whole", whole, whole < rounds.ROUNDING),
        Claim("pixel by pixel it stands out", (rounding, pixel), rounding < rounds.ROUNDING < pixel),
    ]


def length_claims(lengths: pd.DataFrame) -> list[Claim]:
    psnr = lengths.groupby(["setting", "quantity", "at"], dropna=False).value.mean().reset_index()
    rules = psnr[psnr["at"].isna()].pivot(index="setting", columns="quantity", values="value")
    own = psnr.setting.map(rules["dB, √(τ/2)"])
    known = (psnr.value - own)[psnr.quantity == "dB, known"].abs().max()
    worst = rules.idxmin(axis=1)
    return [
        Claim("The lengths τ do worst in both", rules.to_dict(), bool((worst == "dB, τ").all())),
        Claim("KNOWN makes no difference", known, known < 1),
    ]


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "calibration.csv"
    frame = read(path, Row)
    part = dict(list(frame.groupby("part", sort=False)))
    spans, near, alone = part["deviations"], part["near"], part["alone"]
    unsure = values(spans, "unsure: median ratio"), values(spans, "unsure: largest ratio")
    fields: dict[str, Any] = {
        "made": made(path), "too_sure": grids.TOO_SURE, "misfit": rounds.MISFIT,
        "median": unsure[0].max(), "largest": unsure[1].max(),
        "deviations": markdown(wide(spans, "{:.3g}")),
        "margins": markdown(tried(part["margins"])), "near": markdown(tried(near)), "alone": markdown(tried(alone)),
        "near_patches": f"{total(near, 'patches'):.0f}", "alone_patches": f"{total(alone, 'patches'):.0f}",
        "truth_misfit": values(spans, "misfit of the truth: largest").max(),
        "far_wrong": total(near, "far: wrong", math.inf),
        "lattice": markdown(wide(part["lattice"], "{:.3g}")),
        "candidates": markdown(wide(part["candidates"], "{:.2g}")),
        "replay": markdown(wide(part["replay"], "{:.3g}")),
        "photographs": markdown(wide(part["photographs"], "{:.0f}")),
        "lengths": markdown(wide(part["lengths"], "{:.1f}")),
    }  # fmt: skip
    found = [
        *margin_claims(spans, part["margins"]), *rounding_claims(spans, near, alone),
        *lattice_claims(part["lattice"]), *replay_claims(part["replay"]), *length_claims(part["lengths"]),
    ]  # fmt: skip
    return fields, found
