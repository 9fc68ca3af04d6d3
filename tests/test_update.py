"""What a client shares: the gradients themselves, the file they travel in, and the checks at the door."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import private_batch, tiny_vit
from safetensors.torch import save_file
from torch import Tensor, nn

from aprillab.update import (
    ClientUpdate,
    UpdateError,
    check_update,
    client_update,
    load_update,
    logits_of,
    save_update,
    update_from_states,
)


@pytest.fixture
def model() -> nn.Module:
    return tiny_vit()


@pytest.fixture
def update(model: nn.Module) -> ClientUpdate:
    return client_update(model, *private_batch(model))


def changed(update: ClientUpdate, name: str, change: Callable[[Tensor], Tensor]) -> ClientUpdate:
    return replace(update, gradients={**update.gradients, name: change(update.gradients[name].clone())})


# --- The client's gradient --------------------------------------------------------------------------------------


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


def test_withholding_later_is_the_same_as_withholding_at_once(model: nn.Module, update: ClientUpdate) -> None:
    at_once = client_update(model, *private_batch(model), withhold=["head.bias", "class_token"])
    later = update.without(["class_token"]).without("head.bias")
    assert set(later.gradients) == set(at_once.gradients)
    assert set(later.withheld) == set(at_once.withheld)
    assert set(update.gradients) - set(later.gradients) == {"head.bias", "class_token"}
    with pytest.raises(UpdateError, match="cannot withhold nonsense: not in the update"):
        update.without(["nonsense", "head.weight"])


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


def test_precision_of_an_update_is_that_of_its_worst_tensor(update: ClientUpdate) -> None:
    assert update.to(dtype=torch.float32).dtype == torch.float32
    assert changed(update, "head.bias", lambda g: g.half()).dtype == torch.float16
    assert changed(update.to(dtype=torch.float16), "head.bias", lambda g: g.bfloat16()).dtype == torch.bfloat16
    assert update.to("meta").gradients["head.bias"].is_meta
    assert update.dtype == torch.float64  # the original is untouched


# --- FedAvg -----------------------------------------------------------------------------------------------------


def one_sgd_step(model: nn.Module, lr: float, steps: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    images, labels = private_batch(model)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return before, {name: t.clone() for name, t in model.state_dict().items()}


def test_one_local_step_is_the_gradient(model: nn.Module, update: ClientUpdate) -> None:
    found = update_from_states(*one_sgd_step(model, lr=0.1), learning_rate=0.1, batch_size=1)
    assert (found.source, found.batch_size) == ("fedavg", 1)
    assert set(found.gradients) == set(update.gradients)
    for name, g in update.gradients.items():
        torch.testing.assert_close(found.gradients[name], g, rtol=0, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


def test_float32_states_carry_the_rounding_of_the_weights() -> None:
    model, lr = tiny_vit(torch.float32), 1e-3
    update = client_update(model, *private_batch(model))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = list(weights)
    found = update_from_states(*one_sgd_step(model, lr=lr), learning_rate=lr, trained=trained)
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
    before, after_one = one_sgd_step(model, lr=lr)
    second = client_update(model, *private_batch(model))
    _, after_two = one_sgd_step(model, lr=lr)
    mean = update_from_states(before, after_two, learning_rate=lr, local_steps=2)
    for name, g in mean.gradients.items():
        torch.testing.assert_close(g, (first.gradients[name] + second.gradients[name]) / 2, rtol=0, atol=1e-13)
    assert not torch.equal(after_one["head.weight"], after_two["head.weight"])


def test_only_what_was_trained_is_shared(model: nn.Module) -> None:
    model.class_token.requires_grad_(False)
    before, after = one_sgd_step(model, lr=0.1)
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
    before, after = one_sgd_step(model, lr=0.1)
    with pytest.raises(UpdateError, match=message):
        update_from_states(before, after, **options)


def test_states_that_do_not_fit_are_refused(model: nn.Module) -> None:
    before, after = one_sgd_step(model, lr=0.1)
    with pytest.raises(UpdateError, match="the two states are the same"):
        update_from_states(before, before, learning_rate=0.1)
    with pytest.raises(UpdateError, match=r"the two states differ in head\.bias"):
        update_from_states(before, {n: t for n, t in after.items() if n != "head.bias"}, learning_rate=0.1)
    with pytest.raises(UpdateError, match=r"head.bias: shape \(5,\) before, \(4,\) after"):
        update_from_states(before, after | {"head.bias": torch.zeros(4)}, learning_rate=0.1)


# --- The file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_saved_is_what_is_loaded(update: ClientUpdate, tmp_path: Path, dtype: torch.dtype) -> None:
    sent = replace(update.to(dtype=dtype), batch_size=3, source="fedavg").without(["head.bias"])
    save_update(sent, tmp_path / "update.safetensors")
    received = load_update(str(tmp_path / "update.safetensors"))
    assert (received.withheld, received.batch_size, received.source) == (("head.bias",), 3, "fedavg")
    assert set(received.gradients) == set(sent.gradients)
    for name, g in sent.gradients.items():
        assert received.gradients[name].dtype == dtype
        assert torch.equal(received.gradients[name], g)


def test_gradients_that_share_memory_can_be_saved(update: ClientUpdate, tmp_path: Path) -> None:
    """With one image the class token's gradient is the first row of the position embedding's, in place."""
    pointers = [update.gradients[n].untyped_storage().data_ptr() for n in ("class_token", "position_embedding")]
    assert pointers[0] == pointers[1], "not what this test is about any more"
    transposed = changed(update, "head.weight", lambda g: g.T.contiguous().T)
    save_update(transposed, tmp_path / "u")
    for name, g in load_update(tmp_path / "u").gradients.items():
        assert torch.equal(g, update.gradients[name])


@pytest.mark.parametrize("low_byte", [0x80, 0x50])
def test_a_header_whose_length_looks_like_a_pickle_is_no_pickle(tmp_path: Path, low_byte: int) -> None:
    for padding in range(20_000):
        save_update(ClientUpdate({"w" * (1 + padding): torch.ones(2)}), tmp_path / "u")
        start = (tmp_path / "u").read_bytes()[:2]
        if start[0] == low_byte:
            break
    assert start[0] == low_byte
    assert load_update(tmp_path / "u").gradients["w" * (1 + padding)].tolist() == [1, 1]


def test_any_safetensors_file_of_gradients_will_do(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "plain")
    update = load_update(tmp_path / "plain")
    assert (update.withheld, update.batch_size, update.source) == ((), None, "fedsgd")


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, kind: str) -> None:
    path, crater = tmp_path / "update.pt", tmp_path / "crater"
    content = {"w": torch.ones(2), "bomb": Bomb(crater)}
    if kind in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    else:
        path.write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    with pytest.raises(UpdateError, match=r"update.pt: a pickle \(torch.save\), which could run code"):
        load_update(path)
    assert not crater.exists()
    torch.load(path, weights_only=False) if kind in ("zip", "legacy") else pickle.loads(path.read_bytes())
    assert crater.exists(), "the bomb was a dud"


def test_files_that_are_no_update(update: ClientUpdate, tmp_path: Path) -> None:
    save_update(update, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    unreadable = "not a readable safetensors file, or cut off"
    for name, content in {
        "empty": b"",
        "four bytes": b"abcd",
        "half a header": whole[:50],
        "one byte short": whole[:-1],
        "half": whole[: len(whole) // 2],
        "one byte more": whole + b"\0",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "text": b"label,gradient\n1,0.5\n" * 20,
        "huge header": struct.pack("<Q", 2**62) + b"{}",
        "old pickle": pickle.dumps([1, 2, 3], protocol=0),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UpdateError, match=unreadable) as error:
            load_update(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing" / "deeper"):
        with pytest.raises(UpdateError, match="no such file"):
            load_update(path)
    save_file({}, tmp_path / "nothing")
    with pytest.raises(UpdateError, match="holds no tensor"):
        load_update(tmp_path / "nothing")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_tensors_that_are_no_gradients_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"good": torch.ones(2), "bad": torch.ones(2).to(dtype)}, tmp_path / "u")
    with pytest.raises(UpdateError, match=f"'bad' is {dtype}; gradients are torch.float16"):
        load_update(tmp_path / "u")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("{", "not an aprillab update's"),
        ("[1]", "not an aprillab update's"),
        ("null", "not an aprillab update's"),
        ("[" * 100_000, "not an aprillab update's"),
        ('{"batch_size": ' + "9" * 5000 + "}", "not an aprillab update's"),
        (json.dumps({"withheld": "head.bias"}), "'withheld' must be a list of names, not 'head.bias'"),
        (json.dumps({"withheld": ["a", 1]}), "'withheld' must be a list of names"),
        (json.dumps({"withheld": None}), "'withheld' must be a list of names"),
        (json.dumps({"batch_size": 0}), "'batch_size' must be an integer from 1 to 1000000, not 0"),
        (json.dumps({"batch_size": -3}), "'batch_size' must be an integer"),
        (json.dumps({"batch_size": True}), "'batch_size' must be an integer from 1 to 1000000, not True"),
        (json.dumps({"batch_size": 2.0}), "'batch_size' must be an integer"),
        (json.dumps({"batch_size": "2"}), "'batch_size' must be an integer"),
        (json.dumps({"batch_size": 10**12}), "'batch_size' must be an integer"),
        (json.dumps({"source": "gossip"}), "'source' must be 'fedsgd' or 'fedavg', not 'gossip'"),
        (json.dumps({"source": ["fedsgd"]}), "'source' must be"),
    ],
)
def test_metadata_that_lies_is_refused(tmp_path: Path, facts: str, message: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "u", metadata={"update": facts})
    with pytest.raises(UpdateError, match=message):
        load_update(tmp_path / "u")


def test_where_nothing_can_be_written(update: ClientUpdate, tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "u", tmp_path):
        with pytest.raises(UpdateError, match="cannot be written") as error:
            save_update(update, path)
        assert str(path) in str(error.value)


# --- The check at the door --------------------------------------------------------------------------------------


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
