"""What a client can look at in a model it was sent: a number each, and how large
honest models have it.

Each function takes tensors and returns a score, larger for a stranger model. The limits were set
from honest models and fished ones in data/results/cheating.md; ``inspect_model`` puts scores,
limits and words together.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def out_of_proportion(weight: Tensor) -> float:
    """The longest row of a head (classes, d) over the median row; 1 of a head of zeros.

    >>> out_of_proportion(torch.tensor([[3.0], [1.0], [1.0]]))
    3.0
    """
    rows = weight.double().norm(dim=1)
    return float(rows.max() / rows.median()) if rows.any() else 1.0


def lost_directions(weight: Tensor, *, centred: bool = False) -> float:
    """How many times fewer directions a matrix (m, d) has than it could: 1 if all
    singular values are alike.

    Directions are counted as (Σ s²)² / Σ s⁴ with singular values s, at most min(m, d). Of a
    head only differences of rows matter: ``centred`` takes the mean row off, and one
    direction of the count.

    >>> lost_directions(torch.eye(4)), lost_directions(torch.ones(4, 4)), lost_directions(torch.zeros(4, 4))
    (1.0, 4.0, 1.0)
    """
    rows = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
    rows = rows - rows.mean(0) if centred else rows
    gram = rows.T @ rows if rows.shape[1] < len(rows) else rows @ rows.T
    squares = float(gram.square().sum())
    most = min(len(rows) - centred, rows.shape[1])
    return most * squares / float(gram.trace()) ** 2 if squares > 0 else 1.0


def largest_offset(weight: Tensor, bias: Tensor | None, norm_bias: Tensor | None) -> float:
    """How far one class is more or less probable than the median class before there is
    any picture, in nats.

    The head's bias says it, and the last LayerNorm's bias β through the head: b + W β.

    >>> largest_offset(torch.eye(3), torch.tensor([0.0, 1.0, -7.0]), None)
    7.0
    """
    offset = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if bias is not None:
        offset = offset + bias.double()
    if norm_bias is not None:
        offset = offset + weight.double() @ norm_bias.double()
    return float((offset - offset.median()).abs().max())


def passed_by_class(weight: Tensor, logits: Tensor) -> Tensor:
    """‖Wᵀ(p − e_k)‖ of (12.1) for each class k, (classes,): the gradient that an image of class k
    passes to the features.

    A mean over some images with these logits (images, classes), whatever their classes are.

    >>> passed_by_class(torch.eye(2), torch.zeros(1, 2))
    tensor([0.7071, 0.7071], dtype=torch.float64)
    """
    rows, p = weight.double(), logits.double().softmax(-1)
    mean = p @ rows
    squares = rows.square().sum(1)[None] - 2 * mean @ rows.T + mean.square().sum(1)[:, None]
    return squares.clamp_min(0).sqrt().mean(0)


def passed_by_image(tokens: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """‖G_i‖ of each image, and of all others together ‖Σ_{j≠i} G_j‖, both (B,): the
    two norms of (12.9).

    One backward pass: the images of a batch do not meet in the model. ``losses`` (B,) were computed
    by way of ``tokens`` (B, …), the patch embedding's output: what arrives there is what chapter
    04's system has of an image.

    >>> tokens = torch.eye(2, requires_grad=True)
    >>> passed_by_image(tokens, torch.tensor([3.0, 4.0]) * tokens.sum(1))
    (tensor([4.2426, 5.6569], dtype=torch.float64), tensor([5.6569, 4.2426], dtype=torch.float64))
    """
    (gradient,) = torch.autograd.grad(losses.sum(), tokens, allow_unused=True)
    each = torch.zeros_like(tokens) if gradient is None else gradient
    each = each.double().flatten(1)
    return each.norm(dim=1), (each.sum(0) - each).norm(dim=1)


def changes(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each linear layer or convolution moved, relative to what it was; r.m.s. of all
    entries.

    One that was smaller counts as half of what initialization usually gives it, 0.5/√fan_in.
    Position embeddings and tokens, (1, tokens, d), are left out: they start small and move far.

    >>> changes({"w": torch.ones(4, 4)}, {"w": 1.5 * torch.ones(4, 4)})
    {'w': 0.5}
    """
    found = {}
    for name, old in before.items():
        if name not in now or old.ndim not in (2, 4) or not old.is_floating_point() or now[name].shape != old.shape:
            continue
        least = 0.5 / max(old[0].numel(), 1) ** 0.5
        new = now[name].to(old.device)
        found[name] = _rms(new.double() - old.double()) / max(_rms(old), least)
    return found


def standing_still(moved: Mapping[str, float], head: float, body: Collection[str]) -> float:
    """How many times further the head moved than the median layer of the body; infinite
    if that stood still.

    >>> standing_still({"a": 0.1, "b": 0.3, "c": 0.2}, 1.0, ["a", "b", "c"]), standing_still({"a": 0.0}, 0.0, ["a"])
    (5.0, 0.0)
    """
    if not head:
        return 0.0
    middle = sorted(moved[name] for name in body)[len(body) // 2]
    return head / middle if middle else math.inf


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean() ** 0.5)
