"""The check at the door: an update under the model's own names, or one sentence that says why not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_vit
from torch import Tensor, nn
from updated import changed, renamed, sgd_steps

from aprillab.update import ClientUpdate, UpdateError, check_update, fitted, update_from_states


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
    refused(
        extra,
        "do not belong together: 40 names match, of 42 in the update and 40 in the model. "
        "Only the update has 'added', 'zusatz'; only the model has none. Pass the model that the client trained",
    )
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


# --- Names --------------------------------------------------------------------------------------------------------

PREFIXES = (
    "module.", "_orig_mod.", "_module.", "model.", "_orig_mod.module.", "module._orig_mod.", "model.model.",
    "model._orig_mod.module.", "student.", "1.", "base_model.model.",
)  # fmt: skip


def wrapped(model: nn.Module, prefix: str) -> nn.Module:
    """The model within others, so that its parameters' names begin with ``prefix``."""
    for name in reversed(prefix.removesuffix(".").split(".")):
        outer = nn.Module()
        outer.add_module(name, model)
        model = outer
    return model


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_stripped_or_added(model: nn.Module, update: ClientUpdate, prefix: str) -> None:
    sent = renamed(update.without(["head.bias"]), lambda name: prefix + name)
    sent = replace(sent, withheld=(f"{prefix}head.bias",), batch_size=7)
    found = fitted(model, sent)
    assert list(found.gradients) == [name for name in update.gradients if name != "head.bias"]
    assert (found.withheld, found.batch_size) == (("head.bias",), 7)
    assert all(found.gradients[name] is update.gradients[name] for name in found.gradients)
    back = fitted(wrapped(model, prefix), replace(update, batch_size=7).without(["head.bias"]))
    assert list(back.gradients) == list(sent.gradients)
    assert back.withheld == sent.withheld
    both = fitted(wrapped(model, "module."), sent)
    assert list(both.gradients) == [f"module.{name}" for name in found.gradients]


def test_wrappers_of_parts_are_stripped(model: nn.Module, update: ClientUpdate) -> None:
    model.blocks[0] = wrapped(model.blocks[0], "_orig_mod.")
    assert any("._orig_mod." in name for name, _ in model.named_parameters())
    found = fitted(model, update)
    assert list(found.gradients) == [name for name, _ in model.named_parameters()]
    sharded = renamed(update, lambda name: name.replace("blocks.1.", "blocks._fsdp_wrapped_module.1."))
    assert set(fitted(tiny_vit(), sharded).gradients) == set(update.gradients)


def test_nothing_to_change_gives_the_same_object(model: nn.Module, update: ClientUpdate) -> None:
    assert fitted(model, update) is update
    held = update.without("head.bias")
    assert fitted(model, held) is held
    foreign = replace(held, withheld=("head.bias", "elsewhere"))  # what the model lacks may be withheld
    assert fitted(model, foreign).withheld == foreign.withheld
    wrapped_name = replace(held, withheld=("module.head.bias",))
    assert fitted(model, wrapped_name).withheld == ("head.bias",)
    once = fitted(model, renamed(update, lambda name: f"module.{name}"))
    assert fitted(model, once) is once


def test_names_that_match_in_part_are_one_sentence(model: nn.Module, update: ClientUpdate) -> None:
    half = renamed(update, lambda name: f"module.{name.replace('blocks', 'layers')}")
    with pytest.raises(UpdateError) as error:
        fitted(model, half)
    layers = [name for name, _ in model.named_parameters() if name.startswith("blocks.")]
    lost = sorted(name for name in half.gradients if ".layers." in name)
    said = str(error.value)
    assert f"{40 - len(layers)} names match, of 40 in the update and 40 in the model" in said
    assert f"Only the update has {lost[0]!r}, {lost[1]!r} and {len(lost) - 2} more" in said
    assert f"only the model has {layers[0]!r}, {layers[1]!r} and {len(layers) - 2} more" in said
    twice = replace(update, gradients={**update.gradients, "module.head.bias": update.gradients["head.bias"]})
    with pytest.raises(UpdateError, match=r"Only the update has 'module.head.bias'"):
        fitted(model, twice)


def test_names_that_could_be_of_two_parts_are_refused() -> None:
    two = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    update = ClientUpdate({"weight": torch.ones(3, 3), "bias": torch.ones(3)})
    with pytest.raises(UpdateError, match="0 names match, of 2 in the update and 4 in the model"):
        fitted(two, update)
    two[0].requires_grad_(False)
    assert list(fitted(two, update).gradients) == ["1.weight", "1.bias"], "the part that is trained"


def test_of_teacher_and_student_the_one_that_moved_is_found(model: nn.Module, update: ClientUpdate) -> None:
    still = {f"teacher.{name}": torch.zeros_like(g) for name, g in update.gradients.items()}
    student = renamed(update, lambda name: f"student.{name}").gradients
    assert set(fitted(model, ClientUpdate({**still, **student})).gradients) == set(update.gradients)


# --- What is no trained parameter ---------------------------------------------------------------------------------


def test_buffers_frozen_zeros_and_strange_zeros_are_dropped(model: nn.Module, update: ClientUpdate) -> None:
    model.register_buffer("mean", torch.ones(3), persistent=False)
    model.class_token.requires_grad_(False)
    more = {
        "mean": torch.ones(3), "class_token": torch.zeros(1, 1, 24), "0.std": torch.zeros(3),
        "head.bias": torch.zeros(5, dtype=torch.float64),
    }  # fmt: skip
    found = fitted(model, replace(update, gradients={**update.gradients, **more}))
    assert set(found.gradients) == set(update.gradients) - {"class_token"}
    assert not found.gradients["head.bias"].any(), "a trained parameter may have a gradient of zero"
    shared = fitted(model, update)  # frozen here, yet it moved: kept
    assert shared is update
    model.requires_grad_(False)
    assert fitted(model, update) is update


def test_a_tensor_that_begins_with_zero_is_not_zero(model: nn.Module, update: ClientUpdate) -> None:
    model.class_token.requires_grad_(False)
    model.position_embedding.requires_grad_(False)

    def only_last(g: Tensor) -> Tensor:
        return torch.zeros_like(g).index_fill(-1, torch.tensor(g.shape[-1] - 1), 1.0)

    sparse = replace(update, gradients={name: only_last(g) for name, g in update.gradients.items()})
    assert fitted(model, sparse) is sparse
    strange = changed(sparse, "class_token", torch.zeros_like)
    assert set(fitted(model, strange).gradients) == set(update.gradients) - {"class_token"}
    with pytest.raises(UpdateError, match="Only the update has 'elsewhere'"):
        fitted(model, replace(update, gradients={**update.gradients, "elsewhere": torch.tensor([0.0, 1.0])}))


def test_a_parameter_of_two_names_has_the_first(model: nn.Module) -> None:
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    g = torch.eye(4)
    for names in (["0.weight"], ["1.weight"], ["0.weight", "1.weight"]):
        assert list(fitted(tied, ClientUpdate(dict.fromkeys(names, g))).gradients) == ["0.weight"]


def test_unused_parameters_may_be_missing(model: nn.Module, update: ClientUpdate) -> None:
    model.spare = nn.Parameter(torch.ones(2))
    with pytest.raises(UpdateError, match=r"lacks the gradient of 'spare' \(1 missing"):
        fitted(model, update)
    assert fitted(model, update, unused=("spare",)) is update
    check_update(model, update, unused=["spare"])


def test_only_the_named_tensors_need_be_finite(model: nn.Module, update: ClientUpdate) -> None:
    bad = changed(update, "head.weight", lambda g: g * float("nan"))
    assert fitted(model, bad, finite={"head.bias"}) is bad
    with pytest.raises(UpdateError, match=r"head\.weight: 120 of 120"):
        fitted(model, renamed(bad, lambda name: f"module.{name}"), finite={"head.weight"})


# --- Weights sent for an update -----------------------------------------------------------------------------------


def weights_of(model: nn.Module) -> ClientUpdate:
    return ClientUpdate({name: p.detach().clone() for name, p in model.named_parameters()})


@pytest.mark.parametrize("lr", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("zero", [(), ("position", "head", "blocks.0.attention")])
def test_weights_are_recognized(model: nn.Module, lr: float, zero: tuple[str, ...]) -> None:
    """The model as it was sent out, against the weights that came back; some began at zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(not name.startswith(zero))
    server = copy.deepcopy(model)
    sgd_steps(model, lr, steps=3)
    with pytest.raises(UpdateError, match=r"weights, not gradients: .* update_from_states\(before, after, lea"):
        fitted(server, renamed(weights_of(model), lambda name: f"module.{name}"))
    with pytest.raises(UpdateError, match=f"of 40 tensors are nearly {type(model).__name__}'s own"):
        check_update(server, weights_of(model).to(dtype=torch.float16))


def test_gradients_are_never_taken_for_weights(model: nn.Module, update: ClientUpdate) -> None:
    """Scaled to the weights' own size, alone or mixed with weight decay; some tensors
    may even be weights.
    """
    weights = weights_of(model).gradients
    for factor in (-1.0, 1.0):
        sized = {n: factor * g * weights[n].norm() / g.norm().clamp_min(1e-30) for n, g in update.gradients.items()}
        check_update(model, ClientUpdate(sized))
        decayed = {n: g + 0.5 * weights[n] for n, g in sized.items()}
        check_update(model, ClientUpdate(decayed))
    check_update(model, ClientUpdate({n: -w for n, w in weights.items()}))
    check_update(model, ClientUpdate({n: 1e-2 * w for n, w in weights.items()}))
    small = ("class_token", "position_embedding", "patch_embedding.weight", "head.weight")
    mixed = {n: weights[n] if n in small else g for n, g in update.gradients.items()}
    mass = {n: float(w.norm() ** 2) for n, w in weights.items()}
    assert sum(mass[n] for n in small) < 0.5 * sum(mass.values())
    check_update(model, ClientUpdate(mixed))
    few = nn.Linear(9, 9, bias=False)  # too few numbers to tell
    check_update(few, weights_of(few))


def test_the_update_of_weights_that_came_back_passes(model: nn.Module) -> None:
    server = copy.deepcopy(randomize(model))
    before, after = sgd_steps(model, lr=0.1, steps=2)
    check_update(server, update_from_states(before, after, learning_rate=0.1, local_steps=2))
