"""The numbers of a model that the counts are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, tensors_of
from ..attacks.closed_forms.linear_algebra import numerical_rank
from ..attacks.closed_forms.span_rounds import READABLE, equations_of
from ..attacks.closed_forms.span_width import directions_lost, extra_prefix

_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Facts:
    """What decides which closed form applies, in numbers.

    Attributes
    ----------
    image_size : (height, width), in pixels
    patches, pixels, width : int
        n; p, over all channels of a patch; d.
    tokens : int
        n and those before the patches.
    usable : int
        Of the d features, those that reach the first attention (γ not 0).
    norms : int
        Directions that the norms before the first attention take: 1 for a LayerNorm.
    ignores_mean : bool
        Whether each row of ∂l/∂E sums to zero.
    first_block : str
        As :class:`~aprillab.Anatomy` has it.
    stored : int
        Rows of the position embedding; 0 where there is none.
    prefix : int
        Those of its rows that are no patches.
    places : int
        Directions that b_e + E_i span at the n patches, in float32; n where they tell all apart.
    same_places : bool
        Whether the position embedding is the same at every patch.
    classes : int
        Rows of the head; 0 where none is known.
    zero_head : bool
        A head of zeros passes nothing down.
    """

    image_size: tuple[int, int]
    patches: int
    pixels: int
    width: int
    tokens: int
    usable: int
    norms: int
    ignores_mean: bool
    first_block: str
    stored: int
    prefix: int
    places: int
    same_places: bool
    classes: int
    zero_head: bool


def facts_of(model: nn.Module, anatomy: Anatomy) -> Facts:
    """Count. Reads shapes, and the values of W_e, b_e, E and the first norms alone.

    >>> import aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> facts = facts_of(model, al.dissect(model))
    >>> facts.patches, facts.pixels, facts.width, facts.tokens, facts.norms, facts.places
    (4, 48, 24, 5, 1, 4)
    """
    weights = {name: t.cpu() for name, t in tensors_of(model).items() if name in anatomy.tensor_names()}
    kernel = weights[anatomy.patch_weight].flatten(1)
    n = anatomy.tiling.count
    width, pixels = kernel.shape
    places, same, usable = 0, False, width
    if anatomy.position is not None and anatomy.first_block in READABLE:
        equations = equations_of(torch.zeros(1, width, dtype=torch.float64), anatomy, weights)
        places, usable = _independent(equations.e), equations.usable
        same = not bool((equations.e - equations.e.mean(1, keepdim=True)).norm() > _EPS * equations.e.norm())
    head = weights.get(anatomy.head_weight or "")
    stored = 0 if anatomy.position is None else weights[anatomy.position].shape[:-1].numel()
    return Facts(
        image_size=anatomy.image_size, patches=n, pixels=pixels, width=width,
        tokens=n + anatomy.position_prefix + extra_prefix(anatomy, weights), usable=usable,
        norms=directions_lost(anatomy, weights), ignores_mean=anatomy.ignores_mean, first_block=anatomy.first_block,
        stored=stored, prefix=anatomy.position_prefix, places=places, same_places=same,
        classes=0 if head is None else len(head), zero_head=head is not None and not bool(head.any()),
    )  # fmt: skip


def _independent(places: Tensor) -> int:
    """How many directions the columns (w, n) have, above the rounding of float32."""
    if not bool(places.isfinite().all()):
        return 0
    if places.shape[1] > places.shape[0]:
        return places.shape[1]  # more patches than features: other counts fail before this one
    return numerical_rank(torch.linalg.svdvals(torch.linalg.qr(places, mode="r").R), _EPS)
