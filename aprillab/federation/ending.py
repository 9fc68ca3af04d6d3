"""Ending what was started: no process is left, on success, on failure, on Ctrl-C and on a signal.

A SuperLink starts a process in a session of its own, and this one others. Ending a process, or
its group, leaves these. But all inherit ``FLWR_HOME``, a folder that is this federation's
alone: by it they are found, where the system shows processes' environments (Linux), and
elsewhere as descendants.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType

_GENTLY = 5.0  # seconds before a process is killed


def interruptible() -> AbstractContextManager[None]:
    """SIGTERM and SIGHUP end this process as Ctrl-C does: by way of everybody's ``finally``."""
    return _handled(_leave, signal.SIGTERM, signal.SIGHUP)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def end_all(home: Path, started: Sequence[subprocess.Popen[str]]) -> None:
    """End these processes and all that have this ``FLWR_HOME``; returns when they are gone."""
    with _undisturbed():
        known = {process.pid for process in started if process.poll() is None}
        for number, seconds in ((signal.SIGTERM, _GENTLY), (signal.SIGKILL, _GENTLY)):
            until = time.monotonic() + seconds
            told: set[int] = set()
            while left := _alive(home, known, started):
                for pid in left - told:  # new ones may have come
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, number)
                told |= left
                known |= left
                if time.monotonic() > until:
                    break
                time.sleep(0.05)


def _alive(home: Path, known: set[int], started: Sequence[subprocess.Popen[str]]) -> set[int]:
    """Those that still run."""
    ours = {process.pid for process in started if process.poll() is None}  # poll also takes leave of the dead
    if Path("/proc/self/environ").exists():
        return ours | _with_home(home)
    return ours | _descendants(known | ours)


def _with_home(home: Path) -> set[int]:
    """Processes whose environment has this ``FLWR_HOME``, but for those that are dead already."""
    mark = f"FLWR_HOME={home}".encode()
    found = set()
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            with suppress(OSError):  # gone meanwhile, or another user's; a dead one's is empty
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    found.add(int(place.name))
    return found - {os.getpid()}


def _descendants(roots: set[int]) -> set[int]:
    """Children of these processes and theirs, by ``ps``; and those of the roots that still run."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=False)
    rows = [line.split() for line in listed.stdout.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found & parents.keys()


def _undisturbed() -> AbstractContextManager[None]:
    """A second Ctrl-C does not leave the work half done; it takes seconds."""
    return _handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], object] | signal.Handlers, *numbers: int) -> Iterator[None]:
    """These signals go to ``handler`` while this lasts; Python lets the main thread alone set one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)
