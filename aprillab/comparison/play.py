"""One case played: the client, an attack on what it shares, and the scores."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import dissect
from ..attacks.catalogue import ATTACKS
from ..attacks.result import AttackNotApplicable, Reconstruction
from ..attacks.searches.match import match_gradients
from ..attacks.searches.recipes import Recipe
from ..metrics import match_batch, psnr, ssim
from ..models import VisionTransformer
from ..preprocessing import Preprocessing
from ..update import ClientUpdate, UpdateError, client_update, logits_of
from ..version import __version__
from ..zoo import build_model
from .cases import DTYPES, Case, CompareError, is_file, private_pictures
from .parallel import Failure, attempt
from .records import CaseOutcome, Point, Row


@dataclass(frozen=True)
class Client:
    """The private pictures (B, C, H, W), pixels in float64 on the CPU, and what is shared of them."""

    pixels: Tensor
    labels: Tensor
    model: nn.Module
    preprocessing: Preprocessing
    update: ClientUpdate
    weights_sha256: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def build_for(case: Case) -> nn.Module:
    """The model of a case."""
    return build_model(
        case.model, image_size=case.image_size, patch_size=case.patch_size, width=case.width, depth=case.depth,
        heads=case.heads, mlp_ratio=case.mlp_ratio, channels=case.channels, classes=case.classes,
        position=case.position, weights=case.weights_file, dtype=DTYPES[case.dtype], seed=case.seed,
    )  # fmt: skip


def digest_of(file: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


@functools.cache
def warm_up() -> None:
    """The first search of a process spends seconds on imports, which belong to no attack."""
    model = VisionTransformer(image_size=4, patch_size=2, width=4, depth=1, heads=1, classes=2)
    update = client_update(model, torch.ones(1, 3, 4, 4), torch.tensor([0]))
    match_gradients(model, update, recipe=Recipe(), max_evaluations=2, progress=False)


def play_client(case: Case, device: torch.device) -> Client:
    """Be the client of a case: build its model, compute the gradient of its pictures."""
    pixels, labels = private_pictures(case)
    model = build_for(case).to(device)
    preprocessing = dissect(model).preprocessing
    images = preprocessing.to_input(pixels.to(device, DTYPES[case.dtype]))  # (B, C, H, W)
    logits_of(model, images)  # the first pass pays for set-up
    update = client_update(model, images, labels.to(device))
    digest = digest_of(case.weights_file) if case.weights_file else ""
    return Client(pixels, labels, model, preprocessing, update, digest)


@dataclass(frozen=True)
class Played:
    """What became of a case: its row, the search's points, and, unless it was refused, its
    pictures.

    ``pictures`` are the reconstructions (B, C, H, W) in the victims' order, and their PSNR in dB,
    (B,).
    """

    row: Row
    points: list[Point]
    pictures: tuple[Tensor, Tensor] | None


def play_attack(
    case: Case, client: Client, *, max_evaluations: int, max_seconds: float | None, curve_every: int
) -> Played:
    """Let a case's attack have the client's update, and score what it returns."""
    watch = _Watch(case, client, curve_every)
    known = {"case": case, "max_evaluations": max_evaluations, "max_seconds": max_seconds, **_provenance(client)}
    start = time.perf_counter()
    try:
        found = _attack(case, client, watch, max_evaluations, max_seconds)
    except (AttackNotApplicable, UpdateError) as refusal:
        seconds = time.perf_counter() - start
        outcome = CaseOutcome("refused", _in_one_line(str(getattr(refusal, "reason", refusal))))
        return Played(Row(seconds=seconds, outcome=outcome, **known), watch.points, None)
    facts, seconds = found.diagnostics, found.seconds - watch.seconds
    pixels, decibels = _assigned(found.pixels, client.pixels)
    row = Row(
        psnr=float(decibels.mean()),
        psnr_min=float(decibels.min()),
        ssim=float(torch.as_tensor(ssim(pixels, client.pixels)).mean()),
        exact=found.exact,
        predicted_psnr=found.predicted_psnr,
        loss=facts.get("loss"),
        residual=facts.get("residual"),
        evaluations=facts.get("evaluations"),
        seconds=seconds,
        stopped=facts.get("stopped", ""),
        outcome=CaseOutcome("exact" if found.exact else "not exact", _in_one_line(found.reason)),
        **known,
    )
    if watch.points:
        watch.add(facts["evaluations"], seconds, facts["loss"], float(decibels.mean()))
    return Played(row, watch.points, (pixels, decibels))


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


# --- All attacks on one update, in a worker -----------------------------------------------------------------------


def files_of(case: Case) -> dict[str, str]:
    """The user's files that a case reads, and the digests of what is in them."""
    files = [case.weights_file, *(Path(name) for name in case.victims if is_file(name))]
    return {str(file): digest_of(file) for file in files if file}


def play_group(
    task: tuple[Sequence[Case], Mapping[str, str]], *, device: str, **budget: Any
) -> tuple[Tensor, list[Played | Failure]]:
    """The private pixels (B, C, H, W) of one update's cases, and what became of each.

    ``task`` is the cases and the digests of their files, which must be the same here; ``budget`` is
    that of :func:`play_attack`. A search that is interrupted ends the group.

    Raises
    ------
    CompareError
        If a file is not here, or another one.
    """
    cases, files = task
    for name, digest in files.items():
        if not Path(name).is_file() or digest_of(Path(name)) != digest:
            state = "another file" if Path(name).is_file() else "not there"
            raise CompareError(
                f"{name} is {state} on a worker, which is in {Path.cwd()}: weights and pictures must lie under the "
                "same paths on all workers; give whole paths where the folders differ"
            )
    if any(ATTACKS[case.attack].searches for case in cases):
        warm_up()
    client = play_client(cases[0], torch.device(device))
    return client.pixels, [attempt(play_attack, case, client, **budget) for case in cases]


# --- The attack ---------------------------------------------------------------------------------------------------


def _attack(
    case: Case, client: Client, watch: _Watch, max_evaluations: int, max_seconds: float | None
) -> Reconstruction:
    """What the attack returns. A search that the user interrupts returns its best, which counts for
    nothing here.
    """
    attack = ATTACKS[case.attack]
    labels = client.labels.to(client.device) if case.labels == "given" else None
    options: dict[str, Any] = {"labels": labels}
    if attack.searches:  # a closed form has no use for a seed, a budget or a callback
        options |= {"seed": case.seed, "max_evaluations": max_evaluations, "max_seconds": max_seconds}
        options |= {"callback": watch, "progress": False}
    found = attack.function(client.model, client.update, **options)
    if found.diagnostics.get("stopped") == "interrupted":
        raise KeyboardInterrupt
    return found


@dataclass
class _Watch:
    """A callback that scores a search on its way, and keeps apart the seconds that this takes."""

    case: Case
    client: Client
    every: int
    calls: int = 0
    restart: int = 0
    loss: float = math.inf
    seconds: float = 0.0
    points: list[Point] = field(default_factory=list)

    def __call__(self, entry: dict[str, Any], images: Tensor) -> None:
        start = time.perf_counter()
        # The pictures are the best of the restart that runs, so the loss is too.
        self.loss = entry["loss"] if entry["restart"] != self.restart else min(self.loss, entry["loss"])
        self.restart = entry["restart"]
        if self.calls % self.every == 0:
            decibels = _assigned(self.client.preprocessing.to_pixels(images), self.client.pixels)[1].mean()
            self.add(entry["evaluation"], entry["seconds"] - self.seconds, self.loss, float(decibels))
        self.calls += 1
        self.seconds += time.perf_counter() - start

    def add(self, evaluation: int, seconds: float, loss: float, decibels: float) -> None:
        """Keep a point of the curve."""
        case = self.case
        self.points.append(Point(case.update, case.attack, case.labels, evaluation, seconds, loss, decibels))


def _assigned(pixels: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstructions in the order of the originals, (B, C, H, W) float64 on the CPU, and their
    PSNR in dB, (B,).
    """
    pixels = pixels.detach().to(originals)
    pixels = pixels.expand_as(originals) if len(pixels) == 1 else pixels[match_batch(pixels, originals)]
    return pixels, torch.as_tensor(psnr(pixels, originals))


def _provenance(client: Client) -> dict[str, Any]:
    """The columns of a row that tell where it comes from."""
    device = client.device
    return {
        "gradient_seconds": client.update.seconds or 0.0,
        "weights_sha256": client.weights_sha256,
        "aprillab": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
    }
