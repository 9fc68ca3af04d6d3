"""ViT-B/16 at 224: batches and sums whose other pictures are the same for all victims, and
what decibels hang on.

The others of a setting are summed once: the first 7 of them are those of a batch of 8, and so on up
to the 799 of a hundred clients. Only the victim's own gradient is exchanged.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.zoo import build_model

from .clients import Others, changed, crops, loaded, model_of, of_one, of_two, pieces
from .records import CHANGES, CLIENTS, OF_EACH, SUM, TWO, Case, Row

MODEL, WANTED, SIZE, PATCH = "vit_b_16", 7, 224, 16
AGAIN = "distinct, others anew"
CHANGES_HERE = tuple(change for change in CHANGES if change != "noise 1e-3")  # nothing is left at 1e-4
#: In a batch of one, one thing changes: the arithmetic, the weights, the head's row,
#: or the picture.
ONE_THING = (
    "float64", "float64, rounded", "other weights", "other class", "position embedding × 10", "patches shuffled",
    "half contrast", "texture 0.02", "texture 0.1",
)  # fmt: skip


def cases() -> Iterator[Case]:
    victims = range(8)

    def batches(setting: str, strength: float, sizes: tuple[int, ...]) -> Iterator[Case]:
        yield from (Case("class", MODEL, setting, strength, batch, v) for batch in sizes for v in victims)

    yield from (Case("alone", MODEL, "alone", 20.0, 1, v) for v in victims)
    yield from batches("distinct", 20.0, (8, 32, 64))
    yield from batches(AGAIN, 20.0, (32,))
    for strength in (10.0, 2.0, 5.0, 15.0):
        yield from batches("distinct", strength, (8,))
    yield from (Case("why", MODEL, setting, 20.0, 1, v) for setting in ONE_THING for v in victims)
    yield from (Case("two", MODEL, TWO, 20.0, 8, v) for v in victims)
    yield from (Case("changes", MODEL, change, 20.0, 8, v) for v in victims for change in CHANGES_HERE)
    yield from batches("repeated", 20.0, (8, 32, 64))
    yield from (Case("sum", MODEL, SUM, 20.0, CLIENTS * OF_EACH, v) for v in victims)


def sharing_others(case: Case) -> Hashable:
    """Victims among the same others go to one worker, one after another; anything else goes alone."""
    if case.model != MODEL or case.part in ("alone", "why"):
        return case
    return case.model, kind_of(case), case.strength


def kind_of(case: Case) -> str:
    return case.setting if case.setting in ("distinct", AGAIN) else "repeated"


# --- Pictures and models ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def fished(strength: float, label: int = WANTED) -> nn.Module:
    model = model_of(MODEL)
    return loaded(model, al.dishonest.class_fishing(model, label, strength=strength))


@functools.lru_cache(maxsize=1)
def others_of(kind: str, strength: float) -> Others:
    """Of a class each, or of four classes in turn; none of them is wanted."""
    images = pieces(SIZE, 101 if kind == AGAIN else 100)
    labels = itertools.count(10) if kind != "repeated" else itertools.cycle(range(4))
    recipe = al.dissect(model_of(MODEL)).preprocessing
    pictures = ((recipe.to_input(x), torch.tensor(y)) for x, y in zip(images, labels, strict=False))
    return Others(fished(strength), pictures)


def victim(number: int) -> Tensor:
    """A piece of the client's photograph of this number, in [0, 1]."""
    return crops(number + 1, SIZE, number)[number]


def _input(pixels: Tensor) -> Tensor:
    return al.dissect(model_of(MODEL)).preprocessing.to_input(pixels)


# --- Measuring ----------------------------------------------------------------------------------------------------


def measured(case: Case) -> Iterator[Row]:
    if case.part == "two":
        yield from of_pair(case)
    else:
        yield Row(*case, **{"why": of_one_thing}.get(case.part, of_batch)(case))


def of_batch(case: Case) -> dict[str, Any]:
    """The victim among the others of its setting, or alone; a sum's server gets what a
    hundred means add up to.
    """
    clients = CLIENTS if case.part == "sum" else 1
    image = _input(victim(case.victim))[None]
    others = others_of(kind_of(case), case.strength)
    update = others.joined_by(image, torch.tensor([WANTED]), case.batch - 1, clients=clients)
    known = {}
    if case.part == "changes":
        update, known = changed(update, case.setting, case.victim)
    return of_one(others.sent, update, image[0], **known)


def of_pair(case: Case) -> Iterator[Row]:
    """The next victim has the wanted class, too."""
    pair = _input(torch.stack([victim(case.victim), victim((case.victim + 1) % 8)]))
    others = others_of(kind_of(case), case.strength)
    update = others.joined_by(pair, torch.tensor([WANTED, WANTED]), case.batch - 2)
    yield from of_two(case, others.sent, update, pair)


def of_one_thing(case: Case) -> dict[str, Any]:
    """The victim alone, and one thing changed."""
    pixels, label = victim(case.victim), torch.tensor([8 if case.setting == "other class" else WANTED])
    image = _input(CHANGED.get(case.setting, lambda x: x)(pixels))[None]
    sent = _sent(case.setting, case.strength, int(label))
    update = al.client_update(sent, image.to(next(sent.parameters()).dtype), label)
    if case.setting == "float64, rounded":
        update = al.ClientUpdate({name: g.float() for name, g in update.gradients.items()})
    return of_one(sent, update, image[0])


def _sent(setting: str, strength: float, label: int) -> nn.Module:
    if setting.startswith("float64"):
        return copy.deepcopy(fished(strength)).double()
    if setting == "other weights":
        other = build_model(MODEL, seed=1)
        return loaded(other, al.dishonest.class_fishing(other, label, strength=strength))
    if setting == "position embedding × 10":
        sent = copy.deepcopy(fished(strength))
        with torch.no_grad():
            sent.get_parameter(al.dissect(sent).position or "").mul_(10)
        return sent
    return fished(strength, label)


def _shuffled(pixels: Tensor) -> Tensor:
    side = SIZE // PATCH
    order = torch.randperm(side * side, generator=torch.Generator().manual_seed(0))
    patches = nn.functional.unfold(pixels[None], PATCH, stride=PATCH)[..., order]
    return nn.functional.fold(patches, (SIZE, SIZE), PATCH, stride=PATCH)[0]


def _textured(pixels: Tensor, size: float) -> Tensor:
    return (pixels + size * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


CHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "patches shuffled": _shuffled,
    "half contrast": lambda pixels: (pixels + pixels.mean()) / 2,
    "texture 0.02": lambda pixels: _textured(pixels, 0.02),
    "texture 0.1": lambda pixels: _textured(pixels, 0.1),
}
