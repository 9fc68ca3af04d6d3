"""The effect study: its plan against the grid it claims, its weights, its tables, and its smallest run."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import aprillab as al
from aprillab.attacks import CLOSED_FORMS
from aprillab.comparison import run as compare
from aprillab.comparison.records import ROW_COLUMNS, Case, Row, read_curves, read_rows
from aprillab.comparison.run import ATTACKS
from aprillab.training import evaluate
from aprillab.zoo import build_model
from studies.effect import measure as effect
from studies.effect.measure import MODELS, POSITIONS, SMALLEST, Study, Twin, cell, plan

TINY = replace(SMALLEST, shape=SMALLEST.shape | {"width": 16, "depth": 1}, victims=("mnist:7", "mnist:207"))


def row(psnr: float | None, **options: Any) -> Row:
    case = Case(**({"attack": "span", "victims": ("coffee",)} | options))
    return Row(
        case=case, psnr=psnr, psnr_min=psnr, ssim=None, exact=None, predicted_psnr=None, loss=1e-3, residual=None,
        evaluations=None, seconds=1.0, gradient_seconds=0.1, stopped="", outcome="", max_evaluations=5,
        max_seconds=None, weights_sha256="", aprillab="1", torch="2", python="3", threads=1, device="cpu",
        machine="m",
    )  # fmt: skip


# --- The plan -------------------------------------------------------------------------------------------------


def test_the_plan_covers_the_grid_it_claims() -> None:
    study = Study()
    parts = {part.name: part for part in plan(study)}
    every = [case for part in parts.values() for case in part.cases]
    assert len(set(every)) == len(every)  # no case in two parts
    assert {case.attack for case in every} == set(ATTACKS)
    moments = [study.weights(when) for when in ("init", "early", "late")]
    asked = set(
        itertools.product(MODELS, POSITIONS, ("float64", "float32"), moments, range(3), study.victims, CLOSED_FORMS)
    )
    closed = parts["closed forms"].cases
    assert {(c.model, c.position, c.dtype, c.weights, c.seed, *c.victims, c.attack) for c in closed} == asked
    assert len(asked) == 2 * 5 * 2 * 3 * 3 * 5 * 3
    twins = parts["twins"].cases
    for position in ("learned", "frozen", "sinusoidal"):
        here = [case for case in twins if case.position == position]
        assert len({(case.victims, case.seed) for case in here}) == len(here) == 5 * 2
    assert {(c.attack, c.model, c.dtype, c.weights) for c in twins} == {("match:april", "prenorm", "float64", "init")}
    april = {(c.model, c.position, c.weights, c.dtype) for c in every if c.attack == "match:april"}
    assert april >= set(itertools.product(MODELS, POSITIONS, moments[::2], ("float64",)))
    assert "closed forms: 2700 attacks on 900 updates\n" in effect.size(plan(study))
    assert "twins: 30 attacks on 30 updates, up to 9000 evaluations" in effect.size(plan(study))


def test_victims_are_test_digits_of_different_classes() -> None:
    _, labels = al.mnist5k("test")
    assert len({int(labels[int(victim.removeprefix("mnist:"))]) for victim in Study().victims}) == 5


# --- The weights ----------------------------------------------------------------------------------------------


def test_weights_are_trained_once_and_never_on_test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = replace(TINY, checkpoints=tmp_path)
    seen = []

    def watched(model: Any, images: torch.Tensor, labels: torch.Tensor, **options: Any) -> Any:
        seen.append((images, labels, options["epochs"]))
        return al.training.train(model, images, labels, **options)

    monkeypatch.setattr(effect, "train", watched)
    early = effect.trained(study, "april", "sinusoidal", 3, "early")
    late = effect.trained(study, "april", "sinusoidal", 3, "late")
    assert [epochs for *_, epochs in seen] == [1, study.epochs]
    assert torch.equal(seen[0][0], seen[1][0])
    assert len(seen[0][1].unique()) > 5  # sorted by class in the data, drawn at random here
    test, labels = al.mnist5k("test")
    known = {image.numpy().tobytes() for image in al.HALF.to_input(test)}
    assert not any(image.numpy().tobytes() in known for image in seen[0][0])
    model = build_model(
        "april", position="sinusoidal", seed=0, weights=study.weights("late").format(
            model="april", position="sinusoidal", seed=3
        ), **study.shape,
    )  # fmt: skip
    assert late["accuracy"] == evaluate(model, al.HALF.to_input(test), labels)
    assert early["loss"] > late["loss"]
    assert effect.trained(study, "april", "sinusoidal", 3, "late") == late
    assert len(seen) == 2
    with pytest.raises(SystemExit, match=r"late\.safetensors is of another study.*Remove it"):
        effect.trained(replace(study, images=50), "april", "sinusoidal", 3, "late")


def test_misses_are_the_gradient_in_the_logits(tmp_path: Path) -> None:
    study = replace(TINY, checkpoints=tmp_path, moments=("init",))
    found = effect.misses(study)
    assert len(found) == 2 * 5 * 1 * 2
    images, labels = al.mnist5k("test", dtype=torch.float64)
    for model, position in (("april", "none"), ("prenorm", "sinusoidal-2d")):
        net = build_model(model, position=position, seed=0, dtype=torch.float64, **study.shape)
        update = al.client_update(net, al.HALF.to_input(images[207:208]), labels[207:208])
        expected = update.gradients["head.bias"].norm().item()  # ∂l/∂b is p − y
        assert found[model, position, "init", 0, "mnist:207"] == pytest.approx(expected, rel=1e-9)


# --- Tables ---------------------------------------------------------------------------------------------------


def test_a_cell_says_what_was_run() -> None:
    assert cell([]) == "not run"
    assert cell([row(None), row(None)]) == "refused ×2"
    assert cell([row(60.0), row(20.4), row(300.0)]) == "60 (20) ×3"
    assert cell([row(60.0), row(20.4), row(None)]) == "40 (20) ×2, 1 refused"
    assert cell([row(60.0), row(float("nan")), row(70.0)]) == "60 (-inf) ×3"


def test_the_grid_puts_rows_where_they_belong() -> None:
    late = Study().weights("late")
    rows = [
        row(70.0, model="april", position="frozen", weights=late, dtype="float32"),
        row(30.0, model="april", position="frozen", weights="init", dtype="float32"),
        row(20.0, model="prenorm", position="frozen", weights=late, dtype="float32"),
    ]
    lines = effect.grid(rows, Study(), "april").splitlines()
    head = [text.strip() for text in lines[0].split("|")]
    at = head.index("span float32")
    cells = {tuple(t.strip() for t in line.split("|")[1:3]): line.split("|")[at].strip() for line in lines[2:]}
    assert len(cells) == 15
    assert {key: text for key, text in cells.items() if text != "not run"} == {
        ("frozen", "late"): "70 (70) ×1",
        ("frozen", "init"): "30 (30) ×1",
    }


def test_pictures_show_victims_whose_learned_run_came_home() -> None:
    def twin(victim: str, seed: int, psnr: float) -> Twin:
        return Twin(row(psnr, victims=(victim,), seed=seed), 1.0, 5.0, psnr + 1)

    runs = [twin("coffee", 0, 8.0), twin("cell", 0, 40.0), twin("coffee", 1, 90.0), twin("clock", 0, 12.0)]
    assert effect.shown_twins({"learned": runs}) == [("cell", 0), ("coffee", 1)]
    assert effect.shown_twins({"learned": [runs[0], runs[3]]}) == [("coffee", 0), ("clock", 0)]
    text = effect.twin_table({"learned": runs, "frozen": []})
    assert "| learned | 4 | 1 | 0.001 | 1e+03 |" in text
    assert "26.0 (8.0 to 90.0) | 2 | 27.0 |" in text
    assert "| frozen | 0 | not run |" in text


def test_patches_are_put_where_they_fit_best() -> None:
    private = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    patches = al.patchify(private, 7)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = al.unpatchify(patches[:, order], 7, (28, 28))
    assert al.psnr(shuffled[0], private[0]) < 10
    assert effect.reordered_psnr(private, shuffled, 7) > 100
    assert effect.reordered_psnr(private, (shuffled + 0.1).clamp_max(1), 7) == pytest.approx(
        al.psnr((private + 0.1).clamp_max(1)[0].double(), private[0].double()), abs=1e-6
    )
    turned = al.unpatchify(patches.flip(-1), 7, (28, 28))  # the patches themselves upside down
    assert effect.reordered_psnr(private, turned, 7) < 15


def test_a_surer_head_shrinks_the_miss_and_hurts_no_closed_form(tmp_path: Path) -> None:
    study = replace(SMALLEST, checkpoints=tmp_path, victims=("mnist:7",))
    for position in ("learned", "frozen"):
        effect.trained(study, "prenorm", position, 0, "late")
    found = effect.saturated(study)
    assert [(entry.attack, entry.factor) for entry in found] == [
        (attack, factor) for attack in ("embedding", "span") for factor in effect.FACTORS
    ]
    model = build_model(
        "prenorm", position="learned", seed=0, **study.shape,
        weights=study.weights("late").format(model="prenorm", position="learned", seed=0),
    )  # fmt: skip
    images, labels = al.mnist5k("test")
    update = al.client_update(model, al.HALF.to_input(images[7:8]), labels[7:8])
    assert found[0].miss == pytest.approx(update.gradients["head.bias"].norm().item(), rel=1e-4)
    assert len({entry.miss for entry in found}) == len(found)
    assert all(entry.psnr > 60 for entry in found)
    assert "| above 1e-01 |" in effect.saturation_table(found)


# --- The smallest study ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("effect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["effect", "--quick", "--output", str(folder)])
        effect.main()
    return folder


def test_quick_run_has_every_part_and_a_page(folder: Path) -> None:
    study = replace(SMALLEST, checkpoints=folder / "checkpoints")
    text = (folder / "effect.csv").read_text()
    assert text.splitlines()[0].split(",") == ROW_COLUMNS
    rows = read_rows(folder / "effect.csv")
    assert {found.case for found in rows} == {case for part in plan(study) for case in part.cases}
    assert {found.case.attack for found in rows} == set(ATTACKS)

    def decibels(attack: str, position: str, dtype: str) -> list[float]:
        here = effect.chosen(rows, study, attack=attack, position=position, dtype=dtype, model="prenorm")
        assert len(here) == 2 * 2  # victims × moments
        return effect.scores(here)

    assert decibels("embedding", "learned", "float32")[0] > 60
    for position in POSITIONS[1:]:
        assert not decibels("embedding", position, "float32")
    assert decibels("span", "frozen", "float32")[0] > 60
    assert decibels("span", "sinusoidal", "float32")[-1] < 40 < 100 < decibels("span", "sinusoidal", "float64")[0]
    assert decibels("span", "sinusoidal-2d", "float64")[-1] < 40
    assert not decibels("span", "none", "float64")

    page = (folder / "effect.md").read_text()
    assert all((folder / name).is_file() for name in re.findall(r"\]\(([^)]+)\)", page))
    assert str(folder) not in page
    for part in plan(study):
        assert f"| {part.name} | {len(part.cases)} | {len(part.cases)} |" in page
    for name in ("effect.png", "effect_twins.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_twins_begin_where_their_curves_begin(folder: Path) -> None:
    study = replace(SMALLEST, checkpoints=folder / "checkpoints")
    path = folder / "effect.csv"
    rows, curves = read_rows(path), read_curves(path)
    found = effect.twins(rows, study, path)
    assert [len(runs) for runs in found.values()] == [2, 2, 2]
    for runs in found.values():
        for twin in runs:
            points = curves[twin.row.case.update, "match:april", "recover"]
            assert (twin.first_loss, twin.first_psnr) == (points[0].loss, points[0].psnr)
            assert points[0].evaluation == 1
            assert twin.first_loss > twin.loss == points[-1].loss


def test_a_second_run_trains_and_attacks_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("done already")

    monkeypatch.setattr(effect, "train", never)
    monkeypatch.setattr(compare, "_play_client", never)
    before = (folder / "effect.csv").read_bytes()
    monkeypatch.setattr(effect, "write", lambda *_: None)  # the page costs more than all the rest
    monkeypatch.setattr(sys, "argv", ["effect", "--quick", "--output", str(folder)])
    effect.main()
    assert (folder / "effect.csv").read_bytes() == before
    assert "| twins | 6 | 6 | 5 |" in capsys.readouterr().out
