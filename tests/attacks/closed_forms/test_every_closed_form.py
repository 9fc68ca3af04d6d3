"""What every closed form must do beyond what all attacks must (attacks/test_battery.py)."""

import pytest
import torch
from attacked import BLOCKS, attack, db, make, private

import aprillab as al
from aprillab.attacks import CLOSED_FORMS


@pytest.fixture(params=CLOSED_FORMS)
def name(request):
    return request.param


def test_exact_in_float64(name):
    model = make(BLOCKS[name])
    pixels = private(model)
    result = attack(model, pixels, name)
    assert db(result, pixels) > 150
    assert result.exact, result.reason
    assert result.labels.tolist() == [3]
    assert result.images.shape == pixels.shape
    torch.testing.assert_close(al.HALF.to_pixels(result.images), result.pixels)
    assert result.seconds > 0


def test_biases_heads_and_missing_class_token_change_nothing(name):
    for changes in ({"bias": False}, {"heads": 1}, {"heads": 8}, {"class_token": False}, {"channels": 1}):
        model = make(BLOCKS[name], **changes)
        pixels = private(model)
        assert db(attack(model, pixels, name), pixels) > 120, changes


def test_the_gradient_of_another_parameter_is_noticed(name):
    model = make(BLOCKS[name])
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    bad = dict(update.gradients)
    patch = al.dissect(model).patch_weight
    bad[patch] = bad[patch].flip(1)  # channels in another order: still a gradient's shape, not this picture's
    result = al.invert(model, al.ClientUpdate(bad), attack=name, verify=True)
    assert result.diagnostics["gradient_residual"] > 1e-3


def test_verify_replays_the_client(name):
    model = make(BLOCKS[name])
    pixels = private(model)
    assert attack(model, pixels, name, verify=True).diagnostics["gradient_residual"] < 1e-8


def test_a_zero_gradient_below_the_head_is_refused(name):
    model = make(BLOCKS[name])
    torch.nn.init.zeros_(model.head.weight)
    update = al.client_update(model, al.HALF.to_input(private(model)), torch.tensor([3]))
    with pytest.raises(al.AttackNotApplicable, match="zero"):
        al.invert(model, update, attack=name)
    assert al.recover_labels(model, update).labels.tolist() == [3]


def test_the_scale_of_the_loss_does_not_matter(name):
    model = make(BLOCKS[name])
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    scaled = al.ClientUpdate({key: 1e-6 * g for key, g in update.gradients.items()})
    assert db(al.invert(model, scaled, attack=name), pixels) > 150


def test_the_prediction_without_the_original_is_near_the_truth(name):
    errors = []
    for seed in range(4):
        model = make(BLOCKS[name], seed=seed, dtype=torch.float32)
        pixels = private(model, seed=seed)
        result = attack(model, pixels, name)
        errors.append(result.predicted_psnr - db(result, pixels))
    assert max(abs(error) for error in errors) < 15, errors


@pytest.mark.parametrize("name", ["april", "embedding"])
def test_a_withheld_position_gradient_is_refused(name):
    model = make(BLOCKS[name])
    with pytest.raises(al.AttackNotApplicable, match="position"):
        attack(model, private(model), name, withhold=["position_embedding"])


@pytest.mark.parametrize("name", ["april", "embedding"])
def test_more_tokens_than_width_are_refused(name):
    model = make(BLOCKS[name], image_size=32, patch_size=4, width=48)
    with pytest.raises(al.AttackNotApplicable, match=r"n ≤ d|n \+ 1 ≤ d"):
        attack(model, private(model), name)
