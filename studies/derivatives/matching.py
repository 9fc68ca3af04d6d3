"""Does an attack by another way get as far, and where does match_gradients spend its time?"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import aprillab as al
from aprillab.attacks.searches import problem, search

from .._rows import fill
from .times import DIGITS, DTYPES, build
from .ways import WAYS, Task, Way, task_of


@dataclass(frozen=True)
class Attack:
    """Where L-BFGS ends on one digit after a number of evaluations; seconds of the processor."""

    digit: int
    way: str
    evaluations: int
    seconds: float
    residual: float  # ‖g' − g‖ / ‖g‖
    psnr: float


@dataclass(frozen=True)
class Part:
    """Milliseconds of the processor that a part of match_gradients takes for one evaluation."""

    dtype: str
    part: str
    milliseconds: float


def digit(label: int) -> tuple[Tensor, Tensor]:
    """The eighth MNIST-5k digit of its class in model-input space (1, 1, 28, 28), and its label."""
    images, labels = al.mnist5k(dtype=torch.float64)
    chosen = (labels == label).nonzero()[7]
    return al.HALF.to_input(images[chosen]), labels[chosen]


def attack(way: Way, task: Task, private: Tensor, digit: int, label: str, evaluations: int) -> Attack:
    """L-BFGS with a strong-Wolfe line search on D / ‖g‖², from fixed noise; label known."""
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
    """Milliseconds an evaluation of the recipe "april" takes on a digit, by part."""
    model, _ = build(DIGITS, "float64")
    update = al.client_update(model, *digit(5))
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "progress": False, "tolerance": 0.0}
    al.match_gradients(model, update, max_evaluations=3, **options)  # warm-up
    with timers() as spent:
        start = time.process_time()
        found = al.match_gradients(model, update, max_evaluations=evaluations, **options)
        total = time.process_time() - start
    passes = ("forward", "first backward", "second backward")
    parts = {
        "forward pass": spent["forward"],
        "first backward pass, ∇w": spent["first backward"],
        "distance, α term, residual": spent["problem"] - sum(spent[part] for part in passes),
        "second backward pass, to the unknowns": spent["second backward"],
        "history, best pictures, progress": spent["record"],
        "rest of an evaluation": spent["search"] - spent["problem"] - spent["record"],
        "L-BFGS and line search, and the set-up": total - spent["search"],
        "all": total,
    }
    return {name: 1e3 * seconds / found.diagnostics["evaluations"] for name, seconds in parts.items()}


def measure_attacks(path: Path, digits: tuple[int, ...], evaluations: int) -> None:
    """derivatives_attacks.csv."""
    model, _ = build(DIGITS, "float64")

    def attacked(case: tuple[int, str]) -> Iterator[Attack]:
        private, labels = digit(case[0])
        yield attack(WAYS[case[1]], task_of(model, private, labels), private, *case, evaluations)

    cases = itertools.product(digits, ("double backward", "one-sided difference"))
    fill(path, Attack, cases, attacked, key=("digit", "way"), settings={"evaluations": evaluations})


def measure_profile(path: Path, evaluations: int) -> None:
    """derivatives_profile.csv."""

    def parts(case: tuple[str]) -> list[Part]:
        return [Part(*case, name, milliseconds) for name, milliseconds in profile(*case, evaluations).items()]

    fill(path, Part, [(dtype,) for dtype in DTYPES], parts, key=("dtype",), settings={"evaluations": evaluations})
