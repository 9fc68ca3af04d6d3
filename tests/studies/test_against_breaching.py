"""The comparison with breaching: how a run is scored, the committed tables, and its processes."""

from __future__ import annotations

import math
import shutil
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
from studies.against_breaching.page import raced, ratio_of


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


def test_the_committed_page_is_made_again_from_its_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("against_breaching.csv", "provenance.json"):
        shutil.copy(RESULTS / name, tmp_path / name)
    main(["--report", "--out", str(tmp_path)])
    assert "its claims hold" in capsys.readouterr().out
    made, committed = (
        (folder / "against_breaching.md").read_text(encoding="utf-8") for folder in (tmp_path, RESULTS)
    )
    assert made == committed
    assert all(f"| {side} | {attack} | {dtype} |" in made for side, attack, dtype in {*RATES, *RACES})


def test_a_race_that_breaching_wins_leaves_no_page(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "provenance.json", tmp_path / "provenance.json")
    frame = pd.read_csv(RESULTS / "against_breaching.csv")
    frame.loc[(frame.part == "race") & (frame.side == "breaching"), "best_psnr"] = 40.0
    frame.to_csv(tmp_path / "against_breaching.csv", index=False)
    with pytest.raises(SystemExit, match="none of breaching's finds one"):
        main(["--report", "--out", str(tmp_path)])
    assert not (tmp_path / "against_breaching.md").exists()


def test_who_is_faster_and_by_how_much() -> None:
    rates = pd.DataFrame([
        Run("rate", number, 5, side, attack, dtype, cpu_rate=rate + number)
        for number in (0, 1, 2)
        for side, attack, rate in ((*RATES[0][:2], 29.0), (*RATES[1][:2], 9.0))
        for dtype in ("float32", "float64")
    ])  # fmt: skip
    assert ratio_of(rates, "float32") == 3.0
    races = pd.DataFrame([
        Run("race", 0, digit, "aprillab", "a", "float64", evaluations=digit, cpu_to_bar=seconds, best_psnr=40, cpu=60)
        for digit, seconds in ((1, 4.0), (2, 8.0), (3, math.inf))
    ])  # fmt: skip
    found = raced(races)
    assert (found["digits"], found["30 dB"], found["evaluations"]) == ("3", "2 of 3", "1 to 3")
    assert (found["processor s to it"], found["at most"]) == ("6.0", "8.0")


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
