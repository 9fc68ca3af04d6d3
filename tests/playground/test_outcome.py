"""The client's round, the audit and the truth beside it; and the answers of the
notebook's questions.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch

from aprillab.anatomy import dissect
from aprillab.data import load_victim
from aprillab.playground import CONTROLS, OWN, State, play
from aprillab.playground import outcome as outcome_module
from aprillab.playground.outcome import Outcome, kept_back, model_of, noisy, private_pictures, shared_update
from aprillab.update import ClientUpdate

ATTENTION = [f"{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")]
SMALL = State(width=96, patch=16)


def update_in(state: State) -> ClientUpdate:
    return shared_update(state, model_of(state), private_pictures(state))


def test_all_the_server_can_say_and_what_only_we_know() -> None:
    outcome = play(State())
    assert outcome.best is not None
    assert (outcome.best.attack.name, outcome.best.trust) == ("embedding", "exact")
    assert outcome.true_psnr[0] > 100
    assert outcome.leak is not None
    assert outcome.leak.attack == "embedding"
    assert {attack.name for attack in outcome.searches} >= {"span_then_match", "span_then_round", "match:april"}
    assert torch.equal(outcome.private[0], load_victim("astronaut", 32))


def test_the_same_twice_and_nothing_global_changed() -> None:
    state = State(noise=1e-3, steps=2, width=96)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = play(state), play(state)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.picture is not None
    assert second.picture is not None
    assert torch.equal(first.picture, second.picture)


@pytest.mark.parametrize(
    ("shared", "missing"),
    [
        ("all", set()),
        ("no position", {"position_embedding"}),
        ("no patch", {"patch_embedding.weight", "patch_embedding.bias"}),
        ("no embeddings", {"position_embedding", "class_token", "patch_embedding.weight", "patch_embedding.bias"}),
        (
            "no attention",
            {f"blocks.0.attention.{p}.{k}" for p in ("query", "key", "value") for k in ("weight", "bias")},
        ),
    ],
)
def test_what_is_kept_back_is_not_in_the_update(shared: str, missing: set[str]) -> None:
    state = replace(SMALL, shared=shared)
    names = {name for name, _ in model_of(state).named_parameters()}
    assert set(update_in(state).gradients) == names - missing


def test_head_and_last_block() -> None:
    head = set(update_in(replace(SMALL, shared="head")).gradients)
    assert head == {"head.weight", "head.bias"}
    last = set(update_in(replace(SMALL, shared="last block")).gradients)
    assert {name.partition(".")[0] for name in last} == {"blocks", "norm", "head"}
    assert not any(name.startswith("blocks.0.") for name in last)


@pytest.mark.parametrize("position", ["frozen", "sinusoidal", "sinusoidal 2-D", "none"])
def test_a_position_embedding_that_is_not_trained_has_no_gradient(position: str) -> None:
    state = replace(SMALL, position=position, shared="no position")
    model = model_of(state)
    assert "position_embedding" not in update_in(state).gradients
    assert kept_back("no position", model, dissect(model)) <= {"position_embedding"}


def test_noise_is_relative_to_each_tensor() -> None:
    update = ClientUpdate({"large": torch.full((200, 200), 100.0), "small": torch.full((200, 200), 1e-3)})
    loud = noisy(update, 0.1)
    for name, gradient in update.gradients.items():
        std = float((loud.gradients[name] - gradient).std())
        assert std == pytest.approx(0.1 * float(gradient[0, 0]), rel=0.02)
    assert noisy(update, 0.0) is update


def test_precisions() -> None:
    dtypes = {p: update_in(replace(SMALL, precision=p)).dtype for p in CONTROLS["precision"].choices.values()}
    assert dtypes == {
        "float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32,
    }  # fmt: skip
    exact, cast = (update_in(replace(SMALL, precision=p)).gradients["head.weight"] for p in ("float32", "autocast"))
    assert 1e-4 < float((exact - cast).norm() / exact.norm()) < 0.1


def test_local_steps_are_said_with_their_rate() -> None:
    update = update_in(replace(SMALL, steps=5))
    assert (update.source, update.local_steps, update.learning_rate) == ("fedavg", 5, outcome_module.LEARNING_RATE)
    assert update_in(SMALL).source == "fedsgd"


def test_a_batch_has_the_next_pictures_and_other_labels() -> None:
    state = replace(SMALL, picture="grass", batch=4)
    pictures = private_pictures(state)
    assert torch.equal(pictures[0], load_victim("grass", 32))
    assert torch.equal(pictures[1], load_victim("astronaut", 32))
    outcome = play(state)
    assert outcome.found is not None
    assert outcome.found.labels is not None
    assert outcome.found.labels.labels.tolist() == [3, 4, 5, 6]
    assert len(outcome.true_psnr) in (0, 4)


def test_a_picture_of_ones_own() -> None:
    own = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    outcome = play(State(picture=OWN), own)
    assert torch.equal(outcome.private[0], own)
    assert outcome.true_psnr[0] > 59
    with pytest.raises(ValueError, match="none was given"):
        play(State(picture=OWN))
    with pytest.raises(ValueError, match=r"shape \(3, 64, 64\)"):
        play(State(picture=OWN), torch.zeros(3, 64, 64))


def test_a_client_that_fails_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome_module, "LEARNING_RATE", 1e30)
    outcome = play(replace(SMALL, steps=5))
    assert outcome.found is None
    assert outcome.best is None
    assert outcome.picture is None
    assert outcome.leak is None
    assert outcome.searches == ()
    assert "no usable gradient" in outcome.refused or "not finite" in outcome.refused


@pytest.mark.slow
def test_every_choice_is_played_within_seconds() -> None:
    seconds = []
    for name, control in CONTROLS.items():
        for value in control.choices.values():
            if name == "picture" or value == getattr(State(), name):
                continue
            outcome = play(replace(State(), **{name: value}))
            assert outcome.found is not None, outcome.refused
            seconds.append(outcome.seconds)
    assert len(seconds) > 25
    assert statistics.median(seconds) < 3


# --- The notebook's five questions --------------------------------------------------------------------------------


def trust(**choices: object) -> str:
    outcome = play(State(**choices))  # type: ignore[arg-type]
    return "no attack" if outcome.best is None else outcome.best.trust


@pytest.mark.parametrize(("patch", "enough", "too_few"), [(8, 256, 192), (4, 128, 96)])
def test_first_answer_both_embeddings_and_the_width(patch: int, enough: int, too_few: int) -> None:
    assert trust(shared="no embeddings", patch=patch, width=enough) == "exact"
    narrow = play(State(shared="no embeddings", patch=patch, width=too_few))
    assert max(narrow.true_psnr) < 20
    assert narrow.leak is not None
    assert narrow.leak.attack is None


def test_second_answer_the_span_attack_takes_over() -> None:
    outcome = play(State(shared="no position"))
    assert outcome.best is not None
    assert (outcome.best.attack.name, outcome.best.trust) == ("span", "exact")
    nothing = play(State(shared="no position", position="none"))
    assert nothing.best is None
    assert nothing.found is not None
    assert "nothing tells the patches apart" in nothing.found.findings[-1].reason


def test_third_answer_noise() -> None:
    def played(noise: float) -> Outcome:
        return play(State(noise=noise))

    assert [trust(noise=noise) == "exact" for noise in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)] == [True, True] + 3 * [False]
    assert max(played(1e-2).true_psnr) == pytest.approx(26, abs=1.5)
    assert max(played(0.1).true_psnr) == pytest.approx(14, abs=1.5)
    assert max(play(State(noise=0.1, picture="chelsea")).true_psnr) > 18


def test_fourth_answer_a_batch_helps_and_steps_do_not() -> None:
    outcome = play(State(batch=2))
    assert outcome.best is not None
    assert outcome.best.trust == "mixture"
    assert outcome.found is not None
    assert outcome.found.labels is not None
    assert outcome.found.labels.labels.tolist() == [3, 4]
    assert trust(steps=5) == "exact"


def test_fifth_answer_sinusoids_protect_by_rounding() -> None:
    assert max(play(State(position="sinusoidal")).true_psnr) == pytest.approx(21, abs=2)
    assert trust(position="sinusoidal", precision="float64") == "exact"
