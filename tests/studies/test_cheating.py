"""The study of a cheating server: its batches and sums, its planted heads, and a page that its CSV files bear out."""

from __future__ import annotations

import argparse

import pytest
import torch

import aprillab as al
from aprillab.comparison.parallel import HERE
from studies._runner import RESULTS, page
from studies.cheating.__main__ import describe
from studies.cheating.clients import batch_of, best_psnr, crops, model_of, summed, update_of
from studies.cheating.looks import Case as Look
from studies.cheating.looks import measured as looked
from studies.cheating.looks import planted
from studies.cheating.pictures import Case, measured

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


def test_a_planted_head_is_the_models_own_scaled_and_one_bias_less() -> None:
    model = model_of("random")
    found = planted(model, 3, "scaled by 3, bias", 2.0)
    torch.testing.assert_close(found.head.weight, 3 * model.head.weight)
    less = (3 * model.head.bias - found.head.bias).detach()
    assert less.nonzero().flatten().tolist() == [3]
    assert float(less[3]) == pytest.approx(2.0)


@pytest.mark.parametrize("case", [
    Case("class", "random", "repeated", 20.0, 8, 1), Case("changes", "random", "bfloat16", 20.0, 8, 1),
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
