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


def test_what_did_not_move_is_kept_until_the_model_is_there(model: nn.Module) -> None:
    model.class_token.requires_grad_(False)
    model.register_buffer("ticks", torch.tensor(1.0))
    before, after = sgd_steps(model, lr=0.1)
    both = before | {"n": torch.tensor(1)}, after | {"n": torch.tensor(2)}
    found = update_from_states(*both, learning_rate=0.1)
    assert set(found.gradients) == set(before), "an integer has no gradient, all else has"
    assert not found.gradients["class_token"].any()
    check_update(model, found)
    assert set(fitted(model, found).gradients) == set(before) - {"class_token", "ticks"}
    model.class_token.requires_grad_(True)  # the server does not know that the client froze it
    assert set(fitted(model, found).gradients) == set(before) - {"ticks"}


def test_only_what_was_trained_is_shared(model: nn.Module) -> None:
    model.class_token.requires_grad_(False)
    model.register_buffer("ticks", torch.tensor(1.0))
    before, after = sgd_steps(model, lr=0.1)
    named = update_from_states(before, after, learning_rate=0.1, trained=["class_token", "head.bias"])
    assert set(named.gradients) == {"class_token", "head.bias"}
    assert not named.gradients["class_token"].any()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for prefix in ("", "module."):
        states = ({prefix + name: t for name, t in state.items()} for state in (before, after))
        assert set(update_from_states(*states, learning_rate=0.1, trained=model).gradients) == trained
    with pytest.raises(UpdateError, match=r"trained: 'bias' of Linear is not in the states \(2 missing in all\)"):
        update_from_states(before, after, learning_rate=0.1, trained=nn.Linear(2, 1))


# --- What the optimizer did ---------------------------------------------------------------------------------------

OPTIMIZERS = [
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "momentum": 0.9},
    {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
    {"momentum": 0.9},
]


def one_step_at_a_time(model: nn.Module, lr: float, steps: int, options: dict) -> tuple[dict, dict, list[dict]]:
    """The states before and after one client's steps, and the gradient of each."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=lr, **options), []
    for _ in range(steps):
        update = client_update(model, *private_batch(model))
        for name, p in model.named_parameters():
            p.grad = update.gradients[name].clone()
        seen.append(update.gradients)
        optimizer.step()
    return before, model.state_dict(), seen


def flat(gradients: Any) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_sgd_leaves_one_sum_of_gradients(model: nn.Module, options: dict, steps: int) -> None:
    before, after, seen = one_step_at_a_time(model, 0.1, steps, options)

    def off(**said: Any) -> float:
        """What no numbers a_t, common to all tensors, explain of the update."""
        found = flat(update_from_states(before, after, learning_rate=0.1, local_steps=steps, **said).gradients)
        A = torch.stack([flat(g) for g in seen], dim=1)
        return float((A @ torch.linalg.lstsq(A, found).solution - found).norm() / found.norm())

    assert off(**options) < 1e-13
    if "weight_decay" in options:
        assert off() > 1e-3, "the decay should be visible"
        assert off(**options | {"weight_decay": 0.11}) > 1e-4
        if "momentum" in options and steps > 1:
            assert off(weight_decay=0.1) > 1e-4, "without the momentum, plain SGD's decay"


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_the_patch_embedding_system_holds_after_many_steps_on_one_image(model: nn.Module, options: dict) -> None:
    images, _ = private_batch(model)
    before, after, _ = one_step_at_a_time(model, 0.1, 7, options)
    g = update_from_states(before, after, learning_rate=0.1, local_steps=7, **options).gradients
    patches = nn.functional.unfold(images, 4, stride=4)[0].T
    system = g["position_embedding"][0, 1:].T @ patches
    torch.testing.assert_close(system, g["patch_embedding.weight"].flatten(1), rtol=0, atol=1e-12)


def test_the_shrinkage_is_that_of_sgd() -> None:
    for options in OPTIMIZERS[:3]:
        w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=0.3, **options)
        for step in range(1, 9):
            w.grad = torch.zeros_like(w)
            optimizer.step()
            nesterov = options.get("nesterov", False)
            left = shrinkage(0.3, 0.1, step, options.get("momentum", 0.0), nesterov=nesterov)
            assert left == pytest.approx(float(w.detach()), rel=1e-13), (options, step)
    assert shrinkage(0.1, 0.0, 10**9, 0.9) == 1.0
    with pytest.raises(UpdateError, match="weights grow without end"):
        shrinkage(10.0, 1.0, 1000)


def test_what_is_said_of_the_optimizer_is_kept(model: nn.Module) -> None:
    before, after = sgd_steps(model, lr=0.1)
    found = update_from_states(before, after, learning_rate=0.1)
    assert (found.learning_rate, found.local_steps, found.nesterov) == (0.1, 1, False)
    assert found.momentum is None
    assert found.weight_decay is None
    said = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "local_steps": 3, "batch_size": 2}
    found = update_from_states(before, after, learning_rate=0.1, **said)
    assert {name: getattr(found, name) for name in said} == said


# --- Rounding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 6])
def test_the_rounding_is_foreseen(steps: int) -> None:
    """Against the same client in float64."""
    fine = tiny_vit().requires_grad_(True)
    coarse = tiny_vit(torch.float32)
    fine.load_state_dict(coarse.state_dict())
    found, truth = (
        update_from_states(*sgd_steps(m, 1e-4, steps), learning_rate=1e-4, local_steps=steps) for m in (coarse, fine)
    )
    error = float((flat(found.gradients) - flat(truth.gradients)).norm() / flat(truth.gradients).norm())
    assert found.rounding is not None
    assert truth.rounding is not None
    assert 0.7 < found.rounding / error < 1.5
    assert truth.rounding < 1e-7 * found.rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coarse_states_give_a_float32_update_that_says_how_coarse(dtype: torch.dtype) -> None:
    model = tiny_vit(torch.float32)
    before, after = sgd_steps(model, 0.05)
    start = {name: t.to(dtype).float() for name, t in before.items()}
    sent = {name: (start[name] + after[name] - before[name]).to(dtype) for name in before}
    found = update_from_states({name: t.to(dtype) for name, t in start.items()}, sent, learning_rate=0.05)
    truth = update_from_states(before, after, learning_rate=0.05)
    assert found.dtype == torch.float32
    assert found.rounding is not None
    error = float((flat(found.gradients) - flat(truth.gradients)).norm() / flat(truth.gradients).norm())
    assert 0.5 < found.rounding / error < 2


# --- Lists, arrays and names --------------------------------------------------------------------------------------


def arrays(state: dict[str, Tensor]) -> list[np.ndarray]:
    return [t.numpy().copy() for t in state.values()]


def test_lists_take_their_names_from_wherever_they_are(model: nn.Module) -> None:
    before, after = sgd_steps(model, lr=0.1)
    wanted = update_from_states(before, after, learning_rate=0.1).gradients
    b, a = arrays(before), arrays(after)
    named = [
        (b, a, {"names": before}), (b, a, {"names": list(before)}), (tuple(b), a, {"names": model}),
        (b, a, {"names": iter(before)}), (b, after, {}), (before, a, {}),
        (b, list(after.values()), {"names": before}),
        (dict(zip(before, b, strict=True)), dict(zip(before, a, strict=True)), {}),
    ]  # fmt: skip
    for first, second, options in named:
        found = update_from_states(first, second, learning_rate=0.1, **options).gradients
        assert list(found) == list(wanted)
        assert all(torch.equal(found[name], g) for name, g in wanted.items())


def test_the_two_states_may_be_wrapped_differently(model: nn.Module) -> None:
    before, after = sgd_steps(model, lr=0.1)
    wrapped = {f"_orig_mod.module.{name}": t for name, t in after.items()}
    found = update_from_states(before, wrapped, learning_rate=0.1).gradients
    wanted = update_from_states(before, after, learning_rate=0.1).gradients
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], g) for name, g in wanted.items())


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (
            lambda b, a: (list(b.values()), list(a.values())),
            {},
            "before is a list, which has no names: pass mod",
        ),
        (lambda b, a: (list(b.values()), a), {"names": "head.bias"}, "before is a list, which has no names"),
        (lambda b, a: (list(b.values()), a), {"names": [1, 2]}, "before is a list, which has no names"),
        (lambda b, a: (list(b.values()), a), {"names": ["x"]}, "before has 40 tensors, and there are 1 different"),
        (lambda b, a: (b, list(a.values())[:-1]), {}, "after has 39 tensors, and there are 40 .*named_parameters"),
        (lambda b, a: (b, tiny_vit()), {}, r"after is a VisionTransformer: pass model.state_dict\(\)"),
        (lambda b, a: ("before.pt", a), {}, "before is a str: pass model.state_dict"),
        (lambda b, a: (None, a), {}, "before is a NoneType"),
        (lambda b, a: (dict(enumerate(b.values())), a), {}, "before: 0 is no tensor's name"),
        (lambda b, a: (b, a | {"head.bias": [0.0] * 5}), {}, "'head.bias' is a list"),
        (lambda b, a: (b, a | {"head.bias": torch.zeros(5, dtype=torch.int64)}), {}, "head.bias: torch.float64 bef"),
        (lambda b, a: (b, a | {"head.bias": b["head.bias"] * math.nan}), {}, "head.bias: 5 of 5 entries after are N"),
        (lambda b, a: (b | {"head.bias": b["head.bias"] + math.inf}, a), {}, "head.bias: 5 of 5 entries before are"),
        (lambda b, a: ({n: t.to(torch.float8_e4m3fn) for n, t in b.items()}, a), {}, r"float8_e4m3fn.*\.float\(\)"),
    ],
)
def test_states_that_cannot_be_read_are_refused(
    model: nn.Module, given: Callable[..., tuple], options: dict, message: str
) -> None:
    with pytest.raises(UpdateError, match=message):
        update_from_states(*given(*sgd_steps(model, lr=0.1)), learning_rate=0.1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "'learning_rate' must be positive and finite, not 0.0"),
        ({"learning_rate": -0.1}, "must be positive"),
        ({"learning_rate": float("nan")}, "must be positive"),
        ({"learning_rate": float("inf")}, "must be positive and finite"),
        ({"learning_rate": 0.1, "local_steps": 0}, "'local_steps' must be an integer from 1"),
        ({"learning_rate": None}, "'learning_rate' must be positive and finite, not None"),
        ({"learning_rate": "0.1"}, "'learning_rate' must be"),
        ({"learning_rate": 0.1, "momentum": 1.0}, "'momentum' must be at least 0 and below 1"),
        ({"learning_rate": 0.1, "nesterov": True}, "'nesterov' needs a 'momentum' above 0"),
        ({"learning_rate": 0.1, "weight_decay": -1.0}, "'weight_decay' must be at least 0"),
        ({"learning_rate": 0.1, "batch_size": 0}, "'batch_size' must be an integer"),
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


class WithBuffers(nn.Module):
    """BatchNorm's statistics and counter, and a table of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("index", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_buffers_of_a_model_that_was_averaged_stop_nothing(optimizer: str) -> None:
    client = WithBuffers()
    before = {name: t.clone().double() for name, t in client.state_dict().items()}  # integers too: FedAvg's mean
    steps = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](client.parameters(), lr=1e-3)
    client(torch.tensor([[9.0, 2.0, 3.0], [3.0, 4.0, 5.0]])).pow(3).sum().backward()
    wanted = {name: p.grad.clone() for name, p in client.named_parameters() if p.grad is not None}
    steps.step()
    found = update_from_states(before, client.state_dict(), learning_rate=1e-3, optimizer=optimizer)
    assert found.gradients.keys() == wanted.keys()
    if optimizer == "sgd":
        assert all(torch.allclose(found.gradients[n].float(), g, atol=1e-3) for n, g in wanted.items())


def test_what_the_client_froze_did_not_decay(model: nn.Module) -> None:
    before, after = sgd_steps(model, lr=0.1)
    after |= {"head.bias": before["head.bias"]}
    found = update_from_states(before, after, learning_rate=0.1, weight_decay=0.1)
    assert not found.gradients["head.bias"].any()


def test_a_learning_rate_that_leaves_nothing_finite_is_named(model: nn.Module) -> None:
    before, after = sgd_steps(model, lr=0.1)
    with pytest.raises(UpdateError, match="over learning_rate=1e-320 is not finite"):
        update_from_states(before, after, learning_rate=1e-320)
