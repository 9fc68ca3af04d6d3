"""The study of the closed forms, on models of a few patches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import aprillab as al
from studies import closed_forms
from studies._rows import fill, read
from studies._runner import RESULTS
from studies.closed_forms import Case, Growth, Row, attacked, cases

TINY = {"image_size": 16, "patch_size": 8, "depth": 2, "heads": 2, "classes": 10}


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, seed: int) -> al.VisionTransformer:
        if name in closed_forms.OURS:
            return al.VisionTransformer(**TINY, width=208, block="april", seed=seed)
        return al.VisionTransformer(**TINY, width=4 if name.startswith("timm vit_small") else 48)

    monkeypatch.setattr(closed_forms, "build", build)
    closed_forms.ready.cache_clear()
    closed_forms.shared.cache_clear()


def test_the_cases_are_those_of_the_table() -> None:
    every = list(cases(quick=False))
    assert len(set(every)) == len(every)
    table = read(RESULTS / "closed_forms.csv", Row)
    scored = table[table.psnr.notna()][list(Case._fields)].itertuples(index=False, name=None)
    refused = {tuple(row) for row in table[table.psnr.isna()][["model", "attack"]].itertuples(index=False)}
    assert set(scored) == {case for case in every if (case.model, case.attack) not in refused}


def test_variants_share_the_update_and_a_refusal_is_a_row() -> None:
    rows = [
        row for attack in closed_forms.VARIANTS
        for row in attacked(Case("A, 32×32", "A 32/4 d=384", attack, "float64", 0, "coffee"))
    ]  # fmt: skip
    assert [row.attack for row in rows] == list(closed_forms.VARIANTS)
    assert all(row.replay_seconds > 0 for row in rows)
    assert len({row.gradient_seconds for row in rows}) == 1
    assert len({row.predicted_psnr for row in rows}) > 1
    assert all(row.exact and row.psnr > 100 for row in rows)
    (row,) = attacked(Case("other libraries", "timm vit_small_patch16_224", "span", "float32", 0, "coffee"))
    assert row.psnr is None
    assert row.note.startswith("refused: ")


def test_the_span_attack_gets_no_gradient_of_the_position_embedding() -> None:
    for attack, frozen in (("embedding", False), ("span", True)):
        model = closed_forms.ready("torchvision vit_b_16", "float32", 0, attack in closed_forms.FROZEN)
        assert model.position_embedding.requires_grad is not frozen


def test_quick_prints_a_page_and_keeps_nothing(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("studies._runner.RESULTS", tmp_path)
    closed_forms.main(["--quick"])
    out = capsys.readouterr().out
    assert "| other libraries | timm vit_small_patch16_224 | span | float32 | 0 | refused | – | – | – | – |" in out
    assert "- timm vit_small_patch16_224, span: refused: no closed form fits" in out
    assert "| ViT-B/16, learned | torchvision vit_b_16 | embedding | float32 | 2 |" in out
    assert not list(tmp_path.iterdir())


def test_growth_is_one_line_of_json(capsys: pytest.CaptureFixture) -> None:
    closed_forms.main(["--growth", "vit_tiny"])
    found = Growth(**json.loads(capsys.readouterr().out))
    assert found.model == "vit_tiny"
    assert found.least_psnr > 60
    assert found.ratio == pytest.approx(found.attack_seconds / found.gradient_seconds)
    assert found.peak_memory_gib > 0.1


@pytest.mark.parametrize(("attack", "slower"), [("embedding", "5 %"), ("span", "half")])
def test_an_attack_slower_than_the_page_says_ends_the_study(tmp_path: Path, attack: str, slower: str) -> None:
    def timed(case: Case) -> list[Row]:
        limit = {"embedding": 0.05, "span": 0.5}.get(case.attack, 1.0)
        part = 1.1 if case.attack == attack else 0.9
        seconds = {"attack_seconds": 2 * limit * part, "replay_seconds": 2.1, "gradient_seconds": 2.0}
        return [Row(*case, psnr=60.0, predicted_psnr=60.0, ssim=1.0, exact=True, **seconds)]

    fill(tmp_path / "closed_forms.csv", Row, cases(quick=True), timed, key=Case._fields)
    for kept in ("growth.csv", "closed_forms_memory.csv"):
        shutil.copy(RESULTS / kept, tmp_path)
    with pytest.raises(SystemExit, match=f"{slower}[^;]*” is not borne out") as ended:
        closed_forms.main(["--report", "--out", str(tmp_path)])
    assert str(ended.value).count("borne out") == 1
