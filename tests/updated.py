"""Updates made and altered, and clients that train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from conftest import private_batch
from torch import Tensor, nn

from aprillab.update import ClientUpdate


def changed(update: ClientUpdate, name: str, change: Callable[[Tensor], Tensor]) -> ClientUpdate:
    """The update with one gradient changed."""
    return replace(update, gradients={**update.gradients, name: change(update.gradients[name].clone())})


def renamed(update: ClientUpdate, rename: Callable[[str], str]) -> ClientUpdate:
    """The update with other names."""
    return replace(update, gradients={rename(name): g for name, g in update.gradients.items()})


def sgd_steps(
    model: nn.Module, lr: float, steps: int = 1, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's state before and after steps of SGD on one private picture; the
    model has the latter.
    """
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    images, labels = private_batch(model)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return before, {name: t.clone() for name, t in model.state_dict().items()}
