"""The effect study: its plan, its weights, its tables, and its smallest run."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import aprillab as al
from aprillab.attacks import CLOSED_FORMS
from aprillab.attacks.catalogue import ATTACKS
from aprillab.comparison import run as compare
from aprillab.comparison.cases import Case
from aprillab.comparison.records import ROW_COLUMNS, CaseOutcome, Row, read_curves, read_rows
from aprillab.training import evaluate
from aprillab.zoo import build_model
from studies._rows import StudyError, read
from studies._runner import RESULTS
from studies.effect import measure as effect
from studies.effect import page
from studies.effect.__main__ import main
from studies.effect.figures import shown_twins
from studies.effect.measure import MODELS, POSITIONS, SMALLEST, Head, Reordered, Study, Weights, plan
from studies.effect.page import cell, chosen, rows_of, scores, twins

TINY = replace(SMALLEST, shape=SMALLEST.shape | {"width": 16, "depth": 1}, victims=("mnist:7", "mnist:207"))


def row(psnr: float | None, **options: Any) -> Row:
    case = Case(**({"attack": "span", "victims": ("coffee",)} | options))
    return Row(
        case=case, psnr=psnr, psnr_min=psnr, ssim=None, exact=None if psnr is None else False, predicted_psnr=None,
        loss=1e-3, residual=None, evaluations=None, seconds=1.0, gradient_seconds=0.1, stopped="",
        outcome=CaseOutcome("exact", ""), max_evaluations=5,
        max_seconds=None, weights_sha256="", aprillab="1", torch="2", python="3", threads=1, device="cpu",
        machine="m",
    )  # fmt: skip


def frame(rows: list[Row]) -> pd.DataFrame:
    """As :func:`studies.effect.page.rows_of` makes it."""
    moments = {Study().weights(when): when for when in effect.WEIGHTS}
    columns = [*vars(row(1.0).case), *vars(row(1.0))]
    found = pd.DataFrame([vars(row.case) | vars(row) for row in rows], columns=columns)
    return found.assign(when=found.weights.map(moments), refused=found.exact.isna())


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
    searched = parts["twins"].cases
    for position in ("learned", "frozen", "sinusoidal"):
        here = [case for case in searched if case.position == position]
        assert len({(case.victims, case.seed) for case in here}) == len(here) == 5 * 2
    assert {(c.attack, c.model, c.dtype, c.weights) for c in searched} == {
        ("match:april", "prenorm", "float64", "init")
    }
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
    with pytest.raises(StudyError, match=r"late\.safetensors is of another study.*Remove it"):
        effect.trained(replace(study, images=50), "april", "sinusoidal", 3, "late")


def test_misses_are_the_gradient_in_the_logits(tmp_path: Path) -> None:
    study = replace(TINY, checkpoints=tmp_path, moments=("init",))
    images, labels = al.mnist5k("test", dtype=torch.float64)
    for model, position in (("april", "none"), ("prenorm", "sinusoidal-2d")):
        net = build_model(model, position=position, seed=0, dtype=torch.float64, **study.shape)
        update = al.client_update(net, al.HALF.to_input(images[207:208]), labels[207:208])
        expected = update.gradients["head.bias"].norm().item()  # ∂l/∂b is p − y
        found = effect.misses(study, model, position, "init")  # one a victim
        assert found[1] == pytest.approx(expected, rel=1e-9)
        (kind,) = effect.weighed(study, (model, position, "init"))
        assert (kind.miss, kind.miss_least, kind.accuracy) == (sum(found) / 2, min(found), None)


def test_accuracies_are_summed_up_over_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = replace(TINY, checkpoints=tmp_path, seeds=(0, 1, 2))
    facts = [{"loss": 0.5, "accuracy": 0.6}, {"loss": 0.7, "accuracy": 0.7}, {"loss": 0.9, "accuracy": 0.5}]
    monkeypatch.setattr(effect, "trained", lambda study, model, position, seed, when: facts[seed])
    monkeypatch.setattr(effect, "misses", lambda *_: [0.1, 0.3, 0.2])
    (kind,) = effect.weighed(study, ("prenorm", "none", "late"))
    assert (kind.accuracy, kind.accuracy_least, kind.accuracy_most) == pytest.approx((60, 50, 70))
    assert (kind.loss, kind.miss, kind.miss_least) == pytest.approx((0.7, 0.2, 0.1))
    assert "| B | no embedding | late | 60 (50 to 70) | 0.7 | 0.2 (0.1) |" in page.weights_table(pd.DataFrame([kind]))


# --- Tables ---------------------------------------------------------------------------------------------------


def test_a_cell_says_what_was_run() -> None:
    assert cell(frame([])) == "not run"
    assert cell(frame([row(None), row(None)])) == "refused ×2"
    assert cell(frame([row(60.0), row(20.4), row(300.0)])) == "60 (20) ×3"
    assert cell(frame([row(60.0), row(20.4), row(None)])) == "40 (20) ×2, 1 refused"
    assert cell(frame([row(60.0), row(float("nan")), row(70.0)])) == "60 (-inf) ×3"


def test_the_grid_puts_rows_where_they_belong() -> None:
    late = Study().weights("late")
    rows = [
        row(70.0, model="april", position="frozen", weights=late, dtype="float32"),
        row(30.0, model="april", position="frozen", weights="init", dtype="float32"),
        row(20.0, model="prenorm", position="frozen", weights=late, dtype="float32"),
    ]
    lines = page.architecture(frame(rows), Study(), "april").splitlines()
    head = [text.strip() for text in lines[0].split("|")]
    at = head.index("span float32")
    cells = {tuple(t.strip() for t in line.split("|")[1:3]): line.split("|")[at].strip() for line in lines[2:]}
    assert len(cells) == 15
    assert {key: text for key, text in cells.items() if text != "not run"} == {
        ("frozen", "late"): "70 (70) ×1",
        ("frozen", "init"): "30 (30) ×1",
    }


def test_pictures_show_victims_whose_learned_run_came_home() -> None:
    runs = [
        row(psnr, victims=(victim,), seed=seed)
        for victim, seed, psnr in (("coffee", 0, 8.0), ("cell", 0, 40.0), ("coffee", 1, 90.0), ("clock", 0, 12.0))
    ]
    found = frame(runs).assign(first_loss=1.0, first_psnr=5.0)
    assert shown_twins(found) == [("cell", 0), ("coffee", 1)]
    assert shown_twins(found.iloc[[0, 3]]) == [("coffee", 0), ("clock", 0)]
    text = page.twin_table(found, pd.Series({"learned": 27.0}))
    assert "| learned | 4 | 1 | 0.001 | 1e+03 |" in text
    assert "26.0 (8.0 to 90.0) | 2 | 27.0 |" in text
    assert "| frozen | 0 | – |" in text
    assert "equal to 8 bits |" in page.twin_table(found, pd.Series({"learned": float("inf")}))


def test_a_surer_head_shrinks_the_miss_and_hurts_no_closed_form(tmp_path: Path) -> None:
    study = replace(SMALLEST, checkpoints=tmp_path, victims=("mnist:7",))
    for position in ("learned", "frozen"):
        effect.trained(study, "prenorm", position, 0, "late")
    found = {attack: list(effect.saturated(study, attack)) for attack in effect.SURER}
    assert all([entry.factor for entry in entries] == list(effect.FACTORS) for entries in found.values())
    model = build_model(
        "prenorm", position="learned", seed=0, **study.shape,
        weights=study.weights("late").format(model="prenorm", position="learned", seed=0),
    )  # fmt: skip
    images, labels = al.mnist5k("test")
    update = al.client_update(model, al.HALF.to_input(images[7:8]), labels[7:8])
    assert found["embedding"][0].miss == pytest.approx(update.gradients["head.bias"].norm().item(), rel=1e-4)
    entries = [entry for entries in found.values() for entry in entries]
    assert len({entry.miss for entry in entries}) == len(entries)
    assert all(entry.psnr > 60 for entry in entries)


def test_heads_are_banded_by_how_wrong_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = ((0.5, 90.0), (0.2, 70.0), (0.1, 80.0), (1e-7, 60.0), (0.0, 50.0))  # ‖p − y‖ and dB
    monkeypatch.setattr(effect, "saturated", lambda *_: [effect.Saturated(1, *pair) for pair in pairs])
    heads = [head for attack in effect.SURER for head in effect.banded(Study(), (attack,))]
    assert [(head.band, head.psnr, head.psnr_least, head.updates) for head in heads[:5]] == [
        ("above 1e-01", 80.0, 70.0, 3), ("1e-03 to 1e-01", None, None, 0), ("1e-06 to 1e-03", None, None, 0),
        ("1e-09 to 1e-06", 60.0, 60.0, 1), ("below 1e-09", 50.0, 50.0, 1),
    ]  # fmt: skip
    lines = page.heads_table(pd.DataFrame(heads)).splitlines()
    assert lines[2:4] == ["| above 1e-01 | 80 (70) ×3 | 80 (70) ×3 |", "| 1e-03 to 1e-01 | – | – |"]


# --- The smallest study ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("effect")
    main(["--quick", "--out", str(folder)])
    return folder


@pytest.fixture
def study(folder: Path) -> Study:
    return replace(SMALLEST, checkpoints=folder / "checkpoints")


def test_quick_run_has_every_part_and_a_page(folder: Path, study: Study) -> None:
    assert (folder / "effect.csv").read_text().splitlines()[0].split(",") == ROW_COLUMNS
    asked = {case for part in plan(study) for case in part.cases}
    assert {found.case for found in read_rows(folder / "effect.csv")} == asked
    rows = rows_of(folder / "effect.csv", study)
    assert set(rows.attack) == set(ATTACKS)

    def decibels(attack: str, position: str, dtype: str) -> list[float]:
        here = chosen(rows, attack=attack, position=position, dtype=dtype, model="prenorm")
        assert len(here) == 2 * 2  # victims × moments
        return list(scores(here))

    assert decibels("embedding", "learned", "float32")[0] > 60
    for position in POSITIONS[1:]:
        assert not decibels("embedding", position, "float32")
    assert decibels("span", "frozen", "float32")[0] > 60
    assert decibels("span", "sinusoidal", "float32")[-1] < 40 < 100 < decibels("span", "sinusoidal", "float64")[0]
    assert decibels("span", "sinusoidal-2d", "float64")[-1] < 40
    assert not decibels("span", "none", "float64")

    text = (folder / "effect.md").read_text(encoding="utf-8")
    assert all((folder / name).is_file() for name in re.findall(r"\]\(([^)]+)\)", text))
    assert str(folder) not in text
    for part in plan(study):
        assert f"| {part.name} | {len(part.cases)} | {len(part.cases)} |" in text
    for name in ("effect.png", "effect_twins.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_facts_beside_the_plan_are_kept(folder: Path, study: Study) -> None:
    kinds, heads = read(folder / "effect_weights.csv", Weights), read(folder / "effect_heads.csv", Head)
    assert len(kinds) == len(MODELS) * len(POSITIONS) * len(study.moments)
    assert (kinds.accuracy.isna() == (kinds.weights == "init")).all()
    assert heads.groupby("attack").updates.sum().to_dict() == dict.fromkeys(effect.SURER, 2 * len(effect.FACTORS))
    pieces = read(folder / "effect_twins.csv", Reordered)
    found = twins(rows_of(folder / "effect.csv", study), folder / "effect.csv")
    assert list(pieces.runs) == [2, 2, 2]
    for position, psnr in zip(pieces.position, pieces.psnr, strict=True):
        assert psnr > found[found.position == position].psnr.median() - 0.1  # of 8-bit pictures


def test_twins_begin_where_their_curves_begin(folder: Path, study: Study) -> None:
    path = folder / "effect.csv"
    curves, found = read_curves(path), twins(rows_of(path, study), path)
    assert found.groupby("position").size().to_dict() == {"learned": 2, "frozen": 2, "sinusoidal": 2}
    for twin in found.itertuples():
        points = curves[twin.update, "match:april", "recover"]
        assert (twin.first_loss, twin.first_psnr) == (points[0].loss, points[0].psnr)
        assert points[0].evaluation == 1
        assert twin.first_loss > twin.loss == points[-1].loss


def test_a_second_run_trains_and_attacks_nothing_and_says_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("done already")

    for owner, name in ((effect, "train"), (effect, "weighed"), (effect, "saturated"), (compare, "play_client")):
        monkeypatch.setattr(owner, name, never)
    # Nor does it need the pictures, which the repository does not keep: their figure stays as it
    # is.
    (folder / "effect_pictures").rename(folder / "elsewhere")
    before = {path.name: path.read_bytes() for path in folder.glob("effect*.*")}
    main(["--quick", "--out", str(folder)])
    assert {path.name: path.read_bytes() for path in folder.glob("effect*.*")} == before
    (folder / "elsewhere").rename(folder / "effect_pictures")


def test_the_committed_page_is_that_of_the_committed_rows() -> None:
    study = Study()
    rows = rows_of(RESULTS / "effect.csv", study)
    assert len(rows) == sum(len(part.cases) for part in plan(study))
    text = (RESULTS / "effect.md").read_text(encoding="utf-8")
    for model in MODELS:
        assert page.architecture(rows, study, model) in text
