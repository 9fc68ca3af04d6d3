"""The study of whole grey levels: its plan, its page, and the command on a tiny model."""

from pathlib import Path

import pandas as pd
import torch

import aprillab as al
from aprillab.comparison.records import read_rows
from studies import rounding
from studies._rows import read
from studies.rounding import Limit


def test_the_plan_asks_what_the_page_answers() -> None:
    cases = [case for part in rounding.parts().values() for case in part]
    assert len(set(cases)) == len(cases)
    assert {case.attack for case in cases} == {"span", "span_then_round"}
    assert {(case.image_size, case.patch_size, case.width) for case in cases} == {
        (32, 8, 192), (32, 8, 384), (32, 4, 192), (32, 4, 384), (64, 8, 384),
    }  # fmt: skip
    assert {len(case.victims) for case in cases if case.position == "frozen"} == {2, 4}


def test_the_page_says_what_the_rows_say(tmp_path: Path) -> None:
    rounding.main(["--quick", "--out", str(tmp_path)])
    rows = {row.case.attack: row for row in read_rows(tmp_path / "rounding.csv")}
    assert rows["span_then_round"].exact
    assert not rows["span"].exact
    page = (tmp_path / "rounding.md").read_text(encoding="utf-8")
    line = next(x for x in page.splitlines() if x.startswith("| 16 patches | sinusoidal | float32 | span_then_round"))
    assert line.split("|")[5:10] == [" 1 ", " every level ", " every level ", " every level ", " 1 "]
    line = next(x for x in page.splitlines() if "| float32 | span |" in x)
    assert f"| {rows['span'].psnr_min:.1f} |" in line
    assert "; 0 of 1 said so wrongly" in " ".join(page.split())
    assert set(read(tmp_path / "rounding_limits.csv", Limit).change) == set(rounding.CHANGES)
    assert "16 of 16 | 1 of 1 |" in next(x for x in page.splitlines() if x.startswith("| none | "))


def test_limits_are_counted_over_photographs() -> None:
    limits = [
        Limit("none", name, 20.0 + i, 300.0, 15 + i, 16, i == 1) for i, name in enumerate(("astronaut", "rocket"))
    ]
    assert rounding.limits_line(pd.DataFrame(limits)) == {
        "span alone, median dB": "20.5", "rounded, median dB": "every level", "patches settled": "31 of 32",
        "exact": "1 of 2",
    }  # fmt: skip


def test_the_changes_change_what_they_say() -> None:
    pixels = al.load_victim("coffee", 18, dtype=torch.float64)[None]
    whole = (255 * pixels - (255 * pixels).round()).abs()
    assert whole.max() < 1e-9
    dithered = rounding.dithered(pixels)
    assert 0.4 / 255 < (dithered - pixels).abs().max() <= 0.5 / 255
    resized = rounding.resized(pixels)
    assert resized.shape == (1, 3, 16, 16)
    assert (255 * resized - (255 * resized).round()).abs().max() > 0.4
