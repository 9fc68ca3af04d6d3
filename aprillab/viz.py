"""Figures for the course: one style, a caption and alternative text on each. Knows tensors only.

``show(figure, caption=…, alt=…)`` puts a figure into a notebook as a picture that a screen reader
can read, in JupyterLab, on Colab and in what nbconvert makes of it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

#: Okabe and Ito's palette, told apart with any kind of colour vision.
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}

#: How a caption looks beneath its figure, by day and by night: smaller and paler than the text.
CAPTION_STYLE = (
    "font-size:0.88em;line-height:1.4;opacity:0.75;max-width:46em;margin:0.3em 0 0.9em 0;padding-left:0.4em"
)

#: Matplotlib settings of the course's figures; used through ``plt.rc_context``, never set globally.
STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
    "figure.dpi": 100,
    "axes.prop_cycle": plt.cycler(color=list(COLOURS.values())),
}


def figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float] | None = None) -> tuple[Figure, np.ndarray]:
    """A figure in the course's style, outside pyplot's list of open figures.

    Parameters
    ----------
    rows, columns : int
    size : (width, height) in inches; default 3.2 × 3.0 a panel

    Returns
    -------
    (Figure, array of Axes of shape (rows, columns))

    Examples
    --------
    >>> from aprillab import viz
    >>> fig, axes = viz.figure(2, 3)
    >>> axes.shape, float(fig.get_figheight())
    ((2, 3), 6.0)
    """
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        fig = Figure(figsize=size or (3.2 * columns, 3.0 * rows), layout="constrained")
        axes = fig.subplots(rows, columns, squeeze=False)
    return fig, axes


def draw(ax: Axes, pixels: Tensor, title: str = "") -> None:
    """Draw one picture (C, H, W) with pixels in [0, 1], clamped, without axes.

    Examples
    --------
    >>> import aprillab as al
    >>> from aprillab import viz
    >>> fig, axes = viz.figure()
    >>> viz.draw(axes[0, 0], al.load_victim("coffee", 32))
    >>> axes[0, 0].images[0].get_array().shape
    (32, 32, 3)
    """
    picture = pixels.detach().double().clamp(0, 1).cpu()
    if picture.shape[0] == 1:
        ax.imshow(picture[0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        ax.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_title(title)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def picture_grid(
    rows: Mapping[str, Sequence[Tensor]], *, titles: Sequence[Sequence[str]] | None = None, panel: float = 2.0
) -> Figure:
    """Pictures in labelled rows: originals above, what attacks made of them below.

    Parameters
    ----------
    rows : row label to pictures (C, H, W), pixels in [0, 1]; all rows equally long
    titles : a title for each picture, row by row, optional ("54.4 dB", say)
    panel : side of a picture in inches

    Returns
    -------
    Figure

    Examples
    --------
    >>> import aprillab as al
    >>> from aprillab import viz
    >>> pictures, _ = al.load_victims(["coffee", "rocket"], 32)
    >>> len(viz.picture_grid({"private": pictures, "recovered": pictures}).axes)
    4
    """
    columns = max(len(pictures) for pictures in rows.values())
    fig, axes = figure(len(rows), columns, size=(panel * columns + 0.4, (panel + 0.25) * len(rows)))
    for i, (label, pictures) in enumerate(rows.items()):
        for j, picture in enumerate(pictures):
            draw(axes[i, j], picture, titles[i][j] if titles else "")
        for j in range(len(pictures), columns):
            axes[i, j].axis("off")
        axes[i, 0].set_ylabel(label)
    return fig


def before_after(
    original: Tensor, reconstruction: Tensor, *, title: str = "reconstruction", scale: float = 20.0
) -> Figure:
    """Original, reconstruction and their difference, magnified ``scale`` times around grey; each
    (C, H, W).

    Examples
    --------
    >>> import aprillab as al
    >>> from aprillab import viz
    >>> picture = al.load_victim("coffee", 32)
    >>> [ax.get_title() for ax in viz.before_after(picture, picture, title="PSNR 91 dB").axes]
    ['private image', 'PSNR 91 dB', 'difference × 20']
    """
    difference = 0.5 + scale * (reconstruction.double().cpu() - original.double().cpu())
    fig, axes = figure(1, 3, size=(7.4, 2.8))
    draw(axes[0, 0], original, "private image")
    draw(axes[0, 1], reconstruction, title)
    draw(axes[0, 2], difference, f"difference × {scale:g}")
    return fig


def flow(ax: Axes, boxes: Mapping[str, tuple[float, float, float, str]], arrows: Sequence[tuple[str, str]]) -> None:
    """Draw boxes with their texts, and arrows from the right edge of one to the left edge of
    another.

    Parameters
    ----------
    ax : Axes; its limits are set around the boxes
    boxes : text to (x, y, width, colour), the centre and the width
    arrows : pairs of texts

    Examples
    --------
    >>> from aprillab import viz
    >>> fig, axes = viz.figure()
    >>> viz.flow(axes[0, 0], {"client": (0, 0, 1, "white"), "server": (2, 0, 1, "white")}, [("client", "server")])
    >>> [text.get_text() for text in axes[0, 0].texts if text.get_text()]
    ['client', 'server']
    """
    for text, (x, y, width, colour) in boxes.items():
        corner = (x - width / 2, y - 0.2)
        ax.add_patch(FancyBboxPatch(corner, width, 0.4, fc=colour, ec="black", boxstyle="round,pad=0.03"))
        ax.text(x, y, text, ha="center", va="center")
    left, right = ({text: (x + side * (w / 2 + 0.04), y) for text, (x, y, w, _) in boxes.items()} for side in (-1, 1))
    style = {"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0}
    for start, end in arrows:
        ax.annotate("", left[end], right[start], arrowprops=style)
    ends = np.array([*left.values(), *right.values()])
    ax.set(
        xlim=(ends[:, 0].min() - 0.1, ends[:, 0].max() + 0.1), ylim=(ends[:, 1].min() - 0.4, ends[:, 1].max() + 0.4)
    )
    ax.axis("off")


def to_png(fig: Figure, dpi: int = 100) -> bytes:
    """The figure as PNG.

    Examples
    --------
    >>> from aprillab import viz
    >>> viz.to_png(viz.figure()[0])[1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def captioned(png: bytes, *, caption: str, alt: str) -> dict[str, str]:
    """A MIME bundle: HTML with caption and alternative text, and the bare picture for readers
    without HTML.

    Examples
    --------
    >>> from aprillab import viz
    >>> viz.captioned(b"", caption="Coffee at 91 dB", alt="a cup of coffee")["text/plain"]
    'Coffee at 91 dB [a cup of coffee]'
    """
    data = base64.b64encode(png).decode("ascii")
    markup = (
        f'<figure style="margin:0"><img alt="{html.escape(alt, quote=True)}" '
        f'style="max-width:100%;height:auto" src="data:image/png;base64,{data}">'
        f'<figcaption style="{CAPTION_STYLE}">{html.escape(caption)}</figcaption></figure>'
    )
    return {"text/html": markup, "text/plain": f"{caption} [{alt}]"}


def show(fig: Figure, *, caption: str, alt: str, dpi: int = 100) -> None:
    """Display a figure in a notebook with its caption and alternative text.

    Parameters
    ----------
    fig : Figure
    caption : str
        What the reader should see in it; names data set, dtype and weights where there is a number.
    alt : str
        What somebody who cannot see it needs to know.
    dpi : int

    Raises
    ------
    ValueError
        If the caption or the alternative text is empty.
    """
    if not caption.strip() or not alt.strip():
        raise ValueError("a figure needs a caption and an alternative text")
    from IPython.display import display

    display(captioned(to_png(fig, dpi), caption=caption, alt=alt), raw=True)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[float, float] = (5.5, 3.2),
) -> Figure:
    """Labelled curves with markers that differ in shape as well as in colour.

    Parameters
    ----------
    series : label to (x values, y values)
    x, y : axis labels, with units
    log_x, log_y : bool
    size : inches

    Examples
    --------
    >>> from aprillab import viz
    >>> drawn = viz.curves({"april": ([1, 2], [30, 43])}, x="evaluations", y="PSNR in dB")
    >>> drawn.axes[0].lines[0].get_ydata().tolist()
    [30, 43]
    """
    fig, axes = figure(size=size)
    ax = axes[0, 0]
    for (label, (xs, ys)), marker, colour in zip(
        series.items(), "osD^vPX*" * 4, [*COLOURS.values()] * 4, strict=False
    ):
        ax.plot(xs, ys, marker=marker, markersize=4, color=colour, label=label)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if log_x:
        ax.set_xscale("log")
    if log_y:
        ax.set_yscale("log")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return fig


def singular_values(matrices: Mapping[str, Tensor], *, mark: Mapping[str, int] | None = None) -> Figure:
    """Singular values of matrices on a logarithmic scale, each relative to its largest; ``mark``
    draws ranks.

    Examples
    --------
    >>> import torch
    >>> from aprillab import viz
    >>> drawn = viz.singular_values({"S": torch.diag(torch.tensor([4.0, 2.0, 1.0]))})
    >>> drawn.axes[0].lines[0].get_ydata().tolist()
    [1.0, 0.5, 0.25]
    """
    series = {}
    for label, matrix in matrices.items():
        s = torch.linalg.svdvals(matrix.detach().double().cpu())
        series[label] = (list(range(1, len(s) + 1)), (s / s[0]).clamp_min(1e-20).tolist())
    fig = curves(series, x="index", y="singular value / largest", log_y=True)
    for line in fig.axes[0].lines:
        line.set_marker("")
    for label, rank in (mark or {}).items():
        fig.axes[0].axvline(rank, color="0.5", linestyle=":")
        fig.axes[0].annotate(label, (rank, 1), textcoords="offset points", xytext=(4, -10), color="0.3")
    return fig
