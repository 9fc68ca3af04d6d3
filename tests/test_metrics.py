"""PSNR, SSIM, MSE and the matching of batches."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d

from aprillab.metrics import EXACT_TO_8_BITS_DB, match_batch, mse, psnr, score, ssim


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ssim_of_wang(x: np.ndarray, y: np.ndarray, window: int = 11, sigma: float = 1.5) -> float:
    """The definition in Wang et al. (2004), written out: one channel, windows that fit,
    population moments.
    """
    along = np.exp(-((np.arange(window) - window // 2) ** 2) / (2 * sigma**2))
    weights = np.outer(along, along) / along.sum() ** 2

    def mean(z: np.ndarray) -> np.ndarray:
        return convolve2d(z, weights, mode="valid")

    mx, my = mean(x), mean(y)
    vx, vy, cxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float((((2 * mx * my + c1) * (2 * cxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


# --- Values -----------------------------------------------------------------------------------------------------


def test_known_errors() -> None:
    original = torch.full((3, 16, 16), 0.5)
    assert mse(original + 0.1, original) == pytest.approx(0.01, rel=1e-5)
    assert psnr(original + 0.1, original) == pytest.approx(20, abs=1e-4)
    assert psnr(original - 0.001, original) == pytest.approx(60, abs=1e-3)


def test_a_batch_gives_one_value_a_picture() -> None:
    original = torch.full((3, 1, 16, 16), 0.5, dtype=torch.float64)
    reconstruction = original + torch.tensor([0.1, 0.01, 0.001], dtype=torch.float64).reshape(3, 1, 1, 1)
    torch.testing.assert_close(psnr(reconstruction, original), torch.tensor([20.0, 40.0, 60.0], dtype=torch.float64))
    for metric in (mse, psnr, ssim):
        values = metric(reconstruction, original)
        assert isinstance(values, torch.Tensor)
        assert values.shape == (3,)
        assert values.dtype == torch.float64
        singles = [metric(a, b) for a, b in zip(reconstruction, original, strict=True)]
        assert all(isinstance(single, float) for single in singles)
        assert values.tolist() == pytest.approx(singles)


def test_clamping_hides_what_lies_outside_unless_told_not_to() -> None:
    original = torch.ones(1, 16, 16, dtype=torch.float64)
    blown_up = original + 9
    assert mse(blown_up, original) == 0
    assert psnr(blown_up, original) == math.inf
    assert ssim(blown_up, original) == pytest.approx(1)
    assert mse(blown_up, original, clamp=False) == pytest.approx(81)
    assert psnr(blown_up, original, clamp=False) == pytest.approx(-10 * math.log10(81))
    assert ssim(blown_up, original, clamp=False) < 0.5


def test_equal_pictures() -> None:
    original = pictures(2, 3, 16, 16)
    assert psnr(original, original).tolist() == [math.inf, math.inf]
    assert mse(original, original).tolist() == [0, 0]
    assert ssim(original, original).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("size", [(11, 11), (16, 23), (32, 32)])
def test_ssim_is_wang_s(size: tuple[int, int]) -> None:
    x, y = pictures(3, *size), pictures(3, *size, seed=1)
    mixed = 0.7 * x + 0.3 * y
    expected = np.mean([ssim_of_wang(a, b) for a, b in zip(mixed.numpy(), x.numpy(), strict=True)])
    assert ssim(mixed, x) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("side", "window"), [(10, 9), (9, 9), (8, 7), (4, 3), (3, 3)])
def test_ssim_of_small_pictures_shrinks_window_and_sigma_together(side: int, window: int) -> None:
    x, y = pictures(1, side, 20), pictures(1, side, 20, seed=1)
    mixed = 0.7 * x + 0.3 * y
    expected = ssim_of_wang(mixed[0].numpy(), x[0].numpy(), window, 1.5 * window / 11)
    assert ssim(mixed, x) == pytest.approx(expected, abs=1e-12)


def test_ssim_refuses_where_no_window_fits() -> None:
    with pytest.raises(ValueError, match="at least 3 × 3 pixels; got 2 × 20"):
        ssim(pictures(1, 2, 20), pictures(1, 2, 20))


def test_exact_to_8_bits_is_the_error_of_rounding() -> None:
    assert pytest.approx(58.92, abs=0.005) == EXACT_TO_8_BITS_DB
    original = pictures(3, 256, 256)
    assert psnr((original * 255).round() / 255, original) == pytest.approx(EXACT_TO_8_BITS_DB, abs=0.05)


def test_a_gaussian_error_of_that_size_moves_one_level_in_twelve() -> None:
    levels = (pictures(400, 400) * 255).round()
    sigma = 10 ** (-EXACT_TO_8_BITS_DB / 20)
    noise = sigma * torch.randn(400, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moved = (((levels / 255 + noise) * 255).round() != levels).double().mean().item()
    assert moved == pytest.approx(1 / 12, abs=0.003)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_taken_in_float64(dtype: torch.dtype) -> None:
    original = torch.zeros(3, 256, 256, dtype=dtype)
    reconstruction = torch.full_like(original, 2.0**-9)  # its square is 0 in float16's sums
    assert mse(reconstruction, original) == pytest.approx(2.0**-18, rel=1e-12)


def test_gradients_are_not_needed_nor_kept() -> None:
    values = psnr(pictures(2, 3, 16, 16).requires_grad_(), pictures(2, 3, 16, 16, seed=1))
    assert not values.requires_grad


# --- Failures ---------------------------------------------------------------------------------------------------


def test_a_nan_or_infinite_reconstruction_is_scored_as_such() -> None:
    original = pictures(3, 1, 16, 16)
    reconstruction = original.clone()
    reconstruction[1, 0, 2, 3] = math.nan
    reconstruction[2, 0, 2, 3] = math.inf
    for metric in (mse, psnr, ssim):
        values = metric(reconstruction, original)
        assert values.isnan().tolist() == [False, True, False]
    assert psnr(reconstruction, original, clamp=False)[2] == -math.inf
    assert mse(reconstruction, original, clamp=False)[2] == math.inf
    assert ssim(reconstruction, original, clamp=False).isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("metric", [mse, psnr, ssim, score])
def test_pictures_that_cannot_be_compared(metric) -> None:  # type: ignore[no-untyped-def]
    good = pictures(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"same shape; got \(2, 3, 16, 16\) and \(1, 3, 16, 16\)"):
        metric(good, good[:1])
    with pytest.raises(ValueError, match=r"\(C, H, W\) or \(B, C, H, W\); got \(16, 16\)"):
        metric(good[0, 0], good[0, 0])
    with pytest.raises(ValueError, match=r"got \(0, 3, 16, 16\)"):
        metric(good[:0], good[:0])
    with pytest.raises(ValueError, match=r"reconstruction must hold floating pixels.*uint8.*255"):
        metric((good * 255).to(torch.uint8), good)
    with pytest.raises(ValueError, match="original must hold floating pixels"):
        metric(good, (good * 255).to(torch.uint8))
    with pytest.raises(ValueError, match=r"spans -1 to 1: undo the model's normalization"):
        metric(good, torch.linspace(-1, 1, good.numel(), dtype=torch.float64).reshape(good.shape))
    with pytest.raises(ValueError, match="spans nan to nan"):
        metric(good, torch.full_like(good, math.nan))


# --- Scores -----------------------------------------------------------------------------------------------------


def test_score_holds_all_of_them() -> None:
    original = pictures(2, 3, 16, 16)
    reconstruction = original + 0.3 * (pictures(2, 3, 16, 16, seed=1) - 0.5)
    scores = score(reconstruction, original)
    assert torch.equal(scores.psnr, psnr(reconstruction, original))
    assert torch.equal(scores.ssim, ssim(reconstruction, original))
    assert torch.equal(scores.mse, mse(reconstruction, original))
    assert torch.equal(scores.mse_unclamped, mse(reconstruction, original, clamp=False))
    assert torch.equal(scores.psnr_unclamped, psnr(reconstruction, original, clamp=False))
    assert (scores.mse_unclamped > scores.mse).all()


def test_score_of_a_single_picture_is_a_batch_of_one() -> None:
    original = pictures(3, 16, 16)
    scores = score(original + 0.01, original)
    for values in (scores.psnr, scores.ssim, scores.mse, scores.mse_unclamped):
        assert values.shape == (1,)


# --- Matching ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["psnr", "ssim", "mse"])
def test_matching_undoes_a_shuffle(metric: str) -> None:
    originals = pictures(5, 1, 16, 16)
    shuffle = torch.tensor([3, 0, 4, 1, 2])  # not its own inverse
    noisy = originals + 0.05 * torch.randn(originals.shape, generator=torch.Generator().manual_seed(1))
    permutation = match_batch(noisy[shuffle], originals, metric=metric)
    assert permutation.dtype == torch.int64
    assert torch.equal(noisy[shuffle][permutation], noisy)


def test_matching_takes_the_best_total_and_not_the_best_picture_first() -> None:
    # Mean squared errors: original 0 against (0.01, 0.04), original 1 against (0.04, 0.25). Greedy
    # keeps the 0.01 and pays 0.26 in all; crossing costs 0.08.
    originals = torch.tensor([0.3, 0.6], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    reconstructions = torch.tensor([0.4, 0.1], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    assert match_batch(reconstructions, originals, metric="mse").tolist() == [1, 0]


def test_matching_survives_perfect_and_broken_pictures() -> None:
    originals = pictures(3, 1, 16, 16)
    reconstructions = originals[[2, 0, 1]].clone()
    reconstructions[0] = math.nan  # was original 2; the two perfect ones leave it that place
    assert match_batch(reconstructions, originals).tolist() == [1, 2, 0]


def test_matching_refuses() -> None:
    batch = pictures(2, 1, 16, 16)
    with pytest.raises(ValueError, match=r"'psnr', 'ssim', 'mse'; got 'lpips'"):
        match_batch(batch, batch, metric="lpips")
    with pytest.raises(ValueError, match=r"batches of shape \(B, C, H, W\) are matched; got \(1, 16, 16\)"):
        match_batch(batch[0], batch[0])
    with pytest.raises(ValueError, match="same shape"):
        match_batch(batch, batch[:1])
