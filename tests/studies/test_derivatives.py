"""The derivatives study: all ways give one gradient, and a kernel without a second one says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import tiny_vit
from torch import Tensor

from studies._rows import read
from studies.derivatives import matching, page, times, ways
from studies.derivatives.__main__ import main
from studies.derivatives.matching import Part
from studies.derivatives.times import Row, random_task
from studies.derivatives.ways import Task, under, with_kernels

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
    """D, and ∇D = Jᵀ u, the derivatives of single entries of ∇w added up one by one."""
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
    value, gradient = ways.WAYS[way](task, images)
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
    ways.WAYS[way](task, images)
    after = list(task.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)
    assert not images.requires_grad


def test_differences_stand_a_vanishing_residual(problem: tuple[Task, Tensor]) -> None:
    """At the private picture u is 0: the step must not become infinite, nor the gradient NaN."""
    task, _ = problem
    private = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, gradient = ways.one_sided_difference(task, private)
    assert float(value) < 1e-20
    assert bool(gradient.isfinite().all())


def test_the_kernels_compute_the_same_model(problem: tuple[Task, Tensor]) -> None:
    task, images = problem
    other = Task(with_kernels(task.model), task.labels, task.targets)
    expected = ways.double_backward(task, images)[1]
    for kernel, way in (("math", ways.double_backward), ("fused", ways.one_sided_difference)):
        found = under(kernel, way)(other, images)[1]
        assert float((found - expected).norm()) < 1e-4 * float(expected.norm())


def test_the_fused_kernel_has_no_second_derivative(problem: tuple[Task, Tensor]) -> None:
    task, images = problem
    other = Task(with_kernels(task.model), task.labels, task.targets)
    with pytest.raises(
        RuntimeError, match=r"derivative for aten::_scaled_dot_product_.*_backward is not implemented"
    ):
        under("fused", ways.double_backward)(other, images)


def test_a_way_that_fails_is_reported_and_the_others_are_timed(problem: tuple[Task, Tensor]) -> None:
    task, images = problem

    def broken(task: Task, images: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no such derivative\nand a long trace")

    both = {"double backward": (ways.double_backward, task), "broken": (broken, task)}
    expected = direct(task, images)[1]
    good, bad = times.compare("ways", "tiny", "float64", both, images, expected, repetitions=2)
    assert good.ratio == 1.0
    assert good.error is not None
    assert good.error < 1e-12
    assert (bad.milliseconds, bad.note) == (None, "RuntimeError: no such derivative")


def test_the_parts_of_an_evaluation_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(times.SMALL, "depth", 1)
    parts = matching.profile("float64", evaluations=5)
    total = parts.pop("all")
    assert sum(parts.values()) == pytest.approx(total, rel=1e-6)
    assert parts["forward pass"] > 0
    assert parts["second backward pass, to the unknowns"] > 0
    assert min(parts.values()) > -0.02 * total


def row(way: str, ratio: float, error: float, dtype: str = "float64", **options: Any) -> Row:
    options = {"section": "ways", "milliseconds": 10 * ratio} | options
    return Row(model="tiny", dtype=dtype, way=way, ratio=ratio, error=error, **options)


@pytest.mark.parametrize(("ratio", "error", "stays"), [(0.9, 1e-7, True), (0.7, 1e-7, False), (0.7, 1e-2, True)])
def test_double_backward_stays_unless_another_way_is_fast_and_exact(ratio: float, error: float, stays: bool) -> None:
    rows = pd.DataFrame([
        row(way, r, e, dtype)
        for dtype in ("float64", "float32")
        for way, r, e in (("double backward", 1.0, 0.0), ("reverse over forward", 1.5, 0.4), ("other", ratio, error))
    ])  # fmt: skip
    assert (page.worth_a_change(rows) == []) is stays
    assert "- other: 1.11 to 1.11" in page.speeds(rows) or ratio == 0.7
    assert "double backward:" not in page.speeds(rows)


def test_compiling_pays_after_so_many_evaluations() -> None:
    rows = [
        row("compiled", 0.5, 0.0, section="compiled", compile_seconds=100.0),
        row("slow", 1.5, 0, section="compiled"),
    ]
    assert "worth it from 20000 evaluations on" in page.compiled_speeds(pd.DataFrame(rows))  # 5 ms saved in each
    assert "slow" not in page.compiled_speeds(pd.DataFrame(rows))


def test_shares_are_of_all_milliseconds() -> None:
    parts = {"second backward pass, to the unknowns": 5.0, "distance, α term, residual": 2.0, "all": 10.0}
    frame = pd.DataFrame([Part("float64", name, value) for name, value in parts.items()])
    assert page.shares(frame) == "50% (float64; distances: 20%)"
    assert page.profile_table(frame).splitlines()[2] == "| second backward pass, to the unknowns | 5.00 | 50 % |"


def test_a_way_that_fails_shows_its_error() -> None:
    rows = pd.DataFrame([row("fused", 0.5, 1e-7), Row("ways", "tiny", "float64", "broken", note="RuntimeError: no")])
    lines = page.rows_table(rows).splitlines()
    assert lines[2] == "| tiny | float64 | fused | 5 | 0.5 | 1e-07 | – |"
    assert lines[3] == "| tiny | float64 | broken | fails | – | `RuntimeError: no` | – |"


@pytest.mark.slow
def test_the_smallest_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"image_size": 8, "patch_size": 4, "channels": 3, "width": 24, "heads": 3}
    threads = torch.get_num_threads()
    for name in (times.DIGITS, times.SMALL_PATCHES):
        monkeypatch.setitem(times.MODELS, name, tiny)
    monkeypatch.setattr(times, "torchvision_vit", lambda: ways.torchvision_vit(32, 16, 64, 1))
    monkeypatch.setattr(matching, "profile", lambda dtype, evaluations: dict.fromkeys(
        ("second backward pass, to the unknowns", "distance, α term, residual", "all"), 1.0
    ))  # fmt: skip
    monkeypatch.setattr(matching, "build", lambda name, dtype: (tiny_vit(channels=1, image_size=28, classes=10), ()))
    main(["--quick", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    rows = read(tmp_path / "derivatives.csv", Row)
    assert set(rows.section) == {"ways", "kernels"}
    assert set(rows.way[rows.section == "ways"]) == set(ways.WAYS)
    text = (tmp_path / "derivatives.md").read_text(encoding="utf-8")
    assert "Medians of 3 repetitions" in text
    assert "Left out of this run" in text
    assert "| 5 | one-sided difference | 20 |" in text


def test_reverse_over_forward_is_wrong_through_layer_norm_and_right_without(problem: tuple[Task, Tensor]) -> None:
    """Why it is not used. If the first assertion fails one day, PyTorch has been mended: take the
    way up again.
    """
    task, images = problem
    expected = ways.double_backward(task, images)[1]
    found = ways.reverse_over_forward(task, images)[1]
    assert float((found - expected).norm()) > 1e-3 * float(expected.norm())
    for module in task.model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.LayerNorm):
                setattr(module, name, SpelledOutNorm(child))
    expected = ways.double_backward(task, images)[1]
    found = ways.reverse_over_forward(task, images)[1]
    assert float((found - expected).norm()) < 1e-10 * float(expected.norm())
