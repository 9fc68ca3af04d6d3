"""Why sinusoids resist the span attack: `python -m studies.conditioning` writes conditioning.csv, .md and .png.

The span attack (chapter 07) reads patch i from a linear system whose right side is the *value* of its position
embedding. Its condition beyond the count of widths: the E_i + b_e are independent modulo the image of the patch
embedding W_e. In exact arithmetic independent vectors are independent; in finite precision the question is by how
much. So each fixed embedding here comes with the singular values of its vectors modulo that image, and with the PSNR
of the attack from gradients of four precisions.

Random weights, pre-norm ViT, 32×32 pixels, label 3. Then digits, with weights before and after training. Rows are
written as they come, and `--resume` skips what is there.

    python -m studies.conditioning            # about ten minutes on one thread
    python -m studies.conditioning --quick    # the smallest study that has every part
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import math
import platform
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn
from tqdm.auto import tqdm

import aprillab as al
from aprillab import viz
from aprillab.defenses import freeze_position, to_precision
from aprillab.training import train

RESULTS = Path(__file__).parent.parent.parent / "data" / "results"
RMS = 0.5**0.5  # of a sinusoid
PRECISIONS = ("float64", "float32", "float16", "bfloat16")
FULL = PRECISIONS[:2]


# --- What is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    """A fixed position embedding.

    ``scale`` is the standard deviation of a random one and the factor on a sinusoidal one; ``speed`` the angle in
    radians by which the fastest feature turns from one place to the next, 1 in the usual table. ``table`` is the
    precision in which its values are stored, "" for that of the model.
    """

    kind: str
    scale: float = 1.0
    base: float = math.nan
    speed: float = math.nan
    table: str = ""
    precisions: tuple[str, ...] = PRECISIONS

    @property
    def label(self) -> str:
        if self.kind == "learned":
            return "learned, then frozen"
        if self.kind == "random":
            return f"random, deviation {self.scale:.3g}"
        parts = [f"{self.kind} sinusoids, base {self.base:g}"]
        parts += [f"scale {self.scale:g}"] if self.scale != 1 else []
        parts += [f"speed {self.speed:g}"] if self.speed != 1 else []
        parts += [f"stored in {self.table}"] if self.table else []
        return ", ".join(parts)


def sinusoids(kind: str, base: float = 1e4, **options: object) -> Embedding:
    return Embedding(kind, base=base, **({"speed": 1.0} | options))  # type: ignore[arg-type]


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


def sines(places: int, width: int, base: float, speed: float) -> Tensor:
    """(places, width), float64: :func:`aprillab.sinusoidal_1d` with the place counted in steps of ``speed``."""
    angle = speed * torch.arange(places, dtype=torch.float64)[:, None]
    angle = angle * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def values(embedding: Embedding, grid: int, width: int, seed: int) -> Tensor:
    """The table (1 + grid², width) in float64, rounded to the precision in which it is stored; class token first."""
    if embedding.kind == "random":
        generator = torch.Generator().manual_seed(1_000 + seed)
        table = torch.randn(grid**2 + 1, width, generator=generator, dtype=torch.float64)
    elif embedding.kind == "1-D":
        table = sines(grid**2 + 1, width, embedding.base, embedding.speed)
    elif embedding.kind == "2-D":
        side = sines(grid, width // 2, embedding.base, embedding.speed)
        table = torch.cat([side.repeat_interleave(grid, 0), side.repeat(grid, 1)], dim=1)
        table = torch.cat([table.new_zeros(1, width), table])
    else:
        raise ValueError(f"kind={embedding.kind!r} has no formula")
    table = embedding.scale * table
    return table.to(getattr(torch, embedding.table)).double() if embedding.table else table


def with_position(model: nn.Module, table: Tensor) -> nn.Module:
    """The model with its position embedding set to ``table`` (rounded to the model's precision) and frozen."""
    name = al.dissect(model).position or ""
    with torch.no_grad():
        dict(model.named_parameters())[name].copy_(table)
    return freeze_position(model)


@dataclass(frozen=True)
class Independence:
    """How independent the positions of the patches are: singular values, largest first, float64.

    ``positions`` (n,) are those of the vectors C (E_i + b_e); ``modulo`` (n,) those of what is left of them when the
    image of C W_e is projected out. Values below ``floor`` (the rounding of this float64 computation) may be zero.
    """

    positions: Tensor
    modulo: Tensor

    @property
    def floor(self) -> float:
        return torch.finfo(torch.float64).eps * float(self.positions[0])

    @property
    def least(self) -> float:
        return float(self.modulo[-1])

    @property
    def condition(self) -> float:
        return float(self.modulo[0]) / max(self.least, 1e-300)

    def rank(self, eps: float) -> int:
        """How many of the vectors stay independent to a relative precision of ``eps``; 4 ``floor`` is the finest."""
        return int((self.modulo > max(eps * float(self.positions[0]), 4 * self.floor)).sum())

    def digits(self, error: float) -> float:
        """log₁₀ of the least singular value over an error in the tokens: the decimal digits that the error leaves."""
        return math.log10(max(self.least, self.floor) / error)

    def mean_digits(self, error: float) -> float:
        """The same with all singular values, 1/σ² averaged, where :meth:`digits` takes the least alone."""
        return -0.5 * math.log10(float((error / self.modulo.clamp_min(self.floor)).square().mean()))


def independence(model: nn.Module, pixel_space: Tensor | None = None) -> Independence:
    """Measure the second half of the span attack's condition (chapter 07, after (7.6)) on any ViT.

    Parameters
    ----------
    model : nn.Module
        Any that :func:`aprillab.dissect` knows, with a position embedding. The mean over features is removed (C)
        where a LayerNorm stands before the first attention; its weight and bias are not looked at.
    pixel_space : Tensor of shape (p, k), optional
        A basis of the space the patches lie in, where more is known than that they have p pixels: the row space of
        the patch embedding's gradient, say. Without it the image of all p pixels is removed, which needs no victim;
        where p ≥ d it is everything, and nothing is left.

    Returns
    -------
    Independence

    Raises
    ------
    ValueError
        If the model has no position embedding.
    """
    anatomy = al.dissect(model)
    if anatomy.position is None:
        raise ValueError(f"{type(model).__name__} has no position embedding")
    weights = al.tensors_of(model)
    image = weights[anatomy.patch_weight].double().flatten(1)  # (d, p)
    image = image if pixel_space is None else image @ pixel_space.to(image)
    e = weights[anatomy.position].double().flatten(0, -2)[anatomy.position_prefix :]  # (n, d)
    e = e if anatomy.patch_bias is None else e + weights[anatomy.patch_bias].double()
    if anatomy.first_block == "prenorm":
        image, e = image - image.mean(0), e - e.mean(1, keepdim=True)
    U, s, _ = torch.linalg.svd(image, full_matrices=False)
    basis = U[:, s > 1e-12 * s[0]]  # (d, rank)
    left = e.T - basis @ (basis.T @ e.T)  # (d, n)
    left = left - basis @ (basis.T @ left)  # twice is enough: what the first left over by rounding
    return Independence(torch.linalg.svdvals(e), torch.linalg.svdvals(left))


@dataclass(frozen=True)
class Row:
    """One attack. The columns are explained in :data:`COLUMNS`."""

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
    predicted_psnr: float
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

    @property
    def key(self) -> tuple[str, ...]:
        return (self.section, self.weights, self.embedding, self.precision, str(self.seed), self.victim)


COLUMNS = """\
- `rank`: how many singular values of the positions modulo the patches exceed ε (of `precision`; four times that in
  float64, in which the values themselves are computed) times `sigma_largest`; `rank_bound`: what the formula
  allows at any precision.
- `sigma_largest`: the largest singular value of the C (b_e + E_i). `sigma_least`: the least one after the image of
  C W_e is projected out; `sigma_relative` is their ratio, `condition` the largest over the least after projection.
  Ratios below 2e-16 are rounding errors of this computation and mean zero.
- `token_norm`: root mean square of ‖C z_i‖ over the victim's patches. `noise`: relative error of the gradient's rows
  as the attack sees it, the share of a row that lies where no token can be.
- `digits` = log₁₀ (sigma_least / (noise · token_norm)); `digits_mean` with all singular values, 1/σ² averaged;
  `digits_eps` with ε instead of the measured noise; `digits_condition` = −log₁₀ (condition · ε)."""


def attack(
    model: nn.Module, images: Tensor, label: int, measured: Independence, common: dict[str, object],
    precisions: tuple[str, ...],
) -> Iterator[Row]:  # fmt: skip
    """Rows of one victim, images (1, C, H, W) in model-input space and the model's dtype."""
    anatomy = al.dissect(model)
    truth = anatomy.preprocessing.to_pixels(images.double())[0]  # what this client really has, in its precision
    update = al.client_update(model, images, torch.tensor([label]))
    tokens = model.embed(images).detach()[0, 1:].double()  # type: ignore[operator]  # (n, d)
    norm = float((tokens - tokens.mean(1, keepdim=True)).square().sum(1).mean().sqrt())
    for precision in precisions:
        dtype = getattr(torch, precision)
        result = al.span_closed_form(model, update if update.dtype == dtype else to_precision(update, dtype))
        eps, noise = torch.finfo(dtype).eps, result.diagnostics["outside"]
        yield Row(
            **common, precision=precision, psnr=float(al.psnr(result.pixels[0], truth)),  # type: ignore[arg-type]
            predicted_psnr=result.predicted_psnr, exact=result.exact, patches=len(tokens),
            rank=measured.rank(eps), sigma_largest=float(measured.positions[0]), sigma_least=measured.least,
            sigma_relative=measured.least / float(measured.positions[0]), condition=measured.condition,
            token_norm=norm, noise=noise, digits=measured.digits(noise * norm),
            digits_mean=measured.mean_digits(noise * norm), digits_eps=measured.digits(eps * norm),
            digits_condition=-math.log10(measured.condition * eps),
        )  # fmt: skip


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


def photographs(study: Study, done: set[tuple[str, ...]]) -> Iterator[Row]:
    """Random weights, 32×32 pixels in 64 and in 16 patches, the first of :func:`aprillab.victims`, label 3."""
    for patch_size, seed in ((p, s) for p in (4, 8) for s in range(study.seeds)):
        grid = 32 // patch_size
        for embedding in study.embeddings:
            for dtype, precisions in by_dtype(embedding):
                common = {
                    "section": f"32×32, {grid**2} patches", "weights": "random", "seed": seed,
                    **columns(embedding, grid),
                }  # fmt: skip
                todo = [v for v in al.victims()[: study.victims] if missing(common, v, precisions, done)]
                if not todo:
                    continue
                model = al.VisionTransformer(
                    image_size=32, patch_size=patch_size, width=study.width, depth=study.depth, heads=6, classes=10,
                    position="frozen", seed=seed,
                ).to(dtype)  # fmt: skip
                with_position(model, values(embedding, grid, study.width, seed))
                measured = independence(model)
                for victim in todo:
                    images = al.HALF.to_input(al.load_victim(victim, 32, dtype=torch.float64)[None]).to(dtype)
                    yield from attack(model, images, 3, measured, common | {"victim": victim}, precisions)


def digits(study: Study, done: set[tuple[str, ...]]) -> Iterator[Row]:
    """MNIST-5k, 16 patches of 7×7 pixels, weights random and after some epochs; victims are test digits."""
    for seed, embedding in ((s, e) for s in range(study.seeds) for e in DIGITS):
        classes = range(0, 2 * study.victims, 2)
        sets = {
            "random": {"section": "digits, 16 patches", "weights": "random", **columns(embedding, 4), "seed": seed},
        }  # fmt: skip
        sets["trained"] = sets["random"] | {"weights": "trained"}
        if embedding.kind == "learned":
            del sets["random"]  # before training it is the random one
        if not any(missing(c, f"digit {k}", PRECISIONS, done) for c in sets.values() for k in classes):
            continue
        (x, y), (test_x, test_y) = (al.mnist5k(part, seed=seed) for part in ("train", "test"))
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: study.images]
        model = al.VisionTransformer(
            image_size=28, patch_size=7, channels=1, width=128, depth=3, heads=4, classes=10, mlp_ratio=2.0,
            position="learned" if embedding.kind == "learned" else "frozen", seed=seed,
        )  # fmt: skip
        if embedding.kind != "learned":
            with_position(model, values(embedding, 4, 128, seed))
        for weights, common in sets.items():
            if weights == "trained":
                train(
                    model, al.HALF.to_input(x[some]), y[some], epochs=study.epochs, seed=seed, batch_size=50, lr=2e-3,
                    progress=False,
                )  # fmt: skip
            for dtype, precisions in by_dtype(embedding):
                shared = freeze_position(copy.deepcopy(model).to(dtype))
                measured = independence(shared)
                for k in classes:
                    if missing(common, f"digit {k}", precisions, done):
                        images = al.HALF.to_input(test_x[test_y == k][:1]).to(dtype)
                        yield from attack(shared, images, k, measured, common | {"victim": f"digit {k}"}, precisions)


def by_dtype(embedding: Embedding) -> Iterator[tuple[torch.dtype, tuple[str, ...]]]:
    """Precision of the model, and the precisions of its update: half ones are a float32 update rounded."""
    for dtype, group in ((torch.float64, ("float64",)), (torch.float32, ("float32", "float16", "bfloat16"))):
        if chosen := tuple(p for p in group if p in embedding.precisions):
            yield dtype, chosen


def columns(embedding: Embedding, grid: int) -> dict[str, object]:
    return {
        "embedding": embedding.label, "kind": embedding.kind, "base": embedding.base, "scale": embedding.scale,
        "speed": embedding.speed, "table": embedding.table,
        "rank_bound": 2 * grid - 1 if embedding.kind == "2-D" else grid**2,
    }  # fmt: skip


def missing(common: dict[str, object], victim: str, precisions: tuple[str, ...], done: set[tuple[str, ...]]) -> bool:
    known = tuple(str(common[part]) for part in ("section", "weights", "embedding"))
    return any((*known, precision, str(common["seed"]), victim) not in done for precision in precisions)


# --- What is reported -----------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run; an empty list where there is none."""
    if not path.is_file():
        return []
    kinds: dict[str, Callable[[str], object]] = {"str": str, "int": int, "float": float, "bool": "True".__eq__}
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [Row(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(Row)}) for line in lines]  # type: ignore[arg-type]


def write_rows(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in asdict(row).items()}
            for row in rows
        )


def grouped(rows: list[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(getattr(row, name)) for name in names), []).append(row)
    return groups


def relative(runs: list[Row]) -> str:
    """The median of σ_least/σ_largest, which float64 does not tell from zero below its ε."""
    median = statistics.median(row.sigma_relative for row in runs)
    return "< 2e-16" if median < torch.finfo(torch.float64).eps else f"{median:.0e}"


def summary(rows: list[Row]) -> str:
    """One Markdown table a section: singular values, ranks and PSNR by precision."""
    lines: list[str] = []
    for (section,), part in grouped(rows, "section").items():
        lines += [
            f"### {section}", "",
            "| position embedding | weights | rank at most | σ_least/σ_largest, model in float64 · float32 "
            "| rank at ε of float64 · 32 · 16 · bf16 | " + " | ".join(f"{p} dB" for p in PRECISIONS) + " |",
            "|---|---|---|---|---|" + "---|" * len(PRECISIONS),
        ]  # fmt: skip
        for (embedding, weights), runs in grouped(part, "embedding", "weights").items():
            by = {p: [row for row in runs if row.precision == p] for p in PRECISIONS}
            sigma = [relative(by[p]) if by[p] else "–" for p in FULL]
            rank = [f"{statistics.median_low(r.rank for r in by[p])}" if by[p] else "–" for p in PRECISIONS]
            psnr = [
                f"{statistics.median(r.psnr for r in by[p]):.0f} ({min(r.psnr for r in by[p]):.0f})" if by[p] else "–"
                for p in PRECISIONS
            ]
            lines.append(
                f"| {embedding} | {weights} | {runs[0].rank_bound} of {runs[0].patches} | {' · '.join(sigma)} | "
                f"{' · '.join(rank)} | {' | '.join(psnr)} |"
            )
        lines.append("")
    return "\n".join(lines).strip()


def measure(study: Study, rows: list[Row], write: Callable[[], None]) -> None:
    """Append what is missing to ``rows``; an interruption loses nothing."""
    done = {row.key for row in rows}
    with tqdm(initial=len(rows), desc="rows", unit=" attack") as bar:
        for row in itertools.chain(photographs(study, done), digits(study, done)):
            if row.key in done:
                continue
            rows.append(row)
            bar.update()
            if len(rows) % 50 == 0:
                write()


PREDICTORS = {
    "digits_condition": "1 / (condition · ε)",
    "digits_eps": "σ_least / (ε · token norm)",
    "digits": "σ_least / (noise · token norm)",
    "digits_mean": "the same, 1/σ² averaged",
}


@dataclass(frozen=True)
class Line:
    """PSNR ≈ ``offset`` + 20 · digits, dB, over the ``rows`` whose digits exceed 1; ``slope`` is a free one."""

    rows: int
    slope: float
    offset: float
    spread: float
    largest: float


def line(rows: list[Row], predictor: str) -> Line:
    """Offset and median absolute deviation of the line of 20 dB a decade, and the least-squares slope."""
    points = [(x, row.psnr) for row in rows if (x := getattr(row, predictor)) > 1]
    if not points:
        return Line(0, math.nan, math.nan, math.nan, math.nan)
    offset = statistics.median(y - 20 * x for x, y in points)
    residuals = [abs(y - 20 * x - offset) for x, y in points]
    slope = statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else math.nan
    return Line(len(points), slope, offset, statistics.median(residuals), max(residuals))


def predictors(rows: list[Row]) -> str:
    """The Markdown table that compares candidates for the number that predicts the PSNR."""
    lines = [
        "| 10 to the digits | setting | rows | slope dB/decade | offset dB | median deviation dB | largest dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, formula in PREDICTORS.items():
        for (section,), part in grouped(rows, "section").items():
            if any(getattr(row, name) > 1 for row in part):
                found = line(part, name)
                lines.append(
                    f"| {formula} | {section} | {found.rows} | {found.slope:.1f} | {found.offset:.0f} | "
                    f"{found.spread:.1f} | {found.largest:.0f} |"
                )
    return "\n".join(lines)


COLOURS = {"random": "blue", "learned": "green", "1-D": "red", "1-D, stored coarser": "orange", "2-D": "black"}
MARKERS = dict(zip(PRECISIONS, "osD^", strict=True))
LEFT, BAND = -6.5, -8.5  # ends of the axis for digits, and of the band for what has none


def scatter(rows: list[Row]) -> Figure:
    """PSNR over the digits that the gradient's noise leaves of the least singular value, all rows."""
    fig, axes = viz.figure(size=(6.6, 4.6))
    ax = axes[0, 0]
    jitter = random.Random(0)
    ax.axvspan(BAND, LEFT, color="0.93", linewidth=0)
    for kind, colour in COLOURS.items():
        for precision, marker in MARKERS.items():
            points = [row for row in rows if row.precision == precision and kind_of(row) == kind]
            # An exact dependence has no digits: what is computed is the rounding of the singular values themselves.
            xs = [
                max(row.digits, LEFT + 0.2)
                if row.rank_bound == row.patches
                else jitter.uniform(BAND + 0.2, LEFT - 0.2)
                for row in points
            ]
            ax.scatter(
                xs, [row.psnr for row in points], s=13, marker=marker, color=viz.COLOURS[colour], alpha=0.45,
                linewidths=0,
            )  # fmt: skip
    offset = line(rows, "digits").offset
    ax.plot([0, 15], [offset, offset + 300], color="0.35", linewidth=1, zorder=0)
    ax.annotate("20 dB a digit", (9.5, offset + 190), (9.7, offset + 143), color="0.3", fontsize=10)
    ax.axhline(al.EXACT_TO_8_BITS_DB, color="0.6", linestyle=":", linewidth=1, zorder=0)
    ax.annotate("exact to 8 bits", (LEFT + 0.2, al.EXACT_TO_8_BITS_DB + 4), color="0.35", fontsize=10)
    ax.annotate("exactly\ndependent", ((LEFT + BAND) / 2, 105), color="0.3", fontsize=10, ha="center", rotation=90)
    ax.set_xlim(BAND, 15.5)
    ax.set_ylim(0, 330)
    ax.set_xticks(range(-6, 16, 3))
    ax.set_xlabel("digits left of the least singular value")
    ax.set_ylabel("PSNR of the span attack, dB")
    names = {"random": "random", "learned": "learned", "1-D": "1-D sinusoids", "2-D": "2-D sinusoids"}
    names["1-D, stored coarser"] = "1-D, table rounded"
    present = {kind_of(row) for row in rows}
    dots = [
        Line2D([], [], linestyle="", marker="o", markersize=6, color=viz.COLOURS[colour], label=names[kind])
        for kind, colour in COLOURS.items() if kind in present
    ]  # fmt: skip
    shapes = [
        Line2D([], [], linestyle="", marker=marker, markersize=5, color="0.4", label=precision)
        for precision, marker in MARKERS.items()
    ]
    first = ax.legend(handles=dots, loc="upper left", bbox_to_anchor=(0.085, 1.02), fontsize=10, handletextpad=0.1)
    ax.add_artist(first)
    ax.legend(handles=shapes, loc="upper left", bbox_to_anchor=(0.39, 1.02), fontsize=10, handletextpad=0.1)
    for legend in (first, ax.get_legend()):
        legend.set_frame_on(False)
    return fig


def kind_of(row: Row) -> str:
    """The kind, with 1-D tables stored more coarsely than the client computes apart."""
    finer = row.kind == "1-D" and row.table not in ("", "float32" if row.precision != "float64" else "float64")
    return "1-D, stored coarser" if finer else row.kind


CAPTION = (
    "PSNR of the span attack over the decimal digits that the gradient's noise leaves of the least singular value of "
    "the position vectors modulo the patches. Colour: the kind of fixed embedding; shape: the gradient's precision; "
    "each point one victim and seed (32×32 with 64 and 16 patches, digits with 16). The line is 20 dB a digit, not a "
    "fit of the slope. Left of 0 nothing is left to read and the attack returns its smallest guess. Grey band: 2-D "
    "sinusoids, whose least singular value is zero in exact arithmetic."
)


ALT = (
    "Scatter plot. From 0 to 15 digits left the points rise along a line from about 20 to 310 dB, all kinds and "
    "precisions mixed; left of 0 they lie flat between 8 and 35 dB, and so do the 2-D sinusoids in a band apart."
)


def report(rows: list[Row], study: Study) -> str:
    return (
        f"# Why sinusoids resist the span attack\n\n{reading(rows)}\n\n"
        f"![{ALT}](conditioning.png)\n\n{CAPTION}\n\n"
        f"## Ranks and PSNR\n\nMedian dB over victims and seeds, the least in brackets.\n\n{summary(rows)}\n\n"
        f"## Which number predicts the PSNR?\n\n{predictors(rows)}\n\n## Columns of conditioning.csv\n\n{COLUMNS}\n\n"
        f"## How it was measured\n\n{provenance(rows, study)}\n"
    )


def decibels(rows: list[Row], section: str, embedding: str, precision: str, weights: str = "random") -> str:
    """Median PSNR as text; "?" where nothing was measured."""
    found = [
        row.psnr for row in rows
        if (row.section, row.embedding, row.precision, row.weights) == (section, embedding, precision, weights)
    ]  # fmt: skip
    return f"{statistics.median(found):.0f}" if found else "?"


def median_range(found: list[float]) -> str:
    return f"{statistics.median(found):.0f} dB ({min(found):.0f} to {max(found):.0f})" if found else "?"


def reading(rows: list[Row]) -> str:
    """What the table shows and what not, with its own numbers."""
    many, few, digit = "32×32, 64 patches", "32×32, 16 patches", "digits, 16 patches"
    table = "1-D sinusoids, base 10000"
    stored, halved = f"{table}, stored in float32", f"{table}, stored in bfloat16"

    if not {many, few, digit} <= {row.section for row in rows}:
        return "Interrupted: the study is not complete."

    def db(*place: str) -> str:
        return decibels(rows, *place)

    short = [row for row in rows if row.rank < row.patches]
    full = [row for row in rows if row.rank == row.patches]
    twins = [row.psnr for row in rows if row.rank_bound < row.patches]
    bases = [
        row.psnr for row in rows
        if row.kind == "1-D" and row.speed == row.scale == 1 and not row.table
        and (row.section, row.precision) == (few, "float32")
    ]  # fmt: skip
    halves = sum(row.psnr <= 40 and row.precision not in FULL for row in full)
    fit, textbook = ({place: line([r for r in rows if r.section == place], name) for place in (many, few)}
                     for name in ("digits", "digits_condition"))  # fmt: skip
    return (
        f"""\
**With 16 patches the usual 1-D table holds the attack to {db(few, table, "float32")} dB from a float32 gradient,
and the same weights, picture and attack give {db(few, table, "float64")} dB from a float64 one.** Nothing about the
client's secret was missing; it stood in digits that float32 does not carry. With 64 patches even float64 carries
too few ({db(many, table, "float64")} dB). But store that same table in float32, as checkpoints do, and let the
client compute in float64: {db(many, stored, "float64")} dB. Store it in bfloat16, and a float32 gradient gives
{db(many, halved, "float32")} dB ({db(few, halved, "float32")} with 16 patches). The rounding errors of the table
are known to the server, and they tell the patches apart better than the sinusoids do. Rounding error protected the
client; rounding error of another tensor gives it away. **A defence by rounding error is not a defence by design.**

The numerical rank says when. Of {len(short)} attacks in which the positions are dependent to the gradient's
precision (rank < number of patches) the best reached {max((r.psnr for r in short), default=math.nan):.0f} dB; of
{len(full)} with full rank, {sum(r.psnr > 40 for r in full)} passed 40 dB, and of the others {halves} are half
precisions. The base of a 1-D table decides little: all from 10 to 100 000 give {median_range(bases)} in float32
with 16 patches. The fastest frequency decides: at 1, 1.5, 2 and 3 radians a patch it is
{db(few, table, "float32")}, {db(few, f"{table}, speed 1.5", "float32")}, {db(few, f"{table}, speed 2", "float32")}
and {db(few, f"{table}, speed 3", "float32")} dB.

One number predicts most of the rest: the least singular value over (noise of the gradient · norm of a token), in
decimal digits. Where it is above one, the PSNR follows 20 dB a digit over almost 300 dB: the median deviation is
{fit[few].spread:.0f} dB with 16 patches and {fit[many].spread:.0f} with 64, the largest {fit[few].largest:.0f} and
{fit[many].largest:.0f}. The textbook's condition number · ε misses by {textbook[few].spread:.0f} and
{textbook[many].spread:.0f} dB in the median, {textbook[few].largest:.0f} and {textbook[many].largest:.0f} at most.
Three reasons. ε is not the noise: backpropagation in float32 leaves about one ε in a row, rounding a finished
gradient a fifth, and in float64 the attack's own arithmetic adds to it. A small random table is well conditioned
but small beside the patches, so the error must be measured against the token. And the offset of the line depends on
model and picture, since weak token directions of the gradient amplify the noise as well: the largest deviations are
a flat picture (`rocket`) under small random embeddings.

2-D sinusoids are another matter. Their rank is at most rows + columns − 1 in exact arithmetic, and no precision,
base, scale, speed or storage lifts the attack above {max(twins, default=math.nan):.0f} dB (median
{statistics.median(twins) if twins else math.nan:.0f}). That is an ambiguity of *these equations*, not of the
update, which tells the twins apart (chapter 07). Training changes none of this: on digits, a learned table, then
frozen, falls in float32 ({db(digit, "learned, then frozen", "float32", "trained")} dB), the 1-D table after
training resists there ({db(digit, stored, "float32", "trained")} dB) and falls in float64
({db(digit, stored, "float64", "trained")} dB).

Not shown: that any of these tables protects anything. This is one attack, which reads spans and stops; one that
goes on from its picture can get further. The weights are random or briefly trained, the pictures small, one image
an update, and 15 dB is not privacy.""".replace("\n\n", "\0")
        .replace("\n", " ")
        .replace("\0", "\n\n")
    )


def provenance(rows: list[Row], study: Study) -> str:
    victims = sorted({row.victim for row in rows if not row.victim.startswith("digit")})
    seeds = len({row.seed for row in rows})
    return (
        f"{len(rows)} attacks. Photographs: pre-norm ViT of width {study.width}, {study.depth} blocks, 6 heads, "
        f"random weights (its initialization, another with each of {seeds} seeds), 32×32 pixels, patch 4 and 8, "
        f"label 3; {', '.join(victims)}. Digits: MNIST-5k test digits under a pre-norm ViT of patch 7, width 128, "
        f"3 blocks, 4 heads, before and after {study.epochs} epochs of {study.images} images. Half precisions "
        "are float32 gradients rounded. The PSNR is of pixels clamped to [0, 1], against the picture that the client "
        f"has in its precision. aprillab {al.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} thread(s). Made by "
        "`python -m studies.conditioning`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one victim, one seed, four embeddings")
    parser.add_argument("--resume", action="store_true", help="keep the rows already in the table")
    parser.add_argument("--output", type=Path, help="folder for the results; --quick without it writes nowhere")
    arguments = parser.parse_args()
    folder = arguments.output or (None if arguments.quick else RESULTS)
    table = folder / "conditioning.csv" if folder else None
    rows = read_rows(table) if table and arguments.resume else []

    def write() -> None:
        if table:
            table.parent.mkdir(parents=True, exist_ok=True)
            write_rows(table, rows)

    study = SMALLEST if arguments.quick else Study()
    try:
        measure(study, rows, write)
    except KeyboardInterrupt:
        print("interrupted: what is done is in the table; --resume goes on")
    write()
    if table and rows:
        table.with_suffix(".md").write_text(report(rows, study), encoding="utf-8")
        table.with_suffix(".png").write_bytes(viz.to_png(scatter(rows), dpi=150))
    print(summary(rows))


if __name__ == "__main__":
    main()
