"""The row space of a gradient in finite precision: which directions carry tokens, at what cost.

A gradient D is a sum over tokens of (something) uᵀ, so its rows lie in the span of the tokens u.
Rounding puts them next to it. A direction is then neither in the span nor outside: it costs as much
as the smallest combination of D's rows that makes it, rows at equal noise, (7.7). With the singular
values s and the directions v of D, a vector w costs ‖c‖² = Σ (vᵀw)² / (s² + φ²), φ being the least
singular value that noise alone has.

Only the directions that tokens can have need singular vectors, and subspace iteration finds them.
What lies beyond is noise of little structure: a Cholesky factor of its Gram matrix serves, and
squaring harms nothing that even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_algebra import gram, orthonormal, well_conditioned

# Directions that the iteration carries along beyond the tokens: so many that one round is enough.
# tests/attacks/closed_forms/test_noisy_span.py holds the result against the full decomposition.
_OVERSAMPLING = 24
_SEED = 7  # of the mixtures that it begins with: any will do, if it is always the same
_TINY_PART = 1e-12  # of a Gram matrix, which its rounding in float64 may make negative
_LOOKED_AT = 96  # directions beyond the tokens that tell a row's noise, to 1/√(2 · 96) = 7 %


@dataclass(frozen=True)
class NoisySpan:
    """The row space of a gradient (m, w) whose rows were scaled to noise of variance 1.

    Attributes
    ----------
    tokens : int
        How many directions can be tokens.
    s, V : Tensor (k,), (w, k)
        The k strongest singular values and right singular vectors, more than ``tokens`` where there
        are more.
    beyond : Tensor (w, w)
        L, lower triangular, with L Lᵀ = D'ᵀD' + φ² and D' the rows without the directions V.
    floor : float
        φ, the least singular value that pure noise of this shape has.
    excess : float
        How much of the rows, at length 1, lies outside the tokens' directions: √(m⁻¹ Σ ‖row
        outside‖²).
    """

    tokens: int
    s: Tensor
    V: Tensor
    beyond: Tensor
    floor: float
    excess: float

    @property
    def gap(self) -> float:
        """The last token's singular value over the first one beyond the tokens; 1 where none is
        beyond.
        """
        if len(self.s) <= self.tokens:
            return 1.0
        return float(self.s[self.tokens - 1] / self.s[self.tokens].clamp_min(1e-300))

    @property
    def above_noise(self) -> int:
        """How many singular values are more than twice the first one beyond the tokens."""
        return int((self.s > 2 * self.s[min(self.tokens, len(self.s) - 1)]).sum())

    def coefficients(self, targets: Tensor | None = None) -> Tensor:
        """Columns whose norms are those of the smallest c with Dᵀ c ≈ target, for targets in
        columns (w, j); for the unit vectors, if none are given.
        """
        if targets is None:
            targets = torch.eye(len(self.V)).to(self.V)
            along = self.V.T
        else:
            along = self.V.T @ targets  # (k, j)
        strong = along / (self.s**2 + self.floor**2).sqrt()[:, None]
        beyond = torch.addmm(targets, self.V, along, alpha=-1)
        weak = torch.linalg.solve_triangular(self.beyond, beyond, upper=False)  # (w, j)
        return torch.cat([strong, weak])


def noisy_span(D: Tensor, tokens: int, eps: float, coarser: Tensor | None = None) -> NoisySpan:
    """Scale the rows of a gradient to equal noise, seen where no token can be, and decompose.

    Parameters
    ----------
    D : Tensor of shape (m, w), float64
    tokens : int
        How many directions tokens can have.
    eps : float
        Of the precision in which D was shared: no row is taken to be much more precise.
    coarser : Tensor (m,), optional
        How many times less precise than that each row is known to be.
    """
    (rows, width), lengths = D.shape, D.norm(dim=1) * (1 if coarser is None else coarser)
    if not lengths.all():
        D, lengths = D[lengths > 0], lengths[lengths > 0]
    D = D / lengths[:, None]
    k = min(tokens + _OVERSAMPLING, *D.shape)
    # What a row has outside the tokens' directions is its noise.
    DV, outside = outside_tokens(D, tokens, k)
    # Of few rows the tokens' directions bend towards the noise, and take their part of it.
    spare = max(width - tokens, 0) * (1 if rows >= width else max(rows - tokens, 0) / rows)
    excess, noise = row_noise(outside, spare, eps)
    # The tokens' directions once more, now that all rows count by what they know.
    D /= noise[:, None]
    s, V = strongest_directions(D, k, start=DV / noise[:, None])
    # Bai and Yin: noise of variance 1 in m × w numbers has no singular value below √m − √w.
    floor = max(rows**0.5 - width**0.5, 1.0)
    if rows < width:
        # What few rows have beyond the tokens is noise, and not the noise of the combinations that
        # make the tokens.
        return NoisySpan(tokens, s, V, floor * torch.eye(width).to(D), floor, excess)
    # Noise alone is as even as can be: seven digits of its Gram matrix are more than enough.
    rest = D.addmm_(D @ V, V.T, alpha=-1).float()
    return NoisySpan(tokens, s, V, _root(rest, floor**2), floor, excess)


def residuals_by_row(D: Tensor, tokens: int, coarser: Tensor | None = None) -> Tensor:
    """How much of each row of D (m, w), at length 1, lies outside the ``tokens`` strongest
    directions of all (m,); over what the row is ``coarser`` (m,), if it is known to be.

    >>> residuals_by_row(torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 1e-3]]).double(), 1) < 1e-3
    tensor([True, True, True])
    """
    lengths = D.norm(dim=1) * (1 if coarser is None else coarser)
    D = D / lengths[:, None].clamp_min(torch.finfo(D.dtype).tiny)
    return outside_tokens(D, tokens, min(tokens + _OVERSAMPLING, *D.shape))[1].norm(dim=1)


def _root(rest: Tensor, square: float) -> Tensor:
    """L (w, w) with L Lᵀ = restᵀ rest + ``square``, float64; ``rest`` (m, w) is float32."""
    squares = gram(rest)
    squares.diagonal().add_(square)
    root, failed = torch.linalg.cholesky_ex(squares, upper=True)
    if failed:  # what is beyond is no noise: then it takes all digits
        squares = gram(rest.double())
        squares.diagonal().add_(square + _TINY_PART * float(squares.trace()))
        root = torch.linalg.cholesky(squares, upper=True)
    return root.double().T


def outside_tokens(D: Tensor, tokens: int, k: int) -> tuple[Tensor, Tensor]:
    """D V (m, k), with V nearly D's k strongest directions, and what lies outside the ``tokens``
    strongest: for each row of D (m, w) numbers whose squares sum to that of its length there.

    Where the width is large, V is found in mixtures of the rows, and the squares sum to it in
    expectation: some random combinations of the directions beyond V stand for all.
    """
    width = D.shape[1]
    _, V = strongest_directions(D if 2 * k >= width else mixtures(D, 2 * k), k)
    if width <= 2 * _LOOKED_AT:
        beyond = torch.eye(width).to(D)
    else:
        beyond = random(width, _LOOKED_AT).to(D) / _LOOKED_AT**0.5
    seen = D @ torch.cat([V, beyond - V @ (V.T @ beyond)], 1)
    # V is not exact, so tokens lie outside by a little: the part that goes with what they are in V.
    outside, along = seen[:, tokens:], well_conditioned(seen[:, :k][:, :tokens])
    return seen[:, :k], outside - along @ (along.T @ outside)


def random(*shape: int) -> Tensor:
    """Normal numbers, always the same, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)


def mixtures(D: Tensor, number: int) -> Tensor:
    """So many sums (number, w) of rows of D (m, w), with random signs; each row is in one of them.

    Twice as many as there are directions show them all, nearly as well as D does (Clarkson and
    Woodruff, STOC 2013), and cost no more than to read D once.
    """
    sums, signs = torch.zeros_like(D[:number]), random(len(D), 1).sign().to(D)
    for rows, sign in zip(D.split(number), signs.split(number), strict=True):
        sums[: len(rows)].addcmul_(sign, rows)
    return sums


def strongest_directions(D: Tensor, k: int, *, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k strongest singular values (k,) and right singular vectors V (w, k) of D (m, w).

    By one round of subspace iteration, from random mixtures of the rows (Halko, Martinsson and
    Tropp, SIAM Review 2011) or from a ``start`` (m, k) whose columns nearly span those of D V.
    Nothing is squared, so all that float64 can hold is seen. Where k is no small part of the width,
    the whole decomposition is as cheap.

    >>> s, V = strongest_directions(torch.diag(torch.tensor([1.0, 1e-9, 1e-12]).double()), 2)
    >>> [f"{value:.0e}" for value in s.tolist()]
    ['1e+00', '1e-09']
    """
    if 2 * k >= D.shape[1]:
        s, Vt = torch.linalg.svd(torch.linalg.qr(D, mode="r").R, full_matrices=False)[1:]
        return s[:k], Vt[:k].T
    if start is None:
        start = D @ orthonormal(mixtures(D, k).T)
    V, triangle = torch.linalg.qr(D.T @ well_conditioned(start))
    rotation, s, _ = torch.linalg.svd(triangle)
    return s, V @ rotation


def row_noise(outside: Tensor, spare: float, eps: float) -> tuple[float, Tensor]:
    """How much lies outside the tokens' directions, and an entry's noise by row (m,).

    ``outside`` (m, w) is what rows of length 1 have there, in ``spare`` dimensions. With none to
    spare nothing can be measured: then the noise is ``eps``.
    """
    if spare <= 0:
        return 0.0, outside.new_full((len(outside),), eps)
    noise = outside.square().sum(1).div(spare).sqrt()
    excess = float(noise.square().mean().sqrt()) * spare**0.5
    # No row counts as ten times more precise than most, nor as a thousand times more than its
    # format.
    # Nor as more than float64 resolves of a row of length 1.
    least = max(1e-3 * eps, torch.finfo(torch.float64).eps) / outside.shape[1] ** 0.5
    return excess, noise.clamp_min(max(0.1 * float(noise.median()), least))
