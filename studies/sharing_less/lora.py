"""LoRA: the factors A of the first attention's queries and values, read over rounds, while
all else is frozen.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import nn

import aprillab as al
from aprillab import viz

from .._rows import fill, made, read
from .._runner import Claim, Description, between
from .._tables import grouped, markdown
from .clients import pixels_of, played

FILE = "sharing_less_lora.csv"
RATE = 0.1
VICTIMS = ("astronaut", "chelsea", "coffee", "cell", "coins", "grass")


class Setting(NamedTuple):
    """A model by its shape, and the rank of its adapters."""

    size: int
    patch: int
    width: int
    heads: int
    depth: int
    rank: int
    alpha: int = 32  # peft's lora_alpha

    @property
    def label(self) -> str:
        shape = f"{self.size}×{self.size}, patch {self.patch}, d = {self.width}, r = {self.rank}"
        return shape if self.alpha == 32 else f"{shape}, α = {self.alpha}"


_EIGHT, _FOUR, _FEW = Setting(32, 8, 256, 4, 4, 4), Setting(32, 4, 384, 6, 4, 8), Setting(32, 4, 384, 6, 4, 2)
SMALL = {setting.label: setting for setting in (_EIGHT, _FOUR, _FEW)}
#: The same with smaller steps: α/r scales what the adapters add, and with it how fast they move.
SLOWER = {setting.label: setting for setting in (_FOUR._replace(alpha=16), _FOUR._replace(alpha=8))}
LARGE = {setting.label: setting for setting in (Setting(224, 16, 1024, 16, 2, 8), Setting(224, 16, 1024, 16, 2, 16))}
#: Numbers of rounds that are attacked; the count says from which on it can work.
ROUNDS = {"small": (2, 3, 5, 10, 20, 40), "large": (9, 15, 20, 40), "quick": (2, 5)}


class Case(NamedTuple):
    """One client; its rows are the numbers of rounds."""

    setting: str
    precision: str
    victim: str


@dataclass(frozen=True)
class Row:
    """One attack. ``gap`` is the weakest token's singular value over the strongest of the noise."""

    setting: str
    precision: str
    victim: str
    rounds: int
    psnr: float | None = None
    predicted_psnr: float | None = None
    exact: bool | None = None
    rows: int | None = None
    tokens: int | None = None
    gap: float | None = None
    seconds: float | None = None
    note: str = ""


def cases(quick: bool) -> Iterator[Case]:
    small = list(SMALL)[:1] if quick else list(SMALL)
    for label in small:
        for precision in ("float32",) if quick else ("float32", "float64"):
            yield from (Case(label, precision, victim) for victim in (VICTIMS[:1] if quick else VICTIMS))
    yield from () if quick else (Case(label, "float32", victim) for label in SLOWER for victim in VICTIMS)
    for label in () if quick else LARGE:
        yield from (Case(label, "float32", victim) for victim in VICTIMS[:2])
        yield Case(label, "float64", VICTIMS[0])


@functools.lru_cache(maxsize=1)
def adapted(setting: Setting, precision: str) -> nn.Module:
    """A frozen model of random weights with LoRA on queries and values of every block, its head
    trained.
    """
    import peft

    size, patch, width, heads, depth, rank, alpha = setting
    classes = 10 if size == 32 else 1000
    model = al.VisionTransformer(
        image_size=size, patch_size=patch, width=width, depth=depth, heads=heads, classes=classes, seed=0
    )
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["query", "value"], modules_to_save=["head"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).to(getattr(torch, precision)).eval()


def measured(case: Case, numbers: tuple[int, ...]) -> Iterator[Row]:
    """One client's first rounds, attacked together, for several numbers of rounds."""
    setting = (SMALL | SLOWER | LARGE)[case.setting]
    adapted.cache_clear()
    sent = adapted(setting, case.precision)
    anatomy, dtype = al.dissect(sent), getattr(torch, case.precision)
    truth, found = pixels_of(case.victim, anatomy, dtype)[0].double(), list[al.Round]()
    for one in played(sent, anatomy, case.victim, max(numbers), rate=RATE):
        found.append(replace(one))
        if len(found) not in numbers:
            continue
        row = Row(*case, len(found))
        try:
            result = al.span_closed_form(sent, found, anatomy=anatomy)
        except al.AttackNotApplicable as refusal:
            yield replace(row, note=f"refused: {refusal.reason}")
            continue
        numbers_of = result.diagnostics
        yield replace(
            row, psnr=float(al.psnr(result.pixels[0], truth)), predicted_psnr=result.predicted_psnr,
            exact=result.exact, rows=numbers_of.get("rows"), tokens=numbers_of["tokens"], gap=numbers_of["gap"],
            seconds=result.seconds, note="" if result.exact else result.reason,
        )  # fmt: skip


def measure(folder: Path, options: argparse.Namespace) -> None:
    def attacked(case: Case) -> Iterator[Row]:
        kind = "quick" if options.quick else "large" if case.setting in LARGE else "small"
        return measured(case, ROUNDS[kind])

    fill(folder / FILE, Row, cases(options.quick), attacked, key=Case._fields, workers=options.workers)


# --- Its share of the page ----------------------------------------------------------------------------------------


def summary(group: pd.DataFrame) -> dict[str, str]:
    """The table's cells for one setting, precision and number of rounds."""
    done = group[group.psnr.notna()]
    if done.empty:
        return {"rows": "–", "median dB": "refused"}
    return {
        "rows": f"{done.rows.max():.0f} for {done.tokens.max():.0f} tokens",
        "median dB": f"{done.psnr.median():.1f}", "least": f"{done.psnr.min():.1f}", "most": f"{done.psnr.max():.1f}",
        "predicted": f"{done.predicted_psnr.median():.1f}", "exact": f"{done.exact.eq(True).sum()} of {len(done)}",
        "gap": f"{done.gap.median():.1f}", "attack s": f"{done.seconds.median():.1f}",
    }  # fmt: skip


def describe(folder: Path, options: argparse.Namespace) -> Description:
    rows = read(folder / FILE, Row)
    medians = rows.groupby(["setting", "precision", "rounds"]).psnr.median()
    (eight, four, few), (slower, slowest) = SMALL, SLOWER

    def at(setting: str, rounds: int, precision: str = "float32") -> float:
        return float(medians.get((setting, precision, rounds), math.nan))

    large, narrow = rows[rows.setting.isin(list(LARGE)) & rows.psnr.notna()], next(iter(LARGE))
    best = {precision: large[large.precision == precision].psnr.max() for precision in ("float32", "float64")}
    wrong = rows[rows.exact.eq(True) & ~(rows.psnr >= al.EXACT_TO_8_BITS_DB)]
    fields: dict[str, Any] = {
        "lora_made": made(folder / FILE),
        "lora": markdown(grouped(rows, ("setting", "precision", "rounds"), summary)),
        "lora_eight": at(eight, 5), "lora_four": at(four, 10), "lora_few": at(few, 40),
        "lora_slower": at(slower, 10), "lora_slowest": at(slowest, 10),
        "lora_large_early": at(narrow, 15), "lora_large_late": at(narrow, 40), "lora_large": best["float32"],
        "lora_large_64": best["float64"],
        "lora_optimistic": (rows.predicted_psnr - rows.psnr).max(),
    }  # fmt: skip
    return fields, [
        between("{lora_eight:.0f} dB after five rounds", at(eight, 5), least=95),
        between("{lora_four:.0f} dB after ten", at(four, 10), least=70),
        between("smaller steps, fewer decibels", at(four, 10) - at(slowest, 10), least=10),
        Claim("none of them called exact below 58.9 dB", len(wrong), wrong.empty),
        between("more rounds make up for it", at(narrow, 40) - at(narrow, 15), least=10),
        between("float64 needs no more than the count", best["float64"], least=150),
    ]


def panel(ax: Axes, folder: Path) -> None:
    """Median PSNR over rounds by setting, float32."""
    rows = read(folder / FILE, Row).query("psnr == psnr and precision == 'float32'")
    looks = zip(SMALL | LARGE, ("blue", "green", "orange", "red", "purple"), "osD^v", strict=True)
    for label, colour, marker in looks:
        medians = rows[rows.setting.eq(label)].groupby("rounds").psnr.median()
        if medians.empty:
            continue
        name = label.replace(", patch ", "/").partition("×")[2]
        ax.plot(medians.index, medians, color=viz.COLOURS[colour], marker=marker, markersize=5, label=name)
    ax.axhline(al.EXACT_TO_8_BITS_DB, color="0.5", linestyle=":", linewidth=1)
    ax.set_xscale("log")
    ax.set_xticks((2, 5, 10, 20, 40), ("2", "5", "10", "20", "40"))
    ax.minorticks_off()
    ax.set(xlabel="rounds", title="LoRA on q and v", ylim=(0, 190))
    ax.legend(loc="upper left", fontsize=8.5, handletextpad=0.4, labelspacing=0.2, frameon=False)
