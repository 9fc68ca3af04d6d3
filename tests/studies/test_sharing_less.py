"""Sharing less: the accountant, the clients that are played, and each part's share of the page."""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy.special import ndtr
from studied import broken, write_tables

import aprillab as al
from aprillab.comparison.parallel import HERE
from studies._runner import PAGES, RESULTS
from studies.sharing_less import frozen_embeddings, lora, rounds
from studies.sharing_less.clients import LABEL, OTHERS, pixels_of, played, update_of

QUICK = argparse.Namespace(quick=True, workers=HERE)
SHAPE = {"image_size": 16, "patch_size": 4, "width": 48, "depth": 1, "heads": 3, "classes": 10}


def tiny() -> tuple[al.VisionTransformer, al.Anatomy]:
    model = al.VisionTransformer(**SHAPE, seed=0)
    return model, al.dissect(model)


# --- Clients ------------------------------------------------------------------------------------------------------


def test_rounds_are_those_of_a_federation() -> None:
    """The first update is the model's own; the second that of the model after the mean of
    all clients' updates.
    """
    model, anatomy = tiny()
    expected, _ = tiny()
    first, second = played(model, anatomy, "coffee", 2, rate=0.1)
    mine = update_of(expected, anatomy, pixels_of("coffee", anatomy))
    assert torch.equal(first.update.gradients["head.weight"], mine.gradients["head.weight"])
    others = [name for name in al.victims() if name != "coffee"][:OTHERS]
    theirs = [update_of(expected, anatomy, pixels_of(v, anatomy), LABEL + k) for k, v in enumerate(others, 1)]
    step = torch.stack([u.gradients["head.weight"] for u in (mine, *theirs)]).mean(0)
    with torch.no_grad():
        moved = expected.head.weight - 0.1 * step
    torch.testing.assert_close(second.state["head.weight"], moved)


def test_under_noise_updates_are_clipped_and_noise_is_new_in_each_round() -> None:
    model, anatomy = tiny()
    kept = anatomy.tensor_names()
    quiet = next(iter(played(tiny()[0], anatomy, "coffee", 1, rate=0.0, sigma=1e-9, kept=kept)))
    one, two = played(model, anatomy, "coffee", 2, rate=0.0, sigma=0.01, kept=kept)
    assert one.update.gradients.keys() <= set(kept)
    assert "blocks.0.mlp.0.weight" in one.update.withheld
    whole = al.defenses.clip(update_of(tiny()[0], anatomy, pixels_of("coffee", anatomy)), 1.0)
    name = "patch_embedding.weight"
    torch.testing.assert_close(quiet.update.gradients[name], whole.gradients[name], atol=1e-7, rtol=1e-4)
    noise = [r.update.gradients[name] - whole.gradients[name] for r in (one, two)]
    assert [float(n.std()) for n in noise] == pytest.approx([0.01, 0.01], rel=0.1)
    assert float((noise[0] * noise[1]).mean()) == pytest.approx(0, abs=1e-5)


# --- Privacy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "epsilon"), [(0.1, 91.8), (0.5, 10.0), (1.0, 4.38), (2.0, 1.99), (5.0, 0.73)])
def test_the_accountant_gives_known_values_and_solves_its_equation(sigma: float, epsilon: float) -> None:
    found = rounds.epsilon_of(sigma, 1)
    assert found == pytest.approx(epsilon, rel=0.01)
    mu = 1 / sigma
    delta = ndtr(mu / 2 - found / mu) - math.exp(found) * ndtr(-mu / 2 - found / mu)
    assert delta == pytest.approx(1e-5, rel=1e-4)
    assert rounds.epsilon_of(3 * sigma, 9) == pytest.approx(found, rel=1e-6)


def test_it_reaches_noise_that_protects_nothing() -> None:
    assert rounds.epsilon_of(1e-5, 64) == pytest.approx(64e10 / 2, rel=1e-3)


# --- Parts --------------------------------------------------------------------------------------------------------


def test_a_small_model_with_frozen_embeddings_is_inverted_and_vit_b_is_refused() -> None:
    case = frozen_embeddings.Case(frozen_embeddings.SMALL, "float32", 0, "coffee")
    (row,) = frozen_embeddings.attacked(case)
    assert (row.needed, row.width, row.exact) == (114, 192, True)
    assert row.psnr is not None
    assert row.psnr > 80
    model = frozen_embeddings.ready(*case[:3])
    assert not model.get_parameter(al.dissect(model).patch_weight).requires_grad
    (refused,) = frozen_embeddings.attacked(case._replace(model="ViT-B/16"))
    assert "966 > 768" in refused.note
    assert refused.psnr is None


def test_noise_and_its_promise_are_measured_on_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "AVERAGED", (1, 2))
    found = list(rounds.attacked(rounds.Case(rounds.SMALL, "coffee", 1e-6)))
    assert [row.rounds for row in found] == [1, 2]
    assert all(row.psnr is not None and row.promised is not None for row in found)
    assert found[0].psnr == pytest.approx(found[0].promised, abs=3)
    assert found[1].psnr > found[0].psnr  # type: ignore[operator]
    assert not any(row.exact for row in found)


def test_a_lora_client_is_refused_before_its_rows_suffice_and_inverted_after() -> None:
    pytest.importorskip("peft")
    early, late = lora.measured(lora.Case(next(iter(lora.SMALL)), "float32", "coffee"), (2, 5))
    assert (early.rounds, late.rounds) == (2, 5)
    assert early.note.startswith("refused: 9 rows")
    assert late.psnr is not None
    assert late.psnr > 80
    assert (late.rows, late.tokens, late.exact) == (33, 17, True)


def frames() -> dict[str, pd.DataFrame]:
    """Rows of every part, made up, for which all claims hold."""
    frozen = [
        frozen_embeddings.Row(
            model, precision, 0, "a", 9, 9, least + 1.0, least + 2.0, float(least), False, 9.0, 1.0, 1.0
        )
        for (model, precision), least in frozen_embeddings.ASKED.items()
    ]
    frozen.append(frozen_embeddings.Row("ViT-B/16", "float32", 0, "a", note="refused: 966 > 768"))
    clean = [
        rounds.Row(rounds.NARROW, "a", 0.0, T, None, None, db, db, T > 1, 1.0)
        for T, db in ((1, 50.0), (2, 75.0), (3, 80.0), (6, 90.0))
    ]
    noisy = [
        rounds.Row(rounds.SMALL, "a", sigma, T, 9.0, 10.0, 9.0 if sigma > 5e-4 else 11.0, 12.0, False, 1.0)
        for sigma in rounds.SIGMAS for T in rounds.AVERAGED
    ]  # fmt: skip
    settings = [*lora.SMALL, *lora.SLOWER, *lora.LARGE]
    large = {"float32": float, "float64": lambda T: 200.0}  # by rounds
    adapters = [
        lora.Row(setting, precision, "a", T, db or large[precision](T), db, False, 99, 9, 9.0, 1.0)
        for precision in ("float32", "float64")
        for setting, db in zip(settings, (100.0, 80.0, 30.0, 70.0, 60.0, 0.0, 0.0), strict=True)
        for T in (5, 10, 15, 40)
    ]  # fmt: skip
    parts = {frozen_embeddings.FILE: frozen, rounds.FILE: [*clean, *noisy], lora.FILE: adapters}
    return {file: pd.DataFrame(rows) for file, rows in parts.items()}


@pytest.mark.parametrize(
    ("file", "change", "phrase"),
    [
        (frozen_embeddings.FILE, {"psnr": 30.0}, "reaches what was asked of it"),
        (frozen_embeddings.FILE, {"psnr": 50.0, "exact": True}, "None of them is called exact"),
        (frozen_embeddings.FILE, {"first_look": 300.0}, "half a decibel nowhere"),
        (rounds.FILE, {"psnr": 20.0}, "Two rounds give"),
        (rounds.FILE, {"psnr": 9.0}, "averaging promises"),
        (rounds.FILE, {"psnr": 20.0, "exact": True}, "none of these is called exact"),
        (lora.FILE, {"psnr": 50.0}, "after five rounds"),
        (lora.FILE, {"psnr": 50.0}, "fewer decibels"),
        (lora.FILE, {"psnr": 99.0}, "more rounds make up for it"),
        (lora.FILE, {"psnr": 99.0}, "float64 needs no more"),
    ],
)
def test_every_claim_can_fail_and_holds_where_it_does(
    tmp_path: Path, file: str, change: dict[str, object], phrase: str
) -> None:
    tables, parts = frames(), (frozen_embeddings, rounds, lora)
    write_tables(tmp_path, tables)
    assert broken(tmp_path, QUICK, *parts) == []
    write_tables(tmp_path, {file: tables[file].assign(**change)})
    assert any(phrase in claimed for claimed in broken(tmp_path, QUICK, *parts))


def test_the_page_and_the_figure_have_every_part(tmp_path: Path) -> None:
    from studies._runner import page
    from studies.sharing_less.__main__ import PARTS, describe, figure

    write_tables(tmp_path, frames())
    for name in ("leak_map.csv", "features.csv"):
        shutil.copy(RESULTS / name, tmp_path / name)
    text = page("sharing_less", *describe(tmp_path, QUICK))
    assert (PAGES / "sharing_less.md").is_file()
    assert "{" not in text
    assert "966 > 768" in text
    assert len(PARTS) >= 3
    axes = figure(tmp_path).axes
    assert [ax.get_xlabel() for ax in axes] == ["rounds"] * 3
    assert all(ax.lines for ax in axes)
