"""The study of the position term: its counting and its tests by hand, and its smallest run."""

from __future__ import annotations

import csv
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import aprillab as al
from studies import position_term
from studies.position_term import EVERY, Row, Setting, Study, rearranged, summaries, summarize

STUDY = Study(
    settings=(Setting(0.0), Setting(1.0), Setting(1.0, "whole")), digits=(3,), seeds=(0,), evaluations=20, width=32,
    depth=1,
)  # fmt: skip


def row(alpha: float, seed: int, first: int | None, psnr: float, term: str = "per_token") -> Row:
    return Row(
        alpha=alpha, term=term, victim="digit 0", seed=seed, psnr=psnr, psnr_rearranged=psnr + 1, distance=1e-3,
        evaluations_to_30=first, evaluations=400, seconds=1.0,
    )  # fmt: skip


WITHOUT = [row(0.0, 0, 300, 50.0), row(0.0, 1, None, 6.0), row(0.0, 2, 100, 29.0), row(0.0, 3, None, 7.0)]
WITH = [row(1.0, 0, 100, 90.0), row(1.0, 1, 200, 80.0), row(1.0, 2, 120, 40.0), row(1.0, 3, None, 8.0)]


def test_runs_are_counted_and_compared_pair_by_pair() -> None:
    found = summarize(WITH, list(reversed(WITHOUT)))  # pairs go by victim and seed, not by their order
    assert (found.runs, found.good) == (4, 3)
    assert (found.earlier, found.later) == (2, 1)  # seeds 0 and 1; seed 2; at seed 3 neither gets there
    assert found.p == pytest.approx(1.0)  # two of three
    assert found.evaluations_of_good == 120
    assert found.evaluations == 160  # of 100, 120, 200 and never
    assert found.psnr == 60
    assert found.psnr_rearranged == 61
    # Wilson's interval of 3 in 4, by its formula.
    z, n, share = 1.959964, 4, 0.75
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert found.interval == pytest.approx([(middle + s * half) / (1 + z * z / n) for s in (-1, 1)], rel=1e-5)


def test_a_run_that_only_passed_through_30_db_has_not_succeeded() -> None:
    found = summarize(WITHOUT, WITHOUT)
    assert found.good == 1  # the one at 29 dB reached 30 and left it
    assert (found.earlier, found.later, found.p) == (0, 0, 1.0)
    assert found.evaluations == math.inf  # half of them never get there
    assert summarize(WITHOUT[1:2], []).evaluations_of_good == math.inf


def test_the_sign_test_leaves_ties_out() -> None:
    pairs = [(row(0.0, k, None, 6.0), row(1.0, k, 100, 60.0)) for k in range(6)]
    tied = [(row(0.0, k, None, 6.0), row(1.0, k, None, 6.0)) for k in (6, 7)]
    without, with_term = zip(*pairs, *tied, strict=True)
    assert summarize(list(with_term), list(without)).p == pytest.approx(2 / 2**6)


def test_settings_are_kept_apart() -> None:
    whole = [replace(r, term="whole", psnr=5.0) for r in WITH]
    found = summaries([*WITH, *whole, *WITHOUT])
    assert list(found) == [Setting(0.0), Setting(1.0), Setting(1.0, "whole")]
    assert [s.good for s in found.values()] == [1, 3, 0]
    table = position_term.table_of([*WITH, *whole, *WITHOUT]).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert re.match(r"\| 1 \| 3 of 4 \| 30 to 95 % \| 120 \| 160 \| 60.0 \| 61.0 \|", table[3])
    assert "2 · 1" in table[3]


def test_patches_are_moved_to_where_they_fit() -> None:
    pixels = torch.rand(1, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patches = al.patchify(pixels[None], 2)
    order = torch.tensor([2, 0, 1, 5, 3, 4])  # its inverse is another
    shuffled = al.unpatchify(patches[:, order], 2, (6, 4))[0]
    assert al.psnr(shuffled, pixels) < 20
    torch.testing.assert_close(rearranged(shuffled + 1e-4, pixels, 2), pixels + 1e-4)
    # Each place once: a picture of one patch repeated stays what it is.
    same = al.unpatchify(patches[:, :1].expand(-1, 6, -1), 2, (6, 4))[0]
    torch.testing.assert_close(rearranged(same, pixels, 2), same)


def test_a_search_is_scored_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ten evaluations, at the first time only; the options reach the attack."""
    model = al.VisionTransformer(
        image_size=28, patch_size=7, channels=1, width=32, depth=1, heads=4, classes=10, seed=0
    ).double()
    pixels = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update = al.client_update(model, al.HALF.to_input(pixels[None]), torch.tensor([3]))
    seen: dict = {}

    def search(*arguments: object, callback, **options: object) -> al.Reconstruction:
        seen.update(options)
        truth = al.HALF.to_input(pixels[None])
        for evaluation in range(1, 48):
            callback({"evaluation": evaluation}, truth if evaluation >= 21 else truth + 0.5)
        return al.Reconstruction(
            "match_gradients(april)", truth + 0.5, pixels[None] * 0, None, False, "",
            {"terms": {"distance": 0.25}, "evaluations": 47}, 2.0,
        )  # fmt: skip

    monkeypatch.setattr(al, "match_gradients", search)
    found = position_term.attack(model, update, pixels, Setting(0.1, "whole"), seed=5, evaluations=47)
    assert found["evaluations_to_30"] == 30 == 3 * EVERY
    assert found["psnr"] == pytest.approx(al.psnr(pixels * 0, pixels))  # the end counts, not the best of the way
    assert (found["distance"], found["evaluations"], found["seconds"]) == (0.25, 47, 2.0)
    assert (seen["seed"], seen["max_evaluations"]) == (5, 47)
    assert seen["recipe"].position_term == al.PositionTerm(weight=0.1, per_token=False)
    assert seen["recipe"].restarts == 1


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> list[dict[str, str]]:
    monkeypatch.setattr(position_term, "SMALLEST", STUDY)
    monkeypatch.setattr(sys, "argv", ["position_term", "--quick", "--output", str(folder), *options])
    position_term.main()
    with (folder / "position_term.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_smallest_run_and_its_resumption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path)
    assert [(r["alpha"], r["term"]) for r in rows] == [("0", "per_token"), ("1", "per_token"), ("1", "whole")]
    assert {r["evaluations"] for r in rows} == {"20"}
    assert len({r["distance"] for r in rows}) == 3  # the settings are searches of their own
    assert all(float(r["psnr_rearranged"]) >= float(r["psnr"]) - 1e-3 for r in rows)
    text = (tmp_path / "position_term.md").read_text(encoding="utf-8")
    assert "python -m studies.position_term" in text
    assert "3 searches" in text
    assert (tmp_path / "position_term.png").read_bytes().startswith(b"\x89PNG")

    def never(*arguments: object, **options: object) -> dict:
        raise AssertionError("measured again")

    table = tmp_path / "position_term.csv"
    table.write_text("".join(table.read_text(encoding="utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    again = run(monkeypatch, tmp_path, "--resume")
    assert again[:2] == rows[:2]
    assert {**again[2], "seconds": ""} == {**rows[2], "seconds": ""}  # the same search once more
    monkeypatch.setattr(position_term, "attack", never)
    position_term.measure(STUDY, position_term.read_rows(table), lambda: None)


def test_the_committed_table_is_what_the_report_says() -> None:
    table = position_term.RESULTS / "position_term.csv"
    rows = position_term.read_rows(table)
    study = Study()
    expected = {(s.alpha, s.term, f"digit {d}", k) for s in study.settings for d in study.digits for k in study.seeds}
    assert {r.key for r in rows} == expected
    assert len(rows) == len(expected)
    assert position_term.table_of(rows) in table.with_suffix(".md").read_text(encoding="utf-8")
