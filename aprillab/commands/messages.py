"""What all commands say: errors, notes on stderr, and the texts below every help."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODES = "Exit codes: 0 fine, 1 no attack applies, 2 bad input or usage, 130 interrupted."
AUDIT_EXIT_CODES = """Exit codes: 0 a picture is given away (exact, close, likely or coarse), 1 none is shown (unclear
or none), 2 bad input or usage, 130 interrupted. With --fail-on LEVEL: 3 LEVEL or worse, 0 less."""
RESPONSIBLE_USE = (
    "Use this to learn, to audit systems that are yours and to build better defences: attack pictures that are\n"
    "public, or your own, or those of people who said yes."
)


class CommandError(Exception):
    """Bad input or usage; the message is for the user."""


def note(text: str) -> None:
    """Print a remark that is no error on stderr."""
    print(f"aprillab: note: {text}", file=sys.stderr)


def fail(message: str, code: int) -> int:
    """Print an error as one line on stderr; returns the exit code."""
    print(f"aprillab: error: {' '.join(message.split())}", file=sys.stderr)
    return code


@contextmanager
def patience(words: str, every: float = 10.0) -> Iterator[Callable[[str], None]]:
    """While something takes long, say so on stderr every so many seconds, unless that is a terminal.

    Yields a function to be told each step as it begins: a terminal gets a line for it, and elsewhere it
    is named with the seconds.
    """
    done, terminal, start = threading.Event(), sys.stderr.isatty(), time.monotonic()
    at = ""

    def say() -> None:
        seconds = 0.0
        while not done.wait(every):
            seconds += every
            note(f"{words}, {seconds:.0f} s{at}")

    def step(name: str) -> None:
        nonlocal at
        at = f": {name}"
        if terminal:
            note(f"{time.monotonic() - start:3.0f} s  {name} …")

    thread = threading.Thread(target=say, daemon=True)
    if not terminal:
        thread.start()
    try:
        yield step
    finally:
        done.set()
        if thread.is_alive():
            thread.join()
