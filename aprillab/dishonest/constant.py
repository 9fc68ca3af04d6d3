"""A feature that is the same for all images: what stands in for the bias of a head that has none.

Behind a LayerNorm f = γ ⊙ x̂ + β, where the entries of x̂ sum to zero. So Σ f_j / γ_j = Σ
β_j / γ_j, whatever the image: with u = 1/γ over that sum, u·f = 1. A mean over tokens keeps it. Nor
does u pass any gradient down: the LayerNorm's own gradient takes the mean of γ ⊙ u off, which is
all there is to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .sent import CannotCheat, Head, played


@dataclass(frozen=True)
class ConstantFeature:
    """u with u·f = 1 for each image, once the last LayerNorm's bias is set.

    Attributes
    ----------
    bias_name : str
        Of the LayerNorm before the head.
    bias : Tensor of shape (d,), float64
        What it is to be set to.
    direction : Tensor of shape (d,), float64
        u.
    """

    bias_name: str
    bias: Tensor
    direction: Tensor


def constant_feature(model: nn.Module, head: Head) -> ConstantFeature:
    """Of a head without bias.

    Raises
    ------
    CannotCheat
        If no LayerNorm with weight and bias stands right before the head.

    Examples
    --------
    >>> import aprillab as al
    >>> from aprillab.dishonest.sent import head_of
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> found = constant_feature(model, head_of(model))
    >>> found.bias_name, float(found.direction @ found.bias)
    ('norm.bias', 1.0)
    """
    path, norm = last_norm(model, head)
    if norm is None or norm.bias is None:
        raise CannotCheat(
            f"the head {head.weight_name} has no bias, and no LayerNorm with weight and bias stands right before it: "
            "nothing is the same for all images, so a class cannot be told to be improbable"
        )
    inverse = 1 / norm.weight.detach().double()
    bias = inverse.sign()
    return ConstantFeature(f"{path}.bias", bias, inverse / float(inverse @ bias))


def last_norm(model: nn.Module, head: Head) -> tuple[str, nn.LayerNorm | None]:
    """The LayerNorm right before the head, and its path: the last one that is
    registered, if a play agrees.

    Of what it gives, Σ f_j / γ_j must be Σ β_j / γ_j for pictures of noise, whether or not
    tokens are averaged.
    """
    path, norm = "", None
    for name, module in model.named_modules():
        if f"{name}.weight" == head.weight_name:
            break
        if isinstance(module, nn.LayerNorm) and module.normalized_shape == (head.weight.shape[1],):
            path, norm = name, module
    if norm is None or norm.weight is None or not bool((norm.weight != 0).all()):
        return "", None
    weight = torch.zeros_like(head.weight)
    weight[0] = 1 / norm.weight.detach()
    expected = 0.0 if norm.bias is None else float(weight[0].double() @ norm.bias.detach().double())
    expected += 0.0 if head.bias is None else float(head.bias[0])
    logits = played(model, head, {head.weight_name: weight}, images=2)[:, 0].double()
    rounding = 10 * torch.finfo(weight.dtype).eps * float(weight[0].double().abs().sum())
    return (path, norm) if bool(((logits - expected).abs() < rounding).all()) else ("", None)
