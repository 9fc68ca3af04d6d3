"""The state dict that goes out instead of the model's own, and the head that most of
these tricks change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..anatomy import Anatomy, dissect, playable
from ..update import UpdateError, logits_of


class CannotCheat(ValueError):
    """The model cannot be changed in this way; the message says why, and what could be done
    instead.
    """


@dataclass(frozen=True)
class Head:
    """The linear map from features to logits, as the model holds it.

    Attributes
    ----------
    anatomy : Anatomy
        Of the model it is of.
    weight_name : str
    bias_name : str or None
    weight : Tensor of shape (classes, d)
    bias : Tensor of shape (classes,) or None
    """

    anatomy: Anatomy
    weight_name: str
    bias_name: str | None
    weight: Tensor
    bias: Tensor | None

    @property
    def classes(self) -> int:
        return len(self.weight)

    @property
    def names(self) -> set[str]:
        return {self.weight_name} | ({self.bias_name} if self.bias_name else set())


def head_of(model: nn.Module, anatomy: Anatomy | None = None) -> Head:
    """The model's head, shown to be a linear map: a picture of noise is played through
    two versions of it.

    Parameters
    ----------
    model : nn.Module
        Left unchanged.
    anatomy : Anatomy, optional
        Default is ``dissect(model)``.

    Raises
    ------
    CannotCheat
        If there is no head, or logits are no linear map of what it reads.
    UnknownModelError
        If ``dissect`` does not know the model.

    Examples
    --------
    >>> import aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> head_of(model).weight_name, head_of(model).classes
    ('head.weight', 5)
    """
    anatomy = anatomy or dissect(model)
    name = type(model).__name__
    state = model.state_dict()
    if anatomy.head_weight is None or anatomy.head_weight not in state:
        raise CannotCheat(
            f"{name} has no head that dissect knows: name it, anatomy=dissect(model, head_weight=…, head_bias=…)"
        )
    weight = state[anatomy.head_weight]
    if weight.ndim != 2 or "lora_" in anatomy.head_weight:
        raise CannotCheat(
            f"the head {anatomy.head_weight} of {name} is no matrix of (classes, d) but {tuple(weight.shape)}"
            f"{', an adapter' if 'lora_' in anatomy.head_weight else ''}: only a linear head can be set row by row"
        )
    if len(weight) < 2:
        raise CannotCheat(f"the head {anatomy.head_weight} has one class: its loss is the same whatever it is sent")
    bias = state.get(anatomy.head_bias or "")
    head = Head(anatomy, anatomy.head_weight, None if bias is None else anatomy.head_bias, weight, bias)
    _refuse_other_than_linear(model, head)
    return head


def _refuse_other_than_linear(model: nn.Module, head: Head) -> None:
    """Twice the weight must give twice the logits, once the bias is taken off."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(head.weight.shape, generator=generator, dtype=torch.float64).to(head.weight)
    bias = None if head.bias is None else torch.arange(head.classes).to(head.bias) / head.classes
    shifted = {} if head.bias_name is None or bias is None else {head.bias_name: bias}
    try:
        single, double = (
            played(model, head, {head.weight_name: factor * weight} | shifted, images=1)[0] for factor in (1, 2)
        )
    except (RuntimeError, UpdateError, ValueError) as error:
        raise CannotCheat(
            f"{type(model).__name__} could not be played on a picture of noise: {str(error).splitlines()[0]}"
        ) from error
    shift = 0 if bias is None else bias.double()
    miss = (double.double() - shift - 2 * (single.double() - shift)).norm() / single.double().norm().clamp_min(1e-300)
    if single.shape[-1] != head.classes or not miss < 100 * torch.finfo(weight.dtype).eps:
        raise CannotCheat(
            f"logits of {type(model).__name__} are no linear map of the features by {head.weight_name} (twice the "
            f"weight misses twice the logits by {float(miss):.1e}): a head that normalizes, has another layer behind "
            "it or is not used cannot be set row by row"
        )


@torch.no_grad()
def played(model: nn.Module, head: Head, changed: Mapping[str, Tensor], *, images: int) -> Tensor:
    """Logits (images, classes) of some pictures of noise, the same each time, with some
    tensors exchanged.
    """
    anatomy, generator = head.anatomy, torch.Generator().manual_seed(0)
    shape = (images, anatomy.channels or 3, *anatomy.image_size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(model.get_parameter(anatomy.patch_weight))
    state = dict(changed)
    with evaluated(model), playable(model, anatomy):
        return logits_of(cast(nn.Module, lambda given: functional_call(model, state, (given,))), noise)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """In evaluation mode while this lasts; each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def sent_state(model: nn.Module, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the model's state dict with some tensors exchanged, under every name
    that a tensor has.

    Parameters
    ----------
    model : nn.Module
        Left unchanged.
    changes : mapping of str to Tensor
        Names as in ``model.state_dict()``; values are brought to the dtype and device of
        what they replace.

    Raises
    ------
    CannotCheat
        If a value is not finite in that dtype.

    Examples
    --------
    >>> sent_state(nn.Linear(1, 2), {"bias": torch.ones(2)})["bias"]
    tensor([1., 1.])
    """
    own = model.state_dict()
    sent = {name: tensor.detach().clone() for name, tensor in own.items()}
    for name, value in changes.items():
        new = value.to(own[name]).reshape(own[name].shape)
        if not torch.isfinite(new).all():
            raise CannotCheat(
                f"{name} would not be finite in {own[name].dtype}, whose largest number is "
                f"{torch.finfo(own[name].dtype).max:.3g}: choose a smaller strength"
            )
        tied = [other for other, tensor in own.items() if tensor.data_ptr() == own[name].data_ptr()]
        for other in tied:
            if own[other].shape == new.shape:
                sent[other] = new.clone()
    return sent


def check_label(label: object, classes: int) -> int:
    """A class that the head has, as an int.

    Raises
    ------
    CannotCheat
        If it is no whole number, or there is no such class.

    >>> check_label(torch.tensor(3), 5)
    3
    """
    value = label.item() if isinstance(label, Tensor) and label.numel() == 1 else label
    if isinstance(value, bool) or not isinstance(value, int):
        raise CannotCheat(f"label must be a whole number, not {label!r}")
    if not 0 <= value < classes:
        raise CannotCheat(f"there is no class {value}: the head has {classes}, 0 to {classes - 1}")
    return value


def check_strength(strength: float, dtype: torch.dtype) -> float:
    """L, in nats, for which e^−L is still a number.

    Raises
    ------
    CannotCheat
        If it is not positive, or e^−L underflows the softmax's precision.

    >>> check_strength(20.0, torch.float32)
    20.0
    """
    numbers = torch.finfo(dtype if dtype == torch.float64 else torch.float32)
    most = -torch.log(torch.tensor(numbers.tiny, dtype=torch.float64)).item()
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= most:
        enough = -torch.log(torch.tensor(numbers.eps, dtype=torch.float64)).item()
        raise CannotCheat(
            f"strength={strength} must be a number above 0 and at most {most:.0f}: beyond, e^−L underflows "
            f"{numbers.dtype!s} to zero. Rounding stops mattering at L = {enough:.0f}: more gains nothing"
        )
    return float(strength)
