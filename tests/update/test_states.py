"""FedAvg: two states, and what the client's optimizer did between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import private_batch, tiny_vit
from torch import Tensor, nn
from updated import sgd_steps

from aprillab.update import ClientUpdate, UpdateError, check_update, client_update, fitted, update_from_states
from aprillab.update.states import shrinkage


def sgd_steps(model: nn.Module, lr: float, steps: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    images, labels = private_batch(model)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return before, {name: t.clone() for name, t in model.state_dict().items()}


def test_one_local_step_is_the_gradient(model: nn.Module, update: ClientUpdate) -> None:
    found = update_from_states(*sgd_steps(model, lr=0.1), learning_rate=0.1, batch_size=1)
    assert (found.source, found.batch_size) == ("fedavg", 1)
    assert set(found.gradients) == set(update.gradients)
    for name, g in update.gradients.items():
        torch.testing.assert_close(found.gradients[name], g, rtol=0, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


def test_float32_states_carry_the_rounding_of_the_weights() -> None:
    model, lr = tiny_vit(torch.float32), 1e-3
    update = client_update(model, *private_batch(model))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = list(weights)
    found = update_from_states(*sgd_steps(model, lr=lr), learning_rate=lr, trained=trained)
    eps = torch.finfo(torch.float32).eps
    worst = 0.0
    for name, g in update.gradients.items():
        error = (found.gradients[name] - g).abs()
        allowed = eps * (weights[name].abs() / lr + 4 * g.abs()) + 1e-12
        assert bool((error <= allowed).all()), name
        worst = max(worst, float(error.max()))
    assert worst > 1e-6, "the weights' rounding should be visible at this learning rate"


def test_several_local_steps_give_their_mean(model: nn.Module) -> None:
    lr = 0.05
    first = client_update(model, *private_batch(model))
    before, after_one = sgd_steps(model, lr=lr)
    second = client_update(model, *private_batch(model))
    _, after_two = sgd_steps(model, lr=lr)
    mean = update_from_states(before, after_two, learning_rate=lr, local_steps=2)
    for name, g in mean.gradients.items():
        torch.testing.assert_close(g, (first.gradients[name] + second.gradients[name]) / 2, rtol=0, atol=1e-13)
    assert not torch.equal(after_one["head.weight"], after_two["head.weight"])


def test_only_what_was_trained_is_shared(model: nn.Module) -> None:
    model.class_token.requires_grad_(False)
    before, after = sgd_steps(model, lr=0.1)
    assert "class_token" not in update_from_states(before, after, learning_rate=0.1).gradients
    check_update(model, update_from_states(before, after, learning_rate=0.1))
    named = update_from_states(before, after, learning_rate=0.1, trained=["class_token", "head.bias"])
    assert set(named.gradients) == {"class_token", "head.bias"}
    assert not named.gradients["class_token"].any()
    counter = {"n": torch.tensor(1)}
    assert (
        "n" not in update_from_states(before | counter, after | {"n": torch.tensor(2)}, learning_rate=0.1).gradients
    ), "an integer buffer has no gradient"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": -0.1}, "must be positive"),
        ({"learning_rate": float("nan")}, "must be positive"),
        ({"learning_rate": float("inf")}, "must be positive and finite"),
        ({"learning_rate": 0.1, "local_steps": 0}, "local_steps=0"),
        ({"learning_rate": 0.1, "trained": ["heat.bias"]}, "trained: heat.bias is not in the states"),
    ],
)
def test_states_with_nonsense_are_refused(model: nn.Module, options: dict, message: str) -> None:
    before, after = sgd_steps(model, lr=0.1)
    with pytest.raises(UpdateError, match=message):
        update_from_states(before, after, **options)


def test_states_that_do_not_fit_are_refused(model: nn.Module) -> None:
    before, after = sgd_steps(model, lr=0.1)
    with pytest.raises(UpdateError, match="the two states are the same"):
        update_from_states(before, before, learning_rate=0.1)
    with pytest.raises(UpdateError, match=r"the two states differ in head\.bias"):
        update_from_states(before, {n: t for n, t in after.items() if n != "head.bias"}, learning_rate=0.1)
    with pytest.raises(UpdateError, match=r"head.bias: shape \(5,\) before, \(4,\) after"):
        update_from_states(before, after | {"head.bias": torch.zeros(4)}, learning_rate=0.1)
