"""The leak map of standard models and what the head gives away: lines, runs, words, figure."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest
import torch

import aprillab as al
from aprillab.comparison.parallel import HERE
from studies._runner import RESULTS
from studies.sharing_less import features, leak_page, leak_table
from studies.sharing_less.clients import play
from studies.sharing_less.leak_table import LORA, SHARED
from studies.sharing_less.models import Standard, build, standard_models

WITHHELD, FROZEN = "position embedding withheld", "both embeddings frozen"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both CSV files of the smallest study."""
    folder = tmp_path_factory.mktemp("quick")
    options = Namespace(quick=True, workers=HERE)
    leak_table.measure(folder, options)
    features.measure(folder, options)
    return folder


def test_the_table_has_the_models_that_it_promises() -> None:
    lines = standard_models()
    assert len({(line.name, line.size) for line in lines}) == len(lines)
    plain = {(line.name, line.size) for line in lines if not line.timm}
    assert plain == {
        (f"ViT-{letter}/{patch}", size)
        for letter in ("Ti", "S", "B", "L", "H") for patch, sizes in ((16, (224, 384)), (14, (224, 378)))
        for size in sizes
    }  # fmt: skip
    assert {line.name.split()[0].split("-")[0] for line in lines if line.timm} == {"DeiT", "CLIP", "DINOv2", "SigLIP"}


def test_depth_is_in_no_count() -> None:
    shape = {"image_size": 32, "patch_size": 8, "width": 256, "heads": 4, "classes": 10}
    shallow, deep = (al.leak_map(al.VisionTransformer(depth=depth, **shape)) for depth in (2, 6))
    assert shallow.facts == deep.facts
    assert [row.why for row in shallow.rows] == [row.why for row in deep.rows]


def test_a_model_of_dinov2_is_read_at_its_pictures_size() -> None:
    pytest.importorskip("transformers")
    model, anatomy = build(Standard("DINOv2 S/14", 224, 14, 384, 6, "transformers"))
    facts = al.leak_map(model, anatomy=anatomy).facts
    assert (facts.patches, facts.stored) == (256, 1370)
    assert model(torch.zeros(1, 3, 224, 224)).logits.shape == (1, 100)


def test_adapters_add_as_many_rows_where_q_and_v_are_one_tensor() -> None:
    fused = build(leak_table.QUICK[0])[1]
    assert leak_table.rank_of(fused) == (2 * leak_table.RANK, ["qkv"])
    pytest.importorskip("transformers")
    apart = Standard("DINOv2 S/14", 224, 14, 384, 6, "transformers")
    model, anatomy = build(apart)
    rank, layers = leak_table.rank_of(anatomy)
    assert (rank, len(layers)) == (leak_table.RANK, 2)
    assert leak_table.lora_row(al.leak_map(model, anatomy=anatomy, rank=rank)).shared == LORA


def test_each_cell_is_confirmed_and_says_by_what(quick: Path) -> None:
    cells = leak_page.cells_of(quick).set_index(["model", "shared"])
    assert set(cells.index.get_level_values("shared")) == set(SHARED)
    assert cells[cells.ran > 0].agrees.all()
    assert (cells.loc[("tiny/4", WITHHELD)].attack, cells.loc[("tiny/4", WITHHELD)].rounds) == ("span", 1)
    narrow = cells.loc[("narrow/4", WITHHELD)]
    assert (narrow.rounds, narrow.in_float32) == (2, False)
    assert narrow.float64 > 100 > 20 > narrow.less
    assert cells.loc[("narrower/4", "all")].rounds == 2
    assert not cells.loc[("narrower/4", WITHHELD)].attack
    adapted = cells.loc[("tiny/4", LORA)]
    assert (adapted.rounds, adapted.silent, adapted.ran) == (4, 1, 2)
    assert adapted.float64 > 100 > 60 > adapted.float32
    assert cells.loc[("narrow/4", LORA)].agrees  # refused, by its width


def test_a_wrong_count_would_be_seen() -> None:
    line = leak_table.QUICK[1]  # too narrow for one round without the position
    model, anatomy = build(line)
    found = al.leak_map(model, anatomy=anatomy)
    runs = leak_table.Runs(line, model, anatomy)
    row = found[WITHHELD]
    told = leak_table.decided_by(row, found.facts, line)
    assert not runs.attacked(told, row.tensors, torch.float64).agrees
    whole = found["all"]
    refused = runs.refused(leak_table.decided_by(whole, found.facts, line), whole.tensors)
    assert (refused.agrees, refused.words) == (False, "not refused")


def test_rounds_are_played_with_other_clients_and_leave_the_model_alone() -> None:
    model = al.VisionTransformer(image_size=16, patch_size=4, width=96, depth=2, heads=2, classes=10).double()
    anatomy = al.dissect(model)
    images = anatomy.preprocessing.to_input(al.load_victims(["astronaut", "coffee"], 16, dtype=torch.float64)[0])
    before = [p.clone() for p in model.parameters()]
    rounds = play(model, images[:1], torch.tensor([3]), 2, (images[1:], torch.tensor([5])))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not torch.equal(*(r.state[anatomy.patch_weight] for r in rounds))


def test_the_tiny_stand_in_needs_as_many_rounds() -> None:
    line = leak_table.QUICK[0]
    model, anatomy = build(line)
    found = al.leak_map(model, anatomy=anatomy)
    cell = leak_table.decided_by(found[WITHHELD], found.facts, line)
    for rounds in (5, 16, 24):
        stand_in = leak_table.tiny_like(leak_table.replace(cell, rounds=rounds))[1]
        assert al.leak_map(stand_in)[WITHHELD].rounds == rounds


def test_features_are_read_off_the_head_and_pick_the_victim(quick: Path) -> None:
    found = pd.read_csv(quick / "features.csv")
    assert len(found) == 16
    assert found.relative.max() < 1e-6
    assert found.nearest.all()
    assert found.of_span.all()
    assert (found.directions == 2 * 3 + 1).all()  # a head's values and keys, and the class token's query
    assert (found.inside < 1e-3).all()
    assert (found.outside > 0.05).all()


def test_another_features_are_not_taken_for_the_victims() -> None:
    model, anatomy = build(features.QUICK[0])
    pixels, names = al.load_victims(["astronaut", "coffee"], 32)
    images = anatomy.preprocessing.to_input(pixels)
    known = features.candidates_of(model, anatomy, pixels, tuple(names))
    f = features.features_from_head(al.client_update(model, images[1:], torch.tensor([3])), anatomy)
    assert (f - known.features[1]).norm() < 1e-5 * f.norm()
    assert (f - known.features[0]).norm() > 1e-2 * f.norm()


def test_the_page_says_what_the_rows_say(quick: Path) -> None:
    fields = leak_page.fields(quick)
    assert fields["map_models"] == 3
    assert fields["map_agree"] == fields["map_ran"] == 18
    narrow = leak_page.cells_of(quick).set_index(["model", "shared"]).loc[("narrow/4", WITHHELD)]
    assert f"span, 2 rounds: {narrow.float32:.0f} dB, {narrow.float64:.0f} in float64" in fields["map_table"]
    assert "| narrow/4 | 32 | position embedding withheld | 2 |" in fields["map_disagreements"]
    assert "7 directions of 65 tokens" in fields["map_features"]
    (claim,) = leak_page.claims(quick, {"features are exact": "come out exactly"})
    assert claim.holds
    assert claim.phrase == "come out exactly"
    assert not any("safe" in str(value) for value in fields.values())


def test_claims_can_fail(quick: Path, tmp_path: Path) -> None:
    for name in ("leak_map.csv", "features.csv"):
        frame = pd.read_csv(quick / name)
        frame.assign(agrees=False, relative=0.5)[frame.columns].to_csv(tmp_path / name, index=False)
    phrases = {"every count is confirmed": "a", "features are exact": "b"}
    assert not any(claim.holds for claim in leak_page.claims(tmp_path, phrases))


def test_the_figure_tells_cells_by_more_than_colour(quick: Path) -> None:
    cells = leak_page.cells_of(quick)
    looks = {(row.model, row.shared): leak_page.look(row) for _, row in cells.iterrows()}
    assert looks[("tiny/4", "head only")] == ("white", "", "–")
    assert looks[("tiny/4", LORA)][1] == ".."
    assert looks[("tiny/4", LORA)][2].startswith("5 rounds\n")
    assert looks[("narrow/4", WITHHELD)][1] == ".."
    assert looks[("narrow/4", WITHHELD)][2].startswith("2 rounds\n")
    assert len({look[:2] for look in looks.values()}) == 4
    fig = leak_page.figure(cells, shown=[("tiny/4", 32), ("narrow/4", 32)])
    assert len(fig.axes[0].texts) == 2 * len(SHARED)


# --- What is committed --------------------------------------------------------------------------------------------


def test_the_committed_table_is_whole_and_bears_out_its_counts() -> None:
    cells = leak_page.cells_of(RESULTS)
    lines = {(line.name, line.size) for line in standard_models()}
    assert set(zip(cells.model, cells["size"], strict=True)) == lines
    assert len(cells) == len(lines) * len(SHARED)
    phrases = dict.fromkeys(
        (
            "every count is confirmed", "one round holds in float32", "nothing is left where none applies",
            "features are exact", "the head picks the victim", "the span picks the victim",
        ),
        "so",
    )  # fmt: skip
    claims = leak_page.claims(RESULTS, phrases)
    assert len(claims) == 6
    assert all(claim.holds for claim in claims), claims


@pytest.mark.parametrize("line", [line for line in standard_models() if line.width in (192, 384) and not line.timm])
def test_the_committed_counts_are_those_of_today(line: Standard) -> None:
    model, anatomy = build(line)
    found = al.leak_map(model, anatomy=anatomy, rank=leak_table.rank_of(anatomy)[0])
    cells = leak_page.cells_of(RESULTS).set_index(["model", "size", "shared"])
    for shared in SHARED:
        row = leak_table.lora_row(found) if shared == LORA else found[shared]
        cell = cells.loc[(line.name, line.size, shared)]
        assert (row.attack or "", row.why) == (cell.attack, cell.inequality)
        assert row.rounds == (None if pd.isna(cell.rounds) else cell.rounds)
