"""Pixels to model input and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aprillab.preprocessing import HALF, IMAGENET, UNIT, Preprocessing

RED_GREEN_BLUE = Preprocessing((0.1, 0.2, 0.3), (0.5, 2.0, 4.0))


def test_to_input_subtracts_the_mean_then_divides_by_the_deviation() -> None:
    pixels = torch.tensor([0.6, 0.6, 0.6]).reshape(3, 1, 1)
    torch.testing.assert_close(RED_GREEN_BLUE.to_input(pixels).flatten(), torch.tensor([1.0, 0.2, 0.075]))


def test_channels_are_counted_from_the_right() -> None:
    # a square batch of as many pictures as channels: a mean along the wrong axis would go
    # unnoticed in shape alone
    pixels = torch.rand(3, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    for channel, (mean, std) in enumerate(zip(RED_GREEN_BLUE.mean, RED_GREEN_BLUE.std, strict=True)):
        torch.testing.assert_close(
            RED_GREEN_BLUE.to_input(pixels)[:, channel], (pixels[:, channel] - mean) / std, rtol=1e-6, atol=1e-7
        )


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(1, 4, 5), (3, 4, 5), (2, 3, 4, 5), (2, 2, 1, 3, 3)]),
    mean=st.floats(-2, 2),
    std=st.floats(0.01, 10),
    seed=st.integers(0, 99),
)
def test_one_undoes_the_other(shape: tuple[int, ...], mean: float, std: float, seed: int) -> None:
    pixels = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    preprocessing = Preprocessing((mean,), (std,))
    back = preprocessing.to_pixels(preprocessing.to_input(pixels))
    torch.testing.assert_close(back, pixels, rtol=0, atol=1e-12)


def test_clamping_is_the_default_and_can_be_left_out() -> None:
    images = torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 1, 3)
    assert HALF.to_pixels(images).flatten().tolist() == [0.0, 0.5, 1.0]
    assert HALF.to_pixels(images, clamp=False).flatten().tolist() == [-1.0, 0.5, 2.0]


def test_the_constants() -> None:
    corners = torch.tensor([0.0, 1.0]).reshape(1, 1, 2)
    assert UNIT.to_input(corners).flatten().tolist() == [0.0, 1.0]
    assert HALF.to_input(corners).flatten().tolist() == [-1.0, 1.0]
    timm = pytest.importorskip("timm.data.constants")
    assert (IMAGENET.mean, IMAGENET.std) == (timm.IMAGENET_DEFAULT_MEAN, timm.IMAGENET_DEFAULT_STD)
    assert set(timm.IMAGENET_INCEPTION_MEAN) == set(HALF.mean)
    assert set(timm.IMAGENET_INCEPTION_STD) == set(HALF.std)


def test_a_single_deviation_serves_three_means() -> None:
    mixed = Preprocessing((0.1, 0.2, 0.3), (2.0,))
    torch.testing.assert_close(mixed.to_input(torch.zeros(3, 1, 1)).flatten(), torch.tensor([-0.05, -0.1, -0.15]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    pixels = torch.rand(2, 3, 4, 4).to(dtype)
    assert IMAGENET.to_input(pixels).dtype == dtype
    assert IMAGENET.to_pixels(pixels).dtype == dtype


def test_device_is_kept() -> None:
    pixels = torch.empty(2, 3, 4, 4, device="meta")
    assert IMAGENET.to_pixels(IMAGENET.to_input(pixels)).device == pixels.device


def test_gradients_flow() -> None:
    images = torch.zeros(1, 3, 2, 2, requires_grad=True)
    IMAGENET.to_pixels(images).sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad[0, :, 0, 0], torch.tensor(IMAGENET.std))


def test_lists_are_kept_as_tuples_so_that_equal_ones_are_equal() -> None:
    assert Preprocessing([0.5], [0.5]) == HALF  # type: ignore[arg-type]
    assert hash(Preprocessing([0.5], [0.5])) == hash(HALF)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), (0.0,), r"positive; got std=\(0\.0,\)"),
        ((0.5, 0.5, 0.5), (0.2, -0.1, 0.2), "positive"),
        ((0.5, 0.5), (0.2, 0.2, 0.2), "mean has 2 values and std has 3"),
        ((), (0.5,), "mean must hold at least one number"),
        ((0.5,), (float("inf"),), "std must hold .* finite"),
        ((float("nan"),), (0.5,), "mean must hold .* finite"),
        (0.5, (0.5,), "mean must be a tuple of numbers"),
    ],
)
def test_impossible_normalizations(mean: tuple[float, ...], std: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(mean, std)


@pytest.mark.parametrize("method", ["to_input", "to_pixels"])
def test_tensors_that_are_no_pictures(method: str) -> None:
    convert = getattr(IMAGENET, method)
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\) have 1 channels, but this preprocessing has 3"):
        convert(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="4 channels"):
        convert(torch.zeros(4, 4, 3))  # channels last
    with pytest.raises(ValueError, match=r"shape \(…, C, H, W\); got \(4, 4\)"):
        convert(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"got torch\.uint8: .*255"):
        convert(torch.zeros(3, 4, 4, dtype=torch.uint8))
