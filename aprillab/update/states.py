"""The update behind a FedAvg round: the difference of two states, and what is known of the steps
between them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .first_step import DEFAULTS, first_step, refuse_longer
from .names import matched
from .record import ClientUpdate, as_set
from .tensors import UpdateError, as_gradient, as_tensor, count_not_finite, is_zero

State = Mapping[str, Any] | Sequence[Any]

_STATISTICS = (".running_mean", ".running_var")  # BatchNorm's: they move, and no optimizer moves them


def update_from_states(
    before: State,
    after: State,
    *,
    learning_rate: float,
    local_steps: int = 1,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: float | None = None,
    optimizer: str | None = None,
    betas: Sequence[float] | None = None,
    eps: float | None = None,
    trained: Collection[str] | nn.Module | None = None,
    names: Collection[str] | Mapping[str, Any] | None = None,
    batch_size: int | None = None,
) -> ClientUpdate:
    """The update behind a FedAvg round: (before − after) / (learning_rate · local_steps).

    After one step of plain SGD this is the client's gradient. After several steps on *one* image,
    with or without momentum, it is a sum Σ_t c_t g_t of the gradients on the way, with the same
    numbers c_t for every tensor, (9.2). The patch-embedding system holds for each g_t with the same
    picture, so it holds for the sum and stays exact; systems that also read the model's weights see
    them change from step to step. What is read off the head (one image or several, the label) is
    about a sum of outer products and is no longer exact. With several images the update is a
    mixture.

    **Adam and its kin** divide each entry by its own size: what comes back is linear in no
    gradient. But their *first* step is one-to-one, entry by entry, and with ``optimizer`` it is
    undone (:mod:`aprillab.update.first_step`): the result is the gradient, with the ``errors``
    that the weights' rounding leaves in each entry, for which the patch-embedding system weighs
    it. A client that starts each round with a new optimizer, as is usual, takes a first step in
    each. Of several local steps the mean is undone as if it were the first, which it is as far
    as the gradient stays: ``errors`` only guess at that, and no result is called exact. Above ε
    the steps forget it.

    **Weight decay** of SGD leaves (before − after) = a·before + a sum of gradients as above, (9.4),
    where a follows from the learning rate, the decay, the momentum and the number of steps. Where
    ``weight_decay`` is given, a·before is taken off, for all tensors alike; with ``momentum=None``
    a is that of plain SGD.

    **Rounding**, (9.5). The states hold the weights to a relative 2⁻²⁴ in float32, the update only
    to that times ‖weights‖ / ‖before − after‖: the result's ``rounding`` is what to expect. A
    picture comes back to that relative precision times the condition number of the system it is
    solved from, whatever the update's dtype: a larger learning rate helps, and more local steps
    help while their gradients add up.

    Parameters
    ----------
    before, after : state dicts, the model sent out and the model that came back
        Of tensors or numpy arrays; or lists of these in the order of ``model.state_dict()``, as
        Flower sends them. Wrappers' prefixes (``module.``, ``_orig_mod.``) may differ.
    learning_rate : float, the client's
    local_steps : int
    momentum, nesterov, weight_decay : of the client's optimizer, as ``torch.optim`` has them
        None is not known, and taken for none; what is given is kept in the update. AdamW's
        decay must be given.
    optimizer : {"sgd", "adam", "adamw", "adagrad", "rmsprop"}, optional; default is SGD
        As ``torch.optim`` has them, with amsgrad or without, and RMSprop neither centered nor with
        momentum.
    betas, eps : of an optimizer other than SGD; default is torch's
        β₁ and β₂ cancel in the first step and are kept for the record; but of RMSprop, the second
        is its α. A wrong ε leaves a factor common to all entries.
    trained : names of the trained parameters, or the model, whose parameters with ``requires_grad``
        they are By default every floating-point tensor is kept but BatchNorm's running statistics,
        also those that did not move; :func:`fitted` drops other buffers and frozen parameters once
        the model is there.
    names : sequence of str or mapping, for lists
        Such as ``model.state_dict()``; not needed where the other state is a mapping.
    batch_size : int, optional

    Returns
    -------
    ClientUpdate
        In the states' dtype, and at least float32.

    Raises
    ------
    UpdateError
        If a list has no names or not as many; if the two states have different tensors or shapes, a
        trained tensor is not finite, nothing changed, a trained name is not in them, or a number is
        out of range; if entries moved by more than a first step of the optimizer moves any.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> before, after = {"weight": torch.tensor([1.0])}, {"weight": torch.tensor([0.75])}
    >>> al.update_from_states(before, after, learning_rate=0.5).gradients["weight"]
    tensor([0.5000])
    >>> al.update_from_states(before, after, learning_rate=0.5, weight_decay=0.1).gradients["weight"]
    tensor([0.4000])
    >>> moved = {"weight": torch.tensor([0.75])}  # by half a learning rate: |g| = ε
    >>> al.update_from_states(before, moved, learning_rate=0.5, optimizer="adam", eps=1e-6).gradients["weight"]
    tensor([1.0000e-06])
    """
    if learning_rate is None:
        raise UpdateError("'learning_rate' must be positive and finite, not None")
    facts: dict[str, Any] = {
        "learning_rate": learning_rate, "local_steps": local_steps, "momentum": momentum, "nesterov": nesterov,
        "weight_decay": weight_decay, "batch_size": batch_size, "source": "fedavg", "optimizer": optimizer,
    }  # fmt: skip
    usual = DEFAULTS.get(optimizer or "", (None, None))
    facts |= {"betas": usual[0] if betas is None else betas, "eps": usual[1] if eps is None else eps}
    said = ClientUpdate({}, **facts)  # checks them
    pairs = _trained(_pairs(before, after, names), trained)
    if optimizer not in (None, "sgd"):
        return _first_step_undone(pairs, said)
    scale = float(learning_rate) * said.local_steps
    # a of (9.4), as the optimizer has it; the sum of gradients is what is left, per step
    # and rate, (9.1).
    lost = 1 - shrinkage(learning_rate, weight_decay or 0.0, said.local_steps, momentum or 0.0, nesterov=nesterov)
    error, gradients, still = 0.0, {}, True
    for name, (old, new) in pairs.items():
        moved = _wide(old) - _wide(new)
        if is_zero(moved):  # a buffer, or frozen: no decay moved it either
            gradients[name] = moved
            continue
        still, error = False, error + said.local_steps * _rounding(old, new) ** 2
        gradients[name] = (moved - lost * _wide(old) if lost else moved) / scale
    if still:
        raise UpdateError("the two states are the same: nothing was shared")
    size = math.hypot(*(float(torch.linalg.vector_norm(g)) for g in gradients.values()))
    if not math.isfinite(size):
        raise UpdateError(f"the change of the weights over learning_rate={learning_rate} is not finite: check both")
    return ClientUpdate(gradients, rounding=math.sqrt(error) / scale / size if size else None, **facts)


def _first_step_undone(pairs: Mapping[str, tuple[Tensor, Tensor]], said: ClientUpdate) -> ClientUpdate:
    """The gradients behind a step of Adam's kin, each with its errors."""
    step, gradients, errors = first_step(said), {}, {}
    if all(torch.equal(old, new.to(old)) for old, new in pairs.values()):
        raise UpdateError("the two states are the same: nothing was shared")
    for name, (old, new) in pairs.items():
        gradients[name], errors[name] = (t.to(_wide(old).dtype) for t in step.undone(old, new))
        if is_zero(_wide(old) - _wide(new)):  # a buffer, or frozen: no decay moved it either
            gradients[name] = torch.zeros_like(gradients[name])
        else:
            refuse_longer(name, *step.moved(old, new), step)
    return replace(said, gradients=gradients, errors=errors)


def shrinkage(
    learning_rate: float, weight_decay: float, steps: int, momentum: float = 0.0, *, nesterov: bool = False
) -> float:
    """What is left of each weight after ``steps`` of ``torch.optim.SGD`` whose gradients are zero.

    Raises
    ------
    UpdateError
        If so large a decay makes the weights grow without end.

    Examples
    --------
    >>> round(shrinkage(0.1, 0.01, 2), 9)
    0.998001
    >>> round(shrinkage(0.1, 0.01, 2, 0.9), 9)
    0.997101
    """
    # One step of the weight w and the momentum buffer b: b ← λ w + m b, then w ← w − η d with
    # d = b, or λ w + m b of the new b with Nesterov. Each is a row of numbers that multiply (w, b).
    b = np.array([weight_decay, momentum])
    d = np.array([weight_decay, 0.0]) + momentum * b if nesterov else b
    step = np.stack([np.array([1.0, 0.0]) - learning_rate * d, b])
    with np.errstate(over="ignore", invalid="ignore"):
        left = float(np.linalg.matrix_power(step, steps)[0, 0])
    if not math.isfinite(left):
        raise UpdateError(
            f"with learning_rate={learning_rate}, weight_decay={weight_decay} and {steps} steps the weights grow "
            "without end: check the three"
        )
    return left


def _rounding(old: Tensor, new: Tensor) -> float:
    """The expected norm of one rounding of the weights: errors lie evenly within half a unit of the
    last place, and that unit is between ε/2 and ε of the weight, which makes ε/5 on the whole.
    """
    eps = max(torch.finfo(old.dtype).eps, torch.finfo(new.dtype).eps)
    return eps / 5 * float(torch.linalg.vector_norm(_wide(new)))


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# --- The two states, name by name -------------------------------------------------------------------------------


def _trained(
    pairs: Mapping[str, tuple[Tensor, Tensor]], trained: Collection[str] | nn.Module | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs of floats that are wanted, checked for NaN and infinities."""
    if isinstance(trained, nn.Module):
        wanted = [name for name, p in trained.named_parameters() if p.requires_grad]
        known = matched(wanted, pairs)
        if missing := sorted(set(wanted) - set(known)):
            raise UpdateError(
                f"trained: {missing[0]!r} of {type(trained).__name__} is not in the states "
                f"({len(missing)} missing in all): pass the model that the states belong to"
            )
        chosen = {name: pairs[known[name]] for name in wanted}
    else:
        asked = {n for n in pairs if not n.endswith(_STATISTICS)} if trained is None else as_set(trained)
        if missing := sorted(asked - set(pairs)):
            raise UpdateError(f"trained: {', '.join(missing)} is not in the states")
        chosen = {name: pair for name, pair in pairs.items() if name in asked}
    chosen = {name: pair for name, pair in chosen.items() if pair[0].is_floating_point()}
    for name, pair in chosen.items():
        for when, tensor in zip(("before", "after"), pair, strict=True):
            if bad := count_not_finite(as_gradient(name, tensor)):
                raise UpdateError(f"{name}: {bad} of {tensor.numel()} entries {when} are NaN or infinite")
    return chosen


def _pairs(before: State, after: State, names: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Each tensor before and after, by its name before, on the device of the first."""
    source = names.state_dict() if isinstance(names, nn.Module) else names
    if source is None:
        source = next((state for state in (before, after) if isinstance(state, Mapping)), None)
    listed = list(source) if isinstance(source, Iterable) and not isinstance(source, str) else []
    first, second = _named("before", before, listed), _named("after", after, listed)
    same = matched(second, first)
    if len(first) != len(second) or len(same) != len(first):
        only = sorted(set(first) - set(same.values())) + sorted(set(second) - set(same))
        raise UpdateError(
            f"the two states differ in {', '.join(only[:5])}{', …' if len(only) > 5 else ''}: pass two of one "
            "model; what the client kept to itself, leave out of both"
        )
    later = {same[name]: value for name, value in second.items()}
    pairs = {name: (as_tensor(name, value), as_tensor(name, later[name])) for name, value in first.items()}
    pairs = {name: pair for name, pair in pairs.items() if not _averaged_integers(name, *pair)}
    for name, (old, new) in pairs.items():
        if old.shape != new.shape:
            raise UpdateError(f"{name}: shape {tuple(old.shape)} before, {tuple(new.shape)} after")
        if old.is_floating_point() != new.is_floating_point():
            raise UpdateError(f"{name}: {old.dtype} before, {new.dtype} after")
    return {name: (old, new.to(old.device)) for name, (old, new) in pairs.items()}


def _averaged_integers(name: str, old: Tensor, new: Tensor) -> bool:
    """Whether this is a buffer of integers: FedAvg sends their mean, a float, and clients
    make integers of it.
    """
    if not old.is_floating_point() or new.is_floating_point() or new.is_complex() or old.shape != new.shape:
        return False
    return name.endswith(".num_batches_tracked") or torch.allclose(old.double().cpu(), new.double().cpu(), atol=1e-6)


def _named(which: str, state: Any, names: list[Any]) -> Mapping[str, Any]:
    """The state by name; a list takes its names from ``names``."""
    remedy = "pass model.state_dict(), or a list of its values with names=model.state_dict()"
    if isinstance(state, Mapping):
        if strange := [name for name in state if not isinstance(name, str)]:
            raise UpdateError(f"{which}: {strange[0]!r} is no tensor's name: {remedy}")
        return state
    if not isinstance(state, list | tuple):
        raise UpdateError(f"{which} is a {type(state).__name__}: {remedy}")
    if not names or not all(isinstance(name, str) for name in names):
        raise UpdateError(f"{which} is a {type(state).__name__}, which has no names: {remedy}")
    if len(names) != len(state) or len(set(names)) != len(names):
        raise UpdateError(
            f"{which} has {len(state)} tensors, and there are {len(set(names))} different names for them: a list of "
            "parameters alone goes with names=[name for name, _ in model.named_parameters()]"
        )
    return dict(zip(names, state, strict=True))
