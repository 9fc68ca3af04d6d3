"""The comparison with breaching: how a run is scored, and that breaching is never imported here."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from studies.against_breaching import measure as against_breaching


def test_a_diary_is_scored_by_when_it_reaches_the_bar() -> None:
    private = torch.full((1, 28, 28), 0.5, dtype=torch.float64)
    errors = [0.5, 0.1, 0.01, 0.001, 0.2]  # PSNR 6, 20, 40, 60 dB; the last is the result
    images = np.stack([np.full((1, 28, 28), 2 * e) for e in errors])  # model-input space
    diary = {"cpu": np.array([1.0, 2.0, 3.0, 4.0]), "wall": np.array([2.0, 4.0, 6.0, 8.0]), "images": images}
    run = against_breaching.score(diary, private, "aprillab", "april", "float64", 5)
    assert (run.evaluations, run.cpu_to_bar, run.wall_to_bar) == (4, 3.0, 6.0)
    assert run.best_psnr == pytest.approx(60)
    assert run.psnr == pytest.approx(-20 * math.log10(0.2))
    assert (run.cpu_rate, run.wall_rate) == (1.0, 0.5)
    never = against_breaching.score({**diary, "images": images[[0, 1, 1, 0, 3]]}, private, "a", "b", "c", 5)
    assert math.isinf(never.cpu_to_bar)  # the result has no time of its own


def test_breaching_is_asked_for_by_name_and_never_imported_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["against_breaching"])
    with pytest.raises(SystemExit, match="2"):
        against_breaching.main()
    assert "--python is needed" in capsys.readouterr().err
    assert "breaching" not in sys.modules
