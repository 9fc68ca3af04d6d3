"""What a curious server kept, read back: per client and round the model that was sent, and the update.

A recording is a folder: ``recording.json``, and safetensors files with a state each, written by
:class:`~aprillab.federation.keeping.Recorder`. Whoever gets one from elsewhere need not trust it:
nothing in it is executed, names of files stay within the folder, and what is cut off or contradicts
itself becomes a :class:`Fault` while the rest stays readable.
"""

from __future__ import annotations

from collections.abc import Collection
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
    how : LocalTraining, optional
        How the clients trained, in the place of what the configuration says.
    """

    folder: Path
    replies: tuple[Reply, ...]
    faults: tuple[Fault, ...] = ()
    how: LocalTraining | None = None

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
        lost = [name for name in self.clients if any(not self._rate_known(r) for r in self.replies_of(name))]
        if not lost:
            return ()
        return (
            f"no learning rate was sent to {', '.join(lost)}: taken for 1 and one local step, which leaves the "
            "update right up to one factor. The closed forms do not mind, nor does a replay of one step; several "
            "steps cannot be replayed, nor another optimizer or weight decay undone: say them, as "
            "how=LocalTraining(learning_rate=0.1, steps=5), on the command line --training learning-rate=0.1",
        )

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
        if self.how is not None:
            return self.how
        return LocalTraining.from_config({"learning-rate": 1.0, **_told(reply)})

    def _rate_known(self, reply: Reply) -> bool:
        return self.how is not None or any(key in _told(reply) for key in _RATES)

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
    told = dict(reply.config)
    if any(key in reply.said for key in _RATES):
        told = {key: value for key, value in told.items() if key not in _RATES}
    return told | {key: value for key, value in reply.said.items() if key != "name"}


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


def read_recording(folder: str | Path, *, how: LocalTraining | None = None) -> Recording:
    """Read what a curious server kept. The states stay on disk until a round is asked for.

    An index that is cut off is made again from what each file says of itself, as far as that goes.

    Parameters
    ----------
    folder : str or Path
    how : LocalTraining, optional
        How the clients trained, where the configuration does not say it, or not rightly. Nothing is
        read from the configuration then.

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
        try:
            with safe_open(recording.folder / file, framework="pt") as opened:
                opened.keys()
        except Exception as error:  # what safetensors raises depends on the file and on its version
            lost = "is missing" if not (recording.folder / file).exists() else f"is cut off or foreign ({error})"
            return f"{recording.folder / file} {lost}"
    return ""
