"""How many images are behind an update: what its own numbers prove, without labels or originals.

A closed form's linear system has more equations than unknowns wherever the model is wide enough.
One image satisfies them all, up to the update's noise; a second one, with other pixels, does not.
That is proof, whatever the labels or the loss are.

Where no equation is to spare, the head is all there is. Its weight gradient is the mean of the r fᵀ
of the batch, r the loss's gradient at the logits and f the features that the head reads; its bias
gradient is the mean of the r. One image leaves rank one. Chapter 01.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..anatomy import Anatomy
from ..update import ClientUpdate
from .reading import measured_noise
from .result import Condition, State

#: The condition that one image is behind an update.
ONE_IMAGE = "one image"
#: What a second image leaves of a system, relative to what is there to be left. Measured at 32×32
#: on 64 batches of two: 0.001 to 0.7, medians 0.01 to 0.4 (tests/attacks/test_evidence.py repeats
#: some). Where noise alone may leave as much, a residual shows nothing.
_SECOND = 0.1
_OF_A_PRODUCT = 30.0  # times the noise: what rounding or noise leaves of an outer product


@dataclass(frozen=True)
class System:
    """A linear system that one image satisfies, and what it left of an update.

    Attributes
    ----------
    name : str
        Its equation.
    residual : float
        Relative to what was to be explained.
    spare, of : int
        Equations beyond the unknowns, and all.
    gain : float
        By how much the update's relative noise is larger in the residual, where terms cancel.
    """

    name: str
    residual: float
    spare: int
    of: int
    gain: float = 1.0


def limit_of(noise: float) -> float:
    """Up to where a relative residual is the noise's doing.

    A thousand times what rounding leaves of one sum, since systems add up many; of noise that is
    itself measurable, ten times as much.

    >>> f"{limit_of(1e-16):.0e} {limit_of(1e-7):.0e} {limit_of(2e-3):.0e}"
    '1e-13 1e-04 2e-02'
    """
    return min(1e3 * noise, max(10 * noise, 1e-4))


def one_image(
    anatomy: Anatomy, update: ClientUpdate, *, system: System | None = None, noise: float | None = None
) -> Condition:
    """Whether one image is behind the update: the system decides, then the head, then
    the client's claim.

    Parameters
    ----------
    anatomy : Anatomy
    update : ClientUpdate
    system : System, optional
        Of the attack that asks; without one, or with no equation to spare, the head decides.
    noise : float, optional
        Of the update; default is what :func:`~aprillab.attacks.reading.measured_noise` says, at
        least the format's ε.

    Returns
    -------
    Condition
        Shown for several images with the same pixels, too: their mixture is the picture.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> shape = {"image_size": 16, "patch_size": 4, "width": 64, "depth": 1, "heads": 2, "classes": 10}
    >>> model = al.VisionTransformer(**shape)
    >>> pixels = al.load_victim("coffee", 16)[None]
    >>> update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    >>> condition = one_image(al.dissect(model), update)
    >>> condition.name, condition.state, condition.numbers["residual"] < condition.numbers["limit"]
    ('one image', 'shown', True)
    """
    if noise is None:
        noise = max(measured_noise(anatomy, update.gradients) or 0.0, torch.finfo(update.dtype).eps)
    if system is not None and system.spare > 0:
        return _by_system(system, noise)
    if update.batch_size is not None and update.batch_size > 1:
        return _said("contradicted", "the client says batch_size={batch_size}", batch_size=update.batch_size)
    return _by_head(anatomy, update, noise)


def _by_system(system: System, noise: float) -> Condition:
    """Equations to spare: what is left of them is rounding, noise, or a second image."""
    would_leave = _SECOND * (system.spare / system.of) ** 0.5
    limit = limit_of(noise * system.gain)
    numbers = {"residual": system.residual, "limit": limit, "spare": system.spare, "of": system.of}
    words = system.name + " leaves {residual:.1e} with {spare} of {of} equations to spare (limit {limit:.1e})"
    if not system.residual <= limit:
        return _said("contradicted", words, **numbers)
    if limit > would_leave:
        words += f": with noise of {noise:.0e} nothing tells a second image from it"
        return _said("not checked", words, **numbers)
    return _said("shown", words, **numbers)


def _by_head(anatomy: Anatomy, update: ClientUpdate, noise: float) -> Condition:
    """The head's gradient: signs of its bias, rank of its weight."""
    bias = update.gradients.get(anatomy.head_bias or "")
    blurred = max(noise, _rounding_of(update, anatomy.head_bias))
    if bias is not None and len(bias) > 2 and (several := min(clear_signs(bias, blurred))) > 1:
        words = "{several} entries of the head's bias gradient have the sign of a label: at least {several} labels"
        return _said("contradicted", words, several=several)
    if update.errors is not None:
        return _not_measured("no equation is to spare, and the head's entries have errors of their own")
    weight = update.gradients.get(anatomy.head_weight or "")
    if weight is None or not weight.any():
        return _not_measured(f"no equation is to spare, and {no_head_words(anatomy)}")
    residual, limit = (
        one_image_residual(weight),
        _OF_A_PRODUCT * max(noise, _rounding_of(update, anatomy.head_weight)),
    )
    if residual > limit:
        words = "head weight gradient misses rank one by {residual:.1e} (limit {limit:.1e})"
        if update.local_steps > 1:
            words += ", as several local steps on one image leave it"
        return _said(
            "contradicted" if update.local_steps == 1 else "not checked", words, residual=residual, limit=limit
        )
    if len(weight) < 3:
        words = "with {classes} classes the head's gradient is rank one for any batch"
        return _not_measured(words, classes=len(weight))
    words = "head weight gradient is rank one up to {residual:.1e} (limit {limit:.1e})"
    if limit > _SECOND:
        return _said("not checked", words + ", which noise may hide", residual=residual, limit=limit)
    return _said("shown", words, residual=residual, limit=limit)


def _rounding_of(update: ClientUpdate, name: str | None) -> float:
    """What the weights' rounding leaves in one tensor, relative to it, if it left the
    same in all entries.
    """
    tensor = update.gradients.get(name or "")
    if not update.rounding or tensor is None or not tensor.any():
        return 0.0
    moved = [g for g in update.gradients.values() if g.any()]
    entry = update.rounding * math.hypot(*map(_norm, moved)) / sum(g.numel() for g in moved) ** 0.5
    return entry * tensor.numel() ** 0.5 / _norm(tensor)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def clear_signs(bias: Tensor, noise: float) -> tuple[int, int]:
    """How many entries are negative, and how many positive, beyond noise relative to their r.m.s.

    One entry has the rarer sign if there is one image, also where the update's sign is reversed.

    >>> clear_signs(torch.tensor([0.1, -0.9, 0.8, -1e-9]), 1e-7)
    (1, 2)
    """
    clear = 4 * noise * float(bias.double().square().mean()) ** 0.5
    return int((bias < -clear).sum()), int((bias > clear).sum())


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


def _said(state: State, words: str, **numbers: float) -> Condition:
    return Condition(ONE_IMAGE, state, numbers, words)


def _not_measured(words: str, **numbers: float) -> Condition:
    return Condition(ONE_IMAGE, "not checked", numbers, words, measured=False)


def head_unnamed(anatomy: Anatomy) -> bool:
    """Whether a caller described the model and did not name its head: its gradient may be there."""
    return anatomy.family == "described by the caller" and not (anatomy.head_weight or anatomy.head_bias)


def no_head_words(anatomy: Anatomy) -> str:
    """Why the head's gradient says nothing where none was found in the update.

    >>> from aprillab.models import VisionTransformer
    >>> from aprillab.anatomy import dissect
    >>> model = VisionTransformer(image_size=4, patch_size=2, width=4, depth=1, heads=2, classes=2)
    >>> no_head_words(dissect(model))
    "the head's gradient is not shared"
    """
    return "the head is not named" if head_unnamed(anatomy) else "the head's gradient is not shared"


def is_batch(anatomy: Anatomy, update: ClientUpdate) -> tuple[bool, str]:
    """Whether the head's gradients, or the client, say that more than one image is
    behind the update.

    Returns
    -------
    bool, str
        And by what numbers. False where nothing could be checked, too.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> shape = {"image_size": 16, "patch_size": 4, "width": 64, "depth": 1, "heads": 2, "classes": 10}
    >>> model = al.VisionTransformer(**shape)
    >>> images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> update = al.client_update(model, images, torch.tensor([1, 3, 4]))
    >>> is_batch(al.dissect(model), al.ClientUpdate(update.gradients))
    (True, "3 entries of the head's bias gradient have the sign of a label: at least 3 labels")
    """
    condition = one_image(anatomy, update)
    return condition.state == "contradicted", condition.text
