"""The command line: ``aprillab demo``, ``aprillab invert``, ``aprillab audit`` and ``aprillab
compare``.

Each command has a file with its arguments and what it does. Here are the commands' list and the
exit codes; every error becomes one message on stderr.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ..anatomy import UnknownModelError
from ..attacks.result import AttackNotApplicable
from ..comparison.cases import CompareError
from ..data import PictureError, PictureWarning
from ..update import UpdateError
from ..version import __version__
from ..zoo import ModelError
from . import audit, compare, demo, invert
from .messages import EXIT_CODES, RESPONSIBLE_USE, CommandError, note


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, default ``sys.argv[1:]``

    Returns
    -------
    int
        0 fine, 1 no attack applies, 2 bad input or usage, 130 interrupted.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
        if not hasattr(arguments, "run"):
            parser.print_help(sys.stderr)
            return 2
        with _remarks_on_stderr():
            return arguments.run(arguments)
    except AttackNotApplicable as refusal:
        return _fail(refusal.reason, 1)
    except (CommandError, CompareError, UpdateError, PictureError, ModelError, UnknownModelError) as error:
        return _fail(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "alloc" in str(error):
            return _fail(f"not enough memory: choose a smaller model or --image-size ({str(error)[:120]})", 2)
        raise
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as every other error, instead of leaving the interpreter."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="aprillab",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="How the gradients that federated learning shares give away a Vision Transformer user's images.",
        epilog=f"{EXIT_CODES}\n{RESPONSIBLE_USE}",
    )
    parser.add_argument("--version", action="version", version=f"aprillab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (demo, invert, audit, compare):
        command.add_arguments(commands)
    return parser


def _fail(message: str, code: int) -> int:
    print(f"aprillab: error: {' '.join(message.split())}", file=sys.stderr)
    return code


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
