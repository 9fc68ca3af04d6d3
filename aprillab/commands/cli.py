"""The command line: ``aprillab demo``, ``aprillab invert``, ``aprillab audit``, ``aprillab map``,
``aprillab compare``, ``aprillab federation`` and ``aprillab record``.

Arguments are read without PyTorch, whose import takes seconds: help, the version and wrong usage
come at once. Each command's arguments are in ``arguments/``, what it does in the file of its name,
and every error becomes one message on stderr.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ..version import __version__
from .arguments import audit, compare, demo, federation, invert, record
from .arguments import map as leak_map
from .messages import EXIT_CODES, RESPONSIBLE_USE, CommandError, fail


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, default ``sys.argv[1:]``

    Returns
    -------
    int
        0 fine (``audit``: a picture is given away), 1 no attack applies (``audit``: none is shown),
        2 bad input or usage, 3 ``audit --fail-on``, 130 interrupted, 141 whoever read the output
        has gone.
    """
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()  # here, where a pipe that nobody reads can still be told apart
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except CommandError as error:
        return fail(str(error), 2)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    arguments.words = ["aprillab", *(sys.argv[1:] if argv is None else argv)]
    with _loading():
        from .running import run
    return run(arguments)


class _Parser(argparse.ArgumentParser):
    """Shows texts with their own line breaks, and reports wrong usage as every other error, instead
    of leaving the interpreter. Its commands are of this class, too.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **given)

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="aprillab",
        description="How the gradients that federated learning shares give away a Vision Transformer user's images.",
        epilog=f"{EXIT_CODES}\naudit has its own, below aprillab audit --help.\n{RESPONSIBLE_USE}",
    )
    parser.add_argument("--version", action="version", version=f"aprillab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for command in (demo, invert, audit, leak_map, compare, federation, record):
        command.add_arguments(commands)
    return parser


@contextmanager
def _loading() -> Iterator[None]:
    """While PyTorch is imported: say so on a terminal, and end at once when interrupted.

    An exception in the middle of an import may be swallowed there, or leave half a library behind.
    """
    if "torch" in sys.modules:
        yield
        return
    shown = sys.stderr.isatty()
    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, _end)
    if shown:
        print("loading PyTorch …", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
        if shown:
            print("\033[K", end="", file=sys.stderr, flush=True)


def _end(*_: object) -> NoReturn:
    code = fail("interrupted", 130)
    sys.stderr.flush()
    os._exit(code)  # nothing has been written yet that would have to be closed
