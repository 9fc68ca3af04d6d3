"""``aprillab demo``: one photograph, three attacks, a table and a figure."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .. import viz
from ..attacks.catalogue import ATTACKS
from ..metrics import EXACT_TO_8_BITS_DB
from ..zoo import Position, build_model
from .files import photograph, writable_file, write
from .messages import RESPONSIBLE_USE
from .round import Played, play_round


def run(arguments: argparse.Namespace) -> int:
    """Play the three rounds, print a line for each as it ends, and write the figure."""
    out = writable_file(arguments.out, ".png")
    start = time.perf_counter()
    pixels = photograph(arguments.photo, 224)
    print(f"One photograph ({arguments.photo}), three updates, and what a server makes of each.\n")
    print(_LINE.format("attack", "model", "client shares", "PSNR dB", "SSIM", "attack s", "gradient s", "exact"))
    print(_LINE.format("-" * 23, "-" * 22, "-" * 17, "-" * 7, "-" * 7, "-" * 9, "-" * 12, "-" * 5))
    rounds = []
    for scene, played in play_demo(pixels):
        rounds.append((scene, played))
        print(_table_line(scene, played), flush=True)
    print(f"\n{demo_caption(pixels)}")
    print(
        "exact: the update shows the attack's conditions, the error predicted is below half a grey level, and the "
        "picture,\nplayed back through the model, gives the update. The replay is not in the attack's seconds."
    )
    print(
        "gradient s: the client's forward and backward pass, after one forward pass to warm up; attack s: from the "
        "shared gradient\nto the picture. Building the models and drawing are not timed."
    )
    wrote = write(out, viz.to_png(demo_figure(pixels, rounds)))
    print(f"\nwrote {wrote} ({time.perf_counter() - start:.0f} s in all)\n\n{RESPONSIBLE_USE}")
    return 0


_LINE = "{:<23} {:<22} {:<17} {:>7} {:>7} {:>9} {:>12}  {}"


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


def play_demo(pixels: Tensor, *, label: int = 3, seed: int = 0) -> Iterator[tuple[Scene, Played]]:
    """The three rounds of the demonstration, one after another, in float32 with random weights.

    Parameters
    ----------
    pixels : Tensor of shape (3, S, S), in [0, 1]
    label : int
    seed : int, for the weights

    Yields
    ------
    (Scene, Played)
    """
    for scene in SCENES:
        model = build_model(scene.name, image_size=pixels.shape[-1], position=scene.position, seed=seed)
        yield scene, play_round(model, pixels, label, attack=scene.attack)


def demo_figure(pixels: Tensor, rounds: Sequence[tuple[Scene, Played]]) -> Figure:
    """The original beside what each attack made of the gradient."""
    fig, axes = viz.figure(1, 1 + len(rounds), size=(3.4 * (1 + len(rounds)), 4.9))
    viz.draw(axes[0, 0], pixels)
    _write_around(axes[0, 0], "private photograph", "never leaves the client", "")
    for ax, (scene, played) in zip(axes[0, 1:], rounds, strict=True):
        viz.draw(ax, played.reconstruction.pixels[0])
        _write_around(ax, scene.title, f"{scene.model}, {scene.shared}", f"PSNR {played.psnr:.1f} dB")
    fig.supxlabel(demo_caption(pixels), fontsize=14, color="0.25")
    fig.get_layout_engine().set(wspace=0.04)  # type: ignore[union-attr,call-arg]
    return fig


def demo_caption(pixels: Tensor) -> str:
    """What a reader must know about the figure's numbers.

    Examples
    --------
    >>> import torch
    >>> print(demo_caption(torch.zeros(3, 224, 224)).splitlines()[0])
    Each made from the model and one client's gradient alone: random weights, float32, one image, 224×224.
    """
    size = "×".join(map(str, pixels.shape[-2:]))
    return (
        f"Each made from the model and one client's gradient alone: random weights, float32, one image, {size}.\n"
        f"PSNR against the photograph; above {EXACT_TO_8_BITS_DB:.0f} dB the error is below an 8-bit rounding."
    )


def _write_around(ax: Axes, title: str, subtitle: str, below: str) -> None:
    ax.set_title(title, fontsize=15.5, fontweight="bold", pad=25)
    ax.text(0.5, 1.03, subtitle, transform=ax.transAxes, ha="center", va="bottom", fontsize=12.5, color="0.25")
    ax.set_xlabel(below, fontsize=17, fontweight="bold", labelpad=8)


def _table_line(scene: Scene, played: Played) -> str:
    found = played.reconstruction
    return _LINE.format(
        scene.title,
        scene.model,
        "all gradients" if scene.position == "learned" else "all but position",
        f"{played.psnr:.1f}",
        f"{played.ssim:.4f}",
        f"{found.seconds:.2f}",
        f"{played.gradient_seconds:.2f}",
        "yes" if found.exact else "no",
    )
