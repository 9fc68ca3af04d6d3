"""Record gradient matching for chapter 05: `python -m studies.recorded_attack` (all), or `… scrub`, `… twins`.

Written to data/results/:

- matching_scrub.csv and .png: loss and PSNR at every evaluation of one attack on a colour photograph, and its
  pictures in one strip, one for each row of the CSV that has a number in the column ``frame``;
- matching_twins.csv and .png: where attacks end on the same digits with a learned position embedding, with its
  gradient withheld ("frozen") and with a sinusoidal one; the strip has one picture for each row.

Random weights (seed 0), float64 gradients, one image, label recovered, the recipe "april" with one start. Budgets are
evaluations, so the same machine gives the same result; another machine rounds otherwise, and a search of hundreds of
steps then takes another path. PSNR is of pixels clamped to [0, 1]; the strips are rounded to 8 bits.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import aprillab as al
from aprillab.models import Position

RESULTS = Path(__file__).parent.parent / "data" / "results"
SMALL: dict[str, Any] = {"width": 64, "depth": 2, "heads": 4, "classes": 10, "seed": 0}
DIGIT = {"image_size": 28, "patch_size": 7, "channels": 1, **SMALL}
PHOTOGRAPH = {"image_size": 32, "patch_size": 8, "channels": 3, **SMALL, "width": 96}
TWIN_DIGITS, TWIN_SEEDS, TWIN_EVALUATIONS = (5, 3), (0, 1, 2), 300
TWIN_POSITIONS: tuple[Position, ...] = ("learned", "frozen", "sinusoidal")
SCRUB_EVALUATIONS, SCRUB_EVERY = 600, 12
ONE_START = replace(al.RECIPES["april"], restarts=1)


@dataclass(frozen=True)
class Twin:
    """Where one attack on a digit ended; losses are the recipe's own, PSNR in dB."""

    digit: int
    position: str
    seed: int
    evaluations: int
    first_loss: float
    loss: float
    residual: float
    psnr: float
    stopped: str
    torch: str


def digit(label: int) -> tuple[Tensor, Tensor]:
    """The eighth MNIST-5k digit of its class: pixels (1, 1, 28, 28) in [0, 1], float64, and label (1,)."""
    images, labels = al.mnist5k(dtype=torch.float64)
    chosen = (labels == label).nonzero()[7]
    return images[chosen], labels[chosen]


def strip(pictures: list[Tensor]) -> Image.Image:
    """Pictures (C, H, W), pixels in [0, 1], side by side in 8 bits."""
    row = torch.cat(pictures, dim=-1).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(row.squeeze(-1) if row.shape[-1] == 1 else row))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def record_scrub() -> None:
    """One attack on a photograph, evaluation by evaluation."""
    private = al.load_victim("astronaut", 32, dtype=torch.float64)[None]
    model = al.VisionTransformer(**PHOTOGRAPH).double()
    update = al.client_update(model, al.HALF.to_input(private), torch.tensor([3]))
    rows: list[dict[str, Any]] = []

    def record(entry: dict[str, Any], images: Tensor) -> None:
        pixels = al.HALF.to_pixels(images)
        quality = f"{float(al.psnr(pixels, private)):.2f}"
        rows.append({"evaluation": entry["evaluation"], "loss": f"{entry['loss']:.4e}", "psnr": quality, "frame": ""})

    found = al.match_gradients(
        model, update, recipe=ONE_START, max_evaluations=SCRUB_EVALUATIONS, snapshots=SCRUB_EVERY, callback=record
    )
    pictures: list[Tensor] = []
    for row, entry in zip(rows, found.history, strict=True):
        if "images" in entry:
            row["frame"] = len(pictures)
            pictures.append(al.HALF.to_pixels(entry["images"])[0])
    write_csv(RESULTS / "matching_scrub.csv", rows)
    strip(pictures).save(RESULTS / "matching_scrub.png", optimize=True)
    print(f"scrub: {len(rows)} evaluations, {len(pictures)} frames, {rows[-1]['psnr']} dB, {found.reason}")


def record_twins() -> None:
    """The same attack on the same digits, with three kinds of position embedding and three seeds."""
    rows: list[dict[str, Any]] = []
    pictures: list[Tensor] = []
    for label in TWIN_DIGITS:
        private, labels = digit(label)
        for position in TWIN_POSITIONS:
            model = al.VisionTransformer(**DIGIT, position=position).double()
            update = al.client_update(model, al.HALF.to_input(private), labels)
            for seed in TWIN_SEEDS:
                found = al.match_gradients(
                    model, update, recipe=ONE_START, seed=seed, max_evaluations=TWIN_EVALUATIONS
                )
                diagnostics = found.diagnostics
                twin = Twin(
                    digit=label,
                    position=position,
                    seed=seed,
                    evaluations=diagnostics["evaluations"],
                    first_loss=float(f"{found.history[0]['loss']:.4e}"),
                    loss=float(f"{diagnostics['loss']:.4e}"),
                    residual=float(f"{diagnostics['residual']:.4e}"),
                    psnr=round(float(al.psnr(found.pixels, private)), 2),
                    stopped=diagnostics["stopped"],
                    torch=torch.__version__,
                )
                print(twin, flush=True)
                rows.append(asdict(twin))
                pictures.append(found.pixels[0])
    write_csv(RESULTS / "matching_twins.csv", rows)
    strip(pictures).save(RESULTS / "matching_twins.png", optimize=True)


def main(names: list[str]) -> None:
    records = {"scrub": record_scrub, "twins": record_twins}
    if unknown := [name for name in names if name not in records]:
        raise SystemExit(f"{unknown[0]!r} is none of {', '.join(records)}")
    for name in names or records:
        records[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
