"""What a fixed position embedding costs: `python -m studies.accuracy` writes accuracy.csv and .md.

The same small pre-norm ViT, six position embeddings, the same budget, several seeds. A seed means
the same initial weights (but for the embedding), the same split into training and test images and
the same order of batches for all six, so differences are taken seed by seed. The budget was chosen
once and is not tuned for any of them; the accuracy is that of the last epoch, never the best one.

    python -m studies.accuracy                               # MNIST-5k, minutes on two cores
    python -m studies.accuracy --data cifar10 --root DIR     # CIFAR-10 is there; an afternoon, or a GPU
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy import stats
from torch import Tensor

import aprillab as al
from aprillab.training import train

from ._rows import fill, made, origin, read
from ._runner import Description, run_study, study_parser
from ._tables import grouped, markdown

RMS = 0.5**0.5  # of a sinusoid: the scale of the second frozen embedding
EMBEDDINGS = ("learned", "frozen", "frozen, scaled", "sinusoidal 1-D", "sinusoidal 2-D", "none")
SETTINGS = ("patch_size", "width", "depth", "epochs", "limit")


@dataclass(frozen=True)
class Row:
    data: str
    embedding: str
    seed: int
    accuracy: float
    loss: float
    epochs: int
    trained_parameters: int
    train_images: int
    test_images: int
    seconds: float


def options_of(embedding: str, grid: int, width: int, seed: int) -> dict[str, Any]:
    """The options of ``VisionTransformer`` that make this embedding; tokens are rows."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    scaled = RMS * torch.randn(grid**2 + 1, width, generator=generator)
    found: dict[str, dict[str, Any]] = {
        "learned": {"position": "learned"},
        "frozen": {"position": "frozen"},
        "frozen, scaled": {"position": "frozen", "position_values": scaled},
        "sinusoidal 1-D": {"position": "sinusoidal"},
        "sinusoidal 2-D": {"position": "sinusoidal", "position_values": al.sinusoidal_2d((grid, grid), width)},
        "none": {"position": "none"},
    }
    return found[embedding]


def images_and_labels(options: argparse.Namespace, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Training and test images in model-input space, with labels."""
    if options.data == "mnist5k":
        parts = [al.mnist5k(part, seed=seed) for part in ("train", "test")]
    else:
        parts = [al.torchvision_dataset("cifar10", options.root, train=part, limit=options.limit)
                 for part in (True, False)]  # fmt: skip
    return [(al.HALF.to_input(x), y) for x, y in parts]


def small_vit(options: argparse.Namespace, images: Tensor, seed: int, **embedding: Any) -> al.VisionTransformer:
    """The model of this study for such images, with random weights."""
    return al.VisionTransformer(
        image_size=images.shape[-1], patch_size=options.patch_size, channels=images.shape[1], width=options.width,
        depth=options.depth, heads=4, classes=10, mlp_ratio=2.0, seed=seed, **embedding,
    )  # fmt: skip


def trained(options: argparse.Namespace, case: tuple[int, str]) -> list[Row]:
    """One run."""
    seed, embedding = case
    (x, y), test = images_and_labels(options, seed)
    position = options_of(embedding, x.shape[-1] // options.patch_size, options.width, seed)
    model = small_vit(options, x, seed, **position).to(options.device)
    path = None
    if options.checkpoints:
        options.checkpoints.mkdir(parents=True, exist_ok=True)
        path = options.checkpoints / f"{embedding.replace(', ', '-').replace(' ', '-')}-{seed}.safetensors"
    history = train(
        model, x, y, epochs=options.epochs, seed=seed, batch_size=50, lr=2e-3, test=test, checkpoint=path,
        resume=path is not None, progress=False,
    )  # fmt: skip
    if len(history) < options.epochs:  # train ends at Ctrl-C
        raise KeyboardInterrupt
    row = Row(
        data=options.data, embedding=embedding, seed=seed, accuracy=history[-1]["test_accuracy"],
        loss=history[-1]["loss"], epochs=options.epochs,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad), train_images=len(x),
        test_images=len(test[0]), seconds=sum(entry["seconds"] for entry in history),
    )  # fmt: skip
    return [row]


def file_name(options: argparse.Namespace) -> str:
    return "accuracy" if options.data == "mnist5k" else f"accuracy_{options.data}"


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Seed by seed, so that an interrupted study has whole seeds."""
    cases = itertools.product(range(options.seeds), EMBEDDINGS)
    settings = {name: getattr(options, name) for name in SETTINGS}
    path = folder / f"{file_name(options)}.csv"
    key = ("seed", "embedding")
    fill(path, Row, cases, partial(trained, options), key=key, settings=settings, workers=options.workers)


# --- The page -----------------------------------------------------------------------------------------------------


def interval(values: pd.Series) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; NaN for a single value."""
    if len(values) < 2:
        return float(values.mean()), math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5
    return float(values.mean()), float(half)


def summary(rows: pd.DataFrame) -> str:
    """One line an embedding: accuracy, and its difference to the learned one, seed by seed."""
    percent = rows.assign(accuracy=100 * rows.accuracy)
    learned = percent[percent.embedding == "learned"].set_index("seed").accuracy

    def line(runs: pd.DataFrame) -> dict[str, Any]:
        mean, half = interval(runs.accuracy)
        paired = (runs.set_index("seed").accuracy - learned).dropna()
        gap = "{:+.1f} ± {:.1f}".format(*interval(paired))
        return {
            "seeds": len(runs),
            "accuracy %": f"{mean:.1f} ± {half:.1f}",
            "difference to learned, points": gap if len(paired) and runs.embedding.iloc[0] != "learned" else None,
            "least to greatest %": f"{runs.accuracy.min():.1f} to {runs.accuracy.max():.1f}",
            "s a run": f"{runs.seconds.median():.0f}",
        }

    return markdown(grouped(percent, ["embedding"], line).rename(columns={"embedding": "position embedding"}))


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / f"{file_name(options)}.csv"
    rows = read(path, Row)
    split = " and the split" if options.data == "mnist5k" else ""
    facts = origin(path)["settings"] | rows.iloc[0].to_dict() | {"split": split, "made": made(path)}
    return facts | {"table": summary(rows)}, []


def add_arguments(parser: argparse.ArgumentParser, *, epochs: str | None = None, device: str | None = None) -> None:
    """Data, model and budget; with words on whose the epochs and the device are, where it
    is not all of them.
    """
    parser.add_argument("--data", choices=("mnist5k", "cifar10"), default="mnist5k")
    parser.add_argument("--root", type=Path, help="folder that holds CIFAR-10")
    parser.add_argument("--limit", type=int, help="only the first so many CIFAR-10 images")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10, help=epochs)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--patch-size", type=int, help="in pixels; default 7 for MNIST, 4 for CIFAR-10")
    parser.add_argument("--device", default="cpu", help=device)


def checked(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.Namespace:
    """The options with their defaults; ends the program if they make no sense."""
    options.patch_size = options.patch_size or (7 if options.data == "mnist5k" else 4)
    if options.quick:
        options.seeds, options.epochs, options.width, options.depth = 1, 1, 16, 1
    if options.data == "cifar10" and options.root is None:
        parser.error("--data cifar10 needs --root, the folder that holds it")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("accuracy", __doc__)
    add_arguments(parser)
    parser.add_argument("--checkpoints", type=Path, help="folder for the trained weights (safetensors)")
    options = checked(parser, parser.parse_args(argv))
    run_study(file_name(options), options, measure=measure, describe=describe, template="accuracy")


if __name__ == "__main__":
    main()
