"""The client, played by the server: gradients of other pictures, with its loss or without, in one
step or several.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..update import ClientUpdate, UpdateError, client_update, logits_of, update_from_states
from .replay import Loss, as_shared

# Beside the first: all agree once in 78 where twelve blocks are dropped with up to
# 0.1, as timm does.
_PASSES = 6


def name_within(name: str | None, anatomy: Anatomy) -> str:
    """A tensor's name within the module that gives the logits; empty where there is none.

    >>> name_within("1.head.bias", Anatomy("mine", (8, 8), "1.stem.weight", root="1"))
    'head.bias'
    """
    return (name or "").removeprefix(f"{anatomy.root}." if anatomy.root else "")


def inner_client(model: nn.Module, update: ClientUpdate, anatomy: Anatomy) -> tuple[nn.Module, ClientUpdate]:
    """The ViT that reads model input, within whatever holds it, and the update under its names."""
    prefix = f"{anatomy.root}." if anatomy.root else ""
    head = anatomy.head_weight or anatomy.head_bias
    if not prefix or (head is not None and not head.startswith(prefix)):
        return as_shared(model, update), update
    inner = {name.removeprefix(prefix): g for name, g in update.gradients.items() if name.startswith(prefix)}
    errors = update.errors and {n.removeprefix(prefix): e for n, e in update.errors.items() if n.startswith(prefix)}
    update = replace(update, gradients=inner, errors=errors, withheld=())
    return as_shared(model.get_submodule(anatomy.root), update), update


def draws(client: nn.Module, images: Tensor) -> bool:
    """Whether two forward passes differ."""
    if not any(module.training for module in client.modules()):
        return False
    with torch.no_grad():
        first = logits_of(client, images)
        # Stochastic depth drops few blocks: two passes can agree by chance.
        return any(not torch.equal(first, logits_of(client, images)) for _ in range(_PASSES))


Player = Callable[[Tensor], Mapping[str, Tensor]]


def ways_to_play(
    client: nn.Module, update: ClientUpdate, anatomy: Anatomy, labels: Tensor | None, loss: Loss | None
) -> dict[str, Player]:
    """Ways to make gradients of images, as the client would: by its loss, and by what any loss
    was at the logits, or where an activation follows the head, before it. In words, and in the
    order to be tried.
    """
    found: dict[str, Player] = {}
    if labels is not None:
        known, criterion = labels, loss or nn.functional.cross_entropy
        how = (
            "by the loss" if loss else f"by cross-entropy with label {', '.join(map(str, known.flatten().tolist()))}"
        )
        found[how] = lambda images: client_update(client, images, known.to(images.device), loss=criterion).gradients
    r = _at_the_logits(update, anatomy)
    if r is not None:
        at_logits = "with the head's own gradient at the logits, of another loss"
        found[at_logits] = lambda images: _vector_jacobian(client, images, r)
        if (head := _head_module(client, anatomy)) is not None:
            at_head = "with the head's own gradient where it leaves the head, of another loss"
            found[at_head] = lambda images: _vector_jacobian(client, images, r, head=head)
    return found


def _head_module(client: nn.Module, anatomy: Anatomy) -> nn.Module | None:
    """The linear layer that the head's gradients are of: an activation may follow it."""
    name = name_within(anatomy.head_bias or anatomy.head_weight, anatomy).rpartition(".")[0]
    return dict(client.named_modules()).get(name) if name else None


def _at_the_logits(update: ClientUpdate, anatomy: Anatomy) -> Tensor | None:
    """r up to a factor, from the head's bias gradient, or from its weight gradient r fᵀ."""
    bias, weight = (
        update.gradients.get(name_within(name, anatomy)) for name in (anatomy.head_bias, anatomy.head_weight)
    )
    if bias is not None and bias.any():
        return bias
    if weight is None or not weight.any():
        return None
    return weight @ weight[weight.double().norm(dim=1).argmax()]


def _vector_jacobian(
    client: nn.Module, images: Tensor, r: Tensor, *, head: nn.Module | None = None
) -> dict[str, Tensor]:
    """The gradient of ⟨r, logits⟩, or of ⟨r, what the module ``head`` gives⟩."""
    trained = {name: p for name, p in client.named_parameters() if p.requires_grad}
    given: list[Tensor] = []
    handle = None if head is None else head.register_forward_hook(lambda _module, _given, out: given.append(out))
    try:
        with torch.enable_grad():
            logits = logits_of(client, images)
            out = given[-1] if given else logits
            found = torch.autograd.grad((out * r.to(out)).sum(), list(trained.values()), allow_unused=True)
    finally:
        if handle is not None:
            handle.remove()
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(trained.items(), found, strict=True)
    }


def after_local_steps(
    client: nn.Module, update: ClientUpdate, images: Tensor, labels: Tensor, loss: Loss
) -> dict[str, Tensor]:
    """What a client would share after its local steps of SGD."""
    trained = copy.deepcopy(client)
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    protocol: dict[str, Any] = {
        "learning_rate": update.learning_rate, "local_steps": update.local_steps, "momentum": update.momentum,
        "nesterov": update.nesterov, "weight_decay": update.weight_decay,
    }  # fmt: skip
    optimizer = torch.optim.SGD(
        [p for p in trained.parameters() if p.requires_grad], lr=update.learning_rate or 0.0,
        momentum=update.momentum or 0.0, nesterov=bool(update.nesterov and update.momentum),
        weight_decay=update.weight_decay or 0.0,
    )  # fmt: skip
    for _ in range(update.local_steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(logits_of(trained, images), labels.to(images.device)).backward()
        optimizer.step()
    after = {name: p.detach() for name, p in trained.named_parameters()}
    try:
        return dict(update_from_states(before, after, **protocol).gradients)
    except UpdateError:  # nothing moved
        return {name: torch.zeros_like(p) for name, p in before.items()}
