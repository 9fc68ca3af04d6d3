"""A server that follows its strategy to the letter, and keeps what it sends and what comes back.

Needs Flower. Nothing of what clients can see changes: the inner strategy samples, configures and
aggregates; messages and replies pass through this one on their way and are written to disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from safetensors import SafetensorError

from ..update import Round, UpdateError
from .index import Reply, name_of
from .keeping import Recorder
from .local import LocalTraining
from .recording import Recording, read_recording

_LOG = logging.getLogger("flwr")  # so that it stands among Flower's own lines


@dataclass(frozen=True)
class _Sent:
    """A message of this round: its metadata, the file of its state (empty: not kept),
    its configuration.
    """

    metadata: Any
    file: str
    config: Mapping[str, Any]


class CuriousServer(Strategy):
    """Any strategy of Flower's, watched.

    Strategies that wrap others (differential privacy) are given as a whole: what is kept is what
    crosses the network. A strategy with a ``start`` of its own runs that one; attributes that are
    not found here are the strategy's, to be read and to be set.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy
        FedAvg, FedProx, FedAdam, FedMedian, …, or one's own.
    folder : str or Path
        Of the recording; made if need be, and gone on with if there is one of the same model. A
        relative one is in the folder of the process that runs the ServerApp.
    how : LocalTraining or mapping, optional
        How the clients train. Otherwise it is read from the configuration that is sent
        (``learning-rate`` or ``lr``, ``local-steps``, ``momentum``, …:
        :meth:`LocalTraining.from_config`) and from the clients' replies; a mapping completes that.
    on_update : callable, optional
        (Reply, Round) of each reply that can be used, once the round is on disk and before the
        strategy aggregates it.

    Raises
    ------
    UpdateError
        If ``strategy`` is none of today's interface, or the folder cannot be written.
    """

    def __init__(
        self,
        strategy: Strategy,
        folder: str | Path,
        *,
        how: LocalTraining | Mapping[str, Any] | None = None,
        on_update: Callable[[Reply, Round], None] | None = None,
    ) -> None:
        if not all(callable(getattr(strategy, name, None)) for name in _WATCHED):
            raise UpdateError(
                f"CuriousServer wraps a strategy of flwr.serverapp.strategy, and {type(strategy).__name__} has no "
                f"{' or '.join(_WATCHED)}; those of flwr.server.strategy are of Flower's older interface"
            )
        self.strategy = strategy
        self.how, self.on_update = how, on_update
        self._recorder = Recorder(folder)
        self._sent: list[_Sent] = []
        self._names: dict[int, str] = {}  # of nodes, as their clients call themselves
        # Bound now: while the strategy's own start runs, these names lead here.
        self._configure, self._aggregate = strategy.configure_train, strategy.aggregate_train
        _LOG.info("curious server: recording to %s", self._recorder.folder)

    def __getattr__(self, name: str) -> Any:
        if name == "strategy":  # not yet set: copying, unpickling
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name.startswith("_") or name in ("strategy", "how", "on_update")
        (object.__setattr__ if own else setattr)(self if own else self.strategy, name, value)

    @property
    def recording(self) -> Recording:
        """What is on disk by now."""
        return read_recording(self._recorder.folder, how=self.how)

    # --- The strategy, to the letter ------------------------------------------------------------------------------

    def start(self, *args: Any, **kwargs: Any) -> Any:
        """Run the strategy's own ``start``, watched."""
        with self._watching():
            return self.strategy.start(*args, **kwargs)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """While it lasts, the strategy's two methods are ours, which call its own."""
        own = vars(self.strategy)
        before = {name: own[name] for name in _WATCHED if name in own}
        own.update({name: getattr(self, name) for name in _WATCHED})
        try:
            yield
        finally:
            for name in _WATCHED:
                own.pop(name, None)
            own.update(before)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the strategy sends, kept."""
        messages = list(self._configure(server_round, arrays, config, grid))
        # A client that comes back is another node: its name is free once the old one is gone.
        present = set(grid.get_node_ids())
        self._names = {node: name for node, name in self._names.items() if node in present}
        self._recorder.open_round()
        self._sent, files = [], dict[int, str]()
        for message in messages:
            state = _state_in(message.content, self._array_key)
            if state is None:
                _LOG.warning("curious server: a message without arrays is not kept")
                continue
            # Most strategies send all clients the same object.
            if id(state) not in files:
                files[id(state)] = self._keep_sent(state)
            config_sent = dict(next(iter(message.content.config_records.values()), {}))
            self._sent.append(_Sent(message.metadata, files[id(state)], config_sent))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Keep the replies, and let the strategy aggregate them."""
        replies = list(replies)
        self._keep(server_round, replies)
        return self._aggregate(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The strategy's."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """The strategy's."""
        self.strategy.summary()

    # --- What is kept ---------------------------------------------------------------------------------------------

    @property
    def _array_key(self) -> str:
        return str(getattr(self.strategy, "arrayrecord_key", "arrays"))

    def _keep_sent(self, state: ArrayRecord) -> str:
        """The file of a state that is sent; empty where it cannot be written."""
        try:
            return self._recorder.keep_sent(_arrays(state))
        except (OSError, SafetensorError) as error:
            _LOG.warning("curious server: what is sent cannot be kept (%s)", error)
            return ""

    def _keep(self, server_round: int, replies: list[Message]) -> None:
        """Write the round. A disk that is full costs the recording, not the federation."""
        open_still = list(self._sent)
        kept: list[Reply] = []
        for number, message in enumerate(replies, 1):
            sent = _answered(message, open_still)
            if sent is not None:
                open_still.remove(sent)
            try:
                kept += self._keep_reply(server_round, number, message, sent, {reply.client for reply in kept})
            except (OSError, SafetensorError, UpdateError) as error:
                self._fault(message.metadata.src_node_id, f"its reply could not be kept ({error})")
        for sent in open_still:
            self._fault(sent.metadata.dst_node_id, "sent no reply before the round ended")
        self._sent = []
        try:
            self._recorder.close_round()
        except OSError as error:
            _LOG.warning("curious server: round %s is not written (%s)", server_round, error)
        _LOG.info("curious server: round %s, kept %s of %s replies", server_round, len(kept), len(replies))
        self._hand_over(kept)

    def _keep_reply(
        self, server_round: int, number: int, message: Message, sent: _Sent | None, taken: set[str]
    ) -> list[Reply]:
        """The reply, if it can be used."""
        node = message.metadata.src_node_id
        if message.has_error():
            reason = (message.error.reason or "").strip().splitlines() or ["no reason given"]
            self._fault(node, f"failed (code {message.error.code}: {reason[-1]})")
            return []
        state = _state_in(message.content, self._array_key)
        if sent is None or state is None:
            self._fault(node, "replied without arrays" if sent else "replied, and was not asked")
            return []
        if not sent.file:
            self._fault(node, "replied, and what it was sent is not kept")
            return []
        said = {k: v for k, v in next(iter(message.content.config_records.values()), {}).items() if _plain(v)}
        self._names[node] = self._name(node, name_of(said.get("name")) or str(node), taken)
        metrics = dict(next(iter(message.content.metric_records.values()), {}))
        reply = Reply(
            self._recorder.round, server_round, self._names[node], str(node), sent.file,
            f"round-{self._recorder.round:04d}-reply-{number}.safetensors", sent.config, said, metrics,
        )  # fmt: skip
        try:
            words = self._recorder.keep_reply(reply, _arrays(state))
        except (TypeError, ValueError) as error:  # of numpy, on bytes that are no array
            words = f"its arrays cannot be read ({error})"
            self._recorder.keep_fault(reply.client, words)
        if words:
            _LOG.warning("curious server: %s: %s", reply.client, words)
        return [] if words else [reply]

    def _name(self, node: int, said: str, taken: Collection[str]) -> str:
        """What this node is called: as it says, if that is no other's name, nor taken in this
        round.
        """
        taken = {*taken, *(name for other, name in self._names.items() if other != node)}
        short = said[:60]  # an index has a hundred letters
        others = chain([f"{short} ({node})"], (f"{short} ({node}, {number})" for number in count(2)))
        return next(name for name in chain([said], others) if name not in taken)

    def _fault(self, node: int, words: str) -> None:
        name = self._names.get(node, str(node))
        _LOG.warning("curious server: %s %s", name, words)
        self._recorder.keep_fault(name, words)

    def _hand_over(self, kept: list[Reply]) -> None:
        if self.on_update is None:
            return
        recording = self.recording
        for reply in kept:
            try:
                round = recording.round_of(reply)
            except UpdateError as error:
                _LOG.warning("curious server: %s", error)
            else:
                self.on_update(reply, round)


_WATCHED = ("configure_train", "aggregate_train")


def _state_in(content: RecordDict, key: str) -> ArrayRecord | None:
    """The model's arrays: those under the strategy's key, or else the first."""
    records = content.array_records
    return records[key] if key in records else next(iter(records.values()), None)


def _arrays(state: ArrayRecord) -> dict[str, Any]:
    return {name: array.numpy() for name, array in state.items()}


def _answered(reply: Message, sent: list[_Sent]) -> _Sent | None:
    """Which of the messages it replies to: by the message's number, or else by the node."""
    number, node = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
    by_number = [one for one in sent if number and one.metadata.message_id == number]
    by_node = [one for one in sent if one.metadata.dst_node_id == node]
    return next(iter(by_number or by_node), None)


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)
