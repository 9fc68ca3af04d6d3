"""The page's section on one picture by its class: its tables, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from .._runner import Claim, between
from .._tables import grouped, markdown
from . import large
from .records import CHANGES, CLIENTS, MEAN, NOISE, OF_EACH, OTHER, SUM, TWO

_BY = ("model", "setting", "batch", "strength")
_MODELS = ("random", "digits", "pieces", large.MODEL)
_SETTINGS = ("distinct", large.AGAIN, "repeated", *CHANGES, TWO, OTHER, MEAN, "alone", *large.ONE_THING)


def of_pictures(group: pd.DataFrame) -> dict[str, str]:
    told = group.one_image.eq("shown").sum()
    return {
        "pictures": str(len(group)), "median dB": f"{group.psnr.median():.1f}", "least": f"{group.psnr.min():.1f}",
        "most": f"{group.psnr.max():.1f}", "one image by the system": f"{told} of {len(group)}",
    }  # fmt: skip


def _beside_alone(group: pd.DataFrame) -> dict[str, str]:
    """And what the same pictures have in batches of one."""
    words = of_pictures(group)
    words |= {"alone dB": f"{group.alone.median():.1f}", "lost at most": f"{(group.alone - group.psnr).max():.1f}"}
    return words if group.alone.notna().all() else words | {"alone dB": "–", "lost at most": "–"}


def _each(group: pd.DataFrame) -> dict[str, str]:
    """The picture of each victim, and the median."""
    found = group.set_index("victim").psnr
    return {f"{victim}": f"{found[victim]:.1f}" for victim in sorted(found.index)} | {
        "median": f"{found.median():.1f}"
    }


def with_alone(rows: pd.DataFrame) -> pd.DataFrame:
    """A column ``alone``: what the picture of a row has in a batch of one, at L = 20."""
    alone = rows[rows.part == "alone"].set_index(["model", "victim"]).psnr.rename("alone")
    return rows.join(alone, on=["model", "victim"])


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """By model, setting, batch and strength, in the page's order."""
    places = {"model": _MODELS, "setting": _SETTINGS}

    def place(column: pd.Series) -> pd.Series:
        return (
            column.map({name: i for i, name in enumerate(places[column.name])}) if column.name in places else column
        )

    return rows.sort_values(list(_BY), kind="stable", key=place)


def describe(every: pd.DataFrame) -> tuple[Mapping[str, Any], Sequence[Claim]]:
    rows = in_order(with_alone(every))
    classed, sums, noisy, two = (rows[rows.part == part] for part in ("class", "sum", "changes", "two"))
    small, at_224 = (classed[(classed.model == large.MODEL) == is_large] for is_large in (False, True))
    fields = {
        "class": _table(small, _BY, _beside_alone), "large": _table(at_224, _BY, _beside_alone),
        "sum": _table(sums, _BY, _beside_alone), "why": _table(one_thing(rows), ("changed",), _each),
        "changes": _table(noisy, ("model", "setting"), of_pictures),
        "two": _table(two, ("model", "setting"), of_pictures),
    }  # fmt: skip
    strong, weak = small[small.strength >= 20], small[(small.strength == 2) & (small.model == "random")]
    claims = [
        between("at least 90 dB in the median of every setting", strong.groupby(list(_BY)).psnr.median().min(), 90),
        between("at L = 2 it is a mixture", weak.psnr.median(), most=60),
        *_of_sums(sums),
        between("Noise of 1e-3 ends it", noisy[noisy.setting == NOISE[-1]].psnr.median(), most=30),
        between("Neither comes back", two[two.setting == TWO].psnr.max(), most=30),
        between("the plain mean is nearer to them in the median", _gain_of_the_mean(two), 0),
    ]
    numbers, claimed = _of_large(at_224[at_224.strength == 20], one_thing(rows))
    return fields | numbers | _medians(rows), claims + claimed


def _medians(rows: pd.DataFrame) -> dict[str, float]:
    """Those that the page's sentences name; NaN for what a small study leaves out."""
    medians = rows.groupby(["part", "model", "setting", "strength", "batch"]).psnr.median()
    named = {
        "ceiling_random": ("alone", "random", "alone", 20.0, 1),
        "ceiling_digits": ("alone", "digits", "alone", 20.0, 1),
        "ceiling_large": ("alone", large.MODEL, "alone", 20.0, 1),
        "ten": ("class", large.MODEL, "distinct", 10.0, 8),
        "sum_digits": ("sum", "digits", SUM, 20.0, CLIENTS * OF_EACH),
        "noisy_random": ("changes", "random", NOISE[0], 20.0, 8),
        "noisy_large": ("changes", large.MODEL, NOISE[0], 20.0, 8),
        "bfloat16_large": ("changes", large.MODEL, "bfloat16", 20.0, 8),
    }
    return {name: medians.get(key, math.nan) for name, key in named.items()}


def _gain_of_the_mean(two: pd.DataFrame) -> float:
    """The least over the models, in dB, beside the nearer of the two."""
    medians = two.pivot_table(index="model", columns="setting", values="psnr", aggfunc="median")
    return float((medians[MEAN] - medians[TWO]).min())


def _of_sums(sums: pd.DataFrame) -> list[Claim]:
    if not len(sums):
        return []
    medians = sums.groupby(["strength", "model"]).psnr.median()
    random = medians[20.0].reindex(["random", large.MODEL])
    return [
        between("From L = 40 on a sum gives the picture away", medians[40.0].min(), 90),
        between("at L = 20 it does with random weights", random.min(), 90),
        between("The model trained on digits has", medians[20.0, "digits"], most=90),
    ]


def _of_large(strong: pd.DataFrame, changed: pd.DataFrame) -> tuple[dict[str, float], list[Claim]]:
    """Numbers and claims on ViT-B/16 at L = 20; none of them where it was left out."""
    found = changed.pivot(index="victim", columns="changed", values="psnr")
    found = found.reindex(columns=["nothing", *large.ONE_THING])
    gains = found.sub(found.nothing, axis=0)
    by_setting = strong.pivot_table(index="victim", columns=["setting", "batch"], values="psnr")
    again = by_setting.reindex(columns=[("distinct", 32), (large.AGAIN, 32)])
    in_float32 = changed[~changed.changed.str.startswith("float64")]
    numbers = {
        "missed": int((found.nothing < 90).sum()), "least": found.nothing.min(),
        "anew": again.diff(axis=1).iloc[:, -1].abs().max(), "lost_in_sums": gains["float64, rounded"].max(),
        "foretold": (in_float32.psnr - in_float32.predicted).abs().max(),
        "little": gains[["other weights", "other class", "patches shuffled"]].abs().max().max(),
        "texture": gains["texture 0.02"].median(), "apart": gains["position embedding × 10"].median(),
    }  # fmt: skip
    if not len(strong):
        return numbers, []
    return numbers, [
        between("90 dB and more in the median at L = 20, whatever the batch", by_setting.median().min(), 90),
        between("nothing is lost to the others", (strong.alone - strong.psnr).abs().max(), most=0.5),
        between("in float64 every picture has 150 dB", found["float64"].min(), 150),
        between("a float64 gradient that is rounded once has 100 and more", found["float64, rounded"].min(), 100),
        between("G is the picture's doing", numbers["little"], most=5),
        between("hardly seen, adds", numbers["texture"], 3),
        between("a position embedding ten times as large", numbers["apart"], 3),
    ]


def one_thing(rows: pd.DataFrame) -> pd.DataFrame:
    """ViT-B/16's pictures in batches of one, as they are and with one thing changed."""
    here = rows[(rows.model == large.MODEL) & rows.part.isin(["alone", "why"])]
    return here.assign(changed=here.setting.replace("alone", "nothing"))


def _table(rows: pd.DataFrame, names: Sequence[str], line: Any) -> str:
    return markdown(grouped(rows, names, line)) if len(rows) else "–"
