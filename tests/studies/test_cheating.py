"""The study of a cheating server: its batches and sums, its planted heads, and a page that its
CSV files bear out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import pytest
import torch

import aprillab as al
from aprillab.comparison.parallel import HERE
from studies._rows import read
from studies._runner import RESULTS, page
from studies.cheating import figures, large, looks
from studies.cheating.__main__ import describe
from studies.cheating.clients import Others, batch_of, best_psnr, crops, loaded, model_of, pieces, summed, update_of
from studies.cheating.looks import Case as Look
from studies.cheating.looks import measured as looked
from studies.cheating.looks import planted
from studies.cheating.one_picture import describe as describe_one
from studies.cheating.one_picture import with_alone
from studies.cheating.pictures import measured
from studies.cheating.records import CLIENTS, FILE, MEAN, OTHER, TWO, Case, Row

QUICK = argparse.Namespace(quick=True, large=False, workers=HERE)


@pytest.mark.parametrize("kind", ["distinct", "repeated"])
def test_the_wanted_picture_is_the_only_one_of_its_class(kind: str) -> None:
    images, labels, c = batch_of("random", 8, 3, kind, 3)
    assert (labels == c).nonzero().flatten().tolist() == [3]
    assert len(labels.unique()) == (8 if kind == "distinct" else 5)
    assert images.shape == (8, 3, 32, 32)


def test_digits_keep_their_own_labels() -> None:
    images, labels, c = batch_of("digits", 8, 4, "repeated", 4)
    assert (labels == c).nonzero().flatten().tolist() == [4]
    assert images.shape == (8, 1, 32, 32)


def test_public_pictures_are_of_other_photographs() -> None:
    own, public = crops(8, 16, 0), crops(8, 16, 0, public=True)
    assert float(own.min()) >= 0
    assert float(own.max()) <= 1
    assert best_psnr(list(public), own).max() < 30


def test_an_update_in_parts_is_the_batch_s_and_sums_are_sums() -> None:
    model = model_of("random")
    images, labels, _ = batch_of("random", 10, 0, "repeated", 0)
    whole, parts = al.client_update(model, images, labels), update_of(model, images, labels)
    for name, g in whole.gradients.items():
        torch.testing.assert_close(parts.gradients[name], g, atol=1e-6, rtol=1e-4)
    twice = summed(iter([whole, whole]))
    torch.testing.assert_close(twice.gradients["head.bias"], 2 * whole.gradients["head.bias"])


def test_crops_are_the_first_of_the_pieces() -> None:
    endless = pieces(16, 3)
    assert torch.equal(crops(5, 16, 3), torch.stack([next(endless) for _ in range(5)]))


@pytest.fixture
def fished() -> torch.nn.Module:
    """So weakly that the others are most of the update."""
    model = model_of("random")
    return loaded(model, al.dishonest.class_fishing(model, 7, strength=0.1))


def same_within_rounding(one: al.ClientUpdate, other: al.ClientUpdate) -> bool:
    """The keys' biases have a gradient of zero, and float32 something about 1e-9 instead."""
    pairs = [(g, other.gradients[name]) for name, g in one.gradients.items()]
    return all(float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-7 for a, b in pairs)


@pytest.mark.parametrize("place", [0, 5])
def test_an_exchanged_victim_is_the_batch_computed_as_one(fished: torch.nn.Module, place: int) -> None:
    images, labels, _ = batch_of("random", 32, 0, "distinct", place)
    rest = [i for i in range(32) if i != place]
    others = Others(fished, zip(images[rest], labels[rest], strict=True))
    own = slice(place, place + 1)
    for count in (7, 31):
        rows = [place, *rest[:count]]
        whole = al.client_update(fished, images[rows], labels[rows])
        joined = others.joined_by(images[own], labels[own], count)
        assert same_within_rounding(joined, whole)
        assert not same_within_rounding(al.client_update(fished, images[own], labels[own]), whole)


def test_clients_means_add_up_to_the_others_and_the_victim(fished: torch.nn.Module) -> None:
    images, labels, _ = batch_of("random", 24, 0, "repeated", 0)
    total = summed(
        al.client_update(fished, x, y) for x, y in zip(images.split(8), labels.split(8), strict=True)
    )  # fmt: skip
    others = Others(fished, zip(images[1:], labels[1:], strict=True))
    assert same_within_rounding(others.joined_by(images[:1], labels[:1], 23, clients=3), total)
    with pytest.raises(ValueError, match="24 pictures are not 5 clients' equal shares"):
        others.joined_by(images[:1], labels[:1], 23, clients=5)


def test_the_others_are_neither_taken_back_nor_invented(fished: torch.nn.Module) -> None:
    images, labels, _ = batch_of("random", 4, 0, "repeated", 0)
    others = Others(fished, zip(images[1:], labels[1:], strict=True))
    before = {name: g.clone() for name, g in others.of(2).items()}
    others.joined_by(images[:1], labels[:1], 2)
    assert all(torch.equal(others.of(2)[name], g) for name, g in before.items())
    with pytest.raises(ValueError, match="there are 3 pictures, and 4"):
        others.of(4)
    with pytest.raises(ValueError, match="of 3 pictures already, and 2"):
        others.of(2)


def test_the_large_model_s_batches_only_grow_among_the_same_others() -> None:
    cases = list(large.cases())
    assert len(set(cases)) == len(cases)
    grown: dict[object, int] = {}
    for case in cases:
        key = large.sharing_others(case)
        others = case.batch - (2 if case.part == "two" else 1)
        assert grown.get(key, 0) <= others, case
        grown[key] = others
    assert max(grown.values()) == 8 * CLIENTS - 1


@pytest.fixture
def small_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One block of ViT-B/16's patches, narrower."""
    model = al.VisionTransformer(image_size=224, patch_size=16, width=208, depth=1, heads=4, classes=100, seed=0)
    for name in ("fished", "others_of"):
        getattr(large, name).cache_clear()
    monkeypatch.setattr(large, "model_of", lambda name: model.eval())
    monkeypatch.setattr(large, "CLIENTS", 2)
    yield
    for name in ("fished", "others_of"):
        getattr(large, name).cache_clear()


@pytest.mark.usefixtures("small_large")
def test_each_part_of_the_large_model_is_measured() -> None:
    def of(part: str, setting: str, batch: int, victim: int = 2) -> float:
        (row,) = measured(Case(part, large.MODEL, setting, 20.0, batch, victim))
        return row.psnr or 0.0

    alone = of("alone", "alone", 1)
    assert alone > 50
    assert of("class", "distinct", 8) == pytest.approx(alone, abs=1)
    assert of("class", large.AGAIN, 8) == pytest.approx(alone, abs=1)
    assert of("changes", "bfloat16", 8) < alone - 20
    assert of("sum", "100 clients", 16) == pytest.approx(alone, abs=1)
    assert of("why", "float64", 1) > alone + 20
    assert of("why", "texture 0.1", 1) > alone
    assert of("why", "patches shuffled", 1) > 50


@pytest.mark.usefixtures("small_large")
def test_two_of_the_class_come_back_as_neither() -> None:
    one, other, mean = measured(Case("two", large.MODEL, TWO, 20.0, 4, 0))
    assert (one.setting, other.setting, mean.setting) == (TWO, OTHER, MEAN)
    assert 30 > (one.psnr or 99) >= (other.psnr or 99)
    assert one.one_image == "contradicted"


def test_a_planted_head_is_the_models_own_scaled_and_one_bias_less() -> None:
    model = model_of("random")
    found = planted(model, 3, "scaled by 3, bias", 2.0)
    torch.testing.assert_close(found.head.weight, 3 * model.head.weight)
    less = (3 * model.head.bias - found.head.bias).detach()
    assert less.nonzero().flatten().tolist() == [3]
    assert float(less[3]) == pytest.approx(2.0)


@pytest.mark.parametrize("case", [
    Case("class", "random", "repeated", 20.0, 8, 1), Case("changes", "random", "bfloat16", 20.0, 8, 1),
    Case("alone", "random", "alone", 20.0, 1, 1),
    Case("silenced", "random", "2 of 3", 0.0, 17, 1), Case("features", "random", "one class", 1e4, 4, 1),
    Case("imprint", "random", "width 256", 0.0, 16, 1),
], ids=lambda case: case.part)  # fmt: skip
def test_each_part_is_measured(case: Case) -> None:
    (row,) = measured(case)
    assert (row.psnr or 0) > (25 if case.part == "changes" else 55)
    if case.part in ("features", "imprint"):
        assert row.there
        assert row.told


@pytest.mark.parametrize("change", ["class fishing", "feature fishing", "imprint"])
def test_sent_models_are_looked_at(change: str) -> None:
    (row,) = looked(Look("sent", "ten classes", change, 5.0, 0))
    assert row.by_weights
    assert "jump" in row.seen
    (honest,) = looked(Look("honest", "ten classes", "initialization", 0.0, 0))
    assert honest.seen == ""


def test_the_page_is_borne_out_by_the_results() -> None:
    text = page("cheating", *describe(RESULTS, QUICK))
    assert "{" not in text


def test_alone_is_the_same_victim_s() -> None:
    rows = with_alone(read(RESULTS / FILE, Row))
    chosen = rows[(rows.part == "class") & (rows.model == "random") & (rows.victim == 3)]
    (expected,) = rows[(rows.part == "alone") & (rows.model == "random") & (rows.victim == 3)].psnr
    assert len(chosen)
    assert (chosen.alone == expected).all()


def test_a_study_without_the_large_model_says_nothing_of_it() -> None:
    rows = read(RESULTS / FILE, Row)
    fields, claims = describe_one(rows[rows.model != large.MODEL])
    assert fields["large"] == fields["why"] == "–"
    assert math.isnan(fields["least"])
    _, with_it = describe_one(rows)
    assert len(with_it) > len(claims)


def test_the_figure_draws_what_the_files_say() -> None:
    rows, seen = read(RESULTS / FILE, Row), read(RESULTS / looks.FILE, looks.Row)
    shown = list(figures.strip(clients=3))
    fig = figures.figure(rows, seen, shown)
    random, _, _, race, *pictures = fig.axes
    medians = rows[(rows.model == "random") & (rows.setting == "distinct") & (rows.batch == 32)]
    expected = medians[medians.part == "class"].groupby("strength").psnr.median()
    (line,) = (line for line in random.lines if line.get_color() == al.viz.COLOURS["orange"])
    assert line.get_xdata().tolist() == expected.index.tolist()
    assert line.get_ydata().tolist() == expected.tolist()
    assert sum(len(points.get_offsets()) for points in race.collections) == seen.kind.eq("race").sum()
    assert [ax.get_title() for ax in pictures] == [one.words for one in shown]
    decibels = [int(one.words.split()[-2]) for one in shown[1:]]
    assert decibels[1:5] == sorted(decibels[1:5])
    assert decibels[0] < 20
    assert min(decibels[-2:]) > 90
