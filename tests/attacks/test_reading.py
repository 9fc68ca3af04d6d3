"""What an update is: its noise, weight decay, steps of Adam, parameters that are never used."""

from __future__ import annotations

import copy

import pytest
import torch
from attacked import db, make, private
from torch import nn

import aprillab as al
from aprillab.attacks.reading import measured_noise, never_used, read_update

LABEL = torch.tensor([3])


def shared(model, pixels=None, **options):
    pixels = private(model) if pixels is None else pixels
    return al.client_update(model, al.HALF.to_input(pixels), LABEL, **options)


def noisy(update, level, seed=0):
    """Gaussian noise, relative to each tensor's r.m.s."""
    generator = torch.Generator().manual_seed(seed)
    return al.ClientUpdate(
        {
            name: g + level * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator, dtype=g.dtype)
            for name, g in update.gradients.items()
        }
    )


def weighed(update, model, decay, *, spare=()):
    """What weight decay makes of it, parameters named in ``spare`` exempt."""
    weights = dict(model.named_parameters())
    return al.ClientUpdate(
        {
            name: g if any(part in name for part in spare) else g + decay * weights[name].detach()
            for name, g in update.gradients.items()
        }
    )


@pytest.mark.parametrize("level", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("block", ["prenorm", "april"])
def test_noise_is_measured_whatever_the_batch(block, level):
    model = make(block, classes=50)
    update = al.client_update(model, al.HALF.to_input(private(model, 3)), torch.tensor([3, 4, 5]))
    found = measured_noise(al.dissect(model), noisy(update, level).gradients)
    assert 0.5 * level < found < 5 * level


def test_the_noise_of_the_positions_rows_is_that_of_their_own_entries():
    """A class token's row can be a thousand times the patches': noise relative to the
    tensor drowns these.
    """
    model = make()
    update = shared(model)
    G = update.gradients["position_embedding"]
    G[0, 0] *= 1e3
    reading = read_update(model, noisy(update, 1e-5), al.dissect(model))
    assert reading.noise_of_position == pytest.approx(1e-5 * float(G.square().mean().sqrt()), rel=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_casts_noise_is_near_its_format(dtype):
    model = make(dtype=torch.float32)
    wide = shared(model).to(dtype=dtype).to(dtype=torch.float32)  # the file says float32
    reading = read_update(model, wide, al.dissect(model))
    assert 0.1 * torch.finfo(dtype).eps < reading.noise < 2 * torch.finfo(dtype).eps


def test_another_loss_is_no_noise():
    """Cross-entropy's residual sums to zero over the classes, that of squares does not."""
    model = make()
    target = torch.rand(1, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update = al.client_update(model, al.HALF.to_input(private(model)), target, loss=nn.functional.mse_loss)
    assert measured_noise(al.dissect(model), update.gradients) < 1e-12
    headless = al.ClientUpdate({k: g for k, g in update.gradients.items() if k != "patch_embedding.bias"})
    assert measured_noise(al.dissect(model), headless.gradients) < 1e-12  # the rows of G decide


@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("spare", [(), ("bias", "norm", "position", "token")], ids=["all", "matrices alone"])
def test_weight_decay_is_fitted_and_taken_off(decay, spare):
    model = make()
    pixels = private(model)
    update = weighed(shared(model, pixels), model, decay, spare=spare)
    reading = read_update(model, update, al.dissect(model))
    assert reading.decay == pytest.approx(decay, rel=1e-6)
    result = al.invert(model, update)
    assert result.exact, result.reason
    assert db(result, pixels) > 100


def test_no_decay_is_seen_where_there_is_none():
    model = make()
    for update in (shared(model), noisy(shared(model), 1e-3)):
        assert read_update(model, update, al.dissect(model)).decay == 0.0


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("steps", [1, 5])
def test_steps_of_adam_are_recognized(optimizer, steps):
    model = make()
    client = copy.deepcopy(model)
    run = optimizer(client.parameters(), lr=1e-3)
    for _ in range(steps):
        run.zero_grad()
        nn.functional.cross_entropy(client(al.HALF.to_input(private(model))), LABEL).backward()
        run.step()
    update = al.update_from_states(model.state_dict(), client.state_dict(), learning_rate=1e-3, local_steps=steps)
    with pytest.raises(al.AttackNotApplicable, match="Adam"):
        al.embedding_closed_form(model, update)
    assert al.recover_labels(model, update).labels.tolist() == [3]


def test_gradients_are_not_taken_for_adam():
    for seed in range(20):
        for block in ("prenorm", "april"):
            model = make(block, seed=seed, classes=2 + seed % 5)
            update = al.client_update(model, al.HALF.to_input(private(model, seed=seed)), torch.tensor([seed % 2]))
            read_update(model, update, al.dissect(model))
            read_update(model, noisy(update, 0.1, seed), al.dissect(model))


class Idle(al.VisionTransformer):
    """With a parameter that no forward pass uses, as Dinov2's mask token."""

    def __init__(self, **shape):
        super().__init__(**shape)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 96))


def test_parameters_that_are_never_used_may_be_missing():
    model = Idle(image_size=16, patch_size=4, width=96, depth=2, heads=3, classes=7).double()
    pixels = private(model)
    assert never_used(model, al.dissect(model)) == {"mask_token"}
    update = shared(model, pixels)
    present = al.ClientUpdate({name: g for name, g in update.gradients.items() if name != "mask_token"})
    assert al.invert(model, present).exact
    assert al.recover_labels(model, present).exact
    lacking = al.ClientUpdate({name: g for name, g in present.gradients.items() if name != "head.bias"})
    with pytest.raises(al.UpdateError, match=r"head\.bias"):
        al.invert(model, lacking)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_module."])
def test_prefixes_are_stripped(prefix):
    model = make()
    pixels = private(model)
    update = shared(model, pixels)
    renamed = al.ClientUpdate({prefix + name: g for name, g in update.gradients.items()})
    for attack in ("embedding", "span"):
        assert al.invert(model, renamed, attack=attack).exact
    assert al.recover_labels(model, renamed).exact
