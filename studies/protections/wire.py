"""Flower's ServerApp side and ClientApps in one process, and all that passes between them.

The messages are Flower's, the mods and strategies too; only the network is missing. What a server
has of its clients is what :class:`Wire` keeps.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from aprillab.federation import run_nearby

FLOWER = {"flwr": version("flwr")}  # among what the numbers depend on


def both(asked: Message, answered: Message) -> Any:
    """All that passed."""
    return asked, answered


@dataclass
class Wire:
    """Clients, and what passes between them and the server. The nodes are 1, 2, …, the
    victim's the first.

    Attributes
    ----------
    clients : sequence of ClientApp
    lost : callable, optional
        From a message to whether its node is gone by then, and does not answer.
    keep : callable
        From a message and its answer to what is kept of them.
    seen : list
        What was kept, in order; nothing of those that were not answered.
    messages, bytes_to, bytes_back : int
        Messages both ways, and the bytes of their records to the clients and from them.
    """

    clients: Sequence[ClientApp]
    lost: Callable[[Message], bool] | None = None
    keep: Callable[[Message, Message], Any] = both
    seen: list[Any] = field(default_factory=list)
    messages: int = 0
    bytes_to: int = 0
    bytes_back: int = 0

    def run(self, server: Callable[[Grid], Any], *, seed: int = 0) -> Any:
        """What ``server`` returns, given the grid; Flower draws its noise from this seed."""
        found = []

        def main(grid: Grid, _: Context) -> None:
            grid.set_run(Run.create_empty(run_id=1))
            found.append(server(grid))

        with quiet(seed):
            run_nearby(main, self, [{}] * len(self.clients))  # type: ignore[arg-type]
        return found[0]

    def __call__(self, asked: Message, context: Context) -> Message:
        """The node's answer, as a ClientApp gives it."""
        self.messages, self.bytes_to = self.messages + 1, self.bytes_to + bytes_of(asked)
        if self.lost is not None and self.lost(asked):
            raise ConnectionError("gone")
        kept = copy.deepcopy(asked)  # mods write into it
        answered = self.clients[asked.metadata.dst_node_id - 1](asked, context)
        self.messages, self.bytes_back = self.messages + 1, self.bytes_back + bytes_of(answered)
        # The server may write into the answer, too, as server-side clipping does.
        self.seen.append(self.keep(kept, copy.deepcopy(answered)))
        return answered


def bytes_of(message: Message) -> int:
    """Bytes of a message's records."""
    if not message.has_content():
        return 0
    records = message.content
    # ConfigRecord.count_bytes does not take an empty list, which SecAgg+ sends where nobody is
    # gone.
    small = [*records.config_records.values(), *records.metric_records.values()]
    arrays = sum(record.count_bytes() for record in records.array_records.values())
    return arrays + sum(len(record.deflate()) for record in small)


@contextmanager
def quiet(seed: int) -> Iterator[None]:
    """Flower's log off, and the global generators at ``seed``: it draws noise and rounding from
    numpy's, and the clients' order from Python's.
    """
    logger, before, order = logging.getLogger("flwr"), np.random.get_state(), random.getstate()  # noqa: NPY002
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        logger.setLevel(level)
        np.random.set_state(before)  # noqa: NPY002
        random.setstate(order)
