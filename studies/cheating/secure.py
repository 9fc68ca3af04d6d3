"""Silenced clients and class fishing through Flower's own SecAgg+: `python -m studies.cheating.secure`.

Three clients, one round, played three ways: by an honest server, by one that silences all but the first client, and
by one that fishes for a class. Prints what each client saw and what the server got, and writes silenced.png. The
protocol is Flower's (pip install "aprillab[federation]"), the photographs the project's, server and clients functions
of this process: nothing is sent anywhere. About half a minute.

    python -m studies.cheating.secure --out runs/silenced
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.dishonest.sent import head_of
from aprillab.federation import FlowerMissing, LocalTraining
from aprillab.federation.flower import need_flower

from .._rows import StudyError, fill, made
from .._rows import read as rows_of
from .._runner import Description, between
from .._tables import grouped, markdown
from .clients import batch_of, best_psnr, loaded, model_of, read

if TYPE_CHECKING:
    from .secure_sum import Owner, Round

FILE = "cheating_secure.csv"
HONEST, SILENCED, FOR_GOOD, FISHED = "honest", "silenced", "silenced for good", "fished"
DEFAULT, FINE = 8.0, 1.0  # clipping ranges: Flower's, and one that all weights are just within


class Case(NamedTuple):
    """``others`` is how many pictures each other client has, and of fishing the first, too."""

    way: str
    model: str
    clipping: float
    max_weight: float
    rate: float
    steps: int
    others: int
    victim: int
    seed: int


@dataclass(frozen=True)
class Row:
    """``psnr`` of the first client's first picture, of an honest round the best of all pictures.

    ``unrounded`` is the same from the plain average of the replies; ``floor`` the r.m.s. error of the average's
    weights below the head, ``foretold`` what follows from the quantization; ``others`` how much the other two moved
    below the head, relative to the first.
    """

    way: str
    model: str
    clipping: float
    max_weight: float
    rate: float
    steps: int
    others: int
    victim: int
    seed: int
    psnr: float | None = None
    predicted: float | None = None
    unrounded: float | None = None
    floor: float | None = None
    foretold: float | None = None
    moved: float | None = None
    one_image: str = ""


def cases(quick: bool) -> Iterator[Case]:
    seeds = [(victim, seed) for victim in range(1 if quick else 4) for seed in range(1 if quick else 2)]
    settings = [(weight, rate) for weight in (1000.0, 10.0, 1.0) for rate in (0.1, 1.0)]
    for model in ("random", "digits"):
        for way, others in {HONEST: 1, SILENCED: 1, FISHED: 4}.items():
            few = settings[4:5] if quick else settings[:1] + settings[4:5] if way == HONEST else settings
            yield from (Case(way, model, DEFAULT, w, r, 1, others, *seed) for w, r in few for seed in seeds)
        yield from () if quick else (
            Case(way, model, FINE, others, 0.1, 1, others, *seed)
            for way, others in {SILENCED: 1.0, FISHED: 4.0}.items() for seed in seeds
        )  # fmt: skip
    for way in (SILENCED, FOR_GOOD, FISHED):
        yield from (Case(way, "random", DEFAULT, 1.0, 0.1, 5, 4, *seed) for seed in seeds)


# --- Measuring ----------------------------------------------------------------------------------------------------


def owners(case: Case) -> tuple[list[Owner], int]:
    """The clients, of whom the first has the wanted picture, and its class, which no other picture has."""
    from .secure_sum import CLIENTS, Owner

    images, labels, wanted = batch_of(case.model, 8, case.victim, "repeated", case.victim)
    own = images[case.victim : case.victim + 1], labels[case.victim : case.victim + 1]
    images, labels, _ = batch_of(case.model, CLIENTS * case.others, case.victim, "repeated", 0, client=1 + case.seed)
    first = case.others if case.way == FISHED else 1
    everyone = [Owner(*(torch.cat([o, x[1:first]]) for o, x in zip(own, (images, labels), strict=True)))]
    rest = zip(images[case.others :].split(case.others), labels[case.others :].split(case.others), strict=True)
    return [*everyone, *(Owner(x, y) for x, y in rest)], wanted


def sent_to(model: nn.Module, way: str, wanted: int, count: int) -> list[dict[str, Tensor]]:
    """What each client is sent."""
    from .secure_sum import silenced_for_good

    honest = model.state_dict()
    if way == FISHED:
        return [al.dishonest.class_fishing(model, wanted)] * count
    quiet = {HONEST: lambda _: honest, SILENCED: al.dishonest.silenced, FOR_GOOD: silenced_for_good}[way](model)
    return [honest, *[quiet] * (count - 1)]


def measured(case: Case) -> Iterator[Row]:
    from .secure_sum import Precision, foretold, picture_of, play

    model, (everyone, wanted) = model_of(case.model), owners(case)
    how, precision = LocalTraining(learning_rate=case.rate, steps=case.steps), Precision(case.max_weight, case.clipping)
    sent = sent_to(model, case.way, wanted, len(everyone))
    played = play(model, sent, everyone, how, precision=precision, seed=case.seed)
    result = picture_of(model, played)
    own = everyone if case.way == HONEST else everyone[:1]
    truth = al.HALF.to_pixels(torch.cat([owner.images[:1] for owner in own])).to(result.pixels)
    one = next(condition for condition in result.conditions if condition.name == "one image")
    yield Row(
        *case, psnr=float(best_psnr([result.pixels[0]], truth).max()), predicted=result.predicted_psnr,
        foretold=foretold(played), one_image=one.state, **of_replies(model, played, everyone, truth),
    )  # fmt: skip


def of_replies(model: nn.Module, played: Round, everyone: Sequence[Owner], truth: Tensor) -> dict[str, Any]:
    """What only who has the replies can tell."""
    from dataclasses import replace

    from .secure_sum import update_of

    replies = [owner.trained(model, s, played.how) for owner, s in zip(everyone, played.sent, strict=True)]
    weights = list(played.weights().values())
    average = {
        name: sum(w * r[name].double() for w, r in zip(weights, replies, strict=True)) / sum(weights)
        for name in played.average
    }
    body = [name for name in average if name not in head_of(model).names]
    moves = [_rms({n: r[n].double() - s[n] for n in body}) for r, s in zip(replies, played.sent, strict=True)]
    sent = loaded(model, dict(played.sent[0]))
    whole = read(sent, update_of(model, replace(played, average=average)), preprocessing=al.HALF, strict=False)
    return {
        "unrounded": float(best_psnr([whole.pixels[0]], truth).max()), "moved": max(moves[1:]) / moves[0],
        "floor": _rms({n: played.average[n] - average[n] for n in body}),
    }  # fmt: skip


def _rms(tensors: dict[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).square().mean().sqrt())


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Where Flower is missing, what was measured before is described."""
    try:
        need_flower()
    except FlowerMissing as error:
        if not (folder / FILE).is_file():
            raise StudyError(str(error)) from error
        return
    settings, found = {"flwr": version("flwr")}, cases(options.quick)
    fill(folder / FILE, Row, found, measured, key=Case._fields, settings=settings, workers=options.workers)
