"""aprillab against the package breaching, on one model, update and machine: writes against_breaching.md.

breaching lives in an environment of its own (recipe: studies/README.md):

    python -m studies.against_breaching --python PATH/TO/ITS/bin/python

The victim's model and update go into plain files (safetensors, JSON). Every run, ours or theirs, is a process of its
own with one thread that reads them, attacks, and writes down when it made each evaluation and what its picture was.
Ours and theirs take turns. Only this file knows the private picture, and scores.

An evaluation is one gradient distance with its gradient to the picture, line searches included. breaching's are
counted by a hook on its objective. Both sides are told the label, except where the attack looks for it itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

import aprillab as al

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "data" / "results"
MODEL: dict[str, Any] = {
    "image_size": 28, "patch_size": 7, "channels": 1, "width": 128, "depth": 4, "heads": 4, "classes": 10, "seed": 0,
}  # fmt: skip
BAR = 30.0  # dB

# The digits are grey and breaching's total variation takes three channels, so it is off on both sides.
OURS: dict[str, al.Recipe] = {
    "april": al.RECIPES["april"],
    "inverting_gradients": replace(al.RECIPES["inverting_gradients"], priors=al.Priors()),
}
THEIRS: dict[str, tuple[str, list[str]]] = {  # preset, and what is changed in it
    "invertinggradients": ("invertinggradients", ["regularization=null"]),
    "invertinggradients, finite differences": (
        "invertinggradients",
        ["regularization=null", "objective.type=pearlmutter-cosine"],
    ),
    "deepleakage": ("deepleakage", []),
    "deepleakage, label known": ("deepleakage", ["attack_type=optimization"]),
    "deepleakage, label known, cosine": (
        "deepleakage",
        ["attack_type=optimization", "objective.type=cosine-similarity"],
    ),
}


@dataclass(frozen=True)
class Run:
    """One attack of one process."""

    side: str  # "aprillab" or "breaching"
    attack: str
    dtype: str
    digit: int
    evaluations: int
    cpu_rate: float  # evaluations per second of the processor, the first ten left out
    wall_rate: float
    psnr: float  # of the last picture, dB
    best_psnr: float  # of the best picture on the way, which an attacker could not pick
    cpu_to_bar: float  # seconds of the processor until a picture reached BAR; inf: never
    wall_to_bar: float
    cpu: float  # seconds of the processor in all


# --- One attack, in a process of its own --------------------------------------------------------------------------


class Diary:
    """When each evaluation was made, and of which picture; ends the attack when its time is up."""

    def __init__(self, seconds: float) -> None:  # of the processor
        self.seconds, self.cpu, self.wall = seconds, [0.0], [0.0]
        self.images: list[np.ndarray] = []
        self.done = False
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def enter(self, images: Tensor) -> None:
        self.cpu.append(time.process_time() - self._cpu)
        self.wall.append(time.perf_counter() - self._wall)
        self.images.append(images.detach()[0].float().numpy().copy())
        if self.cpu[-1] > self.seconds and not self.done:
            self.done = True
            raise KeyboardInterrupt

    def save(self, path: Path, final: Tensor) -> None:
        images = np.stack([*self.images, final.detach()[0].float().numpy()])
        np.savez(path, cpu=self.cpu[1:], wall=self.wall[1:], images=images)


def read_case(folder: Path) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The server's view: the model, the gradients by parameter name, the label."""
    model = al.VisionTransformer(**MODEL)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return (
        model,
        load_file(folder / "update.safetensors"),
        torch.tensor(json.loads((folder / "label.json").read_text())),
    )


def attack_with_ours(folder: Path, name: str, dtype: str, seconds: float, iterations: int) -> tuple[Diary, Tensor]:
    model, gradients, labels = read_case(folder)
    update = al.ClientUpdate(gradients=gradients)
    al.dissect(model)  # imports the model libraries it knows; breaching's imports are not counted either
    diary = Diary(seconds)
    found = al.match_gradients(
        model, update, recipe=OURS[name], labels=labels, dtype=getattr(torch, dtype), max_evaluations=iterations,
        progress=False, callback=lambda _, images: diary.enter(images),
    )  # fmt: skip
    return diary, found.images


def attack_with_theirs(folder: Path, name: str, dtype: str, seconds: float, iterations: int) -> tuple[Diary, Tensor]:
    import breaching
    from omegaconf import OmegaConf

    model, gradients, labels = read_case(folder)
    model = model.to(getattr(torch, dtype)).eval()
    preset, changes = THEIRS[name]
    short = {"float32": "float", "float64": "double"}[dtype]
    config = breaching.get_attack_config(
        preset, overrides=[*changes, f"impl.dtype={short}", f"optim.max_iterations={iterations}"]
    )
    attacker = breaching.attacks.prepare_attack(
        model, nn.CrossEntropyLoss(), config, {"device": torch.device("cpu"), "dtype": getattr(torch, dtype)}
    )
    shape = [MODEL["channels"], MODEL["image_size"], MODEL["image_size"]]
    data = {"shape": shape, "mean": [0.5] * shape[0], "std": [0.5] * shape[0], "classes": MODEL["classes"]}
    payload = {
        "parameters": [p.detach() for p in model.parameters()],
        "buffers": [b.detach() for b in model.buffers()],
        "metadata": OmegaConf.create({**data, "modality": "vision", "task": "classification"}),
    }
    joint = config.attack_type == "joint-optimization"
    shared = {
        "gradients": [gradients[key] for key, _ in model.named_parameters()],
        "buffers": None,
        "metadata": {
            "num_data_points": 1,
            "labels": None if joint else labels,
            "local_hyperparams": None,
            "data_key": "inputs",
        },
    }
    torch.manual_seed(0)  # it draws its first picture from the global generator
    diary = Diary(seconds)
    # A forward hook sees (model, gradients, candidate, labels) of every evaluation.
    attacker.objective.register_forward_hook(lambda module, inputs, output: diary.enter(inputs[2]))
    found, _ = attacker.reconstruct([payload], [shared], {}, dryrun=False)
    return diary, found["data"]


SIDES: dict[str, Callable[[Path, str, str, float, int], tuple[Diary, Tensor]]] = {
    "aprillab": attack_with_ours,
    "breaching": attack_with_theirs,
}


def worker(job: dict[str, Any]) -> None:
    """One attack; its diary goes to ``job["out"]``, versions to standard output's last line."""
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # PyTorch's first optimizer imports its compiler: seconds
    arguments = (Path(job["folder"]), job["attack"], job["dtype"], job["seconds"], job["iterations"])
    diary, final = SIDES[job["side"]](*arguments)
    diary.save(Path(job["out"]), final)
    packages = ("torch", "torchvision", "breaching" if job["side"] == "breaching" else "numpy")
    print(json.dumps({name: importlib.metadata.version(name) for name in packages}))


# --- Both sides in turn -------------------------------------------------------------------------------------------


def write_case(folder: Path, digit: int, gradient_dtype: torch.dtype) -> Tensor:
    """Write a client's update on one digit; returns its private pixels (1, 28, 28), which are not written."""
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


class WorkerError(Exception):
    """An attack's process failed; the message ends with the error's last line."""


class Arena:
    """Starts the processes, one at a time, and scores them."""

    def __init__(self, python: str, folder: Path) -> None:
        self.pythons = {"aprillab": sys.executable, "breaching": python}
        self.folder = folder
        self.private: dict[int, Tensor] = {}
        self.versions: dict[str, str] = {}

    def case(self, digit: int) -> Path:
        path = self.folder / f"digit{digit}"
        if digit not in self.private:
            self.private[digit] = write_case(path, digit, torch.float64)
        return path

    def run(self, side: str, attack: str, dtype: str, digit: int, seconds: float, iterations: int) -> Run:
        out = self.folder / "diary.npz"
        out.unlink(missing_ok=True)
        job = {
            "side": side, "attack": attack, "dtype": dtype, "folder": str(self.case(digit)), "seconds": seconds,
            "iterations": iterations, "out": str(out),
        }  # fmt: skip
        command = [self.pythons[side], "-m", "studies.against_breaching", "--worker", json.dumps(job)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise WorkerError(f"{side}, {attack}, {dtype} failed:\n{done.stderr[-3000:].strip()}")
        self.versions |= json.loads(done.stdout.splitlines()[-1])
        return score(np.load(out), self.private[digit], side, attack, dtype, digit)


def score(diary: Any, private: Tensor, side: str, attack: str, dtype: str, digit: int) -> Run:
    """Rates and PSNR of a diary; private pixels (C, H, W)."""
    cpu, wall = diary["cpu"], diary["wall"]
    pixels = np.clip(diary["images"].astype(np.float64) * 0.5 + 0.5, 0, 1)  # al.HALF
    error = ((pixels - private.numpy()[None]) ** 2).mean((1, 2, 3))
    psnr = -10 * np.log10(np.maximum(error, 1e-30))
    reached = np.flatnonzero(psnr[:-1] >= BAR)  # the last picture is the result, which has no time of its own
    first = min(10, len(cpu) - 2)
    return Run(
        side, attack, dtype, digit, len(cpu),
        (len(cpu) - 1 - first) / (cpu[-1] - cpu[first]), (len(cpu) - 1 - first) / (wall[-1] - wall[first]),
        float(psnr[-1]), float(psnr.max()),
        float(cpu[reached[0]]) if len(reached) else math.inf, float(wall[reached[0]]) if len(reached) else math.inf,
        float(cpu[-1]),
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


def rates(arena: Arena, rounds: int, seconds: float) -> tuple[dict[Key, list[Run]], dict[Key, str]]:
    """All attacks of RATES for some seconds each, in turn; and the error of those that fail."""
    runs: dict[Key, list[Run]] = {}
    failed: dict[Key, str] = {}
    for _ in tqdm(range(rounds), desc="rounds"):
        for key in RATES:
            if key in failed:
                continue
            try:
                run = arena.run(*key, digit=5, seconds=seconds, iterations=100_000)
            except WorkerError as error:
                failed[key] = str(error).splitlines()[-1]
                continue
            runs.setdefault(key, []).append(run)
    return runs, failed


def races(arena: Arena, digits: tuple[int, ...], seconds: float, found: dict[Key, list[Run]]) -> list[Run]:
    """All attacks of RACES on every digit, with a schedule that ends a little before the time does."""
    runs = []
    for digit in digits:
        for side, attack, dtype in tqdm(RACES, desc=f"digit {digit}"):
            rate = [run.cpu_rate for run in found.get((side, attack, dtype), [])]
            iterations = int(0.9 * seconds * statistics.median(rate)) if rate else 100_000
            iterations = 100_000 if side == "aprillab" else iterations
            runs.append(arena.run(side, attack, dtype, digit, seconds, iterations))
    return runs


def report(
    found: dict[Key, list[Run]], failed: dict[Key, str], raced: list[Run], versions: dict[str, str], seconds: float
) -> str:
    rate = {key: statistics.median(r.cpu_rate for r in runs) for key, runs in found.items()}
    wall = {key: statistics.median(r.wall_rate for r in runs) for key, runs in found.items()}
    base = {d: rate["breaching", "invertinggradients", d] for d in ("float32", "float64")}
    lines = [
        "| package | attack | dtype | evaluations per processor second | per second of the clock | "
        "against breaching's invertinggradients, same dtype |",
        "|---|---|---|---|---|---|",
    ]
    for key in RATES:
        if key in found:
            result = f"{rate[key]:.1f} | {wall[key]:.1f} | {rate[key] / base[key[2]]:.2f}"
        else:
            result = f"fails | – | `{failed[key]}`"
        lines.append(f"| {' | '.join(key)} | {result} |")
    race = [
        "| digit | package | attack | dtype | evaluations | processor s | PSNR of the result, dB | best on the way | "
        f"processor s to {BAR:.0f} dB | clock s to {BAR:.0f} dB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in raced:
        to_bar = ["never" if math.isinf(t) else f"{t:.1f}" for t in (r.cpu_to_bar, r.wall_to_bar)]
        race.append(
            f"| {r.digit} | {r.side} | {r.attack} | {r.dtype} | {r.evaluations} | {r.cpu:.0f} | {r.psnr:.1f} | "
            f"{r.best_psnr:.1f} | {' | '.join(to_bar)} |"
        )
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    changed = "; ".join(f"{name}: `{' '.join(changes)}`" for name, (_, changes) in THEIRS.items() if changes)
    rounds = max(len(runs) for runs in found.values())
    return f"""# aprillab and breaching on the same update

aprillab {al.__version__}, {named}, Python {platform.python_version()}, {platform.machine()}, one thread on a shared
machine. Made by `python -m studies.against_breaching` (recipe: studies/README.md), which says how.

One MNIST-5k digit at a time, 28×28, our ViT with patch 7, d = 128, 4 blocks, random weights, float64 gradients; the
dtype in the tables is the one matched in. breaching's presets with these changes: {changed}. Total variation is off
on both sides: breaching's takes three channels and the digits are grey.

## In short

{chr(10).join(verdicts(rate, raced, seconds))}

## Evaluations per second

Medians of {rounds} rounds in which all take turns. inverting_gradients and invertinggradients are the same objective
and optimizer; april does more in an evaluation (every tensor's own scale, the α term, L-BFGS with 100 pairs).

{chr(10).join(lines)}

## Time to {BAR:.0f} dB

At most {seconds:.0f} s of the processor each; breaching's step-size schedule ends after 90 % of them at the measured
rate. Time is counted until the first picture of {BAR:.0f} dB on the way, which an attacker would not know.
breaching's L-BFGS is PyTorch's without a line search; a run ends early where its loss is not finite.

{chr(10).join(race)}
"""


def verdicts(rate: dict[Key, float], raced: list[Run], seconds: float) -> list[str]:
    """What the tables say about the two goals."""
    lines = []
    for dtype in ("float32", "float64"):
        ratio = rate["aprillab", "inverting_gradients", dtype] / rate["breaching", "invertinggradients", dtype]
        lines.append(
            f"- Evaluations per second with the same objective and optimizer, {dtype}: {ratio:.2f} times "
            f"breaching's; the goal of 1.5 is {'met' if ratio >= 1.5 else 'missed'}."
        )
    for digit in dict.fromkeys(r.digit for r in raced):
        ours = min(r.cpu_to_bar for r in raced if r.digit == digit and r.side == "aprillab")
        theirs = [r for r in raced if r.digit == digit and r.side == "breaching"]
        best = min(theirs, key=lambda r: (r.cpu_to_bar, -r.best_psnr))
        if math.isinf(ours):
            lines.append(f"- Digit {digit}: ours did not reach {BAR:.0f} dB in {seconds:.0f} s of the processor.")
            continue
        line = f"- Digit {digit}: ours reaches {BAR:.0f} dB after {ours:.1f} s of the processor, "
        if math.isinf(best.cpu_to_bar):
            line += (
                f"none of breaching's attacks in the {max(r.cpu for r in theirs):.0f} s they had (the best picture, "
                f"{best.attack} in {best.dtype}, {best.best_psnr:.1f} dB): more than "
                f"{max(r.cpu for r in theirs) / ours:.1f} times as long. The goal is 10."
            )
        else:
            line += (
                f"breaching's fastest ({best.attack}, {best.dtype}) after {best.cpu_to_bar:.1f} s: "
                f"{best.cpu_to_bar / ours:.1f} times as long. The goal is 10."
            )
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="the Python of an environment with breaching")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate-seconds", type=float, default=8.0)
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="of the processor, for each attack in the race to 30 dB"
    )
    parser.add_argument("--digits", type=int, nargs="+", default=[5, 3])
    parser.add_argument("--worker", metavar="JOB", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker))
        return
    if not arguments.python:
        parser.error("--python is needed: the Python of an environment with breaching (see studies/README.md)")
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(arguments.python, Path(folder))
        found, failed = rates(arena, arguments.rounds, arguments.rate_seconds)
        raced = races(arena, tuple(arguments.digits), arguments.seconds, found)
        text = report(found, failed, raced, arena.versions, arguments.seconds)
    print(text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "against_breaching.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
