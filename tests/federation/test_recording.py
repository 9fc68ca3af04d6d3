"""A recording is written whole, read without trust, and what is cut off costs nothing but itself."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import private_batch, tiny_vit

import aprillab as al
from aprillab.federation import (
    Fault,
    LocalTraining,
    Recorder,
    Recording,
    Reply,
    example_recording,
    read_recording,
    train_locally,
)
from aprillab.update import UpdateError

HOW = LocalTraining(learning_rate=0.5, steps=2)
ROUNDS, CLIENTS = 2, ("anna", "ben")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two clients, two rounds."""
    recorder = Recorder(tmp_path / "recording")
    for number in range(1, ROUNDS + 1):
        assert recorder.open_round() == number
        model = tiny_vit(torch.float32, seed=number)
        sent = recorder.keep_sent(model.state_dict())
        for node, name in enumerate(CLIENTS):
            state = train_locally(model, *private_batch(model, seed=node), HOW)
            file = f"round-{number:04d}-reply-{node}.safetensors"
            reply = Reply(
                number, number, name, str(node), sent, file, {**HOW.to_config(), "server-round": number},
                {"name": name}, {"num-examples": 1, "loss": math.nan},
            )  # fmt: skip
            assert recorder.keep_reply(reply, state) == ""
        recorder.close_round()
    return recorder.folder


def everything(recording: Recording) -> dict[tuple[str, int], torch.Tensor]:
    """A tensor of each update that can be read."""
    return {
        (reply.client, reply.round): recording.round_of(reply).update.gradients["head.bias"]
        for reply in recording.replies
    }


def test_what_is_written_is_read(folder: Path) -> None:
    recording = read_recording(folder)
    assert (recording.clients, recording.rounds, recording.faults, recording.remarks) == (CLIENTS, (1, 2), (), ())
    for node, name in enumerate(CLIENTS):
        for number, one in enumerate(recording.of_client(name), 1):
            model = tiny_vit(torch.float32, seed=number)
            after = train_locally(model, *private_batch(model, seed=node), HOW)
            wanted = al.update_from_states(model.state_dict(), after, learning_rate=0.5, local_steps=2)
            assert all(torch.equal(one.update.gradients[key], g) for key, g in wanted.gradients.items())
            assert (one.update.batch_size, one.update.local_steps) == (1, 2)
    assert len(recording.of_client("ben", rounds=[2])) == 1
    with pytest.raises(UpdateError, match="'ben' has no reply in these rounds; it has in 1, 2"):
        recording.of_client("ben", rounds=[3])
    with pytest.raises(UpdateError, match="clients are anna, ben"):
        recording.of_client("carl")


def test_nothing_is_pickled_and_nothing_is_left_half(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert [name for name in names if not name.endswith((".safetensors", ".json"))] == []
    assert len(names) == ROUNDS * (1 + len(CLIENTS)) + 1
    assert json.loads((folder / "recording.json").read_text())["format"] == "aprillab-recording-1"


def test_a_run_that_is_killed_leaves_the_rounds_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(read_recording(folder))
    recorder = Recorder(folder)
    recorder.open_round()
    recorder.keep_sent(tiny_vit(torch.float32).state_dict())

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        recorder.close_round()
    monkeypatch.undo()
    after = everything(read_recording(folder))
    assert before.keys() == after.keys()
    again = Recorder(folder)  # and the number of the broken round is not used again
    assert again.open_round() == 4


def test_files_are_readable_by_their_owner_alone(folder: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in folder.iterdir()}
    assert modes == {0} or os.name != "posix"


# --- Damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 7, 100, 2000])
def test_a_file_that_is_cut_off_costs_one_reply(folder: Path, keep: int) -> None:
    whole = everything(read_recording(folder))
    path = folder / "round-0001-reply-1.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    recording = read_recording(folder)
    assert set(everything(recording)) == whole.keys() - {("ben", 1)}
    (fault,) = recording.faults
    assert (fault.round, fault.client) == (1, "ben")
    assert "is cut off or foreign" in fault.words
    assert len(recording.of_client("ben")) == 1


def test_a_state_that_is_missing_costs_its_round(folder: Path) -> None:
    (folder / "round-0002-sent.safetensors").unlink()
    recording = read_recording(folder)
    assert recording.rounds == (1,)
    assert [fault.words.split()[-2:] for fault in recording.faults] == [["is", "missing"]] * 2


@pytest.mark.parametrize("keep", [None, 0, 1, 300, 1500])
def test_an_index_that_is_cut_off_is_made_again(folder: Path, keep: int | None) -> None:
    whole = everything(read_recording(folder))
    path = folder / "recording.json"
    if keep is None:
        path.unlink()
    else:
        path.write_text(path.read_text()[:keep])
    recording = read_recording(folder)
    assert everything(recording).keys() == whole.keys()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in everything(recording).items())
    assert "read from what each of the files says of itself" in recording.faults[0].words
    with pytest.raises(UpdateError, match="Name another folder"):
        Recorder(folder)


def _entry(index: dict[str, Any]) -> dict[str, Any]:
    return next(entry for entry in index["replies"] if entry["client"] == "ben" and entry["round"] == 1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda entry: entry.update(file="/etc/x.safetensors"), "name of a safetensors file in the folder"),
        (lambda entry: entry.update(sent="../x.safetensors"), "name of a safetensors file in the folder"),
        (lambda entry: entry.update(file=["a"]), "name of a safetensors file in the folder"),
        (lambda entry: entry.update(file="\x1b[2J.safetensors"), "name of a safetensors file in the folder"),
        (lambda entry: entry.update(file="a" * 300 + ".safetensors"), "name of a safetensors file in the folder"),
        (lambda entry: entry.update(round=-1), "'round' must be an integer"),
        (lambda entry: entry.update(round=True), "'round' must be an integer"),
        (lambda entry: entry.update(round=10**30), "'round' must be an integer"),
        (lambda entry: entry.update(config=[1]), "'config' must be an object"),
        (lambda entry: entry["config"].update({"learning-rate": -1}), "makes no sense"),
        (lambda entry: entry["said"].update({"local-steps": "many"}), "makes no sense"),
        (lambda entry: entry["config"].update({"autocast": []}), "'autocast' must be one of"),
        (lambda entry: entry.clear(), "'round' must be an integer"),
    ],
)
def test_an_entry_that_makes_no_sense_costs_itself(folder: Path, spoil: Callable[[Any], None], words: str) -> None:
    path = folder / "recording.json"
    index = json.loads(path.read_text())
    spoil(_entry(index))
    path.write_text(json.dumps(index))
    recording = read_recording(folder)
    assert set(everything(recording)) == {("anna", 1), ("anna", 2), ("ben", 2)}
    assert any(words in fault.words for fault in recording.faults)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": "aprillab-recording-9"}', "'aprillab-recording-9'"),
        ("[]", "'list'"),
        ('{"format": "aprillab-recording-1", "replies": 3}', "'replies' must be a list"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recording.json").write_text(text)
    with pytest.raises(UpdateError, match=words):
        read_recording(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize("index", [True, False])
def test_nobody_waits_for_a_pipe(folder: Path, index: bool) -> None:
    if not index:
        (folder / "recording.json").unlink()
    path = folder / "round-0001-reply-1.safetensors"
    path.unlink()
    os.mkfifo(path)
    assert set(everything(read_recording(folder))) == {("anna", 1), ("anna", 2), ("ben", 2)}


def test_an_empty_folder_and_none(tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match=r"no recording \(recording.json is missing\)"):
        read_recording(tmp_path)
    with pytest.raises(UpdateError, match="no such folder"):
        read_recording(tmp_path / "nowhere")


def test_faults_and_counts_of_strangers_are_read_with_care(folder: Path) -> None:
    path = folder / "recording.json"
    index = json.loads(path.read_text())
    index["faults"] = [3, {"round": "x", "client": "\x1b[31mbad\n", "words": "\x1b[2Jno\n"}]
    _entry(index)["metrics"] = {"num-examples": 10**12}
    path.write_text(json.dumps(index))
    recording = read_recording(folder)
    assert recording.faults == (Fault(0, "", ""), Fault(0, "[31mbad", "[2Jno"))
    assert recording.of_client("ben")[0].update.batch_size is None


def test_a_client_that_changed_nothing_is_named(folder: Path) -> None:
    (folder / "round-0001-reply-0.safetensors").write_bytes((folder / "round-0001-sent.safetensors").read_bytes())
    recording = read_recording(folder)
    with pytest.raises(UpdateError, match="anna, round 1: the two states are the same"):
        recording.of_client("anna")
    assert len(recording.of_client("anna", rounds=[2])) == 1


# --- The recording that comes along -------------------------------------------------------------------------------


def test_the_recording_that_comes_along() -> None:
    recording = example_recording()
    assert (recording.clients, recording.rounds) == (("batch", "momentum", "one-step"), (1, 2, 3))
    assert recording.faults == recording.remarks == ()
    assert sum(path.stat().st_size for path in recording.folder.iterdir()) < 4e6
    facts = {name: recording.of_client(name)[0].update for name in recording.clients}
    assert (facts["momentum"].local_steps, facts["momentum"].momentum) == (5, 0.9)
    assert [facts[name].batch_size for name in recording.clients] == [8, 1, 1]
    log = (recording.folder / "federation.log").read_text(encoding="utf-8")
    assert "[ROUND 3/3]" in log
    assert "curious server: round 3, kept 3 of 3 replies" in log
    assert "/tmp" not in log
