"""The model that ``--model MODULE:FUNCTION`` names: the user's own code, imported and run, and its parts."""

from __future__ import annotations

import argparse
import importlib
import inspect
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..anatomy import Anatomy, UnknownModelError, dissect
from .messages import CommandError

_PACKAGE = Path(__file__).resolve().parents[1]


@contextmanager
def here_importable() -> Iterator[None]:
    """Let modules in the current folder be imported, as ``python -m`` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def built_model(text: str) -> nn.Module:
    """What ``MODULE:FUNCTION`` returns, which must be a module of PyTorch's.

    Raises
    ------
    CommandError
        If it is not of this form, cannot be imported, fails, or returns something else.
    """
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
        raise CommandError(f"--model: {text}() failed: {_of_user_code(error, function)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model: {text}() returned {type(model).__name__}, not a torch.nn.Module")
    return model


def described(model: nn.Module, arguments: argparse.Namespace) -> Anatomy:
    """The anatomy of the user's model, corrected by ``--part``.

    Raises
    ------
    CommandError
        If the model is not known, or a part does not fit it.
    """
    try:
        return dissect(model, **dict(arguments.part))
    except UnknownModelError as error:
        words = f"{str(error).rstrip('.')}. On the command line: --part patch_weight=… --part image_size=… and so on."
        raise CommandError(f"--model {arguments.model}: {words}") from error
    except (ValueError, TypeError) as error:
        raise CommandError(f"--model {arguments.model}: {error}") from error


def _of_user_code(error: Exception, function: Callable[..., Any] | None = None) -> str:
    """An exception out of the user's own code, and the line it came from; where that is the call
    itself, the function's.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where, line = frame.filename, frame.lineno
    if function is not None and Path(where).resolve().is_relative_to(_PACKAGE / "commands"):
        try:
            where, line = inspect.getsourcefile(function) or where, inspect.getsourcelines(function)[1]
        except (TypeError, OSError):  # no function of Python's
            where = "<frozen"
        return f"{type(error).__name__}: {error}; it is called without arguments{_place(where, line)}"
    return f"{type(error).__name__}: {error}{_place(where, line)}"


def _place(file: str, line: int | None) -> str:
    return "" if file.startswith("<frozen") else f" ({file}, line {line})"
