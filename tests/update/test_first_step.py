"""Adam's first step, undone: clients that run torch's optimizers, and what their states give back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import private_batch, tiny_vit
from torch import Tensor, nn
from updated import renamed

from aprillab.update import ClientUpdate, UpdateError, fitted, load_update, save_update, update_from_states
from aprillab.update.first_step import FirstStep, error_scale

Optimizer = Callable[..., torch.optim.Optimizer]
CLIENTS: list[tuple[str, Optimizer, dict[str, Any]]] = [
    ("adam", torch.optim.Adam, {}),
    ("adam", torch.optim.Adam, {"weight_decay": 0.1}),
    ("adam", partial(torch.optim.Adam, amsgrad=True), {"betas": (0.5, 0.9)}),
    ("adamw", torch.optim.AdamW, {"weight_decay": 0.1}),
    ("adamw", partial(torch.optim.AdamW, foreach=True), {"weight_decay": 0.0}),
    ("adagrad", torch.optim.Adagrad, {}),
    ("rmsprop", torch.optim.RMSprop, {}),
]


def played(
    model: nn.Module, optimizer: Optimizer, *, lr: float = 1e-3, eps: float = 1e-4, steps: int = 1, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state after a client's steps on one private picture, and the gradient of the first."""
    client = copy.deepcopy(model)
    run, first = optimizer(client.parameters(), lr=lr, eps=eps, **options), {}
    images, labels = private_batch(model)
    for _ in range(steps):
        run.zero_grad()
        nn.functional.cross_entropy(client(images), labels).backward()
        first = first or {name: p.grad.clone() for name, p in client.named_parameters() if p.grad is not None}
        run.step()
    return {name: t.clone() for name, t in client.state_dict().items()}, first


def undone(model: nn.Module, after: dict[str, Tensor], **said: Any) -> ClientUpdate:
    return update_from_states(model.state_dict(), after, **{"learning_rate": 1e-3, "eps": 1e-4, **said})


@pytest.mark.parametrize(("name", "optimizer", "options"), CLIENTS, ids=str)
def test_the_gradient_comes_back(name: str, optimizer: Optimizer, options: dict[str, Any]) -> None:
    model = tiny_vit()
    after, first = played(model, optimizer, **options)
    said = {"weight_decay": options.get("weight_decay", 0.0), "optimizer": name}
    found = undone(model, after, **said)
    for tensor, g in first.items():
        torch.testing.assert_close(found.gradients[tensor], g, rtol=1e-6, atol=1e-12, msg=tensor)
    assert (found.optimizer, found.eps, found.source) == (name, 1e-4, "fedavg")


@pytest.mark.parametrize(("name", "optimizer", "options"), CLIENTS, ids=str)
@pytest.mark.parametrize("lr", [1e-2, 1e-4])
def test_the_errors_are_those_of_the_rounding(
    name: str, optimizer: Optimizer, options: dict[str, Any], lr: float
) -> None:
    """Over all entries of float32 states: as large as told, or a little smaller, and never far
    beyond.
    """
    model = tiny_vit(torch.float32, width=48)
    after, first = played(model, optimizer, lr=lr, **options)
    said = {"weight_decay": options.get("weight_decay", 0.0), "optimizer": name, "learning_rate": lr}
    found = undone(model, after, **said)
    assert found.errors is not None
    off = torch.cat([(found.gradients[n].double() - g.double()).flatten() for n, g in first.items()])
    told = torch.cat([found.errors[n].double().flatten() for n in first])
    known = told.isfinite() & (told > 0)
    ratio = off[known] / told[known]
    assert known.double().mean() > 0.9
    assert 0.3 < float(ratio.square().mean().sqrt()) < 1.5
    assert float(ratio.abs().max()) < 15


def test_an_entry_of_which_only_the_sign_is_known() -> None:
    before = {"w": torch.tensor([1.0, 1.0, 0.0])}
    g = torch.tensor([1e-9, -1.0, 3.0])
    after = {"w": before["w"] - 1e-3 * g / (g.abs() + 1e-8)}
    found = update_from_states(before, after, learning_rate=1e-3, optimizer="adam")
    assert found.errors is not None
    assert found.errors["w"].isfinite().tolist() == [True, False, False]
    assert found.gradients["w"].isfinite().all()
    assert found.gradients["w"].sign().tolist() == [1, -1, 1]
    assert float(found.gradients["w"][1].abs()) > 1e-6  # capped, not small


def test_by_hand() -> None:
    step = FirstStep(learning_rate=0.5, eps=2.0, weight_decay=0.0, saturation=1.0, decoupled=False, steps=1)
    # r = (1 − 0.8)/0.5 = 0.4 and g = 2 · 0.4/(1 − 0.4)
    g, error = step.undone(torch.ones(1).double(), torch.tensor([0.8], dtype=torch.float64))
    assert float(g) == pytest.approx(4 / 3, rel=1e-14)
    unit = 2.0**-53  # of 0.8, which lies below 1
    sigma = ((unit / 12**0.5 / 0.5) ** 2 + (2.0**-52 * 0.4) ** 2) ** 0.5
    assert float(error) == pytest.approx(2 * sigma / 0.36, rel=1e-6)


def test_a_wrong_eps_is_a_common_factor() -> None:
    model = tiny_vit()
    after, _ = played(model, torch.optim.Adam)
    right, wrong = (undone(model, after, optimizer="adam", eps=eps) for eps in (1e-4, 1e-8))
    for name, g in right.gradients.items():
        torch.testing.assert_close(1e4 * wrong.gradients[name], g)
    assert error_scale(wrong) == 1e-8


@pytest.mark.parametrize("said", [{"learning_rate": 9e-4}, {"weight_decay": 1.0}, {"weight_decay": 0.0}], ids=str)
def test_what_no_first_step_is_is_refused(said: dict[str, Any]) -> None:
    model = tiny_vit()
    after, _ = played(model, torch.optim.AdamW, weight_decay=0.1, eps=1e-12)
    undone(model, after, optimizer="adamw", weight_decay=0.1, eps=1e-12)
    with pytest.raises(
        UpdateError, match=r"\d% of the entries moved further than a first step.*up to .* learning rates, not 1\)"
    ):
        undone(model, after, **{"optimizer": "adamw", "weight_decay": 0.1, "eps": 1e-12, **said})


def test_several_steps_are_marked_by_larger_errors() -> None:
    model = tiny_vit()
    after, first = played(model, torch.optim.Adam, steps=3, lr=1e-6, eps=1.0)
    found = undone(model, after, optimizer="adam", learning_rate=1e-6, eps=1.0, local_steps=3)
    assert found.errors is not None
    for name, g in first.items():
        off = (found.gradients[name] - g).abs()
        assert bool((off <= 0.01 * g.abs().max() + 1e-9).all()), name
        assert float(found.errors[name].min()) > 1e-4


# --- What is said of the optimizer, and how it travels ------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"optimizer": "adamw"}, "say its 'weight_decay'.*0.01"),
        ({"optimizer": "lamb"}, "'optimizer' must be one of sgd, adam, adamw, adagrad, rmsprop, not 'lamb'"),
        ({"optimizer": "adam", "momentum": 0.9}, "'momentum' is of SGD here"),
        ({"optimizer": "adam", "betas": (0.9, 1.0)}, "'betas' must be at least 0 and below 1, each"),
        ({"optimizer": "adam", "betas": 0.9}, "'betas' must be two numbers"),
        ({"optimizer": "adam", "eps": 0.0}, "'eps' must be positive"),
        ({"optimizer": "sgd"}, "'eps' is not of SGD: name the optimizer"),
        ({"optimizer": "sgd", "eps": None, "betas": (0.9, 0.999)}, "'betas' is not of SGD"),
    ],
)
def test_what_contradicts_itself_is_refused(said: dict[str, Any], message: str) -> None:
    model = tiny_vit()
    after, _ = played(model, torch.optim.Adam)
    with pytest.raises(UpdateError, match=message):
        undone(model, after, **said)


def test_what_is_too_small_to_move_a_weight_is_not_known_to_be_zero() -> None:
    before = {"w": torch.ones(1).bfloat16(), "v": torch.zeros(1)}
    after = {"w": torch.ones(1).bfloat16(), "v": torch.full((1,), -5e-4)}
    found = update_from_states(before, after, learning_rate=1e-3, optimizer="adam")
    assert found.errors is not None
    assert not found.gradients["w"].any()
    assert float(found.errors["w"]) == torch.inf


def test_nothing_moved() -> None:
    model = tiny_vit()
    with pytest.raises(UpdateError, match="the two states are the same"):
        undone(model, model.state_dict(), optimizer="adam")


@pytest.fixture
def adam() -> ClientUpdate:
    model = tiny_vit(torch.float32)
    after, _ = played(model, torch.optim.Adam)
    return undone(model, after, optimizer="adam")


def test_errors_go_along(adam: ClientUpdate) -> None:
    assert adam.errors is not None
    fewer = adam.without("head.bias")
    assert fewer.errors is not None
    assert set(fewer.errors) == set(fewer.gradients)
    wide = adam.to(dtype=torch.float64)
    assert wide.errors is not None
    assert {e.dtype for e in wide.errors.values()} == {torch.float64}
    model = tiny_vit(torch.float32)
    back = fitted(model, renamed_with_errors(adam))
    assert back.errors is not None
    assert all(torch.equal(back.errors[name], error) for name, error in adam.errors.items())
    with pytest.raises(UpdateError, match=r"'errors' lack 'module\."):  # not lost without a word
        renamed(adam, lambda name: f"module.{name}")


def renamed_with_errors(update: ClientUpdate) -> ClientUpdate:
    gradients, errors = (
        {f"module.{name}": tensor for name, tensor in (tensors or {}).items()}
        for tensors in (update.gradients, update.errors)
    )
    return ClientUpdate(gradients, errors=errors, optimizer="adam", eps=1e-4)


def test_errors_are_written_and_read(adam: ClientUpdate, tmp_path: Path) -> None:
    save_update(adam.without("head.bias"), tmp_path / "u")
    back = load_update(tmp_path / "u")
    assert back.facts() == adam.without("head.bias").facts()
    assert back.errors is not None
    assert adam.errors is not None
    assert set(back.gradients) == set(back.errors) == set(adam.gradients) - {"head.bias"}
    for name, error in back.errors.items():
        assert torch.equal(error, adam.errors[name])
        assert torch.equal(back.gradients[name], adam.gradients[name])


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ([torch.ones(2)], "'errors' are a mapping"),
        ({}, "'errors' lack 'w'"),
        ({"w": torch.ones(3)}, r"'errors' of 'w' have shape \(3,\), its gradient \(2,\)"),
        ({"w": torch.tensor([1.0, -1.0])}, "'errors' of 'w': 1 of 2 are negative or NaN"),
        ({"w": torch.tensor([torch.nan, torch.inf])}, "'errors' of 'w': 1 of 2 are negative or NaN"),
    ],
)
def test_errors_that_are_none_are_refused(errors: Any, message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        ClientUpdate({"w": torch.ones(2)}, errors=errors)


def test_errors_are_not_compared() -> None:
    w = {"w": torch.ones(2)}
    assert ClientUpdate(w, errors={"w": torch.ones(2)}) == ClientUpdate(w, errors={"w": torch.zeros(2)})
