"""Flower without its network: every client in this process. Needs Flower, and nothing of Ray.

For Windows, for Colab, and for tests. Strategy, messages and ClientApp are the real ones; what is
missing is the processes and what lies between them.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

_RAISED = 2  # Flower's code for a ClientApp that raised


def run_nearby(
    server: ServerApp,
    client: ClientApp,
    nodes: Sequence[Mapping[str, Any]],
    run_config: Mapping[str, Any] | None = None,
) -> None:
    """Run an app's two sides in this process, as ``flwr run`` would in several.

    A strategy that wants more nodes than there are waits without end, as Flower's do
    (FedAvg wants two).

    Parameters
    ----------
    server, client : the app's
    nodes : sequence of mappings
        The configuration of each node, such as ``{"partition-id": 0, "num-partitions": 2}``.
    run_config : mapping, optional
        What ``[tool.flwr.app.config]`` and ``--run-config`` say otherwise.
    """
    grid = NearbyGrid(client, nodes, run_config)
    with _as_task():
        server(grid, Context(1, 0, {}, RecordDict(), dict(run_config or {})))


@contextmanager
def _as_task() -> Iterator[None]:
    """Messages name the task that makes them, which Flower sets once a process."""
    before = vars(TaskIdentity).copy()
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
    try:
        yield
    finally:
        for name in ("_task_id", "_run_id", "_node_id"):
            setattr(TaskIdentity, name, before[name])


class NearbyGrid(Grid):
    """A grid whose nodes are calls of a ClientApp.

    Parameters
    ----------
    client : flwr.clientapp.ClientApp
    nodes, run_config : as of :func:`run_nearby`
    """

    def __init__(
        self, client: ClientApp, nodes: Sequence[Mapping[str, Any]], run_config: Mapping[str, Any] | None = None
    ) -> None:
        self.client = client
        self._run: Any = None
        self._contexts = {
            node: Context(1, node, dict(config), RecordDict(), dict(run_config or {}))
            for node, config in enumerate(nodes, 1)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Keep the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """What was set; None before."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message, as Flower makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """1, 2, … for the nodes in their order."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let each node answer at once; its reply waits to be pulled."""
        numbers = []
        for message in messages:
            number = str(len(self._replies) + 1)
            message.metadata.__dict__["_message_id"] = number  # as Flower's own grids do
            self._replies[number] = self._answer(message)
            numbers.append(number)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies, each once."""
        return [self._replies.pop(number) for number in message_ids if number in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The nodes answer one after another; those whose turn would come after ``timeout`` seconds do
        not."""
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        replies = []
        for message in messages:
            if time.monotonic() < end:
                replies += self.pull_messages(self.push_messages([message]))
        return replies

    def _answer(self, message: Message) -> Message:
        """The node's reply, or the error that Flower would send in its place."""
        delivered = copy.deepcopy(message)  # what a client does to it stays with the client
        try:
            return self.client(delivered, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # a client's code may raise anything; a network would not bring it here
            logging.getLogger("flwr").error("node %s: %r", message.metadata.dst_node_id, error)
            return Message(Error(code=_RAISED, reason=f"{type(error).__name__}: {error}"), reply_to=message)
