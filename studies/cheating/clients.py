"""The models, private pictures and clients of the study, and what a server reads of their sum."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.training import train
from aprillab.zoo import build_model

CHUNK = 8  # images of one backward pass: memory stays bounded
EPOCHS = 10
SMALL = {"image_size": 32, "patch_size": 8, "width": 192, "depth": 2, "heads": 4}
PUBLIC = 8  # of the victims are the client's, the others are what a server has seen


@functools.lru_cache(maxsize=2)
def model_of(name: str) -> nn.Module:
    """``random``: 32×32, 100 classes. ``digits``: the same of grey digits, trained. Otherwise the zoo's, at 224."""
    if name == "random":
        return al.VisionTransformer(**SMALL, classes=100, seed=0).eval()
    if name == "digits":
        return trained_digits()
    return build_model(name)


@functools.cache
def trained_digits(epochs: int = EPOCHS) -> nn.Module:
    """The small model after some epochs of MNIST-5k."""
    model = al.VisionTransformer(**SMALL, channels=1, classes=10, seed=0).eval()
    images, labels = digits("train")
    train(model, images, labels, epochs=epochs, progress=False)
    return model.eval()


@functools.cache
def digits(split: str) -> tuple[Tensor, Tensor]:
    """Digits of 32×32 in model-input space, shuffled, and their labels."""
    pixels, labels = al.mnist5k("train" if split == "train" else "test")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return al.HALF.to_input(nn.functional.pad(pixels, (2, 2, 2, 2)))[order], labels[order]


def crops(count: int, size: int, seed: int, *, public: bool = False) -> Tensor:
    """Square pieces (count, 3, size, size) of the project's photographs in [0, 1]: the client's, or public ones."""
    names = al.victims()
    photographs, _ = al.load_victims(names[PUBLIC:] if public else names[:PUBLIC])
    generator = torch.Generator().manual_seed(seed)
    found = []
    for k in range(count):
        side = int(torch.randint(64, 225, (1,), generator=generator))
        y, x = (int(torch.randint(0, 225 - side, (1,), generator=generator)) for _ in range(2))
        piece = photographs[k % len(photographs)][None, :, y : y + side, x : x + side]
        found.append(nn.functional.interpolate(piece, size=(size, size), mode="bilinear", antialias=True)[0])
    return torch.stack(found).clamp(0, 1)


def batch_of(name: str, count: int, seed: int, kind: str, wanted: int, client: int = 0) -> tuple[Tensor, Tensor, int]:
    """Images in model-input space, labels, and the class that image ``wanted`` alone has.

    ``kind``: ``distinct`` labels, or ``repeated``: the others share four classes. Each client has others.
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


def best_psnr(found: Sequence[Tensor], pixels: Tensor) -> Tensor:
    """For each private picture the best PSNR among those found, (B,)."""
    best = torch.zeros(len(pixels))
    for one in found:
        best = torch.maximum(best, torch.tensor([float(al.psnr(one.to(p), p)) for p in pixels]))
    return best
