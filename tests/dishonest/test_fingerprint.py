"""Clients that compare what they were sent."""

import pytest
import torch

from aprillab.dishonest import fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_bit_changes_it(dtype):
    state = {"b": torch.ones(2, 2, dtype=dtype), "a": torch.zeros(3, dtype=dtype)}
    same = {"a": torch.zeros(3, dtype=dtype), "b": torch.ones(2, 2, dtype=dtype).T.contiguous().T}
    assert fingerprint(state) == fingerprint(same)
    assert len(fingerprint(state)) == 64
    eps = torch.finfo(dtype).eps
    for changed in (
        {**state, "a": torch.tensor([0.0, 0.0, eps], dtype=dtype)},
        {**state, "c": torch.zeros(0)},
        {"b": state["b"].reshape(4), "a": state["a"]},
        {"b": state["b"], "d": state["a"]},
    ):
        assert fingerprint(changed) != fingerprint(state)


def test_integers_and_scalars_count():
    assert fingerprint({"n": torch.tensor(3)}) != fingerprint({"n": torch.tensor(4)})
