"""How close a reconstruction is to the private picture: PSNR, SSIM and MSE on pixels in [0, 1].

One convention throughout. A picture (C, H, W) gives a float; a batch (B, C, H, W) gives a float64
tensor (B,) on the CPU, one value a picture. Sums are taken in float64 whatever comes in. The
reconstruction is clamped to [0, 1] first, as a screen would show it; ``clamp=False`` shows the
error that clamping hides. A reconstruction with a NaN in it scores NaN, so that a mean over
pictures shows the failure rather than skips it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from skimage.metrics import structural_similarity
from torch import Tensor

EXACT_TO_8_BITS_DB = 10 * math.log10(12 * 255**2)
"""PSNR of a picture against itself rounded to 8 bits: 58.92 dB.

Rounding to steps of Δ = 1/255 leaves an error that is uniform on [−Δ/2, Δ/2], so its mean square is
Δ²/12, and −10 log₁₀(Δ²/12) = 10 log₁₀(12 · 255²). A reconstruction above it errs less than an 8-bit
file does on average, and we call it exact to 8 bits. That is said of the mean, not of every pixel:
a Gaussian error of this size still moves one pixel in twelve to a neighbouring level.
"""

SSIM_WINDOW = 11
"""Side, in pixels, of the Gaussian window (σ = 1.5) of Wang et al. (2004)."""

# Slack for an original that went through half precision; a forgotten normalization is far outside
# it.
_OUTSIDE = 2e-2


def mse(reconstruction: Tensor, original: Tensor, *, clamp: bool = True) -> float | Tensor:
    """Mean squared error over pixels and channels.

    Parameters
    ----------
    reconstruction, original : Tensor, shape (C, H, W) or (B, C, H, W)
        Pixels, floating, of equal shape; any dtype and device. The original lies in [0, 1].
    clamp : bool
        Cut the reconstruction to [0, 1] first.

    Returns
    -------
    float or Tensor of shape (B,)
        In pixels squared, 0 for equal pictures; NaN for a reconstruction that holds NaN.

    Raises
    ------
    ValueError
        If the shapes differ or are not those of pictures, a dtype is not floating, or the original
        is not finite or not in [0, 1] (a picture that was normalized for a model, for instance).

    Examples
    --------
    >>> import torch, aprillab as al
    >>> grey = torch.full((3, 8, 8), 0.5)
    >>> round(al.mse(grey + 0.1, grey), 4)
    0.01
    """
    x, y = _pair(reconstruction, original, clamp)
    return _answer(_mse(x, y), reconstruction)


def psnr(reconstruction: Tensor, original: Tensor, *, clamp: bool = True) -> float | Tensor:
    """Peak signal-to-noise ratio in dB with peak 1: −10 log₁₀ of the mean squared error.

    Parameters
    ----------
    reconstruction, original, clamp
        As :func:`mse`.

    Returns
    -------
    float or Tensor of shape (B,)
        In dB; infinite for equal pictures, NaN for a reconstruction that holds NaN, −infinite (with
        ``clamp=False``) for one that holds an infinity. Above :data:`EXACT_TO_8_BITS_DB`: exact to
        8 bits.

    Raises
    ------
    ValueError
        As :func:`mse`.

    Examples
    --------
    An error of one level of 8 bits in every pixel:

    >>> import torch, aprillab as al
    >>> grey = torch.full((3, 8, 8), 0.5)
    >>> round(al.psnr(grey + 1 / 255, grey), 2)
    48.13
    """
    x, y = _pair(reconstruction, original, clamp)
    return _answer(_psnr(x, y), reconstruction)


def ssim(reconstruction: Tensor, original: Tensor, *, clamp: bool = True) -> float | Tensor:
    """Structural similarity, windowed, of Wang, Bovik, Sheikh and Simoncelli (2004), averaged over
    channels.

    An 11 × 11 Gaussian window with σ = 1.5 slides over the places where it fits; K₁ = 0.01, K₂ =
    0.03, data range 1. Computed by scikit-image. For a picture under 11 pixels the window shrinks
    to the largest odd size that fits, and σ in proportion: such values compare with each other, not
    with those of larger pictures.

    Parameters
    ----------
    reconstruction, original, clamp
        As :func:`mse`.

    Returns
    -------
    float or Tensor of shape (B,)
        At most 1, which equal pictures reach; NaN for a reconstruction that holds NaN or,
        unclamped, an infinity.

    Raises
    ------
    ValueError
        As :func:`mse`, and if a picture is under 3 pixels high or wide, where no window fits.

    Examples
    --------
    Sixteen levels in the place of 256:

    >>> import aprillab as al
    >>> photograph = al.load_victim("coffee", 64)
    >>> round(al.ssim((15 * photograph).round() / 15, photograph), 2)
    0.93
    """
    x, y = _pair(reconstruction, original, clamp)
    return _answer(_ssim(x, y), reconstruction)


@dataclass(frozen=True)
class Scores:
    """A reconstruction's scores, one value a picture, as float64 tensors of shape (B,).

    Attributes
    ----------
    psnr : Tensor
        dB, of the clamped pixels.
    ssim : Tensor
        Windowed structural similarity of the clamped pixels.
    mse : Tensor
        Of the clamped pixels.
    mse_unclamped : Tensor
        Of the pixels as they came: where it is far above ``mse``, clamping hid a blow-up.
    """

    psnr: Tensor
    ssim: Tensor
    mse: Tensor
    mse_unclamped: Tensor

    @property
    def psnr_unclamped(self) -> Tensor:
        """PSNR in dB of the pixels as they came, shape (B,)."""
        return -10 * self.mse_unclamped.log10()


def score(reconstruction: Tensor, original: Tensor) -> Scores:
    """Every score of a reconstruction at once.

    Parameters
    ----------
    reconstruction : Tensor, shape (B, C, H, W) or (C, H, W)
        Pixels, not yet clamped (``to_pixels(images, clamp=False)``), or the unclamped error is
        lost.
    original : Tensor, same shape
        Pixels in [0, 1], in the same order (see :func:`match_batch`).

    Returns
    -------
    Scores
        A single picture counts as a batch of one.

    Raises
    ------
    ValueError
        As :func:`ssim`.

    Examples
    --------
    What clamping hides shows in the unclamped error.

    >>> import torch, aprillab as al
    >>> white = torch.ones(3, 8, 8)
    >>> found = al.score(3 * white, white)
    >>> found.mse.item(), found.mse_unclamped.item()
    (0.0, 4.0)
    """
    raw, y = _pair(reconstruction, original, clamp=False)
    x = raw.clamp(0, 1)
    return Scores(psnr=_psnr(x, y), ssim=_ssim(x, y), mse=_mse(x, y), mse_unclamped=_mse(raw, y))


def match_batch(reconstructions: Tensor, originals: Tensor, *, metric: str = "psnr") -> Tensor:
    """Which reconstruction belongs to which original: the one-to-one assignment with the best total
    score.

    The order of the pictures in a batch leaves no trace in its gradient, so an attack returns them
    in any order. The assignment uses the ground truth, which an attacker does not have: it serves
    scoring and nothing else. Report the mean over the batch, never the best picture alone.

    Parameters
    ----------
    reconstructions, originals : Tensor, shape (B, C, H, W)
        Pixels, as for :func:`mse`. Reconstructions are clamped.
    metric : {"psnr", "ssim", "mse"}
        Of which the total is optimized. An infinite PSNR counts as 1000 dB; a reconstruction with
        NaN gets the place that the others leave.

    Returns
    -------
    Tensor, shape (B,), int64
        A permutation: ``reconstructions[permutation]`` stands in the originals' order.

    Raises
    ------
    ValueError
        As :func:`mse`, if these are no batches, or if the metric is another.

    Examples
    --------
    >>> import aprillab as al
    >>> originals, _ = al.load_victims(["astronaut", "coffee", "rocket"], 32)
    >>> al.match_batch(originals[[2, 0, 1]], originals)
    tensor([1, 2, 0])
    """
    if metric not in _METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, _METRICS))}; got {metric!r}")
    if reconstructions.ndim != 4:
        raise ValueError(f"batches of shape (B, C, H, W) are matched; got {tuple(reconstructions.shape)}")
    x, y = _pair(reconstructions, originals, clamp=True)
    function, sign = _METRICS[metric]
    # gains[i, j]: what it is worth to give reconstruction j to original i
    gains = torch.stack([sign * function(x, original.expand_as(x)) for original in y])
    # The assignment takes finite numbers only. A NaN stands in a whole column, so its value decides
    # nothing.
    gains = gains.nan_to_num(nan=0.0, posinf=1000.0)
    _, columns = linear_sum_assignment(gains.numpy(), maximize=True)
    return torch.as_tensor(columns, dtype=torch.int64)


def _pair(reconstruction: Tensor, original: Tensor, clamp: bool) -> tuple[Tensor, Tensor]:
    """Both as float64 batches (B, C, H, W) on the CPU, checked; the first clamped if so asked."""
    if reconstruction.shape != original.shape:
        raise ValueError(
            f"reconstruction and original must have the same shape; got {tuple(reconstruction.shape)} "
            f"and {tuple(original.shape)}"
        )
    if original.ndim not in (3, 4) or original.numel() == 0:
        raise ValueError(f"pictures must have shape (C, H, W) or (B, C, H, W); got {tuple(original.shape)}")
    for name, picture in (("reconstruction", reconstruction), ("original", original)):
        if not picture.is_floating_point():
            raise ValueError(
                f"{name} must hold floating pixels in [0, 1]; got {picture.dtype}: divide 8-bit pixels by 255"
            )
    x, y = (
        picture.detach().to("cpu", torch.float64).reshape(-1, *original.shape[-3:])
        for picture in (reconstruction, original)
    )
    low, high = y.min().item(), y.max().item()
    if not (low >= -_OUTSIDE and high <= 1 + _OUTSIDE):
        raise ValueError(
            f"the original must hold pixels in [0, 1]; it spans {low:.3g} to {high:.3g}: "
            "undo the model's normalization first (Preprocessing.to_pixels)"
        )
    return (x.clamp(0, 1) if clamp else x), y


def _answer(values: Tensor, like: Tensor) -> float | Tensor:
    return values if like.ndim == 4 else values.item()


def _mse(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().mean(dim=(1, 2, 3))


def _psnr(x: Tensor, y: Tensor) -> Tensor:
    return -10 * _mse(x, y).log10()


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    smaller_side = min(x.shape[-2:])
    if smaller_side < 3:
        raise ValueError(f"SSIM needs pictures of at least 3 × 3 pixels; got {x.shape[-2]} × {x.shape[-1]}")
    window = min(SSIM_WINDOW, smaller_side - 1 + smaller_side % 2)
    values = [
        structural_similarity(
            a.numpy(),
            b.numpy(),
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5 * window / SSIM_WINDOW,
            win_size=window,
            use_sample_covariance=False,
        )
        if a.isfinite().all()
        else math.nan
        for a, b in zip(x, y, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


_METRICS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "psnr": (_psnr, 1),
    "ssim": (_ssim, 1),
    "mse": (_mse, -1),
}
