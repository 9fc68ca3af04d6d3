"""A tiny model and what its client shares."""

from __future__ import annotations

import pytest
from conftest import private_batch, tiny_vit
from torch import nn

from aprillab.update import ClientUpdate, client_update


@pytest.fixture
def model() -> nn.Module:
    return tiny_vit()


@pytest.fixture
def update(model: nn.Module) -> ClientUpdate:
    return client_update(model, *private_batch(model))
