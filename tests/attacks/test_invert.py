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
    assert result.diagnostics["tried"] == ("embedding",)
    frozen = make("prenorm", "frozen")
    result = attack(frozen, private(frozen), "auto")
    assert result.attack == "span_closed_form"
    assert "refused" in result.diagnostics["attacks"]["embedding"]
    assert "refused" in result.diagnostics["attacks"]["april"]
    assert set(result.diagnostics["tried"]) == set(CLOSED_FORMS)
    assert set(result.diagnostics["attacks"]) == set(CLOSED_FORMS)


def test_invert_falls_back_where_pixels_exceed_the_width():
    model = make("prenorm", "none")
    with pytest.raises(al.AttackNotApplicable, match="no closed form fits") as refusal:
        attack(model, private(model), "auto")
    assert set(CLOSED_FORMS) <= set(refusal.value.numbers)
    assert not refusal.value.count_fails  # strict=False would bring nothing


def test_invert_returns_the_best_of_what_is_not_exact():
    model = make("prenorm")
    result = attack(model, private(model, batch=2), "auto", labels=(3, 4))
    assert not result.exact
    assert result.diagnostics["attacks"]["span"].startswith("not exact: one image fails")


def test_without_a_replay_nothing_is_exact():
    model = make("prenorm")
    result = attack(model, private(model), "auto", verify=False)
    assert not result.exact
    assert result.determined
    assert result.replay.state == "not checked"
    assert "verify=False" in result.reason


def test_strict_and_loss_are_for_all_closed_forms():
    narrow = make("prenorm", image_size=32, patch_size=4, width=48)
    with pytest.raises(al.AttackNotApplicable) as refusal:
        attack(narrow, private(narrow), "auto")
    assert refusal.value.count_fails
    result = attack(narrow, private(narrow), "auto", strict=False)
    assert not result.determined
    assert result.diagnostics["missing"] == 64 - 47


def test_invert_with_bad_arguments():
    model = make("prenorm")
    with pytest.raises(ValueError, match="neither 'auto'"):
        attack(model, private(model), "magic")
    with pytest.raises(ValueError, match="named attack"):
        attack(model, private(model), "auto", regularization="none")


def test_labels_known_to_the_attacker_are_kept():
    model = make("prenorm")
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    result = al.invert(model, update, labels=torch.tensor([5]))
    assert result.labels.tolist() == [5]
    assert "known" in result.diagnostics["labels"]


def test_adapters_are_named_where_the_base_is_frozen():
    model = make("prenorm").requires_grad_(False)
    query = model.blocks[0].attention.query
    query.lora_A, query.lora_B = (torch.nn.Parameter(torch.ones(2, 96).double()) for _ in range(2))
    names = ("blocks.0.attention.query.lora_A", "blocks.0.attention.query.lora_B", "head.bias")
    model.head.bias.requires_grad_(True)
    parameters = dict(model.named_parameters())
    update = al.ClientUpdate(
        {
            name: torch.linspace(-1, 1, parameters[name].numel()).double().reshape(parameters[name].shape)
            for name in names
        }
    )
    with pytest.raises(al.AttackNotApplicable, match="adapters are trained"):
        al.invert(model, update)
    assert al.recover_labels(model, update).labels.tolist() == [0]
