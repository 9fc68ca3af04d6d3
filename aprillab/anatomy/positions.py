"""The position embedding as the tokens get it, and its gradient, at the picture's own size.

Libraries interpolate the embedding of a model for pictures of another size. Interpolation is
linear, E' = R E, and R is known: it is what the library makes of the identity. So the gradient at
the tokens, G', and the shared one are tied by ∂l/∂E = Rᵀ G', which least squares solves where the
picture has no more patches than the embedding has rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .record import Anatomy


def position_values(anatomy: Anatomy, weights: Mapping[str, Tensor]) -> Tensor:
    """What is added to the tokens, (prefix + n, d), float64.

    Raises
    ------
    KeyError
        If the model has no position embedding.

    Examples
    --------
    >>> anatomy = Anatomy("mine", (2, 2), "w", position="e", resampling=torch.tensor([[0.5, 0.5]]))
    >>> position_values(anatomy, {"e": torch.tensor([[1.0], [3.0]])})
    tensor([[2.]], dtype=torch.float64)
    """
    rows = _rows(weights[anatomy.position or ""])
    return rows if anatomy.resampling is None else anatomy.resampling.to(rows) @ rows


def position_gradient(anatomy: Anatomy, gradients: Mapping[str, Tensor]) -> Tensor:
    """G', the gradient at the tokens, (prefix + n, d), float64.

    Where the embedding was interpolated this is the least-squares solution of Rᵀ G' = ∂l/∂E.

    Raises
    ------
    KeyError
        If the gradient is not among them.
    ValueError
        If the picture has more patches than the embedding has rows: then G' is not determined.

    Examples
    --------
    >>> R = torch.tensor([[0.5, 0.5]])
    >>> anatomy = Anatomy("mine", (2, 2), "w", position="e", resampling=R)
    >>> position_gradient(anatomy, {"e": R.T @ torch.tensor([[4.0]])}).round(decimals=9)
    tensor([[4.]], dtype=torch.float64)
    """
    shared, R = _rows(gradients[anatomy.position or ""]), anatomy.resampling
    if R is None:
        return shared
    if len(R) > len(shared):
        raise ValueError(
            f"the position embedding's {len(shared)} rows are interpolated to the picture's {len(R)} tokens: their "
            f"gradient does not determine that of the tokens"
        )
    driver = "gelsd" if shared.device.type == "cpu" else "gels"
    return torch.linalg.lstsq(R.T.to(shared), shared, driver=driver).solution


def likely_size(rank: int, anatomy: Anatomy) -> tuple[int, int] | None:
    """Which size a picture seems to have had, from the rank of the patches' rows of ∂l/∂E.

    A picture of n' < n patches leaves a gradient of rank n'. A square is guessed.

    Returns
    -------
    (int, int) or None
        Height and width in pixels; None where the model cannot take other sizes, a size was named
        already, or the rank is no smaller square number.

    Examples
    --------
    >>> anatomy = Anatomy("mine", (32, 32), "w", patch_size=(8, 8), position="e", resizes=True)
    >>> likely_size(9, anatomy), likely_size(10, anatomy), likely_size(16, anatomy)
    ((24, 24), None, None)
    """
    side = math.isqrt(max(rank, 0))
    if not anatomy.resizes or anatomy.resampling is not None or side * side != rank or side == 0:
        return None
    if rank >= anatomy.tiling.count:
        return None
    height, width = anatomy.tiling.patch_size
    return side * height, side * width


def _rows(tensor: Tensor) -> Tensor:
    return tensor.double().reshape(-1, tensor.shape[-1])
