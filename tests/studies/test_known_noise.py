"""The study of known noise: its ridge and its medians by hand, and its smallest run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from studies import known_noise
from studies._rows import read
from studies._runner import RESULTS
from studies.known_noise import Row, Study, best_ridge, by_noise, table_of


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_oracle_picks_the_ridge_that_is_nearest() -> None:
    G, X = normal(4, 30, seed=0), normal(4, 6, seed=1)
    assert best_ridge(G.T @ X, G, X) < 1e-12
    noisy = G.T @ X + 3 * normal(30, 6, seed=2)
    plain = torch.linalg.pinv(G.T) @ noisy
    assert best_ridge(noisy, G, X) < float((plain - X).square().mean())


def test_gains_are_medians_pair_by_pair() -> None:
    rows = [Row("a", 0, 0.1, 10, 12, 15, 14, 1.0), Row("b", 0, 0.1, 20, 19, 21, 25, 1.0),
            Row("c", 0, 0.1, 30, 31, 32, 32, 1.0)]  # fmt: skip
    found = by_noise(pd.DataFrame(rows)).iloc[0]
    assert (found.gain, found.least, found.over_oracle) == (2, 1, 2)
    assert (found.off, found.off_low, found.off_high) == (0, -1, 4)
    assert "| 0.1 | 20.0 | 19.0 | 21.0 | 2.0 | 1.0 | 2.0 | 0.0 (-1.0 to 4.0) |" in table_of(
        by_noise(pd.DataFrame(rows))
    )


def test_the_smallest_run(tmp_path: Path) -> None:
    known_noise.main(["--quick", "--out", str(tmp_path)])
    (row,) = read(tmp_path / "known_noise.csv", Row).itertuples()
    assert row.known > row.plain + 1
    assert row.predicted == pytest.approx(row.known, abs=4)
    assert "python -m studies.known_noise" in (tmp_path / "known_noise.md").read_text(encoding="utf-8")


def test_the_committed_table_is_what_the_page_says() -> None:
    rows, study = read(RESULTS / "known_noise.csv", Row), Study()
    expected = {(v, s, n) for v, s in study.victims for n in study.noises}
    assert set(zip(rows.victim, rows.seed, rows.noise, strict=True)) == expected
    assert table_of(by_noise(rows)) in (RESULTS / "known_noise.md").read_text(encoding="utf-8")
