"""Coordinates of patches, against constructions with known answers."""

from __future__ import annotations

import pytest
import torch
from search_tools import randn
from torch import Tensor

from aprillab.anatomy import Tiling
from aprillab.attacks.searches.coordinates import Coordinates, row_space_of
from aprillab.models import patchify

SIZE, CHANNELS, PATCH = (4, 6), 3, 2  # six patches of twelve numbers, on a grid that is not square
FOUR = Tiling.square(PATCH, (2 * PATCH, 2 * PATCH))
PLACES, PIXELS = 6, 12


def rotation(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(size, size, seed=seed)).Q


def coordinates(rows: int = PIXELS, *, lengths: Tensor | None = None, origin_rows: int = PLACES) -> Coordinates:
    """Orthogonal rows, of length 1 unless told, around an origin far from zero."""
    basis = rotation(PIXELS)[:rows]
    basis = basis if lengths is None else lengths[:, None] * basis
    return Coordinates(3 + randn(origin_rows, PIXELS, seed=1), basis, Tiling.square(PATCH, SIZE))


UNEQUAL = torch.logspace(-6, 0, PIXELS, dtype=torch.float64)


def pictures(*lead: int, seed: int = 2) -> Tensor:
    return randn(*lead, CHANNELS, *SIZE, seed=seed)


def test_a_coefficient_moves_its_own_patch_along_its_own_row() -> None:
    """Against slices: neither the basis nor the order of the patches may be transposed."""
    known = coordinates()
    coefficients = torch.zeros(1, PLACES, PIXELS, dtype=torch.float64)
    still = known.images_of(coefficients)
    place, row = 4, 2  # on a grid of 2 × 3 patches, place 4 is the second row, second column
    coefficients[0, place, row] = 7.0
    moved = known.images_of(coefficients) - still
    expected = torch.zeros_like(moved)
    expected[0, :, 2:4, 2:4] = 7 * known.basis[row].reshape(CHANNELS, PATCH, PATCH)
    torch.testing.assert_close(moved, expected)
    torch.testing.assert_close(still[0, :, 2:4, 2:4], known.origin[place].reshape(CHANNELS, PATCH, PATCH))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("origin_rows", [PLACES, 1])
@pytest.mark.parametrize("lead", [(2,), (3, 2)])
def test_a_complete_basis_loses_nothing(
    dtype: torch.dtype, error: float, origin_rows: int, lead: tuple[int, ...]
) -> None:
    """Even where its rows differ in length by a million."""
    images = pictures(*lead).to(dtype)
    known = coordinates(lengths=UNEQUAL, origin_rows=origin_rows).to(images)
    assert known.basis.dtype == known.origin.dtype == dtype
    coefficients = known.coefficients_of(images)
    assert coefficients.shape == (*lead, PLACES, PIXELS)
    assert coefficients.dtype == dtype
    again = known.images_of(coefficients)
    assert again.shape == images.shape
    assert (again - images).abs().max() < error


def test_coefficients_are_found_again() -> None:
    for known in (coordinates(5), coordinates(lengths=UNEQUAL.clamp_min(1e-3))):
        coefficients = randn(3, 2, PLACES, len(known.basis), seed=4)
        torch.testing.assert_close(known.coefficients_of(known.images_of(coefficients)), coefficients)


def test_a_short_basis_gives_the_nearest_picture() -> None:
    basis = randn(5, PIXELS, seed=5)  # not orthogonal: the transpose is no inverse
    known = Coordinates(3 + randn(PLACES, PIXELS, seed=1), basis, Tiling.square(PATCH, SIZE))
    images = pictures(2)
    nearest = known.images_of(known.coefficients_of(images))
    missed = patchify(images - nearest, PATCH)
    assert missed.norm() > 1
    assert (missed @ basis.T).abs().max() < 1e-10


def test_noise_keeps_its_energy() -> None:
    noise = pictures(500)
    whole = coordinates().coefficients_of_noise(noise)
    assert whole.norm().item() == pytest.approx(noise.norm().item())
    short = coordinates(3)
    coefficients = short.coefficients_of_noise(noise)
    assert coefficients.shape == (500, PLACES, 3)
    assert coefficients.norm().item() == pytest.approx(noise.norm().item(), rel=0.02)
    moved = short.images_of(coefficients) - short.images_of(torch.zeros_like(coefficients))
    assert moved.norm().item() == pytest.approx(noise.norm().item(), rel=0.02)
    assert not short.coefficients_of_noise(torch.zeros_like(noise)).any()  # the origin has no part in it


def test_noise_is_as_long_in_rows_of_any_length() -> None:
    noise = pictures(4)
    torch.testing.assert_close(
        coordinates(lengths=UNEQUAL).coefficients_of_noise(noise), coordinates().coefficients_of_noise(noise)
    )


# --- The row space of the patch embedding's gradient --------------------------------------------------------------


def test_the_row_space_holds_the_patches_and_no_more() -> None:
    patches = randn(4, PIXELS, seed=6)  # a grid of 2 × 2 patches
    gradient = (randn(20, 4, seed=7) @ patches).reshape(20, CHANNELS, PATCH, PATCH)
    known = row_space_of(gradient, 1, FOUR)
    assert known is not None
    assert known.basis.shape == (4, PIXELS)
    torch.testing.assert_close(known.basis @ known.basis.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(patches @ known.basis.T @ known.basis, patches)
    assert not known.origin.any()


def test_a_row_space_that_restricts_nothing_is_none() -> None:
    full = randn(20, PIXELS, seed=8).reshape(20, CHANNELS, PATCH, PATCH)
    assert row_space_of(full, 4, FOUR) is None  # 16 tokens of 12 numbers
    assert row_space_of(0 * full, 1, FOUR) is None
    noisy = row_space_of(full, 1, FOUR)
    assert noisy is not None
    assert len(noisy.basis) == 4  # never more than there are tokens


def test_settled_patches_stay_where_they_are_in_the_search() -> None:
    basis = torch.eye(12, dtype=torch.float64)
    free = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    origin = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = Coordinates(origin, basis, Tiling.square(2, (4, 4)), free).to(basis)
    coefficients = torch.ones(1, 2, 4, 12, dtype=torch.float64)
    moved = patchify(known.images_of(coefficients)[0], 2) - origin
    torch.testing.assert_close(moved, free[..., None].double().expand(-1, -1, 12))
    pictures = known.images_of(coefficients)
    torch.testing.assert_close(known.coefficients_of(pictures)[0], free[..., None].double().expand(-1, -1, 12))
    noise = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    assert not known.coefficients_of_noise(noise)[free == 0].any()
