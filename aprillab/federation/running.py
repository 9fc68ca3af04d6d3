"""The course's federation from one call: by processes, or in this one."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .course import MODEL
from .flower import need_flower
from .local import LocalTraining
from .processes import as_toml, run_federation
from .recording import Recording, read_recording

LOG = "federation.log"


def run_course(
    folder: str | Path,
    nodes: Sequence[Mapping[str, Any]],
    *,
    rounds: int = 1,
    how: LocalTraining | None = None,
    model: Mapping[str, int] | None = None,
    timeout: float = 300.0,
    round_timeout: float = 120.0,
    in_process: bool = False,
    log: str | Path | None = None,
) -> Recording:
    """Run the course's ServerApp and ClientApp, and read what the server kept.

    Parameters
    ----------
    folder : str or Path
        Of the recording.
    nodes : sequence of mappings
        For each client its ``name``, the ``victims`` it holds (names between commas), and where it
        trains otherwise than told (``local-steps``, …).
    rounds : int
    how : LocalTraining, optional
        What the server tells all clients.
    model : mapping, optional
        As :data:`~aprillab.federation.course.MODEL`.
    timeout : float
        Seconds for the whole; of processes alone.
    round_timeout : float
        Seconds after which a round ends without those that are still silent.
    in_process : bool
        Without processes and network.
    log : str or Path, optional
        What all of them print; default is ``federation.log`` in the folder.

    Raises
    ------
    FlowerMissing, FederationError
        As :func:`~aprillab.federation.processes.run_federation`.

    Examples
    --------
    >>> import tempfile
    >>> nodes = [{"name": "ada", "victims": "coffee"}, {"name": "ben", "victims": "rocket"}]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     recording = run_course(folder, nodes, rounds=1, in_process=True)
    >>> recording.clients, len(recording.replies), len(recording.faults)
    (('ada', 'ben'), 2, 0)
    """
    folder = Path(folder).absolute()
    config = {
        **MODEL, **(model or {}), **(how or LocalTraining()).to_config(), "clients": len(nodes), "rounds": rounds,
        "round-timeout": round_timeout, "recording": str(folder),
    }  # fmt: skip
    need_flower()
    if in_process:
        from . import client, server
        from .nearby import run_nearby

        with _logged_to(Path(log or folder / LOG)):
            run_nearby(server.app, client.app, nodes, config)
    else:
        with tempfile.TemporaryDirectory(prefix="aprillab-app-") as app:
            write_app(Path(app), config)
            run_federation(app, nodes, log=log or folder / LOG, timeout=timeout)
    return read_recording(folder)


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Flower's lines go to this file, and not to the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("flwr")
    before = logger.handlers[:]
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"{'server':<10} | %(levelname)s :      %(message)s"))
    logger.handlers[:] = [handler]
    try:
        yield
    finally:
        logger.handlers[:] = before
        handler.close()


_SIDE = "from aprillab.federation import {0}\n\napp = {0}.app\n"
_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "aprillab-federation"
version = "1.0.0"
description = "FedAvg, watched by a curious server"
license = "MIT"
dependencies = []

[tool.flwr.app]
publisher = "aprillab"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
"""


def write_app(
    app: Path,
    config: Mapping[str, Any],
    *,
    server: str = _SIDE.format("server"),
    client: str = _SIDE.format("client"),
) -> None:
    """The folder that ``flwr run`` takes: a project file, and a module for each side, which name
    ours.
    """
    lines = [f"{key} = {as_toml(value)}" for key, value in config.items()]
    (app / "pyproject.toml").write_text(_PROJECT + "\n".join(lines) + "\n", encoding="utf-8")
    (app / "server_app.py").write_text(server, encoding="utf-8")
    (app / "client_app.py").write_text(client, encoding="utf-8")
