"""A cheating server behind Flower's own SecAgg+: what is in the sum, who is gone, and the
command that plays it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("flwr")

from flwr.app import Message
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from studied import broken, write_tables

import aprillab as al
from aprillab.comparison.parallel import HERE
from aprillab.federation import FlowerMissing, LocalTraining
from studies._rows import StudyError
from studies._rows import read as rows_of
from studies._runner import RESULTS
from studies.cheating import clients, secure, secure_shown
from studies.cheating.secure import FISHED, HONEST, SILENCED, Case, measured, owners, sent_to
from studies.cheating.secure_sum import (
    FIRST,
    Owner,
    Precision,
    Round,
    foretold,
    noise_of,
    picture_of,
    play,
    update_of,
)

STEP = LocalTraining(learning_rate=0.1)
SHARP = Precision(max_weight=1.0)
NAMES = ("astronaut", "coffee", "chelsea")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Narrower than the study's: the width is not in what is tested."""
    return al.VisionTransformer(**clients.SMALL | {"width": 96}, classes=20, seed=0).eval()


@pytest.fixture(scope="module")
def everyone() -> list[Owner]:
    return secure_shown.clients_of(NAMES, 1)


def played_with(model: nn.Module, everyone: list[Owner], way: str, **options: object) -> Round:
    sent = sent_to(model, way, secure_shown.LABEL + secure_shown.FISHED_FOR, len(everyone))
    return play(model, sent, everyone, STEP, precision=SHARP, **options)  # type: ignore[arg-type]


def psnr(model: nn.Module, played: Round, name: str = NAMES[0], node: int = FIRST) -> float:
    pixels = picture_of(model, played, node).pixels[0]
    return float(al.psnr(pixels, secure_shown.photograph(name)[0].to(pixels)))


# --- The sum ------------------------------------------------------------------------------------------------------


def test_silenced_clients_leave_the_sum_to_one(model: nn.Module, everyone: list[Owner]) -> None:
    played = played_with(model, everyone, SILENCED)
    assert played.pictures == {1: 1, 2: 1, 3: 1}
    assert psnr(model, played) > 60
    quiet = played.sent[1]
    reply = everyone[1].trained(model, quiet, STEP)
    moved = [name for name in quiet if not torch.equal(reply[name], quiet[name])]
    assert moved == ["head.weight", "head.bias"]


def test_an_honest_sum_is_nobodys_picture(model: nn.Module, everyone: list[Owner]) -> None:
    played = played_with(model, everyone, HONEST)
    assert max(psnr(model, played, name) for name in NAMES) < 15


def test_a_class_is_fished_through_the_sum_by_one_model_for_all(model: nn.Module) -> None:
    several = secure_shown.clients_of(NAMES, 3)
    played = played_with(model, several, FISHED)
    assert len({al.dishonest.fingerprint(state) for state in played.sent}) == 1
    assert psnr(model, played, NAMES[1], node=2) > 50
    assert max(psnr(model, played, name, node=2) for name in (NAMES[0], NAMES[2])) < 15


def test_the_update_is_the_clients_gradient_but_for_the_quantization(model: nn.Module, everyone: list[Owner]) -> None:
    played = played_with(model, everyone, SILENCED)
    found = update_of(model, played).gradients
    own = al.client_update(model, everyone[0].images, everyone[0].labels).gradients
    body = [name for name in own if not name.startswith("head")]
    error = torch.cat([(found[name] - own[name]).flatten().double() for name in body])
    assert float(error.square().mean().sqrt()) == pytest.approx(noise_of(played), rel=0.1)
    assert noise_of(played) == pytest.approx(3 * foretold(played) / STEP.learning_rate)
    head = (found["head.weight"] - own["head.weight"]).norm()
    assert head > 0.1 * own["head.weight"].norm()  # the silenced ones' heads move


def test_silence_for_good_outlasts_the_first_step(model: nn.Module) -> None:
    owner, how = secure_shown.clients_of(NAMES, 3)[1], LocalTraining(learning_rate=0.1, steps=3)

    def moved(state: dict[str, torch.Tensor]) -> set[str]:
        reply = owner.trained(model, state, how)
        return {name for name in state if not torch.equal(reply[name], state[name])}

    assert moved(al.dishonest.silenced(model, for_good=True)) == {"head.bias"}
    assert "patch_embedding.weight" in moved(al.dishonest.silenced(model))


# --- Who is gone --------------------------------------------------------------------------------------------------


def gone(*nodes: int) -> Callable[[Message], bool]:
    """They answer until the keys are shared, and no longer."""
    after = (Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK)

    def lost(message: Message) -> bool:
        stage = message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE]
        return message.metadata.dst_node_id in nodes and stage in after

    return lost


@pytest.mark.timeout(60)
def test_a_client_that_dies_leaves_no_hang(model: nn.Module, everyone: list[Owner]) -> None:
    without = played_with(model, everyone, SILENCED, lost=gone(3))
    assert list(without.pictures) == [1, 2]
    assert psnr(model, without) > 60
    without = played_with(model, everyone, SILENCED, lost=gone(1))
    with pytest.raises(ValueError, match="node 1 is not in the sum: it is of nodes 2, 3"):
        picture_of(model, without)
    halted = played_with(model, everyone, SILENCED, lost=gone(2, 3))
    assert not halted.average
    with pytest.raises(ValueError, match="there is none, the round was halted"):
        picture_of(model, halted)


# --- The study ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [SILENCED, FISHED])
def test_the_wanted_class_is_one_pictures(way: str) -> None:
    everyone, wanted = owners(Case(way, "random", 8.0, 1.0, 0.1, 1, 4, 2, 1))
    assert [len(owner.images) for owner in everyone] == [4 if way == FISHED else 1, 4, 4]
    labels = torch.cat([owner.labels for owner in everyone])
    assert (labels == wanted).nonzero().flatten().tolist() == [0]


def test_a_case_is_measured() -> None:
    (row,) = measured(Case(SILENCED, "random", 8.0, 1.0, 0.1, 1, 1, 0, 0))
    assert row.psnr is not None
    assert row.unrounded is not None
    assert 60 < row.psnr < row.unrounded - 30
    assert row.psnr == pytest.approx(row.predicted, abs=8)
    assert row.floor == pytest.approx(row.foretold, rel=0.05)
    assert row.moved == 0


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"psnr": 50.0}, "the honest sum gives at most"),
        ({"psnr": 50.0}, "at Flower's default of 1000"),
        ({"psnr": 50.0}, "Silence lasts one step"),
        ({"psnr": 20.0}, "came back with at least"),
        ({"psnr": 20.0}, "is 20 dB"),
        ({"psnr": 20.0}, "a head of zeros stays one"),
        ({"predicted": 20.0}, "within {secure_apart:.0f} dB"),
        ({"floor": 1.0}, "to {secure_off:.1f} %"),
        ({"moved": 0.1}, "zero below the head"),
    ],
)
def test_claims_can_fail(tmp_path: Path, change: dict[str, float], phrase: str) -> None:
    assert broken(RESULTS, argparse.Namespace(), secure) == []
    write_tables(tmp_path, {secure.FILE: rows_of(RESULTS / secure.FILE, secure.Row).assign(**change)})
    assert any(phrase in said for said in broken(tmp_path, argparse.Namespace(), secure))


def missing() -> None:
    raise FlowerMissing("Flower is not installed. Install it")


def test_without_flower_what_was_measured_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure, "need_flower", missing)
    options = argparse.Namespace(quick=True, workers=HERE)
    with pytest.raises(StudyError, match="Install it"):
        secure.measure(tmp_path, options)
    (tmp_path / secure.FILE).write_text("way\n")
    secure.measure(tmp_path, options)
    assert (tmp_path / secure.FILE).read_text() == "way\n"


# --- The command --------------------------------------------------------------------------------------------------


def test_the_command_plays_three_rounds_and_writes_the_picture(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(secure_shown, "model_of", lambda name: model)
    secure.main(["--out", str(tmp_path / "new"), "--clients", *NAMES])
    said = capsys.readouterr().out.splitlines()
    lines = [line.split() for line in said if line.startswith((HONEST, SILENCED, FISHED))]
    decibels = {(way, client): float(db) for way, client, _, _, _, db, *_ in lines}
    compared = {(way, client): same for way, client, _, _, same, *_ in lines}
    looks = {(way, client): " ".join(words) for way, client, _, _, _, _, *words in lines}
    assert len(lines) == 9
    assert max(decibels[HONEST, name] for name in NAMES) < 15
    assert decibels[SILENCED, "astronaut"] > 55
    assert decibels[FISHED, "coffee"] > 45
    assert [compared[SILENCED, name] for name in NAMES] == ["no", "yes", "yes"]
    assert {compared[way, name] for way in (HONEST, FISHED) for name in NAMES} == {"yes"}
    assert looks[SILENCED, "astronaut"] == "nothing"
    assert looks[SILENCED, "coffee"] == "jump, still body"
    assert all("head rows" in looks[FISHED, name] for name in NAMES)
    assert (tmp_path / "new" / "silenced.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clients", "coffee", "coffee", "chelsea"], "three different photographs"),
        (["--clients", "coffee", "nobody", "chelsea"], "three different photographs"),
        (["--max-weight", "0"], "is not between 1 and 10000"),
        (["--learning-rate", "-1"], "learning_rate"),
        (["--out", "/dev/null/there"], "no folder"),
    ],
)
def test_wrong_words_are_told_before_anything_is_played(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        secure.main(words)
    assert said in f"{ended.value} {capsys.readouterr().err}"


def test_without_flower_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure, "need_flower", missing)
    with pytest.raises(SystemExit, match="secure: Flower is not installed"):
        secure.main([])
