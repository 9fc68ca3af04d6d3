"""The index of a recording, ``recording.json``: which replies came in which round, and what did
not.

It may come from anybody. Each entry is checked before it is used; what makes no sense is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..update import MAX_BATCH, UpdateError

FORMAT = "aprillab-recording-1"
INDEX = "recording.json"
# An index is untrusted: a larger one (bytes) is not read, a larger round is no round, and of a name
# and of a fault's words no more characters are kept, so that a page can show them.
_MOST_BYTES, _MOST_ROUNDS, _LONGEST_NAME, _LONGEST_WORDS = 100_000_000, 1_000_000_000, 100, 2000


@dataclass(frozen=True)
class Fault:
    """What did not come, or cannot be used.

    Attributes
    ----------
    round : int
    client : str
        Its name; its node where it had none; empty where the whole recording is meant.
    words : str
    """

    round: int
    client: str
    words: str


@dataclass(frozen=True)
class Reply:
    """One client's reply in one round, as the index has it; the states are in files.

    Attributes
    ----------
    round : int
        Counted through the recording, from 1.
    server_round : int
        As the server counted: from 1 again, where it was started anew.
    client, node : str
        Its name, as it calls itself or else its node; and its node.
    sent, file : str
        Of the state that was sent, and of the one that came back.
    config : mapping
        What was sent along.
    said : mapping
        What the client says of its training, by the same keys, and ``name``.
    metrics : mapping
        What it says it measured, ``num-examples`` among it.
    """

    round: int
    server_round: int
    client: str
    node: str
    sent: str
    file: str
    config: Mapping[str, Any] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int | None:
        """Pictures behind the update, as the client says; None where it says nothing of use."""
        count = self.metrics.get("num-examples")
        if isinstance(count, bool) or not isinstance(count, int | float) or not 1 <= count <= MAX_BATCH:
            return None
        return int(count) if count == int(count) else None


class CutOff(UpdateError):
    """An index that is no JSON."""


def read_index(folder: Path) -> dict[str, list[Any]]:
    """The entries of ``recording.json``, of which nothing is believed yet.

    Raises
    ------
    CutOff
        If it is missing while files of a recording are there, or is no JSON.
    UpdateError
        If there is no recording, or it is of another format.
    """
    path = folder / INDEX
    if not path.is_file():
        if not any(folder.glob("round-*.safetensors")):
            raise UpdateError(f"{folder}: no recording ({INDEX} is missing)")
        raise CutOff(f"{path} is missing")
    if path.stat().st_size > _MOST_BYTES:
        raise UpdateError(f"{path}: {path.stat().st_size} bytes are no index of a recording")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise CutOff(f"{path} is cut off or no JSON ({error})") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        said = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise UpdateError(f"{path}: its format is {said!r}, and {FORMAT!r} is read here")
    lists = {name: index.get(name, []) for name in ("replies", "faults")}
    if stray := [name for name, entries in lists.items() if not isinstance(entries, list)]:
        raise UpdateError(f"{path}: {stray[0]!r} must be a list")
    return lists


def index_of_files(folder: Path) -> dict[str, list[Any]]:
    """The same from the entries that the files have in their metadata."""
    return {"replies": list(_entries(folder)), "faults": []}


def _entries(folder: Path) -> Iterator[Any]:
    for path in sorted(folder.glob("round-*.safetensors")):
        if not path.is_file():  # whoever opens a pipe waits
            continue
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("reply")
            if text is not None:
                yield json.loads(text)
        except Exception:  # cut off too: nothing is known of it, not even whose it was
            continue


def reply_of(entry: Any) -> Reply:
    """One entry of the index, checked.

    Raises
    ------
    UpdateError
        Naming what is missing or makes no sense.

    Examples
    --------
    >>> reply_of({"round": 1, "client": "a", "node": "7", "sent": "../x", "file": "y.safetensors"})
    Traceback (most recent call last):
    ...
    aprillab.update.tensors.UpdateError: 'sent' must be the name of a safetensors file in the folder, not '../x'
    """
    if not isinstance(entry, dict):
        raise UpdateError(f"a reply is an object, not {entry!r:.40}")
    number = _round_number(entry, "round")
    node = name_of(entry.get("node"))
    mappings = {name: entry.get(name, {}) for name in ("config", "said", "metrics")}
    for name, value in mappings.items():
        if not isinstance(value, dict):
            raise UpdateError(f"{name!r} must be an object, not {value!r:.40}")
    return Reply(
        number, _round_number(entry, "server_round", number), name_of(entry.get("client")) or node, node,
        _file_name(entry, "sent"), _file_name(entry, "file"), **mappings,
    )  # fmt: skip


def _round_number(entry: Mapping[str, Any], key: str, default: int | None = None) -> int:
    number = entry.get(key, default)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 < number <= _MOST_ROUNDS:
        raise UpdateError(f"{key!r} must be an integer from 1 up, not {number!r:.40}")
    return number


def _file_name(entry: Mapping[str, Any], key: str) -> str:
    name = entry.get(key)
    good = isinstance(name, str) and name.endswith(".safetensors") and not {"/", "\\", ":"} & set(name)
    if not (good and str(name).isprintable() and len(str(name)) <= _LONGEST_NAME):
        raise UpdateError(f"{key!r} must be the name of a safetensors file in the folder, not {name!r:.60}")
    return str(name)


def fault_of(entry: Any) -> Fault:
    """One entry of the index; what makes no sense in it is left out."""
    entry = entry if isinstance(entry, dict) else {}
    number = entry.get("round")
    words = entry.get("words")
    return Fault(
        number if isinstance(number, int) and not isinstance(number, bool) else 0,
        name_of(entry.get("client")), _printable(words)[:_LONGEST_WORDS] if isinstance(words, str) else "",
    )  # fmt: skip


def name_of(said: Any) -> str:
    """A client's name in one line of printable characters; empty where none is said.

    >>> name_of(" a\\x1b[31m b "), name_of(None)
    ('a[31m b', '')
    """
    if not isinstance(said, str):
        return ""
    return _printable(said)[:_LONGEST_NAME]


def _printable(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable()).strip()
