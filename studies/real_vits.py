"""Gradient matching on real ViTs at 224×224: `python -m studies.real_vits` writes real_vits.csv, .md and .png.

The learned position embedding's gradient is shared. Every published recipe attacks the same updates,
with the position term and without it, matching in float32 and in float64. Random weights, a head that
is not zero, one photograph, float32 gradients, labels recovered. A search ends after its evaluations
or its seconds, whichever comes first. Convolutions keep all digits of float32: CUDA would round
their factors to ten bits (TF32), and with them the client's gradient.

    python -m studies.real_vits              # needs a CUDA device; days on a CPU
    python -m studies.real_vits --updates 2  # one photograph on each of the models, not three with two seeds
    python -m studies.real_vits --jobs 6     # one process launches kernels too slowly to keep a GPU busy
    python -m studies.real_vits --quick      # one update of a tiny ViT, on the CPU; keeps no file
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import resize, to_pil_image, to_tensor

import aprillab as al
from aprillab import viz
from aprillab.zoo import build_model

from ._rows import StudyError, fill, made, read
from ._runner import Claim, Description, run_study, study_parser
from ._tables import grouped, markdown

LABEL = 3
MODELS = ("torchvision vit_b_16", "timm deit_base_patch16_224")
VICTIMS = ("astronaut", "chelsea", "coffee")
SEEDS = (0, 1)  # of weights and first guess
EVALUATIONS, SECONDS = 2000, 300.0  # of one search, over all its restarts
PICTURES = "real_vits_pictures"  # the folder of what the searches found, which the figure is drawn from
THUMBNAIL = 112  # pixels a side


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
    """All searches, in float32 first; each photograph on all models before the next."""
    updates = [(0, VICTIMS[0], "tiny")] if options.quick else list(itertools.product(SEEDS, VICTIMS, MODELS))
    for precision, (seed, victim, model) in itertools.product(("float32", "float64"), updates[: options.updates]):
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
    # Torchvision's and timm's patch embeddings are convolutions.
    with torch.backends.cudnn.flags(allow_tf32=False):
        update = al.client_update(model, images, torch.tensor([LABEL], device=device))
    return model, update, pixels


def recipe_of(name: str, position_term: bool) -> al.Recipe:
    """A published recipe, with APRIL's position term or without any."""
    recipe = al.RECIPES[name]
    term = al.RECIPES["april"].position_term if position_term else None
    return replace(recipe, position_term=term)


def attacked(case: Case, *, folder: Path, device: str, evaluations: int, seconds: float) -> Iterator[Row]:
    model, update, pixels = shared(case.model, case.victim, case.seed, device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = al.match_gradients(
            model, update, recipe=recipe_of(case.recipe, case.position_term), dtype=getattr(torch, case.precision),
            seed=case.seed, max_evaluations=evaluations, max_seconds=seconds, progress=False,
        )  # fmt: skip
    numbers, pixels = found.diagnostics, pixels.to(found.pixels)
    if numbers["stopped"] == "interrupted":
        raise KeyboardInterrupt
    small = resize(found.pixels[0].float().cpu(), [THUMBNAIL, THUMBNAIL], antialias=True)
    to_pil_image(small.clamp(0, 1)).save(picture_of(folder, case))
    yield Row(
        *case, psnr=float(al.psnr(found.pixels[0], pixels[0])), ssim=float(al.ssim(found.pixels[0], pixels[0])),
        loss=numbers["loss"], residual=numbers["residual"], evaluations=numbers["evaluations"],
        seconds=found.seconds, stopped=numbers["stopped"],
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    )  # fmt: skip


def picture_of(folder: Path, case: Case) -> Path:
    """The file of what a search found."""
    return folder / PICTURES / f"{'-'.join(map(str, case))}.png".replace(" ", "-")


def measure(folder: Path, options: argparse.Namespace) -> None:
    if options.quick:
        device, evaluations, seconds = "cpu", 6, 60.0
    else:
        device, evaluations, seconds = options.device, options.max_evaluations, options.max_seconds
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise StudyError("there is no CUDA device: --device cpu takes days, --quick a few seconds")
    (folder / PICTURES).mkdir(exist_ok=True)
    attack = functools.partial(attacked, folder=folder, device=device, evaluations=evaluations, seconds=seconds)
    settings = {"max_evaluations": evaluations, "max_seconds": seconds}
    path, columns = folder / "real_vits.csv", Case._fields
    fill(path, Row, cases(options), attack, key=columns, settings=settings, workers=options.workers)


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


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    """What the searches in float32 made of the first photograph; nothing where their pictures are not kept."""
    rows = read(folder / "real_vits.csv", Row)
    first = rows[(rows.victim == VICTIMS[0]) & (rows.seed == SEEDS[0]) & (rows.precision == "float32")]
    if not len(first) or not all(picture_of(folder, _case(row)).is_file() for row in first.itertuples()):
        return {}
    return {"real_vits.png": viz.to_png(pictures(folder, first), dpi=150)}


def pictures(folder: Path, rows: pd.DataFrame) -> Figure:
    """A line for each model with the position term and without it, a column for each recipe."""
    lines, titles = {}, []
    for (model, term), group in rows.groupby(["model", "position_term"], sort=False):
        label = f"{model.split()[0]}, {'with' if term else 'without'} the term"
        found = [to_tensor(Image.open(picture_of(folder, _case(row)))) for row in group.itertuples()]
        lines[label] = [al.load_victim(VICTIMS[0], THUMBNAIL), *found]
        titles.append(["the photograph", *(f"{row.recipe}\n{row.psnr:.1f} dB" for row in group.itertuples())])
    return viz.picture_grid(lines, titles=titles, panel=1.6)


def _case(row: Any) -> Case:
    return Case(*(getattr(row, name) for name in Case._fields))


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("real_vits", __doc__)
    parser.add_argument("--updates", type=int, metavar="N", help="attack the first N of the 12 (default: all)")
    parser.add_argument("--device", default="cuda", help="where to search (%(default)s)")
    parser.add_argument("--max-evaluations", type=int, default=EVALUATIONS, help="of a search (%(default)s)")
    parser.add_argument("--max-seconds", type=float, default=SECONDS, help="of a search (%(default)s)")
    run_study("real_vits", parser.parse_args(argv), measure=measure, describe=describe, draw=draw)


if __name__ == "__main__":
    main()
