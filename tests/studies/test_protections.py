"""Flower's protections: what passes on the wire, what each part measures, and claims that can fail."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, Message, RecordDict
from matplotlib.axes import Axes
from studied import broken, write_tables

from studies._runner import page
from studies.protections import clients, clipping, noise, pictures, processes, secure
from studies.protections.__main__ import PARTS, describe
from studies.protections.wire import Wire, quiet

QUICK = argparse.Namespace(quick=True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of half the width: neither is in what is tested (one block makes G
    badly conditioned).
    """
    monkeypatch.setitem(clients.SHAPE, "depth", 2)
    monkeypatch.setitem(clients.SHAPE, "width", 96)


# --- The wire -----------------------------------------------------------------------------------------------------


def test_all_that_passes_is_kept_as_it_was_sent_and_counted(small: None) -> None:
    everyone = clients.owners("coffee", 2)
    state = clients.model_of(0).state_dict()
    wire = Wire([clients.client_app(owner) for owner in everyone], lost=lambda m: m.metadata.dst_node_id == 2)
    content = RecordDict({"arrays": ArrayRecord(state), "config": clients.config_of(0.1)})
    answers = wire.run(lambda grid: grid.send_and_receive([Message(content, node, "train") for node in (1, 2)]))
    assert [answer.has_error() for answer in answers] == [False, True]
    answers[0].content["arrays"] = ArrayRecord()  # as a strategy may
    ((asked, answered),) = wire.seen
    assert asked.metadata.dst_node_id == answered.metadata.src_node_id == clients.FIRST
    torch.testing.assert_close(
        answered.content["arrays"].to_torch_state_dict(), everyone[0].trained(state, 0.1), rtol=0, atol=0
    )
    assert wire.messages == 3
    assert wire.bytes_to > 2 * wire.bytes_back * 0.9 > sum(4 * value.numel() for value in state.values())


def test_numpy_goes_on_where_it_was() -> None:
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.RandomState(5).rand(2)
    with quiet(7):
        assert np.random.rand() == np.random.RandomState(7).rand()  # noqa: NPY002
    np.testing.assert_array_equal(np.random.rand(2), expected)  # noqa: NPY002


# --- Noise --------------------------------------------------------------------------------------------------------


def test_the_mods_noise_is_that_of_its_formula_and_goes_with_the_seed(small: None) -> None:
    (row,) = noise.measured(noise.Case(1e6, "coffee", 0))
    assert row.sigma == pytest.approx(4.845e-6, rel=1e-3)
    assert row.psnr == pytest.approx(row.predicted_psnr, abs=4)
    assert 35 < row.psnr < 60
    assert row.psnr == pytest.approx(row.ours, abs=8)
    assert row.seeded > row.psnr + 40
    assert row.exact is False
    before, owner = clients.model_of(0).state_dict(), clients.owners("coffee")[0]
    after, trained = noise.reply_of(noise.Case(1.0, "coffee", 0)), owner.trained(before, clients.RATE)
    change = {name: trained[name].double() - before[name].double() for name in before}
    scale = min(1.0, noise.CLIP / math.sqrt(sum(float(c.square().sum()) for c in change.values())))
    added = torch.cat([(after[n].double() - before[n].double() - scale * change[n]).flatten() for n in before])
    assert float(added.std()) == pytest.approx(noise.deviation_of(1.0), rel=0.01)


def test_what_its_epsilon_is_worth() -> None:
    assert noise.worth(1) < 1 < noise.worth(1, replaced=True)
    assert noise.worth(100) > 200
    assert noise.worth(noise.honest_up_to()) == pytest.approx(noise.honest_up_to())


def test_rounds_are_of_one_client_and_say_more_than_one(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "ROUNDS", (1, 3))
    one, three = noise.over_rounds(noise.Repeated(0.1, 1e5, "coffee"))
    assert (one.rounds, three.rounds) == (1, 3)
    assert three.psnr > one.psnr + 1
    assert one.psnr == pytest.approx(one.promised, abs=1e-9)
    assert three.together == pytest.approx(3 * one.together, rel=0.01)


# --- Clipping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["client", "server"])
def test_clipping_leaves_the_picture_to_the_server_and_to_nobody_else(where: str, small: None) -> None:
    received, published = clipping.measured(clipping.Case(f"{where}-side fixed clipping", "coffee", 0))
    assert received.exact is True
    assert received.psnr > 100
    assert (received.norm == pytest.approx(1, abs=1e-4)) == (where == "client")
    assert published.deviation == pytest.approx(1 / 3, rel=0.01)
    assert published.psnr < 12


def test_adaptive_clipping_moves_its_norm_the_wrong_way(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "ADAPTED_ROUNDS", 2)
    first, second = clipping.adapting()
    assert (first.clipped, first.norm) == (3, 1.0)
    assert first.largest > 1
    assert second.norm == pytest.approx(math.exp(-0.1))


# --- Secure aggregation -------------------------------------------------------------------------------------------


def test_the_sum_hides_a_picture_from_those_who_do_not_know_the_rest(small: None) -> None:
    of_sum, known, idle = secure.measured(secure.Case(1.0, 0.1, "coffee"))
    assert of_sum.psnr < 14
    assert of_sum.labels == 3
    assert of_sum.own > of_sum.chance
    assert of_sum.exact is False
    assert known.psnr > 60
    assert idle.psnr > 60
    assert of_sum.floor == pytest.approx(of_sum.foretold, rel=0.05)


def test_the_strategy_gets_one_average_and_every_number_of_pictures(small: None) -> None:
    played = secure.play(clients.owners("coffee"), 0.1)
    assert [(node, pictures) for node, pictures, _ in played.strategy.given] == [(1, 1), (2, 1), (3, 1)]
    first, *others = (state for _, _, state in played.strategy.given)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)
    assert played.wire.messages == 24


@pytest.mark.parametrize(("who", "summed"), [("one after that", 2), ("one before the keys are shared", 0)])
def test_a_client_that_is_gone(who: str, summed: int, small: None) -> None:
    (cost,) = secure.timed(secure.CostCase(secure.SECURE, who, 0))
    assert cost.summed == summed
    assert (cost.known is not None) == bool(summed)
    if summed:
        assert cost.known > 60


# --- The page -----------------------------------------------------------------------------------------------------


def frames() -> dict[str, pd.DataFrame]:
    """Rows of every part, made up, for which all claims hold."""
    levels = {math.inf: 140.0, 1e8: 88.0, 1e7: 68.0, 1e6: 48.0, 1e5: 28.0, 1e4: 14.0}
    noisy = [
        noise.Row(
            epsilon, "a", 0, 1.0, 1.0, 1.0, 9.0, 9.0, levels.get(epsilon, 10.0), levels.get(epsilon, 10.0),
            epsilon == math.inf, "embedding", levels.get(epsilon, 10.0), 80.0, "said", "",
        )
        for epsilon in noise.EPSILONS
    ]  # fmt: skip
    again = [
        noise.RoundsRow(clip, epsilon, "a", T, 9.0, 50.0, {1: 20.0, 4: 24.0, 16: 25.0}[T], 20.0, False)
        for clip in noise.CLIPS for epsilon in noise.ROUNDS_EPSILONS for T in noise.ROUNDS
    ]  # fmt: skip
    clipped = [
        clipping.Row(name, "a", 0, view, 9.0 if name.startswith("server") else 1.0, 0.3, db, db, db > 100)
        for name in clipping.PROTECTIONS for view, db in ((clipping.RECEIVED, 120.0), (clipping.PUBLISHED, 10.0))
    ]  # fmt: skip
    adapted = [clipping.Adapted(1, 1.0, 3, 9.0), clipping.Adapted(2, 0.9, 0, 0.1), clipping.Adapted(3, 1.0, 0, 0.1)]
    secured = [
        secure.Row(weight, rate, "a", view, 1e-6, 1e-6, 1e-3, db, db, False, "embedding", 3, 4, 0, "one image fails")
        for weight in secure.MAX_WEIGHTS for rate in secure.RATES
        for view, db in ((secure.SUM, 11.0), (secure.KNOWN, 20.0 if weight > 1 else 70.0),
                         (secure.IDLE, 20.0 if weight > 1 else 70.0))
    ]  # fmt: skip
    late = {"": (3, 12.0, 70.0), "one after that": (2, 12.0, 70.0)}
    costs = [secure.Cost(secure.PLAIN, "", 0, 1, 6, 20.0, 20.0, 1.0, 140.0, None)]
    costs += [
        secure.Cost(secure.SECURE, who, 0, summed, 24, 20.0, 40.0, 3.0, psnr, known)
        for who in secure.GONE for summed, psnr, known in (late.get(who, (0, None, None)),)
    ]  # fmt: skip
    parts = {
        noise.FILE: noisy, noise.ROUNDS_FILE: again, clipping.FILE: clipped, clipping.ADAPTED_FILE: adapted,
        secure.FILE: secured, secure.COSTS_FILE: costs,
    }  # fmt: skip
    return {file: pd.DataFrame(rows) for file, rows in parts.items()}


@pytest.mark.parametrize(
    ("file", "change", "phrase"),
    [
        (noise.FILE, {"psnr": 12.5}, "the picture comes back at"),
        (noise.FILE, {"psnr": 30.0}, "spots on grey"),
        (noise.FILE, {"ours": 30.0}, "less than 2 dB from it"),
        (noise.FILE, {"predicted_psnr": 200.0}, "never more than 3 dB"),
        (noise.FILE, {"seeded": 12.0}, "at ε = 1"),
        (noise.FILE, {"exact": True}, "None of these was called exact"),
        (noise.ROUNDS_FILE, {"psnr": 20.0}, "Four rounds gain"),
        (noise.ROUNDS_FILE, {"promised": 20.0}, "less than averaging"),
        (clipping.FILE, {"psnr": 50.0}, "dB or more"),
        (clipping.FILE, {"psnr": 50.0}, "gives {noised_most"),
        (clipping.FILE, {"norm": 1.0}, "as the client made it"),
        (clipping.ADAPTED_FILE, {"norm": 1.0}, "raises it where nobody is"),
        (secure.FILE, {"psnr": 50.0}, "from the sum of three"),
        (secure.FILE, {"psnr": 10.0}, "at max_weight = 1"),
        (secure.FILE, {"exact": True}, "none is called exact"),
        (secure.FILE, {"labels": 2}, "all three labels"),
        (secure.FILE, {"own": 1}, "are one client's own"),
        (secure.FILE, {"chance": 3}, "of three pictures"),
        (secure.FILE, {"floor": 2e-6}, "{floor_off:.0f} %"),
        (secure.COSTS_FILE, {"messages": 6}, "times the messages"),
        (secure.COSTS_FILE, {"summed": 3}, "and halts"),
        (secure.COSTS_FILE, {"known": 20.0}, "where the other's update is known"),
    ],
)
def test_every_claim_can_fail_and_holds_where_it_does(
    tmp_path: Path, file: str, change: dict[str, object], phrase: str
) -> None:
    tables = frames()
    write_tables(tmp_path, tables)
    assert broken(tmp_path, QUICK, *PARTS) == []
    write_tables(tmp_path, {file: tables[file].assign(**change)})
    assert any(phrase in claimed for claimed in broken(tmp_path, QUICK, *PARTS))


def test_the_page_has_every_part_and_says_where_processes_were_not_timed(tmp_path: Path) -> None:
    write_tables(tmp_path, frames())
    text = page("protections", *describe(tmp_path, QUICK))
    assert "{" not in text
    assert "Not measured here." in text
    rows = [processes.Row(secure.SECURE, k, 2.0 * k, 30.0) for k in (1, 2, 3, 4)]
    pd.DataFrame(rows).to_csv(tmp_path / processes.FILE, index=False)
    assert "SecAgg+ 2, 4, 6, 8" in page("protections", *describe(tmp_path, QUICK))


def test_the_figure_has_a_panel_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [(f"title {k}", torch.full((3, 4, 4), k / 10)) for k in range(10)]
    monkeypatch.setattr(pictures, "pictures", lambda: iter(shown))
    axes: list[Axes] = pictures.figure().axes
    assert [ax.get_title() for ax in axes] == [title for title, _ in shown]
    assert all(ax.images for ax in axes)
