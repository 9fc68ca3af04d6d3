"""The patch-embedding system: what only this attack does."""

import pytest
import torch
from attacked import db, make, private

import aprillab as al


def test_embedding_needs_no_weights():
    model, other = make("prenorm", seed=0), make("prenorm", seed=1)
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    assert db(al.invert(other, update, attack="embedding"), pixels) > 150


def test_an_off_by_one_in_the_prefix_cannot_pass():
    model = make("prenorm")
    with pytest.raises(ValueError, match="position_prefix"):
        al.dissect(model, position_prefix=0)
