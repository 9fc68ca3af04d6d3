"""Ways to the gradient of gradient matching: `python -m studies.derivatives` writes derivatives.csv and .md.

One evaluation is the distance D(x) = Σ ‖∇w l(x, w) − g‖² over all parameters with its gradient to the picture,
∇D = Jᵀ u, where u = 2 (∇w l − g) and J = ∂(∇w l)/∂x. Every way below gives both:

- double backward: ∇w with its graph, and backward through that; what the package does;
- forward over reverse: second derivatives commute, so Jᵀ u = d/dε ∇x l(x, w + ε u) at ε = 0. The parameters carry u
  as the tangent of dual numbers through an ordinary ∇x;
- reverse over forward: Jᵀ u = ∇x (d/dε l(x, w + ε u)), the two the other way round, through torch.func;
- one-sided difference: the same derivative as (∇x l(x, w + h u) − ∇x l(x, w)) / h, whose second term falls out of
  the backward pass that yields ∇w: two plain backward passes, which any attention kernel allows;
- central difference: between w + h u and w − h u, three passes;
- torch.func: grad of grad;
- compiled: torch.func's grad of grad, and the one-sided difference, through torch.compile.

Times are those of the processor, in one thread, so that the machine's other work counts less; the ways take turns.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm.auto import tqdm

import aprillab as al
from aprillab.attacks.searches import problem, search
from aprillab.models import Attention

RESULTS = Path(__file__).parent.parent / "data" / "results"
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
DTYPES = {"float32": torch.float32, "float64": torch.float64}


# --- What is evaluated, and the ways to do it -------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A model, what the client shared, and the label: all that an evaluation needs but the picture."""

    model: nn.Module
    labels: Tensor
    targets: tuple[Tensor, ...]  # in the order of the model's parameters

    @property
    def parameters(self) -> dict[str, Tensor]:
        """By name, detached."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def loss(self, images: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        logits = self.model(images) if parameters is None else functional_call(self.model, parameters, (images,))
        return cross_entropy(logits, self.labels)

    def gradients(self, images: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(images), list(self.model.parameters()), create_graph=create_graph)


Evaluation = tuple[Tensor, Tensor]  # D and ∇D
Way = Callable[[Task, Tensor], Evaluation]


def task_of(model: nn.Module, private: Tensor, labels: Tensor) -> Task:
    """What is left of a client's private images (B, C, H, W) once it has shared their gradient."""
    task = Task(model, labels, ())
    return Task(model, labels, task.gradients(private))


def _distance(gradients: tuple[Tensor, ...] | list[Tensor], targets: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(g - t).square().sum() for g, t in zip(gradients, targets, strict=True)]).sum()


def _direction(gradients: tuple[Tensor, ...] | list[Tensor], targets: tuple[Tensor, ...]) -> list[Tensor]:
    """u, the gradient of D with respect to the gradients."""
    return list(torch._foreach_mul(torch._foreach_sub(list(gradients), list(targets)), 2.0))


def double_backward(task: Task, images: Tensor) -> Evaluation:
    images = images.detach().requires_grad_()
    distance = _distance(task.gradients(images, create_graph=True), task.targets)
    return distance.detach(), torch.autograd.grad(distance, images)[0]


def forward_over_reverse(task: Task, images: Tensor) -> Evaluation:
    gradients = task.gradients(images)
    u = _direction(gradients, task.targets)
    images = images.detach().requires_grad_()
    with forward_ad.dual_level():
        dual = {
            name: forward_ad.make_dual(p, tangent)
            for (name, p), tangent in zip(task.parameters.items(), u, strict=True)
        }
        to_images = torch.autograd.grad(task.loss(images, dual), images)[0]
        return _distance(gradients, task.targets), forward_ad.unpack_dual(to_images).tangent


def reverse_over_forward(task: Task, images: Tensor) -> Evaluation:
    gradients = task.gradients(images)
    parameters = task.parameters
    u = dict(zip(parameters, _direction(gradients, task.targets), strict=True))

    def slope(images: Tensor) -> Tensor:
        return jvp(lambda w: task.loss(images, w), (parameters,), (u,))[1]

    return _distance(gradients, task.targets), grad(slope)(images)


def one_sided_difference(task: Task, images: Tensor) -> Evaluation:
    images = images.detach().requires_grad_()
    *gradients, here = torch.autograd.grad(task.loss(images), [*task.model.parameters(), images])
    u = _direction(gradients, task.targets)
    h = _step(u)
    return _distance(gradients, task.targets), (_to_images(task, images, u, h) - here) / h


def central_difference(task: Task, images: Tensor) -> Evaluation:
    images = images.detach().requires_grad_()
    gradients = task.gradients(images)
    u = _direction(gradients, task.targets)
    h = _step(u)
    ahead, behind = (_to_images(task, images, u, step) for step in (h, -h))
    return _distance(gradients, task.targets), (ahead - behind) / (2 * h)


def _step(u: list[Tensor]) -> float:
    """h, such that the step h u has length √ε: rounding grows as 1/h, the neglected curvature as h."""
    length = float(torch.stack([t.norm() for t in u]).norm())
    return math.sqrt(torch.finfo(u[0].dtype).eps) / max(length, torch.finfo(u[0].dtype).tiny ** 0.5)


def _to_images(task: Task, images: Tensor, u: list[Tensor], h: float) -> Tensor:
    """∇x l(x, w + h u)."""
    parameters = task.parameters
    moved = torch._foreach_add(list(parameters.values()), u, alpha=h)
    return torch.autograd.grad(task.loss(images, dict(zip(parameters, moved, strict=True))), images)[0]


def grad_of_grad(task: Task, images: Tensor) -> Evaluation:
    return _grad_of_grad(task, images, task.parameters, task.targets)


def _grad_of_grad(
    task: Task, images: Tensor, parameters: dict[str, Tensor], targets: tuple[Tensor, ...]
) -> Evaluation:
    def distance(images: Tensor) -> Tensor:
        gradients = grad(lambda w: task.loss(images, w))(parameters)
        return _distance(list(gradients.values()), targets)

    gradient, value = grad_and_value(distance)(images)
    return value, gradient


WAYS: dict[str, Way] = {
    "double backward": double_backward,
    "forward over reverse": forward_over_reverse,
    "reverse over forward": reverse_over_forward,
    "one-sided difference": one_sided_difference,
    "central difference": central_difference,
    "torch.func, grad of grad": grad_of_grad,
}


# --- Compilation --------------------------------------------------------------------------------------------------


def compiled_grad_of_grad(task: Task) -> Way:
    compiled = torch.compile(partial(_grad_of_grad, task))
    return lambda task, images: compiled(images, task.parameters, task.targets)


def compiled_one_sided_difference(task: Task) -> Way:
    """Both backward passes compiled; the step between them is not."""
    both = torch.compile(grad(lambda w, images: task.loss(images, w), argnums=(0, 1)))
    to_images = torch.compile(grad(lambda w, images: task.loss(images, w), argnums=1))

    def evaluate(task: Task, images: Tensor) -> Evaluation:
        parameters = task.parameters
        gradients, here = both(parameters, images)
        u = _direction(list(gradients.values()), task.targets)
        h = _step(u)
        moved = torch._foreach_add(list(parameters.values()), u, alpha=h)
        there = to_images(dict(zip(parameters, moved, strict=True)), images)
        return _distance(list(gradients.values()), task.targets), (there - here) / h

    return evaluate


def compiled_model(task: Task) -> Way:
    """The model compiled, double backward as before."""
    compiled = Task(torch.compile(task.model), task.labels, task.targets)  # type: ignore[arg-type]
    return lambda _, images: double_backward(compiled, images)


COMPILED: dict[str, Callable[[Task], Way]] = {
    "compiled grad of grad": compiled_grad_of_grad,
    "compiled one-sided difference": compiled_one_sided_difference,
    "compiled model, double backward": compiled_model,
}


# --- Attention kernels --------------------------------------------------------------------------------------------


class KernelAttention(Attention):
    """The same attention through scaled_dot_product_attention, which chooses among PyTorch's kernels."""

    def forward(self, z: Tensor) -> Tensor:
        b, t, d = z.shape
        q, k, v = (
            linear(z).reshape(b, t, self.heads, d // self.heads).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


def with_kernels(model: nn.Module) -> nn.Module:
    """A copy whose attention goes through PyTorch's kernels, with the same parameters in the same order."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = KernelAttention  # same parameters, same attributes, another forward
    return model


def torchvision_vit(image_size: int = 32, patch_size: int = 4, width: int = 192, depth: int = 4) -> nn.Module:
    """torchvision's ViT, small, with a head that is not zero."""
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(image_size, patch_size, depth, width // 64, width, 4 * width, num_classes=10)
        nn.init.normal_(model.heads.head.weight, std=0.02)
    return model.eval()


KERNELS = {"math": [SDPBackend.MATH], "fused": [SDPBackend.FLASH_ATTENTION]}


def under(kernel: str, way: Way) -> Way:
    def evaluate(task: Task, images: Tensor) -> Evaluation:
        with sdpa_kernel(KERNELS[kernel]):
            return way(task, images)

    return evaluate


# --- Measurement --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    section: str
    model: str
    dtype: str
    way: str
    milliseconds: float | None  # of the processor, median
    wall_milliseconds: float | None
    ratio: float | None  # to double backward of the same section, model and dtype; median of the repetitions' ratios
    error: float | None  # of ∇D, relative to double backward in float64
    compile_seconds: float | None = None  # of the processor, the C++ compiler's included
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
    """One row for each way; the first is what the others are divided by. Ways that fail give their error."""
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
            yield Row(section, name, dtype, label, None, None, None, None, None, notes[label])
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
    """Spelled-out attention against PyTorch's kernels, for the ways that a kernel may make faster."""
    model, shape = build(name, dtype)
    task, images = random_task(model, shape)
    other = Task(with_kernels(model), task.labels, task.targets)
    ways = {"double backward, spelled out": (double_backward, task)}
    ways |= {f"double backward, {kernel}": (under(kernel, double_backward), other) for kernel in KERNELS}
    ways |= {"forward over reverse, fused": (under("fused", forward_over_reverse), other)}
    ways |= {"one-sided difference, spelled out": (one_sided_difference, task)}
    ways |= {f"one-sided difference, {kernel}": (under(kernel, one_sided_difference), other) for kernel in KERNELS}
    yield from compare("kernels", name, dtype, ways, images, reference_of(model, images), repetitions)


def torchvision_rows(dtype: str, repetitions: int) -> Iterator[Row]:
    """The same for torchvision's own ViT, which always goes through the kernels."""
    model = torchvision_vit().to(DTYPES[dtype])
    with sdpa_kernel(SDPBackend.MATH):
        task, images = random_task(model, (1, 3, 32, 32))
    ways = {
        f"{label}, {kernel}": (under(kernel, WAYS[label]), task)
        for label in ("double backward", "one-sided difference")
        for kernel in KERNELS
    }
    name = "torchvision, 32×32 colour, patch 4, d = 192"
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
            failed.append(Row("compiled", name, dtype, label, None, None, None, None, None, first_line(error)))
    yield from compare(
        "compiled", name, dtype, ways, images, reference_of(model, images), repetitions, seconds
    )  # fmt: skip
    yield from failed


def compiled_elsewhere(name: str, dtype: str, repetitions: int) -> list[Row]:
    """compiled_rows in a process whose compiler cache is empty and whose compilers are its own children."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, "-m", "studies.derivatives", "--compiled", name, dtype, str(repetitions)]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


# --- Does an attack with it get as far? ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """Where L-BFGS ends on one digit after a number of evaluations."""

    digit: int
    way: str
    evaluations: int
    seconds: float  # of the processor
    residual: float  # ‖g' − g‖ / ‖g‖
    psnr: float


def attack(way: Way, task: Task, private: Tensor, digit: int, label: str, evaluations: int) -> Attack:
    """L-BFGS with a strong-Wolfe line search on D / ‖g‖², from one fixed noise picture; label known."""
    generator = torch.Generator().manual_seed(1)
    images = (torch.randn(private.shape, generator=generator, dtype=torch.float64) / 2).to(private)
    images.requires_grad_()
    scale = float(torch.stack([t.square().sum() for t in task.targets]).sum())
    best: tuple[float, Tensor] = (math.inf, images.detach().clone())
    count = 0

    class Spent(Exception):
        pass

    def closure() -> Tensor:
        nonlocal best, count
        if count >= evaluations:
            raise Spent
        count += 1
        value, images.grad = (t / scale for t in way(task, images))
        if float(value) < best[0]:
            best = float(value), images.detach().clone()
        return value

    start = time.process_time()
    optimizer = torch.optim.LBFGS(
        [images], max_iter=10**6, max_eval=10**6, tolerance_grad=0, tolerance_change=0, history_size=100,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    try:
        while True:
            before = best[0]
            optimizer.step(closure)
            if best[0] >= before:
                break
            optimizer.state.clear()
    except Spent:
        pass
    psnr = float(al.psnr(al.HALF.to_pixels(best[1])[0].double(), al.HALF.to_pixels(private)[0].double()))
    return Attack(digit, label, count, time.process_time() - start, math.sqrt(best[0]), psnr)


def attacks(digits: tuple[int, ...], evaluations: int) -> Iterator[Attack]:
    images, labels = al.mnist5k(dtype=torch.float64)
    model, _ = build(DIGITS, "float64")
    for digit in digits:
        chosen = (labels == digit).nonzero()[7]
        private = al.HALF.to_input(images[chosen])
        task = task_of(model, private, labels[chosen])
        for label in ("double backward", "one-sided difference"):
            yield attack(WAYS[label], task, private, digit, label, evaluations)


# --- Where the time of match_gradients goes -----------------------------------------------------------------------


@contextmanager
def timers() -> Iterator[dict[str, float]]:
    """Processor seconds spent inside parts of a search, each with all that it calls."""
    spent: dict[str, float] = {}

    def timed(name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                key = name(**options)
                spent[key] = spent.get(key, 0.0) + time.process_time() - start

        return call

    def which(create_graph: bool = False, **_: Any) -> str:
        return "first backward" if create_graph else "second backward"

    with ExitStack() as stack:
        for owner, attribute, name in (
            (problem, "logits_of", lambda **_: "forward"),
            (torch.autograd, "grad", which),
            (problem.Problem, "evaluate", lambda **_: "problem"),
            (search.Search, "evaluate", lambda **_: "search"),
            (search.Search, "_keep", lambda **_: "record"),
            (search.Log, "enter", lambda **_: "record"),
        ):
            function = getattr(owner, attribute)
            stack.enter_context(mock.patch.object(owner, attribute, timed(name, function)))
        yield spent


def profile(dtype: str, evaluations: int) -> dict[str, float]:
    """Milliseconds of the processor an evaluation of the recipe "april" takes on a digit, by part."""
    images, labels = al.mnist5k(dtype=torch.float64)
    chosen = (labels == 5).nonzero()[7]
    model, _ = build(DIGITS, "float64")
    update = al.client_update(model, al.HALF.to_input(images[chosen]), labels[chosen])
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "progress": False, "tolerance": 0.0}
    al.match_gradients(model, update, max_evaluations=3, **options)  # warm-up
    with timers() as spent:
        start = time.process_time()
        found = al.match_gradients(model, update, max_evaluations=evaluations, **options)
        total = time.process_time() - start
    parts = {
        "forward pass": spent["forward"],
        "first backward pass, ∇w": spent["first backward"],
        "distance, α term, residual": spent["problem"]
        - spent["forward"]
        - spent["first backward"]
        - spent["second backward"],
        "second backward pass, to the unknowns": spent["second backward"],
        "history, best pictures, progress": spent["record"],
        "rest of an evaluation": spent["search"] - spent["problem"] - spent["record"],
        "L-BFGS and line search, and the set-up": total - spent["search"],
        "all": total,
    }
    return {name: 1e3 * seconds / found.diagnostics["evaluations"] for name, seconds in parts.items()}


# --- The record ---------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def ways_table(rows: list[Row]) -> list[str]:
    """One line for a model and dtype, one column for a way."""
    lines = [
        f"| model | dtype | double backward, ms | {' | '.join(list(WAYS)[1:])} |",
        f"|{'---|' * (2 + len(WAYS))}",
    ]
    for name in MODELS:
        for dtype in DTYPES:
            found = {row.way: row for row in rows if (row.section, row.model, row.dtype) == ("ways", name, dtype)}
            if found:
                base = number(found["double backward"].milliseconds)
                ratios = (
                    f"{row.ratio:.2f} ({row.error:.0e})" if row.ratio is not None else row.note
                    for way, row in found.items()
                    if way != "double backward"
                )  # fmt: skip
                lines.append(f"| {name} | {dtype} | {base} | {' | '.join(ratios)} |")
    return lines


def rows_table(rows: list[Row], section: str) -> list[str]:
    lines = ["| model | dtype | way | ms | ratio | error | compile s |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.section == section:
            result = (
                f"{number(row.milliseconds)} | {number(row.ratio)} | {number(row.error, 1)}"
                if not row.note
                else f"fails | – | `{row.note}`"
            )
            lines.append(f"| {row.model} | {row.dtype} | {row.way} | {result} | {number(row.compile_seconds)} |")
    return lines


def in_short(rows: list[Row], parts: dict[str, dict[str, float]]) -> list[str]:
    """What the tables say, by the rule that a way must be 1.3 times as fast on most rows to be worth a change."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.section == "ways" and row.ratio is not None and row.error is not None:
            found.setdefault(row.way, []).append(row)
    speed = {way: [1 / row.ratio for row in some if row.ratio] for way, some in found.items()}
    del speed["double backward"]
    # An error of 1e-3 is more than a line search to a small residual can stand.
    usable = {way: v for way, v in speed.items() if all((r.error or 0) < 1e-3 for r in found[way])}
    worth = [way for way, v in usable.items() if sum(x > 1.3 for x in v) > len(v) / 2]
    lines = [
        f"- {way}: {min(v):.2f} to {max(v):.2f} times as fast as double backward "
        f"(median {statistics.median(v):.2f}); above 1.3 in {sum(x > 1.3 for x in v)} of {len(v)} rows; error up to "
        f"{max(r.error or 0 for r in found[way] if r.dtype == 'float64'):.0e} in float64, "
        f"{max(r.error or 0 for r in found[way] if r.dtype == 'float32'):.0e} in float32."
        for way, v in speed.items()
    ]
    if worth:
        lines.append(f"- **{', '.join(worth)}**: faster by more than 1.3 on most rows, in both dtypes exact enough.")
    else:
        lines.append("- **Double backward stays**: nothing uncompiled is faster by more than 1.3 on most rows.")
    if max(row.error or 0 for row in found["reverse over forward"]) > 1e-3:
        lines.append(
            "- Reverse over forward is not only slow but wrong for models with LayerNorm, without an error: the "
            "tangent of PyTorch's layer_norm takes mean and deviation for constants when it is differentiated again "
            "(pytorch/pytorch issue 196700 has the same for nested forward mode)."
        )
    lines += [
        f"- {row.way}, {row.dtype}: {1 / row.ratio:.2f} times as fast, after {row.compile_seconds:.0f} s of "
        f"compiling: worth it from "
        f"{1e3 * row.compile_seconds / (row.milliseconds / row.ratio - row.milliseconds):.0f} evaluations on."
        for row in rows
        if row.section == "compiled" and row.ratio and row.ratio < 1 and row.compile_seconds and row.milliseconds
    ]
    second, distance = "second backward pass, to the unknowns", "distance, α term, residual"
    share = {dtype: (p[second] / p["all"], p[distance] / p["all"]) for dtype, p in parts.items()}
    lines.append(
        "- Of match_gradients' own time, the second backward pass takes "
        + ", ".join(f"{a:.0%} ({dtype}; distances: {b:.0%})" for dtype, (a, b) in share.items())
        + "."
    )
    return lines


def report(
    rows: list[Row], runs: list[Attack], parts: dict[str, dict[str, float]], repetitions: int, evaluations: int
) -> str:
    import torchvision

    head = (
        f"aprillab {al.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} thread. Medians of "
        f"{repetitions} repetitions in turn, in milliseconds of the processor. Made by "
        "`python -m studies.derivatives`; the ways are explained at the top of that file."
    )
    attack_lines = ["| digit | way | evaluations | s | relative residual | PSNR, dB |", "|---|---|---|---|---|---|"]
    attack_lines += [
        f"| {r.digit} | {r.way} | {r.evaluations} | {r.seconds:.1f} | {r.residual:.1e} | {r.psnr:.1f} |" for r in runs
    ]
    profile_lines = [
        f"| part | {' | '.join(f'{d}, ms | share' for d in parts)} |",
        f"|{'---|' * (1 + 2 * len(parts))}",
    ]
    for name in next(iter(parts.values())):
        cells = (f"{p[name]:.2f} | {100 * p[name] / p['all']:.0f} %" for p in parts.values())
        profile_lines.append(f"| {name} | {' | '.join(cells)} |")
    compiled = any(row.section == "compiled" for row in rows)
    sections = {
        "": [head],
        "In short": in_short(rows, parts),
        "One evaluation": [
            "Time relative to double backward (below 1 is faster), and in brackets the relative error of ∇D against "
            "double backward in float64.", "", *ways_table(rows),
        ],
        "Compiled": [
            "In a process of its own with an empty compiler cache. The first call compiles; its seconds are the "
            "processor's, the C++ compiler's included.", "",
            *(rows_table(rows, "compiled") if compiled else ["Left out of this run (`--no-compile`)."]),
        ],
        "Attention kernels": [
            "Spelled out: aprillab.models. Math and fused: scaled_dot_product_attention restricted to "
            "SDPBackend.MATH and SDPBackend.FLASH_ATTENTION.", "", *rows_table(rows, "kernels"),
        ],
        "The same attack by two ways": [
            f"{DIGITS}, float64, label known, L-BFGS on D / ‖g‖² over the pixels for at most {evaluations} "
            "evaluations, from the same noise. It asks whether the error of the difference stops the search; this "
            "bare distance is a poor attack, and the preset \"april\" has more to it.", "", *attack_lines,
        ],
        "Where match_gradients spends its time": [
            f"{DIGITS}, preset \"april\", milliseconds of the processor for one evaluation.", "", *profile_lines,
        ],
    }  # fmt: skip
    text = ["# Ways to the gradient of gradient matching, measured"]
    for title, lines in sections.items():
        text += ["", *([f"## {title}", ""] if title else []), *lines]
    return "\n".join(text) + "\n"


def write_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in asdict(row).items()}
            for row in rows
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, three repetitions, written nowhere")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out; it takes minutes")
    parser.add_argument("--compiled", nargs=3, metavar=("MODEL", "DTYPE", "REPETITIONS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.compiled:
        name, dtype, repetitions = arguments.compiled
        print(json.dumps([asdict(row) for row in compiled_rows(name, dtype, int(repetitions))]))
        return
    quick = arguments.quick
    repetitions, evaluations = (3, 20) if quick else (15, 600)
    rows: list[Row] = []
    for name in tqdm(list(MODELS)[: 1 if quick else None], desc="ways"):
        for dtype in DTYPES:
            rows += ways_rows(name, dtype, repetitions)
    for dtype in DTYPES:
        rows += kernel_rows("32×32 colour, patch 4, d = 192", dtype, repetitions)
        rows += torchvision_rows(dtype, repetitions)
    parts = {dtype: profile(dtype, 20 if quick else 300) for dtype in DTYPES}
    runs = list(tqdm(attacks((5,) if quick else (5, 3, 0), evaluations), desc="attacks"))
    if not (quick or arguments.no_compile):
        rows += compiled_elsewhere(DIGITS, "float64", repetitions)
    text = report(rows, runs, parts, repetitions, evaluations)
    print(text)
    if quick:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_csv(rows, RESULTS / "derivatives.csv")
    (RESULTS / "derivatives.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
