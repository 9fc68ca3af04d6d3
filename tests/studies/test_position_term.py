"""The study of the position term: its counting and its tests by hand, and its smallest run."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import aprillab as al
from studies import position_term
from studies._rows import read
from studies._runner import RESULTS
from studies.position_term import EVERY, Row, Setting, Study, rearranged, summaries, table_of

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


def summarize(runs: list[Row], without: list[Row]) -> SimpleNamespace:
    columns = list(Row.__dataclass_fields__)
    frames = (pd.DataFrame(some, columns=columns) for some in (runs, without))
    return SimpleNamespace(**position_term.summarize(*frames))


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
    bounds = [100 * (middle + s * half) / (1 + z * z / n) for s in (-1, 1)]
    assert (found.low, found.high) == pytest.approx(bounds, rel=1e-5)


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
    found = summaries(pd.DataFrame([*WITH, *whole, *WITHOUT]))
    assert list(found.label) == ["0", "1", "1, whole"]
    assert list(found.good) == [1, 3, 0]
    table = table_of(found).splitlines()
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
            {"terms": {"distance": 0.25}, "evaluations": 47, "stopped": "evaluations"}, 2.0,
        )  # fmt: skip

    monkeypatch.setattr(al, "match_gradients", search)
    found = position_term.attack(model, update, pixels, Setting(0.1, "whole"), seed=5, evaluations=47)
    assert found["evaluations_to_30"] == 30 == 3 * EVERY
    assert found["psnr"] == pytest.approx(al.psnr(pixels * 0, pixels))  # the end counts, not the best of the way
    assert (found["distance"], found["evaluations"], found["seconds"]) == (0.25, 47, 2.0)
    assert (seen["seed"], seen["max_evaluations"]) == (5, 47)
    assert seen["recipe"].position_term == al.PositionTerm(weight=0.1, per_token=False)
    assert seen["recipe"].restarts == 1


def test_a_search_that_ctrl_c_ended_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = al.VisionTransformer(image_size=28, patch_size=7, channels=1, width=32, depth=1, heads=4, classes=10)
    update = al.client_update(model, torch.zeros(1, 1, 28, 28), torch.tensor([3]))

    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(al, "psnr", pressed)  # in the callback, at the tenth evaluation
    with pytest.raises(KeyboardInterrupt):
        position_term.attack(model, update, torch.zeros(1, 28, 28), Setting(1.0), seed=0, evaluations=20)


def run(monkeypatch: pytest.MonkeyPatch, folder: Path) -> pd.DataFrame:
    monkeypatch.setattr(position_term, "SMALLEST", STUDY)
    position_term.main(["--quick", "--out", str(folder)])
    return read(folder / "position_term.csv", Row)


def test_the_smallest_run_and_its_resumption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path)
    assert list(zip(rows.alpha, rows.term, strict=True)) == [(0, "per_token"), (1, "per_token"), (1, "whole")]
    assert set(rows.evaluations) == {20}
    assert rows.distance.nunique() == 3  # the settings are searches of their own
    assert (rows.psnr_rearranged >= rows.psnr - 1e-3).all()
    text = (tmp_path / "position_term.md").read_text(encoding="utf-8")
    assert "python -m studies.position_term" in text
    assert "3 searches" in text
    assert (tmp_path / "position_term.png").read_bytes().startswith(b"\x89PNG")

    table = tmp_path / "position_term.csv"
    table.write_text("".join(table.read_text(encoding="utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    again = run(monkeypatch, tmp_path)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), rows.drop(columns="seconds"))
    assert list(again.seconds[:2]) == list(rows.seconds[:2])  # only the third was searched once more


def test_the_committed_table_is_what_the_page_says() -> None:
    rows, study = read(RESULTS / "position_term.csv", Row), Study()
    expected = {(s.alpha, s.term, f"digit {d}", k) for s in study.settings for d in study.digits for k in study.seeds}
    found = list(zip(rows.alpha, rows.term, rows.victim, rows.seed, strict=True))
    assert set(found) == expected
    assert len(found) == len(expected)
    assert table_of(summaries(rows)) in (RESULTS / "position_term.md").read_text(encoding="utf-8")
