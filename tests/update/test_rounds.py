"""A round as the server has it: copies, names, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from aprillab.update import ClientUpdate, Round, UpdateError, listed, only_one, state_of_round

UPDATE = ClientUpdate({"weight": torch.ones(1, 2)})


def test_a_round_keeps_its_weights_while_the_model_trains_on() -> None:
    model = nn.Linear(2, 1)
    sent = model.weight.detach().clone()
    kept = Round(model.state_dict(), UPDATE)
    with torch.no_grad():
        model.weight += 1
    assert torch.equal(kept.state["weight"], sent)


def test_arrays_become_tensors() -> None:
    state = Round({"weight": np.array([1.0, 2.0], dtype=np.float32)}, UPDATE).state
    assert torch.equal(state["weight"], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    ("state", "update", "words"),
    [
        ([torch.ones(2)], UPDATE, "a mapping of name to tensor, such as model.state_dict(), not a list"),
        ({}, {"weight": torch.ones(2)}, "must be a ClientUpdate, not a dict"),
        ({"weight": None}, UPDATE, "'weight' is None"),
    ],
)
def test_what_is_no_round_is_refused(state: Any, update: Any, words: str) -> None:
    with pytest.raises(UpdateError) as refusal:
        Round(state, update)
    assert words in str(refusal.value)


def test_one_update_or_several_are_listed() -> None:
    round = Round({}, UPDATE)
    assert listed(UPDATE) == [UPDATE]
    assert listed(round) == [round]
    assert listed(one for one in (UPDATE, round)) == [UPDATE, round]


@pytest.mark.parametrize(
    ("updates", "words"),
    [
        ([], "the sequence of rounds is empty"),
        ({"weight": torch.ones(2)}, "not a dict"),
        ("update.safetensors", "load_update(path)"),
        ([UPDATE, ({}, UPDATE)], "round 2 must be a ClientUpdate or a Round, not a tuple: al.Round(state, update)"),
        ([UPDATE, 3], "round 2 must be a ClientUpdate or a Round, not a int"),
    ],
)
def test_what_is_no_update_is_said(updates: Any, words: str) -> None:
    with pytest.raises(UpdateError) as refusal:
        listed(updates)
    assert words in str(refusal.value)


def test_an_attack_that_reads_one_says_who_reads_several() -> None:
    assert only_one("mine", [UPDATE]) is UPDATE
    with pytest.raises(UpdateError, match="mine reads one update, and 2 rounds were given"):
        only_one("mine", [UPDATE, UPDATE])
    with pytest.raises(UpdateError, match="load the round's state into the model"):
        only_one("mine", Round({}, UPDATE))


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({"other": torch.ones(2)}, "round 3: its state has 'other' (1 such in all)"),
        ({"module.weight": torch.ones(3)}, "round 3: weight has shape (3,) in its state, and in the model (2,)"),
        ({"weight": torch.tensor([1.0, torch.nan])}, "round 3: 1 of 2 numbers of weight are NaN or infinite"),
    ],
)
def test_a_state_of_another_model_is_refused_with_its_round(sent: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(UpdateError) as refusal:
        state_of_round(3, Round(sent, UPDATE), {"weight": torch.zeros(2)})
    assert words in str(refusal.value)
