"""What the span knows, in levels: scales, deviations, smooth pictures, candidates."""

from __future__ import annotations

import pytest
import torch
from grey_pictures import client, grid_of, photographs, vit
from torch import Tensor

from aprillab.attacks.grey_levels.grid import Grid, calibrated, laplacian
from aprillab.models import patchify
from aprillab.preprocessing import HALF, IMAGENET


@pytest.fixture(scope="module")
def chelsea() -> tuple[Grid, Tensor]:
    """The grid of a photograph under 1-D sinusoids, and its patches (n, p) in levels."""
    model, pixels = vit(), photographs("chelsea")
    return grid_of(model, client(model, pixels)), (255 * patchify(pixels, 4)[0]).round()


def test_channels_may_have_scales_of_their_own() -> None:
    model, pixels = vit(image_size=8), photographs("chelsea", size=8)
    grid = grid_of(model, client(model, pixels, IMAGENET), preprocessing=IMAGENET)
    images = IMAGENET.to_input(pixels)
    torch.testing.assert_close(grid.patches(images), 255 * patchify(pixels, 4))
    torch.testing.assert_close(grid.images(grid.patches(images)), images)


def test_deviations_are_widened_and_never_below_the_clients_own_rounding() -> None:
    nominal = torch.tensor([1e-9, 1e-4, 1e-3, 2e-3, 5.0], dtype=torch.float64)
    expected = torch.tensor([1e-5, 3e-4, 3e-3, 4e-2, 100.0], dtype=torch.float64)
    torch.testing.assert_close(calibrated(nominal), expected)


def test_the_truth_fits_what_the_span_knows_and_its_neighbours_do_not(chelsea: tuple[Grid, Tensor]) -> None:
    grid, truth = chelsea
    places = torch.arange(len(truth))
    torch.testing.assert_close(grid.directions @ grid.directions.T, torch.eye(48).double())
    assert grid.known.shape == (int((grid.deviations < 30).sum()), 48)
    assert (grid.misfit(truth.T, places) < 21).all()
    wrong = truth.clone()
    wrong[:, 7] += 1
    assert (grid.misfit(wrong.T, places) > 100).all()


def test_near_a_guess_the_most_probable_patch_follows_the_span_first(chelsea: tuple[Grid, Tensor]) -> None:
    """What the span knows it knows better than any guess; what it does not, the guess says."""
    grid, truth = chelsea
    guesses = truth.T + 10 * torch.randn(48, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = grid.near_centres(8.0, guesses)
    sure, open_ = grid.deviations < 1e-2, grid.deviations > 1e3
    assert sure.any()
    assert (grid.directions[sure] @ (found - truth.T)).abs().max() < 0.1
    if open_.any():
        assert (grid.directions[open_] @ (found - guesses)).abs().max() < 0.1
    assert (found - truth.T).norm() < 0.8 * (guesses - truth.T).norm()


def test_lattices_are_reduced_once(chelsea: tuple[Grid, Tensor]) -> None:
    grid, _ = chelsea
    assert grid.smooth is grid.smooth
    assert grid.candidates is grid.candidates


def test_the_smoothest_picture_keeps_what_is_settled_and_what_the_span_knows(chelsea: tuple[Grid, Tensor]) -> None:
    grid, truth = chelsea
    free = torch.arange(16) % 3 > 0
    start = torch.where(free[:, None], grid.centres.T, truth)
    picture = grid.smoothest(start, free)
    assert torch.equal(picture[~free], truth[~free])
    known = grid.deviations < 1e-2
    assert known.any()
    off = (picture[free] - grid.centres.T[free]) @ grid.directions[known].T
    assert off.abs().max() < 0.1
    assert roughness(grid, picture) < roughness(grid, start)


def test_the_smoothest_picture_is_a_minimum(chelsea: tuple[Grid, Tensor]) -> None:
    """By hand: the energy of the docstring, its gradient by autograd, is nearly zero there."""
    grid, truth = chelsea
    free = torch.arange(16) % 3 > 0
    start = torch.where(free[:, None], grid.centres.T, truth)
    lengths = grid.deviations.clamp(1e-3, 255.0)
    rows = grid.directions * lengths[:, None]

    def slope(picture: Tensor) -> Tensor:
        c = ((picture - start) @ grid.directions.T / lengths).requires_grad_()
        energy = roughness(grid, start + (c * free[:, None]) @ rows) / 15**2 + c.square().sum()
        return torch.autograd.grad(energy, c)[0] * free[:, None]

    assert slope(grid.smoothest(start, free)).norm() < 0.02 * slope(start).norm()


def roughness(grid: Grid, patches: Tensor) -> Tensor:
    """Sum of the squared steps between neighbours, in levels, by hand."""
    image = 255 * HALF.to_pixels(grid.images(patches[None]), clamp=False)
    return image.diff(dim=-1).square().sum() + image.diff(dim=-2).square().sum()


def test_the_laplacian_is_half_the_gradient_of_the_squared_steps() -> None:
    images = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    energy = images.diff(dim=-1).square().sum() + images.diff(dim=-2).square().sum()
    (gradient,) = torch.autograd.grad(energy, images)
    torch.testing.assert_close(laplacian(images.detach()), gradient / 2)


def test_candidates_are_whole_inside_and_hold_the_truth() -> None:
    model = vit(image_size=16, patch_size=8, width=64, position="frozen")
    pixels = photographs("chelsea", "coffee")
    grid = grid_of(model, client(model, pixels), 2)
    truth = 255 * patchify(pixels, 8)
    assert len(grid.candidates) == 4
    for place, listed in enumerate(grid.candidates):
        assert 1 <= len(listed) <= 12
        assert torch.equal(listed, listed.round())
        assert listed.min() >= 0
        assert listed.max() <= 255
        for image in truth:
            assert (listed == image[place].round()).all(1).any()
