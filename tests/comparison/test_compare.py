"""The results comparison: rows that agree with direct calls, files that can be gone on with, figures, the command."""

from __future__ import annotations

import csv
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aprillab import viz
from aprillab.attacks import Reconstruction, embedding_closed_form, match_gradients
from aprillab.attacks.catalogue import ATTACKS, Attack
from aprillab.commands import cli
from aprillab.comparison import figures as compare_figures
from aprillab.comparison import run as compare
from aprillab.comparison.records import (
    Case,
    CompareError,
    pictures_file,
    read_curves,
    read_pictures,
    read_rows,
)
from aprillab.comparison.run import cross, report, run, table
from aprillab.data import load_victim, mnist5k
from aprillab.metrics import psnr, ssim
from aprillab.models import VisionTransformer
from aprillab.training import train
from aprillab.update import client_update
from aprillab.zoo import ModelError

TINY: dict[str, Any] = {"image_size": 8, "patch_size": 4, "width": 32, "depth": 1, "heads": 2}
QUICK: dict[str, Any] = {"max_evaluations": 12, "curve_every": 5, "progress": False}
FLAGS = ["--image-size", "8", "--patch-size", "4", "--width", "32", "--depth", "1", "--heads", "2"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "compare.csv"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the attacks as they are called."""
    called: list[str] = []
    for name, attack in list(ATTACKS.items()):

        def counted(*arguments: Any, attack: Attack = attack, **options: Any) -> Any:
            called.append(attack.name)
            return attack.function(*arguments, **options)

        monkeypatch.setitem(ATTACKS, name, replace(attack, function=counted))
    return called


def by_hand(seed: int, label: int, victim: str = "coffee") -> tuple[VisionTransformer, Any, torch.Tensor]:
    """Model, update and pixels of a case of TINY, in float64, without the comparison's code."""
    model = VisionTransformer(**TINY, classes=10, seed=seed).double()
    pixels = load_victim(victim, 8, dtype=torch.float64)[None]
    return model, client_update(model, 2 * pixels - 1, torch.tensor([label])), pixels


# --- Rows -----------------------------------------------------------------------------------------------------


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
    assert (closed.exact, closed.outcome) == (True, f"exact: {direct.reason}")
    assert (closed.evaluations, closed.loss, closed.stopped) == (None, None, "")
    searched = match_gradients(
        model, update, recipe="april", labels=torch.tensor([label]), seed=4, max_evaluations=12, progress=False
    )
    assert matched.psnr == pytest.approx(psnr(searched.pixels[0], pixels[0]), abs=1e-3)
    assert matched.ssim == pytest.approx(ssim(searched.pixels[0], pixels[0]), abs=1e-4)
    assert matched.loss == pytest.approx(searched.diagnostics["loss"], rel=1e-4)
    assert matched.residual == pytest.approx(searched.diagnostics["residual"], rel=1e-4)
    assert (matched.evaluations, matched.stopped, matched.exact) == (12, "evaluations", False)
    assert matched.outcome.startswith("not exact: gradients agree")
    assert closed.gradient_seconds == matched.gradient_seconds > 0
    assert matched.threads == torch.get_num_threads()
    assert matched.torch == torch.__version__
    assert closed.case.update == matched.case.update


def test_attacks_of_one_update_share_it_and_others_do_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(compare, "client_update", lambda *a, **k: made.append(client_update(*a, **k)) or made[-1])
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
    assert refused.outcome == (
        "refused: no position embedding gradient is shared: position_embedding is fixed or withheld"
    )
    assert (rows["span", "frozen"].psnr or 0) > 60
    assert rows["span", "none"].outcome.startswith("refused: without a position embedding")
    assert read_pictures(path, refused.case) is None
    shown = table(list(rows.values()))
    assert f"- embedding (1): {refused.outcome.removeprefix('refused: ')}" in shown
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
    assert mixture.outcome.startswith("not exact: ")
    assert "one image" in mixture.outcome
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
    assigned = compare._assigned
    monkeypatch.setattr(compare, "_assigned", lambda *pair: (compare.time.sleep(0.15), assigned(*pair))[1])
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
        _, mixed = compare._private(case)
        assert mixed[:2].tolist() == [3, 0]
        assert mixed[2] not in (3, 0)


# --- Weights of a file --------------------------------------------------------------------------------------------


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


def test_models_that_cannot_be_built_are_refused_first(path: Path, calls: list[str], tmp_path: Path) -> None:
    save_file(VisionTransformer(**TINY, classes=10).state_dict(), tmp_path / "w.safetensors")
    weights = ["init", str(tmp_path / "w.safetensors")]
    cases = cross(victims=["coffee"], attacks=["span"], positions=["learned", "sinusoidal"], weights=weights, **TINY)
    with pytest.raises(ModelError, match="position embedding is not the one of position='sinusoidal'"):
        run(cases, path=path, **QUICK)
    assert not calls
    assert not path.exists()


# --- Going on -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"victims": ("nobody",)}, "no victim 'nobody'"),
        ({"victims": ("mnist:3",)}, "one channel"),
        ({"victims": ("coffee",) * 11}, "11 victims in a batch"),
        ({"position": "spiral"}, "position 'spiral' is none of learned"),
        ({"dtype": "float16"}, "'float16' is none of float32, float64"),
        ({"labels": "guess"}, "'guess'"),
    ],
)
def test_cases_that_cannot_be(change: dict[str, Any], fragment: str) -> None:
    with pytest.raises(CompareError, match=fragment):
        Case(**{"attack": "span", "victims": ("coffee",), **change})


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


# --- Table and figures ----------------------------------------------------------------------------------------


def test_table_counts_and_takes_medians() -> None:
    rows = [
        compare.Row(
            case=Case(attack=attack, victims=("coffee",), seed=seed), psnr=value, psnr_min=value, ssim=0.5,
            exact=exact, predicted_psnr=None, loss=None, residual=None, evaluations=None, seconds=seconds,
            gradient_seconds=0.1, stopped="", outcome="", max_evaluations=5, max_seconds=None, weights_sha256="",
            aprillab="1", torch="2", python="3", threads=7, device="cpu", machine="abacus",
        )
        for attack, seed, value, exact, seconds in (
            ("span", 0, 70.0, True, 1.0), ("span", 1, 20.0, False, 3.0), ("span", 2, 60.0, True, 2.0),
            ("april", 0, float("nan"), False, 4.0),
        )
    ]  # fmt: skip
    lines = table(rows).splitlines()
    assert lines[0] == "| attack | runs | median dB | least dB | exact | refused | median s |"
    assert lines[2:] == [
        "| span | 3 | 60.0 | 20.0 | 2 of 3 | 0 | 2 |",
        "| april | 1 | -inf | -inf | 0 of 1 | 0 | 4 |",
    ]
    assert "| span | 1 | 1 | 20.0" in table(rows, by=["attack", "seed"])
    page = report(rows, "aprillab compare --seeds 0,1,2", {"a.png": "what is seen"})
    for text in (
        "aprillab 1, torch 2, python 3, abacus, 7 thread(s), cpu. Made by `aprillab compare --seeds 0,1,2`",
        "![what is seen](a.png)",
        "seed 0 / 1 / 2",
        "5 evaluations",
    ):
        assert text in page


def test_figures_show_every_attack(path: Path) -> None:
    cases = cross(
        victims=["coffee", "clock"], attacks=["embedding", "match:april"], positions=["learned", "frozen"],
        batch_sizes=[1, 2], seeds=[0, 1], **TINY,
    )  # fmt: skip
    rows = run(cases, path=path, **QUICK)
    first, second = compare_figures.picture_pages(rows, path, lines=5)
    assert (len(first.axes), len(second.axes)) == (5 * 3, 3 * 3)  # one seed: 4 single pictures, 2 batches of 2
    assert [ax.get_title() for ax in first.axes[:3]] == ["private", "embedding", "match:\napril"]
    assert first.axes[0].get_ylabel() == "coffee\nlearned"
    assert second.axes[0].get_ylabel() == "clock\nlearned\nbatch of 2"
    assert first.axes[1].get_xlabel() == f"{rows[0].psnr:.1f} dB"
    drawn = first.axes[0].images[0].get_array()
    assert torch.allclose(torch.tensor(drawn).permute(2, 0, 1), load_victim("coffee", 8).double(), atol=1e-6)
    found = read_pictures(path, rows[1].case)
    assert found is not None
    assert not torch.allclose(found[0], found[1], atol=0.1)
    drawn = first.axes[2].images[0].get_array()
    assert torch.allclose(torch.tensor(drawn).permute(2, 0, 1), found[1][0].double(), atol=1e-6)
    assert [text.get_text() for text in first.axes[7].texts] == ["refused"]
    assert not first.axes[7].images
    curves = compare_figures.curves(rows, path)
    assert curves is not None
    assert [ax.get_title() for ax in curves.axes] == ["learned, float32", "frozen, float32", "", ""]
    assert curves.axes[0].get_yscale() == "log"
    assert curves.axes[0].lines[0].get_ydata()[0] == 1
    seconds = compare_figures.seconds(rows)
    assert seconds is not None
    assert len(seconds.axes[0].lines) == 1 + sum(row.case.position == "learned" for row in rows)
    assert curves.legends[0].get_texts()[0].get_text() == "match:april"
    colours = [figure.legends[0].get_lines()[-1].get_color() for figure in (curves, seconds)]
    assert colours[0] == colours[1]  # an attack has one colour
    for figure in (first, curves, seconds):
        png = viz.to_png(figure)
        assert png.startswith(b"\x89PNG")
        assert 300 < int.from_bytes(png[16:20]) < 3000


def test_no_figures_of_refusals(path: Path) -> None:
    rows = run(cross(victims=["coffee"], attacks=["embedding"], positions=["none"], **TINY), path=path, **QUICK)
    assert compare_figures.curves(rows, path) is None
    assert compare_figures.seconds(rows) is None
    assert len(compare_figures.picture_pages(rows, path)) == 1


# --- The command --------------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> int:
    return cli.main(["compare", *map(str, arguments)])


def test_command_writes_everything_and_names_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calls: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--victims", "coffee,clock,cell", "--attacks", "span,match:april", "--positions", "learned"]
    options += [*FLAGS, "--max-evaluations", "9", "--batch-sizes", "1,2", "--name", "tiny", "--out", "results"]
    assert command(*options) == 0
    shown = capsys.readouterr()
    assert "8 attacks on 4 updates" in shown.out
    assert "batches of 2: cell left out" in shown.err
    folder = tmp_path / "results"
    assert {file.name for file in folder.iterdir()} == {
        "tiny.csv", "tiny.md", "tiny_curves.csv", "tiny_pictures", "tiny_pictures_1.png", "tiny_curves_1.png",
        "tiny_curves_2.png", "tiny_seconds_1.png", "tiny_seconds_2.png",
    }  # fmt: skip
    page = (folder / "tiny.md").read_text()
    assert all((folder / name).is_file() for name in re.findall(r"\]\(([^)]+)\)", page))
    assert str(tmp_path) not in page
    rows = read_rows(folder / "tiny.csv")
    again = re.search(r"Made by `aprillab compare (.*?)`", page)[1].split()
    assert command(*again) == 0
    assert len(calls) == 8  # the command in the page means the same rows
    assert read_rows(folder / "tiny.csv") == rows


def test_interrupted_command_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(ATTACKS, "april", replace(ATTACKS["april"], function=interrupt))
    assert command("--attacks", "embedding,april", *FLAGS, "--out", tmp_path) == 130
    error = capsys.readouterr().err
    assert "compare.csv has what was done; the same command goes on" in error
    assert error.splitlines()[-1] == "aprillab: error: interrupted"
    assert [row.case.attack for row in read_rows(tmp_path / "compare.csv")] == ["embedding"]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--victims", "nobody"], "no victim 'nobody'"),
        (["--victims", "coffee,"], "no list such as"),
        (["--attacks", "deep"], "no attack 'deep'"),
        (["--positions", "spiral"], "position 'spiral'"),
        (["--models", "vgg16"], "no model 'vgg16'"),
        (["--width", "33"], "width=33"),
        (["--weights", "absent.safetensors"], "absent.safetensors"),
        (["--seeds", "0,many"], "'many' is no whole number"),
        (["--batch-sizes", "3"], "a batch of 3"),
        (["--max-evaluations", "1"], "max_evaluations=1"),
        (["--max-seconds", "-1"], "no positive number"),
        (["--device", "abacus"], "--device abacus"),
        (["--name", "a/b"], "--name a/b"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], fragment: str
) -> None:
    assert command(*FLAGS, "--out", tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert error.count("aprillab: error:") == 1
    assert fragment in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_foreign_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "compare.csv").write_text("a,b\n1,2\n")
    assert command("--attacks", "span", *FLAGS, "--out", tmp_path) == 2
    assert "its columns are not this version's" in capsys.readouterr().err.splitlines()[-1]
    assert command("--attacks", "span", "--again", *FLAGS, "--out", tmp_path) == 0
