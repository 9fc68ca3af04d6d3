"""From pixels to what a model is given, and back.

Pixels lie in [0, 1]. A model's input is the same picture less a mean, divided by a standard
deviation, channel by channel. Attacks solve in model-input space; pictures are shown and scored in
pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """A normalization by mean and standard deviation, and its inverse.

    Parameters
    ----------
    mean, std : tuple of float
        One value a channel, or a single value for every channel; in pixels. Lists are taken too and
        kept as tuples.

    Raises
    ------
    ValueError
        If a value is not finite, a standard deviation is not positive, or both have several values
        but not equally many.

    Examples
    --------
    >>> import torch
    >>> HALF.to_input(torch.ones(1, 3, 2, 2)).unique()
    tensor([1.])
    >>> HALF.to_pixels(torch.full((1, 3, 2, 2), 5.0)).unique()
    tensor([1.])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            try:
                values = tuple(float(value) for value in getattr(self, name))
            except TypeError:
                raise ValueError(
                    f"{name} must be a tuple of numbers, one a channel or one for all, such as (0.5,); "
                    f"got {getattr(self, name)!r}"
                ) from None
            if not values or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must hold at least one number, all of them finite; got {values}")
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise ValueError(f"every standard deviation must be positive; got std={self.std}")
        if 1 not in (len(self.mean), len(self.std)) and len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} values and std has {len(self.std)}: give both one value a channel, "
                "or one value for all channels"
            )

    def to_input(self, pixels: Tensor) -> Tensor:
        """Model input of pictures: ``(pixels − mean) / std``.

        Parameters
        ----------
        pixels : Tensor, shape (…, C, H, W)
            In [0, 1] (not checked: an optimizer may step outside), any floating dtype, any device.

        Returns
        -------
        Tensor
            Same shape, dtype and device. Gradients flow through.

        Raises
        ------
        ValueError
            If the tensor is not floating, has fewer than three dimensions, or its C is not the
            number of means.

        Examples
        --------
        >>> import torch, aprillab as al
        >>> al.IMAGENET.to_input(torch.full((3, 1, 1), 0.5)).flatten()
        tensor([0.0655, 0.1964, 0.4178])
        """
        mean, std = self._broadcast(pixels, "pixels")
        return (pixels - mean) / std

    def to_pixels(self, images: Tensor, clamp: bool = True) -> Tensor:
        """Pictures of model inputs: ``images · std + mean``, the inverse of :meth:`to_input`.

        Parameters
        ----------
        images : Tensor, shape (…, C, H, W)
            In model-input space, any floating dtype, any device.
        clamp : bool
            Cut to [0, 1], as a screen does. ``False`` keeps what lies outside, to see an error that
            clamping hides.

        Returns
        -------
        Tensor
            Same shape, dtype and device. Gradients flow through (none where a value was cut).

        Raises
        ------
        ValueError
            As :meth:`to_input`.

        Examples
        --------
        >>> import torch, aprillab as al
        >>> al.HALF.to_pixels(torch.full((3, 1, 1), 2.0)).flatten()
        tensor([1., 1., 1.])
        >>> al.HALF.to_pixels(torch.full((3, 1, 1), 2.0), clamp=False).flatten()
        tensor([1.5000, 1.5000, 1.5000])
        """
        mean, std = self._broadcast(images, "images")
        pixels = images * std + mean
        return pixels.clamp(0, 1) if clamp else pixels

    def _broadcast(self, images: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of shape (C or 1, 1, 1), in the images' dtype and on their
        device.
        """
        if not images.is_floating_point():
            raise ValueError(
                f"{what} must have a floating dtype; got {images.dtype}: "
                "for 8-bit pixels divide by 255 first (pixels.float() / 255)"
            )
        if images.ndim < 3:
            raise ValueError(f"{what} must have shape (…, C, H, W); got {tuple(images.shape)}")
        channels = max(len(self.mean), len(self.std))
        if channels not in (1, images.shape[-3]):
            raise ValueError(
                f"{what} of shape {tuple(images.shape)} have {images.shape[-3]} channels, but this preprocessing has "
                f"{channels} (mean={self.mean}, std={self.std}); the order is (…, C, H, W)"
            )
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return mean, std


UNIT = Preprocessing((0.0,), (1.0,))
"""Model input = pixels."""

HALF = Preprocessing((0.5,), (0.5,))
"""Pixels to [−1, 1]: what timm's ``vit_*`` with AugReg weights and transformers'
``ViTImageProcessor`` use.
"""

IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The mean and standard deviation of ImageNet's RGB pixels: what torchvision's ViTs and DeiT use.
"""
