"""The study of span_then_match: its plan, its page, and the command on tiny models."""

import statistics

import pytest

from aprillab.comparison.run import run
from studies import hybrid


def test_the_plan_asks_what_the_page_answers() -> None:
    cases = [case for part in hybrid.parts().values() for case in part]
    assert len(set(cases)) == len(cases)
    assert {case.attack for case in cases} == {"span", "span_then_match", "match:april"}
    assert {case.dtype for case in cases} == {"float32"}
    assert {(case.image_size, case.patch_size, case.width) for case in cases if case.model == "prenorm"} == {
        (32, 8, 192), (32, 8, 384), (32, 4, 192), (32, 4, 384), (64, 8, 384),
    }  # fmt: skip
    assert {len(case.victims) for case in cases if case.position == "frozen"} == {2, 4}
    assert all(len(case.victims) == 1 for case in cases if case.position != "frozen")


def test_the_page_says_what_the_rows_say(tmp_path) -> None:
    parts = hybrid.parts(quick=True)
    found = {name: run(cases, path=tmp_path / "hybrid.csv", max_evaluations=10, progress=False)
             for name, cases in parts.items()}  # fmt: skip
    batch = {row.case.attack: row for row in found["a batch of 2"]}
    assert batch["span_then_match"].psnr > batch["span"].psnr
    page = hybrid.report(found)
    line = next(x for x in page.splitlines() if x.startswith("| a batch of 2 | frozen | span_then_match"))
    assert f"| {statistics.median([batch['span_then_match'].psnr]):.1f} |" in line
    assert (
        f"- a batch of 2: the span alone {batch['span'].psnr:.0f} dB, "
        f"then matched {batch['span_then_match'].psnr:.0f} dB" in page
    )


def test_quick_writes_nowhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    monkeypatch.setattr(hybrid, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["hybrid", "--quick"])
    hybrid.main()
    assert "| 4 patches | sinusoidal | span_then_match |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
