"""The course's federation, without Flower: its model, and the pictures that its clients hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import load_victims, victims
from ..models import VisionTransformer
from ..preprocessing import HALF

#: What a run's configuration may say of the model, with what is taken where it does not.
MODEL = {
    "image-size": 32, "patch-size": 8, "width": 192, "depth": 2, "heads": 4, "classes": 10, "model-seed": 0,
}  # fmt: skip


def model_of(config: Mapping[str, Any]) -> VisionTransformer:
    """The model that the server starts with, by the keys of :data:`MODEL`; others are passed over.

    Examples
    --------
    >>> model_of({"width": 64, "depth": 1}).width
    64
    """
    told = {key: int(config.get(key, value)) for key, value in MODEL.items()}
    return VisionTransformer(
        image_size=told["image-size"], patch_size=told["patch-size"], width=told["width"], depth=told["depth"],
        heads=told["heads"], classes=told["classes"], seed=told["model-seed"],
    )  # fmt: skip


@dataclass(frozen=True)
class Album:
    """What one client holds.

    Attributes
    ----------
    names : tuple of str
        Of victims.
    pixels : Tensor of shape (N, 3, S, S), in [0, 1]
    labels : int64 Tensor of shape (N,)
    """

    names: tuple[str, ...]
    pixels: Tensor
    labels: Tensor

    @property
    def images(self) -> Tensor:
        """Model input."""
        return HALF.to_input(self.pixels)


def album_of(names: str, config: Mapping[str, Any]) -> Album:
    """The victims whose names stand between commas; each has its place in the list as its label.

    Raises
    ------
    ValueError
        If there is no such victim.

    Examples
    --------
    >>> album_of("coffee,rocket", {}).pixels.shape
    torch.Size([2, 3, 32, 32])
    """
    chosen = tuple(name.strip() for name in names.split(","))
    size, classes = (int(config.get(key, MODEL[key])) for key in ("image-size", "classes"))
    pixels, _ = load_victims(list(chosen), size)
    return Album(chosen, pixels, torch.tensor([victims().index(name) % classes for name in chosen]))


def dealt(clients: int, images: int) -> list[str]:
    """Names for each client, ``images`` of them, from all victims in their order; it begins again
    where they run out.

    >>> dealt(2, 2)[0]
    'astronaut,grace_hopper'
    """
    names = victims()
    numbers = range(clients * images)
    return [
        ",".join(names[i % len(names)] for i in numbers[first : first + images])
        for first in range(0, clients * images, images)
    ]
