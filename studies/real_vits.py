"""Gradient matching on real ViTs at 224×224: `python -m studies.real_vits` writes real_vits.csv and .md.

The learned position embedding's gradient is shared. Every published recipe attacks the same updates,
with the position term and without it, matching in float32 and in float64. Random weights, a head that
is not zero, one photograph, float32 gradients, labels recovered. A search ends after its evaluations
or its seconds, whichever comes first.

    python -m studies.real_vits            # needs a CUDA device; days on a CPU
    python -m studies.real_vits --quick    # one update of a tiny ViT, on the CPU; keeps no file
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.zoo import build_model

from ._rows import StudyError, fill, made, read
from ._runner import Claim, Description, run_study, study_parser
from ._tables import grouped, markdown

LABEL = 3
MODELS = ("torchvision vit_b_16", "timm deit_base_patch16_224")
VICTIMS = ("astronaut", "chelsea", "coffee")
SEEDS = (0, 1)  # of weights and first guess
EVALUATIONS, SECONDS = 2000, 300.0  # of one search, over all its restarts


class Case(NamedTuple):
    """A row's values in the columns that tell rows apart."""

    model: str
    victim: str
    seed: int
    precision: str  # that is matched in
    recipe: str
    position_term: bool


@dataclass(frozen=True)
class Row:
    """One search; PSNR in dB, seconds of the wall clock."""

    model: str
    victim: str
    seed: int
    precision: str
    recipe: str
    position_term: bool
    psnr: float
    ssim: float
    loss: float
    residual: float
    evaluations: int
    seconds: float
    stopped: str
    device: str


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All searches, those on one update together."""
    updates = [("tiny", VICTIMS[0], 0)] if options.quick else list(itertools.product(MODELS, VICTIMS, SEEDS))
    for (model, victim, seed), precision in itertools.product(updates, ("float32", "float64")):
        for recipe, position_term in itertools.product(al.RECIPES, (True, False)):
            yield Case(model, victim, seed, precision, recipe, position_term)


def build(name: str, seed: int) -> nn.Module:
    """A model by its name, with random weights of the seed and a head that is not zero."""
    if name == "tiny":
        return al.VisionTransformer(image_size=16, patch_size=8, width=48, depth=2, heads=2, classes=10, seed=seed)
    if name == "torchvision vit_b_16":
        return build_model("vit_b_16", image_size=224, seed=seed)
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name.removeprefix("timm ")).eval()
        nn.init.normal_(model.get_classifier().weight, std=0.02)
    return model


@functools.lru_cache(maxsize=1)
def shared(name: str, victim: str, seed: int, device: str) -> tuple[nn.Module, al.ClientUpdate, Tensor]:
    """A model, a client's float32 update, and its private pixels (1, C, H, W)."""
    model = build(name, seed).to(device)
    anatomy = al.dissect(model)
    pixels = al.load_victim(victim, anatomy.image_size[0])[None].to(device)
    images = anatomy.preprocessing.to_input(pixels)
    return model, al.client_update(model, images, torch.tensor([LABEL], device=device)), pixels


def recipe_of(name: str, position_term: bool) -> al.Recipe:
    """A published recipe, with APRIL's position term or without any."""
    recipe = al.RECIPES[name]
    term = al.RECIPES["april"].position_term if position_term else None
    return replace(recipe, position_term=term)


def attacked(case: Case, *, device: str, evaluations: int, seconds: float) -> Iterator[Row]:
    model, update, pixels = shared(case.model, case.victim, case.seed, device)
    found = al.match_gradients(
        model, update, recipe=recipe_of(case.recipe, case.position_term), dtype=getattr(torch, case.precision),
        seed=case.seed, max_evaluations=evaluations, max_seconds=seconds, progress=False,
    )  # fmt: skip
    numbers, pixels = found.diagnostics, pixels.to(found.pixels)
    if numbers["stopped"] == "interrupted":
        raise KeyboardInterrupt
    yield Row(
        *case, psnr=float(al.psnr(found.pixels[0], pixels[0])), ssim=float(al.ssim(found.pixels[0], pixels[0])),
        loss=numbers["loss"], residual=numbers["residual"], evaluations=numbers["evaluations"],
        seconds=found.seconds, stopped=numbers["stopped"],
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    )  # fmt: skip


def measure(folder: Path, options: argparse.Namespace) -> None:
    if options.quick:
        device, evaluations, seconds = "cpu", 6, 60.0
    else:
        device, evaluations, seconds = options.device, options.max_evaluations, options.max_seconds
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise StudyError("there is no CUDA device: --device cpu takes days, --quick a few seconds")
    attack = functools.partial(attacked, device=device, evaluations=evaluations, seconds=seconds)
    settings = {"max_evaluations": evaluations, "max_seconds": seconds}
    fill(folder / "real_vits.csv", Row, cases(options), attack, key=Case._fields, settings=settings)


def summary(group: pd.DataFrame) -> dict[str, str]:
    """The table's cells for one setting."""
    return {
        "searches": str(len(group)),
        "median dB": f"{group.psnr.median():.1f}",
        "least": f"{group.psnr.min():.1f}",
        "most": f"{group.psnr.max():.1f}",
        "median residual": f"{group.residual.median():.1e}",
        "evaluations a second": f"{(group.evaluations / group.seconds).median():.2g}",
    }


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "real_vits.csv"
    rows = read(path, Row)
    term = rows.position_term.map({True: "with", False: "without"})
    table = grouped(rows.assign(position_term=term), ("model", "recipe", "position_term", "precision"), summary)
    medians = rows.groupby(["recipe", "position_term"]).psnr.median()
    recipe, position_term = medians.idxmax()
    fields = {
        "made": made(path),
        "device": ", ".join(rows.device.unique()),
        "evaluations": rows.evaluations.max(),
        "table": markdown(table.rename(columns={"position_term": "position term"})),
        "best": f"{recipe} {'with' if position_term else 'without'} the position term, {medians.max():.1f} dB",
    }
    complete = len(rows) == len(list(cases(options)))
    return fields, [Claim("each with the position term and without it", len(rows), complete)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("real_vits", __doc__, alone="a search has the GPU for itself, and seconds end it")
    parser.add_argument("--device", default="cuda", help="where to search (%(default)s)")
    parser.add_argument("--max-evaluations", type=int, default=EVALUATIONS, help="of a search (%(default)s)")
    parser.add_argument("--max-seconds", type=float, default=SECONDS, help="of a search (%(default)s)")
    run_study("real_vits", parser.parse_args(argv), measure=measure, describe=describe)


if __name__ == "__main__":
    main()
