"""The study of fair comparisons: its cases and recipes by hand, its smallest run, and
the committed table.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import aprillab as al
from studies import fair_matching
from studies._rows import read
from studies._runner import RESULTS
from studies.fair_matching import BASE, OPTIMIZERS, SCALES, Case, Row, cases, line, of, recipe_of, spread, table


def case(part: str, recipe: str, alpha: float, term: str) -> Case:
    return Case(part, recipe, alpha, term, "class token", 200, 2507, 0)


def test_each_case_stands_once_and_every_setting_has_the_same_starts() -> None:
    assert len(set(cases())) == len(cases())
    by_setting: dict[tuple, list] = {}
    for one in cases():
        by_setting.setdefault(one[:-2], []).append(one[-2:])
    places = {part: {tuple(found) for key, found in by_setting.items() if key[0] == part} for part, *_ in by_setting}
    assert all(len(found) == 1 for part, found in places.items() if part != "baselines")
    # A baseline with the term meets the same digit and starts as without.
    for key, found in by_setting.items():
        if key[0] == "baselines" and key[3] == "none":
            same = [k for k in by_setting if (k[0], k[1], k[5]) == (key[0], key[1], key[5]) and k != key]
            assert [by_setting[k] for k in same] == [found]


def test_one_part_is_exchanged_at_a_time() -> None:
    assert BASE.position_term == al.PositionTerm()
    assert (BASE.restarts, BASE.patience, BASE.position_term.rearrange) == (1, None, None)
    assert recipe_of(case("distances", "balanced_l2", 1.0, "per_token")) == BASE
    whole = recipe_of(case("whole", "cosine", 10.0, "whole"))
    assert (whole.distance, whole.position_term) == ("cosine", al.PositionTerm(weight=10.0, per_token=False))
    for name, optimizer in OPTIMIZERS.items():
        assert recipe_of(case("optimizers", name, 1.0, "per_token")).optimizer == optimizer
    seams = recipe_of(case("seams", "seams", 0.1, "none"))
    assert (seams.position_term, seams.priors) == (None, al.Priors(seams=0.1))
    # Published recipes are themselves but for the term, whose weight is their distance's size.
    for name in fair_matching.BASELINES:
        published = al.RECIPES[name]
        assert recipe_of(case("baselines", name, 0.0, "none")) == published
        weight = {c.alpha for c in cases() if (c.part, c.recipe, c.term) == ("baselines", name, "per_token")}
        assert weight == {SCALES[str(published.distance)]}


def test_a_setting_in_words() -> None:
    runs = pd.DataFrame(
        {"recipe": "tag", "alpha": [1.0, 1.0, 10.0], "psnr": [7.0, 31.0, 30.0], "psnr_rearranged": 31.0,
         "residual": [1e-2, 3e-2, 1e-2]}
    )  # fmt: skip
    assert spread(runs.psnr) == "30.0 (7.0 to 31.0)"
    assert spread(runs.psnr[:1]) == "7.0"
    assert line(runs)["30 dB or more"] == "2 of 3"
    assert len(of(runs, alpha=1.0)) == 2
    lines = table(runs, recipe="recipe", alpha="α").splitlines()
    assert lines[0].startswith("| recipe | α | dB |")
    assert lines[2] == "| tag | 1 | 19.0 (7.0 to 31.0) | 31.0 | 1 of 2 | 2e-02 |"
    assert len(lines) == 4


@pytest.mark.slow
def test_the_smallest_run(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    fair_matching.main(["--quick", "--out", str(tmp_path)])
    rows = read(tmp_path / "fair_matching.csv", Row)
    assert set(rows.part) == {"baselines", "distances", "optimizers", "whole", "seams"}
    assert rows.psnr.nunique() > 20  # the settings are searches of their own
    assert (rows.psnr_rearranged >= rows.psnr - 1e-3).all()
    text = (tmp_path / "fair_matching.md").read_text(encoding="utf-8")
    assert f"{len(rows)} searches" in text


def test_the_committed_table_is_what_the_page_says() -> None:
    rows = read(RESULTS / "fair_matching.csv", Row)
    found = list(rows[list(Case._fields)].itertuples(index=False, name=None))
    assert found == [tuple(one) for one in cases()]
    text = (RESULTS / "fair_matching.md").read_text(encoding="utf-8")
    for part, names in fair_matching.TABLES.items():
        assert table(rows[rows.part == part], **names) in text
