"""``aprillab audit``: what an update of one's own federated system gives away."""

from __future__ import annotations

import argparse
import importlib
import operator
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..anatomy import Anatomy, UnknownModelError, dissect, tensors_of
from ..audit.findings import Audit, Finding
from ..audit.report import labels_words, picture_name, write_audit
from ..audit.run import audit
from ..audit.words import TRUST_WORDS
from ..preprocessing import HALF, IMAGENET, UNIT, Preprocessing
from ..update import ClientUpdate, UpdateError, load_update
from .files import writable_folder
from .messages import EXIT_CODES, RESPONSIBLE_USE, CommandError

def run(arguments: argparse.Namespace) -> int:
    """Audit the update, print what was found, and write the folder.

    Returns
    -------
    int
        1 where no attack applied.
    """
    folder = writable_folder(arguments.out)
    update = load_update(arguments.update)
    if shared := [name for name in arguments.withheld if name in update.gradients]:
        raise CommandError(f"--withheld {shared[0]}: this gradient is in the update")
    update = replace(update, withheld=(*update.withheld, *arguments.withheld))
    with _here_importable():
        model = _built_model(arguments.model)
        anatomy = _anatomy(model, arguments)
        _check_channels(arguments.preprocessing, anatomy, model)
        _check_complete(model, update)
        found = audit(model, update, anatomy=anatomy, preprocessing=arguments.preprocessing)
    _print_audit(found, folder)
    try:
        write_audit(found, folder)
    except OSError as error:
        raise CommandError(f"{folder}: cannot be written ({error.strerror or error})") from error
    print(f"\nwrote {folder / 'report.md'}, report.json" + (", overview.png" if found.applied else ""))
    print(f"\n{RESPONSIBLE_USE}")
    return 0 if found.applied else 1


def _print_audit(found: Audit, folder: Path) -> None:
    print(f"{found.verdict}\n")
    for part in found.parts:
        print(f"  {part.part:<26} {part.state:<13} {part.parameter or ''}")
    print(f"\n  labels: {labels_words(found)}")
    print(f"  {'one image' if found.one_image.holds else 'more than one image, or noise'}: {found.one_image.text}")
    for finding in found.findings:
        _print_finding(finding, folder)
    for remark in found.notes:
        print(f"\n  note: {remark}")


def _print_finding(finding: Finding, folder: Path) -> None:
    print(f"\n  {finding.attack.title} ({finding.attack.name})")
    if finding.result is None:
        print(f"    does not apply: {finding.reason}")
        return
    print(f"    {TRUST_WORDS[finding.trust]}")
    print(f"    {finding.reason}")
    if finding.replay is not None:
        print(f"    played back through the model, it misses the update by {finding.replay:.1e} of its norm")
    print(f"    picture: {folder / str(picture_name(finding))}")


def _anatomy(model: nn.Module, arguments: argparse.Namespace) -> Anatomy:
    """The anatomy of the user's model, corrected by ``--part``."""
    try:
        return dissect(model, **dict(arguments.part))
    except UnknownModelError as error:
        hint = "On the command line: --part patch_weight=… --part image_size=… and so on."
        raise CommandError(f"--model {arguments.model}: {error} {hint}") from error
    except (ValueError, TypeError) as error:
        raise CommandError(f"--model {arguments.model}: {error}") from error


@contextmanager
def _here_importable() -> Iterator[None]:
    """Let modules in the current folder be imported, as ``python -m`` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _built_model(text: str) -> nn.Module:
    """What ``MODULE:FUNCTION`` returns, which must be a module of PyTorch's."""
    module_name, _, function_name = text.partition(":")
    if not module_name or not function_name:
        raise CommandError(f"--model {text!r} is not of the form MODULE:FUNCTION, as in my_package.models:build")
    # Not pkgutil.resolve_name: it refuses the names of files such as train-vit.py.
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise CommandError(f"--model: module {module_name!r} cannot be imported: {_of_user_code(error)}") from error
    try:
        function = operator.attrgetter(function_name)(module)
    except AttributeError as error:
        raise CommandError(f"--model: module {module_name!r} has no {function_name!r}") from error
    if not callable(function):
        raise CommandError(f"--model: {text} is no function but a {type(function).__name__}")
    try:
        model = function()
    except Exception as error:
        raise CommandError(f"--model: {text}() failed: {_of_user_code(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model: {text}() returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _of_user_code(error: Exception) -> str:
    """An exception out of the user's own code, and the line it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if frame.filename.startswith("<frozen") else f" ({frame.filename}, line {frame.lineno})"
    return f"{type(error).__name__}: {error}{where}"


def _check_channels(preprocessing: Preprocessing | None, anatomy: Anatomy, model: nn.Module) -> None:
    channels = tensors_of(model)[anatomy.patch_weight].shape[1]
    try:
        (preprocessing or anatomy.preprocessing).to_pixels(torch.zeros(1, channels, 1, 1))
    except ValueError as error:
        raise CommandError(f"--preprocessing: {error}") from error


def _check_complete(model: nn.Module, update: ClientUpdate) -> None:
    """What check_update would say of a missing gradient, with the remedy that the command line has."""
    parameters = dict(model.named_parameters())
    if set(update.gradients) - set(parameters):
        return
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if missing := sorted(trained - set(update.gradients) - set(update.withheld)):
        raise UpdateError(
            f"the update lacks the gradient of {missing[0]!r} ({len(missing)} missing in all). If clients do not "
            f"share it, say so with --withheld {','.join(missing[:3])}{',…' if missing[3:] else ''}; if it is "
            "frozen, set requires_grad=False in the model"
        )
