"""The defences: what a client does to its picture or its update, and what the attacker is told of
it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import aprillab as al
from aprillab.federation import LocalTraining, train_locally, update_of

from .victims import DIGITS, LARGE, PHOTOGRAPHS, Scene, World

NONE, NOISE, CLIPPING, PRUNING = "none", "noise", "clipping", "pruning"
FLOAT16, BFLOAT16, BITS, STOCHASTIC, SIGN = "float16", "bfloat16", "bits", "stochastic bits", "sign"
DITHER, BATCH, SUM, ADAM, WITHHELD = "dithered pixels", "batch", "secure sum", "Adam", "position withheld"

MULTIPLIERS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0, 10.0)
STRENGTHS: dict[str, tuple[float, ...]] = {
    NONE: (0.0,),
    NOISE: MULTIPLIERS,
    CLIPPING: (0.1, 0.001),
    PRUNING: (50.0, 90.0, 95.0, 99.0, 99.9),
    FLOAT16: (16.0,),
    BFLOAT16: (16.0,),
    BITS: (8.0, 4.0, 2.0),
    STOCHASTIC: (8.0, 4.0, 2.0),
    SIGN: (1.0,),
    DITHER: (0.5, 1.0, 2.0, 4.0, 8.0),
    BATCH: (2.0, 4.0, 8.0, 16.0, 64.0),
    SUM: (3.0, 10.0),
    ADAM: (1e-8,),
    WITHHELD: (0.0, 1e-6, 1e-5, 1e-4),
}
#: What the strength of each is, for the page.
MEANINGS = {
    NONE: "", NOISE: "σ", CLIPPING: "C over the norm", PRUNING: "% set to zero", FLOAT16: "bits", BFLOAT16: "bits",
    BITS: "bits", STOCHASTIC: "bits", SIGN: "bits", DITHER: "± levels", BATCH: "pictures", SUM: "clients",
    ADAM: "ε of Adam", WITHHELD: "σ",
}  # fmt: skip
#: Few cells for the large model, which takes seconds an attack.
LARGE_STRENGTHS: dict[str, tuple[float, ...]] = {
    NONE: (0.0,), NOISE: (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1), PRUNING: (90.0, 99.0), BFLOAT16: (16.0,),
    BITS: (8.0, 4.0),
}  # fmt: skip

#: The attacker plays these, and finds the same numbers for the right picture.
PLAYED = (NONE, CLIPPING, PRUNING, FLOAT16, BFLOAT16, BITS, SIGN, ADAM, WITHHELD)
TOGETHER = (BATCH, SUM)
HOW = LocalTraining("adam", learning_rate=1e-3, eps=1e-8)


class Cell(NamedTuple):
    """A defence and how strong it is."""

    defence: str
    strength: float

    @property
    def images(self) -> int:
        """Pictures behind the update."""
        return int(self.strength) if self.defence in TOGETHER else 1

    @property
    def multiplier(self) -> float:
        """σ of noise with a clipping norm, 0 where there is none."""
        return self.strength if self.defence in (NOISE, WITHHELD) else 0.0


@dataclass(frozen=True)
class Shared:
    """What the server receives, and what it knows of the defence.

    Attributes
    ----------
    update : ClientUpdate
    norm : float
        Of the victim's own gradient before anything is done to it.
    clip : float or None
        C, where there is one: the victim's own norm, so that its gradient is as long as a
        clipped one may be.
    deviation : float
        Of the noise in an entry, σC.
    told : mapping
        The options of ``al.told_errors`` that say what this defence does, if it has any.
    """

    update: al.ClientUpdate
    norm: float
    clip: float | None
    deviation: float
    told: dict[str, Any]


def cells(world: World, quick: bool = False) -> list[Cell]:
    """All defences of a world; of a quick study the first and the last strength of each."""
    strengths = LARGE_STRENGTHS if world.world == LARGE else STRENGTHS
    found = [Cell(defence, strength) for defence, each in strengths.items() for strength in each]
    if not quick:
        return found
    return [cell for cell in found if cell.strength in (strengths[cell.defence][0], strengths[cell.defence][-1])]


def seed_of(world: World, cell: Cell, victim: int) -> int:
    """Of all that is drawn for one update: the same in every run."""
    place = (DIGITS, PHOTOGRAPHS, LARGE).index(world.world), len(world.when), world.seed, victim
    strengths = sorted({cell.strength for cell in cells(world)})
    number = list(STRENGTHS).index(cell.defence) * len(strengths) + strengths.index(cell.strength)
    return functools.reduce(lambda found, more: 101 * found + more, place, number)


# --- The client ---------------------------------------------------------------------------------------------------


def shared_by(stage: Scene, cell: Cell, victim: int, seed: int) -> Shared:
    """The victim's update under the defence, alone or together with others."""
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = stage.pixels[victim : victim + 1], stage.labels[victim : victim + 1]
    own = al.client_update(stage.model, stage.input_of(pixels), labels)
    norm = al.defenses.update_norm(own)
    if cell.defence == DITHER:
        level = (torch.rand(pixels.shape, generator=generator) * 2 - 1) * cell.strength / 255
        update = al.client_update(stage.model, stage.input_of(pixels + level), labels)
        return Shared(update, norm, None, 0.0, {})
    if cell.defence in TOGETHER:
        return Shared(_together(stage, cell, pixels, labels), norm, None, 0.0, {})
    if cell.defence == ADAM:
        return Shared(adam_step(stage, pixels, labels), norm, None, 0.0, {})
    clip = cell.strength * norm if cell.defence == CLIPPING else norm if cell.multiplier else None
    update = defended(own, cell, generator, clip=clip)
    if cell.defence == WITHHELD:
        update = update.without([stage.anatomy.position or ""])
    return Shared(update, norm, clip, cell.multiplier * (clip or 0.0), told_of(cell))


def defended(
    update: al.ClientUpdate, cell: Cell, generator: torch.Generator | None, *, clip: float | None = None
) -> al.ClientUpdate:
    """The update of one picture under a defence that works on updates; without a generator
    no noise is added.
    """
    if clip is not None:
        update = al.defenses.clip(update, clip)
        if cell.multiplier and generator is not None:
            return al.defenses.gaussian_noise(update, cell.multiplier * clip, generator=generator)
        return update
    bits = int(cell.strength)
    plain: dict[str, Callable[[], al.ClientUpdate]] = {
        PRUNING: lambda: al.defenses.prune(update, 1 - cell.strength / 100),
        FLOAT16: lambda: al.defenses.to_precision(update, torch.float16),
        BFLOAT16: lambda: al.defenses.to_precision(update, torch.bfloat16),
        BITS: lambda: al.defenses.quantize(update, bits),
        STOCHASTIC: lambda: al.defenses.quantize(update, bits, stochastic=True, generator=generator),
        SIGN: lambda: al.defenses.sign(update),
    }
    return plain[cell.defence]() if cell.defence in plain else update


def told_of(cell: Cell) -> dict[str, Any]:
    """What ``al.told_errors`` is told of the defence; nothing where there are no
    errors to be told of.
    """
    if cell.defence == PRUNING:
        return {"pruned": True}
    if cell.defence in (BITS, STOCHASTIC, SIGN):
        return {"bits": int(cell.strength), "stochastic": cell.defence == STOCHASTIC}
    return {}


def _together(stage: Scene, cell: Cell, pixels: Tensor, labels: Tensor) -> al.ClientUpdate:
    """The mean of a batch, or the sum of clients with one picture each."""
    others = cell.images - 1
    images = stage.input_of(torch.cat([pixels, stage.others[:others]]))
    update = al.client_update(stage.model, images, torch.cat([labels, stage.other_labels[:others]]))
    if cell.defence == BATCH:
        return update
    summed = {name: gradient * cell.images for name, gradient in update.gradients.items()}
    return replace(update, gradients=summed, batch_size=None)


def adam_step(stage: Scene, pixels: Tensor, labels: Tensor) -> al.ClientUpdate:
    """The weights that came back from one step of Adam, undone as far as it can be."""
    after = train_locally(stage.model, stage.input_of(pixels), labels, HOW)
    return update_of(stage.model.state_dict(), after, HOW)


def flat(update: al.ClientUpdate, names: Sequence[str]) -> Tensor:
    """The gradients of these names in one float32 row, (N,)."""
    return torch.cat([update.gradients[name].detach().flatten().float() for name in names])
