"""Play a round of federated learning from both sides, and the demonstration made of three such rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .. import viz
from ..anatomy import dissect
from ..attacks.catalogue import ATTACKS
from ..attacks.invert import invert
from ..attacks.result import Reconstruction
from ..metrics import EXACT_TO_8_BITS_DB, psnr, ssim
from ..update import client_update, logits_of
from ..zoo import Position, build_model


@dataclass(frozen=True)
class Round:
    """What the attacker got in one round, and how near it is, which only whoever holds the original can tell.

    Attributes
    ----------
    reconstruction : Reconstruction
    psnr, ssim : float
        Against the original, on pixels in [0, 1]; dB, and at most 1.
    gradient_seconds : float
        Wall-clock time of the client's forward and backward pass, after one forward pass to warm up.
    label : int
        The true one.
    """

    reconstruction: Reconstruction
    psnr: float
    ssim: float
    gradient_seconds: float
    label: int


def play_round(model: nn.Module, pixels: Tensor, label: int, *, attack: str = "auto") -> Round:
    """Be the client with one private picture, then the server that attacks what the client shares.

    Parameters
    ----------
    model : nn.Module
    pixels : Tensor of shape (C, H, W), in [0, 1]
    label : int
    attack : {"auto", "embedding", "april", "span"}, as in :func:`aprillab.invert`

    Raises
    ------
    AttackNotApplicable
        If no such attack applies.
    """
    anatomy = dissect(model)
    images = anatomy.preprocessing.to_input(pixels[None].to(next(model.parameters())))  # (1, C, H, W)
    logits_of(model, images)  # The first pass pays for set-up and memory, which no later one does.
    update = client_update(model, images, torch.tensor([label], device=images.device))
    found = invert(model, update, attack=attack, anatomy=anatomy)
    original = pixels.to(found.pixels)
    return Round(
        reconstruction=found,
        psnr=float(psnr(found.pixels[0], original)),
        ssim=float(ssim(found.pixels[0], original)),
        gradient_seconds=float(update.seconds or 0.0),
        label=label,
    )


@dataclass(frozen=True)
class Scene:
    """One column of the demonstration: who is attacked, and how.

    Attributes
    ----------
    model, shared : str
        For people: the model, and which gradients the client shares.
    name, position, attack
        For :func:`~aprillab.zoo.build_model` and :func:`aprillab.invert`.
    """

    model: str
    shared: str
    name: str
    position: Position
    attack: str

    @property
    def title(self) -> str:
        """The attack, for people."""
        return ATTACKS[self.attack].title


SCENES = (
    Scene("architecture A", "all gradients", "april", "learned", "april"),
    Scene("torchvision ViT-B/16", "all gradients", "vit_b_16", "learned", "embedding"),
    Scene("the same ViT-B/16", "position frozen", "vit_b_16", "frozen", "span"),
)


def play_demo(pixels: Tensor, *, label: int = 3, seed: int = 0) -> Iterator[tuple[Scene, Round]]:
    """The three rounds of the demonstration, one after another, in float32 with random weights.

    Parameters
    ----------
    pixels : Tensor of shape (3, S, S), in [0, 1]
    label : int
    seed : int, for the weights

    Yields
    ------
    (Scene, Round)
    """
    for scene in SCENES:
        model = build_model(scene.name, image_size=pixels.shape[-1], position=scene.position, seed=seed)
        yield scene, play_round(model, pixels, label, attack=scene.attack)


def demo_figure(pixels: Tensor, rounds: Sequence[tuple[Scene, Round]]) -> Figure:
    """The original beside what each attack made of the gradient."""
    fig, axes = viz.figure(1, 1 + len(rounds), size=(3.4 * (1 + len(rounds)), 4.9))
    viz.draw(axes[0, 0], pixels)
    _label(axes[0, 0], "private photograph", "never leaves the client", "")
    for ax, (scene, played) in zip(axes[0, 1:], rounds, strict=True):
        viz.draw(ax, played.reconstruction.pixels[0])
        _label(ax, scene.title, f"{scene.model}, {scene.shared}", f"PSNR {played.psnr:.1f} dB")
    fig.supxlabel(demo_caption(pixels), fontsize=14, color="0.25")
    fig.get_layout_engine().set(wspace=0.04)  # type: ignore[union-attr,call-arg]
    return fig


def demo_caption(pixels: Tensor) -> str:
    """What a reader must know about the figure's numbers."""
    size = "×".join(map(str, pixels.shape[-2:]))
    return (
        f"Each made from the model and one client's gradient alone: random weights, float32, one image, {size}.\n"
        f"PSNR against the photograph; above {EXACT_TO_8_BITS_DB:.0f} dB the error is below an 8-bit rounding."
    )


def _label(ax, title: str, subtitle: str, below: str) -> None:  # type: ignore[no-untyped-def]
    ax.set_title(title, fontsize=15.5, fontweight="bold", pad=25)
    ax.text(0.5, 1.03, subtitle, transform=ax.transAxes, ha="center", va="bottom", fontsize=12.5, color="0.25")
    ax.set_xlabel(below, fontsize=17, fontweight="bold", labelpad=8)
