"""An update brought to the model that it came from, or refused.

Names are made the model's, what is no trained parameter is dropped, and what cannot come from the
model is refused with the remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from .names import matched
from .record import ClientUpdate
from .tensors import UpdateError, count_not_finite, is_zero

# Weights sent for an update: after some steps of training they still point where the model's do.
# A gradient's cosine with the weights is about 1/√(entries), and 0 where a normalization
# follows: the limits are far from both. RATIO is of their norms, SHARE of the update's squares
# that such tensors have.
COSINE, RATIO, SHARE = 0.9, 2.0, 0.5
# Entries that a tensor must have to be asked, entries of it that are looked at, and tensors that
# are asked first: of 100 random entries a cosine of 0.9 is nine standard deviations away.
FEWEST, SAMPLE, PROBES = 100, 4096, 3


def fitted(
    model: nn.Module, update: ClientUpdate, *, finite: Collection[str] | None = None, unused: Collection[str] = ()
) -> ClientUpdate:
    """The update under the model's own names, without what is no trained parameter; checked.

    Every attack calls this first. Names are matched through the wrappers ``module.``,
    ``_orig_mod.``, ``_module.`` and ``model.`` on either side, and through one other first part
    that all names share. Dropped are buffers of the model, zero tensors of frozen parameters, and
    zero tensors that the model does not have. Absent gradients are fine where the parameter is
    frozen, declared withheld, or unused.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate
    finite : names of the model's parameters, optional
        Look for NaN and infinities in these alone, as an attack does that reads nothing else;
        default is all.
    unused : names of parameters that the forward pass never uses; they may be missing

    Returns
    -------
    ClientUpdate
        ``update`` itself where there is nothing to change.

    Raises
    ------
    UpdateError
        Naming the first tensor that is extra, missing, misshapen or not finite; if names match only
        in part; if all gradients are zero; if the tensors are the model's weights.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> from torch import nn
    >>> update = al.ClientUpdate({"module.weight": torch.ones(1, 2), "module.bias": torch.ones(1)})
    >>> fitted(nn.Linear(2, 1), update).gradients
    {'weight': tensor([[1., 1.]]), 'bias': tensor([1.])}
    """
    _refuse_what_is_neither(model, update)
    parameters = dict(model.named_parameters())
    if not (update.gradients.keys() <= parameters.keys() >= set(update.withheld)):
        update = _renamed(model, parameters, update)
    frozen = [name for name, p in parameters.items() if not p.requires_grad and name in update.gradients]
    if still := {name for name in frozen if is_zero(update.gradients[name])}:
        update = replace(update, gradients={n: g for n, g in update.gradients.items() if n not in still})
    _refuse_missing(parameters, update, unused)
    _refuse_misshapen(parameters, update, type(model).__name__)
    _refuse_not_finite(update, finite)
    if all(is_zero(g) for g in update.gradients.values()):
        raise UpdateError("all gradients are zero: this update carries nothing (did the client train at all?)")
    _refuse_weights(parameters, update, type(model).__name__)
    return update


def check_update(
    model: nn.Module, update: ClientUpdate, *, finite: Collection[str] | None = None, unused: Collection[str] = ()
) -> None:
    """Refuse an update that cannot come from ``model``: :func:`fitted` without its result.

    Parameters
    ----------
    model, update, finite, unused : as in :func:`fitted`

    Raises
    ------
    UpdateError
        As :func:`fitted`.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> from torch import nn
    >>> al.check_update(nn.Linear(2, 1), al.ClientUpdate({"weight": torch.ones(1, 2), "bias": torch.ones(3)}))
    Traceback (most recent call last):
    aprillab.update.tensors.UpdateError: bias: the update has shape (3,), Linear (1,)
    """
    fitted(model, update, finite=finite, unused=unused)


# --- Names ------------------------------------------------------------------------------------------------------


def _renamed(model: nn.Module, parameters: Mapping[str, Tensor], update: ClientUpdate) -> ClientUpdate:
    """The update under the names of the model's parameters, without buffers.

    A parameter that the model uses under two names has the first.
    """
    first = {id(p): name for name, p in parameters.items()}
    own = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    trained = [name for name, p in parameters.items() if p.requires_grad]
    telling = [name for name, g in update.gradients.items() if not is_zero(g)]
    names = matched([*update.gradients, *update.withheld], own.keys() | buffers, [*trained, *telling])
    gradients: dict[str, Tensor] = {}
    errors: dict[str, Tensor] | None = None if update.errors is None else {}
    for name, g in update.gradients.items():
        if name in names and names[name] in own:
            gradients.setdefault(own[names[name]], g)
            if update.errors is not None and errors is not None:
                errors.setdefault(own[names[name]], update.errors[name])
    if lost := sorted(name for name in telling if name not in names):
        absent = [name for name in parameters if name not in gradients]
        raise UpdateError(
            f"the update and {type(model).__name__} do not belong together: {len(gradients)} names match, of "
            f"{len(update.gradients)} in the update and {len(parameters)} in the model. Only the update has "
            f"{_listed(lost)}; only the model has {_listed(absent)}. Pass the model that the client trained, or give "
            "the tensors its names: ClientUpdate({new_name(n): g for n, g in gradients.items()})"
        )
    withheld = tuple(own.get(names.get(name, name), name) for name in update.withheld)
    return replace(update, gradients=gradients, withheld=withheld, errors=errors)


def _listed(names: list[str]) -> str:
    """The first two names, and how many there are."""
    if not names:
        return "none"
    return ", ".join(map(repr, names[:2])) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _refuse_what_is_neither(model: object, update: object) -> None:
    if not isinstance(model, nn.Module):
        raise UpdateError(
            f"model must be the torch.nn.Module that the client trained, not {_kind(model)}: build it and load the "
            "weights that were sent"
        )
    if not isinstance(update, ClientUpdate):
        raise UpdateError(
            f"update must be a ClientUpdate, not {_kind(update)}: ClientUpdate({{name: gradient, …}}), "
            "update_from_states(before, after, …) or load_update(path)"
        )


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


# --- Refusals ---------------------------------------------------------------------------------------------------


def _refuse_missing(parameters: Mapping[str, Tensor], update: ClientUpdate, unused: Collection[str]) -> None:
    absent = [name for name, p in parameters.items() if p.requires_grad and name not in update.gradients]
    if missing := sorted(set(absent) - set(update.withheld) - set(unused)):
        raise UpdateError(
            missing_words(missing, "ClientUpdate(…, withheld=(…,))"),
            missing=tuple(missing),
        )


def missing_words(missing: Sequence[str], remedy: str) -> str:
    """What is said of gradients that are missing; ``remedy`` says that the client withholds them.

    >>> missing_words(["head.bias"], "--withheld head.bias").partition(":")[0]
    "the update lacks the gradient of 'head.bias' (1 missing in all). If the client withholds it, say so"
    """
    return (
        f"the update lacks the gradient of {missing[0]!r} ({len(missing)} missing in all). If the client withholds "
        f"it, say so: {remedy}; if it is frozen, set requires_grad=False in the model"
    )


def _refuse_misshapen(parameters: Mapping[str, Tensor], update: ClientUpdate, model: str) -> None:
    for name, g in update.gradients.items():
        if g.shape != parameters[name].shape:
            raise UpdateError(
                f"{name}: the update has shape {tuple(g.shape)}, {model} {tuple(parameters[name].shape)}"
            )


def _refuse_not_finite(update: ClientUpdate, finite: Collection[str] | None) -> None:
    for name, g in update.gradients.items():
        if (finite is None or name in finite) and (bad := count_not_finite(g)):
            raise UpdateError(f"{name}: {bad} of {g.numel()} gradient entries are NaN or infinite")


def _refuse_weights(parameters: Mapping[str, Tensor], update: ClientUpdate, model: str) -> None:
    """Weights in place of gradients: a few numbers of small matrices settle it, and all tensors are
    looked at only where those are weights.
    """

    def mass(name: str) -> float:
        return _norm(parameters[name]) ** 2

    by_size = sorted(update.gradients, key=lambda name: (parameters[name].ndim < 2, parameters[name].numel(), name))
    pairs = ((_some(parameters[name]), _some(update.gradients[name])) for name in by_size)
    probes = (pair for pair in pairs if pair[0].numel() >= FEWEST and not is_zero(pair[0]))
    if not any(_alike(*pair) for pair in islice(probes, PROBES)):
        return
    alike = [name for name, g in update.gradients.items() if _alike(parameters[name], g)]
    if sum(map(mass, alike)) > SHARE * sum(map(mass, update.gradients)):
        raise UpdateError(
            f"these are weights, not gradients: {len(alike)} of {len(update.gradients)} tensors are nearly {model}'s "
            "own. Take the difference that the client made: update_from_states(before, after, learning_rate=…)"
        )


def _some(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[:SAMPLE]


def _alike(weight: Tensor, g: Tensor) -> bool:
    """Whether two tensors point the same way and are of one size; most pairs differ in size, which
    is cheap to see.
    """
    mine, shared = _norm(weight), _norm(g)
    if not 1 / RATIO < shared / max(mine, 1e-300) < RATIO:
        return False
    w, g = (t.detach().to("cpu", torch.float64).flatten() for t in (weight, g))
    return float(w @ g) > COSINE * mine * shared


def _norm(tensor: Tensor) -> float:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=wide))
