"""Times and errors of the ways.

Times are those of the processor, in one thread, so that the machine's other work counts less; the
ways take turns.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import aprillab as al

from .._rows import fill
from .ways import (
    COMPILED,
    KERNELS,
    WAYS,
    Task,
    Way,
    double_backward,
    forward_over_reverse,
    task_of,
    torchvision_vit,
    under,
    with_kernels,
)

SMALL: dict[str, Any] = {"depth": 4, "classes": 10, "seed": 0}
MODELS: dict[str, dict[str, Any]] = {
    "28×28 grey, patch 7, d = 128": {"image_size": 28, "patch_size": 7, "channels": 1, "width": 128, "heads": 4},
    **{
        f"32×32 colour, patch {patch}, d = {width}": {
            "image_size": 32, "patch_size": patch, "channels": 3, "width": width, "heads": width // 64,
        }
        for patch in (8, 4)
        for width in (192, 384)
    },
}  # fmt: skip
DIGITS = next(iter(MODELS))
SMALL_PATCHES = "32×32 colour, patch 4, d = 192"
TORCHVISION = f"torchvision, {SMALL_PATCHES}"
DTYPES = {"float32": torch.float32, "float64": torch.float64}


# --- Measurement --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A way on one model; ``ratio`` is to the first way of its section, model and dtype.

    Medians of the repetitions, also of their ratios. ``error`` is that of ∇D relative to double
    backward in float64, ``compile_seconds`` are the processor's, the C++ compiler's included.
    """

    section: str
    model: str
    dtype: str
    way: str
    milliseconds: float | None = None
    wall_milliseconds: float | None = None
    ratio: float | None = None
    error: float | None = None
    compile_seconds: float | None = None
    note: str = ""


def random_task(model: nn.Module, shape: tuple[int, ...], seed: int = 0) -> tuple[Task, Tensor]:
    """A task and a picture to evaluate it at, both normal."""
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    private, images = (torch.randn(shape, generator=generator, dtype=torch.float64).to(like) for _ in range(2))
    return task_of(model, private, torch.tensor([3])), images


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:240]}"


def compare(
    section: str, name: str, dtype: str, ways: dict[str, tuple[Way, Task]], images: Tensor, reference: Tensor,
    repetitions: int, compile_seconds: dict[str, float] | None = None,
) -> Iterator[Row]:  # fmt: skip
    """A row for each way, timed against the first; one that fails gives its error."""
    times: dict[str, list[tuple[float, float]]] = {}
    errors, notes = {}, {}
    for label, (way, task) in ways.items():  # also the warm-up
        try:
            gradient = way(task, images)[1].double()
            errors[label] = float((gradient - reference).norm() / reference.norm())
            times[label] = []
        except (RuntimeError, NotImplementedError) as error:
            notes[label] = first_line(error)
    for _ in range(repetitions):
        for label in times:
            way, task = ways[label]
            start, wall = time.process_time(), time.perf_counter()
            way(task, images)
            times[label].append((time.process_time() - start, time.perf_counter() - wall))
    first = next(iter(ways))
    for label in ways:
        if label in notes:
            yield Row(section, name, dtype, label, note=notes[label])
            continue
        pairs = zip(times[label], times[first], strict=True)
        yield Row(
            section, name, dtype, label,
            1e3 * statistics.median(cpu for cpu, _ in times[label]),
            1e3 * statistics.median(wall for _, wall in times[label]),
            statistics.median(mine[0] / base[0] for mine, base in pairs),
            errors[label],
            (compile_seconds or {}).get(label),
        )  # fmt: skip


def reference_of(model: nn.Module, images: Tensor) -> Tensor:
    """∇D by double backward in float64, of the model's weights as they are."""
    exact = copy.deepcopy(model).double()
    task, _ = random_task(exact, tuple(images.shape))
    with sdpa_kernel(SDPBackend.MATH):
        return double_backward(task, images.double())[1]


def build(name: str, dtype: str) -> tuple[nn.Module, tuple[int, ...]]:
    settings = MODELS[name]
    size = settings["image_size"]
    return al.VisionTransformer(**settings, **SMALL).to(DTYPES[dtype]), (1, settings["channels"], size, size)


def ways_rows(name: str, dtype: str, repetitions: int) -> Iterator[Row]:
    model, shape = build(name, dtype)
    task, images = random_task(model, shape)
    ways = {label: (way, task) for label, way in WAYS.items()}
    yield from compare("ways", name, dtype, ways, images, reference_of(model, images), repetitions)


def kernel_rows(name: str, dtype: str, repetitions: int) -> Iterator[Row]:
    """Spelled-out attention against PyTorch's kernels; torchvision's own ViT knows only kernels."""
    ways: dict[str, tuple[Way, Task]] = {}
    if name == TORCHVISION:
        model = torchvision_vit().to(DTYPES[dtype])
        with sdpa_kernel(SDPBackend.MATH):
            task, images = random_task(model, (1, 3, 32, 32))
        other, forward = task, {}
    else:
        model, shape = build(name, dtype)
        task, images = random_task(model, shape)
        other = Task(with_kernels(model), task.labels, task.targets)
        forward = {"forward over reverse, fused": (under("fused", forward_over_reverse), other)}
    for label, after in (("double backward", forward), ("one-sided difference", {})):
        if other is not task:
            ways[f"{label}, spelled out"] = (WAYS[label], task)
        ways |= {f"{label}, {kernel}": (under(kernel, WAYS[label]), other) for kernel in KERNELS} | after
    yield from compare("kernels", name, dtype, ways, images, reference_of(model, images), repetitions)


def processor_seconds() -> float:
    """Of this process and of the compilers it has started and waited for."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def compiled_rows(name: str, dtype: str, repetitions: int) -> Iterator[Row]:
    """Meant for a process of its own, with an empty cache: compilation is timed."""
    model, shape = build(name, dtype)
    task, images = random_task(model, shape)
    ways: dict[str, tuple[Way, Task]] = {"double backward": (double_backward, task)}
    seconds: dict[str, float] = {}
    failed = []
    for label, make in COMPILED.items():
        start = processor_seconds()
        try:
            way = make(task)
            way(task, images)
            ways[label] = (way, task)
            seconds[label] = processor_seconds() - start
        except Exception as error:  # a missing C++ compiler has an exception of its own
            failed.append(Row("compiled", name, dtype, label, note=first_line(error)))
    yield from compare("compiled", name, dtype, ways, images, reference_of(model, images), repetitions, seconds)
    yield from failed


def compiled_elsewhere(name: str, dtype: str, repetitions: int) -> list[Row]:
    """compiled_rows where the compiler's cache is empty and the compilers are its own children."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, "-m", "studies.derivatives", "--compiled", name, dtype, str(repetitions)]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


SECTIONS = {"ways": ways_rows, "kernels": kernel_rows, "compiled": compiled_elsewhere}


def measure_times(path: Path, repetitions: int, models: Sequence[str], compiled: bool) -> None:
    """derivatives.csv: a case is a section, model and dtype, whose ways take turns."""
    places = [("ways", name, dtype) for name in models for dtype in DTYPES]
    places += [("kernels", name, dtype) for dtype in DTYPES for name in (SMALL_PATCHES, TORCHVISION)]
    places += [("compiled", DIGITS, "float64")] if compiled else []

    def rows(place: tuple[str, str, str]) -> Iterable[Row]:
        section, name, dtype = place
        return SECTIONS[section](name, dtype, repetitions)

    fill(path, Row, places, rows, key=("section", "model", "dtype"), settings={"repetitions": repetitions})
