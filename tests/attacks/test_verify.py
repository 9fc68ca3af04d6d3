"""Exact means verified: what a replay shows, what it contradicts, and where none can be played."""

from __future__ import annotations

import copy

import pytest
import torch
from attacked import db, make, private
from torch import nn

import aprillab as al
from aprillab.attacks.compare import compare

LABEL = torch.tensor([3])


def shared(model, pixels, loss=nn.functional.cross_entropy, targets=LABEL):
    return al.client_update(model, al.HALF.to_input(pixels), targets, loss=loss)


def scaled(update, *factors):
    """The update with these factors, one tensor after the other in turn."""
    each = (factors[i % len(factors)] for i in range(len(update.gradients)))
    return al.ClientUpdate({name: f * g for f, (name, g) in zip(each, update.gradients.items(), strict=False)})


def test_the_best_factor_is_taken_before_tensors_are_compared():
    g = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    assert compare({name: 0.5 * t for name, t in g.items()}, g) == (0.0, 2.0)
    off = {"a": g["a"], "b": torch.tensor([2.0])}
    residual, factor = compare(off, g)
    assert factor == pytest.approx(27 / 29)
    assert residual == pytest.approx(((25 * (2 / 29) ** 2 + (25 / 29) ** 2) / 26) ** 0.5)
    # One tensor that is read counts by itself, however small.
    assert compare(off, g, ["b"])[0] == pytest.approx(25 / 29)


@pytest.mark.parametrize("factor", [1.0, 128.0, -0.01])
@pytest.mark.parametrize("name", ["embedding", "span"])
def test_a_common_factor_is_found_and_said(name, factor):
    model = make()
    pixels = private(model)
    result = al.invert(model, scaled(shared(model, pixels), factor), attack=name)
    assert result.exact, result.reason
    assert result.replay.factor == pytest.approx(factor)
    assert result.labels.tolist() == [3]
    assert db(result, pixels) > 150


def test_a_factor_for_each_tensor_is_found_by_replay_and_the_brightness_with_it():
    model = make()
    pixels = private(model)
    update = scaled(shared(model, pixels), 0.3, 5.0, 1.0, 0.7)
    blind = al.embedding_closed_form(model, update, verify=False)
    assert db(blind, pixels) < 30
    assert not blind.exact
    assert blind.determined  # by a system that factors do not contradict
    result = al.embedding_closed_form(model, update)
    assert result.exact, result.reason
    assert "a factor for each tensor" in result.reason
    assert db(result, pixels) > 100


def test_factors_within_a_tensor_are_contradicted():
    model = make()
    pixels = private(model)
    update = shared(model, pixels)
    dW = update.gradients["patch_embedding.weight"]
    channels = torch.tensor([1.0, 0.5, 2.0], dtype=dW.dtype)[None, :, None, None]  # X comes out with other colours
    result = al.embedding_closed_form(
        model, al.ClientUpdate({**update.gradients, "patch_embedding.weight": channels * dW})
    )
    assert result.determined
    assert not result.exact
    assert result.replay.state == "contradicted"
    assert result.predicted_psnr < 40 < result.diagnostics["predicted_by_system"]


def findings(logits, targets):
    return nn.functional.binary_cross_entropy_with_logits(logits, targets)


TWO = torch.zeros(1, 7, dtype=torch.float64).index_fill_(1, torch.tensor([1, 5]), 1.0)
SOFT = torch.softmax(torch.arange(7.0, dtype=torch.float64), 0)[None]


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (findings, TWO),
        (findings, 0 * TWO),
        (nn.CrossEntropyLoss(label_smoothing=0.1), LABEL),
        (nn.CrossEntropyLoss(weight=torch.arange(1.0, 8.0, dtype=torch.float64)), LABEL),
        (nn.functional.cross_entropy, SOFT),
        (lambda logits, targets: nn.functional.mse_loss(logits, targets), SOFT),
    ],
    ids=["two findings", "no finding", "smoothing", "class weights", "soft targets", "squares"],
)
@pytest.mark.parametrize("name", ["embedding", "span"])
def test_the_verdict_on_the_picture_does_not_hang_on_the_loss(name, loss, targets):
    model = make()
    pixels = private(model)
    result = al.invert(model, shared(model, pixels, loss, targets), attack=name)
    assert result.exact, result.reason
    assert db(result, pixels) > 150


class Squashed(al.VisionTransformer):
    """With an activation behind the head, as MONAI's ViT has one."""

    def forward(self, images):
        return torch.tanh(super().forward(images))


def test_what_follows_the_head_is_played_too():
    """The head's gradient is that of its own output, not of what comes behind."""
    model = make()
    model.__class__ = Squashed
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), SOFT, loss=nn.functional.mse_loss)
    result = al.invert(model, update)
    assert result.exact, result.reason
    assert "where it leaves the head" in result.reason
    assert not model.head._forward_hooks


def test_a_loss_that_does_not_take_the_label_leaves_the_other_ways():
    model = make()
    pixels = private(model)
    result = al.invert(model, shared(model, pixels, findings, TWO), loss=findings)  # labels (1,), targets (1, 7)
    assert result.exact, result.reason


def test_raw_differences_of_several_steps_are_determined_and_not_several_images():
    model = make()
    pixels = private(model)
    client = copy.deepcopy(model)
    optimizer = torch.optim.SGD(client.parameters(), lr=0.5)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(client(al.HALF.to_input(pixels)), LABEL).backward()
        optimizer.step()
    after = client.state_dict()
    result = al.invert(
        model, al.ClientUpdate({name: after[name] - p.detach() for name, p in model.named_parameters()})
    )
    assert result.determined
    assert not result.exact
    assert db(result, pixels) > 100


def test_without_the_head_a_label_is_needed():
    model = make()
    pixels = private(model)
    update = shared(model, pixels).without(["head.weight", "head.bias"])
    unknown = al.embedding_closed_form(model, update)
    assert unknown.determined
    assert not unknown.exact
    assert unknown.replay.state == "not checked"
    assert "no label is known" in unknown.reason
    assert al.embedding_closed_form(model, update, labels=LABEL).exact
    wrong = al.embedding_closed_form(model, update, labels=torch.tensor([4]))
    assert wrong.replay.state == "contradicted"
    smooth = shared(model, pixels, nn.CrossEntropyLoss(label_smoothing=0.1)).without(["head.weight", "head.bias"])
    assert not al.embedding_closed_form(model, smooth, labels=LABEL).exact
    assert al.embedding_closed_form(model, smooth, labels=LABEL, loss=nn.CrossEntropyLoss(label_smoothing=0.1)).exact


def test_the_heads_weight_alone_plays_the_client_too():
    model = make()
    pixels = private(model)
    assert al.embedding_closed_form(model, shared(model, pixels).without(["head.bias"])).exact


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 0.01}]
)
def test_several_local_steps_are_played_one_after_another(options):
    model = make()
    pixels = private(model)
    client = copy.deepcopy(model)
    optimizer = torch.optim.SGD(client.parameters(), lr=0.05, **options)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(client(al.HALF.to_input(pixels)), LABEL).backward()
        optimizer.step()
    update = al.update_from_states(
        model.state_dict(), client.state_dict(), learning_rate=0.05, local_steps=4, **options
    )
    result = al.invert(model, update)
    assert result.exact, result.reason
    assert db(result, pixels) > 150
    if options == {"momentum": 0.9}:  # also where nobody says it
        silent = al.update_from_states(model.state_dict(), client.state_dict(), learning_rate=0.05, local_steps=4)
        assert al.invert(model, silent).exact


@pytest.mark.parametrize("attack", ["embedding", "span"])
def test_an_epoch_of_single_pictures_promises_none_of_them(attack):
    """Nobody says the momentum, so that the replay contradicts nothing; what it misses is
    foreseen all the same.
    """
    model, labels = make(width=192), torch.tensor([3, 5])
    pixels, client = private(model, batch=2), copy.deepcopy(model)
    optimizer = torch.optim.SGD(client.parameters(), lr=0.05)
    for picture, label in zip(pixels, labels, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(client(al.HALF.to_input(picture[None])), label[None]).backward()
        optimizer.step()
    states = model.state_dict(), client.state_dict()
    update = al.update_from_states(*states, learning_rate=0.05, local_steps=2, batch_size=2)
    result = al.invert(model, update, attack=attack, strict=False)
    assert result.replay.state == "not checked"
    assert result.predicted_psnr < max(float(al.psnr(result.pixels[0], picture)) for picture in pixels) + 5
    assert result.diagnostics["predicted_by_system"] > result.predicted_psnr + 5
    assert not result.exact


def test_dropout_within_the_vit_is_not_replayed():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 4, 2, 4, 96, 96, num_classes=7, dropout=0.1).double().train()
    nn.init.normal_(model.heads.head.weight, std=0.02)
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    update = al.client_update(model, al.IMAGENET.to_input(pixels), LABEL)
    state = torch.get_rng_state()
    result = al.embedding_closed_form(model, update)
    assert torch.equal(torch.get_rng_state(), state)
    assert db(result, pixels) > 150  # dropout on the tokens leaves ∂W_e = GᵀX as it is
    assert result.determined
    assert not result.exact
    assert "draws at random" in result.reason


def test_other_weights_are_contradicted_and_the_prediction_follows():
    model, other = make(seed=0), make(seed=1)
    pixels = private(model)
    result = al.embedding_closed_form(other, shared(model, pixels))
    assert result.determined
    assert not result.exact
    assert result.replay.residual > 0.5
    assert result.predicted_psnr <= 17
    assert result.diagnostics["predicted_by_system"] > 100


def test_a_replay_that_raises_is_said_and_costs_no_picture():
    class Moody(al.VisionTransformer):
        def forward(self, images):
            raise RuntimeError("needs a mask")

    model = make()
    pixels = private(model)
    update = shared(model, pixels)
    model.__class__ = Moody
    result = al.embedding_closed_form(model, update)
    assert db(result, pixels) > 150
    assert "RuntimeError: needs a mask" in result.replay.words
    assert not result.exact


def test_one_block_that_two_pictures_satisfy_is_found_out():
    """Few directions come back through one block: GᵀX = ∂W_e can have a solution for two pictures. Replay and head
    deny it."""
    model = make("april", depth=1, heads=4, image_size=8, patch_size=4)
    update = shared(model, private(model, 2), targets=torch.tensor([3, 4]))
    result = al.embedding_closed_form(model, al.ClientUpdate(update.gradients))
    assert not result.exact
    assert not result.determined


def test_seconds_are_the_solves_alone():
    model = make()
    result = al.invert(model, shared(model, private(model)))
    assert result.replay.seconds > 0
    unverified = al.invert(model, shared(model, private(model)), verify=False)
    assert unverified.replay.seconds == 0
