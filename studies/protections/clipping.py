"""Flower's clipping strategies, on the client's side and on the server's: what the server has before it adds noise."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from flwr.app import ArrayRecord
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)

import aprillab as al

from .._rows import fill, made, read
from .._runner import Claim, Description, between
from .._tables import grouped, markdown
from .clients import RATE, SEEDS, VICTIMS, Mod, Owner, State, attacked, client_app, config_of, model_of, owners
from .noise import NOTHING, update_of
from .wire import Wire

FILE, ADAPTED_FILE = "protections_clipping.csv", "protections_adapted.csv"
CLIP, MULTIPLIER, CLIENTS = 1.0, 1.0, 3
COUNT_DEVIATION = 1.0  # of the noise on how many were clipped: the default of three clients' is refused
PLAIN = "FedAvg"
RECEIVED, PUBLISHED = "what the server receives", "what it publishes"
ADAPTED_ROUNDS = 10


class Case(NamedTuple):
    """One round."""

    protection: str
    victim: str
    seed: int


@dataclass(frozen=True)
class Row:
    """One attack: on the victim's reply, or on the next round's weights, as everybody gets them.

    ``norm`` is that of the weights' change, ``deviation`` of what the strategy added to the average in each weight.
    """

    protection: str
    victim: str
    seed: int
    view: str = ""
    norm: float | None = None
    deviation: float | None = None
    psnr: float | None = None
    predicted_psnr: float | None = None
    exact: bool | None = None
    attack: str = ""
    note: str = ""


@dataclass(frozen=True)
class Adapted:
    """The norm that adaptive clipping asks for, round by round, and how many of three it clipped."""

    round: int
    norm: float
    clipped: int
    largest: float  # change of a client, before clipping


def plain() -> FedAvg:
    return FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)


def fixed(kind: type[Strategy]) -> Callable[[], Strategy]:
    return lambda: kind(plain(), MULTIPLIER, CLIP, CLIENTS)  # type: ignore[call-arg]


def adaptive(kind: type[Strategy], multiplier: float = MULTIPLIER) -> Callable[[], Strategy]:
    deviation = COUNT_DEVIATION if multiplier else 0.0
    return lambda: kind(  # type: ignore[call-arg]
        plain(), multiplier, CLIENTS, initial_clipping_norm=CLIP, clipped_count_stddev=deviation
    )


#: The strategy of each protection, and the client's mods.
PROTECTIONS: dict[str, tuple[Callable[[], Strategy], list[Mod]]] = {
    PLAIN: (plain, []),
    "client-side fixed clipping": (fixed(DifferentialPrivacyClientSideFixedClipping), [fixedclipping_mod]),
    "client-side adaptive clipping": (
        adaptive(DifferentialPrivacyClientSideAdaptiveClipping),
        [adaptiveclipping_mod],
    ),
    "server-side fixed clipping": (fixed(DifferentialPrivacyServerSideFixedClipping), []),
    "server-side adaptive clipping": (adaptive(DifferentialPrivacyServerSideAdaptiveClipping), []),
}


def cases(quick: bool) -> Iterator[Case]:
    victims, seeds = (VICTIMS[:1], SEEDS[:1]) if quick else (VICTIMS, SEEDS)
    yield from (Case(name, victim, seed) for name in PROTECTIONS for victim in victims for seed in seeds)


def played(case: Case) -> tuple[State, list[State], State]:
    """The weights sent, the three replies with the victim's first, and the weights of the next round."""
    make, mods = PROTECTIONS[case.protection]
    before = model_of(case.seed).state_dict()
    wire = Wire([client_app(owner, mods) for owner in owners(case.victim)])
    first, told = ArrayRecord(before), config_of(RATE)
    result = wire.run(lambda grid: make().start(grid, first, 1, train_config=told), seed=case.seed)
    replies = {answered.metadata.src_node_id: answered.content["arrays"] for _, answered in wire.seen}
    return before, [replies[node].to_torch_state_dict() for node in sorted(replies)], result.arrays.to_torch_state_dict()


def measured(case: Case) -> Iterator[Row]:
    """What the server receives, and what it publishes."""
    model, owner = model_of(case.seed), owners(case.victim)[0]
    before, replies, after = played(case)
    added = sum(
        float((after[name].double() - sum(reply[name].double() for reply in clipped(before, replies, case)) / CLIENTS)
        .square().sum())
        for name in after
    )  # fmt: skip
    numbers = sum(value.numel() for value in after.values())
    for view, state in ((RECEIVED, replies[0]), (PUBLISHED, after)):
        update = update_of(before, state, model)
        norm, deviation = RATE * al.defenses.update_norm(update), (added / numbers) ** 0.5
        yield Row(*case, view, norm, deviation, **asdict(attacked(model, update, owner)))


def clipped(before: State, replies: list[State], case: Case) -> list[State]:
    """The replies as the strategy averages them: a server that clips does it now."""
    if not case.protection.startswith("server"):
        return replies
    found = []
    for reply in replies:
        change = {name: value.double() - before[name].double() for name, value in reply.items()}
        norm = sum(float(value.square().sum()) for value in change.values()) ** 0.5
        found.append({name: before[name].double() + min(1.0, CLIP / norm) * value for name, value in change.items()})
    return found


def adapting(_: tuple[int]) -> Iterator[Adapted]:
    """Client-side adaptive clipping without noise, round by round."""
    largest: list[float] = []

    def keep(asked: object, answered: object) -> tuple[float, int]:
        config, metrics = asked.content["config"], answered.content["metrics"]  # type: ignore[attr-defined]
        return float(config["clipping_norm"]), int(metrics["norm_bit"])

    class Measured(Owner):
        def trained(self, state: State, rate: float) -> dict[str, al.Tensor]:  # type: ignore[name-defined]
            after = super().trained(state, rate)
            largest.append(sum(float((after[n] - state[n]).double().square().sum()) for n in after) ** 0.5)
            return after

    everyone = [Measured(owner.victim, owner.label) for owner in owners(VICTIMS[0])]
    wire = Wire([client_app(owner, [adaptiveclipping_mod]) for owner in everyone], keep=keep)
    strategy = adaptive(DifferentialPrivacyClientSideAdaptiveClipping, 0.0)()
    first, told = ArrayRecord(model_of(0).state_dict()), config_of(RATE)
    wire.run(lambda grid: strategy.start(grid, first, ADAPTED_ROUNDS, train_config=told))
    for k in range(ADAPTED_ROUNDS):
        of_round = wire.seen[CLIENTS * k : CLIENTS * (k + 1)]
        size = max(largest[CLIENTS * k : CLIENTS * (k + 1)])
        yield Adapted(k + 1, of_round[0][0], sum(bit for _, bit in of_round), size)
