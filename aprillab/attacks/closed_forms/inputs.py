"""What a closed form reads of an update, checked: the first thing that each of them does."""

from __future__ import annotations

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

    Raises
    ------
    AttackNotApplicable
        If the model has no such part, or its gradient is not shared.
    """
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
    """The patches (n, p) of a picture of one grey level, in model-input space, float64."""
    pixels = tiling.images(torch.full((1, *shape), grey, dtype=torch.float64))
    return tiling.patches(preprocessing.to_input(pixels))[0]
