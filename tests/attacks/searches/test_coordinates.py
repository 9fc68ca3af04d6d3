"""Where gradient matching looks: coefficients of patches."""

from __future__ import annotations

import torch

from aprillab.attacks.searches.coordinates import Coordinates
from aprillab.models import patchify


def test_settled_patches_stay_where_they_are_in_the_search() -> None:
    basis = torch.eye(12, dtype=torch.float64)
    free = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    origin = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = Coordinates(origin, basis, 2, (4, 4), free).to(basis)
    coefficients = torch.ones(1, 2, 4, 12, dtype=torch.float64)
    moved = patchify(known.images_of(coefficients)[0], 2) - origin
    torch.testing.assert_close(moved, free[..., None].double().expand(-1, -1, 12))
    pictures = known.images_of(coefficients)
    torch.testing.assert_close(known.coefficients_of(pictures)[0], free[..., None].double().expand(-1, -1, 12))
    noise = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    assert not known.coefficients_of_noise(noise)[free == 0].any()
