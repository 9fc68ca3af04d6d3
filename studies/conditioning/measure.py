"""What is measured: the span attack on models with fixed embeddings, in four precisions."""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.defenses import freeze_position, to_precision
from aprillab.training import train

from .._rows import fill
from .independence import PRECISIONS, Embedding, Independence, independence, sinusoids, values, with_position

RMS = 0.5**0.5  # of a sinusoid
FULL = PRECISIONS[:2]
BASES = (1e1, 1e2, 1e3, 1e4, 1e5)
EMBEDDINGS = (
    *(Embedding("random", scale) for scale in (0.002, 0.02, RMS)),
    *(sinusoids("1-D", base, precisions=PRECISIONS if base == 1e4 else FULL) for base in BASES),
    *(sinusoids("1-D", scale=scale) for scale in (0.1, 10.0)),
    *(sinusoids("1-D", speed=speed) for speed in (1.5, 2.0, 3.0)),
    sinusoids("1-D", table="float32", precisions=("float64",)),
    sinusoids("1-D", table="bfloat16", precisions=FULL),
    *(sinusoids("2-D", base, precisions=PRECISIONS if base == 1e4 else FULL) for base in BASES),
    *(sinusoids("2-D", scale=scale, precisions=FULL) for scale in (0.1, 10.0)),
    sinusoids("2-D", speed=3.0, precisions=FULL),
    sinusoids("2-D", table="bfloat16", precisions=FULL),
)
# Trained in float32 and, for float64, converted: their tables are stored in float32.
DIGITS = (
    Embedding("learned", table="float32"), Embedding("random", 0.02, table="float32"),
    sinusoids("1-D", table="float32"), sinusoids("2-D", table="float32"),
)  # fmt: skip
QUICK = {
    "random, deviation 0.02", "1-D sinusoids, base 10000", "1-D sinusoids, base 10000, stored in float32",
    "2-D sinusoids, base 10000",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One attack. The columns are explained on the page."""

    section: str
    weights: str
    embedding: str
    kind: str
    base: float
    scale: float
    speed: float
    table: str
    precision: str
    seed: int
    victim: str
    psnr: float
    predicted_psnr: float | None
    exact: bool
    patches: int
    rank: int
    rank_bound: int
    sigma_largest: float
    sigma_least: float
    sigma_relative: float
    condition: float
    token_norm: float
    noise: float
    digits: float
    digits_mean: float
    digits_eps: float
    digits_condition: float


@dataclass(frozen=True)
class Study:
    """How much is measured."""

    victims: int = 5
    seeds: int = 3
    width: int = 384
    depth: int = 4
    images: int = 1000
    epochs: int = 4
    embeddings: tuple[Embedding, ...] = EMBEDDINGS


SMALLEST = Study(
    victims=1, seeds=1, width=264, depth=2, images=100, epochs=1,
    embeddings=tuple(e for e in EMBEDDINGS if str(e) in QUICK),
)  # fmt: skip


class Case(NamedTuple):
    """A row's values in the columns that tell rows apart.

    The victim is a photograph under random weights, or "digit K", the first of its class among
    MNIST-5k's test digits, under random or trained ones.
    """

    section: str
    weights: str
    embedding: Embedding
    precision: str
    seed: int
    victim: str


def cases(study: Study) -> Iterator[Case]:
    """Photographs in 64 and 16 patches; then digits. Those of one model follow each other."""
    for patches, seed, embedding in itertools.product((64, 16), range(study.seeds), study.embeddings):
        for group in by_dtype(embedding):
            for victim, precision in itertools.product(al.victims()[: study.victims], group):
                yield Case(f"32×32, {patches} patches", "random", embedding, precision, seed, victim)
    for seed, embedding in itertools.product(range(study.seeds), DIGITS):
        # Before training, a learned table is the random one.
        for weights in ("trained",) if embedding.kind == "learned" else ("random", "trained"):
            for group in by_dtype(embedding):
                for k, precision in itertools.product(range(0, 2 * study.victims, 2), group):
                    yield Case("digits, 16 patches", weights, embedding, precision, seed, f"digit {k}")


def by_dtype(embedding: Embedding) -> list[tuple[str, ...]]:
    """Precisions of an update by that of its model: half ones are a float32 update rounded."""
    groups = (PRECISIONS[:1], PRECISIONS[1:])
    return [tuple(p for p in group if p in embedding.precisions) for group in groups]


Measured = tuple[nn.Module, Independence]


@functools.lru_cache(maxsize=1)
def photographed(study: Study, section: str, embedding: Embedding, seed: int, dtype: torch.dtype) -> Measured:
    grid = 8 if "64 patches" in section else 4
    model = al.VisionTransformer(
        image_size=32, patch_size=32 // grid, width=study.width, depth=study.depth, heads=6, classes=10,
        position="frozen", seed=seed,
    ).to(dtype)  # fmt: skip
    with_position(model, values(embedding, grid, study.width, seed))
    return model, independence(model)


@functools.lru_cache(maxsize=1)
def digit_model(study: Study, embedding: Embedding, seed: int, trained: bool) -> nn.Module:
    """In float32, with the position embedding frozen once it is trained."""
    model = al.VisionTransformer(
        image_size=28, patch_size=7, channels=1, width=128, depth=3, heads=4, classes=10, mlp_ratio=2.0,
        position="learned" if embedding.kind == "learned" else "frozen", seed=seed,
    )  # fmt: skip
    if embedding.kind != "learned":
        with_position(model, values(embedding, 4, 128, seed))
    if trained:
        x, y = al.mnist5k("train", seed=seed)
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: study.images]
        history = train(
            model, al.HALF.to_input(x[some]), y[some], epochs=study.epochs, seed=seed, batch_size=50, lr=2e-3,
            progress=False,
        )  # fmt: skip
        if len(history) < study.epochs:  # train ends at Ctrl-C
            raise KeyboardInterrupt
    return freeze_position(model)


@functools.lru_cache(maxsize=1)
def client(study: Study, case: Case, dtype: torch.dtype) -> tuple[Measured, Tensor, al.ClientUpdate]:
    """The model, the images (1, C, H, W) in model-input space, their update; all in ``dtype``."""
    if case.victim.startswith("digit"):
        model = digit_model(study, case.embedding, case.seed, case.weights == "trained")
        model = copy.deepcopy(model).to(dtype)
        measured, label = independence(model), int(case.victim.removeprefix("digit "))
        pixels, labels = al.mnist5k("test", seed=case.seed)
        pixels = pixels[labels == label][:1]
    else:
        model, measured = photographed(study, case.section, case.embedding, case.seed, dtype)
        label, pixels = 3, al.load_victim(case.victim, 32, dtype=torch.float64)[None]
    images = al.HALF.to_input(pixels).to(dtype)
    return (model, measured), images, al.client_update(model, images, torch.tensor([label]))


def attacked(study: Study, case: Case) -> Iterator[Row]:
    dtype = torch.float64 if case.precision == "float64" else torch.float32
    # The precisions of one update share its client.
    (model, measured), images, update = client(study, case._replace(precision=""), dtype)
    truth = al.dissect(model).preprocessing.to_pixels(images.double())[0]  # this client's, in its precision
    tokens = model.embed(images).detach()[0, 1:].double()  # type: ignore[operator]  # (n, d)
    norm = float((tokens - tokens.mean(1, keepdim=True)).square().sum(1).mean().sqrt())
    shared, n, embedding = getattr(torch, case.precision), len(tokens), case.embedding
    result = al.span_closed_form(model, update if update.dtype == shared else to_precision(update, shared))
    eps, noise = torch.finfo(shared).eps, result.diagnostics["outside"]
    yield Row(
        **case._asdict() | {"embedding": str(embedding)}, kind=embedding.kind, base=embedding.base,
        scale=embedding.scale, speed=embedding.speed, table=embedding.table,
        psnr=float(al.psnr(result.pixels[0], truth)), predicted_psnr=result.predicted_psnr, exact=result.exact,
        patches=n, rank=measured.rank(eps),
        rank_bound=2 * math.isqrt(n) - 1 if embedding.kind == "2-D" else n,
        sigma_largest=float(measured.positions[0]), sigma_least=measured.least,
        sigma_relative=measured.least / float(measured.positions[0]), condition=measured.condition,
        token_norm=norm, noise=noise, digits=measured.digits(noise * norm),
        digits_mean=measured.mean_digits(noise * norm), digits_eps=measured.digits(eps * norm),
        digits_condition=-math.log10(measured.condition * eps),
    )  # fmt: skip


def measure(folder: Path, options: argparse.Namespace) -> None:
    study = SMALLEST if options.quick else Study()
    settings = {name: getattr(study, name) for name in ("width", "depth", "images", "epochs")}
    attack = partial(attacked, study)
    fill(
        folder / "conditioning.csv", Row, cases(study), attack, key=Case._fields, settings=settings,
        workers=options.workers, together=lambda case: case._replace(precision="", victim=""),
    )  # fmt: skip
