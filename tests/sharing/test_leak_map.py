"""The leak map: its groups, its counts at their bounds, and each cell against the
attacks themselves.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial

import pytest
import torch
from conftest import private_batch, tiny_vit
from torch import Tensor, nn
from vit_families import db, made, of_timm, of_torchvision, of_transformers, picture, shared

import aprillab as al
from aprillab.attacks.catalogue import ATTACKS
from aprillab.attacks.closed_forms.april import april_closed_form
from aprillab.defenses import freeze_position, no_position, use_sinusoidal, withhold
from aprillab.sharing.counts import of_adapters, of_embedding
from aprillab.sharing.facts import facts_of
from aprillab.sharing.groups import groups_of, last_block

WITHHELD, FROZEN, LAST = "position embedding withheld", "both embeddings frozen", "last block and head"
VIT = "vision_transformer.VisionTransformer"
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "aprillab": partial(tiny_vit, width=96),
    "april": partial(tiny_vit, width=96, block="april"),
    "torchvision": of_torchvision,
    "timm": partial(of_timm, VIT),
    "timm, two norms": partial(of_timm, VIT, pre_norm=True),
    "timm, registers": partial(of_timm, VIT, reg_tokens=2, no_embed_class=True),
    "timm, attention pooling": partial(of_timm, VIT, class_token=False, global_pool="map"),
    "transformers, ViT": partial(of_transformers, "ViTForImageClassification"),
    "transformers, Dinov2": partial(of_transformers, "Dinov2ForImageClassification"),
    "transformers, CLIP": partial(of_transformers, "CLIPForImageClassification"),
}


# --- Groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", FAMILIES)
def test_every_parameter_is_in_one_group(which: str) -> None:
    model = FAMILIES[which]()
    anatomy = al.dissect(model)
    groups = groups_of(model, anatomy)
    names = list(itertools.chain.from_iterable(groups.values()))
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert anatomy.patch_weight in groups["patch embedding"]
    assert anatomy.position in groups["position embedding"]
    assert anatomy.query is not None
    assert anatomy.query.name in groups["first attention"]
    assert anatomy.head_weight in groups["head"]


@pytest.mark.parametrize("which", FAMILIES)
def test_the_last_block_has_one_attention_and_the_head_and_nothing_of_the_first(which: str) -> None:
    model = FAMILIES[which]()
    anatomy = al.dissect(model)
    last, groups = set(last_block(model, anatomy)), groups_of(model, anatomy)
    assert last >= set(groups["head"])
    assert not last & {*groups["patch embedding"], *groups["position embedding"], *groups["first attention"]}
    assert anatomy.query is not None
    block = anatomy.query.name[: anatomy.query.name.index("0")]
    names = [name for name, _ in model.named_parameters()]
    assert {name for name in names if name.startswith(f"{block}1")} <= last
    assert not any(name.startswith(f"{block}0") for name in last)


def test_of_a_single_block_the_last_is_the_first() -> None:
    model = tiny_vit(depth=1, width=96)
    row = al.leak_map(model)[LAST]
    assert row.attack == "span"
    assert row.why == "p + tokens + 1 = 54 ≤ 96 = d"


# --- Cells against the attacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", FAMILIES)
def test_each_cell_is_what_the_attacks_do(which: str) -> None:
    model = made(FAMILIES[which])
    anatomy = al.dissect(model)
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    update = shared(model, images)
    found = al.leak_map(model, anatomy=anatomy)
    tried = [row for row in found.rows if row.tensors]
    assert {None, "embedding", "span"} <= {row.attack for row in tried}
    for row in tried:
        kept = withhold(update, set(update.gradients) - set(row.tensors))
        if row.attack is None:
            with pytest.raises(al.AttackNotApplicable):
                al.invert(model, kept, anatomy=anatomy)
            continue
        assert row.rounds == 1
        result = ATTACKS[row.attack].function(model, kept, anatomy=anatomy)
        assert result.determined, (row.shared, result.reason)
        assert db(result, anatomy, images) > 100, row.shared


def frozen_update(model: nn.Module) -> tuple[al.ClientUpdate, Tensor]:
    """What a client shares that freezes both embeddings, and its picture."""
    anatomy = al.dissect(model)
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    groups = groups_of(model, anatomy)
    return withhold(shared(model, images), {*groups["patch embedding"], *groups["position embedding"]}), images


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_the_count_without_embeddings_is_sharp(off: int) -> None:
    p, tokens = 16, 5
    width = p + tokens + 1 + off
    model = made(partial(tiny_vit, channels=1, width=width, heads=1))
    row = al.leak_map(model)[FROZEN]
    assert (row.attack == "span") == (off >= 0)
    update, images = frozen_update(model)
    found = al.span_closed_form(model, update, strict=False)
    assert (db(found, al.dissect(model), images) > 90) == (off >= 0)


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_the_count_with_the_patch_gradient_is_sharp(off: int) -> None:
    n, tokens = 4, 5
    model = made(partial(tiny_vit, channels=1, width=n + tokens + 1 + off, heads=1))
    row = al.leak_map(model)[WITHHELD]
    anatomy = al.dissect(model)
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    update = withhold(shared(model, images), [anatomy.position or ""])
    found = al.span_closed_form(model, update, strict=False)
    good = db(found, anatomy, images) > 90
    assert good == (row.rounds == 1) == (off >= 0)


def test_april_is_counted_where_it_applies() -> None:
    model = made(partial(tiny_vit, block="april", channels=1, width=16, heads=1))
    anatomy = al.dissect(model)
    names = [*groups_of(model, anatomy)["first attention"], anatomy.position or ""]
    row = al.leak_map(model, shared={"mine": names})["mine"]
    assert row.attack == "april"
    assert row.why == "tokens = 5 ≤ 16 = d, p = 16 ≤ 16 = d"
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    update = shared(model, images)
    kept = withhold(update, set(update.gradients) - set(names))
    assert db(april_closed_form(model, kept), anatomy, images) > 100
    narrow = al.leak_map(tiny_vit(block="april", channels=1, width=15, heads=1), shared={"mine": names})["mine"]
    assert narrow.counts[0].rounds is None
    assert (narrow.attack, narrow.rounds) == ("span", 2)


# --- Rounds -------------------------------------------------------------------------------------------------------


def rounds_of(model: nn.Module, images: Tensor, count: int) -> list[al.ClientUpdate]:
    """Updates of one picture, the model moved by another client's in between."""
    other, updates = private_batch(model, seed=1), []
    for _ in range(count):
        updates.append(shared(model, images))
        with torch.no_grad():
            step = al.client_update(model, *other).gradients
            for name, parameter in model.named_parameters():
                parameter -= 0.1 * step[name]
    return updates


def test_rounds_are_counted_for_a_model_too_narrow_for_one() -> None:
    model = made(partial(tiny_vit, image_size=16, width=8, heads=1))  # 16 patches, 7 equations a round
    anatomy = al.dissect(model)
    row = al.leak_map(model)["all"]
    assert (row.attack, row.rounds, row.why) == ("embedding", 3, "n = 16 > 7 = d − 1")
    assert "from one round 7 of the patches' 16 directions" in row.also
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    updates = rounds_of(model, images, 3)

    def error(count: int) -> float:
        G = torch.cat([u.gradients[anatomy.position or ""].squeeze(0)[1:].T for u in updates[:count]])
        dW = torch.cat([u.gradients[anatomy.patch_weight].flatten(1) for u in updates[:count]])
        X = torch.linalg.lstsq(G, dW, driver="gelsd").solution
        return float((X - anatomy.tiling.patches(images)[0]).norm())

    assert error(2) > 0.1
    assert error(3) < 1e-6


def test_rounds_add_nothing_to_inputs_that_stay() -> None:
    model = tiny_vit(width=50, heads=1)  # 4 short of 54, though each round has 44 equations for 48 numbers
    found = al.leak_map(model)
    assert found[FROZEN].rounds is None
    everything = [name for name, _ in model.named_parameters()]
    for moves, rounds in ((), None), (("class_token", "patch_embedding.bias"), None), (("position_embedding",), 2):
        kept = [name for name in everything if name in moves or name in found[FROZEN].tensors]
        assert al.leak_map(model, shared={"mine": kept})["mine"].rounds == rounds, moves


def test_rounds_of_adapters() -> None:
    facts = facts_of(model := tiny_vit(width=96), al.dissect(model))
    assert [of_adapters(facts, rows).rounds for rows in (1, 2, 4, 5, 16)] == [4, 2, 1, 1, 1]
    row = al.leak_map(model, rank=1)["LoRA of rank 1 on q, v"]
    assert (row.attack, row.rounds, row.silent_rounds, row.when) == ("span", 2, 1, "2 rounds after the first")
    assert not of_adapters(facts, 4, moves=True).applies
    assert al.leak_map(of_timm(VIT), rank=2)["LoRA of rank 2 on qkv"].rounds == 5  # 9 patches, one factor A
    narrow = al.leak_map(tiny_vit(width=53, heads=1))["LoRA of rank 8 on q, v"]
    assert (narrow.attack, narrow.rounds) == (None, None)


# --- What stands in the way ---------------------------------------------------------------------------------------


def test_a_zero_head_shares_the_label_alone() -> None:
    model = tiny_vit(width=96)
    nn.init.zeros_(model.head.weight)
    found = al.leak_map(model)
    assert {row.attack for row in found.rows} == {None}
    assert found.notes[0].startswith("The head is zero")
    update = al.client_update(model, *private_batch(model))
    with pytest.raises(al.AttackNotApplicable):
        al.invert(model, update)


@pytest.mark.parametrize(
    ("change", "word"),
    [(no_position, "the same at every patch"), (partial(use_sinusoidal, kind="2d"), "directions in float32")],
)
def test_positions_that_tell_no_patch_apart(change: Callable[[nn.Module], nn.Module], word: str) -> None:
    model = change(al.VisionTransformer(image_size=16, patch_size=2, width=192, depth=2, heads=2, classes=5))
    row = al.leak_map(model)[FROZEN]
    assert row.attack is None
    assert word in row.why


def test_interpolated_positions_must_be_stored_in_enough_rows() -> None:
    build = partial(of_timm, VIT, dynamic_img_size=True)
    model = build()
    larger = al.leak_map(model, anatomy=al.dissect(model, image_size=16))["all"]
    assert larger.counts[0].obstacle == "the position embedding's 10 rows are interpolated to 17, which loses some"
    assert larger.attack is None  # 16 interpolated of 9: the span's places are no more than these
    assert of_embedding(facts_of(model, al.dissect(model, image_size=8))).applies


def test_weights_that_are_no_numbers_end_in_a_word_and_not_in_an_error() -> None:
    model = tiny_vit(width=96)
    with torch.no_grad():
        model.position_embedding[0, 1] = torch.nan
    assert al.leak_map(model)[FROZEN].attack is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_counts_do_not_depend_on_the_weights_precision(dtype: torch.dtype) -> None:
    found, other = (al.leak_map(tiny_vit(width=96).to(kind)) for kind in (torch.float64, dtype))
    assert found.facts == other.facts
    assert found.rows == other.rows


def test_dead_features_do_not_count() -> None:
    model = tiny_vit(width=54, heads=2)
    assert al.leak_map(model)[FROZEN].attack == "span"
    with torch.no_grad():
        model.blocks[0].attention_norm.weight[:3] = 0
    row = al.leak_map(model)[FROZEN]
    assert row.why == "p + tokens + 1 = 54 > 51 = the features with γ ≠ 0"
    assert row.attack is None


def test_what_the_model_trains_now_is_a_row_where_something_is_frozen() -> None:
    model = freeze_position(tiny_vit(width=96))
    row = al.leak_map(model)["what the model trains now"]
    assert "position_embedding" not in row.tensors
    assert row.attack == "span"
    assert "what the model trains now" not in [row.shared for row in al.leak_map(tiny_vit()).rows]


# --- Words and data -----------------------------------------------------------------------------------------------


def test_it_never_says_safe() -> None:
    for build in FAMILIES.values():
        found = al.leak_map(build())
        assert "safe" not in (str(found) + found.markdown()).lower()
        assert all(row.title == "no closed form" for row in found.rows if row.attack is None)


def test_the_table_is_a_table_and_the_rows_are_data() -> None:
    found = al.leak_map(tiny_vit(width=96))
    lines = [line for line in found.markdown().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {7}
    assert len(lines) == 2 + len(found.rows)
    assert found._repr_markdown_() == found.markdown()
    again = json.loads(json.dumps(found.as_dicts()))
    assert [row["shared"] for row in again] == [row.shared for row in found.rows]
    assert set(again[0]) == {field.name for field in fields(al.LeakRow)}
    assert all(row.why in str(found) for row in found.rows)
    with pytest.raises(KeyError, match="'embeddings' is no row of this map; there are all, position embedding"):
        found["embeddings"]


def test_evidence_is_what_can_be_shown() -> None:
    found = al.leak_map(tiny_vit(width=96))
    assert found["all"].evidence[0] == "one image: 91 of 95 equations to spare"
    assert found["first attention alone"].evidence[-1] == "replay, where the label is known"
    tight = al.leak_map(tiny_vit(image_size=12, width=9, heads=1, block="april"))
    assert tight["all"].counts[0].spare == 0
    assert tight["all"].evidence == ("one image: the head's rank", "replay")
    assert found["head only"].also == ("the label", "the features")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number from 1 up, not 0"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"shared": {"mine": ["head.wait"]}}, r"head\.wait: no parameter of VisionTransformer has that name; it has"),
        ({"anatomy": "timm"}, "anatomy must be what"),
    ],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        al.leak_map(tiny_vit(), **options)


def test_a_convolutional_network_is_not_known() -> None:
    with pytest.raises(al.UnknownModelError):
        al.leak_map(nn.Sequential(nn.Conv2d(3, 4, 3)))
