"""Defences that hold: the study's clients, attackers and names, and that each claim of
its page can fail.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from studied import broken, write_tables

import aprillab as al
from studies._rows import read
from studies._runner import PAGES, page
from studies.defences import accuracy, figures
from studies.defences import page as described
from studies.defences.attackers import KNOWN, PLAIN, SPAN, Attempt, attacked, kept
from studies.defences.bounds import INFORMATION_FILE, MATCHING_FILE, Information, Matching, matching
from studies.defences.clients import (
    ADAM,
    BATCH,
    BITS,
    CLIPPING,
    DITHER,
    NOISE,
    NONE,
    PRUNING,
    SIGN,
    STRENGTHS,
    SUM,
    WITHHELD,
    Cell,
    cells,
    flat,
    seed_of,
    shared_by,
    told_of,
)
from studies.defences.grid import FILE, LARGE_WORLDS, SMALL_WORLDS, Case, Row, measured
from studies.defences.names import by_features, by_gradients, by_picture, rank_of
from studies.defences.tables import grid_rows, named, of, stopped_at, with_blind_guesses
from studies.defences.victims import DIGITS, TRAINED, Scene, World, digits, photographs, scene

OPTIONS = argparse.Namespace(quick=False, large=False, checkpoints=None)
WORLD = SMALL_WORLDS[0]
GALLERY = 20


@pytest.fixture
def stage() -> Scene:
    return scene(WORLD, None, GALLERY)


# --- Worlds and clients -------------------------------------------------------------------------------------------


def test_no_cell_is_there_twice_and_each_has_its_own_noise() -> None:
    for world in (*SMALL_WORLDS, *LARGE_WORLDS):
        every = cells(world)
        assert len(set(every)) == len(every)
        quick = cells(world, quick=True)
        assert set(quick) <= set(every)
        assert {cell.defence for cell in quick} == {cell.defence for cell in every}
    drawn = [seed_of(w, cell, k) for w in SMALL_WORLDS for cell in cells(w) for k in range(8)]
    assert len(set(drawn)) == len(drawn)
    assert max(drawn) < 2**63


def test_pictures_are_all_different_and_digits_are_of_the_test_part() -> None:
    pixels, names = photographs(32, 163)
    assert pixels.shape == (163, 3, 32, 32)
    assert torch.equal(pixels[0], al.load_victim(names[0], 32))
    assert len({one.numpy().tobytes() for one in pixels}) == 163
    images, labels = digits(163)
    assert labels[:10].tolist() == list(range(10))
    trained_on = {one.numpy().tobytes() for one in al.mnist5k("train")[0]}
    assert not {one.numpy().tobytes() for one in images} & trained_on


def test_a_trained_world_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = al.mnist5k("train")
    parts = {"train": (images[::6], labels[::6]), "test": al.mnist5k("test")}
    monkeypatch.setattr(al, "mnist5k", parts.__getitem__)
    one = scene(World(DIGITS, TRAINED, 0), None, GALLERY, epochs=3)
    scene.cache_clear()
    right = (one.model(one.input_of(one.pixels)).argmax(1) == one.labels).float().mean()
    assert right > 0.5


def test_noise_is_that_multiple_of_the_norm(stage: Scene) -> None:
    plain, noisy = (shared_by(stage, Cell(NOISE, s), 0, 1) for s in (1e-8, 0.3))
    names = list(plain.update.gradients)
    difference = flat(noisy.update, names) - flat(plain.update, names)
    assert noisy.clip == pytest.approx(noisy.norm)
    assert float(difference.std()) == pytest.approx(0.3 * noisy.norm, rel=0.02)
    assert noisy.deviation == pytest.approx(0.3 * noisy.norm)


def test_other_defences_do_what_they_say(stage: Scene) -> None:
    whole = shared_by(stage, Cell(NONE, 0.0), 0, 1)
    names = list(whole.update.gradients)
    assert al.defenses.update_norm(shared_by(stage, Cell(CLIPPING, 0.1), 0, 1).update) == pytest.approx(
        0.1 * whole.norm, rel=1e-5
    )
    pruned = flat(shared_by(stage, Cell(PRUNING, 90.0), 0, 1).update, names)
    assert float((pruned == 0).float().mean()) == pytest.approx(0.9, abs=1e-3)
    assert stage.anatomy.position not in shared_by(stage, Cell(WITHHELD, 1e-6), 0, 1).update.gradients
    summed, batch = (flat(shared_by(stage, Cell(d, 3.0), 0, 1).update, names) for d in (SUM, BATCH))
    torch.testing.assert_close(summed, 3 * batch)
    dithered = shared_by(stage, Cell(DITHER, 8.0), 0, 1)
    assert not torch.equal(flat(dithered.update, names), flat(whole.update, names))
    assert told_of(Cell(SIGN, 1.0)) == {"bits": 1, "stochastic": False}


# --- Attackers ----------------------------------------------------------------------------------------------------


def test_the_attacker_keeps_what_a_replay_explains_or_else_who_knows() -> None:
    grey = torch.full((1, 2, 2), 0.5)
    plain, known = Attempt(PLAIN, grey, 30.0, 0.9), Attempt(KNOWN, grey, 20.0, 0.8)
    assert kept([plain, known]) is plain
    assert kept([Attempt(PLAIN, grey, 30.0, 0.3), known]) is known
    dark = [Attempt(SPAN, grey, 99.0, 0.4), Attempt(PLAIN, grey, 30.0, -5.0), Attempt(KNOWN, grey, 20.0, -9.0)]
    assert kept(dark) is dark[2]
    assert kept([Attempt(PLAIN, grey, 30.0)]).attack == PLAIN


def test_without_a_defence_the_replay_explains_everything(stage: Scene) -> None:
    cell = Cell(NONE, 0.0)
    found = attacked(stage, cell, shared_by(stage, cell, 2, 0), stage.labels[2:3])
    assert found.chosen.explained == pytest.approx(1, abs=1e-6)
    assert al.psnr(found.chosen.pixels, stage.pixels[2].double()) > 90
    assert {one.attack for one in found.every} == {PLAIN, SPAN}


def test_a_cell_of_the_grid() -> None:
    (row,) = measured(None, GALLERY, 1, 1, Case(*WORLD, NOISE, 1e-6))
    assert row.psnr is not None
    assert row.oracle is not None
    assert row.epsilon is not None
    assert 30 < row.psnr <= row.oracle
    assert row.epsilon > 1e6
    assert (row.rank_features, row.rank_gradients) == (1, 1)
    (batch,) = measured(None, GALLERY, 1, 1, Case(*WORLD, BATCH, 8.0))
    assert batch.psnr is not None
    assert batch.nearest is not None
    assert batch.psnr <= batch.nearest < 20


# --- Names --------------------------------------------------------------------------------------------------------


def test_ranks_count_half_of_those_that_are_level() -> None:
    scores = torch.tensor([0.3, 0.9, 0.3, 0.1])
    assert [rank_of(scores, k) for k in range(4)] == [2.5, 1, 2.5, 4]
    assert rank_of(torch.tensor([math.nan, 1.0]), 0) == 2


def test_a_picture_is_named_after_gain_and_offset(stage: Scene) -> None:
    seen = 0.2 * stage.pixels[4].double() + 0.5
    assert by_picture(seen, stage.pixels, 4) == 1
    assert by_picture(1 - stage.pixels[4].double(), stage.pixels, 4) > GALLERY / 2  # a gain is not negative
    assert by_picture(torch.full_like(seen, 0.5), stage.pixels, 4) == (GALLERY + 1) / 2


@pytest.mark.parametrize(
    "cell",
    [Cell(NONE, 0.0), Cell(NOISE, 1e-3), Cell(PRUNING, 99.0), Cell(BITS, 2.0), Cell(ADAM, 1e-8), Cell(BATCH, 2.0)],
)
def test_gradients_name_the_victim(stage: Scene, cell: Cell) -> None:
    updates = [shared_by(stage, cell, k, k) for k in range(2)]
    assert by_gradients(stage, cell, updates) == [1, 1]
    if cell.defence not in (ADAM, BATCH):
        assert [by_features(one.update, stage, stage.features(), k) for k, one in enumerate(updates)] == [1, 1]


def test_noise_ends_the_name(stage: Scene) -> None:
    cell = Cell(NOISE, 10.0)
    ranks = by_gradients(stage, cell, [shared_by(stage, cell, k, k) for k in range(8)])
    assert sum(rank == 1 for rank in ranks) <= 3


@pytest.mark.parametrize("world", [WORLD])
def test_the_best_attacker_is_below_the_theorem(world: World) -> None:
    rows = list(itertools.islice(matching(None, 1, 50, world), 12))
    assert [row.sigma for row in rows] == list(STRENGTHS[NOISE])
    assert all(row.rate <= row.bound + 0.02 for row in rows)
    assert rows[0].rate == 1
    assert rows[-1].rate < 0.1


# --- The page -----------------------------------------------------------------------------------------------------


def made_up() -> pd.DataFrame:
    """A row for every cell, for which all claims hold."""

    def one(case: Case) -> Row:
        weak = {NOISE: case.strength >= 0.01, PRUNING: case.strength >= 99, BITS: case.strength == 2}
        psnr = 11.0 if weak.get(case.defence, False) else 60.0
        psnr = {BATCH: 10.0, SUM: 10.0, DITHER: 20 * math.log10(255 * 3**0.5 / max(case.strength, 0.1))}.get(
            case.defence, psnr
        )
        far = 1.0 if psnr > 30 or (case.defence, case.strength) == (BATCH, 2.0) else 9.0
        gradients = 40.0 if case.defence == NOISE and case.strength >= 1 else 1.0
        epsilon = 100.0 / case.strength if case.defence == NOISE else None
        return Row(
            *case, victim="a 0", epsilon=epsilon, norm=1.0,
            attack=PLAIN, psnr=psnr, ssim=0.6 if case.defence == SIGN else 0.5, predicted=psnr,
            explained=0.9, oracle=psnr, oracle_attack=PLAIN,
            nearest=psnr, blind=11.5, rank_picture=far, rank_features=1.0, rank_gradients=gradients, seconds=0.1,
        )  # fmt: skip

    return pd.DataFrame([asdict(one(Case(*world, *cell))) for world in SMALL_WORLDS for cell in cells(world)])


def written(folder: Path, rows: pd.DataFrame, rate: float = 0.01, whole: float = 1e7) -> list[str]:
    """The files of a study, and the claims that they break."""
    information = [Information(*world, "a 0", 1.0, 100.0, 1.0, whole) for world in SMALL_WORLDS]
    noise = [Matching(*world, s, rate, rate, rate, 0.02) for world in SMALL_WORLDS for s in STRENGTHS[NOISE]]
    found = {INFORMATION_FILE: information, MATCHING_FILE: noise}
    tables = {name: pd.DataFrame([asdict(one) for one in some]) for name, some in found.items()}
    write_tables(folder, {FILE: rows, **tables})
    return broken(folder, OPTIONS, described)


def costs(folder: Path) -> pd.DataFrame:
    """An accuracy study's file."""
    runs = [
        accuracy.Row(
            "mnist5k", defence, strength, seed, 0.9 + 0.01 * seed, 3.0, 0.1, 0.1, 20, 1000, 1e-3, 1.0, sigma, 1.0
        )
        for seed in (0, 1)
        for defence, strength, sigma in (
            ("none", math.nan, 0.0), ("DP-SGD", 3.0, 5.0), ("DP-SGD", math.inf, 0.0), ("noise", 0.01, 0.01),
            ("prune", 0.1, 0.0), ("prune", 0.001, 0.0), ("quantize", 4.0, 0.0), ("sign", 1.0, 0.0),
            ("bfloat16", 16.0, 0.0), ("batch", 8.0, 0.0),
        )
    ]  # fmt: skip
    frame = pd.DataFrame([asdict(run) for run in runs])
    frame.to_csv(folder / figures.ACCURACY_FILE, index=False)
    return frame


@pytest.mark.parametrize(
    ("defence", "change", "phrase"),
    [
        (NOISE, {"psnr": 60.0}, "from the blind guess"),
        (NOISE, {"rank_gradients": 9.0}, "by gradients all the same"),
        (NOISE, {"rank_gradients": 1.0}, "with {gradients_0:.0f} %"),
        (NOISE, {"rank_picture": 1.0}, "the picture names"),
        (NOISE, {"predicted": 90.0}, "the prediction is careful"),
        (CLIPPING, {"psnr": 20.0}, "no attack of these minds"),
        (PRUNING, {"rank_picture": 1.0}, "at 99 % they are down"),
        (PRUNING, {"rank_gradients": 2.0}, "gradients name {pruned_features:.0f}"),
        ("bfloat16", {"rank_picture": 2.0}, "Half precision stops nothing"),
        (BITS, {"psnr": 30.0}, "two bits the picture"),
        (SIGN, {"ssim": 0.1}, "Signs show more"),
        (BITS, {"rank_gradients": 2.0}, "no number of bits the name"),
        (DITHER, {"psnr": 90.0}, "of the dither alone"),
        (BATCH, {"rank_picture": 2.0}, "One picture of two"),
        (BATCH, {"rank_picture": 1.0}, "among sixteen"),
    ],
)
def test_every_claim_can_fail(defence: str, change: dict[str, float], phrase: str) -> None:
    rows = made_up()
    for name, value in change.items():
        rows.loc[rows.defence == defence, name] = value
    said = [claim.phrase for claim in described.said(with_blind_guesses(rows))[1] if not claim.holds]
    assert any(phrase in claimed for claimed in said)


def test_a_rate_above_the_theorem_is_seen(tmp_path: Path) -> None:
    assert any("below the theorem" in phrase for phrase in written(tmp_path, made_up(), rate=0.5))


@pytest.mark.parametrize(("whole", "phrase"), [(1e11, "that much"), (1.0, "lies above that line")])
def test_lines_of_this_model_are_compared(tmp_path: Path, whole: float, phrase: str) -> None:
    assert any(phrase in claimed for claimed in written(tmp_path, made_up(), whole=whole))


def test_the_page_has_every_part(tmp_path: Path) -> None:
    assert written(tmp_path, made_up()) == []
    without = page("defences", *described.describe(tmp_path, OPTIONS))
    assert "Not measured here yet" in without
    costs(tmp_path)
    text = page("defences", *described.describe(tmp_path, OPTIONS))
    assert (PAGES / "defences.md").is_file()
    assert "{" not in text
    assert "nan" not in text
    assert "DP-SGD, ε = 3" in text
    assert all(f"| {defence} |" in text for defence in STRENGTHS if defence != NONE)


def test_an_update_without_a_picture_counts_as_the_blind_guess(tmp_path: Path) -> None:
    rows = made_up()
    cell = (rows.defence == PRUNING) & (rows.strength == 99.9)
    rows.loc[cell, ["psnr", "ssim", "predicted", "oracle", "nearest", "rank_picture"]] = math.nan
    assert written(tmp_path, rows) == []
    found = of(grid_rows(tmp_path), defence=PRUNING, strength=99.9)
    assert (found.shown == 11.5).all()
    assert named(found, "rank_picture") == 0
    assert ", 2 none" in page("defences", *described.describe(tmp_path, OPTIONS))


def test_where_a_defence_ends_the_picture() -> None:
    rows = pd.DataFrame({"strength": [1.0, 2.0, 3.0], "rank_picture": [1.0, 4.0, 4.0]})
    assert stopped_at(rows, (1.0, 2.0, 3.0)) == 2.0
    assert stopped_at(rows.assign(rank_picture=[4.0, 4.0, 1.0]), (1.0, 2.0, 3.0)) is None


def test_the_figure_has_a_point_for_what_both_studies_have(tmp_path: Path) -> None:
    written(tmp_path, made_up())
    found = list(figures.points(grid_rows(tmp_path), costs(tmp_path), read(tmp_path / MATCHING_FILE, Matching)))
    assert [(point.defence, point.words) for point in found if point.defence in ("DP-SGD", "prune")] == [
        ("DP-SGD", "ε = 3"), ("DP-SGD", "ε = ∞"), ("prune", "10 % kept"), ("prune", "0.1 % kept"),
    ]  # fmt: skip
    private = found[1]
    assert private.median == pytest.approx(11.0)
    assert private.promised is not None
    assert 1 < private.promised < 100
    assert {point.median for point in found if point.defence == "none"} == {60.0}
    drawn = figures.accuracy_figure(found, 11.5)
    assert [len(ax.texts) for ax in drawn.axes] == [8, 7]
