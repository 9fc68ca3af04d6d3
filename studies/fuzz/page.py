"""The page of the study: how many of each, the predictions' honesty, and the claims."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .._rows import made, read
from .._runner import Claim, Description
from .._tables import grouped, markdown
from .measure import CRASHED, LEAST, NO_UPDATE, REFUSED, UPDATE_REFUSED, Row, faults, loses

CLEAR = LEAST + 7  # dB: exact beyond doubt
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
MOST_LISTED = 40


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "fuzz.csv"
    rows = read(path, Row)
    rows = rows.assign(
        kind=rows.done.map(kind_of), lossy=rows.done.map(loses), refused=rows.outcome.isin([REFUSED, UPDATE_REFUSED])
    )
    last, scored = rows[rows.attack == "invert"], rows[rows.psnr.notna()]
    wrong = rows[rows.outcome.eq("exact") & ~(rows.psnr >= LEAST)]
    crashed, exact = rows[rows.outcome == CRASHED], rows[rows.outcome == "exact"]
    refused = last[last.refused & (last.oracle >= LEAST)]
    missed = refused[~refused.lossy]
    fields = {
        "made": made(path),
        "seeds": f"{len(last):,} configurations, seeds {rows.seed.min()} to {rows.seed.max()}",
        "seconds": f"{rows.groupby('seed').seconds.sum().mean() * 1e3:.0f}",
        "exact": f"{len(exact):,}",
        "wrong": wrong.seed.nunique(),
        "crashed": crashed.seed.nunique(),
        "determined": f"{(last.oracle >= LEAST).sum():,}",
        "missed": len(missed),
        "lossy": counted(refused[refused.lossy].kind),
        "no_update": (last.outcome == NO_UPDATE).sum(),
        "kinds": markdown(grouped(last.sort_values("kind"), ("kind",), by_kind)),
        "closed_forms": markdown(grouped(rows, ("attack",), by_attack)),
        "honesty": markdown(grouped(scored[scored.attack != "invert"], ("attack", "outcome"), honesty)),
        "replay": replays(scored),
        "recall": markdown(grouped(clear_cases(last), ("kind",), recall)),
        "faults": listed(rows),
    }
    return fields, [
        none("none of them is below 58.9 dB", wrong),
        none("None crashes", crashed),
        none("none of these is refused", missed),
    ]


def none(phrase: str, found: pd.DataFrame) -> Claim:
    """The claim that there are no such rows; their seeds, if there are."""
    seeds = [int(seed) for seed in found.seed.unique()]
    return Claim(phrase, f"seeds {', '.join(map(str, seeds[:10]))}… ({len(seeds)} in all)", not seeds)


def kind_of(done: str) -> str:
    """The kind of tampering, of which most worlds have one or none."""
    return "several" if ", " in done else done or "nothing"


def counted(kinds: pd.Series) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in kinds.value_counts().items()) or "none"


def by_kind(group: pd.DataFrame) -> dict[str, Any]:
    """How many of each, of one kind of tampering."""
    refused, determined = group.refused, group.oracle >= LEAST
    return {
        "configurations": len(group),
        "determined in float64": determined.sum(),
        "exact": (group.outcome == "exact").sum(),
        "exact, wrong": (group.outcome.eq("exact") & ~(group.psnr >= LEAST)).sum(),
        "determined": (group.outcome == "determined").sum(),
        "not shown": (group.outcome == "not shown").sum(),
        "refused": refused.sum(),
        "refused, determined in float64": (refused & determined).sum(),
        "crashed": (group.outcome == CRASHED).sum(),
    }


def by_attack(group: pd.DataFrame) -> dict[str, Any]:
    exact = group[group.outcome == "exact"]
    return {
        "pictures": group.psnr.notna().sum(),
        "exact": len(exact),
        "least true dB of them": f"{exact.psnr.min():.1f}" if len(exact) else None,
        "determined": (group.outcome == "determined").sum(),
        "not shown": (group.outcome == "not shown").sum(),
        "crashed": (group.outcome == CRASHED).sum(),
    }


def honesty(group: pd.DataFrame) -> dict[str, Any]:
    """Quantiles of predicted − true in dB; a picture that is perfect to float64 has no error to
    predict.
    """
    off = (group.predicted - group.psnr)[np.isfinite(group.predicted) & np.isfinite(group.psnr)]
    found = {f"{q:.0%}": f"{off.quantile(q):+.1f}" if len(off) else None for q in QUANTILES}
    return {"pictures": len(off), **found, "most": f"{off.max():+.1f}" if len(off) else None}


def replays(scored: pd.DataFrame) -> str:
    """The replay's residual over its limit, for pictures that are exact and for those that are not."""
    replayed = scored[scored.residual.notna() & scored.limit.notna()]
    if replayed.empty:
        return "No picture was replayed."
    ratio = replayed.residual / replayed.limit
    state = np.where(replayed.psnr >= CLEAR, f"{CLEAR:.0f} dB or more",
                     np.where(replayed.psnr >= LEAST, "between", f"below {LEAST} dB"))  # fmt: skip
    frame = replayed.assign(ratio=ratio, true=state)

    def line(group: pd.DataFrame) -> dict[str, Any]:
        return {"pictures": len(group)} | {f"{q:.0%}": f"{group.ratio.quantile(q):.2g}" for q in QUANTILES}

    return markdown(grouped(frame.sort_values("true"), ("true", "replay"), line))


def clear_cases(last: pd.DataFrame) -> pd.DataFrame:
    """Pictures of `invert` that are exact beyond doubt."""
    return last[last.psnr >= CLEAR].sort_values("kind")


def recall(group: pd.DataFrame) -> dict[str, Any]:
    return {"pictures": len(group)} | {
        outcome: (group.outcome == outcome).sum() for outcome in ("exact", "determined", "not shown")
    }


def listed(rows: pd.DataFrame) -> str:
    """What may not be, seed by seed."""
    named = [Row(**{name: row[name] for name in Row.__dataclass_fields__}) for row in rows.to_dict("records")]
    lines = [
        f"- {row.seed} ({row.done or 'nothing'}, {row.dtype}): {text}" for row in named for text in faults([row])
    ]
    more = [f"- and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else []
    return "\n".join([*lines[:MOST_LISTED], *more]) or "None."
