"""A comparison that is gone on with: whole files, one budget, and what is refused
before the first attack.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import QUICK, TINY
from safetensors.torch import save_file

from aprillab.attacks import Reconstruction
from aprillab.attacks.catalogue import ATTACKS
from aprillab.comparison.cases import CompareError, cross
from aprillab.comparison.records import pictures_file, read_curves, read_rows
from aprillab.comparison.run import run
from aprillab.models import VisionTransformer
from aprillab.zoo import ModelError


def test_models_that_cannot_be_built_are_refused_first(path: Path, calls: list[str], tmp_path: Path) -> None:
    save_file(VisionTransformer(**TINY, classes=10).state_dict(), tmp_path / "w.safetensors")
    weights = ["init", str(tmp_path / "w.safetensors")]
    cases = cross(victims=["coffee"], attacks=["span"], positions=["learned", "sinusoidal"], weights=weights, **TINY)
    with pytest.raises(ModelError, match="position embedding is not the one of position='sinusoidal'"):
        run(cases, path=path, **QUICK)
    assert not calls
    assert not path.exists()


def test_what_is_done_is_not_done_again(path: Path, calls: list[str]) -> None:
    cases = cross(victims=["coffee"], attacks=["span", "match:april"], seeds=[0, 1], **TINY)
    run(cases[:1], path=path, **QUICK)
    first = run(cases, path=path, **QUICK)
    assert calls == ["span", "match:april", "span", "match:april"]
    assert run(cases, path=path, **QUICK) == first
    assert len(calls) == 4
    assert run([replace(cases[0], dtype="float64")], path=path, **QUICK)[0].case.dtype == "float64"
    assert len(read_rows(path)) == 5
    run(cases[:1], path=path, resume=False, **QUICK)
    assert len(calls) == 6
    assert [row.case for row in read_rows(path)] == cases[:1]
    assert not read_curves(path)
    assert [file.stem for file in pictures_file(path, cases[0]).parent.iterdir()] == [cases[0].update]


def test_an_interrupted_search_leaves_whole_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = cross(victims=["coffee"], attacks=["span", "match:idlg", "match:april"], **TINY)
    april = ATTACKS["match:april"]

    def interrupted(model: Any, update: Any, *, callback: Any, **options: Any) -> Reconstruction:
        def stop(entry: dict[str, Any], images: torch.Tensor) -> None:
            callback(entry, images)
            if entry["evaluation"] == 8:
                raise KeyboardInterrupt

        return april.function(model, update, callback=stop, **options)

    monkeypatch.setitem(ATTACKS, "match:april", replace(april, function=interrupted))
    with pytest.raises(KeyboardInterrupt):
        run(cases, path=path, **QUICK)
    assert [row.case.attack for row in read_rows(path)] == ["span", "match:idlg"]
    monkeypatch.setitem(ATTACKS, "match:april", april)
    rows = run(cases, path=path, **QUICK)
    assert [row.stopped for row in rows] == ["", "evaluations", "evaluations"]
    fresh = run(cases, path=path.with_name("fresh.csv"), **QUICK)
    assert [row.psnr for row in rows] == [row.psnr for row in fresh]


def test_a_line_that_was_cut_short_is_made_again(path: Path, calls: list[str]) -> None:
    cases = cross(victims=["coffee"], attacks=["match:idlg", "match:april"], **TINY)
    whole = run(cases, path=path, **QUICK)
    text = path.read_text()
    path.write_text(text[: text.rindex("not exact")])
    again = run(cases, path=path, **QUICK)
    assert calls[2:] == ["match:april"]
    assert [row.loss for row in again] == [row.loss for row in whole]
    with path.open(newline="") as file:
        assert len(list(csv.reader(file))) == 3
    # The curve of the row that was lost is there once.
    assert [p.evaluation for p in read_curves(path)[cases[1].update, "match:april", "recover"]] == [1, 6, 11, 12]


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
        (text.replace("exact: ", "fine: ", 1), "line 2: an outcome is .*, not 'fine'"),
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
