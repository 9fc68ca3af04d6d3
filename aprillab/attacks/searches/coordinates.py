"""Where gradient matching looks for the pictures: in coordinates that suit what is known of them.

A patch is origin + coefficients @ basis. With a basis of few rows, what is known to be impossible
is never tried; with rows as long as the patch is uncertain in their direction, the search takes
long steps where it must find something and short ones where the picture is known already: a
preconditioner. The row space of the patch embedding's gradient is of the first kind (chapter 05),
what the span attack leaves open of the second (chapter 08).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...anatomy import Tiling


@dataclass(frozen=True)
class Coordinates:
    """Pictures as coefficients of their patches.

    Attributes
    ----------
    origin : Tensor (n, p), (1, p) or (B, n, p), in model-input space
        The patches whose coefficients are zero.
    basis : Tensor (k, p), rows linearly independent
    tiling : how a picture is cut into patches
    free : Tensor (B, n), optional
        1 for patches to look for, 0 for those that stay at the origin; default is all.
    """

    origin: Tensor
    basis: Tensor
    tiling: Tiling
    free: Tensor | None = None

    def to(self, like: Tensor) -> Coordinates:
        """On the device and in the dtype of a tensor."""
        free = None if self.free is None else self.free.to(like)
        return Coordinates(self.origin.to(like), self.basis.to(like), self.tiling, free)

    def images_of(self, coefficients: Tensor) -> Tensor:
        """Pictures (…, C, H, W) of coefficients (…, n, k)."""
        patches = self.origin + self._freely(coefficients) @ self.basis  # (…, n, p)
        images = self.tiling.images(patches.flatten(0, -3))
        return images.unflatten(0, coefficients.shape[:-2])

    def coefficients_of(self, images: Tensor) -> Tensor:
        """Coefficients (…, n, k) of the pictures nearest to images (…, C, H, W): least squares."""
        patches = self.tiling.patches(images.flatten(0, -4)).unflatten(0, images.shape[:-3])  # (…, n, p)
        patches = patches - self.origin
        # In float64 and for rows of length 1: they may differ by far more than float32 can take.
        lengths = torch.linalg.vector_norm(self.basis.double(), dim=1)  # (k,)
        rows = self.basis.double() / lengths[:, None]
        return self._freely((patches.double() @ torch.linalg.pinv(rows) / lengths).to(images))

    def coefficients_of_noise(self, images: Tensor) -> Tensor:
        """Coefficients (…, n, k) as large as the noise (…, C, H, W), however long the rows are.

        Where the rows are fewer than the pixels and of length 1, they have the energy of the whole
        noise.
        """
        k, p = self.basis.shape
        rows = self.basis / torch.linalg.vector_norm(self.basis, dim=1, keepdim=True)
        coefficients = math.sqrt(p / k) * self.tiling.patches(images.flatten(0, -4)) @ rows.T
        return self._freely(coefficients.unflatten(0, images.shape[:-3]))

    def _freely(self, coefficients: Tensor) -> Tensor:
        return coefficients if self.free is None else coefficients * self.free[..., None].to(coefficients)


def row_space_of(gradient: Tensor, batch_size: int, tiling: Tiling) -> Coordinates | None:
    """Coordinates in the row space of ∂l/∂W_e, which holds the patches, equation (3.5).

    Parameters
    ----------
    gradient : Tensor of shape (d, C, P, P) or (d, p)
        ∂l/∂W_e.
    batch_size : int
        B.
    tiling : Tiling
        How a picture is cut into patches.

    Returns
    -------
    Coordinates or None
        An orthonormal basis (k, p), k ≤ B·n < p, around zero; None where it restricts nothing.

    Examples
    --------
    >>> patches = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    >>> G = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    >>> row_space_of((G @ patches).reshape(24, 3, 4, 4), 1, Tiling.square(4, (8, 8))).basis.shape
    torch.Size([4, 48])
    """
    tokens = batch_size * tiling.count  # B·n
    s, Vt = torch.linalg.svd(gradient.double().flatten(1), full_matrices=False)[1:]
    # Well above rounding: directions of pure rounding noise would differ from run to run.
    rank = min(tokens, int((s > 100 * torch.finfo(gradient.dtype).eps * s[0]).sum()))
    if not 0 < rank < gradient[0].numel():
        return None
    return Coordinates(torch.zeros_like(Vt[:1]), Vt[:rank], tiling)
