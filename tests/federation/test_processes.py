"""Processes are started on free ports, watched, and ended whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import mind_interruption

from aprillab.federation import FlowerMissing, flower, processes, read_recording
from aprillab.federation.ending import end_all
from aprillab.federation.log import Log
from aprillab.federation.processes import FederationError, free_port, run_federation

posix = pytest.mark.skipif(os.name != "posix", reason="processes are started on Linux and macOS")
ROOT = Path(__file__).resolve().parents[2]


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.05)


# --- Stand-ins for Flower's commands: small scripts in a folder that comes first --------------------------------


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """``commands(name, code)``: a command of this name that runs this Python."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name: str, code: str) -> None:
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
        path.chmod(0o755)

    monkeypatch.setattr(processes, "need_flower", lambda: None)
    monkeypatch.setattr(processes, "_found", lambda command: [str(folder / command)])
    put("flower-superlink", _LINK)
    put("flower-supernode", "import time\nprint('Receiving: train message', flush=True)\ntime.sleep(100)")
    put("flwr", "import sys\nif sys.argv[1] == 'list':\n    print('{\"runs\": [{\"status\": \"finished:completed\", "
                "\"status-details\": \"\"}]}')")  # fmt: skip
    return put


_LINK = """
import http.server, subprocess, sys

class Fine(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

# As Flower does it: a process in a session of its own, which outlives this one.
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
try:
    server = http.server.HTTPServer(("127.0.0.1", port), Fine)
except OSError as error:
    sys.exit(f"[Errno 98] error while attempting to bind on address: address already in use ({error})")
server.serve_forever()
"""


@pytest.fixture
def homes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """``FLWR_HOME`` of the federations that were run; in the end nobody has it any more."""
    seen: list[Path] = []

    def ended(home: Path, started: list[subprocess.Popen[str]]) -> None:
        seen.append(home)
        assert started
        end_all(home, started)

    monkeypatch.setattr(processes, "end_all", ended)
    yield seen
    assert seen
    assert [pid for home in seen for pid in with_home(home)] == []


def with_home(home: Path) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"FLWR_HOME={home}".encode() in (place / "environ").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return found


def federated(tmp_path: Path, nodes: int = 2, timeout: float = 30.0) -> float:
    return run_federation(tmp_path, [{"name": f"c{i}"} for i in range(nodes)], log=tmp_path / "log", timeout=timeout)


@posix
def test_all_is_ended_and_logged(commands: Callable[[str, str], None], homes: list[Path], tmp_path: Path) -> None:
    assert federated(tmp_path) < 30
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert "c0         | Receiving: train message" in log
    assert not homes[0].exists()


@posix
def test_colours_that_a_notebook_asks_for_do_not_reach_flower(
    commands: Callable[[str, str], None], homes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(
        "flwr",
        "import os, sys\nred = '\\x1b[31m' if 'FORCE_COLOR' in os.environ else ''\nif sys.argv[1] == 'list':\n"
        '    print(red + \'{"runs": [{"status": "finished:completed", "status-details": ""}]}\')',
    )
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a Jupyter kernel has it
    assert federated(tmp_path) < 30


@posix
def test_a_port_that_was_taken_meanwhile_is_another_the_next_time(
    commands: Callable[[str, str], None], homes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [taken.getsockname()[1], free_port(), free_port(), free_port()]
        monkeypatch.setattr(processes, "free_port", lambda: ports.pop(0))
        monkeypatch.setattr(processes, "_healthy", lambda port: port != taken.getsockname()[1])
        assert federated(tmp_path) < 30
        ports[:] = [taken.getsockname()[1]] * 9
        with pytest.raises(FederationError, match=r"the SuperLink ended with code 1 on port \d+: .*in use"):
            federated(tmp_path)


@posix
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        (
            "flower-superlink",
            "import sys; sys.exit('no such option')",
            "SuperLink ended with code 1 .*no such option",
        ),
        ("flower-supernode", "import sys; sys.exit('no key')", "SuperNode of c0 ended with code 1 before it trained"),
        ("flwr", "import sys; sys.exit('bad app')", "flwr run ended with code 1: bad app"),
        ("flwr", "print('nothing')", "the run is unknown"),
        ("flwr", "import time; print('at it', flush=True); time.sleep(100)", "took too long and was ended: at it"),
    ],
)
def test_what_goes_wrong_is_said_and_all_is_ended(
    commands: Callable[[str, str], None], homes: list[Path], tmp_path: Path, name: str, code: str, words: str
) -> None:
    commands(name, code)
    if name == "flower-supernode":
        commands("flwr", "import time; time.sleep(100)")
    with pytest.raises(FederationError, match=words):
        federated(tmp_path, timeout=4.0 if "too long" in words else 30.0)


@posix
def test_processes_that_do_not_listen_are_killed(
    commands: Callable[[str, str], None], homes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aprillab.federation.ending._GENTLY", 0.5)
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('Receiving: train message', "
    commands("flower-supernode", deaf + "flush=True)\ntime.sleep(100)")
    commands("flwr", "import sys, time\ntime.sleep(1)\nsys.exit('bad app')")
    start = time.monotonic()
    with pytest.raises(FederationError, match="bad app"):
        federated(tmp_path)
    assert time.monotonic() - start < 15


def test_without_flower_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flower, "find_spec", lambda name: None)
    with pytest.raises(FlowerMissing, match=r'pip install "aprillab\[federation\]".*not install it into Colab'):
        federated(tmp_path)
    monkeypatch.setattr(flower, "find_spec", lambda name: object() if name == "flwr" else None)
    with pytest.raises(FlowerMissing, match=r"older than 1\.42"):
        federated(tmp_path)


def test_the_room_is_entered_without_flower() -> None:
    code = (
        "import sys\nsys.modules['flwr'] = None\nimport aprillab.federation as f\n"
        "print(len(f.example_recording().clients))\n"
        "try:\n    f.CuriousServer\nexcept ImportError as error:\n    print(type(error).__name__)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert shown.stdout.split() == ["3", "FlowerMissing"]


def test_the_log_has_no_colours_and_no_empty_lines(tmp_path: Path) -> None:
    with Log(tmp_path / "a" / "log") as log:
        for line in ("\x1b[92mINFO \x1b[0m:      hello\n", "\x1b[92mINFO \x1b[0m:      \n", "", "\n"):
            log.write("node", line)
        assert log.tail("node") == "INFO : hello"
        assert log.tail("other") == "it printed nothing"
    assert (tmp_path / "a" / "log").read_text() == "node       | INFO :      hello\n"


# --- The real thing ------------------------------------------------------------------------------------------------


@posix
@pytest.mark.slow
def test_a_client_dies_mid_round_and_then_comes_ctrl_c(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    out, log = tmp_path / "out", tmp_path / "out" / "federation.log"
    words = ["federation", "--out", str(out), "--rounds", "50", "--round-timeout", "20", "--width", "64"]
    # Not pytest's own session: Ctrl-C is for this process alone.
    process = subprocess.Popen(
        [sys.executable, "-m", "aprillab", *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=mind_interruption,
    )  # fmt: skip
    try:
        wait_for(lambda: log.exists() and "client-2   | INFO :      Receiving: train" in log.read_text(), 120)
        ours = set(_below(process.pid))
        (node,) = [pid for pid, words in _commands(ours).items() if 'name="client-2"' in words]
        for pid in (node, *_below(node)):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: "curious server: round 1, kept 1 of" in log.read_text(), 120)
        ours |= set(_below(process.pid))
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=30)
    finally:
        process.terminate()  # which ends all that it started
        process.wait(30)
    assert process.returncode == 130, shown
    assert "aprillab: error: interrupted" in shown
    assert f"what the server had until then is in {out / 'recording'}" in shown
    assert "client-2   | the SuperNode ended with code -9" in log.read_text()
    assert _commands(ours) == {}
    recording = read_recording(out / "recording")
    assert "client-1" in recording.clients
    assert "client-2" not in recording.clients
    assert recording.of_client("client-1", rounds=[1])[0].update.gradients
    assert any("sent no reply" in fault.words or "failed" in fault.words for fault in recording.faults)


def _below(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
    parents = dict(map(int, line.split()) for line in listed.stdout.splitlines())
    found: list[int] = []
    left = [pid]
    while left:
        above = left.pop()
        children = [child for child, parent in parents.items() if parent == above]
        found += children
        left += children
    return found


def _commands(pids: set[int]) -> dict[int, str]:
    """Command lines of those that still run."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return {int(pid): words for pid, state, words in rows if int(pid) in pids and not state.startswith("Z")}
