"""What does an attacker gain who knows the noise? `python -m studies.known_noise` writes
known_noise.csv and .md.

Gaussian noise in every entry of the update of one picture, relative to the r.m.s. of its entries.
The patch-embedding system is solved without knowing it; by ridge regression with the best of many
ridges, which an oracle picks who has the picture; and by the attack that is told σ and expects
natural pictures, whose numbers were fitted on other pictures than these. torchvision's ViT-B/16,
random weights, 224×224.

    python -m studies.known_noise            # about ten minutes on one thread
    python -m studies.known_noise --quick    # one victim, one noise, a small model
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.zoo import build_model

from ._rows import fill, made, read
from ._runner import Claim, Description, between, run_study, study_parser
from ._tables import formatted, markdown

RIDGES = tuple(10.0 ** (-k / 2) for k in range(2, 26))  # of the largest eigenvalue of GGᵀ


@dataclass(frozen=True)
class Study:
    """How much is measured."""

    model: str = "vit_b_16"
    noises: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    victims: tuple[tuple[str, int], ...] = (
        ("astronaut", 0), ("rocket", 0), ("cell", 0), ("grass", 0), ("coffee", 1), ("chelsea", 1),
    )  # fmt: skip


SMALLEST = Study(model="small", noises=(1e-1,), victims=(("coffee", 0),))


@dataclass(frozen=True)
class Row:
    """One update. The columns are explained on the page."""

    victim: str
    seed: int
    noise: float
    plain: float
    oracle: float
    known: float
    predicted: float
    seconds: float


def model_of(name: str, seed: int) -> nn.Module:
    if name == "small":
        shape = {"image_size": 32, "patch_size": 8, "width": 192, "depth": 2, "heads": 3, "classes": 10}
        return al.VisionTransformer(**shape, seed=seed)
    return build_model(name, seed=seed)


def best_ridge(dW: Tensor, G: Tensor, X: Tensor) -> float:
    """The least mean square error of patches by ridge regression, for the true ones X (n, p)."""
    U, s, Vt = torch.linalg.svd(G.T, full_matrices=False)
    B = U.T @ dW
    found = (Vt.T @ (B * (s / (s**2 + share * float(s.max()) ** 2))[:, None]) for share in RIDGES)
    return min(float((one - X).square().mean()) for one in found)


def attacks(study: Study, case: tuple[str, int]) -> list[Row]:
    """All noises of one victim and seed."""
    (victim, seed), rows = case, []
    model = model_of(study.model, seed)
    anatomy = al.dissect(model)
    preprocessing, tiling = anatomy.preprocessing, anatomy.tiling
    pixels = al.load_victim(victim, anatomy.image_size[0])[None]
    images = preprocessing.to_input(pixels)
    update = al.client_update(model, images, torch.tensor([3]))
    rms = al.defenses.update_norm(update) / sum(g.numel() for g in update.gradients.values()) ** 0.5
    for noise in study.noises:
        noisy = al.defenses.gaussian_noise(update, noise * rms, seed=seed + 7)
        dW, G = (noisy.gradients[name or ""].double() for name in (anatomy.patch_weight, anatomy.position))
        error = best_ridge(
            dW.flatten(1), G.flatten(0, -2)[anatomy.position_prefix :], tiling.patches(images)[0].double()
        )
        of_pixels = sum(std**2 for std in preprocessing.std) / len(preprocessing.std)
        plain, known = (
            al.embedding_closed_form(model, noisy, noise=told, verify=False) for told in (None, noise * rms)
        )
        of_plain, of_known = (float(al.psnr(found.pixels, pixels)) for found in (plain, known))
        oracle, predicted = -10 * math.log10(error * of_pixels), known.predicted_psnr or math.nan
        rows.append(Row(victim, seed, noise, of_plain, oracle, of_known, predicted, known.seconds))
    return rows


def measure(folder: Path, options: argparse.Namespace) -> None:
    study = SMALLEST if options.quick else Study()
    fill(
        folder / "known_noise.csv", Row, study.victims, partial(attacks, study), key=("victim", "seed"),
        settings={"model": study.model}, workers=options.workers,
    )  # fmt: skip


def by_noise(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians, the spread of the prediction's error, and gains, by noise."""
    found = []
    for noise, some in rows.groupby("noise"):
        off = some.predicted - some.known
        found.append(
            {"noise": noise, **some[["plain", "oracle", "known"]].median().to_dict(),
             "gain": (some.known - some.plain).median(), "over_oracle": (some.known - some.oracle).median(),
             "least": (some.known - some.plain).min(), "off": off.median(),
             "off_low": off.min(), "off_high": off.max()}
        )  # fmt: skip
    return pd.DataFrame(found)


def table_of(found: pd.DataFrame) -> str:
    numbers = {name: ".1f" for name in found.columns if name != "noise"}
    shown = formatted(found, noise="g", **numbers)
    return markdown(pd.DataFrame({
        "noise": shown.noise, "plain": shown.plain, "oracle ridge": shown.oracle, "known": shown.known,
        "known − plain": shown.gain, "the least": shown.least, "known − oracle": shown.over_oracle,
        "predicted − true": shown.off + " (" + shown.off_low + " to " + shown.off_high + ")",
    }))  # fmt: skip


def table_of_rows(rows: pd.DataFrame) -> str:
    shown = formatted(rows, noise="g", plain=".1f", oracle=".1f", known=".1f", predicted=".1f", seconds=".0f")
    return markdown(shown)


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "known_noise.csv"
    rows = read(path, Row)
    found = by_noise(rows)
    there = found.iloc[(found.noise - 1e-2).abs().argmin()]
    fields = {
        "there": there, "table": table_of(found), "rows": table_of_rows(rows), "made": made(path),
        "updates": len(rows), "pictures": rows.victim.nunique(), "low": found.off.min(), "high": found.off.max(),
    }  # fmt: skip
    return fields, [
        between("more than the plain solve", float(there.gain), least=2.0),
        Claim("at least what the oracle's best ridge gives", float(there.over_oracle), float(there.over_oracle) > 0),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = study_parser("known_noise", __doc__).parse_args(argv)
    run_study("known_noise", options, measure=measure, describe=describe)


if __name__ == "__main__":
    main()
