"""The smallest combination of a gradient's rows that makes a patch's token, (7.7): least
squares in the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_algebra import gram
from .noisy_span import NoisySpan
from .token_equations import TokenEquations

# Normal equations square the condition number. Where the factor's diagonal shows a square up to
# this, one step of refinement leaves no more than QR does; beyond it QR is taken.
_MOST_SQUARED = 1e8
_TOUCH = 1e-12  # of a token's cost


@dataclass(frozen=True)
class Smallest:
    """The patches whose tokens and whose own pixels are the smallest combinations, (7.7).

    Attributes
    ----------
    patches : Tensor (p, n)
    root : Tensor (p, p)
        H, with HᵀH the normal matrix.
    token_cost, pixel_cost : Tensor (n,)
        ‖c‖² of each token and ‖c'‖² of each patch.
    """

    patches: Tensor
    root: Tensor
    token_cost: Tensor
    pixel_cost: Tensor


def smallest(
    T: Tensor, t: Tensor, R: Tensor, ratio: float, normal: tuple[Tensor, Tensor], *, refined: bool = True
) -> Smallest:
    """The pixels x of least ‖T x + t‖² + ratio² ‖R x‖², (7.7), for all columns of t (m, n) at once.

    ``normal`` has the upper triangles of TᵀT and RᵀR, (p, p) each, which are the same for every
    ratio. The costs are those before a step of refinement, which ``refined=False`` spares.

    >>> T, t = torch.eye(2).double(), torch.tensor([[2.0], [4.0]]).double()
    >>> smallest(T, t, T, 1.0, (T, T)).patches.flatten().round(decimals=9).tolist()
    [-1.0, -2.0]
    """
    H, failed = torch.linalg.cholesky_ex(normal[0] + ratio**2 * normal[1], upper=True)
    squared = failed or float((H.diagonal().max() / H.diagonal().min()) ** 2) >= _MOST_SQUARED
    if squared:
        Q, H = torch.linalg.qr(torch.cat([T, ratio * R]))
        X = torch.linalg.solve_triangular(H, Q[: len(T)].T @ -t, upper=True)
    else:
        X = torch.cholesky_solve(T.T @ -t, H, upper=True)
    c, c_pixel = torch.addmm(t, T, X), R @ X
    if refined and not squared:  # one step of refinement, from residuals that squared nothing
        X = X - torch.cholesky_solve(T.T @ c + ratio**2 * (R.T @ c_pixel), H, upper=True)
    return Smallest(X, H, c.square().sum(0), c_pixel.square().sum(0))


def smallest_combination(
    sides: Sequence[tuple[TokenEquations, NoisySpan]], pixel_side: NoisySpan | None
) -> tuple[Smallest, float, float]:
    """The patches of the smallest combinations, (7.7), the variance of one
    coefficient, and the ratio.

    Token equations may be several, each with the span of its own rounds: their costs add up,
    (10.3). The ratio says how much a patch's own coefficients weigh against its token's; 0 where
    the patch embedding's gradient is not there, and the tokens say all.
    """
    # What a token and a patch cost: ‖T x + t‖ = ‖c‖ and ‖R x‖ = ‖c'‖.
    T = torch.cat([span.coefficients(equations.A) for equations, span in sides])
    t = torch.cat([span.coefficients(equations.e) for equations, span in sides])
    of = sum(len(equations.A) for equations, _ in sides)
    if pixel_side is None:
        # A touch of the pixels' own size, for directions of which the tokens say nothing.
        R, squares = torch.eye(T.shape[1]).to(T), gram(T)
        touch = _TOUCH * float(squares.diagonal().mean()) ** 0.5
        alone = smallest(T, t, R, touch, (squares, R))
        # Of few rows the tokens' directions cost nothing, and tell nothing of the variance.
        of -= sum(span.tokens for equations, span in sides if len(equations.D) < len(equations.A))
        return alone, float(alone.token_cost.mean()) / max(of - T.shape[1], 1), 0.0
    R = pixel_side.coefficients()  # of the pixels themselves: the unit vectors
    normal = gram(T), gram(R)
    # Both estimate the same amplification of noise: a second solve brings them to one scale.
    # Some fifty patches tell it.
    first = smallest(T, t[:, :: max(1, t.shape[1] // 48)], R, 1.0, normal, refined=False)
    ratio = float((first.token_cost / first.pixel_cost.clamp_min(1e-300)).median().sqrt())
    solution = smallest(T, t, R, ratio, normal)
    # What is left, over w + p equations less p unknowns, is the variance of one coefficient.
    minimum = solution.token_cost + ratio**2 * solution.pixel_cost  # (n,)
    return solution, float(minimum.mean()) / of, ratio
