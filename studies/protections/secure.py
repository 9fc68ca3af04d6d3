"""SecAgg+: what of three updates is in their quantized sum, for whom, and what the protocol costs."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from flwr.app import Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.server import ServerConfig
from flwr.server.compat import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from torch import Tensor

import aprillab as al

from .._rows import fill, made, read
from .._runner import Claim, Description, between
from .._tables import grouped, markdown
from .clients import FIRST, SHAPE, VICTIMS, Owner, State, attacked, model_of, older_app, owners, rms
from .wire import FLOWER, Wire

FILE, COSTS_FILE = "protections_secure.csv", "protections_costs.csv"
CLIENTS, SHARES, THRESHOLD = 3, 3, 2
#: Flower's defaults.
CLIPPING_RANGE, QUANTIZATION_RANGE, MAX_WEIGHT = 8.0, 2**22, 1000.0
RATES, MAX_WEIGHTS = (0.01, 0.1, 1.0), (MAX_WEIGHT, 10.0, 1.0)
SUM, KNOWN, IDLE = "the sum", "the sum, the others known", "the sum, the others idle"
SECURE, PLAIN = "SecAgg+", "FedAvg"
#: How many are gone, and from which stage on.
GONE = {
    "": (0, ""), "one before the keys are shared": (1, Stage.SHARE_KEYS),
    "one after that": (1, Stage.COLLECT_MASKED_VECTORS), "two after that": (2, Stage.COLLECT_MASKED_VECTORS),
}  # fmt: skip
REPEATS = 3
OWN = 0.9  # correlation of a patch with a client's


class Case(NamedTuple):
    """One round, and one more in which the other two train on nothing."""

    max_weight: float
    rate: float
    victim: str


@dataclass(frozen=True)
class Row:
    """One attack on what the strategy was given.

    ``floor`` is the rms error of the average's weights, ``foretold`` what follows from the
    quantization, ``change`` the rms of the victim's change. Of the sum alone: ``labels``, how
    many of the clients' labels its head gives; ``own``, how many patches of the
    patch-embedding system's picture are one client's own; and ``chance``, the same for three
    pictures that are not in the sum.
    """

    max_weight: float
    rate: float
    victim: str
    view: str = ""
    floor: float | None = None
    foretold: float | None = None
    change: float | None = None
    psnr: float | None = None
    predicted_psnr: float | None = None
    exact: bool | None = None
    attack: str = ""
    labels: int | None = None
    own: int | None = None
    chance: int | None = None
    note: str = ""


class CostCase(NamedTuple):
    """One round, timed."""

    protocol: str
    gone: str
    repeat: int


@dataclass(frozen=True)
class Cost:
    """``summed`` is how many clients are in one piece of what the strategy gets, 0 where the
    protocol was halted; ``psnr`` the first client's picture from it, ``known`` where the others'
    updates are known.
    """

    protocol: str
    gone: str
    repeat: int
    summed: int | None = None
    messages: int | None = None
    megabytes_to: float | None = None
    megabytes_back: float | None = None
    seconds: float | None = None
    psnr: float | None = None
    known: float | None = None


def cases(quick: bool) -> Iterator[Case]:
    weights, rates, victims = (MAX_WEIGHTS[::2], RATES[1:2], VICTIMS[:1]) if quick else (MAX_WEIGHTS, RATES, VICTIMS)
    yield from (Case(weight, rate, victim) for weight in weights for rate in rates for victim in victims)


def cost_cases(quick: bool) -> Iterator[CostCase]:
    for repeat in range(1 if quick else REPEATS):
        yield CostCase(PLAIN, "", repeat)
        yield from (CostCase(SECURE, gone, repeat) for gone in GONE)


# --- One round in Flower's older interface ------------------------------------------------------------------------


class Keeping(FedAvg):
    """FedAvg that keeps what it is given: of each client its node, its number of pictures, weights."""

    def __init__(self, state: State, rate: float) -> None:
        first = ndarrays_to_parameters([tensor.numpy() for tensor in state.values()])
        super().__init__(
            fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=CLIENTS, min_available_clients=CLIENTS,
            initial_parameters=first, on_fit_config_fn=lambda _: {"learning-rate": rate},
        )  # fmt: skip
        self.given: list[tuple[int, int, dict[str, torch.Tensor]]] = []
        self.names = list(state)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        for proxy, reply in results:
            arrays = map(torch.as_tensor, parameters_to_ndarrays(reply.parameters))
            self.given.append((proxy.node_id, reply.num_examples, dict(zip(self.names, arrays, strict=True))))
        return super().aggregate_fit(server_round, results, failures)


@dataclass(frozen=True)
class Played:
    """One round: what the strategy was given, the messages, the seconds."""

    strategy: Keeping
    wire: Wire
    seconds: float


def play(
    everyone: list[Owner], rate: float, *, secure: bool = True, max_weight: float = MAX_WEIGHT, idle: bool = False,
    lost: Callable[[Message], bool] | None = None,
) -> Played:  # fmt: skip
    """One round of the owners; all but the first send back what they were sent, if ``idle``."""
    mods = [secaggplus_mod] if secure else []
    clients = [older_app(owner, mods, idle=idle and k > 0) for k, owner in enumerate(everyone)]
    wire = Wire(clients, lost=lost, keep=lambda asked, answered: None)
    strategy = Keeping(model_of(0).state_dict(), rate)
    protocol = SecAggPlusWorkflow(
        SHARES, THRESHOLD, max_weight=max_weight, clipping_range=CLIPPING_RANGE, quantization_range=QUANTIZATION_RANGE
    )
    workflow = DefaultWorkflow(fit_workflow=protocol if secure else None)
    context = LegacyContext(Context(1, 0, {}, RecordDict(), {}), ServerConfig(num_rounds=1), strategy)
    start = time.perf_counter()
    wire.run(lambda grid: workflow(grid, context))
    return Played(strategy, wire, time.perf_counter() - start)


def gone(who: str) -> Callable[[Message], bool]:
    """Whether the node that a message is for is gone by then; the last nodes go."""
    number, stage = GONE[who]
    leaving = range(FIRST + CLIENTS - number, FIRST + CLIENTS)
    left: set[int] = set()

    def lost(message: Message) -> bool:
        node, config = message.metadata.dst_node_id, message.content.config_records[RECORD_KEY_CONFIGS]
        if node in leaving and config[Key.STAGE] == stage:
            left.add(node)
        return node in left

    return lost


# --- What a server makes of it ------------------------------------------------------------------------------------


def foretold(max_weight: float) -> float:
    """The rms error of the average's weights of clients with one picture each: steps
    rounded at random.
    """
    step = 2 * CLIPPING_RANGE / QUANTIZATION_RANGE
    return step * math.sqrt(CLIENTS / 6) * max_weight / CLIENTS


def less(mean: State, others: list[State]) -> State:
    """The first client's weights, from the average and the others' own."""
    number = len(others) + 1
    return {name: number * value - sum(o[name].double() for o in others) for name, value in mean.items()}


def measured(case: Case) -> Iterator[Row]:
    """The sum as an honest server gets it, and with more knowledge."""
    model, everyone = model_of(0), owners(case.victim, CLIENTS)
    before = model.state_dict()
    own = [owner.trained(before, case.rate) for owner in everyone]
    true = {name: sum(state[name].double() for state in own) / CLIENTS for name in before}
    mean = play(everyone, case.rate, max_weight=case.max_weight).strategy.given[0][2]
    idle = play(everyone, case.rate, max_weight=case.max_weight, idle=True).strategy.given[0][2]
    facts = {"floor": rms(mean, true), "foretold": foretold(case.max_weight), "change": rms(own[0], before)}
    for view, state in ((SUM, mean), (KNOWN, less(mean, own[1:])), (IDLE, idle)):
        update = al.update_from_states(before, state, learning_rate=case.rate, trained=model)
        more = of_sum(model, update, everyone) if view == SUM else {}
        yield Row(*case, view, **facts, **more, **asdict(attacked(model, update, everyone[0])))


def of_sum(model: al.VisionTransformer, update: al.ClientUpdate, everyone: list[Owner]) -> dict[str, int]:
    """What the sum says of all its clients together."""
    picture = al.embedding_closed_form(model, update, verify=False, strict=False).pixels[0]
    absent = owners(everyone[0].victim, 2 * len(everyone))[len(everyone) :]
    return {
        "labels": right_labels(model, update, everyone), "own": own_patches(picture, everyone),
        "chance": own_patches(picture, absent),
    }  # fmt: skip


def own_patches(picture: Tensor, everyone: list[Owner]) -> int:
    """How many patches of the picture correlate with one owner's, in the same place, by more than
    0.9.
    """
    patches = centred_patches(picture)
    likeness = torch.stack([(patches * centred_patches(owner.pixels()[0])).sum(1) for owner in everyone])
    return int((likeness.max(0).values > OWN).sum())


def centred_patches(picture: Tensor) -> Tensor:
    """The patches in rows, each less its mean and of norm 1."""
    size = SHAPE["patch_size"]
    tiles = picture.double().unfold(1, size, size).unfold(2, size, size)  # (3, rows, columns, size, size)
    patches = tiles.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    patches = patches - patches.mean(1, keepdim=True)
    return patches / patches.norm(dim=1, keepdim=True).clamp_min(1e-12)


def right_labels(model: al.VisionTransformer, update: al.ClientUpdate, everyone: list[Owner]) -> int:
    """How many of the owners' labels are read off the sum, which is a batch of one picture each."""
    try:
        found = al.recover_labels(model, update, batch_size=len(everyone)).labels.tolist()
    except al.AttackNotApplicable:
        return 0
    return len({owner.label for owner in everyone} & set(found))


def timed(case: CostCase) -> Iterator[Cost]:
    """One round at a learning rate of 0.1, quantized as fine as three pictures allow."""
    model, everyone, rate = model_of(0), owners(VICTIMS[0], CLIENTS), 0.1
    before = model.state_dict()
    secure = case.protocol == SECURE
    played = play(everyone, rate, secure=secure, max_weight=1.0, lost=gone(case.gone) if secure else None)
    given, wire = played.strategy.given, played.wire
    facts: dict[str, Any] = {
        "summed": len(given) if secure else min(len(given), 1), "messages": wire.messages,
        "megabytes_to": wire.bytes_to / 1e6, "megabytes_back": wire.bytes_back / 1e6, "seconds": played.seconds,
    }  # fmt: skip
    if given:
        first = next(state for node, _, state in given if node == FIRST)
        others = [owner.trained(before, rate) for owner in everyone[1 : len(given)]]
        for name, state in (("psnr", first), *([("known", less(first, others))] if secure else [])):
            update = al.update_from_states(before, state, learning_rate=rate, trained=model)
            facts[name] = attacked(model, update, everyone[0]).psnr
    yield Cost(*case, **facts)


def measure(folder: Path, options: argparse.Namespace) -> None:
    settings = FLOWER | {"clients": CLIENTS, "shares": SHARES, "threshold": THRESHOLD}
    fill(folder / FILE, Row, cases(options.quick), measured, key=Case._fields, settings=settings)
    fill(folder / COSTS_FILE, Cost, cost_cases(options.quick), timed, key=CostCase._fields, settings=settings)


# --- Its share of the page ----------------------------------------------------------------------------------------


def by_quantization(group: pd.DataFrame) -> dict[str, str]:
    """The cells of one max_weight and learning rate."""
    of_view = {view: group[group["view"] == view] for view in (SUM, KNOWN, IDLE)}
    return {
        "error / change": f"{(group.floor / group.change).median():.2g}",
        **{f"{view}, dB": f"{rows.psnr.median():.1f}" for view, rows in of_view.items()},
        "predicted": f"{of_view[KNOWN].predicted_psnr.median():.1f}",
        "labels": f"{of_view[SUM].labels.min():.0f} of {CLIENTS}",
        "patches of one's own": f"{of_view[SUM].own.min():.0f} to {of_view[SUM].own.max():.0f}",
    }  # fmt: skip


def by_cost(group: pd.DataFrame) -> dict[str, str]:
    done, summed = group.psnr.notna().any(), int(group.summed.iloc[0])
    return {
        "the server gets": "nothing: halted" if not done else f"a sum of {summed}" if summed > 1 else "each update",
        "messages": f"{group.messages.iloc[0]}", "MB to clients": f"{group.megabytes_to.median():.1f}",
        "MB back": f"{group.megabytes_back.median():.1f}", "seconds": f"{group.seconds.median():.1f}",
        "dB": f"{group.psnr.median():.1f}" if done else "–",
        "the others known, dB": f"{group.known.median():.1f}" if group.known.notna().any() else "–",
    }  # fmt: skip


def describe(folder: Path, options: argparse.Namespace) -> Description:
    """What is seen in the sum, and what the protocol costs."""
    fields, claims = _described_sums(read(folder / FILE, Row))
    more, claimed = _described_costs(read(folder / COSTS_FILE, Cost))
    return {"secure_made": made(folder / FILE), **fields, **more}, [*claims, *claimed]


def _described_sums(rows: pd.DataFrame) -> Description:
    of_view = {view: rows[rows["view"] == view] for view in (SUM, KNOWN, IDLE)}
    known, idle = (of_view[view].groupby(["max_weight", "rate"]).psnr.median() for view in (KNOWN, IDLE))
    at_default, at_finest = (float(known.get((weight, 0.1), math.nan)) for weight in (MAX_WEIGHT, 1.0))
    texts = rows.assign(**{name: rows[name].map("{:g}".format) for name in ("max_weight", "rate")})
    off, most, chance = (
        (rows.floor / rows.foretold - 1).abs().median(),
        of_view[SUM].psnr.max(),
        of_view[SUM].chance.max(),
    )
    several = of_view[SUM].note.str.startswith("one image fails")
    own = of_view[SUM][of_view[SUM].rate >= RATES[1]].own
    fields = {
        "secure": markdown(grouped(texts, ("max_weight", "rate"), by_quantization)), "sum_highest": most,
        "several": several.sum(), "sums": len(several), "known_default": at_default,
        "known_fine": at_finest, "floor_off": 100 * off, "own_least": own.min(),
        "own_most": own.max(), "chance_most": chance,
    }  # fmt: skip
    return fields, [
        between("at most {sum_highest:.0f} dB from the sum of three", most, most=14),
        between("{own_least:.0f} to {own_most:.0f} of the 16 patches are one client's own", own.min(), 1.5),
        Claim("none is called exact", of_view[SUM].exact.sum(), not of_view[SUM].exact.eq(True).any()),
        between("at most {chance_most:.0f} of three pictures", chance, most=1.5),
        between("{known_default:.0f} dB at Flower's default", at_default, 12, 25),
        between("and {known_fine:.0f} at max_weight = 1", at_finest, 60),
        between("all three labels at every setting", of_view[SUM].labels.min(), CLIENTS - 0.5),
        between("The same within 3 dB", (known - idle).abs().max(), most=3),
        between("to {floor_off:.0f} %", off, most=0.05),
    ]


def _described_costs(costs: pd.DataFrame) -> Description:
    whole = costs[costs.gone == ""].groupby("protocol")[["messages", "megabytes_back", "seconds"]].median()
    ratio, late = whole.loc[SECURE] / whole.loc[PLAIN], costs[costs.gone == "one after that"]
    fields = {
        "costs": markdown(grouped(costs, ("protocol", "gone"), by_cost)), "message_ratio": ratio.messages,
        "byte_ratio": ratio.megabytes_back, "second_ratio": ratio.seconds, "two_known": late.known.median(),
        "two_sum": late.psnr.median(),
    }  # fmt: skip
    early = costs[costs.gone == "one before the keys are shared"]
    return fields, [
        between("{message_ratio:.0f} times the messages", ratio.messages, 3.9, 4.1),
        between("and halts", early.summed.max(), most=0.5),
        between("the sum of two, {two_sum:.0f} dB", late.psnr.median(), most=15),
        between("{two_known:.0f} dB where the other's update is known", late.known.median(), 50),
    ]
