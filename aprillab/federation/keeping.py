"""Writing a recording: each round as it ends, so that a run that is killed leaves what it had.

Safetensors and one JSON file, each written beside its place and moved there, so that a reader finds
the old or the new and never half of one.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..update import UpdateError
from ..update.tensors import as_tensor, count_not_finite
from ..version import __version__
from .index import FORMAT, INDEX, CutOff, Fault, Reply, fault_of, read_index, reply_of

Shapes = dict[str, tuple[int, ...]]
_OF_ROUND = re.compile(r"round-(\d{1,9})-")


class Recorder:
    """Keeps rounds in a folder. A folder that has a recording goes on with it.

    Parameters
    ----------
    folder : str or Path
        Made if it is not there.

    Attributes
    ----------
    folder : Path, absolute
    round : int
        The round that is being kept, counted through the recording; 0 before the first.

    Raises
    ------
    UpdateError
        If the folder cannot be written, or its recording is cut off.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.round = 0
        self._replies: list[dict[str, Any]] = []
        self._faults: list[dict[str, Any]] = []
        self._shapes: dict[str, Shapes] = {}  # of the states that were sent in this round
        self._earlier: Shapes | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._go_on()
            self._write_index()
        except CutOff as error:
            raise UpdateError(f"{error}: it can be read, but not gone on with. Name another folder") from error
        except OSError as error:
            raise UpdateError(f"{self.folder}: cannot be written ({error.strerror or error})") from error

    def _go_on(self) -> None:
        """Take up the recording that is in the folder, if there is one."""
        if not (self.folder / INDEX).exists() and not any(self.folder.glob("round-*.safetensors")):
            return
        index = read_index(self.folder)
        self._replies, self._faults = index["replies"], index["faults"]
        known = [reply_of(entry) for entry in self._replies]
        numbers = [fault_of(entry).round for entry in self._faults]
        files = [int(found[1]) for path in self.folder.iterdir() if (found := _OF_ROUND.match(path.name))]
        self.round = max([0, *(reply.round for reply in known), *numbers, *files])
        if known:
            self._earlier = shapes_in(self.folder / known[-1].sent)

    # --- One round -----------------------------------------------------------------------------------------------

    def open_round(self) -> int:
        """Begin the next round; returns its number."""
        self.round += 1
        self._shapes = {}
        return self.round

    def keep_sent(self, state: Mapping[str, Any]) -> str:
        """Write a state that is sent in this round; returns its file's name.

        Raises
        ------
        UpdateError
            If it is not of the model whose recording is in the folder.
        """
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        if self._earlier is not None and self._earlier != shapes:
            raise UpdateError(
                f"{self.folder} holds the recording of another model ({_first_difference(self._earlier, shapes)}): "
                "name another folder"
            )
        self._earlier = shapes
        number = len(self._shapes) + 1
        name = f"round-{self.round:04d}-sent{f'-{number}' if number > 1 else ''}.safetensors"
        self._write(name, state, {})
        self._shapes[name] = shapes
        return name

    def keep_reply(self, reply: Reply, state: Mapping[str, Any]) -> str:
        """Write what came back. Where it cannot be used it is kept all the same, and a fault is
        noted; returns its words.
        """
        tensors = {name: as_tensor(name, value) for name, value in state.items()}
        entry = json_of(asdict(reply))
        words = _not_of_the_model(tensors, self._shapes.get(reply.sent, {}))
        self._write(reply.file, tensors, {} if words else {"reply": json.dumps(entry)})
        if words:
            self.keep_fault(reply.client, f"{words} (kept as {reply.file})")
        else:
            self._replies.append(entry)
        return words

    def keep_fault(self, client: str, words: str) -> None:
        """Note what went wrong with a client in this round."""
        self._faults.append(json_of(asdict(Fault(self.round, client, words))))

    def close_round(self) -> None:
        """Write the index."""
        self._write_index()
        self._shapes = {}

    # --- Files ---------------------------------------------------------------------------------------------------

    def _write(self, name: str, state: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        # Copies: tensors that share memory are refused by safetensors.
        tensors = {key: as_tensor(key, value).cpu().contiguous().clone() for key, value in state.items()}
        part = self.folder / f"{name}.part"
        save_file(tensors, str(part), metadata={"format": FORMAT, **metadata})
        os.replace(part, self.folder / name)

    def _write_index(self) -> None:
        index = {"format": FORMAT, "aprillab": __version__, "replies": self._replies, "faults": self._faults}
        part = self.folder / f"{INDEX}.part"
        part.write_text(json.dumps(index, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.chmod(0o600)  # as safetensors writes: this is of private pictures
        os.replace(part, self.folder / INDEX)


def shapes_in(path: Path) -> Shapes | None:
    """Names and shapes in a safetensors file, without its numbers; None where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception:  # what safetensors raises depends on the file and on its version
        return None


def _first_difference(known: Shapes, given: Shapes) -> str:
    """The first tensor that one has and the other has not, or in another shape."""
    for name in (*known, *given):
        if known.get(name) != given.get(name):
            one, other = (str(shapes.get(name, "none")) for shapes in (known, given))
            return f"{name}: {one} there, {other} here"
    return ""


def _not_of_the_model(state: Mapping[str, Tensor], sent: Shapes) -> str:
    """What is wrong with a state that came back; empty where nothing is."""
    if lost := [name for name in sent if name not in state]:
        return f"{len(lost)} of {len(sent)} tensors are missing, {lost[0]!r} first"
    if strange := [name for name in state if name not in sent]:
        return f"{len(strange)} tensors were never sent, {strange[0]!r} first"
    for name, tensor in state.items():
        if tuple(tensor.shape) != sent[name]:
            return f"{name} has shape {tuple(tensor.shape)}, and was sent with {sent[name]}"
        if tensor.is_floating_point() and (bad := count_not_finite(tensor)):
            return f"{bad} of {tensor.numel()} numbers of {name} are NaN or infinite"
    return ""


def json_of(value: Any) -> Any:
    """The same in JSON's types: NaN and infinities as None, bytes and what else it does
    not know left out.

    >>> json_of({"loss": math.nan, "key": b"secret", "rates": (0.1, 1)})
    {'loss': None, 'rates': [0.1, 1]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        plain = bool | int | float | str | list | tuple | Mapping | None
        return {str(key): json_of(entry) for key, entry in value.items() if isinstance(entry, plain)}
    if isinstance(value, list | tuple):
        return [json_of(entry) for entry in value]
    return value
