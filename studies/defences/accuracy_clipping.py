"""Clipping an update of several images bounds none of them: by how much one image
moves what is shared.

The mean gradient of eight images, and one of the eight replaced by another image of the pool
with any label: the label is the client's, too. Clipped image by image the mean moves by at
most 2C/8. Clipped as a whole it may move by up to 2C, whatever the number of images; noise
that was measured by C/8 is then eight times too small. Before training, and after the plain
training of `accuracy_federated`, where a batch that the model knows well has a small gradient
and one image may be all of it.

C is the median norm of the images' own gradients, for both.

    python -m studies.defences.accuracy_clipping        # a minute
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

import aprillab as al
from aprillab.training import train

from .._rows import fill, read
from .._runner import run_study, study_parser
from .._tables import grouped, markdown
from ..accuracy import checked, images_and_labels, small_vit
from .accuracy import add_arguments
from .accuracy_federated import RATE, client_gradients

FILE, BATCH = "defences_clipping.csv", 8
BATCHES, POOL = 16, 32  # batches, and images that may come in, each with all ten labels


class Case(NamedTuple):
    seed: int
    weights: str  # "initial" or "trained"


@dataclass(frozen=True)
class Row:
    """One batch: the largest changes of what is shared, in units of C, over all
    replacements of one image.

    ``bound`` is 2/batch, which per-image clipping keeps; ``norm`` of the batch's mean gradient.
    """

    seed: int
    weights: str
    batch: int
    number: int
    clip: float
    norm: float
    per_image: float
    per_update: float
    bound: float


def measured(options: argparse.Namespace, case: Case) -> Iterator[Row]:
    (x, y), _ = images_and_labels(options, case.seed)
    model = small_vit(options, x, case.seed)
    if case.weights == "trained":
        train(model, x, y, epochs=options.epochs, seed=case.seed, batch_size=50, lr=RATE, progress=False)
    batches = 1 if options.quick else BATCHES
    pool = 2 if options.quick else POOL
    own = rows_of(model, x[: BATCH * batches], y[: BATCH * batches])
    coming, labels = x[-pool:].repeat_interleave(10, 0), torch.arange(10).repeat(pool)
    others = rows_of(model, coming, labels)
    gram = gram_of(torch.cat([own, others]))
    clip = float(gram.diagonal()[: len(own)].sqrt().median())
    for number, members in enumerate(torch.arange(len(own)).split(BATCH)):
        chosen = torch.cat([members, torch.arange(len(own), len(gram))])
        one, whole = changes(gram[chosen][:, chosen], BATCH, clip)
        norm = float(gram[members][:, members].mean().sqrt())
        yield Row(*case, BATCH, number, clip, norm, one / clip, whole / clip, 2 / BATCH)


def rows_of(model: al.VisionTransformer, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image, a row each."""
    parts = zip(images.split(50), labels.split(50), strict=True)
    return torch.cat(
        [torch.cat([g.flatten(1) for g in client_gradients(model, *part).values()], 1) for part in parts]
    )


def gram_of(rows: Tensor) -> Tensor:
    """Inner products of the rows of (M, N): float64 of shape (M, M)."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(2**14, dim=1):
        gram += part.double() @ part.double().mT
    return gram


def changes(gram: Tensor, size: int, clip: float) -> tuple[float, float]:
    """The largest change of the mean of ``size`` gradients when one of them is replaced by another.

    ``gram`` holds the inner products of all gradients: first those of the batch, then those that
    may come in. Returns the change clipped image by image, and clipped as a whole.
    """
    lengths = gram.diagonal().sqrt()
    factors = (clip / lengths).clamp(max=1)
    each = _distances(gram * factors[:, None] * factors)[:size, size:].max() / size
    # What is shared as weights on all gradients: a row for the batch, and one for each replacement.
    before = torch.zeros(1, len(gram), dtype=torch.float64)
    before[:, :size] = 1 / size
    after = before.repeat(size * (len(gram) - size), 1)
    for row, (out, new) in zip(after, itertools.product(range(size), range(size, len(gram))), strict=True):
        row[out], row[new] = 0, 1 / size
    shared = torch.cat([before, after])
    shared *= (clip / (shared @ gram * shared).sum(1, keepdim=True).sqrt()).clamp(max=1)
    moved = shared[1:] - shared[0]
    return float(each), float((moved @ gram * moved).sum(1).max().clamp(min=0).sqrt())


def _distances(gram: Tensor) -> Tensor:
    own = gram.diagonal()
    return (own[:, None] + own - 2 * gram).clamp(min=0).sqrt()


def measure_clipping(folder: Path, options: argparse.Namespace) -> None:
    cases = [Case(seed, weights) for seed in range(options.seeds) for weights in ("initial", "trained")]
    settings = {name: getattr(options, name) for name in ("patch_size", "width", "depth", "epochs")}
    fill(folder / FILE, Row, cases, partial(measured, options), key=Case._fields, settings=settings)


def clipping_summary(rows: pd.DataFrame) -> str:
    """A line before and one after training; changes in units of C, least noise
    multipliers that are wrong.
    """

    def line(runs: pd.DataFrame) -> dict[str, str]:
        return {
            "batches": str(len(runs)),
            "C": f"{runs['clip'].median():.1f}",
            "image by image: most": f"{runs.per_image.max():.3f}",
            "its bound 2/B": f"{runs.bound.iloc[0]:.3f}",
            "as a whole: median": f"{runs.per_update.median():.2f}",
            "most": f"{runs.per_update.max():.2f}",
            "times the bound": f"{(runs.per_update / runs.bound).max():.1f}",
        }

    return markdown(grouped(rows, ["weights"], line))


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("defences.accuracy_clipping", __doc__)
    add_arguments(parser)
    options = checked(parser, parser.parse_args(argv))
    run_study("defences_clipping", options, measure=_measure_and_print)


def _measure_and_print(folder: Path, options: argparse.Namespace) -> None:
    measure_clipping(folder, options)
    print(clipping_summary(read(folder / FILE, Row)))


if __name__ == "__main__":
    main()
