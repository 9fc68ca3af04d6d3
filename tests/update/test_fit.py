"""The check at the door: an update under the model's own names, or one sentence that says why not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import private_batch, randomize, tiny_vit
from torch import Tensor, nn
from updated import changed, renamed, sgd_steps

from aprillab.update import ClientUpdate, UpdateError, check_update, client_update, fitted, update_from_states


def test_a_good_update_passes(model: nn.Module, update: ClientUpdate) -> None:
    check_update(model, update)
    check_update(model, update.without(["position_embedding"]))
    check_update(model, update.to(dtype=torch.float16))
    model.head.bias.requires_grad_(False)  # frozen for the server, yet shared: nothing wrong with that
    check_update(model, update)
    gradients = {n: g for n, g in update.gradients.items() if n != "head.bias"}
    check_update(model, ClientUpdate(gradients))


def test_an_update_that_cannot_be_this_models(model: nn.Module, update: ClientUpdate) -> None:
    def refused(bad: ClientUpdate, message: str, of: nn.Module = model) -> None:
        with pytest.raises(UpdateError, match=message):
            check_update(of, bad)

    lacking = {n: g for n, g in update.gradients.items() if n not in ("head.bias", "norm.bias")}
    refused(ClientUpdate(lacking), r"lacks the gradient of 'head.bias' \(2 missing in all\). If the client withholds")
    refused(ClientUpdate(lacking, withheld=("head.bias",)), r"lacks the gradient of 'norm.bias' \(1 missing")
    refused(ClientUpdate({}), "lacks the gradient of")
    extra = replace(update, gradients={**update.gradients, "zusatz": torch.ones(1), "added": torch.ones(1)})
    refused(extra, r"do not belong together: the update has 2 tensor\(s\) .* the first is 'added'")
    refused(
        changed(update, "head.bias", lambda g: g[:-1]), r"head.bias: the update has shape \(4,\), VisionTra.* \(5,\)"
    )
    refused(changed(update, "head.weight", lambda g: g.T), r"head.weight: the update has shape \(24, 5\)")
    refused(update, "do not belong together", of=nn.Linear(3, 2))
    refused(update, r"class_token: the update has shape \(1, 1, 24\), .* \(1, 1, 48\)", of=tiny_vit(width=48))
    refused(update, "do not belong together", of=tiny_vit(depth=1))
    refused(update, "lacks the gradient of 'blocks.2", of=tiny_vit(depth=3))
    refused(replace(update, gradients={n: g * 0 for n, g in update.gradients.items()}), "all gradients are zero")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_entry_that_is_not_finite_is_found(
    model: nn.Module, update: ClientUpdate, value: float, dtype: torch.dtype
) -> None:
    def poison(g: Tensor) -> Tensor:
        g[3, 7] = value
        return g

    name = "blocks.1.mlp.2.weight"
    with pytest.raises(UpdateError, match=rf"{name}: 1 of 2304 gradient entries are NaN or infinite"):
        check_update(model, changed(update.to(dtype=dtype), name, poison))


def test_infinities_that_cancel_are_found(model: nn.Module, update: ClientUpdate) -> None:
    def poison(g: Tensor) -> Tensor:
        g[0, 0], g[0, 1] = float("inf"), -float("inf")
        return g

    with pytest.raises(UpdateError, match="2 of 120 gradient entries"):
        check_update(model, changed(update, "head.weight", poison))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_finite_entries_whose_sum_overflows_are_finite(
    model: nn.Module, update: ClientUpdate, dtype: torch.dtype
) -> None:
    big = torch.finfo(dtype).max / 2
    huge = changed(update.to(dtype=dtype), "head.weight", lambda g: torch.full_like(g, big))
    assert not torch.isfinite(huge.gradients["head.weight"].sum())
    check_update(model, huge)
