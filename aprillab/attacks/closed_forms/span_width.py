"""The span attack's count, (7.6): how wide a model must be for one picture to fit its update,
and how rounds help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ...anatomy import Anatomy
from ..result import AttackNotApplicable
from .token_equations import TokenEquations

NAME = "span_closed_form"


def width_needed(
    patches: int, pixels_per_patch: int, prefix: int, norms: int, *, batch_size: int = 1, by_rows: bool = True
) -> int:
    """The least width d that the count (7.6) allows: ``norms`` is 1 for a LayerNorm before the
    attention, 2 for two.

    In a batch (B − 1)·n directions stay open at any width: the differences of its images at each
    place. Without the patch embedding's gradient (``by_rows=False``) all p pixels are unknown.

    >>> width_needed(196, 768, 1, True)  # ViT-B/16 at 224
    394
    >>> width_needed(196, 768, 1, True, by_rows=False)
    966
    """
    tokens = batch_size * patches + prefix
    unknowns = min(pixels_per_patch, batch_size * patches) if by_rows else pixels_per_patch
    return unknowns + tokens + int(norms) - (batch_size - 1) * patches


def usable_width(equations: Sequence[TokenEquations], lost: int) -> int:
    """The width that counts: each further state of the model adds its equations, (10.3).

    Parameters
    ----------
    equations : sequence of TokenEquations
        One of each state.
    lost : int
        Directions that tokens and norms take of each.
    """
    return equations[0].usable + sum(max(one.usable - lost, 0) for one in equations[1:])


def directions_lost(anatomy: Anatomy, weights: Mapping[str, Tensor]) -> int:
    """Directions of the width that the norms take, besides the tokens': the mean's, and C β₁."""
    if anatomy.first_block != "two norms":
        return int(anatomy.first_block == "prenorm")
    return 1 + int(anatomy.embedding_norm_bias is not None and bool(weights[anatomy.embedding_norm_bias].any()))


def extra_prefix(anatomy: Anatomy, weights: Mapping[str, Tensor]) -> int:
    """Tokens before the patches that have no position of their own (timm's ``no_embed_class``)."""
    prefix = sum(weights[token].numel() // weights[token].shape[-1] for token in anatomy.prefix)
    return max(prefix - anatomy.position_prefix, 0)


def refuse_width(needed: int, usable: int, tokens: int, unknowns: str, norms: int, groups: int) -> None:
    """Refuse too narrow a model; ``unknowns`` of a patch are in letters and in
    numbers, ``"p = 768"``.

    Raises
    ------
    AttackNotApplicable
    """
    of = "d" if groups == 1 else f"d and what {groups - 1} more state(s) of the model add"
    letters, _, number = unknowns.partition(" = ")
    left = max(usable - tokens - norms, 0)
    raise AttackNotApplicable(
        NAME,
        f"{letters} + tokens{f' + {norms}' if norms else ''} = {needed} > {usable} = {of}: "
        f"the span of {tokens} tokens leaves {left} equations for {number} unknowns a patch",
        width_needed=needed,
        width=usable,
    )
