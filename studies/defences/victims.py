"""The study's models, whose pictures they see, and the gallery of which an attacker must name one."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.training import train

from ..sharing_less.models import given_to

DIGITS, PHOTOGRAPHS, LARGE = "digits", "photographs", "ViT-B/16 at 224"
UNTRAINED, TRAINED = "initialization", "trained"
VICTIMS, LARGE_VICTIMS, GALLERY, OTHERS = 8, 3, 100, 63
LABEL = 3  # of every photograph, so that a label tells nothing
EPOCHS = 3

#: The model of studies/accuracy.py, and a wider one for colours.
SHAPES: dict[str, dict[str, Any]] = {
    DIGITS: {
        "image_size": 28, "patch_size": 7, "channels": 1, "width": 64, "depth": 3, "heads": 4, "classes": 10,
        "mlp_ratio": 2.0,
    },
    PHOTOGRAPHS: {"image_size": 32, "patch_size": 8, "width": 192, "depth": 2, "heads": 3, "classes": 10},
}  # fmt: skip


class World(NamedTuple):
    """A row's values in the columns that tell worlds apart."""

    world: str
    when: str
    seed: int


@dataclass(frozen=True)
class Scene:
    """A model, and pictures in model-input space.

    Attributes
    ----------
    model : nn.Module
    anatomy : Anatomy
    pixels, labels : Tensor (M, C, H, W) in [0, 1], and (M,)
        The gallery; its first ``victims`` pictures are the victims.
    others, other_labels : Tensor (K, C, H, W) and (K,)
        Pictures of nobody in the gallery, for batches and secure sums.
    victims : int
    names : of the victims
    """

    model: nn.Module
    anatomy: al.Anatomy
    pixels: Tensor
    labels: Tensor
    others: Tensor
    other_labels: Tensor
    victims: int
    names: tuple[str, ...]

    def input_of(self, pixels: Tensor) -> Tensor:
        return self.anatomy.preprocessing.to_input(pixels)

    def features(self) -> Tensor:
        """What the head reads of each picture of the gallery, (M, d), float64."""
        head = (self.anatomy.head_weight or "").rpartition(".")[0]
        return given_to(self.model, (head,), self.input_of(self.pixels))[0].double()

    def blind(self, victim: int) -> Tensor:
        """The guess of an attacker who has the gallery and no update: the mean of the others."""
        return self.pixels[torch.arange(len(self.pixels)) != victim].mean(0)


@functools.lru_cache(maxsize=1)
def scene(world: World, checkpoints: Path | None = None, gallery: int = GALLERY, epochs: int = EPOCHS) -> Scene:
    """The world's model and pictures; a trained one is trained, or read from the
    folder of checkpoints.
    """
    if world.world == LARGE:
        model = al.build_model("vit_b_16", seed=world.seed)
        pixels, names = photographs(224, LARGE_VICTIMS)
        return _scene(model, (pixels, torch.full((len(pixels),), LABEL)), LARGE_VICTIMS, LARGE_VICTIMS, tuple(names))
    model = al.VisionTransformer(**SHAPES[world.world], seed=world.seed)
    if world.world == PHOTOGRAPHS:
        pixels, names = photographs(32, gallery + OTHERS)
        return _scene(model, (pixels, torch.full((len(pixels),), LABEL)), gallery, VICTIMS, tuple(names))
    if world.when == TRAINED:
        train_digits(model, world.seed, checkpoints, epochs)
    pixels, labels = digits(gallery + OTHERS)
    names = tuple(f"a {label}" for label in labels[:VICTIMS].tolist())
    return _scene(model, (pixels, labels), gallery, VICTIMS, names)


def _scene(
    model: nn.Module, pictures: tuple[Tensor, Tensor], gallery: int, victims: int, names: tuple[str, ...]
) -> Scene:
    pixels, labels = pictures
    parts = pixels[:gallery], labels[:gallery], pixels[gallery:], labels[gallery:]
    return Scene(model.eval(), al.dissect(model), *parts, victims, names[:victims])


def train_digits(model: nn.Module, seed: int, checkpoints: Path | None, epochs: int) -> None:
    """As studies/accuracy.py trains, but for fewer epochs."""
    images, labels = al.mnist5k("train")
    path = checkpoints / f"digits-{seed}-{epochs}.safetensors" if checkpoints else None
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    train(
        model, al.HALF.to_input(images), labels, epochs=epochs, seed=seed, batch_size=50, lr=2e-3, checkpoint=path,
        resume=path is not None, progress=False,
    )  # fmt: skip


# --- Pictures -----------------------------------------------------------------------------------------------------


def digits(number: int) -> tuple[Tensor, Tensor]:
    """Test digits, one of each class in turn: no picture of them was trained on."""
    images, labels = al.mnist5k("test")
    each = [(labels == digit).nonzero().squeeze(1) for digit in range(10)]
    chosen = torch.stack([each[k % 10][k // 10] for k in range(number)])
    return images[chosen], labels[chosen]


def photographs(size: int, number: int) -> tuple[Tensor, list[str]]:
    """The course's photographs, then square pieces of them, each (3, size, size) and no two alike."""
    names = al.victims()
    found = [al.load_victim(name, size) for name in names]
    large = [al.load_victim(name, 224) for name in names] if number > len(names) else []
    for side, place in itertools.product((112, 75, 56), range(9)):
        if len(found) >= number:
            break
        for whole in large:
            y, x = ((224 - side) * step // 2 for step in divmod(place, 3))
            found.append(_shrunk(whole[:, y : y + side, x : x + side], size))
    return torch.stack(found[:number]), names


def _shrunk(piece: Tensor, size: int) -> Tensor:
    """To ``size`` × ``size``, in whole grey levels."""
    pixels = nn.functional.interpolate(piece[None], (size, size), mode="bicubic", antialias=True)[0]
    return (pixels.clamp(0, 1) * 255).round() / 255
