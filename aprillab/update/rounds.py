"""A round of federated learning: the model a client was sent, and what it shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .names import matched
from .record import ClientUpdate
from .tensors import UpdateError, as_tensor, count_not_finite


@dataclass(frozen=True)
class Round:
    """One round of one client, as the server has it.

    Attributes
    ----------
    state : mapping of str to Tensor
        The model's tensors as they were sent in this round, by name; what is not in it is as in the
        model that an attack is given. A module is taken for its ``state_dict()``, numpy arrays
        become tensors, and all are copied.
    update : ClientUpdate
        What the client shared in this round.

    Raises
    ------
    UpdateError
        If ``state`` is no mapping of names to tensors, or ``update`` is no ClientUpdate.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> sent = nn.Linear(2, 1)
    >>> received = ClientUpdate({"weight": torch.ones(1, 2), "bias": torch.ones(1)})
    >>> sorted(Round(sent, received).state)
    ['bias', 'weight']
    """

    state: Mapping[str, Tensor]
    update: ClientUpdate

    def __post_init__(self) -> None:
        state = self.state
        if isinstance(state, nn.Module):
            state = state.state_dict()
        if not isinstance(state, Mapping):
            raise UpdateError(
                f"the state of a round is a mapping of name to tensor, such as model.state_dict(), not a "
                f"{type(state).__name__}"
            )
        if not isinstance(self.update, ClientUpdate):
            raise UpdateError(f"the update of a round must be a ClientUpdate, not a {type(self.update).__name__}")
        # Copies: a state dict's tensors change with the model that goes on training.
        tensors = {name: as_tensor(name, value).clone() for name, value in state.items()}
        object.__setattr__(self, "state", tensors)


#: What an attack takes: one update, or several of one client.
Updates = ClientUpdate | Round | Sequence[ClientUpdate | Round]


def listed(updates: Updates) -> list[ClientUpdate | Round]:
    """One update or several, as a list.

    Any iterable will do.

    Raises
    ------
    UpdateError
        If there is none, or one of them is neither a ClientUpdate nor a Round.

    Examples
    --------
    >>> import torch
    >>> len(listed(ClientUpdate({"weight": torch.ones(2)})))
    1
    """
    if isinstance(updates, ClientUpdate | Round):
        return [updates]
    if isinstance(updates, str | bytes | Mapping) or not isinstance(updates, Iterable):
        raise UpdateError(
            "an attack takes a ClientUpdate, or a sequence of ClientUpdate or Round, not a "
            f"{type(updates).__name__}: ClientUpdate({{name: gradient, …}}), "
            "update_from_states(before, after, …) or load_update(path)"
        )
    found = list(updates)
    if not found:
        raise UpdateError("the sequence of rounds is empty")
    for number, one in enumerate(found, 1):
        if not isinstance(one, ClientUpdate | Round):
            pair = ": al.Round(state, update) puts the two together" if isinstance(one, Mapping | tuple) else ""
            raise UpdateError(f"round {number} must be a ClientUpdate or a Round, not a {type(one).__name__}{pair}")
    return found


def only_one(attack: str, updates: Updates) -> ClientUpdate:
    """The update of an attack that reads one.

    Raises
    ------
    UpdateError
        If there are several, or a state comes with it.

    Examples
    --------
    >>> import torch
    >>> update = ClientUpdate({"weight": torch.ones(2)})
    >>> only_one("my_attack", [update]).gradients["weight"]
    tensor([1., 1.])
    """
    found = listed(updates)
    if len(found) > 1:
        raise UpdateError(
            f"{attack} reads one update, and {len(found)} rounds were given. The closed forms and al.invert(model, "
            "rounds) read several"
        )
    if isinstance(found[0], Round):
        raise UpdateError(f"{attack} reads one update: load the round's state into the model, and pass its update")
    return found[0]


def state_of_round(number: int, round: Round, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The round's tensors under the model's names; ``known`` has the model's own.

    Raises
    ------
    UpdateError
        If a name is not the model's, a shape differs, or a number is not finite: with the round.

    Examples
    --------
    >>> import torch
    >>> update = ClientUpdate({"weight": torch.ones(2)})
    >>> sent = Round({"module.weight": torch.tensor([3.0, 4.0])}, update)
    >>> state_of_round(1, sent, {"weight": torch.zeros(2)})
    {'weight': tensor([3., 4.])}
    """
    names = matched(round.state, known)
    lost = [name for name in round.state if name not in names]
    if lost:
        raise UpdateError(
            f"round {number}: its state has {lost[0]!r} ({len(lost)} such in all), which the model does not have: "
            "rounds of one model are needed"
        )
    found = {names[name]: tensor for name, tensor in round.state.items()}
    for name, tensor in found.items():
        if tensor.shape != known[name].shape:
            raise UpdateError(
                f"round {number}: {name} has shape {tuple(tensor.shape)} in its state, and in the model "
                f"{tuple(known[name].shape)}: rounds of one model are needed"
            )
        if tensor.is_floating_point() and (bad := count_not_finite(tensor)):
            raise UpdateError(f"round {number}: {bad} of {tensor.numel()} numbers of {name} are NaN or infinite")
    return found
