"""An update as a file: safetensors, from which nothing can be executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .record import FACTS, FORMAT, ClientUpdate
from .tensors import UpdateError

_ERROR = "error of "  # in front of a parameter's name, which has no space


def save_update(update: ClientUpdate, path: str | Path) -> None:
    """Write an update as safetensors: tensors and a few strings, nothing that could be executed.

    The entries' errors, where the update has them, go along under the parameters' names with
    ``error of`` in front.

    Raises
    ------
    UpdateError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile, torch, aprillab as al
    >>> update = al.ClientUpdate({"weight": torch.tensor([0.5])}, local_steps=5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     al.save_update(update, f"{folder}/update.safetensors")
    ...     al.load_update(f"{folder}/update.safetensors").local_steps
    5
    """
    # For one image some gradients are views of one another (class token, position embedding): write
    # copies.
    every = {**update.gradients, **{_ERROR + name: error for name, error in (update.errors or {}).items()}}
    tensors = {name: g.detach().cpu().clone(memory_format=torch.contiguous_format) for name, g in every.items()}
    try:
        save_file(tensors, str(path), metadata={"format": FORMAT, "update": json.dumps(update.facts())})
    except (OSError, SafetensorError) as error:
        raise UpdateError(f"{path}: cannot be written ({error})") from error


def load_update(path: str | Path) -> ClientUpdate:
    """Read an update written by :func:`save_update`, or any safetensors file of gradients by
    parameter name.

    Nothing is unpickled: a file made by ``torch.save`` is refused. The attacks bring the result to
    the model (:func:`fitted`): names with ``module.`` or ``_orig_mod.`` in front are fine.

    Raises
    ------
    UpdateError
        If the file is missing, a pickle, truncated, foreign, or says something that makes no sense
        or contradicts itself.

    Examples
    --------
    >>> import tempfile
    >>> import torch, aprillab as al
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     al.save_update(al.ClientUpdate({"weight": torch.tensor([0.5])}), f"{folder}/update.safetensors")
    ...     al.load_update(f"{folder}/update.safetensors").gradients["weight"]
    tensor([0.5000])
    """
    path = Path(path)
    tensors, metadata = _read(path, "Write updates with aprillab.save_update or safetensors.torch.save_file.")
    facts = _read_facts(path, metadata)
    known = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_ERROR)}
    errors = {name.removeprefix(_ERROR): tensor for name, tensor in known.items()} or None
    try:
        gradients = ClientUpdate(tensors, errors=errors).gradients
    except UpdateError as error:
        raise UpdateError(f"{path}: {error}") from error
    try:
        return ClientUpdate(gradients, errors=errors, **facts)
    except UpdateError as error:
        raise UpdateError(f"{path}: metadata {error}") from error


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Read the weights that were sent in a round, a safetensors file of tensors by name, for
    :class:`~aprillab.Round`.

    Raises
    ------
    UpdateError
        If the file is missing, a pickle, truncated or empty.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"weight": torch.tensor([0.5])}, f"{folder}/state.safetensors")
    ...     load_state(f"{folder}/state.safetensors")
    {'weight': tensor([0.5000])}
    """
    return _read(Path(path), "Write states with safetensors.torch.save_file(model.state_dict(), path).")[0]


def _read(path: Path, remedy: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata of a safetensors file."""
    if not path.is_file():
        raise UpdateError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # what safetensors and torch raise depends on the file and on their versions
        if _looks_like_pickle(path):
            raise UpdateError(f"{path}: a pickle (torch.save), which could run code when read. {remedy}") from error
        raise UpdateError(f"{path}: not a readable safetensors file, or cut off ({error})") from error
    if not tensors:
        raise UpdateError(f"{path}: holds no tensor")
    return tensors, metadata


def _looks_like_pickle(path: Path) -> bool:
    """Whether a file that is no safetensors begins like torch.save's, old or new: for the message
    only.

    Not asked first: a safetensors file begins with a length, which may look like anything.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError:
        return False
    return magic == b"PK\x03\x04" or magic[:1] == b"\x80"


def _read_facts(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The update's facts as the file has them; :class:`ClientUpdate` checks each, for they come
    from the client too. What is not known here is passed over.
    """
    try:
        said = dict(json.loads(metadata.get("update", "{}")).items())
    except (ValueError, AttributeError, RecursionError) as error:  # not JSON, no object, nested without end
        raise UpdateError(f"{path}: its metadata is not an aprillab update's ({error})") from error
    if isinstance(said.get("withheld"), str):
        raise UpdateError(f"{path}: metadata 'withheld' must be a list of names, not {said['withheld']!r}")
    labels, images = said.get("labels"), said.get("batch_size")
    if isinstance(labels, list) and images is not None and len(labels) != images:
        raise UpdateError(
            f"{path}: metadata 'batch_size' is {images!r} and there are {len(labels)} 'labels': correct one of them"
        )
    return {name: said[name] for name in FACTS if name in said}
