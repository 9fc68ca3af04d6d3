"""The study's page: fields of its template, and what must be true of them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd

from .._rows import made, read
from .._runner import Claim, Description, between
from .._tables import markdown
from . import accuracy, accuracy_clipping
from .bounds import INFORMATION_FILE, MATCHING_FILE, Information, Matching
from .clients import (
    ADAM,
    BATCH,
    BFLOAT16,
    BITS,
    CLIPPING,
    DITHER,
    FLOAT16,
    NOISE,
    NONE,
    PRUNING,
    SIGN,
    STOCHASTIC,
    SUM,
    WITHHELD,
)  # fmt: skip
from .figures import ACCURACY_FILE
from .grid import FILE
from .tables import WORLDS, beyond_pictures, bounds_table, by_defence, decibels, grid_rows, named, of
from .victims import DIGITS, LARGE, PHOTOGRAPHS

_BOUNDS = dict(zip(WORLDS, ("bounds_digits", "bounds_trained", "bounds_photographs"), strict=True))


def describe(folder: Path, options: argparse.Namespace) -> Description:
    every = grid_rows(folder)
    rows = every[every.world != LARGE]
    fields: dict[str, Any] = {"made": made(folder / FILE), "runs": len(every), "large": _large(every)}
    fields |= {
        "noise": by_defence(rows, [NONE, NOISE]), "clipping": by_defence(rows, [CLIPPING]),
        "pruning": by_defence(rows, [PRUNING]), "bits": by_defence(rows, [FLOAT16, BFLOAT16, BITS, STOCHASTIC, SIGN]),
        "dither": by_defence(rows, [DITHER]), "together": by_defence(rows, [BATCH, SUM]),
        "adam": by_defence(rows, [ADAM]), "withheld": by_defence(rows, [WITHHELD]), "ends": beyond_pictures(rows),
        "oracle_gap": (rows.oracle - rows.psnr).mean(), "oracle_most": (rows.oracle - rows.psnr).max(),
        "blind_digits": of(rows, world=DIGITS).blind.median(),
        "blind_photographs": of(rows, world=PHOTOGRAPHS).blind.median(),
    }  # fmt: skip
    fields |= {name: bounds_table(folder, rows, world) for world, name in _BOUNDS.items()}
    more, claims = said(rows)
    fields |= more | _costs(folder) | {"behind": _behind(folder, rows, 1e-8)}
    later = _behind(folder, rows, 1e-4)
    return fields, [
        *claims,
        _below_the_theorem(folder),
        between("that much an attacker who used all gradients", fields["behind"], least=3),
        between("At σ = 1e-4 and beyond what is reached lies above that line", later, most=0),
    ]


def said(rows: pd.DataFrame) -> Description:
    """The numbers in the page's sentences, and its claims, but for those of theorems."""
    fields: dict[str, Any] = {}
    claims: list[Claim] = []
    for part in (_noise, _cheap, _together):
        more, claimed = part(rows)
        fields |= more
        claims += claimed
    return fields, claims


def _share(rows: pd.DataFrame, way: str) -> float:
    return 100 * named(rows, f"rank_{way}")


def _noise(rows: pd.DataFrame) -> Description:
    rows = of(rows, defence=NOISE)
    at = {power: of(rows, strength=10.0**-power) for power in (0, 1, 2)}
    quiet, dead = rows[rows.strength <= 1.01e-3], rows[rows.strength >= 0.1]
    gain = (at[2].shown - at[2].blind).median()
    fields = {
        "gain_2": gain, "picture_1": _share(at[1], "picture"), "dead": dead.shown.median(),
        "dead_predicted": dead.predicted.median(), "honest": (quiet.predicted - quiet.psnr).median(),
        "honest_most": (quiet.predicted - quiet.psnr).max(),
    }  # fmt: skip
    fields |= {f"epsilon_{power}": cell.epsilon.median() for power, cell in at.items()}
    fields |= {f"gradients_{power}": _share(cell, "gradients") for power, cell in at.items()}
    return fields, [
        between("{gain_2:+.1f} dB from the blind guess", gain, most=1.0),
        between("by gradients all the same {gradients_1:.0f} % are named", fields["gradients_1"], least=75),
        between("the picture names {picture_1:.0f} % of the victims", fields["picture_1"], most=10),
        between("with {gradients_0:.0f} %", fields["gradients_0"], most=20),
        between("the prediction is careful", fields["honest"], most=1.0),
    ]


def _cheap(rows: pd.DataFrame) -> Description:
    half = rows[rows.defence.isin([FLOAT16, BFLOAT16])]
    ninety, most = (of(rows, defence=PRUNING, strength=strength) for strength in (90.0, 99.0))
    nearest, two = of(rows, defence=BITS), of(rows, defence=BITS, strength=2.0)
    dithered = of(rows, defence=DITHER, strength=8.0, world=DIGITS)
    clipped = of(rows, defence=CLIPPING)
    fields = {
        "pruned_picture": _share(ninety, "picture"), "pruned_99": _share(most, "picture"),
        "pruned_features": _share(most, "features"), "pruned_gradients": _share(most, "gradients"),
        "two_digits": _share(of(two, world=DIGITS), "picture"), "dither_8": dithered.shown.median(),
        "dither_theory": -20 * math.log10(8 / 255 / 3**0.5),
    }  # fmt: skip
    return fields, [
        between("no attack of these minds", clipped.shown.min(), least=58.9),
        between("at 99 % they are down to {pruned_99:.0f} %", fields["pruned_99"], most=45),
        between("gradients name {pruned_features:.0f} and {pruned_gradients:.0f} %", fields["pruned_gradients"], 90),
        between("Half precision stops nothing", _share(half, "picture"), least=99),
        between("two bits the picture", two.shown.median() - two.blind.median(), most=1.0),
        between(
            "Signs show more than two bits do", of(rows, defence=SIGN).ssim.median() - two.ssim.median(), least=0
        ),
        between("no number of bits the name", _share(nearest, "gradients"), least=99),
        between(
            "decibels are those of the dither alone", abs(dithered.shown.median() - fields["dither_theory"]), -1, 3
        ),
    ]


def _together(rows: pd.DataFrame) -> Description:
    several = rows[rows.defence.isin([BATCH, SUM])]
    two, sixteen = (of(several, defence=BATCH, strength=number) for number in (2.0, 16.0))
    return {
        "batch_2": _share(two, "picture"), "batch_16": _share(sixteen, "picture"),
        "batch_gradients": _share(sixteen, "gradients"), "nearest": several.nearest.median(),
        "nearest_most": several.nearest.max(),
    }, [
        between("One picture of two is still named", _share(two, "picture"), least=20),
        between("among sixteen by {batch_16:.0f} %", _share(sixteen, "picture"), most=20),
    ]  # fmt: skip


def _below_the_theorem(folder: Path) -> Claim:
    matching = read(folder / MATCHING_FILE, Matching)
    over = matching.rate - matching.bound
    return between("The simulated best attacker keeps below the theorem", over.max(), most=0.01)


def _behind(folder: Path, rows: pd.DataFrame, sigma: float) -> float:
    """Median decibels from Cramér and Rao's line to what was reached, of the digits that have one."""
    information = read(folder / INFORMATION_FILE, Information).dropna(subset="cramer_rao")
    noisy = of(rows, defence=NOISE, strength=sigma)
    both = noisy.merge(information, on=["world", "when", "seed", "victim"])
    return float((both.cramer_rao.map(lambda mse: decibels(mse * sigma**2)) - both.shown).median())


def _large(rows: pd.DataFrame) -> str:
    """The part on ViT-B/16, if it was measured."""
    rows = of(rows, world=LARGE)
    if rows.empty:
        return ""
    lines = [
        {
            "defence": defence, "strength": f"{strength:g}", "median dB": f"{cell.shown.median():.1f}",
            "greatest": f"{cell.shown.max():.1f}", "predicted": f"{cell.predicted.median():.1f}",
            "SSIM": f"{cell.ssim.median():.2f}", "s": f"{cell.seconds.median():.0f}",
        }
        for (defence, strength), cell in rows.groupby(["defence", "strength"], sort=False)
    ]  # fmt: skip
    victims = rows.victim.nunique()
    return f"## ViT-B/16 at 224\n\ntorchvision's, random weights, {victims} photographs; no gallery.\n\n" + markdown(
        pd.DataFrame(lines)
    )


def _costs(folder: Path) -> dict[str, str]:
    """What accuracy and clipping cost and do, where that was measured."""
    fields = {"several_clipped": ""}
    if (folder / accuracy_clipping.FILE).is_file():
        found = accuracy_clipping.clipping_summary(read(folder / accuracy_clipping.FILE, accuracy_clipping.Row))
        fields["several_clipped"] = _SEVERAL_CLIPPED + found
    if not (folder / ACCURACY_FILE).is_file():
        words = "Not measured here yet: `python -m studies.defences --accuracy`."
        return fields | {"costs": words, "figure_words": ""}
    runs = read(folder / ACCURACY_FILE, accuracy.Row)
    intro = (
        f"The ViT of the digits on MNIST-5k, mean accuracy and its 95 % interval. "
        f"Measured with {made(folder / ACCURACY_FILE)}.\n\n"
    )
    return fields | {"costs": intro + accuracy.summary(runs), "figure_words": _FIGURE_WORDS}


_SEVERAL_CLIPPED = (
    "### Clipping several pictures together\n\n"
    "A batch of eight, of which one is replaced by another picture, and how far what is shared moves, in units of C. "
    "Clipped picture by picture it keeps to 2C/8, and noise measured by that is enough; clipped as a whole one "
    "picture may move it as far as 2C, whatever ε was said to be.\n\n"
)
_FIGURE_WORDS = (
    "Test accuracy of the digits' ViT under each defence, against what its update gives away: left the "
    "reconstruction, at its median with a line to the victim seen best; right the share named among a hundred by "
    "gradients. The attacker of the DP-SGD points is the one whom ε is promised against: it knows every other "
    "picture of the step, so that it has one clipped gradient with noise σC. Their ε counts the whole training; "
    "hollow, what no attacker can pass who sees all its rounds."
)
