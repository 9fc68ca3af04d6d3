"""The span attack over rounds: adapters' rows that add up, states that add equations, rounds
of another picture.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attacked import db, make, private
from torch import Tensor, nn
from vit_families import of_torchvision, picture

import aprillab as al
from aprillab.attacks.closed_forms.noisy_span import noisy_span
from aprillab.attacks.closed_forms.probe import adapters_as_read
from aprillab.attacks.closed_forms.span import solve_rounds
from aprillab.attacks.closed_forms.span_rounds import SpanRound, rows_of
from aprillab.attacks.closed_forms.span_width import usable_width
from aprillab.attacks.closed_forms.token_equations import token_equations
from aprillab.attacks.rounds import read_rounds

QUERY, VALUE = (f"base_model.model.blocks.0.attention.{part}.lora_A.default.weight" for part in ("query", "value"))


def adapted(
    model: nn.Module, *, r: int = 4, targets: tuple[str, ...] = ("query", "value"), **options: Any
) -> nn.Module:
    """``model`` with peft's LoRA on its attention, and its head trained as a whole."""
    peft = pytest.importorskip("peft")
    dtype = next(model.parameters()).dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=r, target_modules=list(targets), modules_to_save=["head"], **options)
        return peft.get_peft_model(model, config).to(dtype).eval()


def wide(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """A model of which the tokens alone fix the pixels: p + n + 2 = 66 ≤ 96, and 17 tokens."""
    return make("prenorm", dtype=dtype, **changes)


def rounds_of(
    model: nn.Module, pixels: Tensor, number: int, *, lr: float = 0.1, other: tuple[int, ...] = ()
) -> list[al.Round]:
    """A client's rounds, two other clients averaged in between; in those of ``other`` it
    has another picture.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for t in range(1, number + 1):
        mine = private(base_of(model), seed=99) if t in other else pixels
        update = al.client_update(model, al.HALF.to_input(mine), torch.tensor([3]))
        found.append(al.Round({name: p.detach().clone() for name, p in trained.items()}, update))
        mean = {name: g / 3 for name, g in update.gradients.items()}
        for k in (1, 2):
            theirs = private(base_of(model), seed=100 * t + k)
            gradients = al.client_update(model, al.HALF.to_input(theirs), torch.tensor([k])).gradients
            mean = {name: g + gradients[name] / 3 for name, g in mean.items()}
        with torch.no_grad():
            for name, p in trained.items():
                p -= lr * mean[name]
    return found


def base_of(model: Any) -> Any:
    """The model without peft's wrapper, whose ``head`` is a wrapper still."""
    inner = model.base_model.model if hasattr(model, "base_model") else model
    return type("Sizes", (), {"head": type("H", (), {"weight": next(model.parameters())}), "channels": inner.channels,
                              "image_size": inner.image_size})  # fmt: skip


def state_of(result: al.Reconstruction, name: str) -> str:
    return {condition.name: condition.state for condition in result.conditions}[name]


# --- LoRA ---------------------------------------------------------------------------------------------------------


def test_a_lora_client_is_read_once_there_is_a_row_for_each_token() -> None:
    model = wide()
    pixels = private(model)
    model = adapted(model)
    rounds = rounds_of(model, pixels, 5)
    result = al.invert(model, rounds, attack="span")
    assert db(result, pixels) > 120
    assert result.exact, result.reason
    assert result.labels.tolist() == [3]
    assert result.diagnostics["rows_of"] == (QUERY, VALUE)
    assert result.diagnostics["rows"] == 4 * 2 * 4 + 1  # the first round has none: B is zero
    assert result.diagnostics["public_rows"] == 1  # the class token's
    assert result.diagnostics["groups"] == 1
    assert [note["number"] for note in result.diagnostics["rounds"]] == [2, 3, 4, 5]
    assert "nothing in round 1, where LoRA's B is still zero" in result.reason
    # The states are not needed to solve, for what the equations read is frozen; the
    # replay needs one.
    bare = al.span_closed_form(model, [one.update for one in rounds])
    torch.testing.assert_close(bare.pixels, result.pixels)


def test_in_single_precision_it_is_exact_too() -> None:
    model = wide(torch.float32)
    pixels = private(model)
    model = adapted(model)
    result = al.span_closed_form(model, rounds_of(model, pixels, 6))
    assert db(result, pixels) > 75
    assert result.exact, result.reason
    assert abs(result.predicted_psnr - db(result, pixels)) < 10


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=["dora", "rslora"])
def test_dora_and_rslora_are_read_alike(options: dict[str, bool]) -> None:
    model = wide()
    pixels = private(model)
    model = adapted(model, **options)
    result = al.span_closed_form(model, rounds_of(model, pixels, 5))
    assert db(result, pixels) > 100
    assert result.exact, result.reason


def test_too_few_rows_are_refused_with_the_rounds_that_would_do() -> None:
    model = wide()
    pixels = private(model)
    model = adapted(model)
    rounds = rounds_of(model, pixels, 4)
    with pytest.raises(al.AttackNotApplicable, match="is zero in this round: LoRA's B is zero until its first step"):
        al.span_closed_form(model, rounds[:1])
    with pytest.raises(
        al.AttackNotApplicable,
        match=r"9 rows .* 1 of them public, for 17 tokens.* adds 8, so 1 more round .*nothing in round 1, where",
    ) as refusal:
        al.span_closed_form(model, rounds[:2])
    assert refusal.value.numbers["more_rounds"] == 1
    best = al.span_closed_form(model, rounds[:3], strict=False)  # 16 rows and the class token's
    assert db(best, pixels) > 80
    assert not best.exact  # nothing is left to see the noise by
    assert not best.determined
    assert "17 rows for 17 tokens" in best.reason
    assert al.span_closed_form(model, rounds).exact  # and 24


@pytest.mark.parametrize("class_token", [True, False])
def test_adapters_on_the_keys_alone_need_a_token_that_is_public(class_token: bool) -> None:
    model = make("prenorm", "frozen", width=96, class_token=class_token)
    pixels = private(model)
    model = adapted(model, targets=("key",))
    rounds = rounds_of(model, pixels, 8)
    if class_token:
        assert db(al.span_closed_form(model, rounds), pixels) > 60
    else:
        with pytest.raises(al.AttackNotApplicable, match="a shift of all keys changes no attention"):
            al.span_closed_form(model, rounds)


def test_a_model_too_narrow_for_the_tokens_alone_is_refused() -> None:
    model = wide(width=63)
    pixels = private(model)
    model = adapted(model)
    with pytest.raises(al.AttackNotApplicable, match=r"p \+ tokens \+ 1 = 66 > 63 = d.* leaves 45 equations for 48"):
        al.span_closed_form(model, rounds_of(model, pixels, 5))


def test_two_pictures_a_round_are_never_called_exact() -> None:
    model = wide()
    pixels = private(model, batch=2)
    model = adapted(model)
    found = []
    for one in rounds_of(model, pixels[:1], 8):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in one.state:
                    p.copy_(one.state[name])
        found.append(al.Round(one.state, al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3, 1]))))
    result = al.span_closed_form(model, found)
    assert not result.exact
    assert not result.determined


def test_loras_dropout_is_noticed() -> None:
    model = wide()
    pixels = private(model)
    model = adapted(model, lora_dropout=0.1).train()
    with torch.random.fork_rng(devices=[]):
        rounds = rounds_of(model, pixels, 6)
    result = al.span_closed_form(model, rounds)
    assert not result.exact
    assert state_of(result, "adapters read the attention's input") == "contradicted"
    assert "dropout" in result.reason
    assert state_of(al.span_closed_form(model.eval(), rounds), "adapters read the attention's input") == "shown"


def test_the_factors_a_caller_names_are_read() -> None:
    """Of a library that dissect does not know, or of an update that is all there is."""
    model = wide()
    pixels = private(model)
    model = adapted(model)
    rounds = rounds_of(model, pixels, 8)
    anatomy = al.dissect(model, adapters=(VALUE,))
    result = al.span_closed_form(model, rounds, anatomy=anatomy)
    assert result.diagnostics["rows_of"] == (VALUE,)
    assert db(result, pixels) > 90


def test_factors_that_are_put_into_one_weight_are_seen_by_their_gradient() -> None:
    """peft's nn.MultiheadAttention calls no factor, so what it is given cannot be looked at."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = of_torchvision(hidden_dim=96)
        nn.init.normal_(base.heads.head.weight, std=0.02)
    model = adapted(base.double(), targets=("self_attention",))
    anatomy = al.dissect(model)
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    first = al.client_update(model, images, torch.tensor([3]))
    with torch.no_grad():
        for name, g in first.gradients.items():
            dict(model.named_parameters())[name].sub_(0.1 * g)
    seen = adapters_as_read(model, anatomy, al.tensors_of(model))
    assert seen.state == "shown"
    assert seen.numbers["miss"] < 1e-12
    other = dataclasses.replace(anatomy, adapters=tuple(n.replace("layer_0", "layer_1") for n in anatomy.adapters))
    assert adapters_as_read(model, other, al.tensors_of(model)).state == "contradicted"


# --- Rounds of another picture ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("other", [(3,), (2, 6)])
def test_adapters_rounds_of_another_picture_are_left_out(other: tuple[int, ...], dtype: torch.dtype) -> None:
    model = wide(dtype)
    pixels = private(model)
    model = adapted(model)
    result = al.span_closed_form(model, rounds_of(model, pixels, 8, other=other))
    left_out = tuple(note["number"] for note in result.diagnostics["rounds"] if not note["used"])
    assert left_out == other
    assert db(result, pixels) > 70
    assert result.exact, result.reason


def test_no_round_is_left_out_where_all_are_of_one_picture() -> None:
    for seed in range(3):
        model = wide(torch.float32)
        pixels = private(model, seed=seed)
        model = adapted(model)
        result = al.span_closed_form(model, rounds_of(model, pixels, 7))
        assert all(note["used"] for note in result.diagnostics["rounds"])


# --- A trained embedding: states add equations --------------------------------------------------------------------


def without(rounds: list[al.Round], *names: str) -> list[al.Round]:
    return [al.Round(one.state, one.update.without(names)) for one in rounds]


def test_states_of_a_narrow_model_add_up() -> None:
    """d = 28: one state's count fails, min(48, 16) + 17 + 1 > 28; a second adds 28 − 18."""
    model = wide(width=28, heads=2)
    pixels = private(model)
    rounds = without(rounds_of(model, pixels, 4), "position_embedding")
    with pytest.raises(al.AttackNotApplicable, match="34 > 28 = d"):
        al.span_closed_form(model, rounds[:1])
    result = al.span_closed_form(model, rounds[:2])
    assert (result.diagnostics["groups"], result.diagnostics["usable_width"]) == (2, 38)
    assert db(result, pixels) > 80
    assert result.exact, result.reason
    # Without the patch embedding's gradient 48 + 17 + 1 ≤ 28 + 10 (T − 1) needs T = 5.
    blind = without(rounds, "patch_embedding.weight")
    with pytest.raises(al.AttackNotApplicable, match="66 > 58 = d and what 3 more"):
        al.span_closed_form(model, blind)


def test_where_the_embedding_is_trained_the_states_are_needed() -> None:
    model = wide()
    pixels = private(model)
    updates = [one.update for one in rounds_of(model, pixels, 2)]
    with pytest.raises(al.AttackNotApplicable, match=r"round 1: the values of .* al.Round\(state, update\)"):
        al.span_closed_form(model, updates)


def test_states_of_another_picture_are_left_out_or_refused() -> None:
    model = wide(torch.float32)
    pixels = private(model)
    rounds = without(rounds_of(model, pixels, 4, other=(3,)), "position_embedding")
    result = al.span_closed_form(model, rounds)
    assert [note["used"] for note in result.diagnostics["rounds"]] == [True, True, False, True]
    assert result.exact, result.reason
    assert db(result, pixels) > 70
    with pytest.raises(al.AttackNotApplicable, match="2 rounds are not of one picture"):
        al.span_closed_form(model, rounds[2:])


# --- Tensors in, tensors out --------------------------------------------------------------------------------------


def test_few_rows_say_nothing_beyond_their_tokens() -> None:
    """24 rows of 8 tokens in a width of 60: what a direction outside costs is the same for all."""
    generator = torch.Generator().manual_seed(0)
    tokens, mix = (torch.randn(*shape, generator=generator).double() for shape in ((8, 60), (24, 8)))
    D = mix @ tokens
    D += 1e-6 * torch.randn(D.shape, generator=generator).double()
    span = noisy_span(D, 8, 1e-7)
    Q = torch.linalg.qr(torch.cat([span.V[:, :8], torch.randn(60, 20, generator=generator).double()], 1)).Q
    outside = Q[:, 8:] - span.V @ (span.V.T @ Q[:, 8:])
    torch.testing.assert_close(span.coefficients(outside).norm(dim=0), outside.norm(dim=0))
    assert span.gap > 1e4
    assert 0.5e-6 < span.excess / (52 * 16 / 24) ** 0.5 * float(D.norm(dim=1).square().mean().sqrt()) < 2e-6


def test_each_state_adds_what_its_tokens_leave() -> None:
    equations = token_equations(torch.ones(3, 30).double(), torch.ones(30, 4).double(), torch.ones(5, 30).double())
    assert usable_width([equations], 10) == 30
    assert usable_width([equations] * 3, 10) == 70
    assert usable_width([equations] * 3, 40) == 30


def test_two_states_too_narrow_for_one_picture_each_are_not_said_to_be_of_two() -> None:
    """Ill-conditioned together: nothing tells but the replays, and these do."""
    model = make("prenorm", image_size=32, patch_size=4, width=96, heads=2, dtype=torch.float64)
    pixels = private(model)
    rounds = rounds_of(model, pixels, 2)
    hidden = ["position_embedding"]
    rounds = [al.Round(one.state, one.update.without(hidden)) for one in rounds]
    result = al.span_closed_form(model, rounds)
    assert db(result, pixels) > 60
    states = {condition.name: condition.state for condition in result.conditions}
    assert states["one picture in all rounds"] == "shown"
    rounded = [al.Round(one.state, one.update.to(dtype=torch.float32)) for one in rounds]
    found = al.span_closed_form(model, rounded)  # not refused
    assert found.exact <= (db(found, pixels) > 40)


def test_rows_that_show_their_own_noise_need_no_sums() -> None:
    """The head's sums exaggerate the noise where the loss is nearly zero: the rows know better."""
    model = make("prenorm", image_size=32, patch_size=4, width=96, heads=2, dtype=torch.float64)
    pixels, anatomy = private(model), al.dissect(model)
    rounds = [al.Round(one.state, one.update.without(["position_embedding"])) for one in rounds_of(model, pixels, 2)]
    read = read_rounds(model, rounds, anatomy)
    noisy = [dataclasses.replace(one, reading=dataclasses.replace(one.reading, noise=0.1)) for one in read]
    found = [
        solve_rounds([rows_of(one, anatomy, None) for one in some], anatomy=anatomy).patches for some in (read, noisy)
    ]
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-4


def test_a_row_that_rounding_took_away_is_not_infinitely_coarse() -> None:
    rows = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)).double()
    rows[::7] = 0.0
    read: Any = SimpleNamespace(reading=SimpleNamespace(update=SimpleNamespace(dtype=torch.float32)))
    one = SpanRound(read, ("query",), rows, (), None, rounding=0.1)
    assert one.coarser is not None
    assert one.coarser.isfinite().all()
    assert noisy_span(rows, 5, 1e-7, one.coarser).s.isfinite().all()
