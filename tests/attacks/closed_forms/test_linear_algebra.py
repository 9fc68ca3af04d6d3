"""The linear algebra that the closed forms share, against torch's own."""

import math

import pytest
import torch

from aprillab.attacks.closed_forms.linear_algebra import (
    condition_number,
    gram,
    numerical_rank,
    orthonormal,
    row_space_basis,
    square_of_inverse,
    thin_svd,
    well_conditioned,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(9, 4), (4, 4)])
def test_thin_svd_is_an_svd(shape):
    A = normal(*shape)
    U, s, Vt = thin_svd(A)
    assert (U.shape, s.shape, Vt.shape) == (shape, (4,), (4, 4))
    torch.testing.assert_close(U @ s.diag() @ Vt, A)
    torch.testing.assert_close(U.T @ U, torch.eye(4).double())
    torch.testing.assert_close(s, torch.linalg.svdvals(A))


def test_thin_svd_sees_small_singular_values():
    """A Gram matrix would end at 1e-8."""
    A = thin_svd(normal(9, 4))[0] * torch.tensor([1.0, 1e-4, 1e-8, 1e-12], dtype=torch.float64)
    torch.testing.assert_close(thin_svd(A)[1], A.norm(dim=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_rank_and_condition(rank):
    s = torch.linalg.svdvals(normal(9, rank) @ normal(rank, 5, seed=1))
    assert numerical_rank(s, 1e-12) == rank
    assert condition_number(s) > 1e12 or rank == 5
    assert condition_number(torch.tensor([2.0, 0.5])) == 4.0
    assert condition_number(torch.tensor([2.0, 0.0])) == math.inf


def test_the_row_space_holds_the_rows_and_no_rounding():
    A = normal(9, 3) @ normal(3, 7, seed=1)
    basis = row_space_basis(A, 5, 1e-12)
    assert basis.shape == (7, 3)
    torch.testing.assert_close(A @ basis @ basis.T, A)
    assert row_space_basis(A, 2, 1e-12).shape == (7, 2)


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300])  # around a block and over several
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gram_matrix_is_whole_in_its_upper_triangle(width, dtype):
    A = normal(320, width).to(dtype)
    found = gram(A)
    torch.testing.assert_close(found.triu(), (A.T @ A).triu(), rtol=1e-5, atol=1e-4)
    assert found.dtype == dtype
    L = torch.linalg.cholesky(found, upper=True)  # nobody reads below
    torch.testing.assert_close(L.T @ L, A.T @ A, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("size", [1, 128, 300])
def test_the_inverse_of_a_triangle_is_as_long_as_torch_says(size):
    H = torch.linalg.qr(normal(size + 5, size)).R
    assert square_of_inverse(H) == pytest.approx(float(torch.linalg.inv(H).square().sum()), rel=1e-10)
    H[0, 0] = 0.0
    assert square_of_inverse(H) in (math.inf, pytest.approx(math.nan, nan_ok=True))  # and no error is raised


def test_orthonormal_columns_span_the_same():
    A = normal(9, 4)
    Q = orthonormal(A)
    torch.testing.assert_close(Q.T @ Q, torch.eye(4).double())
    torch.testing.assert_close(Q @ (Q.T @ A), A)


@pytest.mark.parametrize(("nearness", "by_qr"), [(1.0, False), (1e-2, False), (1e-6, True), (0.0, True)])
def test_a_well_conditioned_basis_spans_the_same(nearness, by_qr, monkeypatch):
    """Columns of any length; where two are nearly parallel, not by the Gram matrix."""
    A = normal(9, 4) * torch.tensor([1.0, 1e-5, 1e5, 1.0])
    A[:, 3] = A[:, 0] + nearness * A[:, 3]
    calls, qr = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: calls.append(1) or qr(matrix))
    Q = well_conditioned(A)
    assert bool(calls) == by_qr
    torch.testing.assert_close(Q.T @ Q, torch.eye(4).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(Q @ (Q.T @ A), A, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e8])
def test_of_what_was_shared_in_float32_the_square_is_decomposed_where_that_does_no_harm(
    condition: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(m, 20, generator=generator).double()).Q for m in (50, 20))
    s = torch.logspace(0, -math.log10(condition), 20, dtype=torch.float64)
    A, eps = U * s @ V.T, torch.finfo(torch.float32).eps
    squared, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *given, **options: squared.append(1) or eigh(*given, **options))
    exact, found = thin_svd(A), thin_svd(A, eps)
    assert len(squared) == 1  # tried with eps alone, and refused where A is too ill-conditioned
    for mine, other in zip(found, exact, strict=True):
        assert mine.shape == other.shape
    assert ((found[1] - s).abs() / s).max() < (1e-4 if condition < 1e6 else 1e-6)
    assert (found[0] * found[1] @ found[2] - A).abs().max() < 1e-12
    b = torch.randn(50, 3, generator=generator).double()
    solved, wanted = (Vt.T @ ((Q.T @ b) / sv[:, None]) for Q, sv, Vt in (found, exact))
    assert (solved - wanted).norm() < 1e-4 * wanted.norm()
