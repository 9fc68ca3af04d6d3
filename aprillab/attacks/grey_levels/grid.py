"""What the span attack knows of patches, in grey levels: the lattice of the patches that it allows.

The error of a patch has a known covariance. Divided by its deviations it is a set of rows W, and
the whole levels that the span finds most probable minimize ‖W (g − ĝ)‖. With the rows of a prior,
patches near a guess or smooth ones, this is the lattice that lattice.py reduces. Chapter 08,
equations (8.4) to (8.6).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from ...anatomy import Tiling
from ...preprocessing import Preprocessing
from ..closed_forms.span_solution import SpanSolution
from .lattice import ReducedLattice, reduced_lattice

# Measured in data/results/calibration.md (`python -m studies.calibration`), unless said otherwise.
# Predicted deviations, in levels, are multiplied by _SAFETY up to SURE and by TOO_SURE above. The
# true error is larger by factors that differ from direction to direction, in the median up to 56
# and at most 163 above SURE: these are typical factors and no bounds. What is settled near a
# search's picture is nearly the same from 5 to 80, and fewer patches without a factor.
SURE, _SAFETY, TOO_SURE = 1e-3, 3.0, 20.0
_LEAST = 1e-5  # levels: a client's float32 pixels are off by up to 127.5 · 2⁻²⁵ = 4e-6
_UNKNOWN_ABOVE = 30.0  # levels, half of _CONTRAST: worth less than the prior. 3 to 100 settle the same
# Standard deviations in levels, between neighbours and around the middle. Photographs of 16 to 64
# pixels have 23 to 27 and 60 to 62 in the median: this prior takes pictures to be smoother.
_ROUGHNESS, _CONTRAST = 15.0, 60.0
# Whole-level patches for a place: COUNTED are looked for, LISTED are tried, a gradient each. The
# first 12 hold 83 to 100 % of the truth, 400 hold 90 to 100 %. To find as many the search is
# wider than for two: _WIDE beginnings, _WIDE_SLACK p deviations² behind the best, a choice that was
# not measured.
COUNTED, LISTED = 400, 12
_WIDE, _WIDE_SLACK = 2000, 30.0
# Of the smoothest picture, which a search starts from, so two digits will do: not measured.
_TOLERANCE, _MOST_STEPS = 1e-2, 200  # of conjugate gradients
_LENGTHS = (1e-3, 255.0)  # levels: no direction is shorter than can be seen, nor longer than all levels


@dataclass(frozen=True, eq=False)
class Grid:
    """The span attack's patches and their errors, in levels; patches are columns.

    Attributes
    ----------
    centres : Tensor (p, n)
        ĝ, the span's patches.
    directions : Tensor (p, p)
        Orthonormal directions of a patch, in rows; the same for all patches.
    deviations : Tensor (p,)
        The standard deviation of the error in each, in levels, with a margin.
    scale, offset : Tensor (p,)
        A patch g in levels is scale · x + offset, x in model-input space.
    levels : int
    tiling : how a picture is cut into patches
    unknown_above : float
        Directions of larger deviation, in levels, count as not known.
    """

    centres: Tensor
    directions: Tensor
    deviations: Tensor
    scale: Tensor
    offset: Tensor
    levels: int
    tiling: Tiling
    unknown_above: float = _UNKNOWN_ABOVE

    @classmethod
    def of(cls, solution: SpanSolution, preprocessing: Preprocessing, levels: int) -> Grid:
        """What the span says, put into levels, its deviations made honest."""
        tiling = solution.tiling
        blank = torch.zeros_like(solution.images)  # (1, C, H, W)
        # Level = (levels − 1) · pixel, and a pixel is linear in the model's input.
        offset = (levels - 1) * tiling.patches(preprocessing.to_pixels(blank, clamp=False))[0, 0]  # (p,)
        scale = (levels - 1) * tiling.patches(preprocessing.to_pixels(blank + 1, clamp=False))[0, 0] - offset
        directions, nominal = nominal_deviations(solution, scale)
        centres = scale[:, None] * solution.patches + offset[:, None]
        return cls(centres, directions, calibrated(nominal), scale, offset, levels, tiling)

    # --- What is known ----------------------------------------------------------------------------

    @cached_property
    def known(self) -> Tensor:
        """W (q, p): what the span knows, each row divided by its standard deviation."""
        sure = self.deviations < self.unknown_above
        return self.directions[sure] / self.deviations[sure, None]

    def misfit(self, patches: Tensor, places: Tensor) -> Tensor:
        """How far patches (p, m) at their places (m,) are from what the span knows.

        Mean squares in deviations, (m,).
        """
        return (self.known @ (patches - self.centres[:, places])).square().mean(0)

    # --- Patches near a guess ---------------------------------------------------------------------

    def near(self, distance: float) -> ReducedLattice:
        """The lattice of patches that the span allows, some levels (r.m.s.) from a guess.

        Takes up to 10 s to reduce for 192 pixels a patch.
        """
        return reduced_lattice(self._with_prior_rows(torch.eye(len(self.centres)).to(self.centres) / distance))

    def near_centres(self, distance: float, guesses: Tensor) -> Tensor:
        """The most probable patches near guesses, both (p, B·n), before rounding."""
        return self._most_probable(torch.eye(len(guesses)).to(guesses) / distance, guesses / distance)

    # --- Smooth patches ---------------------------------------------------------------------------

    @cached_property
    def smooth(self) -> ReducedLattice:
        """The lattice of patches that the span allows, the smooth ones shorter."""
        return reduced_lattice(self.smooth_rows)

    @property
    def smooth_rows(self) -> Tensor:
        """Rows (q, p) of what the span knows and of how smooth patches are."""
        return self._with_prior_rows(self._smoothness()[0])

    @cached_property
    def candidates(self) -> list[Tensor]:
        """For each place the smoothest whole-level patches (≤ 12, p) that the span allows."""
        return [patches[:LISTED] for patches in self.smooth_patches()]

    def smooth_patches(self) -> list[Tensor]:
        """For each place whole-level patches (≤ 400, p) that the span allows, smooth ones first."""
        points, distances = self.smooth.nearest(
            self.smooth_centres(), count=COUNTED, width=_WIDE, slack=_WIDE_SLACK * len(self.centres)
        )
        inside = ((points >= 0) & (points < self.levels)).all(2) & distances.isfinite()  # (n, count)
        return [point[ok] for point, ok in zip(points, inside, strict=True)]

    def smooth_centres(self) -> Tensor:
        """The most probable patches (p, n) where smooth ones are more probable, before rounding."""
        prior, wanted = self._smoothness()
        return self._most_probable(prior, wanted[:, None].expand(-1, self.centres.shape[1]))

    def _smoothness(self) -> tuple[Tensor, Tensor]:
        """Rows that say: neighbours resemble each other, no level is far from the middle.

        Also the values that the rows should have, (rows,).
        """
        p = len(self.centres)
        number = self.tiling.boxes(torch.arange(p).reshape(1, 1, p))[0, 0]  # of each pixel, (C, h, w)
        eye = torch.eye(p).to(self.centres)
        down = eye[number[:, 1:].flatten()] - eye[number[:, :-1].flatten()]
        right = eye[number[:, :, 1:].flatten()] - eye[number[:, :, :-1].flatten()]
        rows = torch.cat([down, right, eye * (_ROUGHNESS / _CONTRAST)]) / self._roughness
        return rows, rows @ torch.full((p,), (self.levels - 1) / 2).to(rows)

    @property
    def _roughness(self) -> float:
        """The standard deviation of the step from a pixel to its neighbour, in levels."""
        return _ROUGHNESS * ((self.levels - 1) / 255)

    def _with_prior_rows(self, prior: Tensor) -> Tensor:
        return torch.cat([self.known, prior])

    def _most_probable(self, prior: Tensor, wanted: Tensor) -> Tensor:
        """Least squares: W g = W ĝ and prior · g = wanted (rows, B·n), patch by patch."""
        batch = wanted.shape[1] // self.centres.shape[1]
        right = torch.cat([(self.known @ self.centres).repeat(1, batch), wanted])
        Q, R = torch.linalg.qr(self._with_prior_rows(prior))
        return torch.linalg.solve_triangular(R, Q.T @ right, upper=True)

    # --- Pictures ---------------------------------------------------------------------------------

    def images(self, patches: Tensor) -> Tensor:
        """(B, C, H, W) in model-input space, of patches (B, n, p) in levels."""
        return self.tiling.images((patches - self.offset) / self.scale)

    def patches(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`images`."""
        return self.tiling.patches(images.to(self.centres)) * self.scale + self.offset

    def smoothest(self, patches: Tensor, free: Tensor) -> Tensor:
        """The smoothest picture whose free patches are what the span allows.

        A free patch is ĝ + Σ_k c_k τ_k v_k, with v_k the directions, τ_k their deviations and
        coefficients c_k of deviation 1; the others stay. What is minimized is quadratic,

            Σ (step from a pixel to its neighbour)² / roughness²  +  Σ c²,

        so the best c solves one linear system, (Aᵀ L A + I) c = −Aᵀ L g₀, with A from coefficients
        to pixels, L the Laplacian of the grid of pixels over the roughness², and g₀ the picture of
        c = 0. Conjugate gradients solve it.

        Parameters
        ----------
        patches : Tensor (n, p), in levels
        free : Tensor (n,) of bool

        Returns
        -------
        Tensor (n, p)
        """
        rows = self.directions * self.deviations.clamp(*_LENGTHS)[:, None]  # τ_k v_k
        start = torch.where(free[:, None], self.centres.T, patches)  # g₀
        shape = start.shape  # of c, too: there are p directions

        def to_patches(c: Tensor) -> Tensor:  # A
            return (c * free[:, None]) @ rows

        def pull(patches: Tensor) -> Tensor:  # Aᵀ L
            images = self.tiling.images(patches[None])
            return (self.tiling.patches(laplacian(images))[0] / self._roughness**2) @ rows.T * free[:, None]

        def normal(flat: np.ndarray) -> np.ndarray:  # Aᵀ L A + I
            c = torch.as_tensor(flat).to(start).reshape(shape)
            return (pull(to_patches(c)) + c).flatten().cpu().numpy()

        right = -pull(start).flatten().cpu().numpy()
        system = LinearOperator((right.size, right.size), matvec=normal, dtype=right.dtype)
        c, _ = cg(system, right, rtol=_TOLERANCE, maxiter=_MOST_STEPS)
        return start + to_patches(torch.as_tensor(c).to(start).reshape(shape))


def calibrated(
    nominal: Tensor,
    *,
    sure: float = SURE,
    safety: float = _SAFETY,
    too_sure: float = TOO_SURE,
    least: float = _LEAST,
) -> Tensor:
    """The deviations to reckon with, for those that the span predicts; all in levels."""
    return torch.where(nominal > sure, too_sure * nominal, safety * nominal).clamp_min(least)


def nominal_deviations(solution: SpanSolution, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What the span predicts: directions of a patch, and the deviation of the error in each.

    Orthonormal directions in rows (p, p), deviations (p,) in levels, for ``scale`` (p,) levels a
    unit of model input.
    """
    s, directions = torch.linalg.svd(solution.root / scale)[1:]
    return directions, solution.variance**0.5 / s.clamp_min(torch.finfo(s.dtype).tiny)


def laplacian(images: Tensor) -> Tensor:
    """Σ over a pixel's neighbours of its difference to them; half the gradient of Σ (steps)².

    >>> laplacian(torch.tensor([[0.0, 1.0, 3.0]]))
    tensor([[-1., -1.,  2.]])
    """
    total = torch.zeros_like(images)
    for axis in (-1, -2):
        edge = torch.zeros_like(images.narrow(axis, 0, 1))
        # A pixel's step to the next, minus the step that led to it; the edge has no step.
        total -= images.diff(dim=axis).diff(dim=axis, prepend=edge, append=edge)
    return total
