"""What a closed form reads of an update, checked: the first thing that each of them does."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from ...anatomy import Anatomy, Rows, Tiling, position_gradient, what_adapters
from ...preprocessing import Preprocessing
from ...update import ClientUpdate
from ..result import AttackNotApplicable

_WORDS = {"position": "position embedding", "patch_weight": "patch embedding"}


def shared_gradients(
    attack: str,
    update: ClientUpdate,
    anatomy: Anatomy,
    needs: tuple[str, ...],
    *,
    device: torch.device | str | None = None,
    weighs: bool = False,
) -> dict[str, Tensor]:
    """The gradients that an attack needs, by their field of :class:`~aprillab.Anatomy`, in float64.

    That of the position embedding is the one at the tokens, (prefix + n, d), interpolation undone.

    Parameters
    ----------
    attack : str
        Who asks; for the refusal.
    update : ClientUpdate, as :func:`~aprillab.attacks.reading.read_update` returns it
    anatomy : Anatomy
    needs : tuple of str
        Fields of Anatomy.
    device : where to solve; default is where the update lies
    weighs : bool
        Whether the attack weighs each entry by its error, where the update has them.

    Raises
    ------
    AttackNotApplicable
        If the model has no such part, its gradient is not shared, or its entries have errors of
        their own and the attack does not weigh by them.
    """
    if not weighs:
        refuse_errors(attack, update)
    found = {}
    for part in needs:
        words, where = _WORDS.get(part, part), getattr(anatomy, part)
        if where is None:
            raise AttackNotApplicable(attack, f"the model has no {words} that dissect() knows of")
        rows = where if isinstance(where, Rows) else Rows(where)
        gradient = rows.of(update.gradients)
        if gradient is None:
            if part == "position":
                why = f"no {words} gradient is shared: {rows} is fixed or withheld"
            else:
                why = f"the gradient of the {words} ({rows}) is not shared"
            raise AttackNotApplicable(attack, why + what_adapters(anatomy, update.gradients))
        if part == "position":
            gradient = _at_the_tokens(attack, anatomy, update)
        found[part] = gradient.to(device, torch.float64)
    return found


def refuse_errors(attack: str, update: ClientUpdate) -> None:
    """Refuse an update whose entries have errors of their own, for an attack that takes all alike.

    Raises
    ------
    AttackNotApplicable
        With the attack that does not.
    """
    if update.errors is not None:
        raise AttackNotApplicable(
            attack,
            f"the update's entries have errors of their own ({update.optimizer or 'an optimizer'}'s step undone), "
            "and only the patch-embedding system weighs by them: attack='embedding'",
        )


def refuse_zero(attack: str) -> NoReturn:
    """Say why a position embedding's gradient may be zero."""
    raise AttackNotApplicable(
        attack,
        "the position embedding's gradient is zero. It may be frozen; or the head is still zero (torchvision "
        "initializes it so) and passes no gradient down: then the update has the labels, and of one image its "
        "features at the head, but no pixel can be solved for",
    )


def refuse_rows(attack: str, n: int, d: int, rounds: int, *, equations: int) -> NoReturn:
    """Say how many rounds of width d would do for n patches."""
    of = f"gradients of width {d}" if rounds == 1 else f"{rounds} rounds of width {d} each"
    one = "d" if equations == d else "d − 1"
    count = one if rounds == 1 else f"rounds · {one}" if equations == d else f"rounds · ({one})"
    raise AttackNotApplicable(
        attack,
        f"{n} patches, but {of}: rank(G) = n needs n ≤ {count}. {-(-n // equations)} rounds of one picture would do: "
        "al.invert(model, [update, …]). strict=False returns what is known, with the rest filled in grey",
        patches=n,
        width=d,
    )


def _at_the_tokens(attack: str, anatomy: Anatomy, update: ClientUpdate) -> Tensor:
    """∂l/∂E at the size of the picture, or a refusal where that is not determined."""
    try:
        return position_gradient(anatomy, update.gradients)
    except ValueError as error:
        raise AttackNotApplicable(attack, str(error)) from None


def pixel_variance(preprocessing: Preprocessing) -> float:
    """Of a pixel of which nothing is known, anywhere in [0, 1]; in model-input space.

    >>> from aprillab.preprocessing import HALF
    >>> round(pixel_variance(HALF), 4)
    0.3333
    """
    return sum(1 / 12 / std**2 for std in preprocessing.std) / len(preprocessing.std)


def grey_patches(tiling: Tiling, preprocessing: Preprocessing, shape: tuple[int, int], grey: float = 0.5) -> Tensor:
    """The patches (n, p) of a picture of one grey level, in model-input space, float64:
    all of them are one.
    """
    alone = replace(tiling, image_size=tiling.patch_size)
    pixels = alone.images(torch.full((1, 1, shape[1]), grey, dtype=torch.float64))
    return alone.patches(preprocessing.to_input(pixels))[0].expand(shape)
