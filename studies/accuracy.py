"""What a fixed position embedding costs: `python -m studies.accuracy` writes data/results/accuracy.csv and .md.

The same small pre-norm ViT, six position embeddings, the same budget, several seeds. A seed means the same initial
weights (but for the embedding), the same split into training and test images and the same order of batches for all
six, so differences are taken seed by seed. The budget was chosen once and is not tuned for any of them; the accuracy
is that of the last epoch, never the best one. Each run is written as it ends, and `--resume` skips what is there.

    python -m studies.accuracy                                 # MNIST-5k, minutes on two cores
    python -m studies.accuracy --data cifar10 --root DIR       # if you have CIFAR-10 there; an afternoon, or a GPU
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

import aprillab as al
from aprillab.training import train

RESULTS = Path(__file__).parent.parent / "data" / "results"
RMS = 0.5**0.5  # of a sinusoid: the scale of the second frozen embedding


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


def embeddings(grid: int, width: int, seed: int) -> dict[str, dict[str, object]]:
    """Label to the options of ``VisionTransformer`` that make this embedding; tokens are rows."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    scaled = RMS * torch.randn(grid**2 + 1, width, generator=generator)
    return {
        "learned": {"position": "learned"},
        "frozen": {"position": "frozen"},
        "frozen, scaled": {"position": "frozen", "position_values": scaled},
        "sinusoidal 1-D": {"position": "sinusoidal"},
        "sinusoidal 2-D": {"position": "sinusoidal", "position_values": al.sinusoidal_2d((grid, grid), width)},
        "none": {"position": "none"},
    }


def load(arguments: argparse.Namespace, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images in model-input space, with labels."""
    if arguments.data == "mnist5k":
        parts = [al.mnist5k(part, seed=seed) for part in ("train", "test")]
    else:
        parts = [
            al.torchvision_dataset("cifar10", arguments.root, train=part, limit=arguments.limit)
            for part in (True, False)
        ]
    (x, y), (test_x, test_y) = parts
    return (al.HALF.to_input(x), y), (al.HALF.to_input(test_x), test_y)


def measure(arguments: argparse.Namespace, done: set[tuple[str, int]], write: Callable[[Row], None]) -> None:
    """Train what is not yet done, seed by seed, so that an interrupted run has complete seeds."""
    bar = tqdm(total=6 * arguments.seeds, desc="runs", initial=len(done))
    for seed in range(arguments.seeds):
        (x, y), test = load(arguments, seed)
        grid = x.shape[-1] // arguments.patch_size
        for name, options in embeddings(grid, arguments.width, seed).items():
            if (name, seed) in done:
                continue
            model = al.VisionTransformer(
                image_size=x.shape[-1], patch_size=arguments.patch_size, channels=x.shape[1], width=arguments.width,
                depth=arguments.depth, heads=4, classes=10, mlp_ratio=2.0, seed=seed, **options,  # type: ignore[arg-type]
            ).to(arguments.device)  # fmt: skip
            path = None
            if arguments.checkpoints:
                arguments.checkpoints.mkdir(parents=True, exist_ok=True)
                path = arguments.checkpoints / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.safetensors"
            history = train(
                model, x, y, epochs=arguments.epochs, seed=seed, batch_size=50, lr=2e-3, test=test,
                checkpoint=path, resume=path is not None, progress=False,
            )  # fmt: skip
            if len(history) < arguments.epochs:
                raise KeyboardInterrupt
            row = Row(
                data=arguments.data, embedding=name, seed=seed, accuracy=history[-1]["test_accuracy"],
                loss=history[-1]["loss"], epochs=arguments.epochs,
                trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                train_images=len(x), test_images=len(test[0]), seconds=sum(e["seconds"] for e in history),
            )  # fmt: skip
            write(row)
            bar.update()


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; NaN for fewer than two values."""
    if len(values) < 2:
        return values[0], math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def summary(rows: list[Row]) -> str:
    """One line an embedding: accuracy, and its difference to the learned one, seed by seed."""
    by_name: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_name.setdefault(row.embedding, {})[row.seed] = row
    learned = by_name.get("learned", {})
    lines = [
        "| position embedding | seeds | accuracy % | difference to learned, points | least to greatest % | s a run |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in by_name.items():
        values = [100 * run.accuracy for run in runs.values()]
        mean, half = interval(values)
        difference = "–"
        if name != "learned" and (paired := [s for s in runs if s in learned]):
            gap, spread = interval([100 * (runs[s].accuracy - learned[s].accuracy) for s in paired])
            difference = f"{gap:+.1f} ± {spread:.1f}"
        lines.append(
            f"| {name} | {len(values)} | {mean:.1f} ± {half:.1f} | {difference} | {min(values):.1f} to "
            f"{max(values):.1f} | {statistics.median(run.seconds for run in runs.values()):.0f} |"
        )
    return "\n".join(lines)


def report(rows: list[Row], arguments: argparse.Namespace) -> str:
    first = rows[0]
    return (
        f"# What a fixed position embedding costs in accuracy\n\n"
        f"{arguments.data}: {first.train_images} training and {first.test_images} test images, pre-norm ViT of patch "
        f"{arguments.patch_size}, width {arguments.width}, {arguments.depth} blocks, 4 heads, {first.epochs} epochs, "
        f"batch 50, AdamW with learning rate 0.002. Mean and 95 % interval (Student's t) over seeds; a seed changes "
        f"initial weights, order of batches{' and the split' if arguments.data == 'mnist5k' else ''}. Differences "
        f"are paired by seed.\n\n{summary(rows)}\n\n"
        "“frozen” keeps the initial values, deviation 0.02; “frozen, scaled” random ones of deviation "
        "0.71, a sinusoid's.\n\n"
        f"aprillab {al.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {torch.get_num_threads()} thread(s). Made by `python -m studies.accuracy`.\n"
    )


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run; an empty list where there is none."""
    if not path.is_file():
        return []
    kinds = {"str": str, "int": int, "float": float}
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [Row(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(Row)}) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("mnist5k", "cifar10"), default="mnist5k")
    parser.add_argument("--root", type=Path, help="folder that holds CIFAR-10")
    parser.add_argument("--limit", type=int, help="only the first so many CIFAR-10 images")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--patch-size", type=int, help="in pixels; default 7 for MNIST, 4 for CIFAR-10")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoints", type=Path, help="folder for the trained weights (safetensors)")
    parser.add_argument("--resume", action="store_true", help="keep the rows already in the table")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the table")
    arguments = parser.parse_args()
    arguments.patch_size = arguments.patch_size or (7 if arguments.data == "mnist5k" else 4)
    if arguments.data == "cifar10" and arguments.root is None:
        parser.error("--data cifar10 needs --root, the folder that holds it")
    name = "accuracy" if arguments.data == "mnist5k" else f"accuracy_{arguments.data}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = arguments.output / f"{name}.csv"
    rows = read_rows(table) if arguments.resume else []
    if rows and {row.epochs for row in rows} != {arguments.epochs}:
        parser.error(f"{table} holds runs of {rows[0].epochs} epochs: use --epochs {rows[0].epochs} or start anew")

    def write(row: Row | None = None) -> None:
        rows.extend([row] if row else [])
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[f.name for f in fields(Row)])
            writer.writeheader()
            short = [asdict(row) | {"loss": f"{row.loss:.4g}", "seconds": f"{row.seconds:.3g}"} for row in rows]
            writer.writerows(short)
        if rows:
            table.with_suffix(".md").write_text(report(rows, arguments), encoding="utf-8")

    try:
        measure(arguments, {(row.embedding, row.seed) for row in rows}, write)
    except KeyboardInterrupt:
        print("interrupted: what is done is in the table; --resume goes on")
    write()  # the report, also where every row was there
    print(summary(rows))


if __name__ == "__main__":
    main()
