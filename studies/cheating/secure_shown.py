"""The command's three rounds: what each client saw, what the server got of whom, and the
picture. Needs Flower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import aprillab as al
from aprillab import viz
from aprillab.federation import LocalTraining

from .clients import best_psnr, crops, loaded, model_of
from .secure import FISHED, HONEST, SILENCED, sent_to
from .secure_sum import FIRST, Owner, Precision, picture_of, play

BATCH = 4  # pictures of each client where the server fishes
LABEL = 7  # of the first client's photograph; the next ones' are 8 and 9
FISHED_FOR = 1  # place among the clients of the one whose class it is
HEADING = "{:<9} {:<21} {:>8}  {:<11} {:<8} {:>5}  {}"
LINE = "{:<9} {:<21} {:>8}  {:<11} {:<8} {:>5.1f}  {}"


@dataclass(frozen=True)
class Seen:
    """A client in a round: what it saw of the model before it answered, and what the server got
    of its photograph.

    ``same`` is whether its fingerprint of the model is the one that most clients have, ``looks``
    what is suspicious to :func:`aprillab.inspect_model` with the round before and its own
    pictures; ``psnr`` in dB.
    """

    way: str
    client: str
    pictures: int
    fingerprint: str
    same: bool
    looks: str
    psnr: float

    def __str__(self) -> str:
        mark, same = self.fingerprint[:10], "yes" if self.same else "no"
        return LINE.format(self.way, self.client, self.pictures, mark, same, self.psnr, self.looks)


@dataclass(frozen=True)
class Shown:
    """A round: its clients, and the one picture that the server makes of it."""

    way: str
    clients: Sequence[Seen]
    pixels: Tensor


def heading() -> str:
    """Of the lines that are :class:`Seen`."""
    return HEADING.format("round", "client", "pictures", "fingerprint", "as most", "dB", "what the client sees")


def photograph(name: str) -> Tensor:
    """(1, 3, 32, 32), in [0, 1]."""
    return al.load_victim(name, 32)[None]


def clients_of(names: Sequence[str], each: int) -> list[Owner]:
    """Who has a photograph, of a class of its own, and other pictures."""
    everyone = []
    for k, name in enumerate(names):
        pixels = torch.cat([photograph(name), crops(each, 32, seed=k)[1:]])
        labels = torch.cat([torch.tensor([LABEL + k]), torch.arange(each - 1)])
        everyone.append(Owner(al.HALF.to_input(pixels), labels))
    return everyone


def rounds(names: Sequence[str], rate: float, max_weight: float | None) -> Iterator[Shown]:
    """One by one; without a ``max_weight`` it is the number of pictures that a client has."""
    model, how = model_of("random"), LocalTraining(learning_rate=rate)
    for way, each in {HONEST: 1, SILENCED: 1, FISHED: BATCH}.items():
        everyone = clients_of(names, each)
        sent = sent_to(model, way, LABEL + FISHED_FOR, len(everyone))
        played = play(model, sent, everyone, how, precision=Precision(max_weight or each))
        pixels = picture_of(model, played, FIRST + FISHED_FOR if way == FISHED else FIRST).pixels[0]
        yield Shown(way, seen(model, way, names, everyone, sent, pixels), pixels)


def seen(
    model: nn.Module, way: str, names: Sequence[str], everyone: Sequence[Owner], sent: Sequence[dict[str, Tensor]],
    pixels: Tensor,
) -> list[Seen]:  # fmt: skip
    """Of each client; the round before left the honest model."""
    marks = [al.dishonest.fingerprint(state) for state in sent]
    usual, found = max(marks, key=marks.count), []
    for name, owner, state, mark in zip(names, everyone, sent, marks, strict=True):
        looks = al.inspect_model(loaded(model, state), model, images=owner.images, labels=owner.labels)
        words = ", ".join(finding.name for finding in looks.findings if finding.suspicious) or "nothing"
        psnr = float(best_psnr([pixels], photograph(name).to(pixels))[0])
        found.append(Seen(way, name, len(owner.images), mark, mark == usual, words, psnr))
    return found


def figure(shown: Sequence[Shown], names: Sequence[str]) -> Figure:
    """The private photographs, and below them what each server gets."""
    fig, axes = viz.figure(2, 3, size=(8.4, 6.2))
    for k, (ax, name) in enumerate(zip(axes[0], names, strict=True)):
        viz.draw(ax, photograph(name)[0], f"client {k + 1}'s: {name}")
    quiet = " and ".join(str(k + 1) for k in range(1, len(names)))
    titles = {
        HONEST: "an honest server's sum", SILENCED: f"clients {quiet} silenced",
        FISHED: f"client {FISHED_FOR + 1}'s class fished,\n{BATCH} pictures each",
    }  # fmt: skip
    for ax, one in zip(axes[1], shown, strict=True):
        viz.draw(ax, one.pixels, f"{titles[one.way]}\n{max(client.psnr for client in one.clients):.0f} dB")
    return fig
