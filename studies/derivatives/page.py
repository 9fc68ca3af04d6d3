"""The page of the study: tables, and the rule by which a way would be worth a change."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from .._rows import made, origin, read
from .._runner import Claim, Description, between
from .._tables import formatted, markdown
from .matching import Attack, Part
from .times import DIGITS, Row
from .ways import WAYS

FASTER = 1.3  # a way must be so many times as fast on most rows to be worth a change
# A larger error of ∇D is more than a line search to a small residual can stand.
EXACT_ENOUGH = 1e-3


def ways_table(rows: pd.DataFrame) -> str:
    """One line for a model and dtype, one column for a way."""
    lines = []
    for (model, dtype), found in rows[rows.section == "ways"].groupby(["model", "dtype"], sort=False):
        by = found.set_index("way")
        cells = {way: f"{by.ratio[way]:.2f} ({by.error[way]:.0e})" if not by.note[way] else by.note[way]
                 for way in list(WAYS)[1:]}  # fmt: skip
        base = f"{by.milliseconds['double backward']:.3g}"
        lines.append({"model": model, "dtype": dtype, "double backward, ms": base} | cells)
    return markdown(pd.DataFrame(lines))


def rows_table(rows: pd.DataFrame) -> str:
    table = formatted(rows, milliseconds=".3g", ratio=".3g", error=".1g", compile_seconds=".3g")
    failed = table.note != ""
    table.loc[failed, "milliseconds"] = "fails"
    table.loc[failed, "error"] = "`" + table.note[failed] + "`"
    table = table[["model", "dtype", "way", "milliseconds", "ratio", "error", "compile_seconds"]]
    return markdown(table, ["model", "dtype", "way", "ms", "ratio", "error", "compile s"])


def profile_table(parts: pd.DataFrame) -> str:
    wide: dict[str, Any] = {"part": list(dict.fromkeys(parts.part))}
    for dtype, found in parts.groupby("dtype", sort=False):
        milliseconds = found.set_index("part").milliseconds
        wide[f"{dtype}, ms"] = [f"{value:.2f}" for value in milliseconds]
        wide[f"{dtype}, share"] = [f"{100 * value / milliseconds['all']:.0f} %" for value in milliseconds]
    return markdown(pd.DataFrame(wide), [name.replace(f"{name.split(',')[0]}, share", "share") for name in wide])


def worth_a_change(ways: pd.DataFrame) -> list[str]:
    """The ways that are fast on most rows and exact enough on all."""
    found = ways.groupby("way", sort=False)
    fast = found.ratio.agg(lambda ratio: (1 / ratio > FASTER).mean() > 0.5)
    return list(fast.index[fast & (found.error.max() < EXACT_ENOUGH)])


def speeds(ways: pd.DataFrame) -> str:
    """One line for each way but the first, which the others are divided by."""
    lines = []
    for way, found in ways[ways.way != "double backward"].groupby("way", sort=False):
        speed = 1 / found.ratio
        errors = found.groupby("dtype").error.max()
        lines.append(
            f"- {way}: {speed.min():.2f} to {speed.max():.2f} times as fast as double backward (median "
            f"{speed.median():.2f}); above {FASTER} in {(speed > FASTER).sum()} of {len(speed)} rows; error up to "
            f"{errors.get('float64', 0):.0e} in float64, {errors.get('float32', 0):.0e} in float32."
        )
    return "\n".join(lines)


def compiled_speeds(rows: pd.DataFrame) -> str:
    """For each compiled way that is faster, after how many evaluations the compiling has paid."""
    lines = []
    for row in rows[(rows.section == "compiled") & (rows.ratio < 1) & rows.compile_seconds.notna()].itertuples():
        saved = row.milliseconds / row.ratio - row.milliseconds
        lines.append(
            f"- {row.way}, {row.dtype}: {1 / row.ratio:.2f} times as fast, after {row.compile_seconds:.0f} s of "
            f"compiling: worth it from {1e3 * row.compile_seconds / saved:.0f} evaluations on.\n"
        )
    return "".join(lines)


def shares(parts: pd.DataFrame) -> str:
    texts = []
    for dtype, found in parts.groupby("dtype", sort=False):
        share = found.set_index("part").milliseconds / found.milliseconds.iloc[-1]
        second, distance = share["second backward pass, to the unknowns"], share["distance, α term, residual"]
        texts.append(f"{second:.0%} ({dtype}; distances: {distance:.0%})")
    return ", ".join(texts)


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "derivatives.csv"
    rows, parts = read(path, Row), read(folder / "derivatives_profile.csv", Part)
    attacks = read(folder / "derivatives_attacks.csv", Attack)
    ways = rows[(rows.section == "ways") & rows.ratio.notna()]
    compiled = rows[rows.section == "compiled"]
    table = formatted(attacks, seconds=".1f", residual=".1e", psnr=".1f")
    fields = {
        "made": made(path), "repetitions": origin(path)["settings"]["repetitions"], "digits": DIGITS,
        "evaluations": origin(folder / "derivatives_attacks.csv")["settings"]["evaluations"],
        "speeds": speeds(ways), "compiled_speeds": compiled_speeds(rows), "shares": shares(parts),
        "ways": ways_table(rows), "kernels": rows_table(rows[rows.section == "kernels"]),
        "compiled": rows_table(compiled) if len(compiled) else "Left out of this run (`--no-compile`).",
        "attacks": markdown(table, ["digit", "way", "evaluations", "s", "relative residual", "PSNR, dB"]),
        "profile": profile_table(parts),
    }  # fmt: skip
    worth = worth_a_change(ways)
    wrong = ways[ways.way == "reverse over forward"]
    return fields, [
        Claim("**Double backward stays**", worth, not worth),
        between("wrong for models with LayerNorm", wrong.error.max(), least=EXACT_ENOUGH),
        between("Reverse over forward is not only slow", (1 / wrong.ratio).median(), most=1),
        between("this bare distance is a poor attack", attacks.psnr.max(), most=20),
    ]
