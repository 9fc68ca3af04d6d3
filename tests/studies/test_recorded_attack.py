"""The recordings of chapter 05, in small: rows and pictures belong together, also after Ctrl-C."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import aprillab as al
from studies import recorded_attack
from studies._rows import read
from studies.recorded_attack import SCRUB_EVERY, Moment, Twin


def test_every_frame_of_the_scrub_has_its_row(tmp_path: Path) -> None:
    recorded_attack.main(["scrub", "--quick", "--out", str(tmp_path)])
    rows = read(tmp_path / "matching_scrub.csv", Moment)
    assert list(rows.evaluation) == list(range(1, 2 * SCRUB_EVERY + 1))
    frames = rows.frame.dropna().astype(int)
    assert list(frames) == list(range(len(frames)))
    assert np.asarray(Image.open(tmp_path / "matching_scrub.png")).shape == (32, 32 * len(frames), 3)
    assert not (tmp_path / "matching_twins.csv").exists()


def test_twins_go_on_with_row_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["twins", "--quick", "--out", str(tmp_path)]
    recorded_attack.main(command)
    table, strip = tmp_path / "matching_twins.csv", tmp_path / "matching_twins.png"
    rows, pictures = read(table, Twin), np.asarray(Image.open(strip))
    assert list(rows.position) == ["learned", "frozen", "sinusoidal"]
    assert pictures.shape == (28, 3 * 28)
    # The last row was lost, its picture not: both are made again, the same.
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    recorded_attack.main(command)
    assert read(table, Twin).equals(rows)
    assert (np.asarray(Image.open(strip)) == pictures).all()


def test_an_interrupted_attack_is_no_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = al.match_gradients

    def pressed(*arguments: object, **options: object) -> al.Reconstruction:
        found = whole(*arguments, **options)  # type: ignore[arg-type]
        found.diagnostics["stopped"] = "interrupted"
        return found

    monkeypatch.setattr(al, "match_gradients", pressed)
    with pytest.raises(SystemExit, match="interrupted"):
        recorded_attack.main(["--quick", "--out", str(tmp_path)])
    assert read(tmp_path / "matching_scrub.csv", Moment).empty
