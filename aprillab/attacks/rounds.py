"""Several rounds of one client, read one by one: what was shared, and with which weights.

The picture stays while the weights move, so that each round adds equations for the same unknowns.
Chapter 10 counts them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, tensors_of
from ..update import ClientUpdate, Round, UpdateError, Updates, listed, state_of_round
from .evidence import limit_of
from .reading import Reading, read_update
from .result import AttackNotApplicable, Condition, Reconstruction, Replay

#: The condition that rounds are of one picture.
ONE_PICTURE = "one picture in all rounds"
#: The condition that all of a client's steps read the weights that it was sent.
SENT_WEIGHTS = "steps at the weights that were sent"
_MARKED, _SAME = 64, 3e-8  # entries of each tensor that tell an update from another; by so much
_WORST = 12  # rounds, of which one is left out in search of those that agree
_MOVED = 4.0  # times the format's ε, of a tensor's norm: a copy in another precision moves by less


@dataclass(frozen=True, eq=False)
class RoundRead:
    """One round as the attacks read it.

    Attributes
    ----------
    number : int
        From 1.
    reading : Reading
        The update and its noise.
    weights : mapping of str to Tensor
        All tensors of the model in this round.
    unknown : frozenset of str
        Trained tensors whose values in this round were not given: those in ``weights`` are the
        model's, of some other round perhaps.
    moved : mapping of str to Tensor
        Those of ``weights`` that are not the model's.
    repeated : tuple of int
        Other rounds with the same update, up to a factor: they say nothing more.
    """

    number: int
    reading: Reading
    weights: Mapping[str, Tensor]
    unknown: frozenset[str] = frozenset()
    moved: Mapping[str, Tensor] = field(default_factory=dict)
    repeated: tuple[int, ...] = ()

    def rounding(self, names: Collection[str]) -> float:
        """What the weights' own rounding leaves in the gradients called ``names``, relative to
        their size, where the update is a difference of weights; 0 where it is none.
        """
        update = self.reading.update
        if update.source != "fedavg" or not update.learning_rate:
            return 0.0
        error, size = 0.0, 0.0
        for name in names:
            weight = self.weights[name]
            # Half a unit of the last place at most: a fifth of ε on the whole, at each step.
            error += (torch.finfo(weight.dtype).eps / 5 * float(weight.double().norm())) ** 2
            size += float(update.gradients[name].double().square().sum())
        steps = update.local_steps
        return (steps * error / size) ** 0.5 / (update.learning_rate * steps) if size else 0.0

    def model(self, model: nn.Module) -> nn.Module:
        """The model as it was in this round: itself, or a copy."""
        if not self.moved:
            return model
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for name, tensor in tensors_of(copied).items():
                if name in self.moved:
                    tensor.copy_(self.moved[name])
        return copied


def read_rounds(
    model: nn.Module, updates: Updates, anatomy: Anatomy, *, finite: Collection[str] | None = None
) -> tuple[RoundRead, ...]:
    """Check one update or several, and say what they are.

    Parameters
    ----------
    model : nn.Module
    updates : ClientUpdate, Round, or a sequence of these
        Of one client. A lone ClientUpdate is of the model as it stands; in a sequence, only frozen
        tensors are known to be the model's.
    anatomy : Anatomy
    finite : names of tensors that must be finite; default is those that the attacks read

    Raises
    ------
    UpdateError, AttackNotApplicable
        As :func:`~aprillab.attacks.reading.read_update`, and where a state does not belong to the
        model or a frozen tensor moved; of several, with the round's number.
    """
    rounds = listed(updates)
    if len(rounds) == 1:
        return (_read_one(model, rounds[0], anatomy, finite, None),)
    telling = _telling([one.update if isinstance(one, Round) else one for one in rounds])
    said = [*telling, *(again for repeated in telling.values() for again in repeated)]
    read = [_read_one(model, rounds[number - 1], anatomy, finite, number) for number in sorted(said)]
    return tuple(replace(one, repeated=telling[one.number]) for one in read if one.number in telling)


def _telling(updates: Sequence[ClientUpdate]) -> dict[int, tuple[int, ...]]:
    """Numbers of the rounds that say something, each with the numbers of those that repeat it.

    A round in which the client did nothing has nothing but zeros.
    """
    marks: dict[int, Tensor] = {}
    found: dict[int, tuple[int, ...]] = {}
    for number, update in enumerate(updates, 1):
        if not any(g.any() for g in update.gradients.values()):
            continue
        mark = _mark(update)
        like = next((k for k, other in marks.items() if _is_multiple(mark, other)), None)
        if like is None:
            marks[number], found[number] = mark, ()
        else:
            found[like] = (*found[like], number)
    return found or dict.fromkeys(range(1, len(updates) + 1), ())  # the first is refused with its reason


def _mark(update: ClientUpdate) -> Tensor:
    """Some entries of each tensor, as one vector of length 1."""
    parts = [update.gradients[name].flatten()[:_MARKED].double().cpu() for name in sorted(update.gradients)]
    mark = torch.cat(parts).nan_to_num()
    return mark / mark.norm().clamp_min(torch.finfo(mark.dtype).tiny)


def _is_multiple(mark: Tensor, other: Tensor) -> bool:
    """Whether two marks are the same but for a sign: a factor leaves rounding, another round much
    more.
    """
    if len(mark) != len(other):
        return False
    return float(torch.minimum((mark - other).abs().max(), (mark + other).abs().max())) < _SAME


def _read_one(
    model: nn.Module, one: ClientUpdate | Round, anatomy: Anatomy, finite: Collection[str] | None, number: int | None
) -> RoundRead:
    """One of several rounds, which has a number, or a lone one."""
    own = tensors_of(model)
    unknown = _trained(model) if number and isinstance(one, ClientUpdate) else frozenset[str]()
    update = one.update if isinstance(one, Round) else one
    moved = dict[str, Tensor]()
    if isinstance(one, Round):
        changed = {n: t for n, t in state_of_round(number or 1, one, own).items() if not _same(t, own[n])}
        free = _trained(model) | _buffers_not_read(model, anatomy)
        _refuse_moved(number or 1, changed, own, free)
        moved = {name: tensor.to(own[name]) for name, tensor in changed.items() if name in free}
    weights = {**own, **moved}
    try:
        reading = read_update(model, update, anatomy, finite=finite, weights=None if unknown else weights)
    except UpdateError as error:
        raise error if number is None else UpdateError(f"round {number}: {error}") from error
    except AttackNotApplicable as refusal:
        if number is None:
            raise
        raise AttackNotApplicable(refusal.attack, f"round {number}: {refusal.reason}", **refusal.numbers) from refusal
    return RoundRead(number or 1, reading, weights, unknown, moved)


def _trained(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def _same(tensor: Tensor, own: Tensor) -> bool:
    return tensor.dtype == own.dtype and torch.equal(tensor.to(own.device), own)


def _buffers_not_read(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """Buffers that may change as they like: running means, counters."""
    return {name for name, _ in model.named_buffers()} - anatomy.tensor_names()


def _refuse_moved(number: int, moved: Mapping[str, Tensor], own: Mapping[str, Tensor], free: Collection[str]) -> None:
    """A tensor that no client trains must be the model's in every round."""
    for name, tensor in moved.items():
        if name in free or not tensor.is_floating_point():
            continue
        off = float((tensor.to(own[name].device).double() - own[name].double()).norm())
        size, eps = float(own[name].double().norm()), max(torch.finfo(t.dtype).eps for t in (tensor, own[name]))
        if off > _MOVED * eps * max(size, 1e-300):
            raise UpdateError(
                f"round {number}: {name} is frozen in the model, but in this round's state it differs by "
                f"{off / max(size, 1e-300):.1e} of its size. If the client trains it, unfreeze it in the model "
                "(requires_grad_(True)); else these are not the weights that were sent"
            )


def known(round: RoundRead, names: Collection[str | None], attack: str) -> Mapping[str, Tensor]:
    """The round's weights, where those called ``names`` were given.

    Raises
    ------
    AttackNotApplicable
        If the attack must know a trained tensor's values, and nobody gave them.
    """
    if missing := sorted(name for name in names if name in round.unknown):
        raise AttackNotApplicable(
            attack,
            f"round {round.number}: the values of {missing[0]} ({len(missing)} such in all) in it are needed. "
            "It is trained, so that they change: give al.Round(state, update) with the state that was sent",
        )
    return round.weights


# --- One picture in all of them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """What the system of some rounds leaves unexplained.

    Attributes
    ----------
    residuals : tuple of float
        Of each round, relative to what was to be explained in it.
    gains : tuple of float
        By how much each round's relative noise is larger in its residual.
    spare : int
        Equations of all rounds together beyond the unknowns.
    """

    residuals: tuple[float, ...]
    gains: tuple[float, ...]
    spare: int

    def ratios(self, rounds: Sequence[RoundRead]) -> list[float]:
        """Each round's residual over what noise explains of it."""
        each = zip(self.residuals, self.gains, rounds, strict=True)
        return [residual / limit_of(r.reading.noise * gain) for residual, gain, r in each]

    def excess(self, rounds: Sequence[RoundRead]) -> float:
        """The largest of these; not above 1 where all are explained."""
        return max(self.ratios(rounds))


@dataclass(frozen=True)
class Agreement:
    """Which rounds show one picture.

    Attributes
    ----------
    kept : tuple of RoundRead
    condition : Condition or None
        None of a lone update.
    notes : tuple of dict
        For ``diagnostics["rounds"]``: number, used, noise, precision.
    """

    kept: tuple[RoundRead, ...]
    condition: Condition | None
    notes: tuple[dict[str, float | str | bool], ...]

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The condition, if there is one."""
        return () if self.condition is None else (self.condition,)

    @property
    def numbers(self) -> dict[str, Any]:
        """For ``diagnostics``: nothing of a lone update."""
        return {} if len(self.notes) == 1 else {"rounds": self.notes}


def agreeing(attack: str, rounds: Sequence[RoundRead], left_by: Callable[[Sequence[RoundRead]], Left]) -> Agreement:
    """The rounds that one picture explains; those of another are left out, one after another.

    Where several pictures have rounds, the largest group is not sure to be found, but what is kept
    agrees. Several pictures in each round, a batch, agree with nothing: then all rounds are kept,
    and the condition is contradicted.

    Parameters
    ----------
    attack : str
        Who asks; for the refusal.
    rounds : sequence of RoundRead
    left_by : callable
        What the system of some of them leaves.

    Raises
    ------
    AttackNotApplicable
        If each round shows one picture and no two the same.
    """
    if len(rounds) == 1:
        return Agreement(tuple(rounds), None, _notes(rounds, rounds))
    kept, left = list(rounds), left_by(rounds)
    first = left
    while left.spare > 0 and left.excess(kept) > 1 and len(kept) > 1:
        fewer = without_one(kept, left)
        tried = [left_by(some) for some in fewer]
        best = min(range(len(fewer)), key=lambda i: tried[i].excess(fewer[i]))
        kept, left = fewer[best], tried[best]
    if len(kept) > 1 and left.spare > 0:
        return Agreement(tuple(kept), _shown(rounds, kept, left), _notes(rounds, kept))
    if first.spare <= 0:
        return not_checked(rounds, f"{len(rounds)} rounds leave no equation to spare")
    if all((alone := left_by([r])).spare > 0 and alone.excess([r]) <= 1 for r in rounds):
        raise AttackNotApplicable(
            attack,
            f"the {len(rounds)} rounds are not of one picture: each is of one by itself, and together they leave "
            f"{max(first.residuals):.1e}. Attack them one by one",
            residual=max(first.residuals),
        )
    words = f"no picture explains two of these {len(rounds)} rounds: all together leave {max(first.residuals):.1e}"
    return Agreement(tuple(rounds), Condition(ONE_PICTURE, "contradicted", {}, words), _notes(rounds, rounds))


def not_checked(rounds: Sequence[RoundRead], words: str) -> Agreement:
    """All rounds, where nothing tells whether they are of one picture."""
    unknown = Condition(ONE_PICTURE, "not checked", {}, words, measured=False)
    return Agreement(tuple(rounds), unknown, _notes(rounds, rounds))


def without_one(rounds: Sequence[RoundRead], left: Left) -> list[list[RoundRead]]:
    """The rounds without one of them: each of the worst in turn, for all would take long
    where they are many.
    """
    ratios = left.ratios(rounds)
    worst = sorted(range(len(rounds)), key=ratios.__getitem__, reverse=True)[:_WORST]
    return [[*rounds[:i], *rounds[i + 1 :]] for i in sorted(worst)]


def _shown(rounds: Sequence[RoundRead], kept: Sequence[RoundRead], left: Left) -> Condition:
    """That the rounds which were kept are of one picture, and what became of the others."""
    residual, number = max(zip(left.residuals, (r.number for r in kept), strict=True))
    words = f"{len(kept)} rounds leave {{residual:.1e}} at most, with {{spare:.0f}} equations to spare"
    if others := [str(r.number) for r in rounds if r not in kept]:
        words += f"; left out for another picture: round{'s' if len(others) > 1 else ''} {', '.join(others)}"
        if any(r.reading.update.local_steps > 1 for r in rounds):
            words += " (or for local steps in which the weights moved too far)"
    if again := [str(number) for r in kept for number in r.repeated]:
        words += (
            f"; counted once, for {'they repeat' if len(again) > 1 else 'it repeats'} another: {', '.join(again)}"
        )
    precisions = sorted({_precision(r) for r in kept})
    if len(precisions) > 1:
        words += f"; they came in different precisions ({', '.join(precisions)}) and count by their noise"
    numbers = {"residual": residual, "spare": float(left.spare), "worst": float(number)}
    return Condition(ONE_PICTURE, "shown", numbers, words)


def _precision(round: RoundRead) -> str:
    return str(round.reading.update.dtype).removeprefix("torch.")


def _notes(rounds: Sequence[RoundRead], kept: Sequence[RoundRead]) -> tuple[dict[str, float | str | bool], ...]:
    return tuple(
        {"number": r.number, "used": r in kept, "noise": r.reading.noise, "precision": _precision(r)} for r in rounds
    )


def shown_by_replay(found: Reconstruction, replays: Iterable[Replay]) -> Reconstruction:
    """What no system could check, replays of all rounds have: this picture gives every update."""
    if any(replay.state != "shown" for replay in replays):
        return found
    words = "played back, the picture gives every update"
    conditions = [
        replace(c, state="shown", words=words)
        if c.state == "not checked" and c.name in (ONE_PICTURE, SENT_WEIGHTS)
        else c
        for c in found.conditions
    ]
    return replace(found, conditions=tuple(conditions))
