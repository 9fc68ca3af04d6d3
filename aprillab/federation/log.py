"""One log of several processes: what each prints, line by line, after its name."""

from __future__ import annotations

import re
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import TextIO

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_LEVEL = re.compile(r"^(INFO|WARNING|ERROR|DEBUG) ?:[\s│]*$")
_TAIL = 6  # lines of a message


class Log:
    """A file that follows processes.

    Parameters
    ----------
    path : Path
        Written anew; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._lock = threading.Lock()
        self._lines: dict[str, list[str]] = {}
        self._threads: dict[str, threading.Thread] = {}

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._threads):
            self.wait(name)
        with self._lock:
            self._file.close()

    def follow(self, name: str, process: subprocess.Popen[str]) -> None:
        """Write down what a process prints, until it closes its output."""
        thread = threading.Thread(target=self._read, args=(name, process.stdout), daemon=True)
        self._threads[name] = thread
        thread.start()

    def _read(self, name: str, output: TextIO) -> None:
        with output:
            for line in output:
                self.write(name, line)

    def write(self, name: str, line: str) -> None:
        """One line, without colours; nothing where it is empty."""
        line = _COLOURS.sub("", line).rstrip()
        if not _LEVEL.sub("", line):
            return
        with self._lock:
            self._lines.setdefault(name, []).append(line)
            if not self._file.closed:
                self._file.write(f"{name:<10} | {line}\n")
                self._file.flush()

    def wait(self, name: str, seconds: float = 2.0) -> None:
        """Until all that the process printed is written; its children may keep its output open."""
        self._threads[name].join(seconds)

    def has(self, name: str, words: str) -> bool:
        """Whether a line of this process has these words."""
        with self._lock:
            return any(words in line for line in self._lines.get(name, []))

    def tail(self, name: str) -> str:
        """The last lines of a process, for a message."""
        with self._lock:
            lines = self._lines.get(name, [])[-_TAIL:]
        return " / ".join(" ".join(line.split()) for line in lines) or "it printed nothing"
