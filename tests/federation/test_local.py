"""How a client trains: against loops written out here, and against what it must not touch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.federation import LocalTraining, train_locally, update_of
from aprillab.federation.local import batches_of
from aprillab.update import UpdateError

SHAPE: dict[str, Any] = {"image_size": 8, "patch_size": 4, "width": 24, "depth": 1, "heads": 2, "classes": 5}


def client(dtype: torch.dtype = torch.float32) -> al.VisionTransformer:
    return al.VisionTransformer(**SHAPE).to(dtype)


def pictures(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=generator, dtype=dtype), torch.arange(count) % 5


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], **tolerances: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerances)


# --- Steps --------------------------------------------------------------------------------------------------------


def test_one_step_of_sgd_is_the_gradient_once() -> None:
    model, (images, labels) = client(torch.float64), pictures(3, torch.float64)
    how = LocalTraining(learning_rate=0.5)
    after = train_locally(model, images, labels, how)
    shared = al.client_update(model, images, labels)
    close(update_of(model.state_dict(), after, how).gradients, shared.gradients)


@pytest.mark.parametrize(
    ("how", "by_hand"),
    [
        (
            LocalTraining(learning_rate=0.3, steps=3, momentum=0.9, nesterov=True, weight_decay=0.1),
            lambda p: torch.optim.SGD(p, 0.3, momentum=0.9, nesterov=True, weight_decay=0.1),
        ),
        (
            LocalTraining("adam", 0.01, steps=3, betas=(0.5, 0.9), eps=1e-3),
            lambda p: torch.optim.Adam(p, 0.01, betas=(0.5, 0.9), eps=1e-3),
        ),
        (LocalTraining("adamw", 0.01, steps=2), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0)),
        (LocalTraining("adagrad", 0.01, steps=2, eps=1e-4), lambda p: torch.optim.Adagrad(p, 0.01, eps=1e-4)),
        (LocalTraining("rmsprop", 0.01, steps=2, betas=(0, 0.9)), lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9)),
    ],
    ids=lambda value: value.optimizer if isinstance(value, LocalTraining) else "",
)
def test_steps_are_those_of_torchs_own_optimizers(how: LocalTraining, by_hand: Any) -> None:
    (images, labels), expected = pictures(2, torch.float64), client(torch.float64)
    optimizer = by_hand(expected.parameters())
    for _ in range(how.steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(images), labels).backward()
        optimizer.step()
    close(train_locally(client(torch.float64), images, labels, how), expected.state_dict())


def test_each_steps_gradient_is_clipped() -> None:
    model, (images, labels) = client(torch.float64), pictures(2, torch.float64)
    how = LocalTraining(learning_rate=1.0, clip_norm=1e-3)
    update = update_of(model.state_dict(), train_locally(model, images, labels, how), how)
    size = sum(float(g.square().sum()) for g in update.gradients.values()) ** 0.5
    assert size == pytest.approx(1e-3, rel=1e-2)  # clip_grad_norm_ adds 1e-6 to the norm
    twice = LocalTraining(learning_rate=1.0, steps=2, clip_norm=1e-3)
    moved = update_of(model.state_dict(), train_locally(model, images, labels, twice), twice)
    close(moved.gradients, update.gradients, rtol=0.2, atol=1e-4)


@pytest.mark.parametrize(("autocast", "least", "most"), [("bfloat16", 1e-4, 0.1), (None, 0.0, 0.0)])
def test_autocast_rounds_and_nothing_else_does(autocast: str | None, least: float, most: float) -> None:
    model, (images, labels) = client(), pictures(2)
    how, plain = LocalTraining(autocast=autocast), LocalTraining()
    name = "patch_embedding.weight"
    g, exact = (
        update_of(model.state_dict(), train_locally(model, images, labels, one), one).gradients[name]
        for one in (how, plain)
    )
    assert g.dtype == torch.float32
    assert least <= float((g - exact).norm() / exact.norm()) <= most


def test_the_client_may_have_a_loss_of_its_own() -> None:
    model, (images, _) = client(torch.float64), pictures(1, torch.float64)
    how, wanted = LocalTraining(), torch.zeros(1, 5, dtype=torch.float64)
    after = train_locally(model, images, wanted, how, loss=nn.functional.mse_loss)
    shared = al.client_update(model, images, wanted, loss=nn.functional.mse_loss)
    close(update_of(model.state_dict(), after, how).gradients, shared.gradients)


# --- Batches ------------------------------------------------------------------------------------------------------


def test_epochs_of_shuffled_pictures_follow_one_another() -> None:
    batches = batches_of(5, LocalTraining(batch_size=2, seed=3))
    epochs = [[next(batches).tolist() for _ in range(3)] for _ in range(2)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[2, 2, 1]] * 2
    flat = [[number for batch in epoch for number in batch] for epoch in epochs]
    assert [sorted(epoch) for epoch in flat] == [list(range(5))] * 2
    assert flat[0] != flat[1]


def test_batches_of_one_are_single_pictures_in_the_seeds_order() -> None:
    model, (images, labels) = client(torch.float64), pictures(3, torch.float64)
    how = LocalTraining(steps=3, batch_size=1, seed=4)
    order = [int(number) for number, _ in zip(batches_of(3, how), range(3), strict=False)]
    expected = client(torch.float64)
    for k in order:
        optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(images[k : k + 1]), labels[k : k + 1]).backward()
        optimizer.step()
    close(train_locally(model, images, labels, how), expected.state_dict())
    others = train_locally(model, images, labels, LocalTraining(steps=1, batch_size=1, seed=5))
    assert any(not torch.equal(t, others[n]) for n, t in train_locally(model, images, labels, how).items())


def test_a_batch_larger_than_the_pictures_is_all_of_them() -> None:
    model, (images, labels) = client(torch.float64), pictures(2, torch.float64)
    both = (train_locally(model, images, labels, LocalTraining(batch_size=size)) for size in (None, 64))
    close(*both)


# --- What it leaves alone -----------------------------------------------------------------------------------------


def test_model_generator_and_gradients_are_as_they_were() -> None:
    model, (images, labels) = client().train(), pictures(2)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.random.get_rng_state()
    first = train_locally(model, images, labels, LocalTraining(steps=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert float(model.head.weight.grad.sum()) == model.head.weight.numel()
    close(train_locally(model, images, labels, LocalTraining(steps=2)), first, rtol=0, atol=0)


def test_frozen_parameters_stay_and_buffers_come_back() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 5)).train()
    model[1].weight.requires_grad_(False)
    images, labels = pictures(4)
    after = train_locally(model, images, labels, LocalTraining())
    assert torch.equal(after["1.weight"], model[1].weight)
    assert int(after["1.num_batches_tracked"]) == 1
    assert int(model.state_dict()["1.num_batches_tracked"]) == 0


def test_dropout_is_the_seeds() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 5)).train()
    images, labels = pictures(2)
    one, again, other = (train_locally(model, images, labels, LocalTraining(seed=s))["2.weight"] for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# --- Configuration and refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        LocalTraining(),
        LocalTraining("adamw", 1e-3, 5, 8, weight_decay=0.01, betas=(0.8, 0.99), eps=1e-6, clip_norm=1, seed=7),
        LocalTraining(momentum=0.9, nesterov=True, autocast="bfloat16"),
    ],
)
def test_configuration_goes_there_and_back(how: LocalTraining) -> None:
    config = how.to_config()
    assert all(isinstance(value, bool | int | float | str) for value in config.values())
    assert LocalTraining.from_config(config) == how
    assert LocalTraining.from_config({**config, "server-round": 3, "anything": "else"}) == how


def test_lr_is_read_as_many_apps_write_it() -> None:
    assert LocalTraining.from_config({"lr": 0.02}).learning_rate == 0.02
    assert LocalTraining.from_config({"lr": 0.02, "learning-rate": 0.3}).learning_rate == 0.3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"optimizer": "lion"}, "'optimizer' must be one of"),
        ({"optimizer": None}, "'optimizer' must be given"),
        ({"learning_rate": 0}, "'learning_rate' must be positive"),
        ({"learning_rate": "fast"}, "'learning_rate' must be positive"),
        ({"learning_rate": None}, "'learning_rate' must be given"),
        ({"steps": 0}, "'steps' must be an integer from 1"),
        ({"steps": 2.5}, "'steps' must be an integer from 1"),
        ({"batch_size": 0}, "'batch_size' must be an integer from 1"),
        ({"momentum": 1.0}, "'momentum' must be at least 0 and below 1"),
        ({"nesterov": True}, "'nesterov' needs a 'momentum'"),
        ({"weight_decay": -0.1}, "'weight_decay' must be at least 0"),
        ({"optimizer": "adam", "momentum": 0.9}, "'momentum' is of SGD"),
        ({"eps": 1e-6}, "'eps' is not of SGD"),
        ({"optimizer": "adam", "betas": (0.9, 1.0)}, "'betas' must be"),
        ({"optimizer": "adagrad", "betas": (0.9, 0.99)}, "'betas' are of Adam and RMSprop"),
        ({"clip_norm": 0.0}, "'clip_norm' must be positive"),
        ({"clip_norm": float("nan")}, "'clip_norm' must be positive"),
        ({"autocast": "int8"}, "'autocast' must be one of bfloat16, float16"),
        ({"seed": 0.5}, "'seed' must be an integer"),
        ({"seed": -1}, "'seed' must be an integer"),
    ],
)
def test_what_is_no_training_is_refused_by_its_name(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UpdateError, match=words):
        LocalTraining(**wrong)


def test_one_beta_alone_is_refused() -> None:
    with pytest.raises(UpdateError, match="'betas' must be two numbers"):
        LocalTraining.from_config({"optimizer": "adam", "beta2": 0.99})


def test_pictures_labels_and_steps_that_do_not_fit_are_refused() -> None:
    model, (images, labels) = client(), pictures(3)
    with pytest.raises(UpdateError, match=r"2 label\(s\) for 3 image\(s\)"):
        train_locally(model, images, labels[:2], LocalTraining(batch_size=1))
    with pytest.raises(UpdateError, match="cannot read images"):
        train_locally(model, images[:, :, :5, :5], labels, LocalTraining())
    with pytest.raises(UpdateError, match="label 9 is no class"):
        train_locally(model, images, torch.tensor([1, 2, 9]), LocalTraining())
    with pytest.raises(UpdateError, match=r"loss is (nan|inf)"):
        train_locally(model, images, labels, LocalTraining(learning_rate=1e30, steps=5))
    with pytest.raises(UpdateError, match="nothing to train"):
        train_locally(model.requires_grad_(False), images, labels, LocalTraining())
