"""The fuzz: worlds are what their seeds say, faults are seen, and the page counts them."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import aprillab as al
from studies._rows import read
from studies._runner import RESULTS
from studies.fuzz import __main__ as command
from studies.fuzz import measure, page
from studies.fuzz.client import build, group, pictures, play
from studies.fuzz.measure import Row, attacked, faults, oracle, outcome, reason_class
from studies.fuzz.worlds import KINDS, LOSSY, VANISHED, Model, Tampering, World, draw

MODEL = Model(
    library="aprillab", image_size=8, patch_size=4, channels=1, width=24, depth=1, heads=2, classes=5,
    block="prenorm", position="learned", class_token=True, bias=True,
)  # fmt: skip
PLAIN = World(
    seed=1, model=MODEL, dtype="float64", pictures=("noise",), same_pictures=False, same_labels=False,
    says_batch=True, withheld=(), frozen=False, tampering=Tampering(),
)  # fmt: skip


def done(**what: Any) -> World:
    return replace(PLAIN, tampering=Tampering(**what))


def row(outcome: str = "exact", **what: Any) -> Row:
    values = {"seed": 1, "done": "", "dtype": "float32", "images": 1, "oracle": 99.0, "attack": "invert"}
    return Row(**{**values, "outcome": outcome, **what})


# --- Worlds -------------------------------------------------------------------------------------------------------


def test_a_seed_is_a_world_and_traces_nothing() -> None:
    state = torch.random.get_rng_state()
    assert draw(5) == draw(5)
    assert len({draw(seed) for seed in range(50)}) == 50
    first, second = (play(draw(5)) for _ in range(2))
    assert torch.equal(first.pixels, second.pixels)
    assert first.update.gradients.keys() == second.update.gradients.keys()
    assert all(torch.equal(g, second.update.gradients[name]) for name, g in first.update.gradients.items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_kind_is_drawn() -> None:
    worlds = [draw(seed) for seed in range(3000)]
    for field in fields(Model):
        assert len({getattr(world.model, field.name) for world in worlds}) > 1, field.name
    kinds = Counter(kind for world in worlds for kind in world.kinds().split(", "))
    assert set(kinds) == {"", "dropout", "states", "local steps", *KINDS.values()}
    assert min(kinds.values()) > 20
    assert set(LOSSY) <= {VANISHED, *KINDS.values()}
    withheld = {part for world in worlds for part in world.withheld}
    assert withheld == {"position", "head", "head_weight", "head_bias", "patch", "attention", "some"}
    assert {kind for world in worlds for kind in world.pictures} == {
        "victim",
        "noise",
        "flat",
        "grey",
        "pixel",
        "tiles",
    }
    assert {world.batch for world in worlds} == {1, 2, 3}
    assert {world.dtype for world in worlds} == {"float32", "float64"}


def test_widths_are_below_and_above_the_counts() -> None:
    models = [draw(seed).model for seed in range(1000)]
    for off in (-1, 0, 1, 2):
        assert any(m.width == m.patches + m.class_token + off for m in models)
        assert any(
            m.width == min(m.pixels_per_patch, m.patches) + m.patches + m.class_token + 1 + off for m in models
        )
    assert all(m.width % m.heads == 0 for m in models)


@pytest.mark.parametrize("library", ["aprillab", "timm", "torchvision"])
def test_a_models_tensors_fall_into_the_groups(library: str) -> None:
    model = build(replace(PLAIN, model=replace(MODEL, library=library, channels=3)))
    anatomy = al.dissect(model)
    assert group(anatomy.patch_weight) == "patch_embedding"
    assert group(anatomy.position) == "position"
    assert group(anatomy.head_weight) == "head"
    assert group(anatomy.query.name) == "blocks"
    assert {group(name) for name in anatomy.prefix} == {"class_token"}


def test_weights_are_scaled_as_said() -> None:
    scaled = build(replace(PLAIN, model=replace(MODEL, scaled=("head", 3.0))))
    for (name, plain), other in zip(build(PLAIN).named_parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(other, plain * (3.0 if group(name) == "head" else 1.0))


@pytest.mark.parametrize("kind", ["victim", "noise", "flat", "grey", "pixel", "tiles"])
def test_pictures_are_pixels(kind: str) -> None:
    world = replace(PLAIN, pictures=(kind,) * 2, same_pictures=True)
    pixels = pictures(world)
    assert pixels.shape == (2, 1, 8, 8)
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert torch.equal(pixels[0], pixels[1])
    distinct = len(al.patchify(pixels[:1], 4)[0].unique(dim=0))
    assert distinct == {"victim": 4, "noise": 4, "pixel": 2}.get(kind, 1)
    if kind in ("victim", "noise"):
        other = pictures(replace(world, same_pictures=False))
        assert not torch.equal(other[0], other[1])


# --- Updates ------------------------------------------------------------------------------------------------------


def ratio(world: World, name: str) -> torch.Tensor:
    return play(world).update.gradients[name] / play(PLAIN).update.gradients[name]


def test_what_is_done_to_an_update() -> None:
    names = list(play(PLAIN).update.gradients)
    torch.testing.assert_close(ratio(done(factor=-3.0), "head.bias"), torch.full((5,), -3.0).double())
    each = [ratio(done(factors="each"), name) for name in names]
    factors = torch.stack([one[one.isfinite()].median() for one in each])
    assert len(factors.unique()) == len(names)
    assert 0.1 <= factors.min() < 1 < factors.max() <= 10
    moved = {name for name in names if not ratio(done(factors="position"), name).nan_to_num(1).allclose(PLAIN_ONE)}
    assert moved == {"position_embedding"}
    plain, noisy = (play(world).update.gradients["head.weight"] for world in (PLAIN, done(noise=1e-3)))
    assert 0.5e-3 < float((noisy - plain).square().mean().sqrt() / plain.square().mean().sqrt()) < 2e-3
    assert play(done(cast="float16")).update.dtype == torch.float16
    zeros = [name for name, g in play(done(zeroed=True)).update.gradients.items() if not g.any()]
    assert len(zeros) == 1
    assert sum(int((~g.isfinite()).sum()) for g in play(done(poisoned=True)).update.gradients.values()) == 1
    weights, plain = play(PLAIN).model.state_dict(), play(PLAIN).update.gradients
    sent = play(done(weights=True)).update.gradients
    for name in names:
        torch.testing.assert_close(sent[name], weights[name] - 1e-3 * plain[name])


PLAIN_ONE = torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_local_steps_are_a_difference_of_states(momentum: float) -> None:
    one, three = (play(done(steps=n, learning_rate=1e-3, momentum=momentum)).update for n in (1, 3))
    assert one.source == three.source == "fedavg"
    plain = play(PLAIN).update.gradients["head.bias"]
    torch.testing.assert_close(one.gradients["head.bias"], plain)
    grown = float(three.gradients["head.bias"].norm() / plain.norm())
    assert (1 < grown < 2) if momentum else (0.5 < grown < 1), grown
    if not momentum:
        moved = play(done(steps=1, adam=True)).update.gradients["head.bias"]
        torch.testing.assert_close(moved.abs(), torch.ones(5).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("loss", ["smoothing", "soft", "binary"])
def test_another_loss_is_another_gradient(loss: str) -> None:
    plain, other = (play(world).update.gradients["head.bias"] for world in (PLAIN, done(loss=loss)))
    assert not torch.allclose(plain, other)
    assert abs(float(other.sum())) < 1e-12 or loss == "binary"


def test_withheld_and_frozen() -> None:
    shared = play(replace(PLAIN, withheld=("position", "head")))
    assert set(shared.update.withheld) == {"position_embedding", "head.weight", "head.bias"}
    frozen = replace(done(noise=0.1), withheld=("patch",), frozen=True)
    for world in (frozen, frozen.ideal()):
        shared = play(world)
        assert shared.update.withheld == ()
        assert not shared.model.patch_embedding.weight.requires_grad
        assert "patch_embedding.weight" not in shared.update.gradients
    assert (
        "patch_embedding.weight"
        not in play(replace(PLAIN, withheld=("patch",), frozen=True).ideal()).update.gradients
    )


# --- What is found ------------------------------------------------------------------------------------------------


def test_an_attack_is_scored_against_the_nearest_image() -> None:
    shared = play(PLAIN)
    found = outcome(shared, "embedding")
    assert found.outcome == "exact"
    assert found.psnr > 200
    others = torch.cat([torch.zeros_like(shared.pixels), shared.pixels])
    assert outcome(replace(shared, pixels=others), "embedding").psnr == found.psnr
    assert outcome(replace(shared, pixels=others[:1]), "embedding").psnr < 30


def test_a_refusal_is_none_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def attack(error: Exception, *, inside: bool) -> str:
        def function(model: Any, update: Any) -> None:
            if inside:
                al.load_victim("nobody")  # a ValueError of the package's own
            raise error

        monkeypatch.setattr(measure, "CLOSED_FORMS", {"mine": SimpleNamespace(function=function)})
        return outcome(play(PLAIN), "mine").outcome

    assert attack(al.AttackNotApplicable("mine", "too narrow"), inside=False) == "refused"
    assert attack(al.UpdateError("NaN"), inside=False) == "update refused"
    assert attack(ValueError("bare"), inside=False) == "crashed"
    assert attack(RuntimeError("max()"), inside=False) == "crashed"
    assert attack(RuntimeError(), inside=True) == "refused"


def test_the_oracle_attacks_the_same_client_with_nothing_done() -> None:
    world = replace(done(noise=0.1, cast="bfloat16"), dtype="float32")
    assert oracle(world) > 200
    assert oracle(replace(world, withheld=("position", "attention"))) is None
    assert oracle(replace(world, pictures=("noise", "noise"))) < 30
    assert oracle(replace(world, pictures=("noise", "noise"), same_pictures=True)) > 100


def test_a_gradient_that_rounds_to_zero_is_said() -> None:
    small = replace(done(factor=1e-30, cast="float16"))
    assert measure.vanishes(small, play(small))
    assert not measure.vanishes(PLAIN, play(PLAIN))
    zero = replace(PLAIN, model=replace(MODEL, zero_head=True))
    assert not measure.vanishes(zero, play(zero))


def test_rows_of_a_world() -> None:
    rows = list(attacked((2,)))
    assert rows[-1].attack == "invert"
    assert all(one.outcome not in ("refused", "update refused") for one in rows[:-1])
    assert {one.oracle for one in rows} == {oracle(draw(2))}


def test_a_client_with_nothing_to_share_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(world: World) -> None:
        raise al.UpdateError("nothing to share: every parameter is frozen or withheld")

    monkeypatch.setattr(measure, "play", nothing)
    (only,) = attacked((2,))
    assert (only.outcome, only.note) == ("no update", "nothing to share")
    assert faults([only]) == []


def test_faults() -> None:
    good = [
        row(psnr=59.0, predicted=60.0),
        row("not shown", psnr=9.0),
        row("refused", oracle=40.0),
        row("refused", oracle=None),
    ]
    assert faults(good) == []
    assert faults([row("refused", done="factor in common, cast")]) == []
    (text,) = faults([row("crashed", attack="april", note="RuntimeError in april.py:1: max()")])
    assert text == "april crashed: RuntimeError in april.py:1: max()"
    assert faults([row(psnr=58.8, predicted=60.0)]) == ["invert is called exact, 60.0 dB predicted, 58.8 dB true"]
    assert faults([row(psnr=float("nan"), predicted=60.0)]) != []
    assert faults([row("refused", note="too narrow")]) == ["refused (too narrow), and 99.0 dB in float64"]
    assert faults([row("update refused", note="other", done="factor in common")]) != []


def test_reasons_have_kinds() -> None:
    for world, kind in (
        (replace(PLAIN, withheld=("position", "attention")), "not shared"),
        (replace(PLAIN, model=replace(MODEL, width=4), withheld=("position",)), "too narrow"),
        (replace(PLAIN, model=replace(MODEL, zero_head=True)), "zero gradient"),
    ):
        assert kind in outcome(play(world), "invert").note
    assert reason_class("what nobody thought of") == "other"


# --- The command --------------------------------------------------------------------------------------------------


def test_the_page_counts(tmp_path: Path) -> None:
    rows = [
        row(seed=1, psnr=99.0, predicted=90.0, residual=1e-7, limit=1e-6, replay="shown"),
        row(seed=1, psnr=99.0, predicted=90.0, attack="embedding"),
        row(seed=2, psnr=9.0, predicted=90.0, done="noise"),
        row("refused", seed=3, done="noise, cast", note="too narrow"),
        row("refused", seed=4, note="too narrow"),
        row("crashed", seed=5, note="RuntimeError", oracle=None),
    ]  # fmt: skip
    write(tmp_path / "fuzz.csv", rows)
    values, claims = page.describe(tmp_path, argparse.Namespace())
    assert (values["exact"], values["wrong"], values["crashed"]) == ("3", 1, 1)
    assert (values["determined"], values["missed"], values["lossy"]) == ("4", 1, "several 1")
    assert [claim.holds for claim in claims] == [False, False, False]
    assert "seeds 4" in claims[2].numbers
    assert "| embedding | exact | 1 | -9.0 |" in values["honesty"]
    assert "| 66 dB or more | shown | 1 | 0.1 |" in values["replay"]
    assert "- 2 (noise, float32): invert is called exact" in values["faults"]
    write(tmp_path / "fuzz.csv", rows[:2])
    values, claims = page.describe(tmp_path, argparse.Namespace())
    assert all(claim.holds for claim in claims)
    assert values["faults"] == "None."


def write(path: Path, rows: list[Row]) -> None:
    pd.DataFrame([vars(one) for one in rows]).to_csv(path, index=False)


def test_quick_prints_a_page_and_keeps_nothing(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("studies._runner.RESULTS", tmp_path)
    monkeypatch.setattr(command, "QUICK", 25)
    command.main(["--quick"])
    assert "25 configurations, seeds 0 to 24" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_configurations_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watched(case: tuple[int]) -> Iterator[Row]:
        seen.append(*case)
        yield row("refused", seed=case[0], oracle=None)

    monkeypatch.setattr(command, "attacked", watched)
    for count in ("3", "5"):
        command.main(["--configurations", count, "--seed", "7", "--out", str(tmp_path)])
    assert seen == [7, 8, 9, 10, 11]
    assert list(read(tmp_path / "fuzz.csv", Row).seed) == seen


def test_show_prints_a_world_and_its_conditions(capsys: pytest.CaptureFixture) -> None:
    command.main(["--show", "2"])
    out = capsys.readouterr().out
    assert "Model(library=" in out
    assert "invert: " in out
    assert "one image" in out


@pytest.mark.skipif(not (RESULTS / "fuzz.csv").is_file(), reason="not measured yet: python -m studies.fuzz")
def test_the_committed_rows_are_ten_thousand_and_without_fault() -> None:
    frame = read(RESULTS / "fuzz.csv", Row)
    assert frame.seed.nunique() == 10_000
    assert page.listed(frame) == "None."
