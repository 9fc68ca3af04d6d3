"""A case played: rows that agree with direct calls, scores, curves, labels, weights of a file."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import QUICK, TINY
from safetensors.torch import save_file

from aprillab.attacks import Reconstruction, embedding_closed_form, match_gradients
from aprillab.attacks.catalogue import ATTACKS, Attack
from aprillab.comparison import play
from aprillab.comparison.cases import CompareError, cross, private_pictures
from aprillab.comparison.records import CaseOutcome, read_curves, read_pictures
from aprillab.comparison.run import run
from aprillab.comparison.table import table
from aprillab.data import load_victim, mnist5k
from aprillab.metrics import psnr, ssim
from aprillab.models import VisionTransformer
from aprillab.training import train
from aprillab.update import client_update


def by_hand(seed: int, label: int, victim: str = "coffee") -> tuple[VisionTransformer, Any, torch.Tensor]:
    """Model, update and pixels of a case of TINY, in float64, without the comparison's code."""
    model = VisionTransformer(**TINY, classes=10, seed=seed).double()
    pixels = load_victim(victim, 8, dtype=torch.float64)[None]
    return model, client_update(model, 2 * pixels - 1, torch.tensor([label])), pixels


def test_rows_agree_with_direct_calls(path: Path) -> None:
    cases = cross(
        victims=["coffee"],
        attacks=["embedding", "match:april"],
        dtypes=["float64"],
        labels="given",
        seeds=[4],
        **TINY,
    )
    closed, matched = run(cases, path=path, **QUICK)
    label = int(torch.randperm(10, generator=torch.Generator().manual_seed(4))[0])
    model, update, pixels = by_hand(4, label)
    direct = embedding_closed_form(model, update)
    assert closed.psnr == pytest.approx(psnr(direct.pixels[0], pixels[0]), abs=1e-3)
    assert closed.predicted_psnr == pytest.approx(direct.predicted_psnr, rel=1e-5)
    assert (closed.exact, closed.outcome) == (True, CaseOutcome("exact", direct.reason))
    assert (closed.evaluations, closed.loss, closed.stopped) == (None, None, "")
    searched = match_gradients(
        model, update, recipe="april", labels=torch.tensor([label]), seed=4, max_evaluations=12, progress=False
    )
    assert matched.psnr == pytest.approx(psnr(searched.pixels[0], pixels[0]), abs=1e-3)
    assert matched.ssim == pytest.approx(ssim(searched.pixels[0], pixels[0]), abs=1e-4)
    assert matched.loss == pytest.approx(searched.diagnostics["loss"], rel=1e-4)
    assert matched.residual == pytest.approx(searched.diagnostics["residual"], rel=1e-4)
    assert (matched.evaluations, matched.stopped, matched.exact) == (12, "evaluations", False)
    assert str(matched.outcome).startswith("not exact: gradients agree")
    assert closed.gradient_seconds == matched.gradient_seconds > 0
    assert matched.threads == torch.get_num_threads()
    assert matched.torch == torch.__version__
    assert closed.case.update == matched.case.update


def test_attacks_of_one_update_share_it_and_others_do_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(play, "client_update", lambda *a, **k: made.append(client_update(*a, **k)) or made[-1])
    cases = cross(victims=["coffee", "clock"], attacks=["embedding", "span", "april"], seeds=[0, 1], **TINY)
    rows = run(cases, path=path, **QUICK)
    assert [row.case for row in rows] == cases
    assert len(made) == len({case.update for case in cases}) == 4
    weights = [update.gradients["head.weight"] for update in made]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])


def test_refusals_are_rows(path: Path) -> None:
    cases = cross(victims=["coffee"], attacks=["embedding", "span", "april"], positions=["frozen", "none"], **TINY)
    rows = {(row.case.attack, row.case.position): row for row in run(cases, path=path, **QUICK)}
    refused = rows["embedding", "frozen"]
    assert (refused.psnr, refused.ssim, refused.exact, refused.loss) == (None, None, None, None)
    assert str(refused.outcome) == (
        "refused: no position embedding gradient is shared: position_embedding is fixed or withheld"
    )
    assert (rows["span", "frozen"].psnr or 0) > 60
    assert str(rows["span", "none"].outcome).startswith("refused: without a position embedding")
    assert read_pictures(path, refused.case) is None
    shown = table(list(rows.values()))
    assert f"- embedding (1): {refused.outcome.reason}" in shown
    assert "| frozen | embedding | 1 | – | – | – | 1 | – |" in shown


def test_batches_are_scored_in_the_order_of_their_victims(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.stack([load_victim(name, 8, dtype=torch.float64) for name in ("coffee", "clock", "cell")])
    turned = pixels[[2, 0, 1]].clone()
    turned[0] += 0.1 * (turned[0] < 0.5)  # "cell", less well

    def attack(model: Any, update: Any, **options: Any) -> Reconstruction:
        assert update.batch_size == 3
        assert len(set(options["labels"].tolist())) == 3
        return Reconstruction("mine", 2 * turned - 1, turned, None, False, "turned", {}, 0.5)

    monkeypatch.setitem(ATTACKS, "mine", Attack("mine", "mine", attack, "closed form", ()))
    cases = cross(victims=["coffee", "clock", "cell"], attacks=["mine"], batch_sizes=[3], labels="given", **TINY)
    (row,) = run(cases, path=path, **QUICK)
    worst = psnr(turned[0], pixels[2])
    assert row.psnr_min == pytest.approx(worst, abs=1e-3)
    assert row.psnr == float("inf")
    assert row.seconds == 0.5
    kept = read_pictures(path, cases[0])
    assert kept is not None
    assert torch.allclose(kept[0].double(), pixels, atol=1 / 254)
    assert torch.allclose(kept[1][:2].double(), pixels[:2], atol=1 / 254)
    assert kept[2][2] == pytest.approx(worst)


def test_mixtures_are_scored_against_every_victim(path: Path) -> None:
    cases = cross(victims=["coffee", "clock"], attacks=["embedding", "match:april"], batch_sizes=[2], **TINY)
    mixture, matched = run(cases, path=path, **QUICK)
    assert mixture.outcome.state == "not exact"
    assert "one image" in mixture.outcome.reason
    kept = read_pictures(path, mixture.case)
    assert kept is not None
    assert torch.equal(kept[1][0], kept[1][1])
    assert mixture.psnr == pytest.approx(float(kept[2].mean()), abs=1e-3)
    assert mixture.psnr_min == pytest.approx(float(kept[2].min()), abs=1e-3)
    assert matched.evaluations == 12


def test_two_runs_give_equal_numbers(tmp_path: Path) -> None:
    cases = cross(victims=["coffee"], attacks=["span", "match:tag", "match:april"], **TINY)
    one, two = (run(cases, path=tmp_path / name, **QUICK) for name in ("one.csv", "two.csv"))
    same = {"seconds": 0.0, "gradient_seconds": 0.0}
    assert [replace(row, **same) for row in one] == [replace(row, **same) for row in two]
    loss, other = (
        [(p.evaluation, p.loss, p.psnr) for points in read_curves(tmp_path / name).values() for p in points]
        for name in ("one.csv", "two.csv")
    )
    assert loss == other


def test_curves_fall_and_end_where_the_row_is(path: Path) -> None:
    (case,) = cross(victims=["coffee"], attacks=["match:april"], **TINY)
    (row,) = run([case], path=path, max_evaluations=40, curve_every=5, progress=False)
    (points,) = read_curves(path).values()
    assert [p.evaluation for p in points[:3]] == [1, 6, 11]
    assert (points[-1].evaluation, points[-1].loss, points[-1].psnr) == (row.evaluations, row.loss, row.psnr)
    assert all(before.loss >= after.loss for before, after in itertools.pairwise(points))
    assert all(0 < before.seconds <= after.seconds for before, after in itertools.pairwise(points))
    assert points[-1].psnr > points[0].psnr


def test_curves_have_the_best_so_far(path: Path) -> None:
    (case,) = cross(victims=["coffee"], attacks=["match:april"], dtypes=["float64"], **TINY)
    run([case], path=path, max_evaluations=30, curve_every=1, progress=False)
    model, update, _ = by_hand(0, int(torch.randperm(10, generator=torch.Generator().manual_seed(0))[0]))
    searched = match_gradients(model, update, recipe="april", max_evaluations=30, progress=False)
    losses = [entry["loss"] for entry in searched.history]
    assert losses != sorted(losses, reverse=True)  # a line search steps too far now and then
    (points,) = read_curves(path).values()
    assert [p.loss for p in points[:30]] == pytest.approx(list(itertools.accumulate(losses, min)), rel=1e-4)


def test_time_of_scoring_does_not_count(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cross(victims=["coffee"], attacks=["match:april"], **TINY)
    (quick,) = run([case], path=path, max_evaluations=12, curve_every=1, progress=False)
    assigned = play._assigned
    monkeypatch.setattr(play, "_assigned", lambda *pair: (play.time.sleep(0.15), assigned(*pair))[1])
    (slow,) = run([case], path=path, resume=False, max_evaluations=12, curve_every=1, progress=False)
    assert slow.seconds < quick.seconds + 1  # thirteen scores of 0.15 s each
    (points,) = read_curves(path).values()
    assert points[-2].seconds < quick.seconds + 1


def test_digits_have_their_own_labels(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = mnist5k("test", dtype=torch.float64)
    seen = []

    def attack(model: Any, update: Any, *, labels: Any, **_: Any) -> Reconstruction:
        seen.append(labels.tolist())
        return Reconstruction("mine", images[[350, 7]], images[[350, 7]], None, False, "", {}, 0.0)

    monkeypatch.setitem(ATTACKS, "mine", Attack("mine", "mine", attack, "closed form", ()))
    grey = {"image_size": 28, "patch_size": 7, "width": 32, "depth": 1, "heads": 2, "channels": 1}
    victims = ["mnist:350", "mnist:7", "astronaut"]
    run(cross(victims=victims[:2], attacks=["mine"], batch_sizes=[2], labels="given", **grey), path=path, **QUICK)
    assert seen == [[3, 0]] == [labels[[350, 7]].tolist()]
    for case in cross(victims=victims, attacks=["mine"], batch_sizes=[3], seeds=range(20), **grey):
        _, mixed = private_pictures(case)
        assert mixed[:2].tolist() == [3, 0]
        assert mixed[2] not in (3, 0)


def test_weights_come_from_the_file_of_seed_and_position(tmp_path: Path, path: Path) -> None:
    for position in ("learned", "sinusoidal"):
        model = VisionTransformer(**TINY, classes=10, seed=9, position=position)
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        file = tmp_path / f"{position}-1.safetensors"
        train(model, images, torch.arange(8), epochs=1, batch_size=4, checkpoint=file, progress=False)
    template = str(tmp_path / "{position}-{seed}.safetensors")
    cases = cross(
        victims=["coffee"], attacks=["span"], positions=["learned", "sinusoidal"], weights=["init", template],
        seeds=[1], dtypes=["float64"], **TINY,
    )  # fmt: skip
    rows = run(cases, path=path, **QUICK)
    assert [row.weights_sha256 == "" for row in rows] == [True, True, False, False]
    assert len({row.predicted_psnr for row in rows}) == 4
    assert "| init |" in table(rows)
    assert f"| {template} |" in table(rows)
    model = VisionTransformer(**TINY, classes=10, seed=5)
    save_file(model.state_dict(), tmp_path / "learned-1.safetensors")
    with pytest.raises(CompareError, match=r"learned-1\.safetensors has changed"):
        run(cases, path=path, **QUICK)
