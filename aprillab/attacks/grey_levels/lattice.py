"""Pictures on a grid: the whole numbers nearest to what is known of them.

A stored pixel is one of 256 levels. Where linear algebra leaves a patch uncertain in a few directions, most of the
pictures it still allows are not made of whole levels, and often a single one is. To find it is the closest-vector
problem of a lattice, integer least squares: min ‖R (g − t)‖ over whole g. A lattice has many bases; in a reduced one
(Lenstra, Lenstra, Lovász 1982; the FLINT library does it) the columns are short and nearly at right angles, and
rounding one coordinate after the other, keeping the best few at each step (Babai 1986; Schnorr and Euchner 1994;
"K-best" in radio receivers, where, as in satellite positioning, this is how integers are found), comes out right.
Chapter 07.
"""

from __future__ import annotations

from dataclasses import dataclass

import flint
import torch
from torch import Tensor

_BITS = 12  # below the shortest step of R's diagonal: what rounding R to whole numbers may not hide


@dataclass(frozen=True)
class ReducedLattice:
    """The lattice R·ℤᵖ in a reduced basis.

    Attributes
    ----------
    root : Tensor (p, p), float64
        R, upper triangular.
    basis : Tensor (p, p), float64
        U, whole numbers of determinant ±1: every whole g is U z for one whole z.
    triangle : Tensor (p, p)
        S of R U = Q S, upper triangular.
    rotation : Tensor (p, p)
        Q.
    """

    root: Tensor
    basis: Tensor
    triangle: Tensor
    rotation: Tensor

    def nearest(
        self, centres: Tensor, *, count: int = 2, width: int = 500, slack: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The whole vectors g of least ‖R (g − t)‖², as far as a search of limited width finds them.

        From the last coordinate of z to the first, the ``width`` best beginnings are kept, those that are worse
        than the best by more than ``slack`` left out.

        Parameters
        ----------
        centres : Tensor (p, m)
            t, in columns.
        count : int
            How many to return for each.
        width : int
        slack : float, default 8 p

        Returns
        -------
        points : Tensor (m, count, p), the nearest first
        distances : Tensor (m, count)
            ‖R (g − t)‖²; infinite where fewer were found: no other came near enough, or the search lost it.
        """
        S, (p, m) = self.triangle, centres.shape
        slack = 8.0 * p if slack is None else slack
        y = self.rotation.T @ (self.root @ centres)  # (p, m)
        steps = torch.arange(-3, 4).to(S)
        z = S.new_zeros(m, 1, 0)  # coordinates k + 1 … p − 1 of the beginnings that were kept
        distances = S.new_zeros(m, 1)
        for k in range(p - 1, -1, -1):
            middle = (y[k, :, None] - z @ S[k, k + 1 :]) / S[k, k]  # (m, w)
            tried = middle.round()[..., None] + steps  # (m, w, 7)
            worse = distances[..., None] + (S[k, k] * (tried - middle[..., None])).square()
            flat = worse.flatten(1)
            best = flat.topk(min(width, flat.shape[1]), largest=False)
            close = best.values <= best.values[:, :1] + slack
            kept = max(int(close.sum(1).max()), 1)
            chosen, distances = best.indices[:, :kept], best.values[:, :kept].masked_fill(~close[:, :kept], torch.inf)
            parents = z.gather(1, (chosen // len(steps))[..., None].expand(-1, -1, z.shape[2]))
            z = torch.cat([tried.flatten(1).gather(1, chosen)[..., None], parents], 2)
        points = z[:, :count] @ self.basis.T
        missing = count - points.shape[1]
        if missing > 0:
            points = torch.cat([points, points[:, -1:].expand(-1, missing, -1)], 1)
            distances = torch.cat([distances, distances.new_full((m, missing), torch.inf)], 1)
        return points, distances[:, :count]


def reduced_lattice(rows: Tensor) -> ReducedLattice:
    """Reduce the lattice of ‖W g‖ over whole g.

    Parameters
    ----------
    rows : Tensor (q, p), q ≥ p, of full rank
        W: one row for each thing known about g, divided by its standard deviation.

    Raises
    ------
    ValueError
        If W is rank-deficient to rounding.
    """
    if rows.shape[0] < rows.shape[1]:
        raise ValueError(f"rows of shape {tuple(rows.shape)} cannot have full rank: add a prior, a row a direction")
    R = torch.linalg.qr(rows.double()).R.cpu()
    R = R * R.diagonal().sign().masked_fill(R.diagonal() == 0, 1)[:, None]
    shortest = float(R.diagonal().abs().min())
    if not shortest > len(R) * torch.finfo(R.dtype).eps * float(R.abs().max()):
        raise ValueError("rows are of deficient rank: some direction is bound by nothing, so add a prior")
    whole = (R * (2**_BITS / shortest)).round()
    # FLINT reduces rows: the columns of R are the basis.
    _, transform = flint.fmpz_mat([[int(v) for v in column] for column in whole.T.tolist()]).lll(True)
    p = len(R)
    U = torch.tensor([[float(int(transform[i, j])) for i in range(p)] for j in range(p)], dtype=torch.float64)
    Q, S = torch.linalg.qr(R @ U)
    return ReducedLattice(*(part.to(rows.device) for part in (R, U, S, Q)))
