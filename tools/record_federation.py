"""Record the federation that chapter 09 reads: python tools/record_federation.py

Three clients, three rounds, real processes; then data/federation has the recording and its log.
Needs Flower: pip install -e ".[federation]".
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

from aprillab.federation import LocalTraining
from aprillab.federation.running import LOG, run_course

HERE = Path(__file__).resolve().parents[1]
FOLDER = HERE / "data" / "federation"

#: A small ViT: n + 1 ≤ d, so that every update shows whether it is of one image.
MODEL = {"image-size": 32, "patch-size": 8, "width": 64, "depth": 1, "heads": 4, "classes": 10}
#: So slow that all five steps of the second client count: their gradients have norms of 43, 31,
#: 6.3, 3.2 and 1.4.
TOLD = LocalTraining(learning_rate=0.003)
NODES = [
    {"name": "one-step", "victims": "astronaut"},
    {"name": "momentum", "victims": "grace_hopper", "local-steps": 5, "momentum": 0.9},
    {"name": "batch", "victims": "coffee,rocket,chelsea,retina,camera,hubble_deep_field,coins,cell"},
]
ROUNDS = 3


def main() -> None:
    """Run it, and put the recording in its place once it is whole."""
    with tempfile.TemporaryDirectory(prefix="aprillab-recording-") as name:
        made = Path(name) / "recording"
        recording = run_course(made, NODES, rounds=ROUNDS, how=TOLD, model=MODEL)
        if recording.faults or len(recording.replies) != ROUNDS * len(NODES):
            sys.exit(f"not every reply came: {recording.faults}")
        log = made / LOG
        words = log.read_text(encoding="utf-8").replace(str(made), "recording")
        log.write_text(re.sub(r"\S*/aprillab-[^/\s]*/apps", "FLWR_HOME/apps", words), encoding="utf-8")
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(made, FOLDER)
    for path in FOLDER.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    print(f"{FOLDER}: {len(recording.replies)} replies, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
