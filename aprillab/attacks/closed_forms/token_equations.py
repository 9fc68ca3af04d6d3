"""What the first attention's gradient says of a token, with the norms in front of it taken off.

The rows D lie in the span of the u_i that the attention reads. Whatever stands between a token z
and u is undone up to a factor of each token, which a span does not mind:

    nothing                u = z                          z is in the span of D
    LayerNorm γ, β         u = γ ∘ (Π z)/σ + β            Π z is in that of D/γ and β/γ
    RMSNorm γ              u = γ ∘ z/σ                    z is in that of D/γ
    LayerNorm γ₁, β₁ and   y = γ₁ ∘ (Π z)/σ₁ + β₁         Π Γ₁ Π z is in that of D/γ₂, β₂/γ₂ and Π β₁
    LayerNorm γ₂, β₂       u = γ₂ ∘ (Π y)/σ₂ + β₂

with Π = I − 11ᵀ/d, and Γ₁ the diagonal matrix of γ₁. The last line: γ₂⁻¹ (u − β₂) is parallel to
Π y, and σ₁ Π y = Π Γ₁ Π z + σ₁ Π β₁. So two LayerNorms cost one known direction more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DEAD = 1e-3  # of the median γ: a feature with less carries nothing to the attention


@dataclass(frozen=True)
class TokenEquations:
    """What is known of the tokens: A x_i + e_i lies in the span of the rows of D.

    Attributes
    ----------
    D : Tensor (3d, w), the projections' gradients
    A : Tensor (w, p), Π W_e
    e : Tensor (w, n), Π (b_e + E_i) in columns
    usable : int
        The width that counts: without features that do not reach the attention.
    """

    D: Tensor
    A: Tensor
    e: Tensor
    usable: int


def token_equations(
    D: Tensor,
    W_e: Tensor,
    places: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    before: tuple[Tensor, Tensor | None] | None = None,
    centred: bool = True,
) -> TokenEquations:
    """Equations (7.3) and (7.4): the norms, if there are any (γ given), taken off both sides.

    Parameters
    ----------
    D : Tensor (3d, d)
        ∂l/∂W_Q, ∂l/∂W_K and ∂l/∂W_V of the first block, one below the other.
    W_e : Tensor (d, p)
    places : Tensor (n, d)
        b_e + E_i, one patch a row.
    gamma, beta : Tensor (d,), of the norm before the attention
    before : γ₁ and β₁ (d,), of a LayerNorm in front of that one
    centred : bool
        Whether the norm before the attention takes the mean off; an RMSNorm does not.
    """
    A, e = W_e, places.T
    if gamma is None:
        return TokenEquations(D, A, e, len(A))
    known = []
    if before is not None:
        # σ₁ (y − β₁) = Γ₁ Π z; the next step centres it, and Π β₁ is in every token.
        A, e = (before[0][:, None] * _centre(x) for x in (A, e))
        known = [] if before[1] is None else [_centre(before[1])]
    # γ⁻¹(u − β) is parallel to Π z: centre the tokens, divide the rows by γ.
    if centred:
        A, e = _centre(A), _centre(e)
    alive = gamma.abs() > _DEAD * gamma.abs().median()
    if not alive.all():
        D, A, e, gamma, known = D[:, alive], A[alive], e[alive], gamma[alive], [v[alive] for v in known]
    D, usable = D / gamma, len(A)
    if beta is not None:
        known = [beta[alive] / gamma, *known]
    # A multiple of β/γ is in every row: take its direction out of both sides. The mean's goes with
    # it.
    while known:
        direction, *known = known
        if direction.any():
            mirror = _mirror_onto_first(direction)
            D = D.addr_(D @ mirror, mirror, alpha=-2)[:, 1:]  # in place: D/γ is nobody else's
            A, e, *known = ((x - 2 * _times(mirror, mirror @ x))[1:] for x in (A, e, *known))
    return TokenEquations(D, A, e, usable)


def _centre(x: Tensor) -> Tensor:
    """Π x, for a vector (d,) or columns (d, m)."""
    return x - x.mean(0)


def _times(mirror: Tensor, row: Tensor) -> Tensor:
    """The outer product with a row (m,), or with a number."""
    return torch.outer(mirror, row) if row.ndim else mirror * row


def _mirror_onto_first(v: Tensor) -> Tensor:
    """The unit normal of Householder's reflection that takes v to a multiple of the first basis
    vector.
    """
    normal = v / v.norm()
    normal[0] += torch.copysign(torch.ones_like(normal[0]), normal[0])
    return normal / normal.norm()
