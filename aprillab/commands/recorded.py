"""What a curious server recorded, audited: each client in each round, and its rounds together."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..audit.findings import Audit
from ..audit.page import Source
from ..audit.report import json_safe, write_audit
from ..audit.run import audit
from ..federation import LocalTraining, Recording, Reply
from ..federation.local import KEYS
from ..update import Round, UpdateError, Updates, state_of_round
from .messages import CommandError, note


@dataclass(frozen=True)
class Audited:
    """One audit, and where it is written.

    Attributes
    ----------
    client : str
    rounds : tuple of int
        One, or all that were read together.
    found : Audit
    folder : Path
    """

    client: str
    rounds: tuple[int, ...]
    found: Audit
    folder: Path

    @property
    def words(self) -> str:
        """Which rounds, for people."""
        return f"round {self.rounds[0]}" if len(self.rounds) == 1 else "rounds together"


def audit_replies(
    recording: Recording,
    model: nn.Module,
    out: Path,
    *,
    clients: Collection[str] = (),
    rounds: Collection[int] = (),
    options: Mapping[str, Any] | None = None,
    source: Source | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[Audited]:
    """Audit each reply by itself, and where none of a client's is exact, all of them together.

    What cannot be used is noted on stderr, and the others go on.

    Parameters
    ----------
    recording : Recording
    model : nn.Module
        Its weights become those that were sent, round by round.
    out : Path
        Gets a folder for each client, and in it one for each audit.
    clients, rounds : default is all
    options : mapping, optional
        Of :func:`~aprillab.audit.run.audit`.
    source : Source, optional
    progress : callable, optional
        Is given each step of each audit, in words.

    Raises
    ------
    CommandError
        If there is no such client or round.
    """
    if unknown := [name for name in clients if name not in recording.clients]:
        known = ", ".join(recording.clients) or "none"
        raise CommandError(f"no reply of a client {unknown[0]!r} can be used; those of these can: {known}")
    if unknown := [str(number) for number in rounds if number not in recording.rounds]:
        raise CommandError(
            f"no reply in round {unknown[0]} can be used; in {', '.join(map(str, recording.rounds))} some can"
        )
    places = folders_of(recording.clients)
    for client in recording.clients:
        if not clients or client in clients:
            replies = [r for r in recording.replies_of(client) if not rounds or r.round in rounds]
            place = out / places[client]
            yield from _of_client(recording, model, replies, place, options or {}, source, progress)


def _of_client(
    recording: Recording, model: nn.Module, replies: list[Reply], place: Path, options: Mapping[str, Any],
    source: Source | None, progress: Callable[[str], None] | None,
) -> Iterator[Audited]:  # fmt: skip
    read: dict[int, Round] = {}
    exact = False

    def audited(update: Updates, name: str) -> Audit:
        steps = None if progress is None else lambda words: progress(f"{name}: {words}")
        found = audit(model, update, progress=steps, **options)
        return replace(found, rounds=len(replies), recording=True)

    for reply in replies:
        try:
            one = recording.round_of(reply)
            weights_of(model, reply.round, one)
            found = audited(one.update, f"{reply.client}, round {reply.round}")
        except UpdateError as error:
            note(f"left out: {error}")
            continue
        read[reply.round] = one
        exact = exact or found.leak == "exact"
        folder = place / f"round-{reply.round}"
        write_audit(found, folder, source=source)
        yield Audited(reply.client, (reply.round,), found, folder)
    if len(read) > 1 and not exact:
        try:
            found = audited(list(read.values()), f"{replies[0].client}, rounds together")
        except UpdateError as error:
            note(f"{replies[0].client}: its rounds are not read together: {error}")
            return
        write_audit(found, place / "together", source=source)
        yield Audited(replies[0].client, tuple(read), found, place / "together")


def weights_of(model: nn.Module, number: int, round: Round) -> None:
    """Give the model the weights that were sent in this round.

    Raises
    ------
    UpdateError
        If they are of another model.
    """
    model.load_state_dict(state_of_round(number, round, model.state_dict()), strict=False)


def folders_of(clients: Collection[str]) -> dict[str, str]:
    """A folder's name for each client, whatever it calls itself.

    >>> folders_of(["../a b", "client-1", "..", "client_1"])
    {'../a b': 'a_b', 'client-1': 'client-1', '..': 'client', 'client_1': 'client_1'}
    """
    found: dict[str, str] = {}
    for client in clients:
        name = re.sub(r"[^A-Za-z0-9-]+", "_", client).strip("_") or "client"
        taken = {one.lower() for one in found.values()}  # some file systems do not tell A from a
        number = 1
        while (unique := name if number == 1 else f"{name}-{number}").lower() in taken:
            number += 1
        found[client] = unique
    return found


def training_of(pairs: Collection[tuple[str, Any]]) -> dict[str, Any]:
    """What ``--training`` says.

    Raises
    ------
    CommandError
        If a key is not known, or a value makes no sense.
    """
    found = dict(pairs)
    if unknown := [key for key in found if key not in (*KEYS.values(), "lr", "beta1", "beta2")]:
        raise CommandError(f"--training {unknown[0]}: no such key; there are {', '.join(KEYS.values())}")
    try:
        LocalTraining.from_config(found)
    except UpdateError as error:
        raise CommandError(f"--training: {error}") from error
    return found


def write_summary(audited: Collection[Audited], recording: Recording, out: Path) -> None:
    """``recording.json`` of the audits: what leaked of whom in which round, and what could not be read."""
    summary = {
        "format": "aprillab-recording-audit-1",
        "recording": str(recording.folder),
        "audits": [
            {
                "client": one.client, "rounds": one.rounds, "leak": one.found.leak, "verdict": one.found.verdict,
                "report": str((one.folder / "report.md").relative_to(out)),
            }
            for one in audited
        ],
        "faults": [vars(fault) for fault in recording.faults],
        "remarks": recording.remarks,
    }  # fmt: skip
    text = json.dumps(json_safe(summary), indent=2, ensure_ascii=False)
    out.mkdir(parents=True, exist_ok=True)  # not yet there, if nothing could be audited
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
