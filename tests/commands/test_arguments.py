"""What the command line reads before PyTorch is there: names that agree, sizes,
losses, normalizations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch.nn import functional

from aprillab.attacks import ATTACKS, CLOSED_FORMS, RECIPES
from aprillab.commands.arguments import names, types
from aprillab.commands.losses import Loss, loss, loss_function
from aprillab.commands.messages import CommandError
from aprillab.comparison.cases import DTYPES
from aprillab.zoo import MODEL_NAMES, Position


def test_names_are_those_of_the_package() -> None:
    assert list(ATTACKS) == list(names.ATTACKS)
    assert list(CLOSED_FORMS) == list(names.CLOSED_FORMS)
    assert list(RECIPES) == list(names.RECIPES)
    assert list(DTYPES) == list(names.DTYPES)
    assert get_args(Position) == names.POSITIONS
    assert names.MODELS == MODEL_NAMES


@pytest.mark.parametrize(
    ("read", "text", "fragment"),
    [
        (types.size, "0", "'0'"),
        (types.size, "32x", "'32x'"),
        (types.size, "32x48x3", "height and width such as 160x224"),
        (types.size, "-32x48", "'-32x48'"),
        (types.attack, "deep", "there is no attack 'deep'; there are embedding, april"),
        (types.attacks, "span,deep", "there is no attack 'deep'"),
        (types.normalization, "0.5", "neither unit, half, imagenet nor MEAN,STD"),
        (types.normalization, "0.5,0.5,0.5", "neither unit"),
        (types.normalization, "0.5,0", "positive"),
        (types.normalization, "nan,1", "finite"),
        (loss, "hinge", "cross-entropy and bce"),
        (loss, "cross-entropy,smoothing=1", "'smoothing=1'"),
        (loss, "cross-entropy,smoothing", "'smoothing'"),
        (loss, "bce,smoothing=0.1", "for cross-entropy alone"),
        (loss, "bce,weights=1", "one for each class"),
        (loss, "cross-entropy,weights=1/-2", "none negative"),
        (loss, "cross-entropy,weights=0/0", "'weights=0/0'"),
    ],
)
def test_what_is_refused(read: Callable[[str], object], text: str, fragment: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refusal:
        read(text)
    assert fragment in str(refusal.value)


@pytest.mark.parametrize(
    "text", ["cross-entropy", "bce", "cross-entropy,smoothing=0.1", "cross-entropy,smoothing=0.1,weights=1/2/3/4"]
)
def test_a_loss_reads_what_it_says(text: str) -> None:
    assert str(loss(text)) == text


def test_losses_are_the_formulas() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    labels = torch.tensor([2, 1])
    onehot = functional.one_hot(labels, 3).double()
    weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    logs = torch.log_softmax(logits, -1)
    smooth = 0.9 * onehot + 0.1 / 3
    chosen = weights[labels]
    sigmoid = logits.sigmoid()
    for text, value in (
        ("cross-entropy", -(onehot * logs).sum(-1).mean()),
        ("cross-entropy,smoothing=0.1", -(smooth * logs).sum(-1).mean()),
        ("cross-entropy,weights=1/2/4", (chosen * -(onehot * logs).sum(-1)).sum() / chosen.sum()),
        ("bce", -(onehot * sigmoid.log() + (1 - onehot) * (1 - sigmoid).log()).mean()),
        ("bce,weights=1/2/4", -(weights * (onehot * sigmoid.log() + (1 - onehot) * (1 - sigmoid).log())).mean()),
    ):
        assert torch.allclose(loss_function(loss(text), 3)(logits, labels), value), text


def test_weights_must_be_as_many_as_classes() -> None:
    with pytest.raises(CommandError, match=r"2 weights, but the model has 3 classes"):
        loss_function(Loss(weights=(1.0, 2.0)), 3)
    assert loss_function(Loss(weights=(1.0, 2.0)), None)
