"""What the span attack knows of patches, in grey levels: the lattice in which whole levels are looked for.

The error of a patch has a known covariance. Divided by its deviations it is a set of rows W, and the whole levels
that the span finds most probable minimize ‖W (g − ĝ)‖. With rows of a prior, patches near a guess or smooth ones,
this is the lattice that lattice.py reduces. Chapter 07, equations (7.10) to (7.12).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from ...models import patchify, unpatchify
from ...preprocessing import Preprocessing
from ..closed_forms.span_solution import SpanSolution
from .lattice import ReducedLattice, reduced_lattice

# In grey levels. What the span is less sure of than _SURE it is too sure of, by up to 18 times where we measured it.
_SURE, _TOO_SURE, _SAFETY, _LEAST = 1e-3, 20.0, 3.0, 1e-5
_BLIND = 30.0  # what is known no better than this is not known
_ROUGHNESS, _CONTRAST = 15.0, 60.0  # between neighbours, and around the middle, standard deviations of a picture
_LISTED = 12  # whole-level patches that are listed for a place


@dataclass(frozen=True)
class Grid:
    """The span attack's patches and their errors, in levels; patches are columns."""

    centres: Tensor  # (p, n)
    directions: Tensor  # (p, p), in rows
    deviations: Tensor  # (p,), of the error in each, with a margin
    scale: Tensor  # (p,), levels for one unit of model input
    offset: Tensor  # (p,)
    levels: int
    patch_size: int
    image_size: tuple[int, int]
    reduced: dict[float, ReducedLattice] = field(default_factory=dict)  # by the distance the search may be off
    listed: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, solution: SpanSolution, preprocessing: Preprocessing, levels: int) -> Grid:
        p = len(solution.patches)
        ones = torch.ones(1, p // solution.patch_size**2, solution.patch_size, solution.patch_size)
        ones = ones.to(solution.patches)
        zero = preprocessing.to_pixels(0 * ones, clamp=False)
        offset = (levels - 1) * patchify(zero, solution.patch_size).flatten()
        scale = (levels - 1) * patchify(preprocessing.to_pixels(ones, clamp=False), solution.patch_size).flatten()
        scale = scale - offset
        s, directions = torch.linalg.svd(solution.root / scale)[1:]
        nominal = solution.variance**0.5 / s.clamp_min(torch.finfo(s.dtype).tiny)
        deviations = torch.where(nominal > _SURE, _TOO_SURE * nominal, _SAFETY * nominal).clamp_min(_LEAST)
        centres = scale[:, None] * solution.patches + offset[:, None]
        return cls(centres, directions, deviations, scale, offset, levels, solution.patch_size, solution.image_size)

    @property
    def known(self) -> Tensor:
        """W (q, p): what the span knows, each row divided by its standard deviation."""
        sure = self.deviations < _BLIND
        return self.directions[sure] / self.deviations[sure, None]

    def misfit(self, patches: Tensor, places: Tensor) -> Tensor:
        """How far patches (p, m) at their places (m,) are from what the span knows: mean squares in deviations."""
        return (self.known @ (patches - self.centres[:, places])).square().mean(0)

    def near(self, distance: float) -> ReducedLattice:
        """The lattice of patches that the span allows, a given distance from a guess."""
        if distance not in self.reduced:
            self.reduced[distance] = reduced_lattice(
                self._with(torch.eye(len(self.centres)).to(self.centres) / distance)
            )
        return self.reduced[distance]

    def near_centres(self, distance: float, guesses: Tensor) -> Tensor:
        """The most probable patches (p, m) near guesses (p, n), before rounding."""
        return self._solve(torch.eye(len(guesses)).to(guesses) / distance, guesses / distance)

    @property
    def smooth(self) -> ReducedLattice:
        """The lattice of patches that the span allows, the smooth ones shorter."""
        if 0.0 not in self.reduced:
            self.reduced[0.0] = reduced_lattice(self._with(self._prior()[0]))
        return self.reduced[0.0]

    def candidates(self) -> list[Tensor]:
        """For each place the smoothest whole-level patches (_LISTED, p) that the span allows."""
        if not self.listed:
            slack = 30.0 * len(self.centres)
            points, distances = self.smooth.nearest(self.smooth_centres(), count=400, width=2000, slack=slack)
            inside = ((points >= 0) & (points < self.levels)).all(2) & distances.isfinite()
            self.listed.extend(p[i][:_LISTED] for p, i in zip(points, inside, strict=True))
        return self.listed

    def smooth_centres(self) -> Tensor:
        prior, wanted = self._prior()
        return self._solve(prior, wanted[:, None].expand(-1, self.centres.shape[1]))

    def _prior(self) -> tuple[Tensor, Tensor]:
        """Rows that say that neighbours resemble each other and no level is far from the middle; their values."""
        p, side = len(self.centres), self.patch_size
        number = torch.arange(p).reshape(-1, side, side)
        eye = torch.eye(p).to(self.centres)
        steps = [eye[number[:, 1:].flatten()] - eye[number[:, :-1].flatten()]]
        steps += [eye[number[:, :, 1:].flatten()] - eye[number[:, :, :-1].flatten()]]
        unit = (self.levels - 1) / 255
        rows = torch.cat([*steps, eye * (_ROUGHNESS / _CONTRAST)]) / (_ROUGHNESS * unit)
        return rows, rows @ torch.full((p,), (self.levels - 1) / 2).to(rows)

    def _with(self, prior: Tensor) -> Tensor:
        return torch.cat([self.known, prior])

    def _solve(self, prior: Tensor, wanted: Tensor) -> Tensor:
        known = self.known
        batch = wanted.shape[1] // self.centres.shape[1]
        right = torch.cat([(known @ self.centres).repeat(1, batch), wanted])
        Q, R = torch.linalg.qr(torch.cat([known, prior]))
        return torch.linalg.solve_triangular(R, Q.T @ right, upper=True)

    def images(self, patches: Tensor) -> Tensor:
        """(B, C, H, W) in model-input space, of patches (B, n, p) in levels."""
        return unpatchify((patches - self.offset) / self.scale, self.patch_size, self.image_size)

    def patches(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`images`."""
        return patchify(images.to(self.centres), self.patch_size) * self.scale + self.offset

    def smoothest(self, patches: Tensor, free: Tensor) -> Tensor:
        """The smoothest picture (n, p) whose free patches are what the span allows and whose others are given."""
        rows = self.directions * self.deviations.clamp(1e-3, 255.0)[:, None]
        origin = torch.where(free[:, None], self.centres.T, patches)
        shape = (len(free), len(rows))

        def slope(flat: Any) -> Any:
            with torch.enable_grad():
                c = torch.as_tensor(flat).to(origin).reshape(shape).requires_grad_()
                moved = origin + (c * free[:, None]) @ rows
                image = unpatchify(moved[None], self.patch_size, self.image_size)
                steps = image.diff(dim=-1).square().sum() + image.diff(dim=-2).square().sum()
                energy = steps / (_ROUGHNESS * (self.levels - 1) / 255) ** 2 + c.square().sum()
            return (torch.autograd.grad(energy, c)[0] / 2).flatten().cpu().numpy()

        still = slope(torch.zeros(shape).flatten())
        hessian = LinearOperator((still.size,) * 2, matvec=lambda v: slope(v) - still, dtype=still.dtype)
        c, _ = cg(hessian, -still, rtol=1e-2, maxiter=200)
        return origin + (torch.as_tensor(c).to(origin).reshape(shape) * free[:, None]) @ rows
