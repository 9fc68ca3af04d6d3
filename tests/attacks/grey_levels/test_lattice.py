"""Integer least squares: against brute force, and against rounding each number by itself."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

from aprillab.attacks.grey_levels.lattice import ReducedLattice, k_best, reduced_lattice


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed(p: int, seed: int = 0) -> Tensor:
    """Rows that know some combinations of g to 1/100 and others only to 30."""
    scale = torch.logspace(2, -1.5, p, dtype=torch.float64)
    return scale[:, None] * torch.linalg.qr(randn(p, p, seed=seed)).Q


def brute_force(rows: Tensor, centre: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """All whole g within ``reach`` of the centre, the nearest first."""
    offsets = itertools.product(range(-reach, reach + 1), repeat=len(centre))
    points = centre.round() + torch.tensor(list(offsets), dtype=torch.float64)
    distances = ((points - centre) @ rows.T).square().sum(1)
    order = distances.argsort()
    return points[order], distances[order]


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_are_those_of_brute_force(seed: int) -> None:
    rows = 3 * randn(4, 4, seed=seed)
    rows[:, 1] = rows[:, 0] + 0.1 * rows[:, 1]  # two directions that are nearly one
    centres = 50 * randn(4, 6, seed=seed + 100)
    lattice = reduced_lattice(rows)
    points, distances = lattice.nearest(centres, count=2)
    for centre, found, squares in zip(centres.T, points, distances, strict=True):
        expected, least = brute_force(rows, centre, 12)
        torch.testing.assert_close(squares, least[:2])
        assert torch.equal(found, expected[:2])


@pytest.mark.parametrize(("width", "slack"), [(1, 1e9), (7, 1e9), (60, 1e9), (100, 5.0), (100, 96.0)])
def test_many_points_at_once_are_as_each_by_itself(width: int, slack: float) -> None:
    """The reference, one point at a time and written to be read, finds the same whole vectors."""
    lattice = reduced_lattice(torch.cat([skewed(12), torch.eye(12).double() / 60]))
    centres = 100 * randn(12, 4, seed=2)
    points, distances = lattice.nearest(centres, count=9, width=width, slack=slack)
    for centre, found, squares in zip(centres.T, points, distances, strict=True):
        target = lattice.rotation.T @ lattice.root @ centre
        expected = k_best(lattice.triangle, target, width=width, slack=slack)[:9]
        assert len(expected) == int(squares.isfinite().sum())
        for (distance, z), point, square in zip(expected, found, squares, strict=False):
            assert torch.equal(lattice.basis @ z, point)
            assert float(square) == pytest.approx(distance)


def test_the_reference_with_width_one_is_the_nearest_plane() -> None:
    """Exercise 8.4, as its solution writes it."""
    S, y = skewed(8).triu() + torch.eye(8).double(), 10 * randn(8, seed=5)
    z = torch.zeros_like(y)
    for k in range(7, -1, -1):
        z[k] = ((y[k] - S[k, k + 1 :] @ z[k + 1 :]) / S[k, k]).round()
    ((distance, found),) = k_best(S, y)
    assert torch.equal(found, z)
    assert distance == pytest.approx(float((S @ z - y).square().sum()))


def test_what_is_returned_are_whole_vectors_and_their_distances() -> None:
    rows, centres = skewed(12), 100 * randn(12, 3, seed=1)
    points, distances = reduced_lattice(rows).nearest(centres, count=5)
    assert points.shape == (3, 5, 12)
    assert torch.equal(points, points.round())
    expected = ((points - centres.T[:, None]) @ rows.T).square().sum(2)
    torch.testing.assert_close(distances, expected)
    assert (distances.diff(dim=1) >= 0).all()


def test_the_basis_is_another_one_of_the_same_lattice() -> None:
    lattice = reduced_lattice(torch.cat([skewed(10), torch.eye(10, dtype=torch.float64) / 60]))
    U = lattice.basis
    assert torch.equal(U, U.round())
    assert torch.linalg.det(U).abs().item() == pytest.approx(1)
    torch.testing.assert_close(lattice.root @ U, lattice.rotation @ lattice.triangle)
    assert torch.equal(lattice.root, lattice.root.triu())
    before, after = lattice.root.diagonal().abs(), lattice.triangle.diagonal().abs()
    assert after.prod().item() == pytest.approx(before.prod().item())  # the same volume, shared out more evenly
    assert after.min() > 3 * before.min()


def test_a_reduced_basis_finds_what_rounding_misses() -> None:
    rows = torch.cat([skewed(20), torch.eye(20, dtype=torch.float64) / 60])
    truth = torch.randint(0, 256, (20, 30), generator=torch.Generator().manual_seed(3)).double()
    noise = torch.cat([0.3 * randn(20, 30, seed=4), torch.zeros(20, 30, dtype=torch.float64)])
    centres = truth + torch.linalg.pinv(rows) @ noise
    rounded_right = (centres.round() == truth).all(0).sum()
    points, distances = reduced_lattice(rows).nearest(centres)
    assert rounded_right == 0
    assert (truth == points[:, 0].T).all(0).sum() >= 28
    assert (distances[:, 0] < 0.5 * distances[:, 1]).sum() >= 20  # and mostly with a clear lead


def test_fewer_than_asked_for_are_filled_up() -> None:
    rows = torch.eye(2, dtype=torch.float64)
    points, distances = reduced_lattice(rows).nearest(torch.zeros(2, 1, dtype=torch.float64), count=9, width=4)
    assert points.shape == (1, 9, 2)
    assert distances[0].isfinite().sum() == 4
    (_, near) = reduced_lattice(rows).nearest(torch.zeros(2, 1, dtype=torch.float64), count=9, slack=0.5)
    assert near[0].isfinite().tolist() == [True] + [False] * 8


def test_deficient_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="deficient rank"):
        reduced_lattice(torch.zeros(4, 3))
    rows = randn(5, 4)
    rows[:, 3] = rows[:, 0] + rows[:, 1]
    with pytest.raises(ValueError, match="deficient rank"):
        reduced_lattice(rows)
    with pytest.raises(ValueError, match="add a prior"):
        reduced_lattice(randn(3, 4))


def test_a_lattice_of_float32_rows_is_solved_in_float64() -> None:
    lattice = reduced_lattice(skewed(3).float())
    assert isinstance(lattice, ReducedLattice)
    assert {part.dtype for part in (lattice.root, lattice.basis, lattice.triangle)} == {torch.float64}


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flint", None)
    with pytest.raises(ModuleNotFoundError, match="pip install python-flint"):
        reduced_lattice(torch.eye(3))
