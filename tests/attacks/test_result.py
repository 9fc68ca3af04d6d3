"""Verdicts, and the words for them, from conditions and a predicted error."""

import math
from dataclasses import replace

import pytest
import torch

from aprillab.attacks.result import (
    AttackNotApplicable,
    Condition,
    Reconstruction,
    decibels,
    predicted_psnr,
    report,
    verdict,
)
from aprillab.metrics import EXACT_TO_8_BITS_DB
from aprillab.preprocessing import HALF, IMAGENET

HOLDS = Condition("rank(G) = n", "shown", {"rank": 16, "n": 16}, "rank {rank} of {n}")
FAILS = Condition("one image", "contradicted", {"negative": 2}, "{negative} entries are negative")
OPEN = Condition("one image", "not checked", {}, "no head")
UNMEASURED = replace(OPEN, measured=False)
REPLAYED = Condition("replay", "contradicted", {}, "misses")


def result_of(conditions, psnr=100.0):
    images = torch.full((1, 3, 2, 2), 3.0)  # beyond white
    return report(
        "an_attack", images, conditions=conditions, predicted_psnr=psnr, labels=(torch.tensor([3]), "recovered"),
        numbers={"rank": 16}, dtype=torch.float32, preprocessing=HALF, start=0.0,
    )  # fmt: skip


def test_exact_needs_every_condition_and_the_precision():
    assert verdict([HOLDS], EXACT_TO_8_BITS_DB) == (
        True,
        f"rank(G) = n: rank 16 of 16; predicted PSNR {EXACT_TO_8_BITS_DB:.1f} dB",
    )
    exact, reason = verdict([HOLDS, FAILS], 200.0)
    assert not exact
    assert reason == "one image fails (2 entries are negative); predicted PSNR 200.0 dB"
    exact, reason = verdict([HOLDS], EXACT_TO_8_BITS_DB - 0.1)
    assert not exact
    assert "precision limits the picture" in reason
    assert not verdict([HOLDS], math.nan)[0]


def test_a_condition_says_by_itself_where_nothing_was_measured():
    assert (OPEN.clause, OPEN.text) == ("no head", "no head")
    assert (UNMEASURED.clause, UNMEASURED.text) == ("no head", "not checked: no head")
    assert "not checked: no head" in verdict([UNMEASURED], 80.0)[1]


def test_a_report_has_what_was_measured():
    result = result_of([HOLDS])
    assert isinstance(result, Reconstruction)
    assert not result.exact  # nobody has replayed it
    assert result.conditions == (HOLDS,)
    assert result.determined
    assert result.predicted_psnr == 100.0
    assert result.pixels.max() == 1.0
    assert result.images.max() == 3.0
    assert result.diagnostics == {"rank": 16, "precision": "float32", "labels": "recovered"}
    assert result.labels.tolist() == [3]
    assert result.seconds > 0
    assert result.history == []


def test_conditions_that_were_not_checked_do_not_hold():
    result = result_of([HOLDS])
    assert not replace(result, conditions=()).determined
    assert not replace(result, conditions=(HOLDS, FAILS)).determined
    assert not replace(result, conditions=(HOLDS, OPEN)).determined
    exact, reason = verdict([HOLDS, OPEN], 200.0)
    assert not exact
    assert "one image was not checked (no head)" in reason


def test_a_replay_decides_what_is_exact_and_not_what_is_determined():
    result = replace(result_of([HOLDS]), conditions=(HOLDS, REPLAYED))
    assert result.determined
    assert result.conditions_hold
    assert not verdict(result.conditions, 200.0)[0]


def test_precision_alone_can_be_what_is_missing():
    result = result_of([HOLDS], psnr=30.0)
    assert not result.exact
    assert result.determined


def test_decibels():
    assert decibels(1e-6) == pytest.approx(60)
    assert decibels(0.0) == math.inf


@pytest.mark.parametrize("preprocessing", [HALF, IMAGENET])
def test_the_psnr_of_an_error_in_input_space_is_that_of_the_pixels(preprocessing):
    pixels = torch.full((1, 3, 64, 64), 0.5, dtype=torch.float64)
    noise = 0.01 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = preprocessing.to_input(pixels) + noise
    measured = decibels(float((preprocessing.to_pixels(images) - pixels).square().mean()))
    assert predicted_psnr(float(noise.square().mean()), preprocessing) == pytest.approx(measured, abs=0.1)


def test_a_refusal_keeps_its_reason_and_numbers():
    refusal = AttackNotApplicable("an_attack", "too narrow", width=33)
    assert str(refusal) == "an_attack does not apply: too narrow"
    assert (refusal.attack, refusal.reason, refusal.numbers) == ("an_attack", "too narrow", {"width": 33})
    assert isinstance(refusal, ValueError)
