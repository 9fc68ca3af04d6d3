"""Clients of the study: a picture that stays, other clients averaged in, rounds as a
server keeps them.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

import aprillab as al

LABEL = 3
OTHERS = 4  # clients besides the victim's, each with another photograph


def pixels_of(victim: str, anatomy: al.Anatomy, dtype: torch.dtype = torch.float32) -> Tensor:
    """The victim's private pixels, (1, C, H, W)."""
    return al.load_victim(victim, anatomy.image_size[0], dtype=dtype)[None]


def update_of(model: nn.Module, anatomy: al.Anatomy, pixels: Tensor, label: int = LABEL) -> al.ClientUpdate:
    """One gradient of one picture."""
    return al.client_update(model, anatomy.preprocessing.to_input(pixels), torch.tensor([label]))


def played(
    model: nn.Module,
    anatomy: al.Anatomy,
    victim: str,
    rounds: int,
    *,
    rate: float,
    sigma: float | None = None,
    kept: Collection[str] | None = None,
    states: bool = True,
) -> Iterator[al.Round]:
    """The rounds of a client with one picture; ``model`` is trained in between, on the
    mean of all updates.

    Parameters
    ----------
    model : nn.Module
        Is changed.
    anatomy : al.Anatomy
    victim : str
    rounds : int
    rate : float
        Of the server's step.
    sigma : float, optional
        Every client clips to norm 1 and adds noise N(0, σ²), its own in each round.
    kept : names of tensors, optional
        Only these stay in a round, update and state, to save memory: the attack reads no others.
    states : bool
        False leaves the states empty, where nothing that the attack reads is trained.
    """
    dtype = next(model.parameters()).dtype
    others = [name for name in al.victims() if name != victim][:OTHERS]
    everyone = [pixels_of(name, anatomy, dtype) for name in (victim, *others)]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for number in range(rounds):
        updates = [update_of(model, anatomy, pixels, LABEL + k) for k, pixels in enumerate(everyone)]
        if sigma is not None:
            seeds = (len(everyone) * number + k for k in range(len(everyone)))
            updates = [
                al.defenses.gaussian_noise(al.defenses.clip(one, 1.0), sigma, seed=seed)
                for one, seed in zip(updates, seeds, strict=True)
            ]
        state = {name: p.detach() for name, p in trained.items() if kept is None or name in kept}
        yield al.Round(state if states else {}, only(updates[0], kept))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter -= rate * torch.stack([one.gradients[name] for one in updates]).mean(0)


def play(
    model: nn.Module, images: Tensor, labels: Tensor, rounds: int, others: tuple[Tensor, Tensor], *, rate: float = 0.1
) -> list[al.Round]:
    """So many rounds of one client; between them the server steps by the mean gradient of all
    clients.

    As :func:`played`, and cheaper: the other clients, whose images and labels are ``others``, one
    each, share one gradient with it. The model stays as it is.
    """
    model, found = copy.deepcopy(model), []
    for _ in range(rounds):
        sent = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}  # the rest stays
        found.append(al.Round(sent, al.client_update(model, images, labels)))
        if len(found) < rounds:
            together = al.client_update(model, torch.cat([images, others[0]]), torch.cat([labels, others[1]]))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in together.gradients:
                        parameter -= rate * together.gradients[name]
    return found


def only(update: al.ClientUpdate, kept: Collection[str] | None) -> al.ClientUpdate:
    """The update with these tensors, and the others said to be withheld."""
    if kept is None:
        return update
    gradients = {name: g for name, g in update.gradients.items() if name in kept}
    return replace(update, gradients=gradients, withheld=tuple(sorted(update.gradients.keys() - gradients.keys())))
