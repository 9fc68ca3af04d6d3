"""The record of what a server receives from one client, and the facts that a client may state."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .tensors import DTYPES, UpdateError, as_gradient

FORMAT = "aprillab-update-1"
# What a client may claim, images and local steps: beyond, it is a slip or a trick, and no loop
# should run so long.
MAX_BATCH = 1_000_000
MAX_STEPS = 1_000_000_000
OPTIMIZERS = ("sgd", "adam", "adamw", "adagrad", "rmsprop")


@dataclass(frozen=True)
class ClientUpdate:
    """What the server receives from one client.

    Everything but the gradients is what somebody says of them. It is checked for sense and for
    contradictions, and no further: attacks treat it as a claim.

    Attributes
    ----------
    gradients : mapping of str to Tensor
        By parameter name, in float16, bfloat16, float32 or float64; what is frozen or withheld is
        absent. Numpy arrays are taken too, and become tensors.
    withheld : tuple of str
        Parameters the client trains but does not share the gradient of.
    batch_size : int or None
        Images behind the update, if the client says so.
    source : {"fedsgd", "fedavg"}
    seconds : float or None
        Wall-clock time of the client's forward and backward pass, where it was measured here.
    learning_rate : float or None
        The client's, where known. The gradients are already divided by it.
    local_steps : int
        Optimizer steps behind the update.
    momentum : float or None
        Of the client's SGD, in [0, 1); None where not known.
    nesterov : bool
    weight_decay : float or None
        What the client's SGD added of each weight to its gradient, and what was taken off these
        gradients again. None: not known, so that they may contain a multiple of the weights.
        AdamW's shrinks the weights by η times this.
    rounding : float or None
        Where the update is the difference of two states: the expected size of the weights' rounding
        errors in it, over its own size (Frobenius norms over all tensors).
    optimizer : {"sgd", "adam", "adamw", "adagrad", "rmsprop"} or None
        The client's, where known; of all but SGD, the step was undone.
    betas, eps : (float, float) and float, or None
        Of an optimizer that divides each entry by its size.
    errors : mapping of str to Tensor, or None
        The standard error of each entry, where these differ so much that no one number says it, as
        once Adam's step is undone. By name and of the shapes of ``gradients``, at least zero;
        infinite where nothing but the sign is known. Those of gradients that are not there are
        dropped. Not compared.

    Raises
    ------
    UpdateError
        If gradients have no names, or are no floats; if a fact is of the wrong type or out of
        range; if a name is both shared and withheld; if errors are not one for each entry.

    Examples
    --------
    >>> import numpy as np
    >>> import aprillab as al
    >>> al.ClientUpdate({"weight": np.array([0.5, 2.0], np.float32)}).gradients["weight"]
    tensor([0.5000, 2.0000])
    """

    gradients: Mapping[str, Tensor]
    withheld: tuple[str, ...] = ()
    batch_size: int | None = None
    source: str = "fedsgd"
    seconds: float | None = field(default=None, compare=False)
    learning_rate: float | None = None
    local_steps: int = 1
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float | None = None
    rounding: float | None = None
    optimizer: str | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    errors: Mapping[str, Tensor] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "gradients", _named_gradients(self.gradients))
        for name, value in checked_facts({name: getattr(self, name) for name in _FACTS}).items():
            object.__setattr__(self, name, value)
        if both := [name for name in self.withheld if name in self.gradients]:
            raise UpdateError(f"{both[0]!r} is in the update and among the withheld: strike it out of one of the two")
        if self.nesterov and not self.momentum:
            raise UpdateError(f"'nesterov' needs a 'momentum' above 0, not {self.momentum!r}")
        _refuse_mixed(self)
        if self.errors is not None:
            object.__setattr__(self, "errors", _errors_of(self.gradients, self.errors))

    @property
    def dtype(self) -> torch.dtype:
        """The lowest precision among the gradients: it limits every attack.

        Raises
        ------
        UpdateError
            If there is no gradient.
        """
        dtypes = {g.dtype for g in self.gradients.values()}
        if not dtypes:
            raise UpdateError("the update holds no gradient")
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def without(self, names: Collection[str]) -> ClientUpdate:
        """The same update with the gradients called ``names`` withheld.

        Raises
        ------
        UpdateError
            If one of them is not in the update.

        Examples
        --------
        >>> import torch, aprillab as al
        >>> update = al.ClientUpdate({"weight": torch.ones(2), "bias": torch.ones(1)})
        >>> list(update.without("bias").gradients), update.without("bias").withheld
        (['weight'], ('bias',))
        """
        names = as_set(names)
        if missing := sorted(names - set(self.gradients)):
            raise UpdateError(f"cannot withhold {', '.join(missing)}: not in the update")
        kept = {name: g for name, g in self.gradients.items() if name not in names}
        return replace(self, gradients=kept, withheld=(*self.withheld, *(n for n in self.gradients if n in names)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ClientUpdate:
        """The same update on another device or in another precision.

        Examples
        --------
        >>> import torch, aprillab as al
        >>> al.ClientUpdate({"weight": torch.ones(2)}).to(dtype=torch.float64).dtype
        torch.float64
        """
        moved = {name: g.to(device=device, dtype=dtype) for name, g in self.gradients.items()}
        errors = self.errors and {name: e.to(device=device, dtype=dtype) for name, e in self.errors.items()}
        return replace(self, gradients=moved, errors=errors)

    def facts(self) -> dict[str, Any]:
        """Everything but the gradients, their errors and the seconds, as JSON can hold
        it: what a file says.

        Examples
        --------
        >>> import torch, aprillab as al
        >>> al.ClientUpdate({"weight": torch.ones(2)}, batch_size=1, momentum=0.9).facts()["momentum"]
        0.9
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _FACTS}
        return {**values, "withheld": list(self.withheld), "betas": None if self.betas is None else list(self.betas)}


def checked_facts(facts: Mapping[str, Any], called: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """What a client states, each fact in its own type.

    Parameters
    ----------
    facts : mapping
        By the names of :class:`ClientUpdate`'s fields.
    called : mapping of str to str
        What a refusal is to call them where they have another name elsewhere.

    Raises
    ------
    UpdateError
        If one is of the wrong type or out of range.

    Examples
    --------
    >>> checked_facts({"learning_rate": 1, "momentum": None})
    {'learning_rate': 1.0, 'momentum': None}
    """
    return {name: check(called.get(name, name), facts[name]) for name, check in _FACTS.items() if name in facts}


def as_set(names: Collection[str]) -> set[str]:
    """Names as a set; a lone string is one name, not its letters."""
    return {names} if isinstance(names, str) else set(names)


def _named_gradients(gradients: Any) -> Mapping[str, Tensor]:
    """The mapping itself where it holds nothing but our tensors, else one that does."""
    if not isinstance(gradients, Mapping):
        kind = type(gradients).__name__
        what = f"a {kind} has no names" if isinstance(gradients, list | tuple) else f"a {kind} is no mapping"
        raise UpdateError(
            f"gradients are a mapping of parameter name to tensor, and {what}. Gradients in the model's order: "
            "dict(zip([name for name, _ in model.named_parameters()], gradients)). Weights, as Flower sends them: "
            "update_from_states(before, after, names=model.state_dict(), learning_rate=…)"
        )
    for name in gradients:
        if not isinstance(name, str):
            raise UpdateError(
                f"gradients are called by the parameters' names, and {name!r} is a {type(name).__name__}: "
                "use those of model.named_parameters()"
            )
    if all(_is_plain(g) for g in gradients.values()):
        return gradients
    return {name: as_gradient(name, g) for name, g in gradients.items()}


def _is_plain(g: Any) -> bool:
    return isinstance(g, Tensor) and g.dtype in DTYPES and g.layout == torch.strided and not g.requires_grad


def _errors_of(gradients: Mapping[str, Tensor], errors: Any) -> Mapping[str, Tensor]:
    """The errors of the gradients that are there, each of its shape, on its device."""
    if not isinstance(errors, Mapping):
        raise UpdateError(
            f"'errors' are a mapping of name to tensor, as the gradients, not a {type(errors).__name__}"
        )
    found = {}
    for name, g in gradients.items():
        if name not in errors:
            raise UpdateError(f"'errors' lack {name!r}: give one for each entry of each gradient, or none at all")
        error = found[name] = as_gradient(name, errors[name]).to(g.device)
        if error.shape != g.shape:
            raise UpdateError(f"'errors' of {name!r} have shape {tuple(error.shape)}, its gradient {tuple(g.shape)}")
        if not error.is_meta and (bad := int((~(error >= 0)).sum())):
            raise UpdateError(f"'errors' of {name!r}: {bad} of {error.numel()} are negative or NaN")
    return found


def _refuse_mixed(update: ClientUpdate) -> None:
    """SGD's options with another optimizer, or the other's with SGD."""
    if update.optimizer in (None, "sgd"):
        if stray := next((name for name in ("betas", "eps") if getattr(update, name) is not None), None):
            raise UpdateError(f"{stray!r} is not of SGD: name the optimizer that has it, as optimizer='adamw'")
    elif update.momentum or update.nesterov:
        raise UpdateError(f"'momentum' is of SGD here, and the optimizer is {update.optimizer!r}: leave it out")


# --- Facts: each function returns the value in its own type, or says what it must be ----------------------------


def _names(name: str, value: Any) -> tuple[str, ...]:
    listed = (value,) if isinstance(value, str) else value
    if not isinstance(listed, list | tuple | set | frozenset) or not all(isinstance(n, str) for n in listed):
        raise UpdateError(f"{name!r} must be a list of names, not {value!r}")
    return tuple(sorted(listed) if isinstance(listed, set | frozenset) else listed)


def _count(most: int, *, needed: bool) -> Callable[[str, Any], int | None]:
    def check(name: str, value: Any) -> int | None:
        try:
            number = None if value is None or isinstance(value, bool) else operator.index(value)
        except (TypeError, ValueError):
            number = None
        if (number is None and (needed or value is not None)) or not (number is None or 0 < number <= most):
            raise UpdateError(f"{name!r} must be an integer from 1 to {most}, not {value!r}")
        return number

    return check


def _number(words: str, allowed: Callable[[float], bool]) -> Callable[[str, Any], float | None]:
    def check(name: str, value: Any) -> float | None:
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, str | bytes | bool) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
        if not (math.isfinite(number) and allowed(number)):
            raise UpdateError(f"{name!r} must be {words}, not {value!r}")
        return number

    return check


def _source(name: str, value: Any) -> str:
    if value not in ("fedsgd", "fedavg"):
        raise UpdateError(f"{name!r} must be 'fedsgd' or 'fedavg', not {value!r}")
    return value


def _optimizer(name: str, value: Any) -> str | None:
    if value is not None and value not in OPTIMIZERS:
        raise UpdateError(f"{name!r} must be one of {', '.join(OPTIMIZERS)}, not {value!r}")
    return value


def _pair(name: str, value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UpdateError(f"{name!r} must be two numbers, as (0.9, 0.999), not {value!r}")
    first, second = (_number("at least 0 and below 1, each", lambda x: 0 <= x < 1)(name, one) for one in value)
    if first is None or second is None:
        raise UpdateError(f"{name!r} must be two numbers, as (0.9, 0.999), not {value!r}")
    return first, second


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UpdateError(f"{name!r} must be True or False, not {value!r}")
    return value


_FACTS: Mapping[str, Callable[[str, Any], Any]] = {
    "withheld": _names,
    "batch_size": _count(MAX_BATCH, needed=False),
    "source": _source,
    "learning_rate": _number("positive and finite", lambda x: x > 0),
    "local_steps": _count(MAX_STEPS, needed=True),
    "momentum": _number("at least 0 and below 1", lambda x: 0 <= x < 1),
    "nesterov": _flag,
    "weight_decay": _number("at least 0 and finite", lambda x: x >= 0),
    "rounding": _number("at least 0 and finite", lambda x: x >= 0),
    "optimizer": _optimizer,
    "betas": _pair,
    "eps": _number("positive and finite", lambda x: x > 0),
}
FACTS = tuple(_FACTS)
