"""From model input to pixels: an attack returns what the model was given, and which constants
made it is assumed.
"""

from __future__ import annotations

from torch import Tensor

from ..preprocessing import HALF, IMAGENET, UNIT, Preprocessing
from .result import Condition

_NAME = "normalization"
_KNOWN = {
    "pixels themselves, in [0, 1]": UNIT,
    "mean ½, standard deviation ½": HALF,
    "ImageNet's constants": IMAGENET,
}
_TOLERANCE = 0.02  # of the range from black to white
_WHOLE = 0.05  # of a level of 8 bits
_SHARP = 35.0  # dB
# Of the pixels: whole levels of a picture that has them; outside, where the constants are wrong.
_MOST, _FEW = 0.9, 0.01
_CONTRAST = 0.3  # of the range: a flatter picture stays within [0, 1] under other constants, too


def normalization(images: Tensor, assumed: Preprocessing, predicted_psnr: float) -> Condition:
    """Whether the pixels that the assumed constants give are pixels, or others fit better.

    Whole levels of 8 bits decide where the picture is sharp enough to have them; else how many
    pixels lie outside [0, 1], and whether all model input lies in [0, 1] already.

    Parameters
    ----------
    images : Tensor of shape (B, C, H, W), in model-input space
    assumed : Preprocessing
    predicted_psnr : float, in dB
        Of a picture below 35 dB nothing is said: its errors leave [0, 1] by themselves.

    Examples
    --------
    >>> import aprillab as al
    >>> pixels = al.load_victim("coffee", 32).double()[None]
    >>> normalization(al.HALF.to_input(pixels), al.HALF, 90.0).state, normalization(pixels, al.HALF, 90.0).state
    ('shown', 'contradicted')
    """
    constants = tuple(dict.fromkeys(assumed.mean)), tuple(dict.fromkeys(assumed.std))
    words_of_it = f"mean {assumed.mean}, standard deviation {assumed.std}"
    name = next((name for name, known in _KNOWN.items() if constants == (known.mean, known.std)), words_of_it)
    whole, outside = _fit(images, assumed)
    numbers: dict[str, float | str] = {"whole": whole, "outside": outside, "assumed": name}
    words = "assumed: {assumed}; {outside:.1%} of the pixels lie outside [0, 1]"
    if whole > _MOST:
        return Condition(_NAME, "shown", numbers, words + ", {whole:.0%} are whole levels of 8 bits")
    if not predicted_psnr >= _SHARP:
        return Condition(_NAME, "not checked", numbers, words)
    for other, preprocessing in _KNOWN.items():
        if other == name or len(preprocessing.mean) not in (1, images.shape[1]):
            continue
        whole_there, outside_there = _fit(images, preprocessing)
        flat = float(images.max() - images.min()) <= _CONTRAST
        is_input_itself = preprocessing == UNIT and outside_there == 0 and not flat
        if whole_there > _MOST or (outside > _FEW and outside_there < _FEW / 10) or is_input_itself:
            numbers |= {"other": other, "outside_there": outside_there, "whole_there": whole_there}
            words += "; {other} would fit better: {outside_there:.1%} outside, {whole_there:.0%} whole levels"
            return Condition(_NAME, "contradicted", numbers, words)
    return Condition(_NAME, "not checked", numbers, words)


def _fit(images: Tensor, preprocessing: Preprocessing) -> tuple[float, float]:
    """The fractions of pixels that are whole levels, and that lie outside [0, 1]."""
    pixels = preprocessing.to_pixels(images, clamp=False)
    levels = 255 * pixels
    whole = ((levels - levels.round()).abs() < _WHOLE) & (pixels > -_TOLERANCE) & (pixels < 1 + _TOLERANCE)
    outside = (pixels < -_TOLERANCE) | (pixels > 1 + _TOLERANCE)
    return float(whole.double().mean()), float(outside.double().mean())
