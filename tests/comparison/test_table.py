"""The table and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compared import QUICK, TINY

from aprillab.attacks.catalogue import ATTACKS
from aprillab.comparison.cases import Case, CompareError, cross
from aprillab.comparison.records import Row, read_rows
from aprillab.comparison.run import run
from aprillab.comparison.table import report, table


def test_tables_that_cannot_be_gone_on_with(path: Path) -> None:
    cases = cross(victims=["coffee"], attacks=["span", "match:april"], **TINY)
    run(cases, path=path, **QUICK)
    said = "holds rows of match:april with max_evaluations=12, max_seconds=None, not 13 and None"
    with pytest.raises(CompareError, match=said):
        run(cases, path=path, max_evaluations=13, progress=False)
    text = path.read_text()
    for wrong, fragment in (
        (text.replace("psnr_min", "psnr_least", 1), "different: psnr_least, psnr_min"),
        (text.replace(",True,", ",maybe,", 1), "line 2"),
        (text.replace("coffee", "clock", 1), "line 2: its update"),
    ):
        assert wrong != text
        path.write_text(wrong)
        with pytest.raises(CompareError, match=fragment):
            run(cases, path=path, **QUICK)
        assert path.read_text() == wrong
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CompareError, match="not a CSV file"):
        run(cases, path=path, **QUICK)


def test_each_search_has_one_budget_and_a_closed_form_none(path: Path, calls: list[str]) -> None:
    both = cross(victims=["coffee"], attacks=["span", "match:april"], **TINY)
    (other,) = cross(victims=["coffee"], attacks=["match:idlg"], **TINY)
    run(both, path=path, **QUICK)
    run([both[0], other], path=path, max_evaluations=13, progress=False)
    assert calls == ["span", "match:april", "match:idlg"]
    assert [row.max_evaluations for row in read_rows(path)] == [12, 12, 13]


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"victims": ("nobody",)}, "no victim 'nobody'"),
        ({"victims": ("mnist:3",)}, "one channel"),
        ({"victims": ("coffee",) * 11}, "11 victims in a batch"),
        ({"position": "spiral"}, "position 'spiral' is none of learned"),
        ({"dtype": "float16"}, "'float16' is none of float32, float64"),
        ({"labels": "guess"}, "'guess'"),
    ],
)
def test_cases_that_cannot_be(change: dict[str, Any], fragment: str) -> None:
    with pytest.raises(CompareError, match=fragment):
        Case(**{"attack": "span", "victims": ("coffee",), **change})


def test_runs_that_cannot_be(path: Path) -> None:
    (case,) = cross(victims=["coffee"], attacks=["deep"], **TINY)
    with pytest.raises(CompareError, match="no attack 'deep'; there are embedding, april, span"):
        run([case], path=path, **QUICK)
    with pytest.raises(CompareError, match=r"max_evaluations=2 must be \d or more"):
        run(cross(victims=["coffee"], **TINY), path=path, max_evaluations=2)
    with pytest.raises(CompareError, match="a batch of 3 cannot be made of 2"):
        cross(victims=["coffee", "clock"], batch_sizes=[3])
    assert not path.exists()


def test_every_attack_of_the_package_can_be_compared(path: Path) -> None:
    rows = run(cross(victims=["coffee"], models=["april"], **TINY), path=path, **QUICK)
    assert {row.case.attack for row in rows} == set(ATTACKS)
    assert all(row.psnr is not None for row in rows if row.case.attack not in ("april", "embedding", "span"))
    exact = {row.case.attack for row in rows if row.exact}
    assert exact == {"embedding"} | ({"span", "april", "span_then_round"} & exact)


# --- Table and figures ----------------------------------------------------------------------------------------


def test_table_counts_and_takes_medians() -> None:
    rows = [
        Row(
            case=Case(attack=attack, victims=("coffee",), seed=seed), psnr=value, psnr_min=value, ssim=0.5,
            exact=exact, predicted_psnr=None, loss=None, residual=None, evaluations=None, seconds=seconds,
            gradient_seconds=0.1, stopped="", outcome="", max_evaluations=5, max_seconds=None, weights_sha256="",
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
