"""Gradient matching on real ViTs at 224×224: `python -m studies.real_vits` writes real_vits*.csv, .md and .png.

The learned position embedding's gradient is shared. Every published recipe attacks the same updates,
with the position term and without it, matching in float32 and in float64; "april" also with the term
and no patch moved. Random weights, a head that is not zero, one photograph, float32 gradients, labels
recovered. A search ends after its evaluations. Convolutions keep all digits of float32: where CUDA
rounds their factors to ten bits (TF32), it rounds the client's gradient.

    python -m studies.real_vits              # needs a CUDA device; days on a CPU
    python -m studies.real_vits --updates 2  # one photograph on each of the models, not three with two seeds
    python -m studies.real_vits --quick      # one update of a tiny ViT, on the CPU; keeps no file

The figure and real_vits_places.csv are made from the pictures that the searches found, which are kept
beside the CSV, in no repository.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.transforms.functional import resize, to_pil_image, to_tensor

import aprillab as al
from aprillab import viz
from aprillab.anatomy import Tiling
from aprillab.attacks.searches.rearrange import rearranged
from aprillab.zoo import build_model

from ._rows import StudyError, fill, made, read
from ._runner import Claim, Description, between, run_study, study_parser
from ._tables import markdown

LABEL = 3
MODELS = ("torchvision vit_b_16", "timm deit_base_patch16_224")
NAMES = dict(zip(MODELS, ("ViT-B/16", "DeiT-B/16"), strict=True))
VICTIMS = ("astronaut", "chelsea", "coffee")
SEEDS = (0, 1)  # of weights and first guess
EVALUATIONS = 2000  # of one search, over all its restarts
UNMOVED = "april, no patch moved"
PICTURES = "real_vits_pictures"  # the folder of what the searches found, which the figure is drawn from
THUMBNAIL, PATCH = 112, 8  # pixels a side; a patch of 16 pixels at 224 has 8
TILE = 56  # pixels a side of what chapter 05 shows


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


@dataclass(frozen=True)
class Places:
    """A small copy of what a search found: its PSNR in dB as it is, and with each patch where it fits the photograph
    best; and how many of the patches are there already.
    """

    model: str
    victim: str
    seed: int
    precision: str
    recipe: str
    position_term: bool
    small: float
    in_place: float
    at_home: float


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All searches, in float32 first; each photograph on all models before the next."""
    updates = [(0, VICTIMS[0], "tiny")] if options.quick else list(itertools.product(SEEDS, VICTIMS, MODELS))
    for precision, (seed, victim, model) in itertools.product(("float32", "float64"), updates[: options.updates]):
        for recipe, position_term in itertools.product(al.RECIPES, (True, False)):
            yield Case(model, victim, seed, precision, recipe, position_term)
        if precision == "float32":
            yield Case(model, victim, seed, precision, UNMOVED, True)


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
    """A published recipe, with APRIL's position term or without any; or APRIL's, which then moves no patch."""
    april = al.RECIPES["april"]
    if name == UNMOVED:
        return replace(april, position_term=al.PositionTerm())
    return replace(al.RECIPES[name], position_term=april.position_term if position_term else None)


def attacked(case: Case, *, folder: Path, device: str, evaluations: int) -> Iterator[Row]:
    model, update, pixels = shared(case.model, case.victim, case.seed, device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = al.match_gradients(
            model, update, recipe=recipe_of(case.recipe, case.position_term), dtype=getattr(torch, case.precision),
            seed=case.seed, max_evaluations=evaluations, progress=False,
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


def placed(case: Case, *, folder: Path) -> Iterator[Places]:
    """Of a picture that was kept: are its patches the photograph's, in another order?"""
    found = to_tensor(Image.open(picture_of(folder, case)))[None]
    truth = al.load_victim(case.victim, THUMBNAIL)[None]
    tiling = Tiling.square(PATCH, (THUMBNAIL, THUMBNAIL))
    mine, shared = (tiling.patches(picture)[0] for picture in (found, truth))
    _, places = linear_sum_assignment(torch.cdist(mine, shared).square().numpy())
    moved = rearranged(found, torch.from_numpy(places), tiling)
    at_home = (torch.from_numpy(places) == torch.arange(len(places))).double().mean()
    small, in_place = (float(al.psnr(picture[0], truth[0])) for picture in (found, moved))
    yield Places(*case, small=small, in_place=in_place, at_home=float(at_home))


def measure(folder: Path, options: argparse.Namespace) -> None:
    if options.quick:
        device, evaluations = "cpu", 6
    else:
        device, evaluations = options.device, options.max_evaluations
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise StudyError("there is no CUDA device: --device cpu takes days, --quick a few seconds")
    (folder / PICTURES).mkdir(exist_ok=True)
    attack = functools.partial(attacked, folder=folder, device=device, evaluations=evaluations)
    fill_here = functools.partial(fill, cases=list(cases(options)), key=Case._fields)
    fill_here(folder / "real_vits.csv", Row, measure=attack, settings={"max_evaluations": evaluations})
    fill_here(folder / "real_vits_places.csv", Places, measure=functools.partial(placed, folder=folder))


Table = Callable[[pd.DataFrame], str]


def by_recipe(rows: pd.DataFrame, cell: Table) -> str:
    """A line for each recipe and term, a column for each model and precision."""
    lines = []
    for (recipe, term), group in rows.groupby(["recipe", "position_term"], sort=False):
        columns = {
            f"{model.split()[0]}, {precision}": cell(part)
            for (model, precision), part in group.groupby(["model", "precision"], sort=False)
        }
        lines.append({"recipe": recipe, "position term": "with" if term else "without", **columns})
    return markdown(pd.DataFrame(lines).fillna("–"))


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "real_vits.csv"
    rows = read(path, Row).merge(read(folder / "real_vits_places.csv", Places), on=list(Case._fields))
    whole = rows.recipe.eq("april") & rows.position_term
    unmoved = rows[rows.recipe == UNMOVED]
    without, rest = rows[~rows.position_term], rows[~whole & rows.recipe.ne(UNMOVED)]
    april_without = without[without.recipe == "april"]
    fields = {
        "made": made(path),
        "device": ", ".join(rows.device.unique()),
        "updates": len(rows[["model", "victim", "seed"]].drop_duplicates()),
        "evaluations": rows.evaluations.max(),
        "table": by_recipe(rows, lambda part: f"{part.psnr.median():.1f}"),
        "places": by_recipe(rows, lambda part: f"{part.in_place.median():.1f} ({part.at_home.median():.0%})"),
        "residuals": by_recipe(rows, lambda part: f"{part.residual.median():.1e}"),
        "recorded": markdown(pd.read_csv(folder / "real_vits_recorded.csv")) if not options.quick else "",
        "april": f"{rows[whole].psnr.min():.1f}",
        "rest": f"{rest.psnr.max():.1f}",
        "without": f"{without.psnr.max():.1f}",
        "unmoved": " and ".join(f"{value:.1f}" for value in unmoved.psnr),
        "fit": f"{april_without.residual.max():.1%}",
    }
    complete = len(rows) == len(list(cases(options)))
    return fields, [
        Claim("each with the position term and without it", len(rows), complete),
        between("shows the photograph", rows[whole].psnr.min(), least=30),
        between("Nothing else does", rest.psnr.max(), most=25),
        between("without the term none does", without.psnr.max(), most=9),
        between("the term alone", unmoved.psnr.min(), least=30),
        between("fits the shared gradient", april_without.residual.max(), most=0.01),
        between("the patches are there, coarsely", (april_without.in_place - april_without.small).min(), least=5),
    ]


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    """What the searches in float32 made of the first photograph; nothing where their pictures are not kept."""
    rows = read(folder / "real_vits.csv", Row)
    first = rows[(rows.victim == VICTIMS[0]) & (rows.seed == SEEDS[0]) & (rows.precision == "float32")]
    first = first[first.recipe != UNMOVED]
    if not len(first) or not all(picture_of(folder, _case(row)).is_file() for row in first.itertuples()):
        return {}
    return {
        "real_vits.png": viz.to_png(pictures(folder, first), dpi=100),
        "real_vits_tiles.png": tiles(folder, first),
    }


def tiles(folder: Path, rows: pd.DataFrame) -> bytes:
    """The pictures alone, TILE pixels a side: a line for each model and term, a column for each recipe."""
    lines = [[picture_of(folder, _case(row)) for row in group.itertuples()] for _, group in lines_of(rows)]
    sheet = Image.new("RGB", (TILE * len(lines[0]), TILE * len(lines)))
    for i, line in enumerate(lines):
        for j, file in enumerate(line):
            sheet.paste(Image.open(file).resize((TILE, TILE), Image.Resampling.LANCZOS), (TILE * j, TILE * i))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def lines_of(rows: pd.DataFrame) -> Any:
    """The rows of one model with the term, or without it, one group after the other."""
    return rows.groupby(["model", "position_term"], sort=False)


def pictures(folder: Path, rows: pd.DataFrame) -> Figure:
    """A line for each model with the position term and without it, a column for each recipe."""
    lines, titles = {}, []
    for (model, term), group in lines_of(rows):
        label = f"{NAMES.get(model, model)},\n{'with' if term else 'without'} the term"
        found = [to_tensor(Image.open(picture_of(folder, _case(row)))) for row in group.itertuples()]
        lines[label] = [al.load_victim(VICTIMS[0], THUMBNAIL), *found]
        titles.append(["the photograph", *(f"{row.recipe}\n{row.psnr:.1f} dB" for row in group.itertuples())])
    return viz.picture_grid(lines, titles=titles, panel=1.6)


def _case(row: Any) -> Case:
    return Case(*(getattr(row, name) for name in Case._fields))


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("real_vits", __doc__, alone="searches that share a GPU wait for each other")
    parser.add_argument("--updates", type=int, metavar="N", help="attack the first N of the 12 (default: all)")
    parser.add_argument("--device", default="cuda", help="where to search (%(default)s)")
    parser.add_argument("--max-evaluations", type=int, default=EVALUATIONS, help="of a search (%(default)s)")
    run_study("real_vits", parser.parse_args(argv), measure=measure, describe=describe, draw=draw)


if __name__ == "__main__":
    main()
