"""What a round really is: the study's clients, its attacks, and that each claim of its page can
fail.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from studied import broken, write_tables

import aprillab as al
from aprillab.federation import train_locally, update_of
from studies._runner import PAGES, page
from studies.a_round import page as described
from studies.a_round.__main__ import cases, cell
from studies.a_round.clients import KEPT, SMALL, Case, Keeping, Row, attacked, pictures, private, ready, received

QUICK = argparse.Namespace(quick=True)


def case(part: str = "one picture", optimizer: str = "SGD", rate: float = 0.1, **changes: float | str) -> Case:
    facts = {"model": SMALL, "victim": "coffee", "seed": 0, **cell(part, optimizer, rate, **changes)}
    return Case(**facts)  # type: ignore[arg-type]


# --- Clients ------------------------------------------------------------------------------------------------------


def test_every_part_has_cells_and_no_case_is_there_twice() -> None:
    every = list(cases(quick=False))
    assert len(set(every)) == len(every)
    quick = set(cases(quick=True))
    assert quick < set(every)
    assert {one.part for one in quick} == {one.part for one in every} - {"ViT-B/16"}


def test_pictures_are_all_different() -> None:
    found = pictures("coffee", 20, 32)
    assert found.shape == (20, 3, 32, 32)
    assert torch.equal(found[0], al.load_victim("coffee", 32))
    assert len({one.numpy().tobytes() for one in found}) == 20


def test_the_server_sends_the_mean_of_all_clients_and_keeps_what_it_sent() -> None:
    one = case("rounds", rounds=2)
    model = ready(SMALL, 0)
    anatomy = al.dissect(model)
    (first, second), after = received(one, model, anatomy)
    name = "head.weight"
    assert torch.equal(first.state[name], model.state_dict()[name])
    images = anatomy.preprocessing.to_input(pictures("coffee", 5, 32))
    states = [train_locally(model, images[k : k + 1], torch.tensor([3 + k]), one.how)[name] for k in range(5)]
    torch.testing.assert_close(second.state[name], torch.stack(states).mean(0))
    again = update_of(second.state, after, one.how)
    assert torch.equal(again.gradients[name], second.update.gradients[name])


def test_a_client_may_keep_its_moments() -> None:
    """Two rounds of one step, with nobody else: as two steps of one optimizer."""
    one = case("rounds", KEPT, 1e-3, rounds=1, eps=1e-6)
    model = ready(SMALL, 0)
    images, labels = private(one, al.dissect(model))
    train, moved = Keeping(one.how), al.VisionTransformer(**shape())
    moved.load_state_dict(train(model, images, labels))
    twice = train_locally(model, images, labels, case("rounds", "AdamW", 1e-3, steps=2, eps=1e-6).how)
    found = train(moved, images, labels)
    torch.testing.assert_close(found["head.weight"], twice["head.weight"])
    fresh = train_locally(moved, images, labels, one.how)
    assert not torch.allclose(found["head.weight"], fresh["head.weight"], atol=1e-5)


def shape() -> dict[str, int]:
    return {"image_size": 32, "patch_size": 8, "width": 192, "depth": 4, "heads": 3, "classes": 10}


# --- Attacks ------------------------------------------------------------------------------------------------------


def test_five_steps_with_momentum_give_the_picture() -> None:
    (row,) = attacked(case(optimizer="momentum 0.9", steps=5), audited={("coffee", 0)})
    assert (row.attack, row.exact, row.trust) == ("embedding", True, "exact")
    assert row.psnr is not None
    assert row.psnr > 100
    assert row.loss_before is not None
    assert row.loss_after is not None
    assert row.loss_after < row.loss_before


def test_a_step_of_adam_undone_is_more_than_as_it_stands() -> None:
    (row,) = attacked(case("Adam undone", "AdamW", 1e-3, eps=1e-6, clip=1.0))
    assert row.psnr is not None
    assert row.linear is not None
    assert row.psnr > 60 > 20 > row.linear
    assert row.trust == ""


def test_an_epoch_of_single_pictures_is_a_mixture() -> None:
    (row,) = attacked(case("batch", images=2, batch_size=1, steps=2))
    assert row.psnr is not None
    assert row.psnr < 25
    assert row.exact is False


def test_a_client_that_diverges_is_a_row_without_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(SMALL, 0)
    monkeypatch.setattr("studies.a_round.clients.ready", lambda *_: model)
    (row,) = attacked(case(rate=1e30, steps=3))
    assert row.note.startswith("no update: the client's loss is")
    assert row.psnr is None


# --- The page -----------------------------------------------------------------------------------------------------


def made_up() -> pd.DataFrame:
    """A row for every cell, for which all claims hold."""

    def psnr(one: Case) -> float:
        if one.part == "ViT-B/16":
            return {"AdamW": 60.0}.get(
                one.optimizer, {1.0: 90.0, 0.1: 70.0, 0.01: 50.0}[max(one.learning_rate, 0.01)]
            )
        if one.part == "batch" or (one.part == "one picture" and "Adam" in one.optimizer) or one.optimizer == KEPT:
            return 12.0
        if one.part == "Adam undone":
            return {1: 70.0}.get(one.steps, 30.0 if one.eps == 1e-2 else 12.0)
        return {"autocast": 50.0, "rounds": 40.0 + one.rounds}.get(one.part, 140.0)

    rows = [
        asdict(Row(*one, "embedding", value, value, value > 100, 2.0, 0.1, 12.0, 11.0, "poor"))
        for one in cases(quick=False)
        if (one.victim, one.seed) == ("coffee", 0)
        for value in [psnr(one)]
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("part", "change", "phrase"),
    [
        ("one picture", {"exact": False}, "of these runs are exact"),
        ("one picture", {"exact": False, "psnr": 90.0}, "the picture is as right"),
        ("one picture", {"psnr": 50.0}, "protect nothing"),
        ("one picture", {"psnr": 50.0, "exact": True}, "below 58.9 dB"),
        ("one picture", {"predicted_psnr": 200.0}, "5 dB too high"),
        ("one picture", {"psnr": 140.0}, "no run is above 25 dB"),
        ("autocast", {"psnr": 10.0}, "bfloat16 costs more"),
        ("batch", {"exact": True}, "No batch is called exact"),
        ("batch", {"psnr": 40.0}, "is a mixture"),
        ("batch", {"grey": 2.0}, "no better than grey"),
        ("Adam undone", {"psnr": 10.0}, "at ε = 1e-8"),
        ("Adam undone", {"psnr": 40.0}, "leave nothing"),
        ("Adam undone", {"psnr": 70.0, "exact": True}, "none of several steps"),
        ("Adam undone", {"trust": "mixture"}, "and none a mixture"),
        ("rounds", {"exact": True}, "none is called exact"),
        ("ViT-B/16", {"psnr": 50.0}, "the smaller η"),
    ],
)
def test_every_claim_can_fail(tmp_path: Path, part: str, change: dict[str, object], phrase: str) -> None:
    rows = made_up()
    for name, value in change.items():
        rows.loc[rows.part == part, name] = value
    write_tables(tmp_path, {described.FILE: rows})
    assert any(phrase in claimed for claimed in broken(tmp_path, QUICK, described))


def test_the_page_and_the_figure_have_every_part(tmp_path: Path) -> None:
    write_tables(tmp_path, {described.FILE: made_up()})
    assert broken(tmp_path, QUICK, described) == []
    text = page("a_round", *described.describe(tmp_path, QUICK))
    assert (PAGES / "a_round.md").is_file()
    assert "{" not in text
    assert "nan" not in text
    assert all(f"| {name} " in text for name in ("momentum 0.9", "Nesterov", "AdamW", KEPT))
    assert described.draw(tmp_path, QUICK)["a_round.png"].startswith(b"\x89PNG")
