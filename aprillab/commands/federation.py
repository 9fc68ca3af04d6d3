"""``aprillab federation``: a real federation on this machine, and what its server makes of it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from .. import viz
from ..attacks.catalogue import CLOSED_FORMS
from ..attacks.invert import invert
from ..attacks.result import AttackNotApplicable, Reconstruction
from ..audit.page import Source
from ..audit.report import json_safe
from ..federation import LocalTraining, Recording, Reply
from ..federation.course import Album, album_of, dealt, model_of
from ..federation.flower import need_flower
from ..federation.index import INDEX
from ..federation.running import LOG, run_course
from ..metrics import psnr
from ..models import VisionTransformer
from ..update import UpdateError
from ..version import __version__
from .files import writable_folder
from .messages import RESPONSIBLE_USE, CommandError, note, patience
from .recorded import audit_replies, weights_of, write_summary

_LINE = "{:<12} {:>5} {:>6} {:<24} {:>7}  {:<5} {:>8}  {}"


@dataclass(frozen=True)
class Seen:
    """What the server has of one client in one round.

    Attributes
    ----------
    client : str
    round : int
    images : int
        That the client holds.
    attack : str or None
        The closed form; None where none applies.
    psnr : float or None
        In dB, against the photograph, of several the one it is nearest to: which only the client can tell.
    exact : bool
    seconds : float
        Of the attack, with its replay.
    reason : str
    """

    client: str
    round: int
    images: int
    attack: str | None
    psnr: float | None
    exact: bool
    seconds: float
    reason: str


def run(arguments: argparse.Namespace) -> int:
    """Run the federation, attack what the server kept, and write all of it.

    Returns
    -------
    int
        0 where a picture came of it, 1 where no attack applies.
    """
    need_flower()
    out = writable_folder(arguments.out)
    model, how = _built(arguments), _training(arguments)  # before anything is started
    recording = _federated(arguments, how, out)
    for fault in recording.faults:
        note(f"{fault.client}, round {fault.round}: {fault.words}")
    if not recording.replies:
        raise CommandError(f"no client sent anything that can be used; {out / LOG} has what the processes said")
    albums = _albums(arguments)
    print("\nWhat the server has of each client:\n")
    print(_LINE.format("client", "round", "images", "attack", "PSNR dB", "exact", "attack s", ""))
    seen, pictures = [], []
    for reply in recording.replies:
        one, found = _attacked(model, recording, reply, albums[reply.client])
        seen.append(one)
        pictures.append((one, albums[reply.client], found))
        print(_line(one), flush=True)
    (out / "federation.png").write_bytes(viz.to_png(_figure(pictures)))
    _write_numbers(arguments, recording, seen, out)
    source = Source(command=shlex.join(arguments.words), model="aprillab.federation.course:model_of")
    audited = list(audit_replies(recording, model, out / "audits", source=source))
    write_summary(audited, recording, out / "audits")
    print(f"\nwrote {out / 'federation.png'}, federation.json, {LOG}, recording/ and audits/\n\n{RESPONSIBLE_USE}")
    return 0 if any(one.attack for one in seen) else 1


# --- The federation -----------------------------------------------------------------------------------------------


def _federated(arguments: argparse.Namespace, how: LocalTraining, out: Path) -> Recording:
    """Run it; what an earlier run left in the folder goes."""
    folder = out / "recording"
    for old in (folder / INDEX, *folder.glob("round-*.safetensors")):
        old.unlink(missing_ok=True)
    in_process = arguments.in_process or os.name != "posix"
    if in_process and not arguments.in_process:
        note("SuperLink and SuperNodes are started on Linux and macOS alone: all runs in this process")
    where = "in this process" if in_process else "by processes of their own on 127.0.0.1"
    clients, rounds = (
        f"{number} {what}{'s' * (number > 1)}"
        for number, what in ((arguments.clients, "client"), (arguments.rounds, "round"))
    )
    print(f"A server and {clients}, {where}: {rounds}; {out / LOG} grows meanwhile …", flush=True)
    nodes = [{"name": name, "victims": victims} for name, victims in _victims(arguments).items()]
    start = time.perf_counter()
    try:
        with patience("the federation runs"):
            recording = run_course(
                folder, nodes, rounds=arguments.rounds, how=how, model=_model(arguments),
                timeout=arguments.timeout, round_timeout=arguments.round_timeout, in_process=in_process,
                log=out / LOG,
            )  # fmt: skip
    except BaseException:
        if (folder / INDEX).exists():
            note(f"what the server had until then is in {folder}, what the processes said in {out / LOG}")
        raise
    print(f"done in {time.perf_counter() - start:.0f} s")
    return recording


def _victims(arguments: argparse.Namespace) -> dict[str, str]:
    """The victims that each client holds."""
    return {f"client-{i}": names for i, names in enumerate(dealt(arguments.clients, arguments.images), 1)}


def _albums(arguments: argparse.Namespace) -> dict[str, Album]:
    return {name: album_of(victims, _model(arguments)) for name, victims in _victims(arguments).items()}


def _model(arguments: argparse.Namespace) -> dict[str, int]:
    keys = ("image-size", "patch-size", "width", "depth", "heads", "classes")
    return {key: getattr(arguments, key.replace("-", "_")) for key in keys} | {"model-seed": arguments.seed}


def _built(arguments: argparse.Namespace) -> VisionTransformer:
    """The model that the server starts with."""
    try:
        return model_of(_model(arguments))
    except ValueError as error:
        raise CommandError(f"no such model: {error}") from error


def _training(arguments: argparse.Namespace) -> LocalTraining:
    return LocalTraining(
        optimizer=arguments.optimizer, learning_rate=arguments.learning_rate, steps=arguments.local_steps,
        batch_size=arguments.batch_size, momentum=arguments.momentum, weight_decay=arguments.weight_decay,
        clip_norm=arguments.clip_norm, seed=arguments.seed,
    )  # fmt: skip


# --- The attack ---------------------------------------------------------------------------------------------------


def _attacked(
    model: VisionTransformer, recording: Recording, reply: Reply, album: Album
) -> tuple[Seen, Reconstruction | None]:
    """What the server gets of one reply, and how near it is."""
    start = time.perf_counter()
    try:
        one = recording.round_of(reply)
        weights_of(model, reply.round, one)
        found = invert(model, one.update)
    except (AttackNotApplicable, UpdateError) as error:
        reason = error.reason if isinstance(error, AttackNotApplicable) else str(error)
        seconds = time.perf_counter() - start
        return Seen(reply.client, reply.round, len(album.names), None, None, False, seconds, reason), None
    seconds = time.perf_counter() - start
    best = max(float(psnr(found.pixels[0], original)) for original in album.pixels)
    return Seen(
        reply.client, reply.round, len(album.names), found.attack, best, found.exact, seconds, found.reason
    ), found  # fmt: skip


def _line(one: Seen) -> str:
    title = next((a.title for a in CLOSED_FORMS.values() if a.function.__name__ == one.attack), one.attack)
    near = "" if one.psnr is None else f"{one.psnr:.1f}"
    return _LINE.format(
        one.client, one.round, one.images, title or "none applies", near, "yes" if one.exact else "no",
        f"{one.seconds:.2f}", "" if one.attack else one.reason[:60],
    )  # fmt: skip


# --- What is written ----------------------------------------------------------------------------------------------


def _figure(pictures: Sequence[tuple[Seen, Album, Reconstruction | None]]) -> Figure:
    """A row for each client: a photograph that it holds, and what the server has of it in each round."""
    clients = list(dict.fromkeys(one.client for one, _, _ in pictures))
    rounds = sorted({one.round for one, _, _ in pictures})
    fig, axes = viz.figure(len(clients), 1 + len(rounds))
    for ax in axes.flat:
        ax.set_axis_off()
    for one, album, found in pictures:
        row = axes[clients.index(one.client)]
        nearest = 0
        if found is not None:
            nearest = int(torch.tensor([float(psnr(found.pixels[0], p)) for p in album.pixels]).argmax())
            ax = row[1 + rounds.index(one.round)]
            viz.draw(ax, found.pixels[0], f"round {one.round}: {one.psnr:.1f} dB")
        if one.round == rounds[0] or found is None:
            viz.draw(row[0], album.pixels[nearest], f"{one.client} holds ({one.images})")
    return fig


def _write_numbers(arguments: argparse.Namespace, recording: Recording, seen: Sequence[Seen], out: Path) -> None:
    numbers = {
        "format": "aprillab-federation-1",
        "aprillab": __version__,
        "command": shlex.join(arguments.words),
        "in_process": arguments.in_process or os.name != "posix",
        "training": _training(arguments).to_config(),
        "model": _model(arguments),
        "clients": {name: victims.split(",") for name, victims in _victims(arguments).items()},
        "seen": [asdict(one) for one in seen],
        "faults": [asdict(fault) for fault in recording.faults],
    }
    text = json.dumps(json_safe(numbers), indent=2, ensure_ascii=False)
    (out / "federation.json").write_text(text + "\n", encoding="utf-8")
