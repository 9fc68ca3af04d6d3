"""The derivative benchmark: all ways give one gradient, and a kernel that has no second derivative says so."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_vit
from torch import Tensor

from studies import against_breaching
from studies.derivatives import measure as derivatives
from studies.derivatives.measure import Task, random_task, under, with_kernels

# Of ∇D in float64. The differences are limited by rounding, √ε ≈ 1.5e-8 over the step.
TOLERANCE = {
    "double backward": 1e-12,
    "forward over reverse": 1e-10,
    "one-sided difference": 1e-4,
    "central difference": 1e-6,
    "torch.func, grad of grad": 1e-12,
}


@pytest.fixture
def problem() -> tuple[Task, Tensor]:
    return random_task(tiny_vit(), (1, 3, 8, 8))


class SpelledOutNorm(torch.nn.Module):
    """LayerNorm spelled out, with the same parameters."""

    def __init__(self, norm: torch.nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, z: Tensor) -> Tensor:
        centred = z - z.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


def direct(task: Task, images: Tensor) -> tuple[float, Tensor]:
    """D, and ∇D = Jᵀ u from the Jacobian's rows: derivatives of single entries of ∇w, added up one by one."""
    images = images.clone().requires_grad_()
    gradients = task.gradients(images, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])
    residual = (flat - torch.cat([t.flatten() for t in task.targets])).detach()
    # A batched vector-Jacobian product with every tensor's share of u, one row a tensor.
    total, start = torch.zeros_like(images), 0
    for g in gradients:
        share = residual[start : start + g.numel()].view_as(g)
        start += g.numel()
        total = total + torch.autograd.grad(g, images, 2 * share, retain_graph=True, materialize_grads=True)[0]
    return float(residual @ residual), total


def numerical_slope(task: Task, images: Tensor, direction: Tensor, step: float = 1e-6) -> float:
    """Central difference of D itself along a direction: no second derivative is taken."""

    def distance(x: Tensor) -> float:
        return sum(float((g - t).square().sum()) for g, t in zip(task.gradients(x), task.targets, strict=True))

    return (distance(images + step * direction) - distance(images - step * direction)) / (2 * step)


@pytest.mark.parametrize("way", TOLERANCE)
def test_a_way_gives_the_value_and_the_gradient(problem: tuple[Task, Tensor], way: str) -> None:
    task, images = problem
    value, gradient = derivatives.WAYS[way](task, images)
    expected_value, expected = direct(task, images)
    assert float(value) == pytest.approx(expected_value, rel=1e-12)
    assert float((gradient - expected).norm()) < TOLERANCE[way] * float(expected.norm())
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(7), dtype=images.dtype)
    slope = float((gradient * direction).sum())
    assert slope == pytest.approx(numerical_slope(task, images, direction), rel=1e-4)


@pytest.mark.parametrize("way", ["double backward", "forward over reverse", "one-sided difference"])
def test_nothing_is_left_behind(problem: tuple[Task, Tensor], way: str) -> None:
    task, images = problem
    before = [p.detach().clone() for p in task.model.parameters()]
    derivatives.WAYS[way](task, images)
    after = list(task.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)
    assert not images.requires_grad


def test_differences_stand_a_vanishing_residual(problem: tuple[Task, Tensor]) -> None:
    """At the private picture u is 0: the step must not become infinite, nor the gradient NaN."""
    task, _ = problem
    private = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, gradient = derivatives.one_sided_difference(task, private)
    assert float(value) < 1e-20
    assert bool(gradient.isfinite().all())


def test_the_kernels_compute_the_same_model(problem: tuple[Task, Tensor]) -> None:
    task, images = problem
    other = Task(with_kernels(task.model), task.labels, task.targets)
    expected = derivatives.double_backward(task, images)[1]
    for kernel, way in (("math", derivatives.double_backward), ("fused", derivatives.one_sided_difference)):
        found = under(kernel, way)(other, images)[1]
        assert float((found - expected).norm()) < 1e-4 * float(expected.norm())


def test_the_fused_kernel_has_no_second_derivative(problem: tuple[Task, Tensor]) -> None:
    task, images = problem
    other = Task(with_kernels(task.model), task.labels, task.targets)
    with pytest.raises(
        RuntimeError, match=r"derivative for aten::_scaled_dot_product_.*_backward is not implemented"
    ):
        under("fused", derivatives.double_backward)(other, images)


def test_a_way_that_fails_is_reported_and_the_others_are_timed(problem: tuple[Task, Tensor]) -> None:
    task, images = problem

    def broken(task: Task, images: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no such derivative\nand a long trace")

    ways = {"double backward": (derivatives.double_backward, task), "broken": (broken, task)}
    expected = direct(task, images)[1]
    good, bad = derivatives.compare("ways", "tiny", "float64", ways, images, expected, repetitions=2)
    assert good.ratio == 1.0
    assert good.error is not None
    assert good.error < 1e-12
    assert (bad.milliseconds, bad.note) == (None, "RuntimeError: no such derivative")


def test_the_parts_of_an_evaluation_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(derivatives.SMALL, "depth", 1)
    parts = derivatives.profile("float64", evaluations=5)
    total = parts.pop("all")
    assert sum(parts.values()) == pytest.approx(total, rel=1e-6)
    assert parts["forward pass"] > 0
    assert parts["second backward pass, to the unknowns"] > 0
    assert min(parts.values()) > -0.02 * total


@pytest.mark.parametrize(("ratio", "error", "stays"), [(0.9, 1e-7, True), (0.7, 1e-7, False), (0.7, 1e-2, True)])
def test_double_backward_stays_unless_another_way_is_fast_and_exact(ratio: float, error: float, stays: bool) -> None:
    def row(way: str, ratio: float, error: float, section: str = "ways", **options: float) -> derivatives.Row:
        return derivatives.Row(section, "tiny", "float64", way, 10 * ratio, 10 * ratio, ratio, error, **options)

    rows = [row("double backward", 1.0, 0.0), row("reverse over forward", 1.5, 0.4), row("other", ratio, error)]
    rows += [derivatives.Row("ways", "tiny", "float32", r.way, 1, 1, r.ratio, r.error) for r in rows]
    rows += [row("compiled", 0.5, 0.0, section="compiled", compile_seconds=100.0)]
    parts = {
        "float64": {"second backward pass, to the unknowns": 5.0, "distance, α term, residual": 2.0, "all": 10.0}
    }
    text = "\n".join(derivatives.in_short(rows, parts))
    assert ("Double backward stays" in text) is stays
    assert "wrong for models with LayerNorm" in text
    assert "worth it from 20000 evaluations on" in text  # 100 s at 5 ms saved in each
    assert "50% (float64; distances: 20%)" in text


def test_reverse_over_forward_is_wrong_through_layer_norm_and_right_without(problem: tuple[Task, Tensor]) -> None:
    """Why it is not used. If the first assertion fails one day, PyTorch has been mended: take the way up again."""
    task, images = problem
    expected = derivatives.double_backward(task, images)[1]
    found = derivatives.reverse_over_forward(task, images)[1]
    assert float((found - expected).norm()) > 1e-3 * float(expected.norm())
    for module in task.model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.LayerNorm):
                setattr(module, name, SpelledOutNorm(child))
    expected = derivatives.double_backward(task, images)[1]
    found = derivatives.reverse_over_forward(task, images)[1]
    assert float((found - expected).norm()) < 1e-10 * float(expected.norm())


def test_a_diary_is_scored_by_when_it_reaches_the_bar() -> None:
    private = torch.full((1, 28, 28), 0.5, dtype=torch.float64)
    errors = [0.5, 0.1, 0.01, 0.001, 0.2]  # PSNR 6, 20, 40, 60 dB; the last is the result
    images = np.stack([np.full((1, 28, 28), 2 * e) for e in errors])  # model-input space
    diary = {"cpu": np.array([1.0, 2.0, 3.0, 4.0]), "wall": np.array([2.0, 4.0, 6.0, 8.0]), "images": images}
    run = against_breaching.score(diary, private, "aprillab", "april", "float64", 5)
    assert (run.evaluations, run.cpu_to_bar, run.wall_to_bar) == (4, 3.0, 6.0)
    assert run.best_psnr == pytest.approx(60)
    assert run.psnr == pytest.approx(-20 * math.log10(0.2))
    assert (run.cpu_rate, run.wall_rate) == (1.0, 0.5)
    never = against_breaching.score({**diary, "images": images[[0, 1, 1, 0, 3]]}, private, "a", "b", "c", 5)
    assert math.isinf(never.cpu_to_bar)  # the result has no time of its own


def test_breaching_is_asked_for_by_name_and_never_imported_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["against_breaching"])
    with pytest.raises(SystemExit, match="2"):
        against_breaching.main()
    assert "--python is needed" in capsys.readouterr().err
    assert "breaching" not in sys.modules
