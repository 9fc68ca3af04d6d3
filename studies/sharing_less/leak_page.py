"""The leak map's part of the page, and its figure: from leak_map.csv and features.csv alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from aprillab import viz

from .._rows import made, read
from .._runner import Claim, Description, between
from .._tables import grouped, markdown
from . import features, leak_table
from .features import Found
from .leak_table import LORA, SHARED, Cell

#: Lines of the figure: the page has all.
SHOWN = (
    ("ViT-Ti/16", 224), ("ViT-S/16", 224), ("ViT-B/16", 224), ("ViT-L/16", 224), ("ViT-H/16", 224), ("ViT-L/16", 384),
    ("CLIP L/14", 224), ("DINOv2 B/14", 224), ("SigLIP So400m/14", 224),
)  # fmt: skip
_HEADS = {
    "all": "all", "position embedding withheld": "position\nwithheld", "both embeddings frozen": "embedd.\nfrozen",
    LORA: "LoRA\nq, v, r = 8", "last block and head": "last\nblock", "head only": "head\nonly",
}  # fmt: skip
_PRESENT = 15.0  # dB in float32: below it the picture is there in float64 alone
_ONE, _MORE, _DOUBLE, _NONE = "orange", "yellow", "sky", "white"


def cells_of(folder: Path) -> pd.DataFrame:
    """One row a cell: the counts' verdict, the best run in each precision, and whether any bears it
    out.
    """
    rows = read(folder / "leak_map.csv", Cell)
    return grouped(rows, ["model", "size", "shared"], _cell)


def _cell(group: pd.DataFrame) -> dict[str, Any]:
    first, ran = group.iloc[0], group[group.ran != ""]
    real, tiny = (runs for runs in (ran[ran.geometry == "real"], ran[ran.geometry != "real"]))
    best = {(name, dtype): runs.psnr.max() for name, part in (("real", real), ("tiny", tiny))
            for dtype, runs in part.groupby("dtype")}  # fmt: skip
    return {
        "attack": first.attack, "inequality": first.inequality, "rounds": first.rounds, "silent": first.silent,
        "float32": best.get(("real", "float32")), "float64": best.get(("real", "float64")),
        "less": real.psnr_less.max(),
        "tiny": best.get(("tiny", "float64")), "tiny_less": tiny.psnr_less.max(), "ran": len(ran),
        "agrees": bool(ran.agrees.eq(True).any()),
        "in_float32": bool(ran[ran.dtype == "float32"].agrees.eq(True).any()),
    }  # fmt: skip


def words_of(cell: pd.Series) -> str:
    """A cell of the page's table."""
    if not cell.attack:
        left = "" if pd.isna(cell.float32) else f" ({cell.float32:.0f})"
        return f"no closed form{left}"
    rounds = f"{cell.rounds:.0f} round{'s' * int(cell.rounds > 1)}" + (" after the first" if cell.silent else "")
    if not cell.ran:
        return f"{cell.attack}, {rounds}, not run"
    numbers = [f"{cell.float32:.0f} dB" if pd.notna(cell.float32) else ""]
    numbers += [f"{cell.float64:.0f} in float64" if pd.notna(cell.float64) else ""]
    numbers += [f"{cell.tiny:.0f} in a tiny model" if pd.notna(cell.tiny) else ""]
    return f"{cell.attack}, {rounds}: {', '.join(filter(None, numbers))}"


def table(cells: pd.DataFrame) -> str:
    """All models, a column for each choice of what is shared."""
    lines = []
    for (model, size), group in cells.groupby(["model", "size"], sort=False):
        by = group.set_index("shared")
        lines.append({"model": model, "size": size} | {shared: words_of(by.loc[shared]) for shared in SHARED})
    return markdown(pd.DataFrame(lines))


def disagreements(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells whose runs do not bear the counts out, in float32 or at all."""
    ran = cells[cells.ran > 0]
    return ran[~ran.in_float32]


def disagreement_table(cells: pd.DataFrame) -> str:
    """The same as a table: in exact arithmetic enough, and what precision leaves."""
    found = disagreements(cells)
    columns = ["model", "size", "shared", "rounds", "float32", "float64", "less", "tiny", "tiny_less"]
    frame = found[columns].assign(**{name: found[name].map("{:.0f}".format, "ignore") for name in columns[3:]})
    frame["confirmed"] = found.agrees.map({True: "in float64", False: "no"})
    return markdown(frame.rename(columns={"less": "with a round less", "tiny_less": "tiny, a round less"}))


def features_table(folder: Path) -> str:
    """What head and last block gave away, a line for each model."""
    return markdown(grouped(read(folder / "features.csv", Found), ["model"], _features))


def _features(group: pd.DataFrame) -> dict[str, Any]:
    return {
        "victims": len(group), "features, relative error": f"{group.relative.max():.0e}",
        "least cosine": f"{group.cosine.min():.7f}", "right of 16": f"{group.nearest.sum()}",
        "second best over best, least": f"{group.margin.min():.0e}",
        "right of 16 blurred": f"{group.nearest_changed.sum()}",
        "span of the last attention": f"{group.directions.max()} directions of {group.tokens.max()} tokens",
        "right by the span": f"{group.of_span.sum()}",
        "outside, victim at most": f"{group.inside.max():.0e}",
        "outside, others at least": f"{group.outside.min():.2f}",
    }  # fmt: skip


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Fill leak_map.csv and features.csv."""
    leak_table.measure(folder, options)
    features.measure(folder, options)


def describe(folder: Path, options: argparse.Namespace) -> Description:
    """This part's fields and claims."""
    return fields(folder), claims(folder, PHRASES)


#: What the page says, and which fact must bear it out.
PHRASES = {
    "every count is confirmed": "Every cell was run, and every count is borne out in one of the two precisions",
    "one round holds in float32": "where one round is enough, it is enough in float32",
    "nothing is left where none applies": "refuses, and its best picture has {map_left} dB at most",
    "features are exact": "come out of it to float32's last digits",
    "the head picks the victim": "picks the right one of sixteen photographs",
    "the span picks the victim": "The last attention's span does too",
}


def fields(folder: Path) -> dict[str, Any]:
    """For the template, all under names that begin with ``map_``."""
    cells = cells_of(folder)
    ran = cells[cells.ran > 0]
    closed = ran[ran.attack != ""]
    return {
        "map_made": made(folder / "leak_map.csv"), "map_table": table(cells), "map_models": len(cells) // len(SHARED),
        "map_cells": len(cells), "map_ran": len(ran), "map_agree": int(ran.agrees.sum()),
        "map_closed": len(closed), "map_closed_float32": int(closed.in_float32.sum()),
        "map_refused": int((ran.attack == "").sum()), "map_left": f"{ran[ran.attack == ''].float32.max():.0f}",
        "map_disagreements": disagreement_table(cells), "map_features": features_table(folder),
        "map_pending": int((cells.ran == 0).sum()),
    }  # fmt: skip


def claims(folder: Path, phrases: dict[str, str]) -> Sequence[Claim]:
    """What can be said of the map, under names for the page's own phrases."""
    cells, found = cells_of(folder), read(folder / "features.csv", Found)
    ran = cells[cells.ran > 0]
    one = ran[ran.rounds == 1]
    facts = {
        "every count is confirmed": between("", float(ran.agrees.mean()), least=0.999),
        "one round holds in float32": between("", float(one.in_float32.mean()), least=0.999),
        "nothing is left where none applies": between("", float(ran[ran.attack == ""].float32.max()), most=22.0),
        "features are exact": between("", float(found.relative.max()), most=1e-4),
        "the head picks the victim": between("", float(found.nearest.mean()), least=0.999),
        "the span picks the victim": between("", float(found.of_span.mean()), least=0.999),
    }
    return [facts[name]._replace(phrase=phrase) for name, phrase in phrases.items()]


# --- The figure ---------------------------------------------------------------------------------------------------


def figure(cells: pd.DataFrame, shown: Sequence[tuple[str, int]] = SHOWN) -> Figure:
    """Models in lines, what is shared in columns; a colour, a hatching and two words a cell."""
    by = cells.set_index(["model", "size", "shared"])
    lines = [line for line in shown if line in {index[:2] for index in by.index}]
    fig, axes = viz.figure(1, 1, size=(13.0, 1.02 * len(lines) + 3.0))
    ax: Axes = axes[0, 0]
    for y, (model, size) in enumerate(lines):
        for x, shared in enumerate(_HEADS):
            colour, hatch, text = look(by.loc[(model, size, shared)])
            face = "white" if colour == "white" else viz.COLOURS[colour]
            ax.add_patch(Rectangle((x, y), 1, 1, facecolor=face, hatch=hatch, edgecolor="0.55", linewidth=1))
            box = {"facecolor": face, "edgecolor": "none", "pad": 1.5}
            ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=17, bbox=box if hatch else None)
    ax.set(xlim=(0, len(_HEADS)), ylim=(len(lines), 0), yticks=[y + 0.5 for y in range(len(lines))])
    ax.set_yticklabels([f"{model}\nat {size}" for model, size in lines], fontsize=17)
    ax.set_xticks([x + 0.5 for x in range(len(_HEADS))], list(_HEADS.values()), fontsize=17)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    keys = [
        Rectangle((0, 0), 1, 1, facecolor=viz.COLOURS[_ONE], edgecolor="0.55", label="closed form, one round"),
        Rectangle((0, 0), 1, 1, facecolor=viz.COLOURS[_MORE], edgecolor="0.55", hatch="//", label="several rounds"),
        Rectangle((0, 0), 1, 1, facecolor=viz.COLOURS[_DOUBLE], edgecolor="0.55", hatch="..",
                  label="several, sharp in float64 alone"),
        Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="0.55", label="– no closed form; label, features leak"),
    ]  # fmt: skip
    fig.legend(handles=keys, loc="outside lower center", ncols=2, fontsize=17, frameon=False, handlelength=1.6)
    return fig


def look(cell: pd.Series) -> tuple[str, str, str]:
    """Colour, hatching and words of a cell."""
    if not cell.attack:
        return _NONE, "", "–"
    if cell.rounds == 1:
        return _ONE, "", f"{cell.float32:.0f} dB"
    rounds = f"{cell.rounds + cell.silent:.0f} rounds"
    if not cell.ran:
        return _MORE, "//", f"{rounds}\ncounted"
    if cell.in_float32:
        return _MORE, "//", f"{rounds}\n{cell.float32:.0f} dB"
    double = max(value for value in (cell.float64, cell.tiny) if pd.notna(value))
    return _DOUBLE, "..", f"{rounds}\n{double:.0f} dB"


def draw(folder: Path) -> dict[str, bytes]:
    """The figure as a PNG, by its name."""
    return {"leak_map.png": viz.to_png(figure(cells_of(folder)), dpi=90)}
