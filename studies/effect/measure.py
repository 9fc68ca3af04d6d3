"""What is measured: weights are trained, a plan is run, some facts are kept beside it."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

import aprillab as al
from aprillab.attacks import CLOSED_FORMS, RECIPES
from aprillab.comparison.cases import Case, cross
from aprillab.comparison.records import read_pictures
from aprillab.comparison.run import run
from aprillab.training import evaluate, train
from aprillab.zoo import Position, build_model

from .._rows import StudyError, fill
from ..position_term import rearranged

# Seen from the repository's root: the path is a part of the cases in effect.csv.
CHECKPOINTS = Path("studies") / "checkpoints" / "effect"
POSITIONS: tuple[Position, ...] = get_args(Position)
MODELS = {"april": "A", "prenorm": "B"}
WEIGHTS = ("init", "early", "late")
DTYPES = ("float64", "float32")
DIGITS = {
    "image_size": 28, "patch_size": 7, "channels": 1, "width": 128, "depth": 4, "heads": 4, "mlp_ratio": 2.0,
    "classes": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """How much is measured, with which model.

    Victims are test digits of different classes; a seed is that of the weights, of the training
    images' choice and order, and of a search's first guess. ``april``, ``hybrid`` and ``others``
    are the evaluations of a search; ``few`` is the number of victims of the other recipes.
    """

    victims: tuple[str, ...] = ("mnist:7", "mnist:207", "mnist:307", "mnist:507", "mnist:907")
    seeds: tuple[int, ...] = (0, 1, 2)
    shape: dict[str, Any] = field(default_factory=lambda: dict(DIGITS))
    moments: tuple[str, ...] = WEIGHTS
    images: int = 800
    epochs: int = 8
    april: int = 300
    hybrid: int = 150
    others: int = 150
    few: int = 2
    checkpoints: Path = CHECKPOINTS

    def weights(self, when: str) -> str:
        """What :class:`Case` calls the weights at initialization, early or late in training."""
        name = f"{{model}}-{{position}}-{{seed}}-{when}.safetensors"
        return when if when == "init" else str(self.checkpoints / name)

    def model(self, model: str, position: Position, seed: int, when: str, **options: Any) -> nn.Module:
        name = self.weights(when).format(model=model, position=position, seed=seed)
        weights = None if when == "init" else name
        return build_model(model, position=position, seed=seed, weights=weights, **options, **self.shape)

    @property
    def places(self) -> list[int]:
        """Of the victims among the test digits."""
        return [int(victim.removeprefix("mnist:")) for victim in self.victims]


SMALLEST = Study(
    victims=("mnist:7", "mnist:207"), seeds=(0,), moments=("init", "late"), images=40, epochs=2, april=5, hybrid=5,
    others=5, few=1, shape=DIGITS | {"width": 64, "depth": 2, "heads": 2, "mlp_ratio": 1.0},
)  # fmt: skip


def study_of(folder: Path, options: argparse.Namespace) -> Study:
    study = SMALLEST if options.quick else Study()
    return replace(study, checkpoints=folder / "checkpoints" if options.quick else options.checkpoints)


# --- Training -----------------------------------------------------------------------------------------------------


def trained(study: Study, model: str, position: Position, seed: int, when: str) -> dict[str, Any]:
    """Train what is not there yet; the last epoch's training loss, and the test accuracy.

    "early" is a training of one epoch, "late" one of all, from the same weights with the same
    images.
    """
    file = Path(study.weights(when).format(model=model, position=position, seed=seed))
    epochs = 1 if when == "early" else study.epochs
    settings = {"images": study.images, "epochs": epochs, **study.shape}
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            kept: dict[str, Any] = json.loads((opened.metadata() or {}).get("training", "{}"))
        if kept.get("settings") != settings:
            raise StudyError(f"{file} is of another study: {kept.get('settings')}, not {settings}. Remove it")
        return kept
    (x, y), (test_x, test_y) = al.mnist5k("train"), al.mnist5k("test")
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: study.images]
    net = study.model(model, position, seed, "init")
    history = train(
        net, al.HALF.to_input(x[some]), y[some], epochs=epochs, seed=seed, batch_size=40, lr=1e-3, progress=False
    )
    if len(history) < epochs:  # train ends at Ctrl-C
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


def train_all(study: Study) -> None:
    """:func:`trained` for all models, embeddings, seeds and both moments."""
    moments = [when for when in study.moments if when != "init"]
    keys = list(itertools.product(study.seeds, moments, MODELS, POSITIONS))
    for seed, when, model, position in tqdm(keys, desc="training", unit=" model"):
        trained(study, model, position, seed, when)


# --- The plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the grid; ``budget`` is a search's evaluations, ``pictures`` whether kept."""

    name: str
    cases: list[Case]
    budget: int
    pictures: bool = False


OTHERS = tuple(f"match:{name}" for name in RECIPES if name != "april")
TWINS: tuple[Position, ...] = ("learned", "frozen", "sinusoidal")


def plan(study: Study) -> list[Part]:
    """What is run, the most telling part first, so that an interrupted study has whole parts."""
    init, late = study.weights("init"), study.weights("late")

    def cases(*attacks: str, **options: Any) -> list[Case]:
        given: dict[str, Any] = {"models": ("prenorm",), "dtypes": ("float64",), "seeds": study.seeds[:1]}
        given |= {"victims": study.victims, "positions": POSITIONS, "weights": (init,)}
        return cross(attacks=attacks, **(given | options), **study.shape)

    fixed, both, moments = ("sinusoidal", "sinusoidal-2d"), tuple(MODELS), [study.weights(w) for w in study.moments]
    all_of_it: dict[str, Any] = {"models": both, "dtypes": DTYPES, "seeds": study.seeds, "weights": moments}
    ends: dict[str, Any] = {"models": both, "weights": (init, late)}
    single: dict[str, Any] = ends | {"dtypes": ("float32",)}
    some: dict[str, Any] = {"positions": TWINS[::2], "weights": (init, late), "victims": study.victims[: study.few]}
    april = "match:april"
    twins = cases(april, positions=TWINS, seeds=study.seeds[:2])
    return [
        Part("closed forms", cases(*CLOSED_FORMS, **all_of_it), study.april),
        Part("twins", twins, study.april, pictures=True),
        Part("span_then_match", cases("span_then_match", positions=(*fixed, "none"), **single), study.hybrid),
        Part("span_then_round", cases("span_then_round", positions=fixed, **single), study.hybrid),
        Part("match:april, B, late", cases(april, weights=(late,)), study.april),
        Part("match:april, B, init, the others", cases(april, positions=POSITIONS[3:]), study.april),
        Part("presets", cases(*OTHERS, **some), study.others),
        Part("match:april, A, init", cases(april, models=("april",)), study.april),
        Part("match:april, B, init, float32", cases(april, dtypes=("float32",)), study.april),
        Part("span_then_match, float64", cases("span_then_match", positions=fixed[1:], **ends), study.hybrid),
        Part("match:april, A, late", cases(april, models=("april",), weights=(late,)), study.april),
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


# --- Facts beside the plan ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Test accuracy in % and training loss over seeds; ``miss``, ‖p − y‖, over victims too."""

    model: str
    position: str
    weights: str
    accuracy: float | None
    accuracy_least: float | None
    accuracy_most: float | None
    loss: float | None
    miss: float
    miss_least: float


@torch.no_grad()
def misses(study: Study, model: str, position: Position, when: str) -> list[float]:
    """How wrong the models are about each victim, in float64: an update is proportional to it."""
    images, labels = al.mnist5k("test", dtype=torch.float64)
    x, y = al.HALF.to_input(images[study.places]), torch.nn.functional.one_hot(labels[study.places], 10)
    found: list[float] = []
    for seed in study.seeds:
        net = study.model(model, position, seed, when, dtype=torch.float64)
        found += torch.linalg.vector_norm(net(x).softmax(-1) - y, dim=-1).tolist()
    return found


def weighed(study: Study, case: tuple[str, Position, str]) -> list[Weights]:
    far = misses(study, *case)
    if case[-1] == "init":
        return [Weights(*case, None, None, None, None, statistics.median(far), min(far))]
    model, position, when = case
    facts = [trained(study, model, position, seed, when) for seed in study.seeds]
    accuracies = [100 * entry["accuracy"] for entry in facts]
    loss = statistics.mean(entry["loss"] for entry in facts)
    numbers = (statistics.mean(accuracies), min(accuracies), max(accuracies), loss)
    return [Weights(*case, *numbers, statistics.median(far), min(far))]


@dataclass(frozen=True)
class Saturated:
    """An attack on late weights with a head ``factor`` times as sure; ``miss`` is ‖p − y‖."""

    factor: int
    miss: float
    psnr: float


@dataclass(frozen=True)
class Head:
    """PSNR of an attack where ‖p − y‖ lies in a band: median, least in dB, number of updates."""

    attack: str
    band: str
    psnr: float | None
    psnr_least: float | None
    updates: int


FACTORS = (1, 2, 4, 8)
EDGES = (10.0, 1e-1, 1e-3, 1e-6, 1e-9, 0.0)
BANDS = ("above 1e-01", *(f"{low:.0e} to {high:.0e}" for high, low in itertools.pairwise(EDGES[1:-1])), "below 1e-09")
SURER: dict[str, Position] = {"embedding": "learned", "span": "frozen"}


def saturated(study: Study, attack: str) -> Iterator[Saturated]:
    """Do closed forms suffer where nothing is left to learn? Late weights of B, float32."""
    images, labels = al.mnist5k("test", dtype=torch.float64)
    for seed, factor in itertools.product(study.seeds, FACTORS):
        net = study.model("prenorm", SURER[attack], seed, "late")
        with torch.no_grad():
            for parameter in net.head.parameters():  # type: ignore[union-attr]
                parameter.mul_(factor)
        exact = copy.deepcopy(net).double()
        for place in study.places:
            x, y = al.HALF.to_input(images[place : place + 1]), labels[place : place + 1]
            with torch.no_grad():
                far = torch.linalg.vector_norm(exact(x).softmax(-1) - torch.nn.functional.one_hot(y, 10))
            try:
                pixels = CLOSED_FORMS[attack].function(net, al.client_update(net, x.float(), y)).pixels
            except al.AttackNotApplicable:
                yield Saturated(factor, float(far), -math.inf)
            else:
                yield Saturated(factor, float(far), float(al.psnr(pixels[0], images[place])))


def banded(study: Study, case: tuple[str]) -> Iterator[Head]:
    found = list(saturated(study, *case))
    for band, (high, low) in zip(BANDS, itertools.pairwise(EDGES), strict=True):
        values = [entry.psnr for entry in found if low <= entry.miss < high]
        middle, least = (statistics.median(values), min(values)) if values else (None, None)
        yield Head(*case, band, middle, least, len(values))


@dataclass(frozen=True)
class Reordered:
    """Median PSNR in dB of the twins' pictures, their patches put where they fit best."""

    position: str
    runs: int
    psnr: float


def reordered(study: Study, path: Path, case: tuple[str]) -> list[Reordered]:
    (position,), found = case, []
    for twin in next(part.cases for part in plan(study) if part.name == "twins"):
        if twin.position == position and (kept := read_pictures(path, twin)):
            private, picture = (pixels[0].double() for pixels in kept[:2])
            found.append(float(al.psnr(rearranged(picture, private, study.shape["patch_size"]), private)))
    return [Reordered(position, len(found), statistics.median(found))] if found else []


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Train and attack what is missing; Ctrl-C loses no finished row."""
    study, path = study_of(folder, options), folder / "effect.csv"
    print(size(plan(study)))
    train_all(study)
    for part in plan(study):
        start = time.perf_counter()
        run(part.cases, path=path, max_evaluations=part.budget, pictures=part.pictures, workers=options.workers)
        print(f"{part.name}: {time.perf_counter() - start:.0f} s")
    settings = {"images": study.images, "epochs": study.epochs}
    kinds, key = itertools.product(MODELS, POSITIONS, study.moments), ("model", "position", "weights")
    more: dict[str, Any] = {"settings": settings, "workers": options.workers}
    fill(folder / "effect_weights.csv", Weights, kinds, partial(weighed, study), key=key, **more)
    attacks = [(attack,) for attack in SURER]
    fill(folder / "effect_heads.csv", Head, attacks, partial(banded, study), key=("attack",), **more)
    positions = [(position,) for position in TWINS]
    fill(folder / "effect_twins.csv", Reordered, positions, partial(reordered, study, path), key=("position",))
