"""Running a command whose arguments have been read: errors become messages and exit codes."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ..anatomy import UnknownModelError
from ..attacks.result import AttackNotApplicable
from ..comparison.cases import CompareError
from ..data import PictureError, PictureWarning
from ..federation.flower import FlowerMissing
from ..federation.processes import FederationError
from ..update import UpdateError
from ..update.client import lacks_memory
from ..zoo import ModelError
from .messages import CommandError, fail, note

_FOR_PEOPLE = (
    CommandError, CompareError, UpdateError, PictureError, ModelError, UnknownModelError, FlowerMissing,
    FederationError,
)  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run ``arguments.command``; returns the exit code."""
    try:
        with _remarks_on_stderr():
            return import_module(f".{arguments.command}", __package__).run(arguments)
    except AttackNotApplicable as refusal:
        return fail(refusal.reason, 1)
    except _FOR_PEOPLE as error:
        return fail(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        if lacks_memory(error):
            return fail(f"not enough memory: choose a smaller model or --image-size ({str(error)[:120]})", 2)
        raise


@contextmanager
def _remarks_on_stderr() -> Iterator[None]:
    """Show the data module's warnings about a picture as plain remarks."""
    show = warnings.showwarning

    def remark(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, PictureWarning):
            note(str(message))
        else:
            show(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PictureWarning)
        warnings.showwarning = remark
        yield
