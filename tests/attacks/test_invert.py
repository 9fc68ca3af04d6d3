"""The strongest attack that applies, and words on why the others do not."""

import pytest
import torch
from attacked import attack, make, private

import aprillab as al
from aprillab.attacks import CLOSED_FORMS


def test_invert_takes_the_strongest_and_explains_the_rest():
    model = make("april")
    result = attack(model, private(model), "auto")
    assert result.attack == "embedding_closed_form"
    assert "not needed" in result.diagnostics["attacks"]["span"]
    frozen = make("prenorm", "frozen")
    result = attack(frozen, private(frozen), "auto")
    assert result.attack == "span_closed_form"
    assert "refused" in result.diagnostics["attacks"]["embedding"]
    assert "refused" in result.diagnostics["attacks"]["april"]
    assert set(result.diagnostics["attacks"]) == set(CLOSED_FORMS)


def test_invert_falls_back_where_pixels_exceed_the_width():
    model = make("prenorm", "none")
    with pytest.raises(al.AttackNotApplicable, match="no closed form fits") as refusal:
        attack(model, private(model), "auto")
    assert set(refusal.value.numbers) == set(CLOSED_FORMS)


def test_invert_tries_one_closed_form_on_a_batch():
    model = make("prenorm")
    result = attack(model, private(model, batch=2), "auto", labels=(3, 4))
    assert not result.exact
    assert "not tried" in result.diagnostics["attacks"]["span"]


def test_invert_with_bad_arguments():
    model = make("prenorm")
    with pytest.raises(ValueError, match="neither 'auto'"):
        attack(model, private(model), "magic")
    with pytest.raises(ValueError, match="named attack"):
        attack(model, private(model), "auto", strict=False)


def test_labels_known_to_the_attacker_are_kept():
    model = make("prenorm")
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    result = al.invert(model, update, labels=torch.tensor([5]))
    assert result.labels.tolist() == [5]
    assert "known" in result.diagnostics["labels"]
