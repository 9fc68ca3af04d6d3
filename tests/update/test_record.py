"""What a server holds of one client: gradients by name, from tensors or arrays, and facts that
agree.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import private_batch
from torch import nn
from updated import changed

from aprillab.update import ClientUpdate, UpdateError, client_update

# --- Gradients ----------------------------------------------------------------------------------------------------


def test_withholding_later_is_the_same_as_withholding_at_once(model: nn.Module, update: ClientUpdate) -> None:
    at_once = client_update(model, *private_batch(model), withhold=["head.bias", "class_token"])
    later = update.without(["class_token"]).without("head.bias")
    assert set(later.gradients) == set(at_once.gradients)
    assert set(later.withheld) == set(at_once.withheld)
    assert set(update.gradients) - set(later.gradients) == {"head.bias", "class_token"}
    with pytest.raises(UpdateError, match="cannot withhold nonsense: not in the update"):
        update.without(["nonsense", "head.weight"])


def test_precision_of_an_update_is_that_of_its_worst_tensor(update: ClientUpdate) -> None:
    assert update.to(dtype=torch.float32).dtype == torch.float32
    assert changed(update, "head.bias", lambda g: g.half()).dtype == torch.float16
    assert changed(update.to(dtype=torch.float16), "head.bias", lambda g: g.bfloat16()).dtype == torch.bfloat16
    assert update.to("meta").gradients["head.bias"].is_meta
    assert update.dtype == torch.float64  # the original is untouched


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_become_tensors_in_place(dtype: Any) -> None:
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    gradients = ClientUpdate({"w": array, "t": torch.ones(2, dtype=torch.bfloat16)}).gradients
    assert gradients["w"].dtype == getattr(torch, np.dtype(dtype).name)
    assert gradients["t"].dtype == torch.bfloat16
    assert gradients["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    array[0, 0] = 7
    assert gradients["w"][0, 0] == 7, "a copy, where none was needed"


def test_arrays_that_torch_cannot_hold_are_copied(recwarn: pytest.WarningsRecorder) -> None:
    values = [0.0, 1.0, 2.0, 3.0]
    read_only = np.array(values, np.float32)
    read_only.flags.writeable = False
    arrays = {
        "big endian": np.array(values, ">f4"), "long": np.array(values, np.longdouble), "read only": read_only,
        "backwards": np.array(values[::-1], np.float32)[::-1], "every other": np.repeat(np.array(values), 2)[::2],
    }  # fmt: skip
    gradients = ClientUpdate(arrays).gradients
    assert {name: g.tolist() for name, g in gradients.items()} == dict.fromkeys(arrays, values)
    wide = {"long", "every other"}
    assert {name for name, g in gradients.items() if g.dtype == torch.float64} == wide
    assert not recwarn.list, "torch warns of memory that it may not write"


def test_gradients_of_a_graph_and_sparse_ones_are_taken() -> None:
    weight = nn.Parameter(torch.ones(2))
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    assert not ClientUpdate({"w": weight * 2}).gradients["w"].requires_grad
    gradients = ClientUpdate({"e": embedding.weight.grad}).gradients
    assert gradients["e"].tolist() == [[0, 0], [2, 2], [0, 0], [0, 0]]


def test_a_mapping_of_tensors_is_kept_as_it_is(update: ClientUpdate) -> None:
    assert ClientUpdate(update.gradients).gradients is update.gradients


class Framework:
    """An array of another library: it knows how to become numpy's."""

    def numpy(self) -> np.ndarray:
        return np.array([1.5], np.float32)


def test_arrays_of_other_libraries_are_taken() -> None:
    assert ClientUpdate({"w": Framework()}).gradients["w"].tolist() == [1.5]  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (
            [torch.ones(2)],
            r"a list has no names.*dict\(zip\(.*update_from_states\(before, after, names=model.sta",
        ),
        ((np.ones(2),), "a tuple has no names"),
        (torch.ones(2), "a Tensor is no mapping"),
        (None, "a NoneType is no mapping"),
        (nn.Linear(2, 1).named_parameters(), "a generator is no mapping"),
        ({0: torch.ones(2)}, "0 is a int: use those of model.named_parameters"),
        ({"w": None}, "'w' is None, as p.grad is where no gradient arrived: leave it out"),
        ({"w": [1.0, 2.0]}, "'w' is a list: an update holds tensors or numpy arrays"),
        ({"w": "0.5"}, "'w' is a str"),
        ({"w": np.array(["a"])}, "'w' is a ndarray: an update holds tensors or numpy arrays of numbers"),
        ({"w": np.array([{}])}, "'w' is a ndarray"),
        ({"w": np.array([1, 2])}, "'w' is torch.int64; gradients are torch.float16.*leave counters and masks out"),
        ({"w": torch.ones(2, dtype=torch.bool)}, "'w' is torch.bool"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "'w' is torch.complex64"),
        ({"w": np.ones(2, np.clongdouble)}, "'w' is torch.complex128"),
        ({"w": torch.ones(2).to(torch.float8_e4m3fn)}, r"'w' is torch.float8_e4m3fn.*convert it with .float\(\)"),
    ],
)
def test_what_is_no_gradient_is_refused(gradients: Any, message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        ClientUpdate(gradients)


# --- Facts --------------------------------------------------------------------------------------------------------

W = {"w": torch.ones(2)}


def test_facts_are_kept_in_their_own_type() -> None:
    said = ClientUpdate(
        W, ["a", "b"], np.int64(3), "fedavg",  # type: ignore[arg-type]
        learning_rate=np.float32(0.5), local_steps=torch.tensor(4), momentum=0, weight_decay=torch.tensor(0.25),  # type: ignore[arg-type]
        rounding=1,
    )  # fmt: skip
    assert said.withheld == ("a", "b")
    facts = said.facts()
    assert facts == {
        "withheld": ["a", "b"], "batch_size": 3, "source": "fedavg", "learning_rate": 0.5, "local_steps": 4,
        "momentum": 0.0, "nesterov": False, "weight_decay": 0.25, "rounding": 1.0,
        "optimizer": None, "betas": None, "eps": None,
    }  # fmt: skip
    assert {type(facts[n]) for n in ("learning_rate", "momentum", "weight_decay", "rounding")} == {float}
    assert {type(facts[n]) for n in ("batch_size", "local_steps")} == {int}
    assert ClientUpdate(W, withheld="head.bias").withheld == ("head.bias",)  # type: ignore[arg-type]


INTEGER, POSITIVE, NOT_NEGATIVE = "an integer from 1 to", "positive and finite", "at least 0"


@pytest.mark.parametrize(
    ("fact", "value", "must_be"),
    [
        *[("batch_size", v, INTEGER) for v in (0, -1, True, 2.0, "2", 10**7, float("nan"))],
        *[("local_steps", v, INTEGER) for v in (0, -1, None, True, 1.0, 10**10)],
        *[("learning_rate", v, POSITIVE) for v in (0, -0.1, float("nan"), float("inf"), "0.1", True, [0.1])],
        *[("momentum", v, "at least 0 and below 1") for v in (-0.1, 1, 1.5, float("nan"), "0.9", False)],
        *[("weight_decay", v, NOT_NEGATIVE) for v in (-1e-4, float("inf"), "0", torch.ones(2))],
        *[("rounding", v, NOT_NEGATIVE) for v in (-1e-4, float("inf"))],
        *[("nesterov", v, "True or False") for v in (1, None, "True")],
        *[("source", v, "'fedsgd' or 'fedavg'") for v in ("gossip", None, ["fedsgd"])],
        *[("withheld", v, "a list of names") for v in ([1], None, 3, {"a": 1})],
    ],
)
def test_facts_out_of_range_are_refused(fact: str, value: Any, must_be: str) -> None:
    with pytest.raises(UpdateError, match=f"'{fact}' must be {must_be}"):
        ClientUpdate(W, **{fact: value})


def test_facts_that_contradict_each_other_are_refused(update: ClientUpdate) -> None:
    with pytest.raises(UpdateError, match=r"'head.bias' is in the update and among the withheld: strike it out"):
        replace(update, withheld=("head.bias",))
    for momentum in (None, 0.0):
        with pytest.raises(UpdateError, match=f"'nesterov' needs a 'momentum' above 0, not {momentum}"):
            ClientUpdate(W, nesterov=True, momentum=momentum)
    assert ClientUpdate(W, nesterov=True, momentum=0.9).nesterov
    with pytest.raises(UpdateError, match="the update holds no gradient"):
        _ = ClientUpdate({}).dtype
