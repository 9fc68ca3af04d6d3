"""A curious server follows its strategy to the letter, and what it keeps is what was sent."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    FedProx,
)
from small_federation import TOLD, client_app, curious, federate, model, private, trained, two

import aprillab as al
from aprillab.federation import LocalTraining, NearbyGrid, Reply, read_recording
from aprillab.update import Round, UpdateError


def quiet(**options: Any) -> FedAvg:
    return FedAvg(fraction_evaluate=0.0, **options)


class OwnStart(FedAvg):
    """As apps have it that write checkpoints: a start of its own, and a setting made
    after the strategy.
    """

    checkpoints = 0

    def set_path(self, path: str) -> None:
        self.path = path

    def start(self, grid: Any, initial_arrays: ArrayRecord, num_rounds: int = 3, **options: Any) -> Any:
        self.checkpoints += 1
        return super().start(grid, initial_arrays, num_rounds=num_rounds, **options)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.checkpoints += 1
        return super().aggregate_train(server_round, replies)


STRATEGIES = {
    "FedAvg": quiet,
    "FedProx": lambda: FedProx(fraction_evaluate=0.0, proximal_mu=0.1),
    "FedAdam": lambda: FedAdam(fraction_evaluate=0.0),
    "FedMedian": lambda: FedMedian(fraction_evaluate=0.0),
    "own start": lambda: OwnStart(fraction_evaluate=0.0),
    "DP, server": lambda: DifferentialPrivacyServerSideFixedClipping(quiet(), 0.0, 0.1, 2),
    "DP, client": lambda: DifferentialPrivacyClientSideFixedClipping(quiet(), 0.0, 1000.0, 2),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_model_is_the_same_and_every_update_is_kept(name: str, tmp_path: Path) -> None:
    mods = [fixedclipping_mod] if name == "DP, client" else []
    alone = federate(STRATEGIES[name](), two(), mods=mods)
    watched = federate(curious(STRATEGIES[name](), tmp_path), two(), mods=mods)
    assert alone.keys() == watched.keys()
    assert all(torch.equal(alone[key], watched[key]) for key in alone)
    recording = read_recording(tmp_path / "recording")
    assert (recording.clients, recording.rounds, recording.faults) == (("anna", "ben"), (1, 2), ())
    for node, client in enumerate(recording.clients):
        rounds = recording.of_client(client)
        assert all(torch.equal(rounds[0].state[key], value) for key, value in model().state_dict().items())
        for one in rounds:
            after = trained(node, one.state, TOLD)
            wanted = al.update_from_states(one.state, after, learning_rate=0.5, local_steps=2, momentum=0.9)
            assert (one.update.local_steps, one.update.momentum, one.update.batch_size) == (2, 0.9, 1)
            for key, gradient in wanted.gradients.items():
                torch.testing.assert_close(one.update.gradients[key], gradient, rtol=0, atol=3e-6)


def test_a_start_of_ones_own_runs_and_attributes_are_reached(tmp_path: Path) -> None:
    strategy = curious(OwnStart(fraction_evaluate=0.0), tmp_path)
    strategy.set_path("here")
    strategy.min_train_nodes = 1
    federate(strategy, two())
    assert (strategy.checkpoints, strategy.strategy.path) == (3, "here")
    assert strategy.strategy.min_train_nodes == 1
    with pytest.raises(AttributeError, match="no_such"):
        _ = strategy.no_such
    assert "configure_train" not in vars(strategy.strategy)  # as before


def test_the_picture_is_inverted_from_what_was_kept(tmp_path: Path) -> None:
    federate(curious(quiet(), tmp_path), two(), rounds=1)
    (one,) = read_recording(tmp_path / "recording").of_client("ben")
    sent = model()
    sent.load_state_dict(dict(one.state))
    found = al.invert(sent, one.update)
    assert found.exact
    torch.testing.assert_close(found.images.float(), private(1)[0], rtol=0, atol=1e-4)


def test_updates_are_handed_over_before_they_are_aggregated(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    strategy = curious(
        OwnStart(fraction_evaluate=0.0), tmp_path, on_update=lambda reply, one: seen.append(_of(reply, one, strategy))
    )
    federate(strategy, two())
    assert sorted(seen) == [("anna", 1, 1), ("anna", 2, 2), ("ben", 1, 1), ("ben", 2, 2)]
    assert strategy.recording.clients == ("anna", "ben")


def _of(reply: Reply, one: Round, strategy: Any) -> tuple[str, int, int]:
    assert isinstance(one, Round)
    return reply.client, reply.round, strategy.checkpoints  # 1 for the start, 1 for each round that is aggregated


def test_without_a_callback_no_model_is_held_after_the_round(tmp_path: Path) -> None:
    strategy = curious(quiet(), tmp_path)
    federate(strategy, two())
    held = [value for value in vars(strategy).values() if isinstance(value, torch.Tensor | ArrayRecord)]
    assert (held, strategy._sent, strategy._recorder._shapes) == ([], [], {})


# --- What is known of the training --------------------------------------------------------------------------------


def test_what_a_client_says_of_itself_counts(tmp_path: Path) -> None:
    federate(curious(quiet(), tmp_path), two(**{"local-steps": 7}), rounds=1)
    recording = read_recording(tmp_path / "recording")
    assert [recording.of_client(name)[0].update.local_steps for name in recording.clients] == [2, 7]


def test_without_a_learning_rate_the_update_is_right_up_to_a_factor(tmp_path: Path) -> None:
    federate(curious(quiet(), tmp_path), two(), rounds=1, config={"eta": 0.1})
    recording = read_recording(tmp_path / "recording")
    assert "no learning rate was sent to anna, ben" in recording.remarks[0]
    assert "local steps anna, ben took was not sent" in recording.remarks[1]
    (one,) = recording.of_client("anna")
    sent = model()
    sent.load_state_dict(dict(one.state))
    assert al.invert(sent, one.update).exact  # one step of 0.1: the replay finds the factor
    told = read_recording(tmp_path / "recording", how={"lr": 0.1, "local-steps": 1})
    assert told.remarks == ()
    (other,) = told.of_client("anna")
    for name, gradient in other.update.gradients.items():
        torch.testing.assert_close(gradient, one.update.gradients[name] * 10)
    in_all = read_recording(tmp_path / "recording", how=LocalTraining(learning_rate=0.2))
    assert in_all.of_client("anna")[0].update.learning_rate == 0.2


# --- Faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("nan", "are NaN or infinite"),
        ("shape", "and was sent with"),
        ("few", "1 of 40 tensors are missing"),
        ("more", "1 tensors were never sent, '__metadata__' first"),
        ("bytes", "its arrays cannot be read"),
        ("raise", "failed (code 2: is full)"),
    ],
)
def test_what_a_client_does_wrong_is_said_and_the_others_are_kept(does: str, words: str, tmp_path: Path) -> None:
    with contextlib.suppress(Exception):  # FedAvg itself stumbles over most of these: to the letter
        federate(curious(quiet(), tmp_path), two(does=does), rounds=1)
    recording = read_recording(tmp_path / "recording")
    assert recording.clients == ("anna",)
    assert len(recording.of_client("anna")[0].update.gradients) > 30
    (fault,) = recording.faults
    assert fault.round == 1
    assert words in fault.words
    with pytest.raises(UpdateError, match="no reply of 'ben' can be used"):
        recording.of_client("ben")


def test_a_silent_client_and_one_that_takes_anothers_name(tmp_path: Path) -> None:
    nodes = [*two(name="anna"), {"partition-id": 2}]
    strategy = curious(quiet(), tmp_path)
    federate(strategy, nodes, rounds=1)
    names = strategy.recording.clients
    assert len(names) == 3
    assert "anna" in names
    assert sum(name.startswith("anna (") for name in names) == 1
    late = curious(quiet(), tmp_path / "late")
    federate(late, two(), rounds=1, timeout=0.0)
    assert [fault.words for fault in late.recording.faults] == ["sent no reply before the round ended"] * 2


class TurnsAbout(FedAvg):
    """Sends in the other order every second round, so that replies come in the other order."""

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        return sorted(messages, key=lambda m: m.metadata.dst_node_id, reverse=server_round % 2 == 0)


@pytest.mark.parametrize("name", ["anna", "anna" * 40])
def test_two_of_one_name_are_not_mixed_up_between_rounds(name: str, tmp_path: Path) -> None:
    strategy = curious(TurnsAbout(fraction_evaluate=0.0), tmp_path)
    federate(strategy, [{"partition-id": 0, "name": name}, {"partition-id": 1, "name": name}], rounds=3)
    recording = strategy.recording
    nodes = [{reply.node for reply in recording.replies_of(client)} for client in recording.clients]
    assert sorted(nodes, key=min) == [{"1"}, {"2"}]


def test_a_server_that_starts_again_goes_on_with_the_recording(tmp_path: Path) -> None:
    for _ in range(2):
        federate(curious(quiet(), tmp_path), two())
    recording = read_recording(tmp_path / "recording")
    assert recording.rounds == (1, 2, 3, 4)
    assert [reply.server_round for reply in recording.replies_of("ben")] == [1, 2, 1, 2]
    assert len(recording.of_client("ben")) == 4


def test_a_recording_of_another_model_is_not_gone_on_with(tmp_path: Path) -> None:
    federate(curious(quiet(), tmp_path), two(), rounds=1)
    strategy = curious(quiet(), tmp_path)
    grid = NearbyGrid(client_app(), two())
    strategy._configure = lambda *_: _messages()
    with pytest.raises(UpdateError, match=r"another model \(.*there, .* here\): name another folder"):
        strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    assert len(read_recording(tmp_path / "recording").replies) == 2


def _messages() -> list[Any]:
    class Sent:
        content = type("Content", (), {})()
        metadata = None

    Sent.content.array_records = {"arrays": ArrayRecord({"weight": torch.ones(2)})}
    Sent.content.config_records = {}
    return [Sent()]


@pytest.mark.parametrize("what", ["keep_reply", "keep_sent"])
def test_a_full_disk_costs_the_recording_and_not_the_federation(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = curious(quiet(), tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(strategy._recorder, what, full)
    logging.getLogger("flwr").propagate = True
    try:
        watched = federate(strategy, two())
    finally:
        logging.getLogger("flwr").propagate = False
    alone = federate(quiet(), two())
    assert all(torch.equal(alone[key], watched[key]) for key in alone)
    assert "No space left on device" in caplog.text
    assert len(strategy.recording.faults) == 4


def test_what_is_no_strategy_of_todays_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match="older interface"):
        curious(object(), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UpdateError, match="cannot be written"):
        curious(quiet(), tmp_path / "file")
