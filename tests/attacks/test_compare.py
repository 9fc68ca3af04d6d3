"""How far gradients are from an update: the sums of one look give what the definition does, digit for digit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aprillab.attacks.compare import compare, own_factors

Tensors = dict[str, Tensor]
READS = ["kernel", "bias"]


def gradients(dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"kernel": (300, 700), "bias": (1, 5), "small": (70, 90), "position": (9, 11)}
    sizes = {"kernel": 3.0, "bias": 1e-3, "small": 40.0, "position": 1.0}
    made = {name: sizes[name] * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: g.to(dtype) for name, g in made.items()}


def noisy(g: Tensors, level: float) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {
        name: (t.double() * (1 + level * torch.randn(t.shape, generator=generator).double())).to(t.dtype)
        for name, t in g.items()
    }


def by_definition(mine: Tensors, shared: Tensors) -> tuple[float, float]:
    """Two looks: at the best factor, then at what it leaves."""
    a, b = ({name: t.double().flatten() for name, t in tensors.items()} for tensors in (mine, shared))
    squares = sum(float(t.square().sum()) for t in a.values())
    factor = sum(float((a[name] * b[name]).sum()) for name in a) / squares if squares else 0.0
    left = {name: float((factor * a[name] - b[name]).norm()) for name in a}
    size = math.hypot(*(float(t.norm()) for t in b.values()))
    each = [left[name] / length for name in READS if (length := float(b[name].norm()))]
    return max([math.hypot(*left.values()) / max(size, 1e-300), *each]), factor


@pytest.mark.parametrize("factor", [1.0, -1.0, 3.7e-30, 1e25])
@pytest.mark.parametrize(("dtype", "level"), [(torch.float32, 3e-7), (torch.float64, 1e-15), (torch.float64, 0.3)])
def test_one_look_gives_what_two_do(dtype: torch.dtype, level: float, factor: float) -> None:
    g = gradients(dtype)
    mine = {name: (t.double() / factor).to(dtype) for name, t in noisy(g, level).items()}
    expected, best = by_definition(mine, g)
    found, scale = compare(mine, g, READS)
    # In float64 a miss of 1e-15 is itself rounding, which depends on the order of the operations.
    assert found == pytest.approx(expected, rel=0.1 if level < 1e-14 else 1e-9)
    assert scale == pytest.approx(best, rel=1e-14)


def test_a_sample_of_another_factor_costs_no_digits() -> None:
    g = gradients(torch.float64)
    mine = noisy(g, 1e-7)
    mine["kernel"].view(-1)[:4096] *= -50  # the entries that a first guess sees
    assert compare(mine, g, READS) == pytest.approx(by_definition(mine, g), rel=1e-12)
    # And where the best factor leaves far less than that guess was wrong by: there a second look is needed.
    tiny, large = {"kernel": g["kernel"].clone()}, {"kernel": g["kernel"].clone()}
    for tensors, size in ((tiny, 1e-5), (large, 1.5e-5)):
        tensors["kernel"].view(-1)[:4096] *= size
    found, factor = compare(tiny, large)
    left = float((factor * tiny["kernel"] - large["kernel"]).norm() / large["kernel"].norm())
    assert found == pytest.approx(left, rel=1e-9)
    assert left < 1e-6


@pytest.mark.parametrize("which", ["all", "read", "sampled"])
def test_zeros_on_either_side(which: str) -> None:
    g = gradients(torch.float32)
    zero = {name: torch.zeros_like(t) if which == "all" or name == "kernel" else t for name, t in g.items()}
    if which == "sampled":
        zero["kernel"] = g["kernel"].clone()
        zero["kernel"].view(-1)[:4096] = 0.0
    for mine, shared in ((zero, g), (g, zero), (zero, zero)):
        assert compare(mine, shared, READS) == pytest.approx(by_definition(mine, shared), rel=1e-9)


def test_what_is_not_finite_is_no_match() -> None:
    g = gradients(torch.float32)
    for at in (0, -1):  # in a first sample, and not
        for value in (math.nan, math.inf):
            broken = {name: t.clone() for name, t in g.items()}
            broken["kernel"].view(-1)[at] = value
            assert math.isnan(compare(broken, g)[0])
            assert math.isnan(compare(g, broken)[0])


def test_a_factor_for_each_tensor() -> None:
    g = gradients(torch.float64)
    factors = dict(zip(g, (2.0, -0.5, 4.0, 1.0), strict=True))
    mine = noisy({name: t / factors[name] for name, t in g.items()}, 1e-3)
    left, weights, own = 0.0, 0.0, []
    for name, t in g.items():
        best = float((mine[name] * t).sum() / mine[name].square().sum())
        weight = t.numel() ** 0.5
        left += float((best * mine[name] - t).norm() / t.norm()) ** 2 * weight
        weights, own = weights + weight, [*own, abs(best)]
    assert own_factors(mine, g) == pytest.approx(((left / weights) ** 0.5, max(own) / min(own)), rel=1e-10)
