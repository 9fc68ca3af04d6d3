"""What all studies share: resumption, --report, claims, Ctrl-C, and where a CSV comes from."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import in_workers
import pandas as pd
import pytest

from aprillab.comparison.parallel import Workers, WorkersError
from studies import _runner
from studies._rows import StudyError, _in_order, fill, made, origin, provenance, read
from studies._runner import Claim, Description, page, run_study, study_parser
from studies._tables import formatted, grouped, markdown


@dataclass(frozen=True)
class Row:
    name: str
    number: int
    square: float
    exact: bool | None = None
    note: str = ""


def square(case: tuple[int]) -> Iterator[Row]:
    (number,) = case
    yield Row("plain", number, number**2 / 3)
    yield Row("negative", -number, number**2 / 3, exact=True, note="with, a comma")


CASES = [(1,), (2,), (3,)]


def filled(path: Path, measure: Any = square, cases: Any = CASES, **options: Any) -> pd.DataFrame:
    fill(path, Row, cases, measure, key=("number",), **options)
    return read(path, Row)


# --- CSV files ----------------------------------------------------------------------------------------------------


def test_rows_are_written_and_read_as_they_are(tmp_path: Path) -> None:
    frame = filled(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines()[:3] == [
        "name,number,square,exact,note", "plain,1,0.3333,,", 'negative,-1,0.3333,True,"with, a comma"',
    ]  # fmt: skip
    assert list(frame.number) == [1, -1, 2, -2, 3, -3]
    assert list(frame.square) == [0.3333, 0.3333, 1.333, 1.333, 3, 3]
    assert list(frame.note[:2]) == ["", "with, a comma"]
    assert frame.exact.eq(True).sum() == 3


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    path, seen = tmp_path / "a.csv", []

    def watched(case: tuple[int]) -> Iterator[Row]:
        seen.append(*case)
        return square(case)

    filled(path, watched, CASES[1:2])
    before = path.read_text()
    frame = filled(path, watched)
    assert seen == [2, 1, 3]
    assert path.read_text().startswith(before)
    assert list(frame.number) == [2, -2, 1, -1, 3, -3]


def test_ctrl_c_keeps_the_rows_of_every_case_that_has_ended(tmp_path: Path) -> None:
    def pressed(case: tuple[int]) -> Iterator[Row]:
        yield from square(case)
        if case == (2,):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "a.csv", pressed)
    assert list(read(tmp_path / "a.csv", Row).number) == [1, -1]  # nothing of the second
    assert list(filled(tmp_path / "a.csv").number) == [1, -1, 2, -2, 3, -3]


def test_a_line_that_was_cut_short_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("name,number,square,exact,note\nplain,1,0.3333,,\nplain,2,1.3")
    assert list(filled(path).number) == [1, 2, -2, 3, -3]
    assert path.read_text().count("plain,2") == 1


def test_other_columns_or_settings_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "a.csv", settings={"width": 64})
    with pytest.raises(StudyError, match=r"settings \{'width': 64\}, not \{'width': 128\}"):
        filled(tmp_path / "a.csv", settings={"width": 128})
    (tmp_path / "b.csv").write_text("name,other\na,1\n")
    with pytest.raises(StudyError, match=r"b\.csv has columns name, other, not name, number"):
        filled(tmp_path / "b.csv")
    with pytest.raises(StudyError, match=r"there is no .*c\.csv"):
        read(tmp_path / "c.csv", Row)


def test_provenance_grows_only_when_rows_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    filled(path, cases=CASES[:1], settings={"epochs": 3})
    first = provenance()
    assert origin(path) == {"made": [first], "settings": {"epochs": 3}}
    assert "aprillab 0" in first
    monkeypatch.setattr("studies._rows.provenance", lambda: "another machine")
    filled(path, cases=CASES[:1], settings={"epochs": 3})  # nothing to do
    assert made(path) == first
    filled(path, settings={"epochs": 3})
    filled(tmp_path / "b.csv")
    assert made(path) == f"{first}; then another machine"
    assert list(json.loads((tmp_path / "provenance.json").read_text())) == ["a.csv", "b.csv"]
    path.unlink()  # begun anew, nothing is left of the first machine, nor of its settings
    filled(path)
    assert origin(path) == {"made": ["another machine"], "settings": {}}


# --- Several workers ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_jobs_write_one_process_s_csv_and_name_what_fails(tmp_path: Path) -> None:
    def squares(path: Path, numbers: range, **options: Any) -> str:
        fill(path, in_workers.Square, [(i,) for i in numbers], in_workers.squared, key=("number",), **options)
        return path.read_text()

    two = Workers(jobs=2)
    alone, path, grouped = (tmp_path / f"{name}.csv" for name in ("alone", "two", "grouped"))
    assert squares(path, range(1, 4), workers=two) == squares(alone, range(1, 4))
    assert squares(grouped, range(1, 4), workers=two, together=lambda case: case[0] > 1) == alone.read_text()
    assert made(path) == f"{provenance()}, 2 jobs"
    with pytest.raises(WorkersError, match=r"1 failed, .* kept: 4: ArithmeticError: four is too much"):
        squares(path, range(1, 6), workers=two)
    assert list(read(path, in_workers.Square).number) == [1, -1, 2, -2, 3, -3, 5, -5]  # nothing of the fourth


def test_lines_are_brought_into_the_order_of_their_cases_in_the_places_they_have() -> None:
    lines = [{"number": str(i)} for i in (7, 3, -3, 9, 1, -1, 2)]
    found = _in_order(lines, [("1",), ("2",), ("3",)], ("number",))
    # What is of no case goes with the line before it.
    assert [int(line["number"]) for line in found] == [7, 1, -1, 2, 3, -3, 9]
    assert _in_order(lines, [], ("number",)) == lines


def test_a_study_has_jobs_or_says_why_not(capsys: pytest.CaptureFixture) -> None:
    options = study_parser("squares", "about").parse_args(["--jobs", "2"])
    assert (options.jobs, options.dask) == (2, None)
    parser = study_parser("squares", "about", alone="it measures seconds")
    assert parser.parse_args(["--jobs", "1"]).jobs == 1
    assert "not here: it measures seconds" in parser.format_help()
    for wrong in (["--jobs", "2"], ["--dask", "tcp://127.0.0.1:1"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
        assert "this study measures one case at a time: it measures seconds" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="squares: 2 jobs and Dask: give one"):
        Squares().run("--jobs", "2", "--dask", "tcp://127.0.0.1:1", "--quick")


# --- The page -----------------------------------------------------------------------------------------------------


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "squares.md").write_text("# Squares\n\nThe largest is {largest:.1f}, which is\nmore than two.\n")
    monkeypatch.setattr(_runner, "PAGES", folder)
    monkeypatch.setattr(_runner, "RESULTS", tmp_path / "results")
    return folder


def test_a_page_has_its_fields_and_a_false_claim_stops_it(templates: Path) -> None:
    right, wrong = (Claim("which is more than two", x, x > 2) for x in (3.0, 1.5))
    text = page("squares", {"largest": 3.04}, [right])
    assert text == "# Squares\n\nThe largest is 3.0, which is\nmore than two.\n"
    with pytest.raises(StudyError, match=r"“which is more than two” is not borne out by 1\.5"):
        page("squares", {"largest": 1.5}, [right, wrong])


def test_a_claim_must_stand_in_the_page(templates: Path) -> None:
    with pytest.raises(StudyError, match="does not say what is claimed: 'less than two'"):
        page("squares", {"largest": 3.0}, [Claim("less than two", 1, True)], strict=False)


def test_too_small_a_study_says_what_it_does_not_bear_out(templates: Path, capsys: pytest.CaptureFixture) -> None:
    page("squares", {"largest": 1.0}, [Claim("more than two", 1.0, False)], strict=False)
    assert "too small a study: “more than two” is not borne out by 1.0" in capsys.readouterr().out


class Squares:
    """A study of three numbers that counts what it measures."""

    def __init__(self, limit: float = 0.0) -> None:
        self.limit, self.measured = limit, 0

    def measure(self, folder: Path, options: argparse.Namespace) -> None:
        def counted(case: tuple[int]) -> Iterator[Row]:
            self.measured += 1
            return square(case)

        filled(folder / "squares.csv", counted, CASES[:1] if options.quick else CASES)

    def describe(self, folder: Path, options: argparse.Namespace) -> Description:
        largest = read(folder / "squares.csv", Row).square.max()
        return {"largest": largest}, [Claim("more than two", largest, largest > max(2, self.limit))]

    def draw(self, folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
        return {"squares.png": b"drawn"}

    def run(self, *argv: str) -> None:
        options = study_parser("squares", "about").parse_args(argv)
        run_study("squares", options, measure=self.measure, describe=self.describe, draw=self.draw)


def test_a_study_is_measured_once_and_its_page_written_from_the_csv(templates: Path) -> None:
    results, study = templates.parent / "results", Squares()
    study.run()
    assert study.measured == 3
    assert {path.name for path in results.iterdir()} == {
        "squares.csv", "squares.md", "squares.png", "provenance.json",
    }  # fmt: skip
    assert "largest is 3.0" in (results / "squares.md").read_text()
    study.run()
    assert study.measured == 3
    csv = results / "squares.csv"
    csv.write_text(csv.read_text().replace("plain,3,3", "plain,3,9").replace("plain,1,0.3333,,\n", ""))
    study.run("--report")
    assert study.measured == 3  # though a row is missing
    assert "largest is 9.0" in (results / "squares.md").read_text()


def test_a_false_claim_ends_the_study_and_leaves_page_and_rows(templates: Path) -> None:
    results = templates.parent / "results"
    Squares().run()
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    with pytest.raises(
        SystemExit, match=r"squares: the page is not written: “more than two” is not borne out by 3\.0"
    ):
        Squares(limit=5.0).run()
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def test_quick_keeps_no_file_but_where_it_is_told(templates: Path, capsys: pytest.CaptureFixture) -> None:
    Squares().run("--quick")
    out = capsys.readouterr().out
    assert "largest is 0.3" in out
    assert "too small a study" in out
    assert not (templates.parent / "results").exists()
    Squares().run("--quick", "--out", str(templates.parent / "here"))
    assert (templates.parent / "here" / "squares.md").is_file()


def test_an_interrupted_study_says_so_and_writes_no_page(templates: Path) -> None:
    study = Squares()

    def pressed(folder: Path, options: argparse.Namespace) -> None:
        filled(folder / "squares.csv", cases=CASES[:1])
        raise KeyboardInterrupt

    study.measure = pressed  # type: ignore[method-assign]
    with pytest.raises(SystemExit, match=r"squares: interrupted\. What is done is kept"):
        study.run()
    results = templates.parent / "results"
    assert {path.name for path in results.iterdir()} == {"squares.csv", "provenance.json"}
    Squares().run()
    assert "largest is 3.0" in (results / "squares.md").read_text()


# --- Tables -------------------------------------------------------------------------------------------------------


def test_tables_keep_the_order_of_the_rows_and_say_what_is_missing() -> None:
    frame = pd.DataFrame({"kind": ["b", "a", "b"], "dB": [1.0, 4.0, 2.0], "n": [1, 2, 3]})
    table = grouped(frame, ("kind",), lambda group: {"median": group.dB.median(), "n": len(group)})
    assert list(table.kind) == ["b", "a"]
    table.loc[1, "median"] = math.nan
    lines = markdown(formatted(table, median=".2f"), ["kind", "dB", "count"]).splitlines()
    assert lines[0] == "| kind | dB | count |"
    assert set(lines[1]) == {"|", "-"}
    assert lines[2:] == ["| b | 1.50 | 2 |", "| a | – | 1 |"]
