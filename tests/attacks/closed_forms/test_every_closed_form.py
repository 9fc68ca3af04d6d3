"""What every closed form must do beyond what all attacks must (attacks/test_battery.py)."""

import math

import pytest
import torch
from attacked import BLOCKS, attack, db, make, private

import aprillab as al


@pytest.fixture(params=["embedding", "april", "span"])
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


def test_a_batch_of_two_is_never_called_exact(name):
    model = make(BLOCKS[name])
    pixels = private(model, batch=2)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3, 3]))
    silent = al.ClientUpdate(update.gradients)  # the client does not say how many images it used
    for shared in (update, silent):
        result = al.invert(model, shared, attack=name)
        assert not result.exact
        assert "one image" in result.reason


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


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_not_finite_is_refused(name, poison):
    model = make(BLOCKS[name])
    update = al.client_update(model, al.HALF.to_input(private(model)), torch.tensor([3]))
    key = al.dissect(model).patch_weight
    update.gradients[key].view(-1)[5] = poison
    with pytest.raises(al.UpdateError, match="NaN or infinite"):
        al.invert(model, update, attack=name)


def test_another_models_update_is_refused(name):
    model, other = make(BLOCKS[name]), make(BLOCKS[name], width=48)
    update = al.client_update(other, al.HALF.to_input(private(other)), torch.tensor([3]))
    with pytest.raises(al.UpdateError, match="shape"):
        al.invert(model, update, attack=name)


def test_half_precision_is_attacked_and_marked(name):
    model = make(BLOCKS[name])
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3])).to(dtype=torch.bfloat16)
    result = al.invert(model, update, attack=name)
    assert result.diagnostics["precision"] == "bfloat16"
    assert not result.exact
    assert result.images.dtype == torch.float64


def test_deterministic_and_without_traces(name):
    model = make(BLOCKS[name], dtype=torch.float32)
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    sent = {key: g.clone() for key, g in update.gradients.items()}
    weights = {key: t.clone() for key, t in model.state_dict().items()}
    state, dtype, threads = torch.random.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    first, second = (al.invert(model, update, attack=name) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)
    assert all(torch.equal(update.gradients[key], g) for key, g in sent.items())
    assert all(torch.equal(model.state_dict()[key], t) for key, t in weights.items())
    assert all(p.grad is None for p in model.parameters())


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
