"""The study of whole grey levels: its plan, its page, and the command on a tiny model."""

from pathlib import Path

import pytest
import torch

import aprillab as al
from aprillab.comparison.run import run
from studies import rounding


def test_the_plan_asks_what_the_page_answers() -> None:
    cases = [case for part in rounding.parts().values() for case in part]
    assert len(set(cases)) == len(cases)
    assert {case.attack for case in cases} == {"span", "span_then_round"}
    assert {(case.image_size, case.patch_size, case.width) for case in cases} == {
        (32, 8, 192), (32, 8, 384), (32, 4, 192), (32, 4, 384), (64, 8, 384),
    }  # fmt: skip
    assert {len(case.victims) for case in cases if case.position == "frozen"} == {2, 4}


def test_the_page_says_what_the_rows_say(tmp_path: Path) -> None:
    found = {
        name: run(cases, path=tmp_path / "rounding.csv", max_evaluations=10, progress=False)
        for name, cases in rounding.parts(quick=True).items()
    }
    rows = {row.case.attack: row for row in found["16 patches"]}
    assert rows["span_then_round"].exact
    assert not rows["span"].exact
    page = rounding.report(found, [rounding.Limit("none", "astronaut", 20.0, 300.0, 15, 16, False)])
    line = next(x for x in page.splitlines() if x.startswith("| 16 patches | sinusoidal | float32 | span_then_round"))
    assert line.split("|")[5:10] == [" 1 ", " every level ", " every level ", " every level ", " 1 "]
    line = next(x for x in page.splitlines() if "| float32 | span |" in x)
    assert f"| {rows['span'].psnr_min:.1f} |" in line
    assert "| none | 20.0 | every level | 15 of 16 | 0 of 1 |" in page
    assert "; 0 of 1 said so\nwrongly" in page


def test_the_changes_change_what_they_say() -> None:
    pixels = al.load_victim("coffee", 18, dtype=torch.float64)[None]
    whole = (255 * pixels - (255 * pixels).round()).abs()
    assert whole.max() < 1e-9
    dithered = rounding._dithered(pixels)
    assert 0.4 / 255 < (dithered - pixels).abs().max() <= 0.5 / 255
    resized = rounding._resized(pixels)
    assert resized.shape == (1, 3, 16, 16)
    assert (255 * resized - (255 * resized).round()).abs().max() > 0.4


def test_quick_writes_nowhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(rounding, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["rounding", "--quick"])
    rounding.main()
    out = capsys.readouterr().out
    assert "| 16 patches | sinusoidal | float32 | span_then_round | 1 | every level |" in out
    assert "| none | " in out
    assert "16 of 16 | 1 of 1 |" in out
    assert not list(tmp_path.iterdir())
