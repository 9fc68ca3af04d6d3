"""What a curious server kept, read back: per client and round the model that was sent, and the
update.

A recording is a folder: ``recording.json``, and safetensors files with a state each, written by
:class:`~aprillab.federation.keeping.Recorder`. Whoever gets one from elsewhere need not trust it:
nothing in it is executed, names of files stay within the folder, and what is cut off or contradicts
itself becomes a :class:`Fault` while the rest stays readable.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..data.folders import data_folder
from ..update import Round, UpdateError, load_state
from .index import INDEX, CutOff, Fault, Reply, fault_of, index_of_files, read_index, reply_of
from .local import LocalTraining, update_of

_RATES = ("learning-rate", "lr")


@dataclass(frozen=True)
class Recording:
    """What a curious server kept.

    Attributes
    ----------
    folder : Path
    replies : tuple of Reply
        Those that can be used, round by round.
    faults : tuple of Fault
        Everything else: clients that failed, sent nothing or nonsense, files that are cut off.
    how : LocalTraining or mapping, optional
        How the clients trained, in the place of what was sent; a mapping, by the configuration's
        keys, completes and corrects that.
    """

    folder: Path
    replies: tuple[Reply, ...]
    faults: tuple[Fault, ...] = ()
    how: LocalTraining | Mapping[str, Any] | None = None

    @property
    def clients(self) -> tuple[str, ...]:
        """Their names, in the order of the alphabet."""
        return tuple(sorted({reply.client for reply in self.replies}))

    @property
    def rounds(self) -> tuple[int, ...]:
        """Numbers of the rounds that have a reply."""
        return tuple(sorted({reply.round for reply in self.replies}))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is not known of the clients' training, and what that means."""
        found = []
        if lost := self._untold(_RATES):
            found.append(
                f"no learning rate was sent to {lost}: taken for 1, which leaves the update right up to one factor. "
                "The closed forms do not mind, nor does a replay of one step"
            )
        if lost := self._untold(("local-steps",)):
            found.append(
                f"how many local steps {lost} took was not sent: taken for one. After several a picture may be "
                "right though a replay of one step misses, and is not called exact then"
            )
        if found:
            found.append(
                "say what you know of it, for example how={'learning-rate': 0.1, 'local-steps': 5, 'momentum': 0.9}; "
                "on the command line --training learning-rate=0.1 --training local-steps=5 --training momentum=0.9"
            )
        return tuple(found)

    def _untold(self, keys: Collection[str]) -> str:
        """The clients of whose training none of these is known, for people."""
        if isinstance(self.how, LocalTraining) or set(keys) & _named(self.how or {}).keys():
            return ""
        told = {
            name: all(any(key in _told(r) for key in keys) for r in self.replies_of(name)) for name in self.clients
        }
        return ", ".join(name for name, known in told.items() if not known)

    def replies_of(self, client: str) -> tuple[Reply, ...]:
        """The replies of one client, in order.

        Raises
        ------
        UpdateError
            If it has none that can be used; with what went wrong, if that is known.
        """
        found = tuple(reply for reply in self.replies if reply.client == client)
        if not found:
            why = "; ".join(f"round {f.round}: {f.words}" for f in self.faults if f.client == client)
            known = ", ".join(self.clients) or "none"
            raise UpdateError(f"{self.folder}: no reply of {client!r} can be used ({why or f'clients are {known}'})")
        return found

    def how_of(self, reply: Reply) -> LocalTraining:
        """How the client trained: as it was said here, or as it says, or as it was told.

        Where nobody says a learning rate, it is 1.

        Raises
        ------
        UpdateError
            If a number makes no sense.
        """
        if isinstance(self.how, LocalTraining):
            return self.how
        return LocalTraining.from_config({"learning-rate": 1.0, **_told(reply), **_named(self.how or {})})

    def state_of(self, reply: Reply) -> dict[str, Any]:
        """The state that was sent to this client in this round."""
        return load_state(self.folder / reply.sent)

    def round_of(self, reply: Reply) -> Round:
        """The state that was sent, and the update that came back.

        Raises
        ------
        UpdateError
            If a file is cut off or the two do not belong together: with client and round.
        """
        try:
            before, after = self.state_of(reply), load_state(self.folder / reply.file)
            return Round(before, update_of(before, after, self.how_of(reply), batch_size=reply.images))
        except UpdateError as error:
            raise UpdateError(f"{reply.client}, round {reply.round}: {error}") from error

    def of_client(self, client: str, rounds: Collection[int] | None = None) -> list[Round]:
        """What one client sent, round by round; all rounds by default.

        Raises
        ------
        UpdateError
            If it has no such rounds, or one cannot be used: ``rounds`` leaves it out.

        Examples
        --------
        >>> recording = example_recording()
        >>> [round.update.local_steps for round in recording.of_client(recording.clients[0], rounds=(1, 2))]
        [1, 1]
        """
        replies = [reply for reply in self.replies_of(client) if rounds is None or reply.round in rounds]
        if not replies:
            known = ", ".join(str(reply.round) for reply in self.replies_of(client))
            raise UpdateError(f"{self.folder}: {client!r} has no reply in these rounds; it has in {known}")
        return [self.round_of(reply) for reply in replies]


def _told(reply: Reply) -> dict[str, Any]:
    """The client's configuration; what the client itself says of a thing counts."""
    return _named(reply.config) | _named(reply.said)


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the learning rate under one name."""
    rate = [config[key] for key in _RATES if key in config][:1]
    named = {key: value for key, value in config.items() if key not in _RATES}
    return named | dict(zip(_RATES, rate, strict=False))


def example_recording() -> Recording:
    """The recording that comes along: three clients, three rounds of a small ViT at 32×32, by real
    processes; ``federation.log`` in its folder is what these printed.

    Made by ``tools/record_federation.py``.

    Examples
    --------
    >>> len(example_recording().clients)
    3
    """
    return read_recording(Path(str(data_folder("federation", INDEX))))


def read_recording(folder: str | Path, *, how: LocalTraining | Mapping[str, Any] | None = None) -> Recording:
    """Read what a curious server kept. The states stay on disk until a round is asked for.

    An index that is cut off is made again from what each file says of itself, as far as that goes.

    Parameters
    ----------
    folder : str or Path
    how : LocalTraining or mapping, optional
        How the clients trained: a LocalTraining in the place of what was sent, or a mapping that
        completes and corrects it, such as ``{"local-steps": 5, "momentum": 0.9}``.

    Raises
    ------
    UpdateError
        If there is no recording in the folder, or one of another format.

    Examples
    --------
    >>> read_recording("nowhere")
    Traceback (most recent call last):
    ...
    aprillab.update.tensors.UpdateError: nowhere: no such folder
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UpdateError(f"{folder}: no such folder")
    faults: list[Fault] = []
    try:
        index = read_index(folder)
    except CutOff as error:
        index = index_of_files(folder)
        faults.append(Fault(0, "", f"{error}: read from what each of the files says of itself"))
    bare = Recording(folder, (), how=how)
    replies = []
    for entry in index["replies"]:
        try:
            reply = reply_of(entry)
        except UpdateError as error:
            faults.append(Fault(0, "", f"{folder / INDEX}: {error}"))
            continue
        if words := _unusable(bare, reply):
            faults.append(Fault(reply.round, reply.client, words))
        else:
            replies.append(reply)
    faults += [fault_of(entry) for entry in index["faults"]]
    replies.sort(key=lambda reply: (reply.round, reply.client))
    return Recording(folder, tuple(replies), tuple(sorted(faults, key=lambda f: (f.round, f.client))), how)


def _unusable(recording: Recording, reply: Reply) -> str:
    """What speaks against a reply that the index has; empty where nothing does."""
    try:
        recording.how_of(reply)
    except UpdateError as error:
        return f"what is said of its training makes no sense: {error}"
    for file in (reply.sent, reply.file):
        if not (recording.folder / file).is_file():  # whoever opens a pipe waits
            return f"{recording.folder / file} is missing"
        try:
            with safe_open(recording.folder / file, framework="pt") as opened:
                opened.keys()
        except Exception as error:  # what safetensors raises depends on the file and on its version
            return f"{recording.folder / file} is cut off or foreign ({error})"
    return ""
