"""A real federation on this machine: a SuperLink, SuperNodes and ``flwr run``, started, watched and
ended.

Flower is not imported here: its commands are run. Everything is on the loopback address, on ports
that were free, and keeps its files in a folder of its own (``FLWR_HOME``), which is taken away at
the end. Each command has its own session, so that Ctrl-C reaches this process alone, which then
ends them all, their children and those that these left behind too.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .ending import end_all, interruptible
from .flower import need_flower
from .log import Log

_START = 60.0  # seconds for the SuperLink, on a machine that is busy
_HOST = "127.0.0.1"
_TRIES = 3  # of ports
_COMMANDS = ("flower-superlink", "flower-supernode", "flwr")
_COLOURED = ("FORCE_COLOR", "CLICOLOR_FORCE", "CLICOLOR", "PY_COLORS")
_RECEIVED = "Receiving: train message"  # of a SuperNode whose client has work


class FederationError(RuntimeError):
    """A federation that could not be run, or did not end well; what it kept is on disk."""


def run_federation(
    app: str | Path,
    nodes: Sequence[Mapping[str, Any]],
    *,
    log: str | Path,
    run_config: Mapping[str, Any] | None = None,
    timeout: float = 300.0,
) -> float:
    """Run a Flower app with a SuperNode for each client, all on this machine.

    Parameters
    ----------
    app : str or Path
        A folder with a ``pyproject.toml`` as ``flwr run`` takes it.
    nodes : sequence of mappings
        The configuration of each node, such as ``{"partition-id": 0, "num-partitions": 2}``.
    log : str or Path
        What every process prints, line by line.
    run_config : mapping, optional
        Values in the place of the app's ``[tool.flwr.app.config]``.
    timeout : float
        Seconds for the whole, after which all is ended.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    FlowerMissing
        If Flower is not installed.
    FederationError
        If a process does not start, the run fails or takes too long: with the lines that say why.
        Whatever happens, no process is left.
    """
    need_flower()
    if os.name != "posix":
        raise FederationError("processes are started and ended on Linux and macOS alone; run it in this process")
    start = time.monotonic()
    deadline = start + timeout
    with ExitStack() as stack:
        lines = stack.enter_context(Log(Path(log)))
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aprillab-", ignore_cleanup_errors=True)))
        group = stack.enter_context(_processes(home, lines))
        stack.enter_context(interruptible())
        address = group.superlink(deadline)
        for number, node in enumerate(nodes, 1):
            group.supernode(str(node.get("name", f"node-{number}")), address, node)
        group.run(Path(app), address, dict(run_config or {}), deadline)
    return time.monotonic() - start


@contextmanager
def _processes(home: Path, log: Log) -> Iterator[_Group]:
    group = _Group(home, log)
    try:
        yield group
    finally:
        end_all(home, group.started)


class _Group:
    """The processes of one federation."""

    def __init__(self, home: Path, log: Log) -> None:
        self.home, self.log = home, log
        self.started: list[subprocess.Popen[str]] = []
        self._nodes: dict[str, subprocess.Popen[str]] = {}
        self._ended: set[str] = set()

    def superlink(self, deadline: float) -> str:
        """Start it on a free port, and wait until it answers; returns its address."""
        for attempt in range(_TRIES):
            port = free_port()
            process = self._start(
                "superlink", "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
                "--host", _HOST, "--port", str(port),
            )  # fmt: skip
            until = min(time.monotonic() + _START, deadline)
            while process.poll() is None and time.monotonic() < until:
                if _healthy(port) and process.poll() is None:
                    return f"{_HOST}:{port}"
                time.sleep(0.1)
            self.log.wait("superlink")
            if process.poll() is None or "in use" not in self.log.tail("superlink") or attempt == _TRIES - 1:
                break
        state = "does not answer" if process.poll() is None else f"ended with code {process.returncode}"
        raise FederationError(f"the SuperLink {state} on port {port}: {self.log.tail('superlink')}")

    def supernode(self, name: str, superlink: str, config: Mapping[str, Any]) -> None:
        """Start a client's node."""
        self._nodes[name] = self._start(
            name, "flower-supernode", "--insecure", "--superlink", superlink, "--host", _HOST,
            "--port", str(free_port()), "--node-config", as_options(config),
        )  # fmt: skip

    def run(self, app: Path, superlink: str, run_config: Mapping[str, Any], deadline: float) -> None:
        """Run the app, and wait until it has ended."""
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{superlink}"\ninsecure = true\n',
            encoding="utf-8",
        )
        options = ["--run-config", as_options(run_config)] if run_config else []
        process = self._start("server", "flwr", "run", str(app), "here", "--stream", *options)
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise FederationError(f"the federation took too long and was ended: {self.log.tail('server')}")
            self._look_at_nodes()
            time.sleep(0.1)
        self.log.wait("server")
        if process.returncode:
            raise FederationError(f"flwr run ended with code {process.returncode}: {self.log.tail('server')}")
        status, details = self._outcome()
        if status != "finished:completed":
            raise FederationError(f"the run is {status} ({details}): {self.log.tail('server')}")

    def _look_at_nodes(self) -> None:
        """A SuperNode that ends before its client ever trained stops all; later, the others go on."""
        for name, process in self._nodes.items():
            if process.poll() is None or name in self._ended:
                continue
            self._ended.add(name)
            self.log.wait(name)
            self.log.write(name, f"the SuperNode ended with code {process.returncode}")
            if not self.log.has(name, _RECEIVED):
                raise FederationError(
                    f"the SuperNode of {name} ended with code {process.returncode} before it trained: "
                    f"{self.log.tail(name)}"
                )

    def _outcome(self) -> tuple[str, str]:
        """What the SuperLink says of the run: its status, and details."""
        listed = subprocess.run(
            [*_found("flwr"), "list", "here", "--format", "json"], env=self._environment(), capture_output=True,
            text=True, timeout=60, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        try:
            run = json.loads(listed.stdout)["runs"][0]
            return str(run["status"]), str(run["status-details"])
        except (ValueError, LookupError, TypeError):
            return "unknown", (listed.stdout + listed.stderr)[-300:]

    def _start(self, name: str, command: str, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*_found(command), *words], env=self._environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        self.log.follow(name, process)
        return process

    def _environment(self) -> dict[str, str]:
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        # A Jupyter kernel asks for colours, and then Flower's JSON has them.
        inherited = {name: value for name, value in os.environ.items() if name not in _COLOURED}
        return {
            **inherited,
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "NO_COLOR": "1",
            "COLUMNS": "200",
            "PYTHONPATH": os.pathsep.join(paths),
            # Flower's commands start others by their names.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            # Clients train at the same time.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }


def _found(command: str) -> list[str]:
    """Where one of Flower's commands is: beside this Python, or on the path."""
    beside = str(Path(sys.executable).parent)
    path = shutil.which(command, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))
    if path is None:
        raise FederationError(f"Flower is installed, but its command {command} is not found beside {sys.executable}")
    return [path]


def free_port() -> int:
    """A port of the loopback address on which nobody listens."""
    with socket.socket() as one:
        one.bind((_HOST, 0))
        return int(one.getsockname()[1])


def _healthy(port: int) -> bool:
    with suppress(OSError):
        # No proxy: this is this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{_HOST}:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    return False


def as_options(config: Mapping[str, Any]) -> str:
    """A flat configuration as Flower's commands read it: TOML's values, blanks between.

    >>> as_options({"name": "client-1", "momentum": 0.9, "nesterov": True})
    'name="client-1" momentum=0.9 nesterov=true'
    """
    return " ".join(f"{key}={as_toml(value)}" for key, value in config.items())


def as_toml(value: Any) -> str:
    """A number, a truth value or a text in TOML.

    >>> as_toml('C:\\\\x "y"')
    '"C:\\\\\\\\x \\\\"y\\\\""'
    """
    return json.dumps(value, ensure_ascii=False)
