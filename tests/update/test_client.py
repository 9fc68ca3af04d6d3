"""The client's side: its gradient, and what it says of labels, losses and outputs that do not fit."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import private_batch, tiny_vit
from torch import Tensor, nn

from aprillab.update import ClientUpdate, UpdateError, check_update, client_update, logits_of


@pytest.mark.parametrize("size", [1, 3])
def test_it_is_the_gradient_of_the_mean_loss(model: nn.Module, size: int) -> None:
    images, labels = private_batch(model, size)
    update = client_update(model, images, labels)
    assert update.batch_size == size
    assert update.source == "fedsgd"
    assert update.withheld == ()
    assert update.dtype == torch.float64
    assert update.seconds is not None
    assert update.seconds > 0
    assert set(update.gradients) == {name for name, _ in model.named_parameters()}
    # The mean written out, image by image.
    total = sum(-torch.log_softmax(model(x[None]), dim=1)[0, y] for x, y in zip(images, labels, strict=True))
    (total / size).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(update.gradients[name], p.grad, rtol=1e-9, atol=1e-12)


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    model.train()
    model.blocks[0].mlp[0].weight.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    client_update(model, *private_batch(model))
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bool((model.head.weight.grad == 7).all())
    assert all(p.grad is None for name, p in model.named_parameters() if name != "head.weight")
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["blocks.0.mlp.0.weight"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval()
    with torch.no_grad():  # a caller's no_grad is no obstacle
        client_update(model, *private_batch(model))
    assert not model.training


def test_frozen_and_withheld_gradients_are_absent(model: nn.Module) -> None:
    model.class_token.requires_grad_(False)
    names = {name for name, _ in model.named_parameters()}
    update = client_update(model, *private_batch(model), withhold=["position_embedding", "head.bias"])
    assert set(update.gradients) == names - {"class_token", "position_embedding", "head.bias"}
    assert update.withheld == ("position_embedding", "head.bias")
    check_update(model, update)
    one = client_update(model, *private_batch(model), withhold="position_embedding")  # a name, not its letters
    assert one.withheld == ("position_embedding",)
    buffered = tiny_vit(position="sinusoidal")
    assert "position_embedding" not in client_update(buffered, *private_batch(buffered)).gradients


def test_a_parameter_without_influence_shares_zeros(model: nn.Module) -> None:
    model.unused = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    update = client_update(model, *private_batch(model))
    assert update.gradients["unused"].tolist() == [[0, 0, 0], [0, 0, 0]]
    check_update(model, update)


def test_another_loss_and_an_output_object(model: nn.Module) -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = model

        def forward(self, images: Tensor) -> Output:
            return Output(self.vit(images))

    images, labels = private_batch(model, 2)
    assert torch.equal(logits_of(Wrapped(), images), model(images))

    def doubled(logits: Tensor, y: Tensor) -> Tensor:
        return 2 * nn.functional.cross_entropy(logits, y)

    once = client_update(model, images, labels)
    twice = client_update(Wrapped(), images, labels, loss=doubled)
    for name, g in once.gradients.items():
        torch.testing.assert_close(twice.gradients[f"vit.{name}"], 2 * g)


def test_what_a_client_cannot_do(model: nn.Module) -> None:
    images, labels = private_batch(model)
    with pytest.raises(UpdateError, match=r"withhold: head\.bais is no trained parameter of VisionTransformer"):
        client_update(model, images, labels, withhold=["head.bais"])
    with pytest.raises(UpdateError, match="the client's loss is nan"):
        client_update(model, images * float("nan"), labels)
    with pytest.raises(UpdateError, match="nothing to share"):
        client_update(model, images, labels, withhold=[name for name, _ in model.named_parameters()])
    model.requires_grad_(False)
    with pytest.raises(UpdateError, match="nothing to share"):
        client_update(model, images, labels)
