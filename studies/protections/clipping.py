"""Flower's clipping strategies, on either side: what the server has before it adds noise."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from flwr.app import ArrayRecord, Message
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from torch import Tensor

import aprillab as al

from .._rows import fill, made, read
from .._runner import Description, between
from .._tables import grouped, markdown
from .clients import (
    RATE,
    SEEDS,
    VICTIMS,
    Mod,
    Owner,
    State,
    attacked,
    client_app,
    config_of,
    distance,
    model_of,
    owners,
    rms,
)
from .noise import update_of
from .wire import FLOWER, Wire

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

    ``norm`` is that of the weights' change, ``deviation`` of what the strategy added to the
    average in each weight.
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
    """The weights sent, the three replies with the victim's first, and the weights of the next
    round.
    """
    make, mods = PROTECTIONS[case.protection]
    before = model_of(case.seed).state_dict()
    wire = Wire([client_app(owner, mods) for owner in owners(case.victim)])
    first, told = ArrayRecord(before), config_of(RATE)
    result = wire.run(lambda grid: make().start(grid, first, 1, train_config=told), seed=case.seed)
    replies = {answered.metadata.src_node_id: answered.content["arrays"] for _, answered in wire.seen}
    states = [replies[node].to_torch_state_dict() for node in sorted(replies)]
    return before, states, result.arrays.to_torch_state_dict()


def measured(case: Case) -> Iterator[Row]:
    """What the server receives, and what it publishes."""
    model, owner = model_of(case.seed), owners(case.victim)[0]
    before, replies, after = played(case)
    averaged = clipped(before, replies, case)
    deviation = rms(after, {name: sum(reply[name].double() for reply in averaged) / CLIENTS for name in after})
    for view, state in ((RECEIVED, replies[0]), (PUBLISHED, after)):
        update = update_of(before, state, model)
        norm = RATE * al.defenses.update_norm(update)
        yield Row(*case, view, norm, deviation, **asdict(attacked(model, update, owner)))


def clipped(before: State, replies: list[State], case: Case) -> list[State]:
    """The replies as the strategy averages them: a server that clips does it now."""
    if not case.protection.startswith("server"):
        return replies
    found = []
    for reply in replies:
        change = {name: value.double() - before[name].double() for name, value in reply.items()}
        norm = distance(reply, before)
        found.append({name: before[name].double() + min(1.0, CLIP / norm) * value for name, value in change.items()})
    return found


def adapting(_: object = None) -> Iterator[Adapted]:
    """Client-side adaptive clipping without noise, round by round."""
    largest: list[float] = []

    def keep(asked: Message, answered: Message) -> tuple[float, int]:
        config, metrics = asked.content["config"], answered.content["metrics"]
        return float(config["clipping_norm"]), int(metrics["norm_bit"])

    class Measured(Owner):
        def trained(self, state: State, rate: float) -> dict[str, Tensor]:
            after = super().trained(state, rate)
            largest.append(distance(after, state))
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


def measure(folder: Path, options: argparse.Namespace) -> None:
    settings = FLOWER | {"clipping_norm": CLIP, "noise_multiplier": MULTIPLIER, "clients": CLIENTS}
    fill(folder / FILE, Row, cases(options.quick), measured, key=Case._fields, settings=settings)
    fill(folder / ADAPTED_FILE, Adapted, [()], adapting, key=(), settings=FLOWER)


# --- Its share of the page ----------------------------------------------------------------------------------------


def by_view(group: pd.DataFrame) -> dict[str, str]:
    return {
        "norm of the change": f"{group.norm.median():.2f}", "median dB": f"{group.psnr.median():.1f}",
        "least": f"{group.psnr.min():.1f}", "most": f"{group.psnr.max():.1f}",
        "predicted": f"{group.predicted_psnr.median():.1f}",
        "exact": f"{group.exact.eq(True).sum()} of {len(group)}",
    }  # fmt: skip


def describe(folder: Path, options: argparse.Namespace) -> Description:
    """The table, and how adaptive clipping moves its norm."""
    rows, adapted = read(folder / FILE, Row), read(folder / ADAPTED_FILE, Adapted)
    received, published = rows[rows["view"] == RECEIVED], rows[rows["view"] == PUBLISHED]
    by_server = received[received.protection.str.startswith("server")]
    by_client = received[received.protection.str.startswith("client")]
    noised = published[published.protection != PLAIN]
    steps = adapted.assign(later=adapted.norm.shift(-1) / adapted.norm).dropna()
    unclipped, all_clipped = steps[steps.clipped == 0], steps[steps.clipped == CLIENTS]
    table = adapted.assign(**{name: adapted[name].map("{:.2f}".format) for name in ("norm", "largest")})
    fields = {
        "clipping_made": made(folder / FILE), "clipping": markdown(grouped(rows, ("protection", "view"), by_view)),
        "adapted": markdown(table, ["round", "norm asked for", "clipped, of 3", "largest change"]),
        "clipped_least": by_client.psnr.min(), "noised_most": noised.psnr.max(),
        "sum_most": published[published.protection == PLAIN].psnr.max(), "norm_last": adapted.norm.iloc[-1],
        "change_last": adapted.largest.iloc[-1], "server_norm": by_server.norm.min(),
    }  # fmt: skip
    return fields, [
        between("at {clipped_least:.0f} dB or more", by_client.psnr.min(), 100),
        between("the server has the change as the client made it", by_server.norm.min(), 2 * CLIP),
        between("gives {noised_most:.0f} dB at most", noised.psnr.max(), most=12),
        between("{sum_most:.0f} dB at most, for it is a mixture of three", published.psnr.max(), most=15),
        between("lowers the norm where all are clipped", all_clipped.later.max(), most=1),
        between("raises it where nobody is", unclipped.later.min(), 1),
    ]
