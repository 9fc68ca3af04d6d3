"""The course's federation from one call: by processes, or in this one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .course import MODEL
from .flower import need_flower
from .local import LocalTraining
from .processes import as_toml, run_federation
from .recording import Recording, read_recording

LOG = "federation.log"
_ROUND = 120.0  # seconds after which a round ends without those that are still silent


def run_course(
    folder: str | Path,
    nodes: Sequence[Mapping[str, Any]],
    *,
    rounds: int = 1,
    how: LocalTraining | None = None,
    model: Mapping[str, int] | None = None,
    timeout: float = 300.0,
    in_process: bool = False,
) -> Recording:
    """Run the course's ServerApp and ClientApp, and read what the server kept.

    Parameters
    ----------
    folder : str or Path
        Of the recording; ``federation.log`` is written beside it, in the same folder.
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
    in_process : bool
        Without processes and network; no log is written.

    Raises
    ------
    FlowerMissing, FederationError
        As :func:`~aprillab.federation.processes.run_federation`.
    """
    folder = Path(folder).absolute()
    config = {
        **MODEL, **(model or {}), **(how or LocalTraining()).to_config(), "clients": len(nodes), "rounds": rounds,
        "round-timeout": min(_ROUND, timeout), "recording": str(folder),
    }  # fmt: skip
    need_flower()
    if in_process:
        from . import client, server
        from .nearby import run_nearby

        run_nearby(server.app, client.app, nodes, config)
    else:
        with tempfile.TemporaryDirectory(prefix="aprillab-app-") as app:
            write_app(Path(app), config)
            run_federation(app, nodes, log=folder / LOG, timeout=timeout)
    return read_recording(folder)


def write_app(app: Path, config: Mapping[str, Any]) -> None:
    """The folder that ``flwr run`` takes: a project file, and two modules that name ours."""
    lines = [f"{key} = {as_toml(value)}" for key, value in config.items()]
    (app / "pyproject.toml").write_text(_PROJECT + "\n".join(lines) + "\n", encoding="utf-8")
    for side in ("server", "client"):
        text = f"from aprillab.federation import {side}\n\napp = {side}.app\n"
        (app / f"{side}_app.py").write_text(text, encoding="utf-8")


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
