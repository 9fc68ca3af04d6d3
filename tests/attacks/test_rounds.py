"""Several rounds of one client: stacked, checked to be of one picture, refused where they do
not belong together.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from attacked import db, make, private

import aprillab as al
from aprillab.attacks.closed_forms.stacked_patches import Equations, most_probable_of, stacked
from aprillab.attacks.rounds import read_rounds

LABEL = torch.tensor([3])
NARROW = {"patch_size": 2, "width": 48, "depth": 2, "heads": 3}  # 64 patches, more than the width


def federation(model, pixels, rounds, *, other=None, swapped=(), rate=0.05):
    """Rounds of one client with one picture, a second client's update averaged in between."""
    other = private(model, seed=1) if other is None else other
    found = []
    for number in range(1, rounds + 1):
        mine = other if number in swapped else pixels
        update = al.client_update(model, al.HALF.to_input(mine), LABEL)
        found.append(al.Round(model, update))
        theirs = al.client_update(model, al.HALF.to_input(other), torch.tensor([5]))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in update.gradients:
                    p -= rate * (update.gradients[name] + theirs.gradients[name]) / 2
    return found


@pytest.mark.parametrize("attack", ["embedding", "april"])
def test_a_model_too_narrow_for_one_update_is_inverted_from_two(attack):
    model = make("april" if attack == "april" else "prenorm", **NARROW)
    pixels = private(model)
    rounds = federation(model, pixels, 3)
    with pytest.raises(al.AttackNotApplicable):
        al.invert(model, rounds[:1], attack=attack)
    for some in (rounds[:2], rounds):
        result = al.invert(model, some, attack=attack)
        assert result.exact, result.reason
        assert db(result, pixels) > 100
        assert [r["number"] for r in result.diagnostics["rounds"]] == list(range(1, len(some) + 1))
        assert result.replay.state == "shown"


def test_auto_takes_rounds_too_and_says_which_attack():
    model = make(**NARROW)
    pixels = private(model)
    result = al.invert(model, federation(model, pixels, 2))
    assert result.diagnostics["chosen"] == "embedding"
    assert db(result, pixels) > 100
    assert result.labels.tolist() == [3]


@pytest.mark.parametrize("attack", ["embedding", "april"])
def test_a_round_of_another_picture_is_found_and_left_out(attack):
    model = make("april" if attack == "april" else "prenorm", **NARROW)
    pixels = private(model)
    rounds = federation(model, pixels, 4, swapped=(3,))
    result = al.invert(model, rounds, attack=attack)
    assert [r["number"] for r in result.diagnostics["rounds"] if r["used"]] == [1, 2, 4]
    assert result.exact, result.reason
    assert db(result, pixels) > 100
    assert "left out for another picture: round 3" in result.reason


def test_rounds_of_which_no_two_agree_are_refused_or_said_to_be_mixtures():
    model = make()
    one, two = private(model), private(model, seed=1)
    with pytest.raises(al.AttackNotApplicable, match=r"not of one picture.*one by one"):
        al.embedding_closed_form(model, federation(model, one, 2, other=two, swapped=(2,)))
    both = al.HALF.to_input(torch.cat([one, two]))
    mixed = [al.Round(m, al.client_update(m, both, torch.tensor([3, 5]))) for m in (make(), make(seed=1))]
    result = al.embedding_closed_form(model, mixed, strict=False)
    assert not result.exact
    assert {c.name: c.state for c in result.conditions}["one picture in all rounds"] == "contradicted"


def test_without_the_rounds_weights_the_picture_comes_back_and_is_not_called_exact():
    model = make(**NARROW)
    pixels = private(model)
    sent = make(**NARROW)
    rounds = federation(model, pixels, 2)
    bare = [r.update for r in rounds]
    result = al.embedding_closed_form(model, bare)
    assert db(result, pixels) > 100
    assert not result.exact
    assert result.determined
    assert "al.Round(state, update)" in result.reason
    # The model as it was sent in round 1 gives that round's update.
    assert al.embedding_closed_form(sent, bare).exact


def test_what_a_round_is_of_can_be_a_state_a_module_or_part_of_a_state():
    model = make(**NARROW)
    pixels = private(model)
    rounds = federation(model, pixels, 2)
    arrays = [al.Round({n: t.numpy() for n, t in r.state.items()}, r.update) for r in rounds]
    prefixed = [al.Round({f"module.{n}": t for n, t in r.state.items()}, r.update) for r in rounds]
    for same in (arrays, prefixed):
        assert al.embedding_closed_form(model, same).exact
    read = read_rounds(model, [al.Round({}, rounds[0].update), rounds[1]], al.dissect(model))
    assert not read[0].moved
    assert read[1].moved


def test_a_state_is_copied_when_the_round_is_made():
    model = make()
    update = al.client_update(model, al.HALF.to_input(private(model)), LABEL)
    kept = al.Round(model.state_dict(), update)
    before = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(kept.state["head.weight"], before)


def test_rounds_in_different_precisions_count_by_their_noise():
    model = make(**NARROW, dtype=torch.float32)
    pixels = private(model)
    rounds = federation(model, pixels, 3)
    rounds[2] = replace(rounds[2], update=rounds[2].update.to(dtype=torch.bfloat16))
    result = al.embedding_closed_form(model, rounds)
    two = al.embedding_closed_form(model, rounds[:2])
    assert db(result, pixels) > db(two, pixels) - 1  # a coarse round does no harm
    assert (
        "different precisions (bfloat16, float32)"
        in {c.name: c.text for c in result.conditions}["one picture in all rounds"]
    )


def test_noise_averages_over_rounds_where_least_squares_would_stop():
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(16, 48, generator=generator, dtype=torch.float64) - 0.5
    G = torch.randn(16, 96, generator=generator, dtype=torch.float64)
    noise = 0.05

    def noisy(count):
        return [
            Equations(
                G.T @ X + noise * torch.randn(96, 48, generator=generator, dtype=torch.float64),
                G + noise * torch.randn(16, 96, generator=generator, dtype=torch.float64), noise / 1.2, noise,
            )
            for _ in range(count)
        ]  # fmt: skip

    def error(rounds):
        return float((most_probable_of(stacked(rounds), (torch.zeros(48).double(), 1 / 12)).X - X).square().mean())

    one, many = error(noisy(4)), error(noisy(256))
    assert 10 * math.log10(one / many) > 15  # averaging promises 18 dB


def test_a_mean_square_error_is_predicted_for_the_stack():
    model = make(**NARROW, dtype=torch.float32)
    pixels = private(model)
    result = al.embedding_closed_form(model, federation(model, pixels, 3))
    assert result.predicted_psnr == pytest.approx(db(result, pixels), abs=4)


# --- Bad input ----------------------------------------------------------------------------------------------------


def first(model):
    return al.Round(model, al.client_update(model, al.HALF.to_input(private(model)), LABEL))


def test_a_round_of_another_model_is_refused_with_its_number():
    model = make()
    good = first(model)
    other = make(depth=1)
    with pytest.raises(al.UpdateError, match=r"round 2: .*lacks the gradient"):
        al.invert(model, [good, first(other)])
    with pytest.raises(al.UpdateError, match=r"round 2: .*has shape"):
        al.invert(model, [good, al.Round(make(width=48), good.update)])
    with pytest.raises(al.UpdateError, match=r"round 1: its state has 'nothing'"):
        al.invert(model, [al.Round({"nothing": torch.ones(1)}, good.update), good])


def test_a_frozen_tensor_that_moved_is_named():
    model = make(position="frozen")
    good = first(model)
    moved = {name: tensor + 0.1 if name == "position_embedding" else tensor for name, tensor in good.state.items()}
    with pytest.raises(al.UpdateError, match=r"round 2: position_embedding is frozen .*requires_grad_"):
        al.invert(model, [good, al.Round(moved, good.update)])
    # A copy in half precision has not moved: the model's own numbers are the ones that were sent.
    rounded = {**good.state, "position_embedding": good.state["position_embedding"].half()}
    read = read_rounds(model, [al.Round(rounded, good.update)], al.dissect(model))
    assert torch.equal(read[0].weights["position_embedding"], good.state["position_embedding"])


def test_numbers_that_are_none_are_refused():
    model = make()
    good = first(model)
    broken = {**good.state, "head.weight": torch.full_like(good.state["head.weight"], math.nan)}
    with pytest.raises(al.UpdateError, match=r"round 1: \d+ of \d+ numbers of head.weight are NaN"):
        al.invert(model, [al.Round(broken, good.update), good])


@pytest.mark.parametrize(
    ("updates", "words"),
    [([], "empty"), (["a"], "round 1 must be"), ({"a": 1}, "not a dict"), (3, "not a int")],
)
def test_what_is_no_sequence_of_rounds_is_refused(updates, words):
    with pytest.raises(al.UpdateError, match=words):
        al.invert(make(), updates)


def test_a_round_needs_a_state_and_an_update():
    model = make()
    with pytest.raises(al.UpdateError, match="mapping of name to tensor"):
        al.Round([1, 2], first(model).update)
    with pytest.raises(al.UpdateError, match="must be a ClientUpdate"):
        al.Round(model, {"a": 1})


def test_attacks_that_read_one_update_say_so():
    model = make()
    pair = [first(model), first(model)]
    for attack in ("match:april", "span_then_match", "span_then_round"):
        with pytest.raises(al.UpdateError, match=r"reads one update, and 2 rounds were given"):
            al.invert(model, pair, attack=attack)


def test_april_needs_to_know_each_rounds_weights():
    model = make("april", **NARROW)
    bare = [r.update for r in federation(model, private(model), 2)]
    with pytest.raises(al.AttackNotApplicable, match=r"round 1: the values of .* al.Round\(state, update\)"):
        al.april_closed_form(model, bare)


# --- Random federations -------------------------------------------------------------------------------------------


KINDS = (
    "one picture",
    "one other",
    "two halves",
    "all others",
    "a batch",
    "mixed precision",
    "wrong state",
    "noise",
    "bare",
)


@pytest.mark.parametrize("seed", range(45))
def test_no_random_federation_is_called_exact_wrongly(seed):
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    block, kind = draw.choice(["prenorm", "prenorm", "april"]), KINDS[seed % len(KINDS)]
    dtype = draw.choice([torch.float32, torch.float64])
    model = make(
        block, image_size=16, patch_size=draw.choice([2, 4, 8]), width=draw.choice([24, 36, 48, 96]),
        heads=2, depth=draw.choice([1, 2]), classes=draw.choice([2, 5, 10]), seed=seed, dtype=dtype,
    )  # fmt: skip
    pictures = [private(model, seed=seed + i) for i in range(3)]
    rounds = []
    for number in range(draw.choice([2, 3, 5])):
        other = (kind == "one other" and number == 1) or (kind == "two halves" and number % 2)
        shown = pictures[1] if other else pictures[0]
        if kind == "all others":
            shown = private(model, seed=1000 * seed + number)
        if kind == "a batch":
            shown = torch.cat(pictures[:2])
        update = al.client_update(model, al.HALF.to_input(shown), torch.ones(len(shown), dtype=torch.int64))
        sent, step = dict(model.state_dict()), update
        if kind == "noise":
            noisy = {
                n: g + 1e-4 * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator).to(g)
                for n, g in update.gradients.items()
            }
            update = al.ClientUpdate(noisy)
        if kind == "mixed precision" and number % 2:
            update = update.to(dtype=torch.bfloat16)
        if kind == "wrong state" and number == 0:
            sent = {n: t + 0.01 * torch.randn(t.shape, generator=generator).to(t) for n, t in sent.items()}
        rounds.append(update if kind == "bare" else al.Round(sent, update))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 0.05 * step.gradients[name]
    try:
        result = al.invert(model, rounds, strict=draw.random() < 0.5)
    except al.AttackNotApplicable:
        assert kind in ("one other", "two halves", "all others", "a batch", "noise", "mixed precision", "bare")
        return
    if result.exact:
        assert max(db(result, picture) for picture in pictures) > al.EXACT_TO_8_BITS_DB, result.reason


# --- Rounds that say nothing new ----------------------------------------------------------------------------------


def test_a_round_that_is_repeated_counts_once():
    """Noise that is the same in all rounds does not average, and no prediction may say so."""
    model = make(width=96, dtype=torch.float32)
    pixels = private(model)
    generator = torch.Generator().manual_seed(0)
    update = first(model).update
    noisy = {
        n: g + 3e-5 * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator)
        for n, g in update.gradients.items()
    }
    one = al.Round(model, al.ClientUpdate(noisy))
    alone, often = al.embedding_closed_form(model, one), al.embedding_closed_form(model, [one] * 16)
    assert often.predicted_psnr == pytest.approx(alone.predicted_psnr)
    assert db(often, pixels) == pytest.approx(db(alone, pixels))
    other = al.Round(model, first(model).update)
    twice = al.embedding_closed_form(model, [one, other, one])
    assert "counted once, for it repeats another: 3" in twice.reason or "3" in str(twice.conditions)


def test_a_round_in_which_the_client_did_nothing_is_passed_over():
    model = make()
    rounds = federation(model, private(model), 2)
    idle = al.ClientUpdate({name: torch.zeros_like(g) for name, g in rounds[0].update.gradients.items()})
    result = al.embedding_closed_form(model, [rounds[0], al.Round({}, idle), rounds[1]])
    assert result.exact, result.reason
    assert [entry["number"] for entry in result.diagnostics["rounds"]] == [1, 3]
    with pytest.raises(al.UpdateError, match="round 1: all gradients are zero"):
        al.embedding_closed_form(model, [idle, idle])


def test_any_iterable_of_rounds_will_do_and_a_pair_is_told_how():
    model = make()
    rounds = federation(model, private(model), 2)
    assert al.embedding_closed_form(model, (one for one in rounds)).exact
    with pytest.raises(al.UpdateError, match=r"al.Round\(state, update\) puts the two together"):
        al.embedding_closed_form(model, (dict(model.state_dict()), rounds[0].update))
