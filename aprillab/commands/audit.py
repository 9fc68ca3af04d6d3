"""``aprillab audit``: what an update of one's own federated system gives away."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..anatomy import Anatomy, tensors_of
from ..attacks.replay import Loss
from ..audit.advice import advice
from ..audit.findings import Audit, Finding
from ..audit.noise_words import short_noise
from ..audit.page import (
    Source,
    believed,
    dtype_name,
    ends_words,
    images_words,
    normalization_words,
    picture_name,
    predicted_psnr,
    reason_words,
    short_labels,
)
from ..audit.report import write_audit
from ..audit.run import audit
from ..audit.words import HEAD_UNNAMED, TRUST_WORDS
from ..federation import read_recording
from ..preprocessing import HALF, IMAGENET, UNIT, Preprocessing
from ..update import ClientUpdate, Round, UpdateError, load_state, load_update, missing_words
from .arguments.names import LEAKS
from .arguments.types import Normalization
from .files import writable_folder
from .losses import loss_function
from .messages import RESPONSIBLE_USE, CommandError, note, patience
from .recorded import audit_replies, training_of, write_summary
from .user_model import built_model, described, here_importable

_NAME_HEAD = f"{HEAD_UNNAMED[:-1]}: add --part head_weight=… --part head_bias=…"


def run(arguments: argparse.Namespace) -> int:
    """Audit the update, write the folder, and print what was found.

    Returns
    -------
    int
        0 where a picture is given away, 1 where none is shown; with ``--fail-on`` 3 where that
        level or a worse one was found, else 0.
    """
    folder = writable_folder(arguments.out)
    if arguments.recording is not None:
        return _run_recording(arguments, folder)
    if stray := [name for name in ("client", "round", "training") if getattr(arguments, name)]:
        raise CommandError(f"--{stray[0]} is of a recording: with --update, leave it out")
    rounds = _rounds(arguments)
    with here_importable():
        model, options = _told(arguments)
        with _steps(arguments) as step:
            try:
                found = audit(model, rounds, **options, progress=step)
            except UpdateError as error:
                raise _with_options(error) from error
            found = _with_remedy(found)
            code = _exit_code(found, arguments.fail_on)
            replaced = " (replaced)" if (folder / "report.json").exists() else ""
            step("drawing the report")
            _write(found, folder, _source(arguments, code))
    print(textwrap.fill(found.verdict, 110))
    if not arguments.quiet:
        _print_audit(found, folder, replaced)
    return code


def _steps(arguments: argparse.Namespace) -> AbstractContextManager[Callable[[str], None]]:
    """What says on stderr which step it is at."""
    return nullcontext(lambda _: None) if arguments.quiet else patience("still at it")


def _write(found: Audit, folder: Path, source: Source) -> None:
    try:
        write_audit(found, folder, source=source)
    except OSError as error:
        raise CommandError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _run_recording(arguments: argparse.Namespace, out: Path) -> int:
    """Audit every client of a recording in every round, a line each."""
    if stray := [name for name in ("state", "withheld") if getattr(arguments, name)]:
        raise CommandError(f"--{stray[0]} is of an --update: a recording has it")
    recording = read_recording(arguments.recording, how=training_of(arguments.training))
    for words in (
        *recording.remarks,
        *(f"{f.client or 'recording'}, round {f.round}: {f.words}" for f in recording.faults),
    ):
        note(words)
    with here_importable():
        model, options = _told(arguments)
        source = Source(command=shlex.join(arguments.words), model=arguments.model, loss=str(arguments.loss or ""))
        audited = []
        with _steps(arguments) as step:
            for one in audit_replies(
                recording, model, out, clients=arguments.client, rounds=arguments.round, options=options,
                source=source, progress=step,
            ):  # fmt: skip
                audited.append(one)
                _print_shortened(f"{one.client}, {one.words}: {one.found.leak}. {one.found.verdict}", 0)
    if not audited:
        raise CommandError(f"{arguments.recording}: no reply can be audited")
    write_summary(audited, recording, out)
    worst = min(audited, key=lambda one: LEAKS.index(one.found.leak))
    if not arguments.quiet:
        _print_advice(worst.found, f"the worst of them ({worst.client} in {worst.words})")
        print(f"\nwrote {out / 'summary.json'}, and a report for each line above\n\n{RESPONSIBLE_USE}")
    return _exit_code(worst.found, arguments.fail_on)


# --- What is audited ----------------------------------------------------------------------------------------------


def _rounds(arguments: argparse.Namespace) -> list[ClientUpdate | Round]:
    """The update, or those of several rounds, each with its weights where they are given."""
    if arguments.state and len(arguments.state) != len(arguments.update):
        raise CommandError(
            f"--state: {len(arguments.state)} files for {len(arguments.update)} of --update: one for each round"
        )
    updates = [_update(file, arguments) for file in arguments.update]
    if not arguments.state:
        return list(updates)
    return [Round(load_state(file), update) for file, update in zip(arguments.state, updates, strict=True)]


def _update(file: str, arguments: argparse.Namespace) -> ClientUpdate:
    update = load_update(file)
    if shared := [name for name in arguments.withheld if name in update.gradients]:
        raise CommandError(f"--withheld {shared[0]}: this gradient is in the update {file}")
    if not arguments.quiet:
        note(f"{file}: {len(update.gradients)} tensors in {dtype_name(update)}")
    return replace(update, withheld=(*update.withheld, *arguments.withheld))


def _told(arguments: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what the audit is told of it and of the client; said on stderr, too."""
    model = built_model(arguments.model)
    anatomy = described(model, arguments)
    preprocessing = _preprocessing(arguments.preprocessing, anatomy)
    options = {
        "anatomy": anatomy, "preprocessing": preprocessing, "loss": _loss(arguments, model, anatomy),
        "verify": arguments.verify, "strict": arguments.strict,
    }  # fmt: skip
    _say_what(arguments, model, anatomy, preprocessing)
    return model, options


def _preprocessing(said: Normalization | None, anatomy: Anatomy) -> Preprocessing:
    """The preprocessing that was said, or the model's own, if it fits the model's channels."""
    known = {"unit": UNIT, "half": HALF, "imagenet": IMAGENET}
    try:
        chosen = (
            anatomy.preprocessing if said is None else known[said] if isinstance(said, str) else Preprocessing(*said)
        )
        chosen.to_pixels(torch.zeros(1, anatomy.channels or 1, 1, 1))
    except ValueError as error:
        raise CommandError(f"--preprocessing: {error}") from error
    return chosen


def _loss(arguments: argparse.Namespace, model: nn.Module, anatomy: Anatomy) -> Loss | None:
    if arguments.loss is None:
        return None
    head = tensors_of(model).get(anatomy.head_weight or "")
    return loss_function(arguments.loss, None if head is None else len(head))


def _with_options(error: UpdateError) -> UpdateError:
    """What is said of a missing gradient, with the remedy that the command line has."""
    if not error.missing:
        return error
    more = ",…" if len(error.missing) > 1 else ""
    return UpdateError(missing_words(error.missing, f"--withheld {error.missing[0]}{more}"), missing=error.missing)


def _say_what(
    arguments: argparse.Namespace, model: nn.Module, anatomy: Anatomy, preprocessing: Preprocessing
) -> None:
    """On stderr, before the attacks take their seconds: what they are tried on."""
    if arguments.quiet:
        return
    assumed = "" if arguments.preprocessing else "assumed "
    words = normalization_words(preprocessing.mean, preprocessing.std)
    size = "×".join(map(str, anatomy.image_size))
    note(f"{type(model).__name__} ({anatomy.family}), images of {size}, input {assumed}normalized by {words}")
    note("trying the closed forms, which takes seconds to a minute …")


# --- What was found -----------------------------------------------------------------------------------------------


def _with_remedy(found: Audit) -> Audit:
    """Of a described model whose head nobody named, say first how to name it."""
    if HEAD_UNNAMED not in found.notes:
        return found
    return replace(found, notes=(_NAME_HEAD, *(note for note in found.notes if note != HEAD_UNNAMED)))


def _exit_code(found: Audit, fail_on: str | None) -> int:
    if fail_on is not None:
        return 3 if LEAKS.index(found.leak) <= LEAKS.index(fail_on) else 0
    return 0 if found.leak in LEAKS[:4] else 1


def _source(arguments: argparse.Namespace, code: int) -> Source:
    digests = []
    for name in arguments.update:
        with Path(name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return Source(
        command=shlex.join(arguments.words), model=arguments.model,
        file=", ".join(Path(name).name for name in arguments.update), sha256=", ".join(digests),
        loss=str(arguments.loss or ""), exit_code=code,
    )  # fmt: skip


def _print_audit(found: Audit, folder: Path, replaced: str) -> None:
    """What the report has at length, in two lines an attack."""
    print()
    _print_shortened(f"labels: {short_labels(found)}")
    _print_shortened(images_words(found))
    if found.pixels is not None and found.pixels.state == "contradicted":
        print(textwrap.indent(textwrap.fill(f"normalization (--preprocessing): {found.pixels.text}", 110), "  "))
    for finding in found.findings:
        _print_finding(finding, folder)
    if _NAME_HEAD in found.notes:
        print(f"\n  {_NAME_HEAD}")
    _print_advice(found)
    count = len(found.notes)
    notes = f", {count} note{'s' * (count > 1)} on what limits this audit" if count else ""
    print(f"\nwrote {folder / 'report.md'}{replaced}: reasons with their numbers{notes};")
    print("report.json" + (" and overview.png" if found.applied else "") + f" beside it\n\n{RESPONSIBLE_USE}")


def _print_finding(finding: Finding, folder: Path) -> None:
    title = finding.attack.title
    if finding.result is None:
        print(f"\n  {title}: does not apply")
        _print_shortened(finding.reason, 4)
        return
    predicted = predicted_psnr(finding)
    sure = "" if predicted is None or not believed(finding) else f", predicted {predicted:.1f} dB"
    print(f"\n  {title}: {finding.trust}{sure}, {folder / str(picture_name(finding))}")
    _print_shortened(f"{TRUST_WORDS[finding.trust].partition('. ')[0]}: {reason_words(finding)}", 4)


def _print_advice(found: Audit, of: str = "it") -> None:
    """A line for each change: whether it ends the finding, and its chapter."""
    print(f"\n  what to do about {of}, by its cost; does a change end it?")
    for one in advice(found):
        print(f"    {ends_words(one):<23} {one.change} (chapter {one.chapter[:2]})")
        if one.by == "guarantee":
            print(f"    {'':<23} {short_noise()}, one round, δ = 1e-5")


def _print_shortened(text: str, indent: int = 2) -> None:
    print(" " * indent + textwrap.shorten(text, 116 - indent, placeholder=" …"))
