"""Both sides in turn: their processes are started one at a time, and scored.

Only this file knows the private picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import aprillab as al

from .._rows import fill
from .worker import MODEL

ROOT = Path(__file__).parent.parent.parent
BAR = 30.0  # dB: a digit is there, a few grey levels off


@dataclass(frozen=True)
class Run:
    """One attack of one process; ``part`` is "rate", in rounds, or "race", to BAR.

    Rates are evaluations per second of the processor or the clock, the first ten left out. ``psnr``
    is that of the last picture, ``best_psnr`` of the best on the way, which an attacker could not
    pick. ``cpu_to_bar`` and ``wall_to_bar`` are seconds until a picture reached BAR, inf if none
    did; ``cpu`` are the processor's in all. ``version`` is the package's.
    """

    part: str
    round: int
    digit: int
    side: str
    attack: str
    dtype: str
    evaluations: int | None = None
    cpu_rate: float | None = None
    wall_rate: float | None = None
    psnr: float | None = None
    best_psnr: float | None = None
    cpu_to_bar: float | None = None
    wall_to_bar: float | None = None
    cpu: float | None = None
    version: str = ""
    error: str = ""


class Place(NamedTuple):
    """A run's values in the columns that tell runs apart."""

    part: str
    round: int
    digit: int
    side: str
    attack: str
    dtype: str


def write_case(folder: Path, digit: int, gradient_dtype: torch.dtype) -> Tensor:
    """Write an update on one digit; returns its private pixels (1, 28, 28), not written."""
    images, labels = al.mnist5k(dtype=torch.float64)
    chosen = (labels == digit).nonzero()[7]
    model = al.VisionTransformer(**MODEL).to(gradient_dtype)
    update = al.client_update(model, al.HALF.to_input(images[chosen]).to(gradient_dtype), labels[chosen])
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.float() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    save_file(
        {key: g.clone(memory_format=torch.contiguous_format) for key, g in update.gradients.items()},
        folder / "update.safetensors",
    )
    (folder / "label.json").write_text(json.dumps(labels[chosen].tolist()))
    return images[chosen][0]


class Arena:
    """Starts the processes, one at a time, and scores them."""

    def __init__(self, python: str, folder: Path) -> None:
        self.pythons = {"aprillab": sys.executable, "breaching": python}
        self.folder = folder
        self.private: dict[int, Tensor] = {}

    def case(self, digit: int) -> Path:
        path = self.folder / f"digit{digit}"
        if digit not in self.private:
            self.private[digit] = write_case(path, digit, torch.float64)
        return path

    def play(self, place: Place, seconds: float, iterations: int | None) -> list[Run]:
        """One run; of one that fails, the error's last line. None is each package's own budget."""
        out = self.folder / "diary.npz"
        out.unlink(missing_ok=True)
        job = {
            "side": place.side, "attack": place.attack, "dtype": place.dtype, "seconds": seconds,
            "folder": str(self.case(place.digit)), "iterations": iterations, "out": str(out),
        }  # fmt: skip
        command = [self.pythons[place.side], "-m", "studies.against_breaching.worker", json.dumps(job)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            return [Run(*place, error=done.stderr.strip().splitlines()[-1])]
        scored = score(np.load(out), self.private[place.digit], place)
        return [replace(scored, version=done.stdout.splitlines()[-1])]


def score(diary: Any, private: Tensor, place: Place) -> Run:
    """Rates and PSNR of a diary; private pixels (C, H, W)."""
    cpu, wall = diary["cpu"], diary["wall"]
    pixels = np.clip(diary["images"].astype(np.float64) * 0.5 + 0.5, 0, 1)  # al.HALF
    error = ((pixels - private.numpy()[None]) ** 2).mean((1, 2, 3))
    psnr = -10 * np.log10(np.maximum(error, 1e-30))
    reached = np.flatnonzero(psnr[:-1] >= BAR)  # the last picture is the result, which has no time of its own
    first = min(10, len(cpu) - 2)
    return Run(
        *place, evaluations=len(cpu), psnr=float(psnr[-1]), best_psnr=float(psnr.max()),
        cpu_rate=(len(cpu) - 1 - first) / (cpu[-1] - cpu[first]),
        wall_rate=(len(cpu) - 1 - first) / (wall[-1] - wall[first]),
        cpu_to_bar=float(cpu[reached[0]]) if len(reached) else math.inf,
        wall_to_bar=float(wall[reached[0]]) if len(reached) else math.inf, cpu=float(cpu[-1]),
    )  # fmt: skip


Key = tuple[str, str, str]  # side, attack, dtype
RATES: tuple[Key, ...] = (
    ("aprillab", "inverting_gradients", "float32"),
    ("breaching", "invertinggradients", "float32"),
    ("breaching", "invertinggradients, finite differences", "float32"),
    ("aprillab", "inverting_gradients", "float64"),
    ("breaching", "invertinggradients", "float64"),
    ("aprillab", "april", "float64"),
    ("breaching", "deepleakage, label known", "float64"),
)
RACES: tuple[Key, ...] = (
    ("aprillab", "april", "float64"),
    ("breaching", "invertinggradients", "float64"),
    ("breaching", "deepleakage", "float64"),
    ("breaching", "deepleakage, label known", "float64"),
    ("breaching", "deepleakage, label known, cosine", "float64"),
)
ENDLESS = 100_000  # iterations: more than any budget of seconds allows


def measure(folder: Path, options: argparse.Namespace) -> None:
    """All attacks of RATES in turn, round by round; then those of RACES on every digit."""
    path = folder / "against_breaching.csv"
    settings = {"rate_seconds": options.rate_seconds, "seconds": options.seconds}
    filled = partial(fill, path, Run, key=Place._fields, settings=settings)
    with tempfile.TemporaryDirectory() as nowhere:
        arena = Arena(options.python, Path(nowhere))
        rates = [Place("rate", number, 5, *key) for number, key in itertools.product(range(options.rounds), RATES)]
        filled(rates, lambda place: arena.play(place, options.rate_seconds, ENDLESS))
        races = [Place("race", 0, digit, *key) for digit, key in itertools.product(options.digits, RACES)]
        filled(races, lambda place: arena.play(place, options.seconds, None))
