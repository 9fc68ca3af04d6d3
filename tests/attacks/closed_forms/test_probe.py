"""Do the tokens reach the first attention as the equations have them?"""

import torch
from attacked import make
from torch import nn

import aprillab as al
from aprillab.attacks.closed_forms.probe import tokens_as_read


def looked_at(model, anatomy=None):
    return tokens_as_read(model, anatomy or al.dissect(model), al.tensors_of(model))


def test_tokens_of_either_architecture_are_seen():
    for block in ("prenorm", "april"):
        for changes in ({}, {"class_token": False}, {"bias": False}, {"position": "sinusoidal"}):
            found = looked_at(make(block, **changes))
            assert found.state == "shown", (block, changes, found.text)
            assert found.numbers["miss"] < 1e-12


def test_dropout_on_the_tokens_is_seen_and_nothing_is_drawn_from_the_callers_generator():
    class Dropping(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.dropout = inner, nn.Dropout(0.1)

        def forward(self, z):
            return self.inner(self.dropout(z))

    model = make().train()
    anatomy = al.dissect(model)
    block = model.blocks[0]
    forward = block.forward
    block.forward = lambda z, **more: forward(nn.functional.dropout(z, 0.1, training=block.training), **more)
    state = torch.get_rng_state()
    found = looked_at(model, anatomy)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.state == "contradicted"
    assert "dropout" in found.text
    assert looked_at(model.eval(), anatomy).state == "shown"


def test_a_model_that_cannot_be_run_is_not_checked():
    model = make()
    anatomy = al.dissect(model)
    model.forward = lambda images: 1 / 0
    found = looked_at(model, anatomy)
    assert found.state == "not checked"
    assert "ZeroDivisionError" in found.text
    model.forward = lambda images: images
    assert looked_at(model, anatomy).state == "not checked"
    assert not model.blocks[0].attention_norm._forward_pre_hooks
