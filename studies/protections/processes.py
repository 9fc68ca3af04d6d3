"""The same round by real processes on this machine: how long each exchange of messages takes,
and what takes it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from flwr.app import Context, Message
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.server import ServerConfig
from flwr.server.compat import LegacyContext
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp

from aprillab.federation.processes import run_federation
from aprillab.federation.running import write_app

from .._rows import fill, made, read
from .._runner import Description
from .clients import VICTIMS, model_of, older_client, owners
from .secure import CLIENTS, PLAIN, SECURE, SHARES, THRESHOLD, Keeping
from .wire import FLOWER

FILE = "protections_processes.csv"
TIMEOUT = 400.0  # seconds
RATE = 0.1


class Case(NamedTuple):
    """A run of one round."""

    protocol: str


@dataclass(frozen=True)
class Row:
    """One exchange: ``seconds`` from the first message to the last answer; ``number`` counts from
    1.
    """

    protocol: str
    number: int
    seconds: float
    whole: float  # of the run, with the start of all processes


def server_app() -> ServerApp:
    """One round, each exchange timed into the file that the run's configuration names."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < CLIENTS:
            time.sleep(0.2)
        seconds: list[float] = []
        exchange = grid.send_and_receive

        def timed(messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            start = time.perf_counter()
            answers = list(exchange(messages, timeout=timeout))
            seconds.append(time.perf_counter() - start)
            return answers

        grid.send_and_receive = timed  # type: ignore[method-assign]
        secure = context.run_config["protocol"] == SECURE
        workflow = DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(SHARES, THRESHOLD) if secure else None)
        strategy = Keeping(model_of(0).state_dict(), RATE)
        workflow(grid, LegacyContext(context, ServerConfig(num_rounds=1), strategy))
        Path(str(context.run_config["seconds"])).write_text(json.dumps(seconds), encoding="utf-8")

    return app


def client_app(*, secure: bool) -> ClientApp:
    """The client whose number is its node's."""

    def client(context: Context) -> Any:
        return older_client(owners(VICTIMS[0], CLIENTS)[int(context.node_config["number"])])

    return ClientApp(client_fn=client, mods=[secaggplus_mod] if secure else [])


def measured(case: Case) -> Iterator[Row]:
    """One run."""
    secure = case.protocol == SECURE
    with tempfile.TemporaryDirectory() as folder:
        app, kept = Path(folder, "app"), Path(folder, "seconds.json")
        app.mkdir()
        here = "from studies.protections import processes\n\napp = processes."
        sides = {"server": f"{here}server_app()\n", "client": f"{here}client_app(secure={secure})\n"}
        write_app(app, {"protocol": "", "seconds": ""}, **sides)
        whole = run_federation(
            app, [{"number": k} for k in range(CLIENTS)], log=Path(folder, "log.txt"), timeout=TIMEOUT,
            run_config={"protocol": case.protocol, "seconds": str(kept)},
        )  # fmt: skip
        for number, seconds in enumerate(json.loads(kept.read_text(encoding="utf-8")), 1):
            yield Row(case.protocol, number, seconds, whole)


def measure(folder: Path, options: argparse.Namespace) -> None:
    fill(folder / FILE, Row, [Case(PLAIN), Case(SECURE)], measured, key=Case._fields, settings=FLOWER)


# --- Its share of the page ----------------------------------------------------------------------------------------


def describe(folder: Path, options: argparse.Namespace) -> Description:
    """The seconds of the exchanges; nothing where they were not measured."""
    rows = read(folder / FILE, Row) if (folder / FILE).is_file() else pd.DataFrame()
    if rows.empty:
        return {"processes": "Not measured here."}, []
    said = "; ".join(
        f"{name} {', '.join(f'{seconds:.0f}' for seconds in group.seconds)}"
        for name, group in rows.groupby("protocol")
    )
    return {
        "processes": f"Seconds of each exchange, on two busy cores: {said}. Measured with {made(folder / FILE)}."
    }, []
