"""The first step of Adam and its kin, undone: it is one-to-one, entry by entry.

The bias corrections cancel what β₁ and β₂ did, so that the first step moves a weight by

    Δ = η r,   r = g / (c|g| + ε),   and back   g = ε r / (1 − c|r|),                       (9.6)

with c = 1 for Adam, AdamW (with amsgrad, too) and Adagrad, and c = √(1 − α) for RMSprop, which
corrects no bias. AdamW's decay is taken off the weight first, the others' off the gradient last. A
wrong ε is a factor that all entries have in common, which no attack minds. What limits g is the
rounding of the weights: r is known to about ε_float |w| / η, an entry of g to that times
(c|g| + ε)² / ε, (9.7). Where c|r| is 1 up to rounding, g is known to be large, and no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .record import ClientUpdate
from .tensors import UpdateError

#: torch's own defaults: betas and ε. RMSprop's α stands in the place of β₂.
DEFAULTS: dict[str, tuple[tuple[float, float] | None, float]] = {
    "adam": ((0.9, 0.999), 1e-8),
    "adamw": ((0.9, 0.999), 1e-8),
    "adagrad": (None, 1e-10),
    "rmsprop": ((0.0, 0.99), 1e-8),
}
_WORST = 6**0.5  # two roundings lie within so many of their standard deviations, and no further
# How far the mean of several steps is from a first step nobody knows; it is no rounding, and
# alike in all entries.
_DRIFT = 1e-3  # learning rates
_BEYOND = 0.01  # of the entries may have moved by more than a first step moves any: others than these trained some


@dataclass(frozen=True)
class FirstStep:
    """A client's first step, as it is known.

    Attributes
    ----------
    learning_rate, eps, weight_decay : float
    saturation : float
        c of (9.6).
    decoupled : bool
        Whether the decay is AdamW's.
    steps : int
        More than one: all are taken for the first, which they are while the gradient stays.
    """

    learning_rate: float
    eps: float
    weight_decay: float
    saturation: float
    decoupled: bool
    steps: int

    def undone(self, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient behind one tensor's step, and the standard error of each entry, both
        float64.

        Where the step is 1/c up to rounding, the error is infinite and the value the largest that
        rounding tells from its neighbours.

        Examples
        --------
        >>> step = FirstStep(0.5, 1.0, 0.0, 1.0, decoupled=False, steps=1)
        >>> g, error = step.undone(torch.tensor([1.0, 1.0]), torch.tensor([0.75, 0.5]))
        >>> g.tolist()[0], error.tolist()[0] < 1e-6, error.tolist()[1]
        (1.0, True, inf)
        """
        # How far each entry moved, in learning rates.
        r, sigma = self.moved(old, new)
        least = _WORST * self.saturation * sigma  # the nearest to 1 that rounding tells from it
        left = 1 - self.saturation * r.abs()
        square = left.square() - least.square()
        known = (left > least) & (square > 0)
        # The error of an entry of g, (9.7), which is ε σ_r / (1 − c|r|)²; then g itself, (9.6).
        error = torch.where(known, self.eps * sigma / square, math.inf)
        floor = torch.finfo(torch.float64).tiny
        g = (
            self.eps
            * r.clamp(-1 / self.saturation, 1 / self.saturation)
            / torch.maximum(left, least).clamp_min(floor)
        )
        return g if self.decoupled else g - self.weight_decay * old.double(), error

    def moved(self, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """r of (9.6), a mean over the steps, and its standard error, both float64."""
        decay = self.learning_rate * self.weight_decay if self.decoupled else 0.0
        # As torch.optim does it, in the weights' own precision: then this rounding is known.
        kept = old * (1 - decay) if decay and self.steps == 1 else old.double() * (1 - decay) ** self.steps
        lengths = sum((1 - decay) ** k for k in range(self.steps)) * self.learning_rate
        r = (kept.double() - new.double()) / lengths
        eps = max(torch.finfo(old.dtype).eps, torch.finfo(new.dtype).eps)
        # A rounding lies evenly within half a unit of the last place. Not all optimizers'
        # kernels round as above.
        units = _unit(old, eps).square() + _unit(new, eps).square() if decay else _unit(new, eps).square()
        weights = self.steps * units / 12 / lengths**2
        drift = _DRIFT if self.steps > 1 else 0.0
        return r, (weights + (eps * r).square() + drift**2).sqrt()


def _unit(weight: Tensor, eps: float) -> Tensor:
    """The unit of the last place of each number, float64; 0 of a zero."""
    exponent = torch.frexp(weight.double()).exponent
    return torch.where(weight == 0, 0.0, torch.ldexp(torch.full_like(weight, eps, dtype=torch.float64), exponent - 1))


def first_step(update: ClientUpdate) -> FirstStep:
    """What an update's facts say of the client's steps.

    Raises
    ------
    UpdateError
        If the learning rate is not among them, or AdamW's decay.
    """
    if update.optimizer == "adamw" and update.weight_decay is None:
        raise UpdateError(
            "optimizer='adamw' shrinks each weight besides: say its 'weight_decay' (torch.optim.AdamW's default is "
            "0.01, that of transformers' Trainer 0.0)"
        )
    if update.learning_rate is None or update.eps is None:
        raise UpdateError(f"to undo {update.optimizer}, its 'learning_rate' and 'eps' are needed")
    return FirstStep(
        update.learning_rate, update.eps, update.weight_decay or 0.0, _saturation(update),
        update.optimizer == "adamw", update.local_steps,
    )  # fmt: skip


def _saturation(update: ClientUpdate) -> float:
    """c of (9.6)."""
    return math.sqrt(1 - update.betas[1]) if update.optimizer == "rmsprop" and update.betas else 1.0


def error_scale(update: ClientUpdate) -> float:
    """The size ε/c of a gradient beyond which its error grows with its square; infinite where
    errors do not depend on the entry.

    >>> one = {"w": torch.ones(1)}
    >>> error_scale(ClientUpdate(one, optimizer="adam", eps=1e-8, errors=one)), error_scale(ClientUpdate(one))
    (1e-08, inf)
    """
    return math.inf if update.errors is None or update.eps is None else update.eps / _saturation(update)


def refuse_longer(name: str, r: Tensor, sigma: Tensor, step: FirstStep) -> None:
    """Refuse a tensor whose entries moved by more than a first step moves any.

    Raises
    ------
    UpdateError
        With how far they moved, in learning rates.
    """
    if step.steps > 1:  # later steps may be a little longer
        return
    beyond = step.saturation * r.abs() > 1 + 2 * _WORST * step.saturation * sigma
    if (share := float(beyond.double().mean())) > _BEYOND:
        raise UpdateError(
            f"{name}: {share:.0%} of the entries moved further than a first step moves any (by up to "
            f"{float(r.abs().max()):.6g} learning rates, not {1 / step.saturation:.3g}): check 'optimizer', "
            f"'learning_rate' ({step.learning_rate:g}), 'weight_decay' ({step.weight_decay:g}), and that this is the "
            "client's first step"
        )
