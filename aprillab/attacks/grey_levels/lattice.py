"""Pictures on a grid: the whole numbers nearest to what is known of them.

A stored pixel is one of 256 levels. Where linear algebra leaves a patch uncertain in a few
directions, most of the pictures it still allows are not made of whole levels, and often a single
one is. To find it is the closest-vector problem of a lattice, integer least squares:

    min ‖W (g − t)‖  over whole g,                                               (8.5)

with t what is known and W its rows over their deviations. A lattice has many bases. In a reduced
one (Lenstra, Lenstra, Lovász 1982; the FLINT library does it) the columns are short and nearly at
right angles. Babai (1986) then rounds one coordinate after the other, from the last to the first
(8.6). Keeping the best few beginnings at each step, and not one (Schnorr and Euchner 1994; "K-best"
in radio receivers; satellite positioning finds its whole numbers of wavelengths in the same way),
comes out right far more often. None of this is guaranteed to find the nearest vector in dimensions
like a patch's: it does where that one is nearer than all others by far, and a replay of the client
says whether it did.

:func:`k_best` is that search for one point, as chapter 08 tells it;
:meth:`ReducedLattice.nearest` is the same for many points at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Measured in data/results/calibration.md (`python -m studies.calibration`), unless said otherwise.
# FLINT takes whole numbers: R is rounded to 2⁻¹³ of the shortest step of its diagonal. From 6 bits
# on the shortest step of the reduced basis differs by no more than a fifth, up or down.
BITS = 12
_REACH = 3  # whole numbers tried on either side: 99 % of the truth's coordinates and more lie within
_SLACK = 8.0  # p deviations² behind the best a beginning is dropped: from 0.5 to 32 nothing changes
_WIDTH = 500  # beginnings kept: more find more in the hardest setting, at a time in proportion


def k_best(
    triangle: Tensor, target: Tensor, *, width: int = 1, slack: float = torch.inf
) -> list[tuple[float, Tensor]]:
    """The whole z of least ‖S z − y‖², as far as a search of limited width finds them.

    The search of :meth:`ReducedLattice.nearest` for a single point, written to be read.
    With ``width=1`` this is Babai's nearest plane, exercise 8.4.

    Parameters
    ----------
    triangle : Tensor (p, p)
        S, upper triangular.
    target : Tensor (p,)
        y
    width : int
        How many beginnings are kept at each step.
    slack : float
        Those that are worse than the best by more than this are dropped.

    Returns
    -------
    list of (squared distance, z), the nearest first

    Examples
    --------
    >>> S = torch.tensor([[2.0, 0.9], [0.0, 1.0]])
    >>> for distance, z in k_best(S, S @ torch.tensor([3.1, -1.0]), width=2):
    ...     print(f"{distance:.2f}", z.tolist())
    0.04 [3.0, -1.0]
    1.81 [4.0, -2.0]
    """
    beginnings = [(0.0, target[:0])]  # distance² so far, and z_{k+1} … z_{p−1}
    for k in reversed(range(len(target))):
        longer = []
        for distance, z in beginnings:
            # The value of z_k that row k of S z = y would have, given those behind it (8.6).
            middle = (target[k] - triangle[k, k + 1 :] @ z) / triangle[k, k]
            for z_k in middle.round() + torch.arange(-_REACH, _REACH + 1):
                added = float((triangle[k, k] * (z_k - middle)).square())
                longer.append((distance + added, torch.cat([z_k[None], z])))
        longer.sort(key=lambda beginning: beginning[0])
        beginnings = [one for one in longer[:width] if one[0] <= longer[0][0] + slack]
    return beginnings


@dataclass(frozen=True)
class ReducedLattice:
    """The lattice R·ℤᵖ in a reduced basis; Q S = R U is chapter 08's Q T = W U.

    Attributes
    ----------
    root : Tensor (p, p), float64
        R, upper triangular, with ‖R g‖ = ‖W g‖.
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
        self, centres: Tensor, *, count: int = 2, width: int = _WIDTH, slack: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The whole g of least ‖R (g − t)‖², as far as a search of limited width finds them.

        :func:`k_best` for m points at once.

        Parameters
        ----------
        centres : Tensor (p, m)
            t, in columns.
        count : int
            How many to return for each.
        width : int
            How many beginnings are kept at each step, for each point.
        slack : float, default 8 p
            Beginnings that are worse than the best by more than this are dropped.

        Returns
        -------
        points : Tensor (m, count, p), the nearest first
        distances : Tensor (m, count)
            ‖R (g − t)‖²; infinite where fewer were found: no other came near enough, or the
            search lost it.
        """
        p, m = centres.shape
        slack = _SLACK * p if slack is None else slack
        target = self.rotation.T @ (self.root @ centres)  # (p, m): y = Qᵀ R t
        beginnings = target.new_zeros(m, 1, 0), target.new_zeros(m, 1)
        for k in reversed(range(p)):
            beginnings = _continued(beginnings, target[k], self.triangle[k, k:], width, slack)
        z, distances = beginnings  # (m, w, p), (m, w)
        points = z[:, :count] @ self.basis.T  # (m, ≤ count, p): g = U z
        missing = count - points.shape[1]
        if missing > 0:
            points = torch.cat([points, points[:, -1:].expand(-1, missing, -1)], 1)
            distances = torch.cat([distances, distances.new_full((m, missing), torch.inf)], 1)
        return points, distances[:, :count]


def _continued(
    beginnings: tuple[Tensor, Tensor], target: Tensor, row: Tensor, width: int, slack: float
) -> tuple[Tensor, Tensor]:
    """One step of :meth:`ReducedLattice.nearest`: coordinate k put before those behind it.

    Takes and returns the beginnings z (m, w, coordinates) of all points and their distances²
    (m, w), the nearest first. ``target`` (m,) is y_k, ``row`` (p − k,) is row k of S from its
    diagonal on.
    """
    z, distances = beginnings  # (m, w, p − 1 − k), (m, w)
    steps = torch.arange(-_REACH, _REACH + 1).to(z)  # (7,)
    # Each beginning goes on with the seven whole numbers nearest to what row k asks for (8.6).
    middle = (target[:, None] - z @ row[1:]) / row[0]  # (m, w)
    z_k = middle.round()[..., None] + steps  # (m, w, 7)
    longer = distances[..., None] + (row[0] * (z_k - middle[..., None])).square()  # (m, w, 7)
    # The best of these 7 w are kept. Every point keeps as many as the one that needs most; what is
    # too far from its best has an infinite distance.
    best, chosen = longer.flatten(1).topk(min(width, longer[0].numel()), largest=False)  # (m, w') both
    close = best <= best[:, :1] + slack  # (m, w')
    kept = max(int(close.sum(1).max()), 1)
    chosen, distances = chosen[:, :kept], best[:, :kept].masked_fill(~close[:, :kept], torch.inf)
    # Choice 7 i + j is beginning i, continued by number j.
    behind = (chosen // len(steps))[..., None].expand(-1, -1, z.shape[2])  # (m, kept, p − 1 − k)
    z = torch.cat([z_k.flatten(1).gather(1, chosen)[..., None], z.gather(1, behind)], 2)  # (m, kept, p − k)
    return z, distances


def reduced_lattice(rows: Tensor, *, bits: int = BITS) -> ReducedLattice:
    """Reduce the lattice of ‖W g‖ over whole g.

    Parameters
    ----------
    rows : Tensor (q, p), q ≥ p, of full rank
        W: one row for each thing known about g, divided by its standard deviation.
    bits : int
        FLINT takes whole numbers: to so many bits below the shortest step of R's diagonal R is
        rounded for it. The basis is one of the exact lattice all the same.

    Raises
    ------
    ValueError
        If W is rank-deficient to rounding.
    ModuleNotFoundError
        If python-flint is not installed.

    Examples
    --------
    >>> rows = torch.tensor([[1.0, 100.0], [0.0, 0.1]], dtype=torch.float64)  # nearly parallel
    >>> (rows @ reduced_lattice(rows).basis).norm(dim=0).tolist()  # short ones of the same lattice
    [0.1, 1.0]
    """
    if rows.shape[0] < rows.shape[1]:
        raise ValueError(f"rows of shape {tuple(rows.shape)} cannot have full rank: add a prior, a row a direction")
    # W = Q R, with a positive diagonal: ‖W g‖ = ‖R g‖.
    root = torch.linalg.qr(rows.double()).R.cpu()
    root = root * root.diagonal().sign().masked_fill(root.diagonal() == 0, 1)[:, None]
    shortest = float(root.diagonal().abs().min())
    if not shortest > len(root) * torch.finfo(root.dtype).eps * float(root.abs().max()):
        raise ValueError("rows are of deficient rank: some direction is bound by nothing, so add a prior")
    basis = _reduced_basis((root * (2**bits / shortest)).round())
    rotation, triangle = torch.linalg.qr(root @ basis)  # R U = Q S
    return ReducedLattice(*(part.to(rows.device) for part in (root, basis, triangle, rotation)))


def _reduced_basis(whole: Tensor) -> Tensor:
    """U (p, p): the columns of a whole matrix, times U, are a reduced basis of their lattice."""
    try:
        import flint
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "reducing a lattice needs python-flint, which is not installed here: `pip install python-flint`"
        ) from missing
    # FLINT reduces rows: it is given the columns as rows, and the transform comes back transposed.
    columns = [[int(number) for number in column] for column in whole.T.tolist()]
    _, transform = flint.fmpz_mat(columns).lll(True)
    rows = [[float(int(number)) for number in row] for row in transform.tolist()]
    return torch.tensor(rows, dtype=torch.float64).T.contiguous()
