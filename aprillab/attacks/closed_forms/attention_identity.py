"""APRIL's identity: the first attention's gradients tie the tokens to the gradient at the tokens.

The attention reads the tokens z through q = W_Q z + b_Q and alike for k and v, so the chain rule
gives

    (∂l/∂z) zᵀ = W_Qᵀ ∂l/∂W_Q + W_Kᵀ ∂l/∂W_K + W_Vᵀ ∂l/∂W_V,                                  (2.4)

whatever the attention does with q, k and v. Chapter 02 derives it; chapter 03 solves it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...anatomy import Anatomy


def attention_product(anatomy: Anatomy, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """The right side of APRIL's identity, M = W_Qᵀ ∂l/∂W_Q + W_Kᵀ ∂l/∂W_K + W_Vᵀ ∂l/∂W_V.

    Parameters
    ----------
    anatomy : Anatomy
    weights, gradients : tensors by name, the model's and the update's

    Returns
    -------
    Tensor of shape (d, d), float64, equal to (∂l/∂z) zᵀ where the attention reads z

    Raises
    ------
    ValueError
        If one of the three projections is unknown or not among the tensors.
    """
    product = torch.zeros(())
    for part in ("query", "key", "value"):
        rows = getattr(anatomy, part)
        weight, gradient = (None, None) if rows is None else (rows.of(weights), rows.of(gradients))
        if weight is None or gradient is None:
            raise ValueError(f"attention_product: the {part} projection ({rows}) is not among the tensors")
        product = product.to(gradient.device) + weight.to(gradient.device, torch.float64).T @ gradient.double()
    return product
