"""The models, private pictures and clients of the study, and what a server reads of their sum."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.training import train
from aprillab.zoo import build_model

from .records import MEAN, NOISE, OTHER, TWO, Case, Row

CHUNK = 8  # images of one backward pass: memory stays bounded
EPOCHS, EPOCHS_OF_PIECES = 10, 5
SMALL = {"image_size": 32, "patch_size": 8, "width": 192, "depth": 2, "heads": 4}
PUBLIC = 8  # of the victims are the client's, the others are what a server has seen


@functools.lru_cache(maxsize=2)
def model_of(name: str) -> nn.Module:
    """``random``: 32×32, 100 classes. ``digits``, ``pieces``: the same, trained. Otherwise
    the zoo's, at 224.
    """
    if name == "random":
        return al.VisionTransformer(**SMALL, classes=100, seed=0).eval()
    if name in ("digits", "pieces"):
        return trained_digits() if name == "digits" else trained_pieces()
    return build_model(name)


@functools.cache
def trained_digits(epochs: int = EPOCHS) -> nn.Module:
    """The small model after some epochs of MNIST-5k."""
    model = al.VisionTransformer(**SMALL, channels=1, classes=10, seed=0).eval()
    images, labels = digits("train")
    train(model, images, labels, epochs=epochs, progress=False)
    return model.eval()


@functools.cache
def trained_pieces(epochs: int = EPOCHS_OF_PIECES) -> nn.Module:
    """The small model in colour, trained to say which of the public photographs a piece is of."""
    classes = len(al.victims()) - PUBLIC
    model = al.VisionTransformer(**SMALL, classes=classes, seed=0).eval()
    images = al.HALF.to_input(crops(300 * classes, SMALL["image_size"], 500, public=True))
    train(model, images, torch.arange(len(images)) % classes, epochs=epochs, progress=False)
    return model.eval()


@functools.cache
def digits(split: str) -> tuple[Tensor, Tensor]:
    """Digits of 32×32 in model-input space, shuffled, and their labels."""
    pixels, labels = al.mnist5k("train" if split == "train" else "test")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return al.HALF.to_input(nn.functional.pad(pixels, (2, 2, 2, 2)))[order], labels[order]


def pieces(size: int, seed: int, *, public: bool = False) -> Iterator[Tensor]:
    """Square pieces (3, size, size) of the project's photographs in [0, 1], without end: the
    client's, or public.
    """
    names = al.victims()
    photographs, _ = al.load_victims(names[PUBLIC:] if public else names[:PUBLIC])
    generator = torch.Generator().manual_seed(seed)
    for k in itertools.count():
        side = int(torch.randint(64, 225, (1,), generator=generator))
        y, x = (int(torch.randint(0, 225 - side, (1,), generator=generator)) for _ in range(2))
        piece = photographs[k % len(photographs)][None, :, y : y + side, x : x + side]
        found = nn.functional.interpolate(piece, size=(size, size), mode="bilinear", antialias=True)[0]
        yield found.clamp(0, 1)


def crops(count: int, size: int, seed: int, *, public: bool = False) -> Tensor:
    """The first ``count`` of :func:`pieces`, (count, 3, size, size)."""
    return torch.stack(list(itertools.islice(pieces(size, seed, public=public), count)))


def batch_of(name: str, count: int, seed: int, kind: str, wanted: int, client: int = 0) -> tuple[Tensor, Tensor, int]:
    """Images in model-input space, labels, and the class that image ``wanted`` alone has.

    ``kind``: ``distinct`` labels, or ``repeated``: the others share four classes. Each
    client has others.
    """
    if name == "digits":
        images, labels = digits("test")
        c = seed % 10
        own, others = images[labels == c], images[labels != c]
        start = count * (seed + client) % (len(others) - count)
        chosen = others[start : start + count].clone()
        given = labels[labels != c][start : start + count].clone()
        chosen[wanted], given[wanted] = own[seed], c
        return chosen, given, c
    anatomy = al.dissect(model_of(name))
    images = anatomy.preprocessing.to_input(crops(count, anatomy.image_size[0], seed + 1000 * client))
    labels = torch.arange(count) + 10 if kind == "distinct" else torch.arange(count) % 4
    labels[wanted] = 7
    return images, labels, 7


def update_of(model: nn.Module, images: Tensor, labels: Tensor) -> al.ClientUpdate:
    """The gradient of the mean loss, some images at a time."""
    total: dict[str, Tensor] = {}
    for x, y in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
        part = al.client_update(model, x, y).gradients
        for name, g in part.items():
            total[name] = total[name].add_(g, alpha=len(x)) if name in total else g * len(x)
    return al.ClientUpdate({name: g / len(images) for name, g in total.items()}, batch_size=len(images))


class Others:
    """The summed gradient of pictures whose class is not wanted, taken one by one,
    float32 like the model.

    Gradients add: with this, another victim among the same others is one backward pass. The first
    pictures of a large batch are a small batch's, so sums are asked for from the smallest up.

    Examples
    --------
    >>> model = model_of("random")
    >>> images, labels, _ = batch_of("random", 4, 0, "distinct", 0)
    >>> others = Others(model, zip(images[1:], labels[1:], strict=True))
    >>> joined = others.joined_by(images[:1], labels[:1], 3).gradients["head.bias"]
    >>> torch.allclose(joined, al.client_update(model, images, labels).gradients["head.bias"])
    True
    """

    def __init__(self, sent: nn.Module, pictures: Iterator[tuple[Tensor, Tensor]]) -> None:
        self.sent, self.count = sent, 0
        self._pictures, self._total = pictures, dict[str, Tensor]()

    def of(self, count: int) -> dict[str, Tensor]:
        """The sum over the first ``count`` pictures; a ValueError if it has gone further,
        or there are fewer.
        """
        if count < self.count:
            raise ValueError(f"the sum is of {self.count} pictures already, and {count} were asked for")
        for image, label in itertools.islice(self._pictures, count - self.count):
            for name, g in al.client_update(self.sent, image[None], label[None]).gradients.items():
                self._total[name] = self._total[name].add_(g) if name in self._total else g.clone()
            self.count += 1
        if self.count < count:
            raise ValueError(f"there are {self.count} pictures, and {count} were asked for")
        return self._total

    def joined_by(self, images: Tensor, labels: Tensor, count: int, *, clients: int = 1) -> al.ClientUpdate:
        """The update of these others and some victims: one client's mean, or the sum of
        many clients' means.
        """
        total, (each, left) = dict(self.of(count)), divmod(count + len(images), clients)
        if left or not each:
            raise ValueError(f"{count + len(images)} pictures are not {clients} clients' equal shares")
        for image, label in zip(images, labels, strict=True):
            for name, g in al.client_update(self.sent, image[None], label[None]).gradients.items():
                total[name] = total[name] + g if name in total else g
        return al.ClientUpdate({name: g / each for name, g in total.items()})


def summed(updates: Iterator[al.ClientUpdate]) -> al.ClientUpdate:
    """What secure aggregation leaves of many clients; one of them in memory at a time."""
    total = {name: g.clone() for name, g in next(updates).gradients.items()}
    for update in updates:
        for name, g in update.gradients.items():
            total[name] += g
    return al.ClientUpdate(total)


def loaded(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A copy of the model with what was sent."""
    sent = copy.deepcopy(model)
    sent.load_state_dict(state)
    return sent


def read(sent: nn.Module, update: al.ClientUpdate, **options: object) -> al.Reconstruction:
    """By the patch-embedding system; whatever the client says of its batch."""
    return al.embedding_closed_form(sent, replace(update, batch_size=None), verify=False, **options)  # type: ignore[arg-type]


def changed(update: al.ClientUpdate, setting: str, seed: int) -> tuple[al.ClientUpdate, dict[str, Any]]:
    """The client clips, adds noise to what it clipped to 1, or rounds; and what the
    server knows of it.
    """
    if setting == "clip" or setting in NOISE:
        update = al.defenses.clip(update, 1.0)
    if setting in NOISE:
        sigma = float(setting.split()[1])
        return al.defenses.gaussian_noise(update, sigma, seed=seed), {"noise": sigma}
    if setting in ("bfloat16", "float16"):
        update = al.defenses.to_precision(update, getattr(torch, setting))
    return update, {}


def of_one(model: Any, update: al.ClientUpdate, image: Tensor, **options: Any) -> dict[str, Any]:
    """What a row says of one wanted picture, in model-input space."""
    recipe = recipe_of(model, image)
    result = read(model, update, preprocessing=recipe, **options)
    one = next(condition for condition in result.conditions if condition.name == "one image")
    truth = recipe.to_pixels(image[None])[0].to(result.pixels)
    return {
        "psnr": float(al.psnr(result.pixels[0], truth)),
        "predicted": result.predicted_psnr,
        "one_image": one.state,
    }


def of_two(case: Case, model: nn.Module, update: al.ClientUpdate, pair: Tensor) -> Iterator[Row]:
    """The system's one picture beside each of the two of the class, and beside these
    what their mean has.
    """
    found = sorted((of_one(model, update, image) for image in pair), key=lambda one: -one["psnr"])
    for setting, one in zip((TWO, OTHER), found, strict=True):
        yield Row(*case._replace(setting=setting), **one)
    pixels = recipe_of(model, pair[0]).to_pixels(pair)
    yield Row(*case._replace(setting=MEAN), psnr=float(al.psnr(pixels.mean(0), pixels[0])))


def recipe_of(model: nn.Module, image: Tensor) -> al.Preprocessing:
    """The zoo's models have their own; those of 32×32 are of this package."""
    return al.dissect(model).preprocessing if image.shape[-1] == 224 else al.HALF


def best_psnr(found: Sequence[Tensor], pixels: Tensor) -> Tensor:
    """For each private picture the best PSNR among those found, (B,)."""
    best = torch.zeros(len(pixels))
    for one in found:
        best = torch.maximum(best, torch.tensor([float(al.psnr(one.to(p), p)) for p in pixels]))
    return best
