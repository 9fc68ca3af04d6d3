"""What the span attack says of the patches, for the attacks that go on from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...anatomy import Tiling
from .linear_algebra import square_of_inverse
from .noisy_span import NoisySpan


@dataclass(frozen=True)
class SpanSolution:
    """The most probable patches, and how uncertain each direction of a patch is.

    Attributes
    ----------
    patches : Tensor (p, n), in model-input space
    root : Tensor (p, p)
        H, with (HᵀH)⁻¹ · ``variance`` the covariance of a patch's error; it is the same for all
        patches.
    variance : float
    tiling : how a picture is cut into patches
    token_sides : the noisy span of the tokens; one of each group of rounds
    width_needed, usable_width : int
    numbers : dict, for ``diagnostics``
    rows_of : tuple of str
        What gradients the rows are of: fields of the anatomy, or names of adapters.
    """

    patches: Tensor
    root: Tensor
    variance: float
    tiling: Tiling
    token_sides: tuple[NoisySpan, ...]
    width_needed: int
    usable_width: int
    numbers: dict[str, float]
    rows_of: tuple[str, ...] = ()

    @property
    def gap(self) -> float:
        """Of the noisiest span."""
        return min(side.gap for side in self.token_sides)

    @property
    def excess(self) -> float:
        """Of the noisiest span."""
        return max(side.excess for side in self.token_sides)

    @property
    def images(self) -> Tensor:
        """(1, C, H, W)"""
        return self.tiling.images(self.patches.T[None])

    @property
    def mean_square_error(self) -> float:
        """Of the pixels, in model-input space, as least squares predicts it from its own minimum.

        Where the problem is so ill-conditioned that the minimum itself shrinks, this is too
        optimistic.
        """
        return self.variance * square_of_inverse(self.root) / len(self.root)

    def directions(self) -> tuple[Tensor, Tensor]:
        """Orthonormal directions in a patch, in rows (p, p), and the standard deviation of the
        error in each (p,), (8.2).
        """
        s, Vt = torch.linalg.svd(self.root)[1:]
        return Vt, self.variance**0.5 / s.clamp_min(torch.finfo(s.dtype).tiny)
