"""How many images are behind an update: what its own numbers prove, without labels or originals.

With cross-entropy the head's weight gradient is the mean of the r fᵀ of the batch, r =
softmax(logits) − onehot(y) and f the features that the head reads; its bias gradient is the mean of
the r. Chapter 01.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..anatomy import Anatomy
from ..update import ClientUpdate
from .result import Condition

# An outer product of two vectors is rounded once: 30 ε. A difference of two states carries the
# weights' rounding too.
_SLACK, _SLACK_OF_STATES = 30.0, 1e3


def one_image_residual(head_gradient: Tensor) -> float:
    """How far a head weight gradient (classes, d) is from r fᵀ, relative to its norm.

    For one image it is rank one up to rounding; for a batch of two it is not. Costs one
    matrix-vector product.

    >>> one_image_residual(torch.outer(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0]))) < 1e-6
    True
    """
    w = head_gradient.double()
    f = w[w.norm(dim=1).argmax()]
    if not f.any():
        return 0.0
    f = f / f.norm()
    return float((w - torch.outer(w @ f, f)).norm() / w.norm())


def one_image(anatomy: Anatomy, update: ClientUpdate) -> Condition:
    """The condition that one image is behind the update; it fails where the head proves more.

    No proof is possible where all r are the same: equal labels under a zero head, or the same
    picture twice.
    """
    if update.batch_size is not None and update.batch_size > 1:
        return _condition(False, "the client says batch_size={batch_size}", batch_size=update.batch_size)
    bias = update.gradients.get(anatomy.head_bias or "")
    if bias is not None and (negative := int((bias < 0).sum())) > 1:
        words = "{negative} entries of the head's bias gradient are negative: at least {negative} labels"
        return _condition(False, words, negative=negative)
    weight = update.gradients.get(anatomy.head_weight or "")
    if weight is None:
        return _condition(True, "the head's gradient is not shared, so the batch size was not checked there")
    slack = _SLACK_OF_STATES if update.source == "fedavg" else _SLACK
    residual, limit = one_image_residual(weight), slack * torch.finfo(weight.dtype).eps
    rank_one = residual <= limit
    words = f"head weight gradient {'is rank one up to' if rank_one else 'misses rank one by'}"
    return _condition(rank_one, words + " {residual:.1e} (limit {limit:.1e})", residual=residual, limit=limit)


def _condition(holds: bool, words: str, **numbers: float) -> Condition:
    return Condition("one image", holds, numbers, words)


def is_batch(anatomy: Anatomy, update: ClientUpdate) -> tuple[bool, str]:
    """Whether the head's gradients prove that more than one image is behind the update, and by what
    numbers.
    """
    condition = one_image(anatomy, update)
    return not condition.holds, condition.text
