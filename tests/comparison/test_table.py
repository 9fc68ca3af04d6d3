"""The table and the page."""

from __future__ import annotations

from aprillab.comparison.cases import Case
from aprillab.comparison.records import CaseOutcome, Row
from aprillab.comparison.table import report, table

# --- Table and figures ----------------------------------------------------------------------------------------


def test_table_counts_and_takes_medians() -> None:
    rows = [
        Row(
            case=Case(attack=attack, victims=("coffee",), seed=seed), psnr=value, psnr_min=value, ssim=0.5,
            exact=exact, predicted_psnr=None, loss=None, residual=None, evaluations=None, seconds=seconds,
            gradient_seconds=0.1, stopped="", outcome=CaseOutcome("exact", ""), max_evaluations=5, max_seconds=None,
            weights_sha256="",
            aprillab="1", torch="2", python="3", threads=7, device="cpu", machine="abacus",
        )
        for attack, seed, value, exact, seconds in (
            ("span", 0, 70.0, True, 1.0), ("span", 1, 20.0, False, 3.0), ("span", 2, 60.0, True, 2.0),
            ("april", 0, float("nan"), False, 4.0),
        )
    ]  # fmt: skip
    lines = table(rows).splitlines()
    assert lines[0] == "| attack | runs | median dB | least dB | exact | refused | median s |"
    assert lines[2:] == [
        "| span | 3 | 60.0 | 20.0 | 2 of 3 | 0 | 2 |",
        "| april | 1 | -inf | -inf | 0 of 1 | 0 | 4 |",
    ]
    assert "| span | 1 | 1 | 20.0" in table(rows, by=["attack", "seed"])
    page = report(rows, "aprillab compare --seeds 0,1,2", {"a.png": "what is seen"})
    for text in (
        "aprillab 1, torch 2, python 3, abacus, 7 thread(s), cpu. Made by `aprillab compare --seeds 0,1,2`",
        "![what is seen](a.png)",
        "seed 0 / 1 / 2",
        "5 evaluations",
    ):
        assert text in page
