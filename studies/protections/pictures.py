"""The figure: one photograph, and what the server gets of it. Played again, not read from the CSV."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import aprillab as al
from aprillab import viz

from . import clipping, noise, secure
from .clients import RATE, VICTIMS, State, model_of, owners

VICTIM = VICTIMS[0]
EPSILONS = (1e6, 1e5, 1e4, 10.0)


def states(model: torch.nn.Module) -> Iterator[tuple[str, State]]:
    """A title, and weights as the server has them."""
    before, everyone = model.state_dict(), owners(VICTIM)
    yield "FedAvg", clipping.played(clipping.Case(clipping.PLAIN, VICTIM, 0))[1][0]
    yield "clipped by the client", clipping.played(clipping.Case("client-side fixed clipping", VICTIM, 0))[1][0]
    for epsilon in EPSILONS:
        told = "10" if epsilon == 10 else f"$10^{{{round(math.log10(epsilon))}}}$"
        yield f"LocalDpMod, ε = {told}", noise.reply_of(noise.Case(epsilon, VICTIM, 0))
    others = [owner.trained(before, RATE) for owner in everyone[1:]]
    fine, coarse = (secure.play(everyone, RATE, max_weight=w).strategy.given[0][2] for w in (1.0, secure.MAX_WEIGHT))
    yield "SecAgg+: the sum", fine
    yield "the others known", secure.less(fine, others)
    yield "… at Flower's max_weight", secure.less(coarse, others)


def pictures() -> Iterator[tuple[str, Tensor]]:
    """The original, then the patch-embedding system's picture from each, with its PSNR."""
    model, owner = model_of(0), owners(VICTIM)[0]
    yield "the photograph", owner.pixels()[0]
    for title, state in states(model):
        update = al.update_from_states(model.state_dict(), state, learning_rate=RATE, trained=model)
        found = al.embedding_closed_form(model, update, strict=False, verify=False).pixels[0]
        yield f"{title}\n{float(al.psnr(found, owner.pixels()[0].double())):.0f} dB", found


def figure() -> Figure:
    fig, axes = viz.figure(2, 5, size=(10.0, 4.9))
    for ax, (title, pixels) in zip(axes.flat, pictures(), strict=True):
        viz.draw(ax, pixels, title)
        ax.title.set_fontsize(9)
    return fig


def draw(folder: Path, options: argparse.Namespace) -> dict[str, bytes]:
    return {"protections.png": viz.to_png(figure(), dpi=120)}
