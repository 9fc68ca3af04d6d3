"""The comparison with breaching: how a run is scored, the committed tables, and its processes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from studies._runner import RESULTS
from studies.against_breaching.__main__ import main
from studies.against_breaching.measure import RACES, RATES, ROOT, Arena, Place, Run, score
from studies.against_breaching.page import races_table, rates_table, verdicts


def test_a_diary_is_scored_by_when_it_reaches_the_bar() -> None:
    private, place = torch.full((1, 28, 28), 0.5, dtype=torch.float64), Place("race", 0, 5, "a", "b", "c")
    errors = [0.5, 0.1, 0.01, 0.001, 0.2]  # PSNR 6, 20, 40, 60 dB; the last is the result
    images = np.stack([np.full((1, 28, 28), 2 * e) for e in errors])  # model-input space
    diary = {"cpu": np.array([1.0, 2.0, 3.0, 4.0]), "wall": np.array([2.0, 4.0, 6.0, 8.0]), "images": images}
    run = score(diary, private, place)
    assert (run.digit, run.evaluations, run.cpu_to_bar, run.wall_to_bar) == (5, 4, 3.0, 6.0)
    assert run.best_psnr == pytest.approx(60)
    assert run.psnr == pytest.approx(-20 * math.log10(0.2))
    assert (run.cpu_rate, run.wall_rate) == (1.0, 0.5)
    never = score({**diary, "images": images[[0, 1, 1, 0, 3]]}, private, place)
    assert math.isinf(never.cpu_to_bar)  # the result has no time of its own


def lines_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    lines = page[page.index(heading) :].splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("|")) :]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")]
    return cells[2 : next((i for i, line in enumerate(table) if not line), len(table))]


def test_the_committed_tables_are_made_again_from_their_own_numbers() -> None:
    page = (RESULTS / "against_breaching.md").read_text(encoding="utf-8")
    rates = lines_of(page, "## Evaluations per second")
    races = lines_of(page, "## Time to 30 dB")
    assert [tuple(cells[:3]) for cells in rates] == list(RATES)
    assert [tuple(cells[1:4]) for cells in races] == list(RACES)
    runs = [
        Run("rate", 0, 5, *cells[:3], error=cells[5].strip("`"))
        if cells[3] == "fails"
        else Run("rate", 0, 5, *cells[:3], cpu_rate=float(cells[3]), wall_rate=float(cells[4]))
        for cells in rates
    ]
    found = pd.DataFrame(runs)
    assert lines_of(rates_table(found), "|") == rates
    raced = pd.DataFrame([
        Run("race", 0, 5, *cells[1:4], evaluations=int(cells[4]), cpu=float(cells[5]), psnr=float(cells[6]),
            best_psnr=float(cells[7]), cpu_to_bar=float(cells[8].replace("never", "inf")),
            wall_to_bar=float(cells[9].replace("never", "inf")))
        for cells in races
    ])  # fmt: skip
    assert lines_of(races_table(raced), "|") == races
    said = verdicts(found, raced, seconds=40)
    assert all(line in page for line in said[:2])
    assert (
        "none of breaching's attacks in the 40 s they had (the best picture, deepleakage in float64, 7.4" in said[2]
    )


def test_who_is_faster_and_by_how_much() -> None:
    rates = pd.DataFrame([
        Run("rate", number, 5, side, attack, dtype, cpu_rate=rate + number)
        for number in (0, 1, 2)
        for side, attack, rate in ((*RATES[0][:2], 29.0), (*RATES[1][:2], 9.0))
        for dtype in ("float32", "float64")
    ])  # fmt: skip
    races = pd.DataFrame([
        Run("race", 0, 5, side, "a", "float64", cpu_to_bar=seconds, best_psnr=40.0, cpu=60.0)
        for side, seconds in (("aprillab", 4.0), ("breaching", 50.0), ("breaching", 48.0))
    ])  # fmt: skip
    lines = verdicts(rates, races, seconds=60)
    assert "float32: 3.00 times breaching's; the goal of 1.5 is met." in lines[0]
    assert lines[2].endswith("breaching's fastest (a, float64) after 48.0 s: 12.0 times as long. The goal is 10.")
    races.loc[races.side == "aprillab", "cpu_to_bar"] = math.inf
    assert "ours did not reach 30 dB in 60 s" in verdicts(rates, races, seconds=60)[2]


@pytest.mark.slow
def test_ours_runs_in_a_process_and_what_fails_is_a_row_with_its_error(tmp_path: Path) -> None:
    arena = Arena(sys.executable, tmp_path)
    (run,) = arena.play(Place("rate", 0, 5, "aprillab", "april", "float64"), seconds=30.0, iterations=12)
    assert run.evaluations == 12
    assert run.cpu_rate is not None
    assert run.version
    (failed,) = arena.play(Place("rate", 0, 5, "breaching", "no such attack", "float64"), seconds=1.0, iterations=1)
    assert failed.error
    assert failed.cpu_rate is None


def test_breaching_is_asked_for_by_name_and_never_imported_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "--python is needed" in capsys.readouterr().err
    assert "breaching" not in sys.modules


def test_the_worker_needs_no_more_than_the_other_environment_has() -> None:
    command = "import sys, studies.against_breaching.worker; assert not {'pandas', 'tabulate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)


def test_without_rows_the_page_stays(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no .*against_breaching\.csv"):
        main(["--report", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
