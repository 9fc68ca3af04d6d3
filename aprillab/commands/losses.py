"""The client's loss on the command line: ``cross-entropy,smoothing=0.1,weights=1/2/1`` or ``bce``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .messages import CommandError

if TYPE_CHECKING:
    from torch import Tensor

LOSSES = """losses: cross-entropy, or cross-entropy with smoothing=S, weights=W/W/… (one a class) or both, as in
  cross-entropy,smoothing=0.1; bce: sigmoids and binary cross-entropy against one-hot labels, the mean over classes,
  with weights=W/W/… too. Any other: aprillab.audit and aprillab.invert in Python take a function."""


@dataclass(frozen=True)
class Loss:
    """A loss by name.

    Attributes
    ----------
    name : {"cross-entropy", "bce"}
    smoothing : float, of the labels; from 0 to below 1
    weights : tuple of float, one a class; empty for equal ones
    """

    name: str = "cross-entropy"
    smoothing: float = 0.0
    weights: tuple[float, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it is what all else assumes: cross-entropy with hard labels and equal weights."""
        return self == Loss()

    def __str__(self) -> str:
        smoothing = [f"smoothing={self.smoothing:g}"] if self.smoothing else []
        weights = [f"weights={'/'.join(f'{weight:g}' for weight in self.weights)}"] if self.weights else []
        return ",".join([self.name, *smoothing, *weights])


def loss(text: str) -> Loss:
    """Read a loss, for argparse's ``type=``.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is unknown, or a number makes no sense.

    Examples
    --------
    >>> loss("cross-entropy,smoothing=0.1,weights=1/2")
    Loss(name='cross-entropy', smoothing=0.1, weights=(1.0, 2.0))
    >>> print(loss("bce"))
    bce
    """
    name, *options = text.split(",")
    if name not in ("cross-entropy", "bce"):
        raise argparse.ArgumentTypeError(f"{text!r}: there are cross-entropy and bce, see below")
    smoothing: float = 0.0
    weights: tuple[float, ...] = ()
    for option in options:
        key, _, value = option.partition("=")
        try:
            numbers = tuple(map(float, value.split("/")))
        except ValueError:
            numbers = ()
        if key == "smoothing" and name != "bce" and len(numbers) == 1 and 0 <= numbers[0] < 1:
            smoothing = numbers[0]
        elif key == "weights" and len(numbers) > 1 and all(0 <= w < math.inf for w in numbers) and any(numbers):
            weights = numbers
        else:
            raise argparse.ArgumentTypeError(
                f"{option!r} in {text!r} is neither smoothing=S, from 0 to below 1 and for cross-entropy alone, nor "
                "weights=W/W/…, one for each class, none negative"
            )
    return Loss(name, smoothing, weights)


def loss_function(chosen: Loss, classes: int | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as a function of logits (B, classes) and labels (B,), to a scalar.

    Parameters
    ----------
    chosen : Loss
    classes : int or None
        Of the model, if known, to check the weights against.

    Raises
    ------
    CommandError
        If there is not one weight for each class.

    Examples
    --------
    >>> import torch
    >>> float(loss_function(Loss("bce"), 2)(torch.zeros(1, 2), torch.tensor([1])))
    0.6931471824645996
    """
    from torch.nn import functional

    if chosen.weights and classes is not None and len(chosen.weights) != classes:
        raise CommandError(f"--loss {chosen}: {len(chosen.weights)} weights, but the model has {classes} classes")

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        weights = logits.new_tensor(chosen.weights) if chosen.weights else None
        return functional.cross_entropy(logits, labels, weights, label_smoothing=chosen.smoothing)

    def bce(logits: Tensor, labels: Tensor) -> Tensor:
        targets = functional.one_hot(labels, logits.shape[-1]).to(logits)  # (B, classes)
        weights = logits.new_tensor(chosen.weights) if chosen.weights else None
        return functional.binary_cross_entropy_with_logits(logits, targets, weights)

    return bce if chosen.name == "bce" else functional.cross_entropy if chosen.plain else cross_entropy
