"""The study of span_then_match: its plan, its page, and the command on tiny models."""

from pathlib import Path

import pytest

from aprillab.comparison.records import read_rows
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


def test_the_page_says_what_the_rows_say(tmp_path: Path) -> None:
    hybrid.main(["--quick", "--out", str(tmp_path)])
    batch = {row.case.attack: row for row in read_rows(tmp_path / "hybrid.csv") if len(row.case.victims) == 2}
    assert batch["span_then_match"].psnr > batch["span"].psnr
    page = (tmp_path / "hybrid.md").read_text(encoding="utf-8")
    line = next(x for x in page.splitlines() if x.startswith("| a batch of 2 | frozen | span_then_match"))
    assert f"| 1 | {batch['span_then_match'].psnr:.1f} |" in line
    assert (
        f"- a batch of 2: the span alone {batch['span'].psnr:.0f} dB, "
        f"then matched {batch['span_then_match'].psnr:.0f} dB" in page
    )
    assert (tmp_path / "hybrid.png").read_bytes().startswith(b"\x89PNG")
    # Without the pictures, which the repository does not keep, there is the page but no figure.
    (tmp_path / "hybrid.png").unlink()
    (tmp_path / "hybrid_pictures").rename(tmp_path / "elsewhere")
    hybrid.main(["--quick", "--report", "--out", str(tmp_path)])
    assert (tmp_path / "hybrid.md").read_text(encoding="utf-8") == page
    assert not (tmp_path / "hybrid.png").exists()


def test_quick_keeps_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("studies._runner.RESULTS", tmp_path)
    hybrid.main(["--quick"])
    assert "| 4 patches | sinusoidal | span_then_match |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_rows_there_is_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"hybrid: .*hybrid\.csv has no row of this study"):
        hybrid.main(["--report", "--out", str(tmp_path)])
