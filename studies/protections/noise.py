"""LocalDpMod: what its noise leaves of one picture, over ε and over rounds, and what its ε is
worth.
"""

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
    FIRST,
    RATE,
    SEEDS,
    VICTIMS,
    Attacked,
    Owner,
    State,
    attacked,
    client_app,
    config_of,
    model_of,
    owners,
    verdict,
)  # fmt: skip
from .wire import FLOWER, Wire

FILE, ROUNDS_FILE = "protections_noise.csv", "protections_rounds.csv"
CLIP = 1.0  # norm of the weights' change, and the sensitivity that the mod is told
DELTA = 1e-5
NONE = math.inf  # in the place of ε: no mod
EPSILONS = (NONE, 1e8, 1e7, 1e6, 1e5, 1e4, 1e3, 100.0, 10.0, 1.0)
CLIPS, ROUNDS_EPSILONS, ROUNDS = (1.0, 0.1), (1e5, 1e4), (1, 4, 16)
_NOISE_SEED = 100


class Case(NamedTuple):
    """One client, one round."""

    epsilon: float
    victim: str
    seed: int


@dataclass(frozen=True)
class Row:
    """One reply attacked.

    ``deviation`` is of the noise in each weight, ``sigma`` the same over the clipping norm;
    ``norm`` the change's before it is clipped. ``exact_epsilon`` is the noise's by the exact
    condition at δ = 1e-5, for a client more or less, ``replaced`` for one update in the place of
    another. ``ours`` is the PSNR where the same noise is put on the clipped gradient by
    :func:`aprillab.defenses.gaussian_noise`; ``seeded`` that of a server that knows the seed of
    the client's numpy.
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
    """One client whose picture stays, and whose change is clipped to ``clip``, which is
    the sensitivity too.
    """

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
    """LocalDpMod's at sensitivity 1, by its own formula: the classical Gaussian mechanism,
    proved for ε below 1.
    """
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
    """The reply less the noise that numpy's global generator gives from the client's seed,
    in the mod's order.
    """
    source, deviation = np.random.RandomState(_NOISE_SEED + case.seed), CLIP * deviation_of(case.epsilon)
    return {
        name: value.double() - torch.from_numpy(source.normal(0, deviation, tuple(value.shape))).to(value.dtype)
        for name, value in after.items()
    }


def worth(claimed: float, *, replaced: bool = False) -> float:
    """The exact ε at δ = 1e-5 of the noise that LocalDpMod takes for ``claimed``."""
    return epsilon_of(deviation_of(claimed) / (2 if replaced else 1), 1, DELTA)


def honest_up_to() -> float:
    """The ε from which on LocalDpMod claims less than the exact mechanism has (one
    client more or less).
    """
    return float(brentq(lambda claimed: worth(claimed) - claimed, 1.0, 100.0))


# --- Several rounds -----------------------------------------------------------------------------------------------


def rounds_of(case: Repeated, number: int) -> list[al.Round]:
    """The victim's replies to Flower's FedAvg; two other clients, with the mod too, move the
    weights in between.
    """
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
    """The patch-embedding system over all rounds; without a replay, since most tensors are not
    kept.
    """
    result = al.embedding_closed_form(model, list(rounds), verify=False, strict=False)
    psnr = float(al.psnr(result.pixels[0], owner.pixels()[0].double()))
    return Attacked(psnr, result.predicted_psnr, result.exact)


def measure(folder: Path, options: argparse.Namespace) -> None:
    settings = FLOWER | {"sensitivity": "the clipping norm", "delta": DELTA, "learning_rate": RATE}
    fill(folder / FILE, Row, cases(options.quick), measured, key=Case._fields, settings=settings)
    again = repeated(options.quick)
    fill(folder / ROUNDS_FILE, RoundsRow, again, over_rounds, key=Repeated._fields, settings=settings)


# --- Its share of the page ----------------------------------------------------------------------------------------


def by_epsilon(group: pd.DataFrame) -> dict[str, str]:
    """The table's cells for one ε."""
    first, told = group.iloc[0], group.epsilon.iloc[0] != NONE
    return {
        "σ": f"{first.sigma:.2g}" if told else "–",
        "ε, exact": f"{first.exact_epsilon:.3g}" if told else "–",
        "one for another": f"{first.replaced:.3g}" if told else "–",
        "median dB": f"{group.psnr.median():.1f}", "least": f"{group.psnr.min():.1f}",
        "most": f"{group.psnr.max():.1f}", "predicted": f"{group.predicted_psnr.median():.1f}",
        "exact": f"{group.exact.eq(True).sum()} of {len(group)}",
        "our noise": f"{group.ours.median():.1f}" if told else "–",
        "seed known": f"{group.seeded.median():.1f}" if told else "–",
    }  # fmt: skip


def by_rounds(group: pd.DataFrame) -> dict[str, str]:
    return {
        "median dB": f"{group.psnr.median():.1f}", "one round, σ/√T": f"{group.promised.median():.1f}",
        "predicted": f"{group.predicted_psnr.median():.1f}", "ε together, exact": f"{group.together.iloc[0]:.3g}",
    }  # fmt: skip


def describe(folder: Path, options: argparse.Namespace) -> Description:
    """The tables of one round and of several, and what is said of them."""
    rows, rounds = read(folder / FILE, Row), read(folder / ROUNDS_FILE, RoundsRow)
    medians, noisy = rows.groupby("epsilon").psnr.median(), rows[rows.epsilon != NONE]
    at = {epsilon: float(medians.get(epsilon, math.nan)) for epsilon in EPSILONS}
    ours = (noisy.groupby("epsilon").psnr.median() - noisy.groupby("epsilon").ours.median()).abs().max()
    table = grouped(rows.assign(told=rows.epsilon.map("{:g}".format).replace("inf", "none")), ["told"], by_epsilon)
    again = rounds.assign(**{name: rounds[name].map("{:g}".format) for name in ("clip", "epsilon")})
    several, claims = _described_rounds(rounds)
    fields = {
        "noise_made": made(folder / FILE), "noise": markdown(table.rename(columns={"told": "ε told"})),
        "rounds": markdown(grouped(again, ("clip", "epsilon", "rounds"), by_rounds)),
        "db_million": at[1e6], "db_hundred": at[1e5], "db_ten": at[1e4],
        "db_rest": rows[rows.epsilon <= 1e3].psnr.max(), "db_none": at[NONE], "ours_off": ours,
        "too_high": (rows.predicted_psnr - rows.psnr).max(), "seeded_one": noisy[noisy.epsilon == 1].seeded.min(),
        "honest": honest_up_to(), "worth_ten": worth(10), "worth_hundred": worth(100), "worth_million": worth(1e6),
        "worth_one": worth(1), "worth_replaced": worth(1, replaced=True), "sigma_thousand": deviation_of(1e3),
        "sigma_ten": deviation_of(1e4),
    }  # fmt: skip
    wrong = rows[rows.exact.eq(True) & ~(rows.psnr >= al.EXACT_TO_8_BITS_DB)]
    return fields | several, [
        between("at ε = 10⁶ the picture comes back at {db_million:.0f} dB", at[1e6], 40),
        between("at 10⁵ at {db_hundred:.0f}", at[1e5], 22),
        between("at 10⁴ at {db_ten:.0f}", at[1e4], 12, 18),
        between("no more than {db_rest:.0f} dB: spots on grey", rows[rows.epsilon <= 1e3].psnr.max(), most=12),
        between("less than 2 dB from it in the median", ours, most=2),
        between("never more than 3 dB too high", (rows.predicted_psnr - rows.psnr).max(), most=3),
        between("at least {seeded_one:.0f} dB at ε = 1", noisy[noisy.epsilon == 1].seeded.min(), 60),
        between("Above {honest:.1f} it claims less than the exact mechanism has", worth(10) - 10, 0),
        between("It is {worth_replaced:.1f} at ε = 1", worth(1, replaced=True), 1),
        Claim("None of these was called exact below 58.9 dB", len(wrong), wrong.empty),
        *claims,
    ]  # fmt: skip


def _described_rounds(rounds: pd.DataFrame) -> Description:
    """Whether rounds undo the noise."""
    most = max(rounds.rounds)
    medians = rounds.groupby(["clip", "epsilon", "rounds"]).psnr.median().unstack()
    promised = rounds[rounds.rounds == most].groupby(["clip", "epsilon"]).promised.median()
    four, later, behind = medians[4] - medians[1], medians[most] - medians[4], promised - medians[most]
    fields = {
        "gain_least": four.min(), "gain_most": four.max(), "later_most": later.max(), "behind_least": behind.min(),
        "behind_most": behind.max(),
    }  # fmt: skip
    return fields, [
        between("Four rounds gain {gain_least:.0f} to {gain_most:.0f} dB", four.min(), 1),
        between("sixteen at most {later_most:.0f} more than four", later.max(), most=4),
        between("{behind_least:.0f} to {behind_most:.0f} dB less than averaging", behind.min(), 0),
    ]
