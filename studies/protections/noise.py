"""LocalDpMod: what its noise leaves of one picture, over ε and over rounds, and what its ε is worth."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import FedAvg
from scipy.optimize import brentq

import aprillab as al

from .._rows import fill, made, read
from .._runner import Claim, Description, between
from .._tables import grouped, markdown
from ..sharing_less.clients import only
from ..sharing_less.rounds import epsilon_of
from .clients import (
    FIRST, RATE, SEEDS, VICTIMS, Attacked, Owner, State, attacked, client_app, config_of, model_of, owners, verdict,
)  # fmt: skip
from .wire import Wire

FILE, ROUNDS_FILE = "protections_noise.csv", "protections_rounds.csv"
CLIP = 1.0  # norm of the weights' change, and the sensitivity that the mod is told
DELTA = 1e-5
NONE = math.inf  # in the place of ε: no mod
EPSILONS = (NONE, 1e8, 1e7, 1e6, 1e5, 1e4, 1e3, 100.0, 10.0, 1.0)
CLIPS, ROUNDS_EPSILONS, ROUNDS = (1.0, 0.1), (1e5, 1e4), (1, 4, 16)
NOTHING = 15.0  # dB: below it, a picture is a shade of grey with spots
_NOISE_SEED = 100


class Case(NamedTuple):
    """One client, one round."""

    epsilon: float
    victim: str
    seed: int


@dataclass(frozen=True)
class Row:
    """One reply attacked.

    ``deviation`` is of the noise in each weight, ``sigma`` the same over the clipping norm; ``norm`` the change's
    before it is clipped. ``exact_epsilon`` is the noise's by the exact condition at δ = 1e-5, for a client more or
    less, ``replaced`` for one update in the place of another. ``ours`` is the PSNR where the same noise is put on
    the clipped gradient by :func:`aprillab.defenses.gaussian_noise`; ``seeded`` that of a server that knows the
    seed of the client's numpy.
    """

    epsilon: float
    victim: str
    seed: int
    deviation: float | None = None
    sigma: float | None = None
    norm: float | None = None
    exact_epsilon: float | None = None
    replaced: float | None = None
    psnr: float | None = None
    predicted_psnr: float | None = None
    exact: bool | None = None
    attack: str = ""
    ours: float | None = None
    seeded: float | None = None
    verdict: str = ""
    note: str = ""


class Repeated(NamedTuple):
    """One client whose picture stays, and whose change is clipped to ``clip``, which is the sensitivity too."""

    clip: float
    epsilon: float
    victim: str


@dataclass(frozen=True)
class RoundsRow:
    """The first rounds attacked together; ``promised`` is one round under the noise divided by √T."""

    clip: float
    epsilon: float
    victim: str
    rounds: int
    together: float | None = None
    promised: float | None = None
    psnr: float | None = None
    predicted_psnr: float | None = None
    exact: bool | None = None


def cases(quick: bool) -> Iterator[Case]:
    epsilons, victims, seeds = (EPSILONS[::3], VICTIMS[:1], SEEDS[:1]) if quick else (EPSILONS, VICTIMS, SEEDS)
    yield from (Case(epsilon, victim, seed) for epsilon in epsilons for victim in victims for seed in seeds)


def repeated(quick: bool) -> Iterator[Repeated]:
    epsilons, victims = (ROUNDS_EPSILONS[:1], VICTIMS[:1]) if quick else (ROUNDS_EPSILONS, VICTIMS)
    yield from (Repeated(clip, epsilon, victim) for clip in CLIPS for epsilon in epsilons for victim in victims)


def deviation_of(epsilon: float) -> float:
    """LocalDpMod's at sensitivity 1, by its own formula: the classical Gaussian mechanism, proved for ε below 1."""
    return math.sqrt(2 * math.log(1.25 / DELTA)) / epsilon


def mods_of(epsilon: float, clip: float = CLIP) -> list[LocalDpMod]:
    return [] if epsilon == NONE else [LocalDpMod(clip, clip, epsilon, DELTA)]


# --- One round ----------------------------------------------------------------------------------------------------


def reply_of(case: Case) -> State:
    """The weights that the server gets back."""
    owner = owners(case.victim)[0]
    wire = Wire([client_app(owner, mods_of(case.epsilon))])
    content = RecordDict({"arrays": ArrayRecord(model_of(case.seed).state_dict()), "config": config_of(RATE)})
    wire.run(lambda grid: grid.send_and_receive([Message(content, FIRST, "train")]), seed=_NOISE_SEED + case.seed)
    ((_, reply),) = wire.seen
    return reply.content["arrays"].to_torch_state_dict()


def update_of(before: State, after: State, model: torch.nn.Module) -> al.ClientUpdate:
    return al.update_from_states(before, after, learning_rate=RATE, trained=model)


def measured(case: Case) -> Iterator[Row]:
    """One reply, attacked as it is, and twice more in comparison."""
    model, owner = model_of(case.seed), owners(case.victim)[0]
    before, after = model.state_dict(), reply_of(case)
    update = update_of(before, after, model)
    found = attacked(model, update, owner)
    change = RATE * al.defenses.update_norm(update_of(before, owner.trained(before, RATE), model))
    facts: dict[str, object] = {"norm": change, "verdict": verdict(model, update), **asdict(found)}
    if case.epsilon != NONE:
        sigma = deviation_of(case.epsilon)
        clean = al.defenses.clip(update_of(before, owner.trained(before, RATE), model), CLIP)
        noisy = al.defenses.gaussian_noise(clean, sigma, seed=case.seed)
        facts |= {
            "deviation": CLIP * sigma, "sigma": sigma, "exact_epsilon": epsilon_of(sigma, 1, DELTA),
            "replaced": epsilon_of(sigma / 2, 1, DELTA), "ours": attacked(model, noisy, owner).psnr,
            "seeded": attacked(model, update_of(before, without_noise(after, case), model), owner).psnr,
        }  # fmt: skip
    yield Row(*case, **facts)  # type: ignore[arg-type]


def without_noise(after: State, case: Case) -> State:
    """The reply less the noise that numpy's global generator gives from the client's seed, in the mod's order."""
    source, deviation = np.random.RandomState(_NOISE_SEED + case.seed), CLIP * deviation_of(case.epsilon)
    return {
        name: value.double() - torch.from_numpy(source.normal(0, deviation, tuple(value.shape))).to(value.dtype)
        for name, value in after.items()
    }


def worth(claimed: float, *, replaced: bool = False) -> float:
    """The exact ε at δ = 1e-5 of the noise that LocalDpMod takes for ``claimed``."""
    return epsilon_of(deviation_of(claimed) / (2 if replaced else 1), 1, DELTA)


def honest_up_to() -> float:
    """The ε from which on LocalDpMod claims less than the exact mechanism has (one client more or less)."""
    return float(brentq(lambda claimed: worth(claimed) - claimed, 1.0, 100.0))


# --- Several rounds -----------------------------------------------------------------------------------------------


def rounds_of(case: Repeated, number: int) -> list[al.Round]:
    """The victim's replies to Flower's FedAvg; two other clients, with the mod too, move the weights in between."""
    model = model_of(0)
    kept, everyone = al.dissect(model).tensor_names(), owners(case.victim)

    def keep(asked: Message, answered: Message) -> al.Round | None:
        if asked.metadata.dst_node_id != FIRST:
            return None
        sent, back = (message.content["arrays"].to_torch_state_dict() for message in (asked, answered))
        state = {name: value for name, value in sent.items() if name in kept}  # the rest would fill the memory
        return al.Round(state, only(update_of(sent, back, model), kept))

    mods = mods_of(case.epsilon, case.clip)
    wire = Wire([client_app(owner, mods) for owner in everyone], keep=keep)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    first, told = ArrayRecord(model.state_dict()), config_of(RATE)
    wire.run(lambda grid: strategy.start(grid, first, number, train_config=told), seed=_NOISE_SEED)
    return [found for found in wire.seen if found is not None]


def over_rounds(case: Repeated) -> Iterator[RoundsRow]:
    """The first T rounds together, for several T."""
    model, owner = model_of(0), owners(case.victim)[0]
    every = rounds_of(case, max(ROUNDS))
    for number in ROUNDS:
        found = together(model, every[:number], owner)
        once = rounds_of(case._replace(epsilon=case.epsilon * math.sqrt(number)), 1)
        yield RoundsRow(
            *case, number, epsilon_of(deviation_of(case.epsilon), number, DELTA), together(model, once, owner).psnr,
            found.psnr, found.predicted_psnr, found.exact,
        )  # fmt: skip


def together(model: torch.nn.Module, rounds: Sequence[al.Round], owner: Owner) -> Attacked:
    """The patch-embedding system over all rounds; without a replay, since most tensors are not kept."""
    result = al.embedding_closed_form(model, list(rounds), verify=False, strict=False)
    psnr = float(al.psnr(result.pixels[0], owner.pixels()[0].double()))
    return Attacked(psnr, result.predicted_psnr, result.exact)


def measure(folder: Path, options: argparse.Namespace) -> None:
    settings = {"sensitivity": "the clipping norm", "delta": DELTA, "learning_rate": RATE}
    fill(folder / FILE, Row, cases(options.quick), measured, key=Case._fields, settings=settings)
    again = repeated(options.quick)
    fill(folder / ROUNDS_FILE, RoundsRow, again, over_rounds, key=Repeated._fields, settings=settings)
