"""One attack of ours or of breaching, in a process of its own: `python -m
studies.against_breaching.worker JOB`.

It may run in breaching's environment, so it imports no more than that one has. The victim's model
and update come as plain files (safetensors, JSON); what goes out is a diary: when each evaluation
was made, and of which picture.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import aprillab as al

MODEL: dict[str, Any] = {
    "image_size": 28, "patch_size": 7, "channels": 1, "width": 128, "depth": 4, "heads": 4, "classes": 10, "seed": 0,
}  # fmt: skip

# The digits are grey and breaching's total variation takes three channels, so it is off on both
# sides.
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


def attack_with_ours(
    folder: Path, name: str, dtype: str, seconds: float, iterations: int | None
) -> tuple[Diary, Tensor]:
    """Ours, for so many evaluations; None is the function's own default."""
    model, gradients, labels = read_case(folder)
    update = al.ClientUpdate(gradients=gradients)
    al.dissect(model)  # imports the model libraries it knows; breaching's imports are not counted either
    diary = Diary(seconds)
    found = al.match_gradients(
        model, update, recipe=OURS[name], labels=labels, dtype=getattr(torch, dtype), progress=False,
        callback=lambda _, images: diary.enter(images), **({"max_evaluations": iterations} if iterations else {}),
    )  # fmt: skip
    return diary, found.images


def attack_with_theirs(
    folder: Path, name: str, dtype: str, seconds: float, iterations: int | None
) -> tuple[Diary, Tensor]:
    """breaching's, for so many iterations; None is the preset's own number."""
    import breaching
    from omegaconf import OmegaConf

    model, gradients, labels = read_case(folder)
    model = model.to(getattr(torch, dtype)).eval()
    preset, changes = THEIRS[name]
    short = {"float32": "float", "float64": "double"}[dtype]
    budget = [f"optim.max_iterations={iterations}"] if iterations else []
    config = breaching.get_attack_config(preset, overrides=[*changes, f"impl.dtype={short}", *budget])
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


SIDES: dict[str, Callable[[Path, str, str, float, int | None], tuple[Diary, Tensor]]] = {
    "aprillab": attack_with_ours,
    "breaching": attack_with_theirs,
}


def worker(job: dict[str, Any]) -> None:
    """One attack; its diary goes to ``job["out"]``, its version to standard output's last line."""
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # PyTorch's first optimizer imports its compiler: seconds
    arguments = (Path(job["folder"]), job["attack"], job["dtype"], job["seconds"], job["iterations"])
    diary, final = SIDES[job["side"]](*arguments)
    diary.save(Path(job["out"]), final)
    print(al.__version__ if job["side"] == "aprillab" else importlib.metadata.version("breaching"))


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
