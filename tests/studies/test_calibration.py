"""The study of the constants: what it counts, on cases that are known, and the command on a tiny
model.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

from aprillab.attacks.grey_levels import grid as grids
from aprillab.attacks.grey_levels import rounds
from studies._rows import read
from studies.calibration.__main__ import main
from studies.calibration.measure import MARGINS, TRIED, Rounded, Row, first_clear, rounded
from studies.calibration.page import margin_claims, tried
from studies.calibration.plan import DECIDED, plan
from studies.calibration.victims import Setting, victim

TINY = Setting("sinusoidal", 16, 4, 64)


def test_the_constants_are_among_the_values_tried() -> None:
    assert {rounds.RATIO, rounds.RATIO_ALONE} <= set(TRIED["ratio"])
    assert rounds.MISFIT in TRIED["misfit"]
    assert rounds.FAR in TRIED["far"]
    assert rounds.NEAR[-1] in TRIED["largest distance"]
    assert (MARGINS["sure"][1], MARGINS["too_sure"][2]) == (grids.SURE, grids.TOO_SURE)


def test_the_plan_has_every_part_also_when_quick() -> None:
    assert {part for part, _ in plan()} == {part for part, _ in plan(quick=True)}
    assert len(plan()) > 4 * len(plan(quick=True))


def test_a_victim_is_what_its_setting_says() -> None:
    one = victim(TINY, 0)
    assert one.truth.shape == (1, 16, 48)
    assert torch.equal(one.truth, one.truth.round())
    pair = victim(Setting("frozen", 16, 8, 64, batch=2), 0)
    assert pair.truth.shape == (2, 4, 192)
    assert pair.labels.tolist() == [0, 1]
    off = victim(Setting("sinusoidal", 16, 4, 64, dithered=True), 0)
    error = (off.grid.centres - one.grid.centres).abs()
    assert error.median() > 0.05


def test_rounding_finds_the_truth_of_a_decided_setting() -> None:
    one = victim(TINY, 0)
    found = rounded(one.grid, one.grid.smooth, one.grid.smooth_centres(), one.truth, None)
    assert found.right.all()
    assert found.inside.all()
    assert found.clear(ratio=rounds.RATIO_ALONE).all()


def test_a_patch_settles_at_the_first_distance_that_is_clear() -> None:
    """Three patches: one clear at once, one nearer at the second distance, one too far off at both."""
    yes = torch.ones(3, dtype=torch.bool)
    near = partial(Rounded, inside=yes, misfit=torch.zeros(3), off=torch.tensor([0.1, 1.0, 9.0]))
    found = {
        1.0: near(right=torch.tensor([True, False, False]), ratio=torch.tensor([0.1, 0.9, 0.1])),
        2.0: near(right=torch.tensor([False, True, False]), ratio=torch.tensor([0.1, 0.4, 0.1])),
    }
    assert [now.tolist() for _, now in first_clear(found, far=1.5)] == [[True, False, False], [False, True, False]]
    assert [now.tolist() for _, now in first_clear(found, far=math.inf)] == [
        [True, False, True],
        [False, True, False],
    ]
    assert [now.tolist() for _, now in first_clear(found, far=1.5, largest=1.0)] == [[True, False, False]]


def test_a_table_adds_up_settings_and_a_claim_can_fail() -> None:
    rows = [
        Row("margins", str(setting), f"too_sure: {what}", at, value)
        for setting in DECIDED[:2]
        for at, value in ((1.0, 5), (5.0, 8), (20.0, 9), (80.0, 9))
        for what, value in (("right", value), ("wrong", 0))
    ]
    spans = [
        Row("deviations", "a", f"unsure: {what} ratio", None, value)
        for what, value in (("median", 20), ("largest", 99))
    ]
    frame = pd.DataFrame(rows)
    assert list(tried(frame).right) == ["10", "16", "18", "18"]
    held = {claim.phrase: claim.holds for claim in margin_claims(pd.DataFrame(spans), frame)}
    assert held == {
        "is a typical one and no bound": False,  # 99 is not above 100
        "Without a factor (1) fewer patches are settled": True,
        "from 5 to 80 nearly the same": True,
        "nothing is settled wrongly at any value": True,
    }


def test_quick_measures_every_part_and_writes_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--out", str(tmp_path)])
    frame = read(tmp_path / "calibration.csv", Row)
    assert set(frame.part) == {part for part, _ in plan(quick=True)}
    page = (tmp_path / "calibration.md").read_text(encoding="utf-8")
    assert "| RATIO | 0.5 |" in page
    assert "| TOO_SURE | 20 |" in page
    assert "too small a study" in capsys.readouterr().out
