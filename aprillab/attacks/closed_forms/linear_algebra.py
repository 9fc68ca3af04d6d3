"""The linear algebra that the closed forms share: tensors in, tensors out, all in float64.

In finite precision a singular value below ε times the largest is noise, ε being that of the
precision in which the gradients were shared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 128  # columns of a product of which only a triangle is wanted
# Coarser than this is float32 and less. A singular value so small beside the largest has a square
# that float64 still knows to four digits, and in float32 at most one digit of its own.
_COARSE, _SEEN_SQUARED = 1e-8, 1e-6


def thin_svd(A: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), s (r,) and Vᵀ (r, k) of A (m, k) = U diag(s) Vᵀ, with r = min(m, k).

    By a QR first: the singular values of the small triangle are those of A, at a third of the time.
    Where A's entries have no more than the digits of float32, its relative rounding error ``eps``
    says, and A is not too ill-conditioned, by the eigenvectors of AᵀA, at a third of that: what the
    square costs is far below what rounding took.

    >>> U, s, Vt = thin_svd(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64))
    >>> s.tolist()
    [3.0, 2.0]
    """
    if eps > _COARSE and A.shape[0] >= A.shape[1]:
        squares, V = torch.linalg.eigh(gram(A), UPLO="U")
        if float(squares[0]) > _SEEN_SQUARED**2 * float(squares[-1]):
            s, V = squares.sqrt().flip(0), V.flip(1)
            return A @ (V / s), s, V.T
    Q, R = torch.linalg.qr(A)
    U, s, Vt = torch.linalg.svd(R, full_matrices=False)
    return Q @ U, s, Vt


def numerical_rank(s: Tensor, eps: float) -> int:
    """How many singular values s stand above rounding.

    >>> numerical_rank(torch.tensor([1.0, 1e-3, 1e-9]), 1e-7)
    2
    """
    return int((s > eps * s.max()).sum()) if s.numel() else 0


def condition_number(s: Tensor) -> float:
    """The largest singular value over the least; infinite where one is zero."""
    if not s.numel() or not (least := float(s.min())) > 0:
        return float("inf")
    return float(s.max()) / least


def row_space_basis(A: Tensor, most: int, eps: float) -> Tensor:
    """Orthonormal basis (p, r), r ≤ ``most``, of the row space of A (m, p), rounding left out."""
    s, Vt = torch.linalg.svd(A, full_matrices=False)[1:]
    return Vt[: min(most, numerical_rank(s, eps))].T


def gram(A: Tensor) -> Tensor:
    """AᵀA (k, k) of A (m, k) in its upper triangle, which is all that a Cholesky factor needs:
    below it are zeros, where a block of columns spared them.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]])).triu().tolist()
    [[1.0, 2.0], [0.0, 13.0]]
    """
    product = A.new_zeros(A.shape[1], A.shape[1])
    for start in range(0, A.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        product[: block.stop, block] = A[:, : block.stop].T @ A[:, block]
    return product


def square_of_inverse(H: Tensor) -> float:
    """‖H⁻¹‖² (Frobenius) of an upper triangle H (k, k).

    >>> square_of_inverse(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    5.0
    """
    square, unit = 0.0, torch.eye(len(H)).to(H)
    for start in range(0, len(H), _BLOCK):  # columns of H⁻¹, which end at the diagonal
        stop = start + _BLOCK
        columns = torch.linalg.solve_triangular(H[:stop, :stop], unit[:stop, start:stop], upper=True)
        square += float(columns.square().sum())
    return square


def orthonormal(A: Tensor) -> Tensor:
    """An orthonormal basis, in columns, of the columns of A (m, k), k ≤ m."""
    return torch.linalg.qr(A).Q


def well_conditioned(A: Tensor) -> Tensor:
    """A basis of the columns of A (m, k), k ≤ m, orthonormal to some digits: for an
    iteration's next step.

    By the Gram matrix, a third of the time, where A's columns at length 1 are far from dependent.
    """
    A = A / A.norm(dim=0).clamp_min(torch.finfo(A.dtype).tiny)
    R, failed = torch.linalg.cholesky_ex(gram(A), upper=True)
    if failed or float(R.diagonal().min()) < 1e-4:
        return orthonormal(A)
    return torch.linalg.solve_triangular(R, A, upper=True, left=False)


def conjugate_gradients(
    system: Callable[[Tensor], Tensor],
    near: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    start: Tensor | None = None,
    steps: int,
    settled: float,
) -> tuple[Tensor, int]:
    """X with system(X) = right, both of one shape, for a symmetric positive definite linear ``system``;
    and the steps it took.

    Parameters
    ----------
    system, near : callable
        The system, and roughly its inverse, symmetric and positive definite too.
    right : Tensor
    start : Tensor, optional; default is 0
    steps : int, at most
    settled : float
        Where it ends: what is left, in the metric of ``near``, over ``right``.

    Examples
    --------
    >>> A, right = torch.tensor([[4.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([1.0, 2.0]).double()
    >>> X, _ = conjugate_gradients(lambda x: A @ x, lambda x: x / 4, right, steps=10, settled=1e-9)
    >>> X.mul(11).round(decimals=6).tolist()
    [1.0, 7.0]
    """
    X, left = (torch.zeros_like(right), right) if start is None else (start, right - system(start))
    enough = settled**2 * float((right * near(right)).sum())
    z = near(left)
    way, size = z, float((left * z).sum())
    for step in range(steps):
        if size <= enough:
            return X, step
        image = system(way)
        share = size / float((way * image).sum())
        X, left = X + share * way, left - share * image
        z = near(left)
        before, size = size, float((left * z).sum())
        way = z + size / before * way
    return X, steps
