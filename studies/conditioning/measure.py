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
from typing import Any

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


KEY = ("section", "weights", "embedding", "precision", "seed", "victim")


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
    embeddings=tuple(e for e in EMBEDDINGS if e.label in QUICK),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One victim of one model in float32 or float64; ``precisions`` are those of its update.

    ``weights`` are "random" or "trained"; ``grid`` is the number of patches on a side. The victim
    is a photograph, or "digit K": the first of its class among MNIST-5k's test digits."""

    section: str
    weights: str
    embedding: Embedding
    grid: int
    precisions: tuple[str, ...]
    seed: int
    victim: str

    @property
    def place(self) -> tuple[Any, ...]:
        """Its first row's values in the columns KEY."""
        return (self.section, self.weights, self.embedding.label, self.precisions[0], self.seed, self.victim)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precisions == ("float64",) else torch.float32


def cases(study: Study) -> Iterator[Case]:
    """Photographs in 64 and 16 patches, random weights; then digits, before and after training."""
    for patch_size, seed in itertools.product((4, 8), range(study.seeds)):
        grid = 32 // patch_size
        for embedding, precisions in by_dtype(study.embeddings):
            for victim in al.victims()[: study.victims]:
                yield Case(f"32×32, {grid**2} patches", "random", embedding, grid, precisions, seed, victim)
    for seed, embedding in itertools.product(range(study.seeds), DIGITS):
        # Before training, a learned table is the random one.
        for weights in ("trained",) if embedding.kind == "learned" else ("random", "trained"):
            for _, precisions in by_dtype((embedding,)):
                for k in range(0, 2 * study.victims, 2):
                    yield Case("digits, 16 patches", weights, embedding, 4, precisions, seed, f"digit {k}")


def by_dtype(embeddings: tuple[Embedding, ...]) -> Iterator[tuple[Embedding, tuple[str, ...]]]:
    """The precisions of an update by that of its model: half ones are a float32 update rounded."""
    for embedding in embeddings:
        for group in (PRECISIONS[:1], PRECISIONS[1:]):
            if chosen := tuple(p for p in group if p in embedding.precisions):
                yield embedding, chosen


@functools.lru_cache(maxsize=1)
def photographed(
    study: Study, embedding: Embedding, grid: int, seed: int, dtype: torch.dtype
) -> tuple[nn.Module, Independence]:
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


def attacked(study: Study, case: Case) -> Iterator[Row]:
    """The rows of a case, one for each precision."""
    if case.victim.startswith("digit"):
        model = digit_model(study, case.embedding, case.seed, case.weights == "trained")
        model = copy.deepcopy(model).to(case.dtype)
        measured, label = independence(model), int(case.victim.removeprefix("digit "))
        pixels, labels = al.mnist5k("test", seed=case.seed)
        images = al.HALF.to_input(pixels[labels == label][:1]).to(case.dtype)
    else:
        model, measured = photographed(study, case.embedding, case.grid, case.seed, case.dtype)
        label = 3
        images = al.HALF.to_input(al.load_victim(case.victim, 32, dtype=torch.float64)[None]).to(case.dtype)
    yield from attack(model, images, label, measured, case)


def attack(model: nn.Module, images: Tensor, label: int, measured: Independence, case: Case) -> Iterator[Row]:
    """The span attack on images (1, C, H, W) in model-input space and the model's dtype."""
    anatomy, embedding = al.dissect(model), case.embedding
    truth = anatomy.preprocessing.to_pixels(images.double())[0]  # what this client has, in its precision
    update = al.client_update(model, images, torch.tensor([label]))
    tokens = model.embed(images).detach()[0, 1:].double()  # type: ignore[operator]  # (n, d)
    norm = float((tokens - tokens.mean(1, keepdim=True)).square().sum(1).mean().sqrt())
    for precision in case.precisions:
        dtype = getattr(torch, precision)
        result = al.span_closed_form(model, update if update.dtype == dtype else to_precision(update, dtype))
        eps, noise = torch.finfo(dtype).eps, result.diagnostics["outside"]
        yield Row(
            section=case.section, weights=case.weights, embedding=embedding.label, kind=embedding.kind,
            base=embedding.base, scale=embedding.scale, speed=embedding.speed, table=embedding.table,
            precision=precision, seed=case.seed, victim=case.victim,
            psnr=float(al.psnr(result.pixels[0], truth)), predicted_psnr=result.predicted_psnr, exact=result.exact,
            patches=len(tokens), rank=measured.rank(eps),
            rank_bound=2 * case.grid - 1 if embedding.kind == "2-D" else case.grid**2,
            sigma_largest=float(measured.positions[0]), sigma_least=measured.least,
            sigma_relative=measured.least / float(measured.positions[0]), condition=measured.condition,
            token_norm=norm, noise=noise, digits=measured.digits(noise * norm),
            digits_mean=measured.mean_digits(noise * norm), digits_eps=measured.digits(eps * norm),
            digits_condition=-math.log10(measured.condition * eps),
        )  # fmt: skip


def measure(folder: Path, options: argparse.Namespace) -> None:
    study = SMALLEST if options.quick else Study()
    fill(
        folder / "conditioning.csv", Row, {case.place: case for case in cases(study)}, partial(attacked, study),
        key=KEY, settings={name: getattr(study, name) for name in ("width", "depth", "images", "epochs")},
    )  # fmt: skip
