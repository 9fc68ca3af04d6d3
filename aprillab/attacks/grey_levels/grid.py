"""What the span attack knows of patches, in grey levels: the lattice of the patches that it allows.

The error of a patch has a known covariance. Divided by its deviations it is a set of rows W, and
the whole levels that the span finds most probable minimize ‖W (g − ĝ)‖. With the rows of a prior,
patches near a guess or smooth ones, this is the lattice that lattice.py reduces. Chapter 07,
equations (7.10) to (7.12).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from ...models import patchify, unpatchify
from ...preprocessing import Preprocessing
from ..closed_forms.span_solution import SpanSolution
from .lattice import ReducedLattice, reduced_lattice

_SURE, _TOO_SURE, _SAFETY, _LEAST = 1e-3, 20.0, 3.0, 1e-5
_UNKNOWN_ABOVE = 30.0
_ROUGHNESS, _CONTRAST = 15.0, 60.0
_LISTED = 12
_COUNTED, _WIDE, _WIDE_SLACK = 400, 2000, 30.0
_STEPS = (1e-3, 255.0)
_TOLERANCE, _STEPS_OF_CG = 1e-2, 200


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
    patch_size, image_size : in pixels
    """

    centres: Tensor
    directions: Tensor
    deviations: Tensor
    scale: Tensor
    offset: Tensor
    levels: int
    patch_size: int
    image_size: tuple[int, int]

    @classmethod
    def of(cls, solution: SpanSolution, preprocessing: Preprocessing, levels: int) -> Grid:
        """What the span says, put into levels, its deviations made honest."""
        side = solution.patch_size
        blank = torch.zeros(1, len(solution.patches) // side**2, side, side).to(
            solution.patches
        )  # (1, C, side, side)
        # Level = (levels − 1) · pixel, and the pixel is linear in the model's input, channel by channel.
        offset = (levels - 1) * patchify(preprocessing.to_pixels(blank, clamp=False), side).flatten()  # (p,)
        scale = (levels - 1) * patchify(preprocessing.to_pixels(blank + 1, clamp=False), side).flatten() - offset
        directions, nominal = _directions(solution, scale)
        centres = scale[:, None] * solution.patches + offset[:, None]
        return cls(centres, directions, calibrated(nominal), scale, offset, levels, side, solution.image_size)

    # --- What is known ----------------------------------------------------------------------------

    @cached_property
    def known(self) -> Tensor:
        """W (q, p): what the span knows, each row divided by its standard deviation."""
        sure = self.deviations < _UNKNOWN_ABOVE
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
        return reduced_lattice(self._with_prior_rows(self._smoothness()[0]))

    @cached_property
    def candidates(self) -> list[Tensor]:
        """For each place the smoothest whole-level patches (≤ 12, p) that the span allows."""
        points, distances = self.smooth.nearest(
            self.smooth_centres(), count=_COUNTED, width=_WIDE, slack=_WIDE_SLACK * len(self.centres)
        )
        inside = ((points >= 0) & (points < self.levels)).all(2) & distances.isfinite()  # (n, count)
        return [point[ok][:_LISTED] for point, ok in zip(points, inside, strict=True)]

    def smooth_centres(self) -> Tensor:
        """The most probable patches (p, n) where smooth ones are more probable, before rounding."""
        prior, wanted = self._smoothness()
        return self._most_probable(prior, wanted[:, None].expand(-1, self.centres.shape[1]))

    def _smoothness(self) -> tuple[Tensor, Tensor]:
        """Rows that say: neighbours resemble each other, no level is far from the middle.

        Also the values that the rows should have, (rows,).
        """
        p, side = len(self.centres), self.patch_size
        number = torch.arange(p).reshape(-1, side, side)  # of each pixel, (C, side, side)
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
        return unpatchify((patches - self.offset) / self.scale, self.patch_size, self.image_size)

    def patches(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`images`."""
        return patchify(images.to(self.centres), self.patch_size) * self.scale + self.offset

    def smoothest(self, patches: Tensor, free: Tensor) -> Tensor:
        """The smoothest picture whose free patches are what the span allows.

        A free patch is ĝ + Σ_k c_k τ_k v_k, with v_k the directions, τ_k their deviations and
        coefficients c_k of deviation 1; the others stay as they are. What is minimized is quadratic,

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
        rows = self.directions * self.deviations.clamp(*_STEPS)[:, None]  # τ_k v_k
        start = torch.where(free[:, None], self.centres.T, patches)  # g₀
        shape = start.shape  # of c, too: there are p directions

        def to_patches(c: Tensor) -> Tensor:  # A
            return (c * free[:, None]) @ rows

        def pull(patches: Tensor) -> Tensor:  # Aᵀ L
            images = unpatchify(patches[None], self.patch_size, self.image_size)
            return (patchify(laplacian(images), self.patch_size)[0] / self._roughness**2) @ rows.T * free[:, None]

        def normal(flat: np.ndarray) -> np.ndarray:  # Aᵀ L A + I
            c = torch.as_tensor(flat).to(start).reshape(shape)
            return (pull(to_patches(c)) + c).flatten().cpu().numpy()

        right = -pull(start).flatten().cpu().numpy()
        system = LinearOperator((right.size, right.size), matvec=normal, dtype=right.dtype)
        c, _ = cg(system, right, rtol=_TOLERANCE, maxiter=_STEPS_OF_CG)
        return start + to_patches(torch.as_tensor(c).to(start).reshape(shape))


def calibrated(nominal: Tensor) -> Tensor:
    """The deviations that the span's errors really have, for those that it predicts; in levels."""
    return torch.where(nominal > _SURE, _TOO_SURE * nominal, _SAFETY * nominal).clamp_min(_LEAST)


def _directions(solution: SpanSolution, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal directions of a patch in levels (p, p), and the deviation the span predicts for each (p,)."""
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
