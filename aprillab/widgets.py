"""Drawings and interactive figures of the course.

What is drawn comes from pure functions that return a Figure, tested without a kernel;
:func:`sliders` is the only place that knows ipywidgets, which comes with ``aprillab[course]`` and
is imported when it is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from . import viz
from .preprocessing import HALF, Preprocessing

Words = str | Callable[..., str]

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
#: What the stored frame of an interactive figure says beneath its caption.
STILL = "(A still picture: its controls appear when the cell is run.)"


def sliders(
    render: Callable[..., Figure], *, caption: Words, alt: Words, below: Sequence[Any] = (), **controls: Any
) -> Any:
    """A figure under its controls, drawn again whenever one of them moves.

    A stored notebook, which holds no widgets, keeps the first state as a still picture.

    Parameters
    ----------
    render : function of the controls' values, by name, that returns a Figure
    caption, alt : str, or functions of the same values that return one
        As for :func:`aprillab.viz.show`: a picture that changes needs words that change with it.
    below : ipywidgets widgets that stand under the figure
    **controls : ipywidgets widgets, by the name of ``render``'s argument
        Sliders should be made with ``continuous_update=False``.

    Returns
    -------
    ipywidgets.VBox
    """
    import ipywidgets

    first = {name: control.value for name, control in controls.items()}

    def words(state: Mapping[str, Any]) -> dict[str, str]:
        texts = {"caption": caption, "alt": alt}
        return {name: text(**state) if callable(text) else text for name, text in texts.items()}

    def redraw(**state: Any) -> None:
        said = words(state)
        viz.show(render(**state), caption=said["caption"], alt=said["alt"])

    def still() -> dict[str, str]:
        said = words(first)
        return viz.captioned(viz.to_png(render(**first)), caption=f"{said['caption']} {STILL}", alt=said["alt"])

    figure = ipywidgets.interactive_output(redraw, controls)
    return with_still(ipywidgets.VBox([*controls.values(), figure, *below]), still)


def with_still(box: Any, still: Callable[[], dict[str, str]]) -> Any:
    """A widget that leaves a picture where a notebook is stored; with a kernel it moves as before.

    Parameters
    ----------
    box : ipywidgets widget
        Changed in place, and returned.
    still : function without arguments that returns a MIME bundle
        As :func:`aprillab.viz.captioned` makes one; called each time the widget is displayed.

    Returns
    -------
    the widget
    """

    def bundle(include: Any = None, exclude: Any = None) -> dict[str, Any]:
        view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
        # Colab is not asked to choose between the two: it gets the one that moves.
        stored = {} if "google.colab" in sys.modules else still()
        return {"text/plain": "controls and a figure", **stored, WIDGET_VIEW: view}

    box._ipython_display_ = None  # ipywidgets 7 displays by this, ipywidgets 8 by the other
    box._repr_mimebundle_ = bundle
    return box


# --- Chapter 01 -----------------------------------------------------------------------------------------------


def federated_round(pictures: Sequence[Tensor] = (), seen: Sequence[Tensor] = ()) -> Figure:
    """One round of FedSGD as a drawing: weights go out, gradients come back, photographs stay.

    Parameters
    ----------
    pictures : up to three private pictures (C, H, W) with pixels in [0, 1], drawn inside the clients
    seen : what the server made of the gradients, up to three pictures, drawn below it

    Examples
    --------
    >>> len(federated_round().axes)
    1
    """
    blue, orange = viz.COLOURS["blue"], viz.COLOURS["red"]
    fig, axes = viz.figure(size=(8.4, 4.2))
    ax = axes[0, 0]
    ax.set(xlim=(0, 12), ylim=(0, 6), aspect="equal")
    ax.axis("off")

    def box(x: float, y: float, width: float, height: float, colour: str) -> None:
        style = "round,pad=0.05,rounding_size=0.15"
        ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor="white", edgecolor=colour, lw=2))

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=colour, lw=1.8))

    box(0.2, 1.4, 3.4, 3.2, blue)
    ax.text(1.9, 4.1, "server", ha="center", fontsize=13, weight="bold", color=blue)
    ax.text(1.9, 3.2, "knows the model\nand every gradient\nas it arrives", ha="center", va="center", fontsize=10.5)
    ax.text(1.9, 1.95, r"3   $\theta \leftarrow \theta - \eta\,\frac{1}{K}\sum_k g_k$", ha="center", fontsize=11)
    for k, bottom in enumerate((4.15, 2.15, 0.15)):
        middle = bottom + 0.8
        box(8.2, bottom, 3.6, 1.6, orange)
        ax.text(9.95, middle, f"client {k + 1}\nphotograph\nstays here", va="center", fontsize=10)
        arrow((3.75, 3.15 + 0.45 * (1 - k)), (8.05, middle + 0.2), blue)
        arrow((8.05, middle - 0.25), (3.75, 2.75 + 0.45 * (1 - k)), orange)
        if k < len(pictures):
            inset = ax.inset_axes((8.35, bottom + 0.15, 1.3, 1.3), transform=ax.transData)
            viz.draw(inset, pictures[k])
    if len(seen):
        ax.text(1.9, 1.12, "what it makes of the gradients", ha="center", fontsize=9.5)
    for k, picture in enumerate(seen):
        viz.draw(ax.inset_axes((0.2 + 1.2 * k, 0.05, 1.0, 1.0), transform=ax.transData), picture)
    ax.text(5.1, 5.05, r"1   weights $\theta$", color=blue, fontsize=11, ha="center")
    ax.text(5.1, 0.75, r"2   gradient $g_k$", color=orange, fontsize=11, ha="center")
    return fig


def rank_one(delta: Tensor, x: Tensor) -> Figure:
    """The gradient δ xᵀ of a linear layer as a colour map, with δ beside it and x above it.

    Red is below zero and blue above, each part on a scale of its own; small ones carry their
    numbers.

    Parameters
    ----------
    delta : Tensor of shape (m,), ∂l/∂y of the layer's outputs, which is ∂l/∂b
    x : Tensor of shape (k,), the layer's input

    Examples
    --------
    >>> import torch
    >>> fig = rank_one(torch.tensor([2.0, -1.0]), torch.tensor([2.0, -1.0, 3.0]))
    >>> fig.axes[3].images[0].get_array().tolist()
    [[4.0, -2.0, 6.0], [-2.0, 1.0, -3.0]]
    """
    delta, x = delta.detach().double().cpu(), x.detach().double().cpu()
    parts = {"": None, "x": x[None], "δ = ∂l/∂b": delta[:, None], "∂l/∂W = δ xᵀ": torch.outer(delta, x)}
    fig, axes = viz.figure(2, 2, size=(6.6, 3.4))
    grid, written = axes[0, 0].get_gridspec(), len(delta) * len(x) <= 24
    grid.set_width_ratios([1, max(3, min(len(x), 12))])
    grid.set_height_ratios([1, max(2, min(len(delta), 6))])
    for ax, (name, part) in zip(axes.flat, parts.items(), strict=True):
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        if part is not None:
            span = float(part.abs().max())
            ax.imshow(part.numpy(), cmap="RdBu", vmin=-span, vmax=span, aspect="auto", interpolation="nearest")
            ax.set_title(name)
            for (j, i), value in np.ndenumerate(part.numpy()) if written else ():
                ax.text(
                    i,
                    j,
                    f"{value:g}",
                    ha="center",
                    va="center",
                    color="white" if abs(value) > 0.6 * span else "black",
                )
    return fig


def mixture_weights(image: Tensor, pictures: Tensor) -> Tensor:
    """The w that minimize ‖image − Σ_b w_b picture_b‖: how much of each private picture an attack's
    picture holds.

    Parameters
    ----------
    image : Tensor of shape (C, H, W)
    pictures : Tensor of shape (B, C, H, W), linearly independent

    Returns
    -------
    Tensor of shape (B,), float64; needs the originals, so it explains an attack and is not one

    Examples
    --------
    >>> import aprillab as al
    >>> pictures, _ = al.load_victims(["coffee", "rocket"], 32)
    >>> [round(weight, 3) for weight in mixture_weights(0.75 * pictures[0] + 0.25 * pictures[1], pictures).tolist()]
    [0.75, 0.25]
    """
    columns = pictures.double().flatten(1).T
    return torch.linalg.lstsq(columns, image.double().flatten()[:, None]).solution[:, 0]


def batch_strip(
    pictures: Tensor,
    gradients: Mapping[int, tuple[Tensor, Tensor]],
    names: Sequence[str],
    *,
    preprocessing: Preprocessing = HALF,
) -> Figure:
    """What the loudest unit says about batches of growing size: the pictures, the mixtures, their
    shares.

    Parameters
    ----------
    pictures : Tensor of shape (B_max, C, H, W), pixels in [0, 1]
    gradients : batch size to (∂l/∂W, ∂l/∂b), as for :func:`linear_batch`
    names : of the pictures
    preprocessing : of the layer's input
    """
    fig, axes = viz.figure(3, len(gradients), size=(2.1 * len(gradients) + 0.6, 6.2))
    axes[0, 0].get_gridspec().set_height_ratios([3, 3, 1.6])
    colours = [viz.COLOURS[name] for name in ("blue", "orange", "green", "red")]
    for column, (size, (weight, bias)) in enumerate(gradients.items()):
        unit = int(bias.abs().argmax())
        mixture = preprocessing.to_pixels((weight[unit] / bias[unit]).reshape(pictures.shape[1:]), clamp=False)
        shares = mixture_weights(mixture, pictures[:size]).tolist()
        viz.draw(axes[0, column], pictures[column], f"{column + 1}: {names[column]}")
        viz.draw(axes[1, column], mixture, f"batch of {size}")
        ax = axes[2, column]
        ax.bar(range(1, size + 1), shares, color=colours[:size], width=0.6)
        for b, share in enumerate(shares, start=1):
            label = f"{round(share, 2) + 0.0:.2f}"
            ax.annotate(label, (b, max(share, 0)), textcoords="offset points", xytext=(0, 2), ha="center", fontsize=9)
        ax.set(xlim=(0.4, len(pictures) + 0.6), ylim=(min(0, *shares) - 0.05, 1.3), yticks=[])
        ax.set_xticks(range(1, len(pictures) + 1))
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.axhline(0, color="0.4", linewidth=0.8)
    for row, label in enumerate(("private", "loudest unit", "shares")):
        axes[row, 0].set_ylabel(label)
    return fig


def linear_batch(
    pictures: Tensor,
    gradients: Mapping[int, tuple[Tensor, Tensor]],
    *,
    batch_size: int,
    rank: int = 0,
    preprocessing: Preprocessing = HALF,
) -> Figure:
    """What one unit of a linear layer says about a batch: its row divided by its bias entry, and
    what that mixes.

    Parameters
    ----------
    pictures : Tensor of shape (B_max, C, H, W), pixels in [0, 1]
    gradients : batch size to (∂l/∂W of shape (m, C·H·W), ∂l/∂b of shape (m,)) of the first ``batch_size`` pictures
    batch_size : int, one of the keys
    rank : int
        Which unit, counted from the one with the largest |∂l/∂b|.
    preprocessing : of the layer's input

    Raises
    ------
    ValueError
        If that unit's bias gradient is zero: it was inactive for the whole batch and has no ratio.
    """
    weight, bias = gradients[batch_size]
    unit = int(bias.abs().argsort(descending=True)[rank])
    if bias[unit] == 0:
        raise ValueError(f"rank={rank}: unit {unit} has a zero bias gradient, so its row holds no picture")
    ratio = preprocessing.to_pixels((weight[unit] / bias[unit]).reshape(pictures.shape[1:]), clamp=False)
    weights = mixture_weights(ratio, pictures[:batch_size]).tolist()
    fig, axes = viz.figure(1, 2, size=(6.6, 3.0))
    viz.draw(axes[0, 0], ratio, f"batch of {batch_size}, unit {unit}")
    ax = axes[0, 1]
    ax.bar(range(1, batch_size + 1), weights, color=viz.COLOURS["blue"], width=0.6)
    for b, value in enumerate(weights, start=1):
        ax.annotate(
            f"{round(value, 2) + 0.0:.2f}", (b, max(value, 0)), textcoords="offset points", xytext=(0, 3), ha="center"
        )
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.set(xlim=(0.3, len(pictures) + 0.7), ylim=(min(0, *weights, 0) - 0.1, max(1, *weights, 1) + 0.2))
    ax.set_xticks(range(1, len(pictures) + 1))
    ax.set_xlabel("private image")
    ax.set_ylabel("its share in the mixture")
    ax.spines[["top", "right"]].set_visible(False)
    return fig
