"""What the defences of the position embedding stop: `python -m studies.effect` writes effect.csv, .md and .png.

Every attack of the package on the same updates: position embedding learned, frozen, sinusoidal in one and two
dimensions, or none; architectures A ("april") and B ("prenorm"); float64 and float32; weights at initialization,
early and late in training. The private pictures are MNIST-5k test digits, which no model was trained on. And from the
same rows the twins: where a search that looks successful ends with another picture.

Searches are the expensive part, so they get a part of the grid: :func:`plan` says which, and the table says "not run"
where nothing was. Models are trained here, for as long as the study says, and kept in a folder that git ignores.

    python -m studies.effect            # an hour on one thread; an interrupted run is gone on with
    python -m studies.effect --quick    # the smallest study that has every part; writes nowhere
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm.auto import tqdm

import aprillab as al
from aprillab import viz
from aprillab.attacks import CLOSED_FORMS, RECIPES
from aprillab.comparison.records import Case, Row, read_curves, read_pictures, read_rows
from aprillab.comparison.run import cross, run
from aprillab.models import patchify
from aprillab.training import evaluate, train
from aprillab.zoo import Position, build_model

RESULTS = Path("data") / "results"  # seen from the repository's root, as `python -m studies.effect` is
CHECKPOINTS = Path("studies") / "checkpoints" / "effect"
POSITIONS: tuple[Position, ...] = get_args(Position)
MODELS = {"april": "A", "prenorm": "B"}
WEIGHTS = ("init", "early", "late")
DTYPES = ("float64", "float32")


# --- The study ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """How much is measured, with which model.

    Victims are test digits of different classes; a seed is that of the weights, of the training images' choice and
    order, and of a search's first guess.
    """

    victims: tuple[str, ...] = ("mnist:7", "mnist:207", "mnist:307", "mnist:507", "mnist:907")
    seeds: tuple[int, ...] = (0, 1, 2)
    shape: dict[str, Any] = field(
        default_factory=lambda: {
            "image_size": 28, "patch_size": 7, "channels": 1, "width": 128, "depth": 4, "heads": 4, "mlp_ratio": 2.0,
            "classes": 10,
        }
    )  # fmt: skip
    moments: tuple[str, ...] = WEIGHTS
    images: int = 800
    epochs: int = 8
    april: int = 300  # evaluations of a search
    hybrid: int = 150
    others: int = 150
    few: int = 2  # victims of the other presets
    checkpoints: Path = CHECKPOINTS

    def weights(self, when: str) -> str:
        """What :class:`Case` calls the weights at initialization, early or late in training."""
        return (
            when if when == "init" else str(self.checkpoints / f"{{model}}-{{position}}-{{seed}}-{when}.safetensors")
        )


# --- Training -------------------------------------------------------------------------------------------------


def trained(study: Study, model: str, position: str, seed: int, when: str) -> dict[str, Any]:
    """Train what is not there yet; the training loss of the last epoch and the test accuracy of these weights.

    "early" is a training of one epoch, "late" one of all epochs, from the same weights with the same images.
    """
    name = study.weights(when).format(model=model, position=position, seed=seed)
    file, epochs = Path(name), 1 if when == "early" else study.epochs
    settings = {"images": study.images, "epochs": epochs, **study.shape}
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            kept: dict[str, Any] = json.loads((opened.metadata() or {}).get("training", "{}"))
        if kept.get("settings") != settings:
            raise SystemExit(f"{file} is of another study: {kept.get('settings')}, not {settings}. Remove it")
        return kept
    (x, y), (test_x, test_y) = al.mnist5k("train"), al.mnist5k("test")
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: study.images]
    net = build_model(model, position=position, seed=seed, **study.shape)  # type: ignore[arg-type]
    history = train(
        net, al.HALF.to_input(x[some]), y[some], epochs=epochs, seed=seed, batch_size=40, lr=1e-3, progress=False
    )
    if len(history) < epochs:
        raise KeyboardInterrupt
    accuracy = evaluate(net, al.HALF.to_input(test_x), test_y)
    facts = {"settings": settings, "loss": history[-1]["loss"], "accuracy": accuracy}
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    # A plain state dict: the optimizer's state, twice as large, is of no use here.
    tensors = {key: value.contiguous() for key, value in net.state_dict().items()}
    save_file(tensors, beside, metadata={"training": json.dumps(facts)})
    beside.replace(file)
    return facts


def train_all(study: Study) -> Facts:
    """:func:`trained` for all models, embeddings, seeds and both moments."""
    keys = [
        (model, position, seed, when)
        for seed in study.seeds
        for when in study.moments
        for model in MODELS
        for position in POSITIONS
        if when != "init"
    ]
    return {key: trained(study, *key) for key in tqdm(keys, desc="training", unit=" model")}


# --- The plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the grid: ``budget`` is the evaluations of each search, ``pictures`` whether results are kept."""

    name: str
    cases: list[Case]
    budget: int
    pictures: bool = False


OTHERS = tuple(f"match:{name}" for name in RECIPES if name != "april")
TWINS = ("learned", "frozen", "sinusoidal")


def plan(study: Study) -> list[Part]:
    """What is run, the most telling part first, so that an interrupted study has whole parts."""
    init, late = study.weights("init"), study.weights("late")

    def cases(attacks: Sequence[str], **options: Any) -> list[Case]:
        given: dict[str, Any] = {"models": ("prenorm",), "dtypes": ("float64",), "seeds": study.seeds[:1]}
        given |= {"victims": study.victims, "positions": POSITIONS, "weights": (init,)}
        return cross(attacks=attacks, **(given | options), **study.shape)

    fixed = ("sinusoidal", "sinusoidal-2d")
    both = tuple(MODELS)
    return [
        Part(
            "closed forms",
            cases(
                tuple(CLOSED_FORMS),
                models=both,
                dtypes=DTYPES,
                seeds=study.seeds,
                weights=[study.weights(when) for when in study.moments],
            ),
            study.april,
        ),
        Part("twins", cases(("match:april",), positions=TWINS, seeds=study.seeds[:2]), study.april, pictures=True),
        Part(
            "span_then_match",
            cases(
                ("span_then_match",),
                models=both,
                positions=(*fixed, "none"),
                dtypes=("float32",),
                weights=(init, late),
            ),
            study.hybrid,
        ),
        Part(
            "span_then_round",
            cases(("span_then_round",), models=both, positions=fixed, dtypes=("float32",), weights=(init, late)),
            study.hybrid,
        ),
        Part("match:april, B, late", cases(("match:april",), weights=(late,)), study.april),
        Part("match:april, B, init, the others", cases(("match:april",), positions=POSITIONS[3:]), study.april),
        Part(
            "presets",
            cases(OTHERS, positions=TWINS[::2], weights=(init, late), victims=study.victims[: study.few]),
            study.others,
        ),
        Part("match:april, A, init", cases(("match:april",), models=("april",)), study.april),
        Part("match:april, B, init, float32", cases(("match:april",), dtypes=("float32",)), study.april),
        Part(
            "span_then_match, float64",
            cases(("span_then_match",), models=both, positions=fixed[1:], weights=(init, late)),
            study.hybrid,
        ),
        Part("match:april, A, late", cases(("match:april",), models=("april",), weights=(late,)), study.april),
    ]


def size(parts: Sequence[Part]) -> str:
    """The plan in numbers: attacks, and evaluations that searches may take."""
    lines = []
    for part in parts:
        searches = [case for case in part.cases if case.attack not in CLOSED_FORMS]
        updates = len({case.update for case in part.cases})
        limit = f", up to {len(searches) * part.budget} evaluations" if searches else ""
        lines.append(f"{part.name}: {len(part.cases)} attacks on {updates} updates{limit}")
    return "\n".join(lines)


def measure(study: Study, path: Path) -> None:
    """Train and attack what is missing; Ctrl-C loses no finished row."""
    train_all(study)
    for part in plan(study):
        start = time.perf_counter()
        run(part.cases, path=path, max_evaluations=part.budget, pictures=part.pictures)
        print(f"{part.name}: {time.perf_counter() - start:.0f} s")


# --- Tables ---------------------------------------------------------------------------------------------------

#: ‖p − y‖, the gradient of the loss in the logits, by model, embedding, moment, seed and victim.
Misses = dict[tuple[str, str, str, int, str], float]
#: Training loss and test accuracy, by model, embedding, seed and moment.
Facts = dict[tuple[str, str, int, str], dict[str, Any]]
COMPARED = (*CLOSED_FORMS, "span_then_round", "span_then_match", "match:april")
NAMES = {"none": "no embedding", "sinusoidal": "sinusoidal 1-D", "sinusoidal-2d": "sinusoidal 2-D"}


def chosen(rows: Iterable[Row], study: Study, **wanted: str) -> list[Row]:
    """Rows whose case has these values; ``weights`` is "init", "early" or "late"."""
    if "weights" in wanted:
        wanted["weights"] = study.weights(wanted["weights"])
    return [row for row in rows if all(getattr(row.case, name) == value for name, value in wanted.items())]


def scores(rows: Iterable[Row]) -> list[float]:
    """PSNR of the attacks that were not refused, in dB, ascending; NaN, a picture that is none, counts as −∞."""
    return sorted(-math.inf if math.isnan(row.psnr) else row.psnr for row in rows if row.psnr is not None)


def cell(rows: Sequence[Row]) -> str:
    """Median and least PSNR in dB, and the number of runs; or that the attack was refused, or not run."""
    found = scores(rows)
    if not rows:
        return "not run"
    if not found:
        return f"refused ×{len(rows)}"
    refused = f", {len(rows) - len(found)} refused" if len(found) < len(rows) else ""
    return f"{statistics.median(found):.0f} ({found[0]:.0f}) ×{len(found)}{refused}"


def grid(rows: Sequence[Row], study: Study, model: str) -> str:
    """The Markdown table of an architecture: embedding and weights down, attacks and precisions across."""
    heads = [f"{attack} {dtype}" for attack in COMPARED for dtype in DTYPES]
    lines = ["| embedding | weights | " + " | ".join(heads) + " |", "|" + "---|" * (2 + len(heads))]
    for position in POSITIONS:
        for when in study.moments:
            here = chosen(rows, study, model=model, position=position, weights=when)
            cells = [cell(chosen(here, study, attack=attack, dtype=dtype)) for attack in COMPARED for dtype in DTYPES]
            lines.append(f"| {NAMES.get(position, position)} | {when} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def presets(rows: Sequence[Row], study: Study) -> str:
    """The Markdown table of the other presets, where the plan has them."""
    asked = {(c.position, c.weights) for part in plan(study) for c in part.cases if c.attack == OTHERS[0]}
    lines = ["| embedding | weights | " + " | ".join(OTHERS) + " |", "|" + "---|" * (2 + len(OTHERS))]
    for position, when in itertools.product(POSITIONS, study.moments):
        if (position, study.weights(when)) in asked:
            here = chosen(rows, study, position=position, weights=when)
            cells = [cell(chosen(here, study, attack=attack)) for attack in OTHERS]
            lines.append(f"| {NAMES.get(position, position)} | {when} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Twin:
    """A search of the twin study: losses of its first guess and of its last picture, and their PSNR in dB.

    ``reordered_psnr`` is that of its patches put where they fit best; NaN if the picture was not kept.
    """

    row: Row
    first_loss: float
    first_psnr: float
    reordered_psnr: float = math.nan

    @property
    def loss(self) -> float:
        return self.row.loss if self.row.loss is not None else math.nan

    @property
    def psnr(self) -> float:
        return self.row.psnr if self.row.psnr is not None else math.nan


def twins(rows: Sequence[Row], study: Study, path: Path) -> dict[str, list[Twin]]:
    """The searches of the twin study by embedding; empty lists where none was run."""
    points = read_curves(path)
    asked = {case for part in plan(study) if part.name == "twins" for case in part.cases}
    found: dict[str, list[Twin]] = {position: [] for position in TWINS}
    for row in rows:
        key = (row.case.update, row.case.attack, row.case.labels)
        if row.case in asked and row.psnr is not None and key in points:
            start, kept = points[key][0], read_pictures(path, row.case)
            best = reordered_psnr(kept[0], kept[1], study.shape["patch_size"]) if kept else math.nan
            found[row.case.position].append(Twin(row, start.loss, start.psnr, best))
    return found


def reordered_psnr(private: Tensor, pictures: Tensor, patch_size: int) -> float:
    """PSNR in dB of ``pictures`` (1, C, H, W) once its patches are put where they agree best with ``private``."""
    ours, theirs = (patchify(x.double(), patch_size)[0] for x in (pictures, private))  # (n, p)
    order = linear_sum_assignment(torch.cdist(theirs, ours).square().numpy())[1]
    return float(al.psnr(ours[order][None], theirs[None]))  # the mean over pixels does not see the order


def twin_table(found: dict[str, list[Twin]]) -> str:
    lines = [
        "| embedding | runs | first loss | last loss | fell by a factor of | relative residual | PSNR dB "
        "(least to greatest) | 30 dB or more | patches reordered, dB |",
        "|" + "---|" * 9,
    ]
    for position, runs in found.items():
        if not runs:
            lines.append(f"| {NAMES.get(position, position)} | 0 |" + " not run |" * 7)
            continue
        decibels = [twin.psnr for twin in runs]
        lines.append(
            f"| {NAMES.get(position, position)} | {len(runs)} | {median(t.first_loss for t in runs):.2g} | "
            f"{median(t.loss for t in runs):.2g} | {median(t.first_loss / t.loss for t in runs):.2g} | "
            f"{median(t.row.residual or math.nan for t in runs):.2g} | {median(decibels):.1f} "
            f"({min(decibels):.1f} to {max(decibels):.1f}) | {sum(psnr >= 30 for psnr in decibels)} | "
            f"{median(t.reordered_psnr for t in runs):.1f} |".replace("inf", "equal to 8 bits")
        )
    return "\n".join(lines)


def median(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.median(values) if values else math.nan


def training_table(facts: Facts, missed: Misses, study: Study) -> str:
    """Test accuracy of the weights, and how far from zero the victims' ‖p − y‖ is, over all seeds."""
    lines = [
        "| architecture | embedding | weights | test accuracy % (least to greatest) | training loss | "
        "‖p − y‖ of the victims, median (least) |",
        "|" + "---|" * 6,
    ]
    for model, letter in MODELS.items():
        for position in POSITIONS:
            for when in study.moments:
                known = [facts[model, position, s, when] for s in study.seeds if (model, position, s, when) in facts]
                values = [100 * entry["accuracy"] for entry in known]
                numbers = ["–", "–"]
                if known:
                    numbers = [f"{statistics.mean(values):.0f} ({min(values):.0f} to {max(values):.0f})"]
                    numbers += [f"{statistics.mean(entry['loss'] for entry in known):.2g}"]
                far = [value for key, value in missed.items() if key[:3] == (model, position, when)]
                numbers += [f"{median(far):.1g} ({min(far):.1g})" if far else "–"]
                lines.append(f"| {letter} | {NAMES.get(position, position)} | {when} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


@torch.no_grad()
def misses(study: Study) -> Misses:
    """How wrong each model is about each victim, in float64: all of an update is proportional to it."""
    images, labels = al.mnist5k("test", dtype=torch.float64)
    places = [int(victim.removeprefix("mnist:")) for victim in study.victims]
    x, y = al.HALF.to_input(images[places]), torch.nn.functional.one_hot(labels[places], 10)
    found: Misses = {}
    for model in MODELS:
        for position in POSITIONS:
            for when in study.moments:
                for seed in study.seeds:
                    name = study.weights(when).format(model=model, position=position, seed=seed)
                    weights = None if when == "init" else name
                    net = build_model(
                        model, position=position, seed=seed, weights=weights, dtype=torch.float64, **study.shape
                    )
                    far = torch.linalg.vector_norm(net(x).softmax(-1) - y, dim=-1)
                    found |= {
                        (model, position, when, seed, victim): float(value)
                        for victim, value in zip(study.victims, far, strict=True)
                    }
    return found


@dataclass(frozen=True)
class Saturated:
    """An attack on late weights whose head is ``factor`` times as sure of itself, float32; ``miss`` is ‖p − y‖."""

    attack: str
    factor: int
    miss: float
    psnr: float


FACTORS = (1, 2, 4, 8)


def saturated(study: Study) -> list[Saturated]:
    """Do closed forms suffer where nothing is left to learn? Late weights of B, head and its bias multiplied."""
    images, labels = al.mnist5k("test", dtype=torch.float64)
    found = []
    pairs: tuple[tuple[str, Position], ...] = (("embedding", "learned"), ("span", "frozen"))
    for (attack, position), seed, factor in itertools.product(pairs, study.seeds, FACTORS):
        name = study.weights("late").format(model="prenorm", position=position, seed=seed)
        net = build_model("prenorm", position=position, weights=name, seed=seed, **study.shape)
        with torch.no_grad():
            for parameter in net.head.parameters():  # type: ignore[union-attr]
                parameter.mul_(factor)
        exact = copy.deepcopy(net).double()
        for place in (int(victim.removeprefix("mnist:")) for victim in study.victims):
            x, y = al.HALF.to_input(images[place : place + 1]), labels[place : place + 1]
            with torch.no_grad():
                far = torch.linalg.vector_norm(exact(x).softmax(-1) - torch.nn.functional.one_hot(y, 10))
            try:
                pixels = CLOSED_FORMS[attack].function(net, al.client_update(net, x.float(), y)).pixels
            except al.AttackNotApplicable:
                found.append(Saturated(attack, factor, float(far), -math.inf))
            else:
                found.append(Saturated(attack, factor, float(far), float(al.psnr(pixels[0], images[place]))))
    return found


def saturation_table(found: Sequence[Saturated]) -> str:
    """Median PSNR by the size of p − y."""
    edges = (10.0, 1e-1, 1e-3, 1e-6, 1e-9, 0.0)
    lines = ["| ‖p − y‖ | embedding on learned, dB | span on frozen, dB |", "|---|---|---|"]
    for high, low in itertools.pairwise(edges):
        here = [entry for entry in found if low <= entry.miss < high]
        cells = []
        for attack in ("embedding", "span"):
            values = [entry.psnr for entry in here if entry.attack == attack]
            cells.append(f"{median(values):.0f} ({min(values):.0f}) ×{len(values)}" if values else "–")
        span = f"{low:.0e} to {high:.0e}" if low else f"below {high:.0e}"
        lines.append(f"| {'above 1e-01' if high == edges[0] else span} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


# --- Figures --------------------------------------------------------------------------------------------------

COLOURS = dict(zip(COMPARED, ("blue", "orange", "green", "purple", "red", "black"), strict=True))
MARKERS = {"float64": "o", "float32": "v"}
TOP = 400.0  # dB, above float64's own limit, with room for words


def effect_figure(rows: Sequence[Row], study: Study) -> Figure:
    """PSNR over the moment in training: a column for each embedding, a line for each architecture."""
    fig, axes = viz.figure(len(MODELS), len(POSITIONS), size=(7.9, 6.2))
    step = 0.07  # between the columns of an attack's two precisions
    places = {
        (attack, dtype): step * (2 * i + j - len(COMPARED) + 0.5) + (0.02 if j == 0 else -0.02)
        for i, attack in enumerate(COMPARED)
        for j, dtype in enumerate(DTYPES)
    }
    for line, (model, letter) in zip(axes, MODELS.items(), strict=True):
        for ax, position in zip(line, POSITIONS, strict=True):
            for x, when in enumerate(study.moments):
                for (attack, dtype), offset in places.items():
                    found = scores(
                        chosen(rows, study, model=model, position=position, weights=when, attack=attack, dtype=dtype)
                    )
                    found = [min(max(value, 0.0), 320.0) for value in found]
                    look: dict[str, Any] = {"color": viz.COLOURS[COLOURS[attack]], "linewidths": 0}
                    ax.scatter([x + offset] * len(found), found, s=7, alpha=0.3, **look)
                    if found:
                        marker = {"marker": MARKERS[dtype], "s": 46, "edgecolors": "white"}
                        ax.scatter([x + offset], [statistics.median(found)], **(look | {"linewidths": 0.8} | marker))
            ax.axhline(al.EXACT_TO_8_BITS_DB, color="0.6", linestyle=":", linewidth=1, zorder=0)
            for x in range(1, len(study.moments)):
                ax.axvline(x - 0.5, color="0.93", linewidth=1, zorder=0)
            ax.set(
                xlim=(-0.5, len(study.moments) - 0.5),
                ylim=(0, TOP),
                xticks=range(len(study.moments)),
                xticklabels=study.moments,
                yticks=range(0, 301, 100),
            )
            _say_what_is_missing(ax, chosen(rows, study, model=model, position=position))
        line[0].set_ylabel(f"architecture {letter}\nPSNR in dB")
        for ax in line[1:]:
            ax.set_yticklabels([])
    for ax, position in zip(axes[0], POSITIONS, strict=True):
        ax.set_title(NAMES.get(position, position), fontweight="bold", fontsize=10)
    axes[0, 0].annotate("exact to 8 bits", (-0.45, al.EXACT_TO_8_BITS_DB + 5), color="0.35", fontsize=9)
    dots = [
        Line2D([], [], linestyle="", marker="s", markersize=8, color=viz.COLOURS[colour], label=attack)
        for attack, colour in COLOURS.items()
    ]
    shapes = [
        Line2D([], [], linestyle="", marker=marker, markersize=8, color="0.4", label=dtype)
        for dtype, marker in MARKERS.items()
    ]
    fig.legend(
        handles=dots + shapes,
        loc="outside lower center",
        ncols=5,
        columnspacing=0.9,
        handletextpad=0.1,
        frameon=False,
    )
    return fig


def _say_what_is_missing(ax: Axes, rows: Sequence[Row]) -> None:
    """Write in a panel which attacks do not apply, so that their absence is no gap."""
    refused = [
        attack
        for attack in COMPARED
        if (here := [row for row in rows if row.case.attack == attack]) and not scores(here)
    ]
    if refused:
        ax.text(
            0.97, 1.0, "do not apply:\n" + "\n".join(refused), transform=ax.transAxes, ha="right", va="top",
            fontsize=9, color="0.35",
        )  # fmt: skip


TWIN_COLOURS = {"learned": "blue", "frozen": "orange", "sinusoidal": "black"}
TWIN_MARKERS = {"learned": "o", "frozen": "s", "sinusoidal": "D"}


def twins_figure(found: dict[str, list[Twin]], path: Path) -> Figure:
    """Where searches began and ended in loss and PSNR, and the pictures of two victims."""
    fig, axes = viz.figure(2, 7, size=(9.4, 4.2))
    place = axes[0, 0].get_gridspec()
    for ax in axes[:, :3].flat:
        ax.remove()
    ax = fig.add_subplot(place[:, :3])
    for position, runs in found.items():
        colour, marker = viz.COLOURS[TWIN_COLOURS[position]], TWIN_MARKERS[position]
        for twin in runs:
            ax.plot([twin.first_loss, twin.loss], [twin.first_psnr, twin.psnr], color=colour, alpha=0.18, linewidth=1)
            ax.plot(twin.first_loss, twin.first_psnr, marker, color="white", markeredgecolor=colour, markersize=4)
        if not runs:
            continue
        ax.plot(
            [t.loss for t in runs], [t.psnr for t in runs], marker, color=colour, markersize=7, alpha=0.75,
            markeredgecolor="white", label=NAMES.get(position, position),
        )  # fmt: skip
    ax.axhline(al.EXACT_TO_8_BITS_DB, color="0.6", linestyle=":", linewidth=1, zorder=0)
    ax.annotate(
        "exact to 8 bits", (0.98, al.EXACT_TO_8_BITS_DB), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", color="0.35", fontsize=10, ha="right",
    )  # fmt: skip
    ax.set(xscale="log", xlabel="loss, first (hollow) and last (filled)", ylabel="PSNR in dB")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper right", frameon=False, handletextpad=0.2)
    for line, victim in zip(axes[:, 3:], shown_twins(found), strict=False):
        for ax, position in zip(line[1:], TWINS, strict=True):
            shown = next((t for t in found[position] if (*t.row.case.victims, t.row.case.seed) == victim), None)
            kept = read_pictures(path, shown.row.case) if shown else None
            if shown is None or kept is None:
                ax.text(0.5, 0.5, "not kept" if shown else "not run", ha="center", va="center", color="0.4")
                ax.set(xticks=[], yticks=[])
                continue
            viz.draw(line[0], kept[0][0])
            viz.draw(ax, kept[1][0])
            ax.set_xlabel(f"loss {shown.loss:.0e}\n{shown.psnr:.1f} dB")
    for ax, head in zip(axes[0, 3:], ("private", *TWINS), strict=True):
        ax.set_title(NAMES.get(head, head), fontweight="bold")
    for ax in axes[:, 3:].flat:
        ax.spines[:].set_visible(False)
        ax.set(xticks=[], yticks=[])
        ax.set_box_aspect(1)
    return fig


def shown_twins(found: dict[str, list[Twin]]) -> list[tuple[str, int]]:
    """Victim and seed of two lines of pictures: the first runs of two victims that reached 30 dB when learned."""
    seen: dict[str, int] = {}
    for twin in sorted(found["learned"], key=lambda twin: twin.psnr < 30):  # stable: the order is kept otherwise
        seen.setdefault(twin.row.case.victims[0], twin.row.case.seed)
    return list(seen.items())[:2]


# --- The page -------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], study: Study, path: Path, facts: Facts) -> str:
    """The page: reading, figures, tables, what was run and what not."""
    missed, found = misses(study), twins(rows, study, path)
    return f"""\
# What the defences of the position embedding stop

{reading(rows, found, missed, study)}

![{ALT}]({path.stem}.png)

{CAPTION}

## Architecture A

{KEY}

{grid(rows, study, "april")}

## Architecture B

{grid(rows, study, "prenorm")}

## The other presets

Architecture B, float64, the first seed, {study.few} victims; not run for the other embeddings and early weights.

{presets(rows, study)}

## Twins

![{TWIN_ALT}]({path.stem}_twins.png)

{TWIN_CAPTION}

{twin_table(found)}

## The weights

{training_table(facts, missed, study)}

p are the model's probabilities of a victim, y is one at its label. An update is linear in p − y. The study's weights
leave it above 0.001; to go further, the head of B's late weights is multiplied by {", ".join(map(str, FACTORS))}
(float32, all victims and seeds; median, least, number of updates):

{saturation_table(saturated(study))}

## What was run

{done_table(rows, study)}

{provenance(rows, study)}
"""


def provenance(rows: Sequence[Row], study: Study) -> str:
    first, shape = rows[0], study.shape
    return (
        f"{len(rows)} attacks. ViT of patch {shape['patch_size']}, width {shape['width']}, {shape['depth']} blocks, "
        f"{shape['heads']} heads, MLP ratio {shape['mlp_ratio']:g}; MNIST-5k test digits {', '.join(study.victims)} "
        f"(of the split of seed 0); seeds {', '.join(map(str, study.seeds))}: of the weights, the {study.images} "
        "training images of 4000, their order and a search's first guess. Early: after a training of one epoch; "
        f"late: of {study.epochs}; AdamW, batch 40, learning rate 0.001. Attacks recover the labels themselves. The "
        "float64 client has the float32 weights, converted, so its table keeps float32's rounding, which is what "
        "makes 1-D sinusoids fall in float64 (conditioning.md). Curves of the searches are in effect_curves.csv; the "
        f"columns of both files are those of `aprillab compare`. aprillab {first.aprillab}, torch {first.torch}, "
        f"Python {first.python}, {first.machine}, {first.threads} thread(s). Made by `python -m studies.effect`, "
        "which trains the models first; a search of hundreds of steps ends elsewhere on another machine."
    )


def done_table(rows: Sequence[Row], study: Study) -> str:
    """How much of each part of the plan is done."""
    have = {row.case for row in rows}
    lines = ["| part | attacks planned | run | evaluations a search |", "|---|---|---|---|"]
    for part in plan(study):
        search = any(case.attack not in CLOSED_FORMS for case in part.cases)
        run_so_far = sum(case in have for case in part.cases)
        lines.append(f"| {part.name} | {len(part.cases)} | {run_so_far} | {part.budget if search else '–'} |")
    return "\n".join(lines)


KEY = (
    "Median PSNR in dB, the least in brackets, × the number of runs. “Refused”: the attack says that it does not "
    "apply. Early and late weights are trained."
)
CAPTION = (
    "PSNR over the moment in training (at initialization, early, late). Colour: the attack; circles from float64 "
    "gradients, triangles from float32 ones; large the median, small each victim and seed. Above the dotted line a "
    "picture is exact to 8 bits. Where an attack says that it does not apply, the panel names it; where a search was "
    "not run, the table says so."
)
ALT = (
    "Ten panels: five position embeddings across, two architectures down. Learned: closed forms near 270 dB in "
    "float64 and 110 in float32. Frozen: only the span attack is left, as high. Sinusoidal 1-D: the span attack at "
    "160 dB in float64 and 15 in float32. Sinusoidal 2-D: near 12. No embedding: no closed form applies."
)
TWIN_CAPTION = (
    "The same search (`match:april`, architecture B, weights at initialization, float64) on the same digits. Left: "
    "each run from the loss and PSNR of its first guess (hollow) to those of its end (filled); the learned loss has "
    "the position term. Right: the first two victims whose learned run reached 30 dB. Without the position "
    "embedding's gradient the loss falls by orders of magnitude all the same, and the picture is another one: its "
    "own patches in other places, for the most part, where the embedding is frozen."
)
TWIN_ALT = (
    "Scatter plot of PSNR over loss and two rows of pictures. With a learned embedding most runs end at a tiny loss "
    "and the private digit; frozen and sinusoidal ones end at a loss well below the first, with other pictures near "
    "6 dB."
)


def reading(rows: Sequence[Row], found: dict[str, list[Twin]], missed: Misses, study: Study) -> str:
    """What the tables show and what not, with their own numbers."""

    def some(attack: str, **wanted: str) -> list[float]:
        return scores(chosen(rows, study, attack=attack, **wanted))

    def least(values: Sequence[float]) -> str:
        if not values:
            return "?"
        return f"{median(values):.0f} dB (median of {len(values)}; {min(values):.0f} to {max(values):.0f})"

    shared = [row for row in chosen(rows, study, position="learned") if row.case.attack in ("embedding", "april")]
    withheld = [
        row for row in rows if row.case.position != "learned" and row.case.attack in ("embedding", "april")
    ]  # fmt: skip
    hybrid = {
        position: some("span_then_match", position=position, dtype="float32")
        for position in ("sinusoidal", "sinusoidal-2d")
    }

    def shares(values: Sequence[float]) -> str:
        if not values:
            return "not run"
        sharp, exact = sum(v >= 30 for v in values), sum(v >= al.EXACT_TO_8_BITS_DB for v in values)
        many = len(values)
        return f"{median(values):.0f} dB in the median, {sharp} of {many} at 30 dB or more, {exact} exact to 8 bits"

    def late(attack: str, position: str, model: str, dtype: str) -> str:
        first, last = (some(attack, position=position, model=model, dtype=dtype, weights=w) for w in ("init", "late"))
        return f"{median(first):.0f} to {median(last):.0f} dB"

    def searched(position: str, model: str) -> str:
        """Median PSNR and relative residual of span_then_match in float32, before and after training."""
        ends = []
        for when in ("init", "late"):
            runs = chosen(
                rows, study, attack="span_then_match", position=position, model=model, dtype="float32", weights=when
            )
            residual = median(row.residual for row in runs if row.residual is not None)
            ends.append(f"{median(scores(runs)):.0f} dB ({residual:.0e})")
        return f"{ends[0]} at initialization and {ends[1]} late"

    def whole(when: str, position: str = "sinusoidal") -> str:
        """How many of span_then_round's pictures are exact."""
        runs = chosen(rows, study, attack="span_then_round", position=position, dtype="float32", weights=when)
        return f"{sum(bool(row.exact) for row in runs)} of {len(runs)}"

    fell = {position: median(t.first_loss / t.loss for t in runs) for position, runs in found.items()}
    home = {position: sum(t.psnr >= 30 for t in runs) for position, runs in found.items()}
    pieces = {position: median(t.reordered_psnr for t in runs) for position, runs in found.items()}
    middle = {position: median(t.psnr for t in runs) for position, runs in found.items()}
    return (
        f"""\
**To withhold the gradient of a position embedding stops the closed forms that read it and leads gradient matching
astray, but it does not stop the span attack. Values that look random give the picture away to it, from float32
gradients at
{least(some("span", position="frozen", dtype="float32"))}, in both architectures, before and after training.** With
the gradient shared, `embedding` and `april` restore {sum(v >= 60 for v in scores(shared))} of {len(scores(shared))}
updates to 60 dB or more (`april` on B is refused: its first attention does not read the tokens themselves). Without
it they are refused on {sum(row.psnr is None for row in withheld)} of {len(withheld)} tries: the closed forms lose
their input, as the defence intends.

Sinusoids are a matter of digits. The 1-D table holds the span attack to
{least(some("span", position="sinusoidal", dtype="float32"))} in float32 and gives
{least(some("span", position="sinusoidal", dtype="float64"))} in float64. The 2-D table holds it to
{least(some("span", position="sinusoidal-2d"))} in both. `span_then_match` goes on from there in float32: on the 1-D
table {shares(hybrid["sinusoidal"])}; on the 2-D table {shares(hybrid["sinusoidal-2d"])}. `span_then_round`, which
knows that pixels are whole levels, in float32 and with the same budget: on the 1-D table {whole("init")} at
initialization and {whole("late")} late are exact by its own replay, on the 2-D table
{whole("init", "sinusoidal-2d")} and {whole("late", "sinusoidal-2d")}. Without an embedding no closed form applies.

Training does not help the client against closed forms. From initialization to late weights the medians go, in
float32: `embedding` on B
{late("embedding", "learned", "prenorm", "float32")}, `span` on frozen B
{late("span", "frozen", "prenorm", "float32")}; on A {late("embedding", "learned", "april", "float32")} and
{late("span", "frozen", "april", "float32")}. Saturation is not the reason: where ‖p − y‖ falls to 1e-9 and below,
they lose nothing (table below), since every tensor of the update shrinks with it and the relative precision
stays. Searches do feel it: with the same budget `span_then_match` ends (PSNR and relative residual,
medians), on the 1-D table, at
{searched("sinusoidal", "april")} on A and {searched("sinusoidal", "prenorm")} on B, on the 2-D table at
{searched("sinusoidal-2d", "april")} and {searched("sinusoidal-2d", "prenorm")}. The late ones end at larger
residuals, not converged or stuck; what a larger budget would give was not measured.

Twins: the same search falls by a factor of {fell["learned"]:.0e} with the learned embedding's gradient, of
{fell["frozen"]:.0e} without and of {fell["sinusoidal"]:.0e} with sinusoids, and ends at {middle["learned"]:.0f},
{middle["frozen"]:.0f} and {middle["sinusoidal"]:.0f} dB; {home["learned"]}, {home["frozen"]} and {home["sinusoidal"]}
of {len(found["learned"])}, {len(found["frozen"])} and {len(found["sinusoidal"])} runs reach 30 dB. What frozen twins
show are the private patches in other places: put back where they fit best, they have {pieces["frozen"]:.0f} dB in the
median ({pieces["sinusoidal"]:.0f} with sinusoids). A small loss is no
proof of a picture, and a failed search none of a defence: on the frozen embedding, where this one finds twins, the
span attack has every picture.

Not shown: that anything here protects anyone. These are small models, briefly trained, digits, one image an update,
and searches with small budgets on one seed (twins two); a search that ends in a twin may need more evaluations,
another start or what `span_then_match` starts from. What was not run is marked in the tables.""".replace(
            "\n\n", "\0"
        )
        .replace("\n", " ")
        .replace("\0", "\n\n")
    )


# --- The command ----------------------------------------------------------------------------------------------

SMALLEST = Study(
    victims=("mnist:7", "mnist:207"), seeds=(0,), moments=("init", "late"), images=40, epochs=2, april=5, hybrid=5,
    others=5, few=1,
    shape={
        "image_size": 28, "patch_size": 7, "channels": 1, "width": 64, "depth": 2, "heads": 2, "mlp_ratio": 1.0,
        "classes": 10,
    },
)  # fmt: skip


def collected(study: Study, path: Path) -> list[Row]:
    """The rows that belong to the plan, in its order."""
    known = {row.case: row for row in read_rows(path)}
    asked = dict.fromkeys(case for part in plan(study) for case in part.cases)
    return [known[case] for case in asked if case in known]


def write(study: Study, path: Path) -> None:
    """Page and figures of what is there."""
    rows, facts = collected(study, path), train_all(study)
    if not rows:
        return
    found = twins(rows, study, path)
    path.with_suffix(".png").write_bytes(viz.to_png(effect_figure(rows, study), dpi=150))
    path.with_name(f"{path.stem}_twins.png").write_bytes(viz.to_png(twins_figure(found, path), dpi=150))
    path.with_suffix(".md").write_text(report(rows, study, path, facts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, two victims, five evaluations a search")
    parser.add_argument("--report", action="store_true", help="attack nothing, write page and figures anew")
    parser.add_argument("--output", type=Path, help="folder for the results; --quick without it writes nowhere")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the weights (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as nowhere:
        folder = arguments.output or (Path(nowhere) if arguments.quick else RESULTS)
        checkpoints = folder / "checkpoints" if arguments.quick else arguments.checkpoints
        study = replace(SMALLEST if arguments.quick else Study(), checkpoints=checkpoints)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "effect.csv"
        print(size(plan(study)))
        try:
            if not arguments.report:
                measure(study, path)
        except KeyboardInterrupt:
            print("interrupted: what is done is in the table; the same command goes on")
        write(study, path)
        rows = collected(study, path)
        for model, letter in MODELS.items():
            print(f"\narchitecture {letter}\n\n{grid(rows, study, model)}")
        print(f"\n{twin_table(twins(rows, study, path))}\n\n{done_table(rows, study)}")


if __name__ == "__main__":
    main()
