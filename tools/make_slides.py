"""Make slides of a Markdown text and the chapters' figures: one HTML file that needs nothing else.

    python tools/make_slides.py                                   # docs/workshop/half-day.md, to build/half-day.html
    python tools/make_slides.py MY_TEXT.md --out my_slides.html

In the text a line of three dashes ends a slide. ``[figure WHICH](../../notebooks/01_….ipynb)``,
alone in its line, is a figure of that chapter as it is saved there, with its caption and its
alternative text. WHICH is the cell's id, with .2 for its second figure, or words of the caption.
``<!-- … -->`` is a note: the key n shows it. Formulas in dollars are set by matplotlib.
"""

from __future__ import annotations

import argparse
import base64
import functools
import html
import io
import re
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import mistune
import nbformat
from matplotlib import rc_context
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "docs" / "workshop" / "half-day.md"
DECK = ROOT / "docs" / "workshop" / "deck.html"

#: A figure at least so many times as wide as high stands below the words, a narrower
#: one beside them.
WIDE = 1.8
POINTS = 20

_FIGURE = re.compile(r"^\[figure ([^\]]+)\]\(([^)]+\.ipynb)\)$", re.M)
_NOTE = re.compile(r"<!--\s*(.*?)\s*-->", re.S)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+)\$", re.S)
_SAVED = re.compile(r"<figure.*?</figure>", re.S)


class SlideError(RuntimeError):
    """What is wrong with the text, in words: the slide, the figure or formula, and
    what there is instead.
    """


@dataclass(frozen=True)
class Figure:
    """A figure as a chapter has it.

    Attributes
    ----------
    cell : str
        The cell's id; of a cell's second figure with ".2".
    source : str
        The picture, as a data address.
    alt, caption : str
        HTML, as saved.
    """

    cell: str
    source: str
    alt: str
    caption: str

    @property
    def ratio(self) -> float:
        """Width over height."""
        _, _, data = self.source.partition("base64,")
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            return picture.width / picture.height


@functools.cache
def figures_of(path: Path) -> tuple[Figure, ...]:
    """All figures in a notebook's saved outputs, in order."""
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        texts = [output.get("data", {}).get("text/html", "") for output in cell.get("outputs", [])]
        for number, saved in enumerate(_SAVED.findall("".join(texts)), 1):
            source = re.search(r'src="(data:image/png;base64,[^"]+)"', saved)
            alt, caption = (
                re.search(r'alt="([^"]*)"', saved),
                re.search(r"<figcaption[^>]*>(.*?)</figcaption>", saved, re.S),
            )
            if source and alt:
                name = cell.id if number == 1 else f"{cell.id}.{number}"
                found.append(Figure(name, source[1], alt[1], caption[1] if caption else ""))
    return tuple(found)


def figure_named(which: str, path: Path) -> Figure:
    """One figure of a notebook, by its cell's id or by words of its caption.

    Raises
    ------
    SlideError
        If there is none, or more than one; the message lists those of the notebook.
    """
    if not path.exists():
        raise SlideError(f"there is no notebook {path.name} beside {path.parent}")
    known = figures_of(path)
    chosen = [figure for figure in known if figure.cell == which]
    chosen = chosen or [figure for figure in known if which in html.unescape(figure.caption)]
    if len(chosen) != 1:
        listed = "".join(f"\n  {figure.cell}: {html.unescape(figure.caption)[:90]}" for figure in known)
        raise SlideError(f"{path.name} has {len(chosen)} figures {which!r}; it has{listed or ' none'}")
    return chosen[0]


def formula(tex: str, *, displayed: bool) -> str:
    """A formula as a picture, as large as the text around it, with its TeX for who cannot see it.

    Raises
    ------
    SlideError
        If matplotlib cannot set it.
    """
    tex, buffer = tex.strip(), io.BytesIO()
    set_tex = tex.replace(r"\frac", r"\dfrac") if displayed else tex
    try:
        with rc_context({"mathtext.fontset": "stix", "svg.hashsalt": "aprillab"}):
            depth = math_to_image(f"${set_tex}$", buffer, FontProperties(size=POINTS), dpi=72, format="svg")
    except ValueError as error:
        raise SlideError(f"matplotlib cannot set ${tex}$: {str(error).splitlines()[-1]}") from error
    height = float(re.search(rb'height="([\d.]+)pt"', buffer.getvalue())[1])
    style = f"height:{height / POINTS:.3f}em;vertical-align:{-depth / POINTS:.3f}em"
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = ' class="formula"' if displayed else ""
    return f'<img{kind} alt="{html.escape(tex)}" style="{style}" src="data:image/svg+xml;base64,{data}">'


def slide(text: str, number: int, folder: Path) -> str:
    """One slide, and its notes, as HTML."""
    try:
        figures = [figure_named(which, (folder / target).resolve()) for which, target in _FIGURE.findall(text)]
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in _NOTE.findall(text))
        words = _NOTE.sub("", _FIGURE.sub("", text)).strip()
        set_formulas: list[str] = []

        def hide(match: re.Match[str]) -> str:
            set_formulas.append(formula(match[1] or match[2], displayed=match[1] is not None))
            return f"\x02{len(set_formulas) - 1}\x02"

        body = mistune.html(_FORMULA.sub(hide, words))
    except SlideError as error:
        raise SlideError(f"slide {number}: {error}") from error
    body = re.sub("\x02([0-9]+)\x02", lambda match: set_formulas[int(match[1])], body)
    heading, rest = re.match(r"\s*(<h[12]>.*?</h[12]>)?(.*)", body, re.S).groups()
    shown = "".join(
        f'<figure><img alt="{figure.alt}" src="{figure.source}"><figcaption>{figure.caption}</figcaption></figure>'
        for figure in figures
    )
    beside = bool(figures) and bool(rest.strip()) and min(figure.ratio for figure in figures) < WIDE
    kind = "slide first" if (heading or "").startswith("<h1") else "slide"
    return (
        f'<section class="{kind}" aria-roledescription="slide">{heading or ""}'
        f'<div class="body{" beside" if beside else "" if figures else " alone"}">'
        + (f'<div class="words">{rest.strip()}</div>' if rest.strip() else "")
        + (f'<div class="figures">{shown}</div>' if shown else "")
        + f'</div><div class="foot">{number}</div></section>\n'
        + (f'<aside class="notes" data-slide="{number}" aria-label="notes">{notes}</aside>\n' if notes else "")
    )


def slides(text: str, folder: Path) -> str:
    """The whole deck as HTML.

    Parameters
    ----------
    text : str
        Markdown; its links to notebooks are relative to ``folder``.
    folder : Path

    Raises
    ------
    SlideError
        If a figure or formula of it cannot be had.
    """
    pieces = [piece for piece in re.split(r"^---$", text, flags=re.M) if piece.strip()]
    title = re.search(r"^# (.+)$", text, re.M)
    made = "".join(slide(piece, number, folder) for number, piece in enumerate(pieces, 1))
    template = string.Template(DECK.read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title[1] if title else "Slides"), slides=made)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("text", nargs="?", type=Path, default=TEXT, help="default: docs/workshop/half-day.md")
    parser.add_argument("--out", type=Path, help="default: build/NAME.html")
    given = parser.parse_args(arguments)
    out = given.out or ROOT / "build" / f"{given.text.stem}.html"
    try:
        deck = slides(given.text.read_text(encoding="utf-8"), given.text.parent)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(deck, encoding="utf-8")
    except (SlideError, OSError) as error:
        print(f"{given.text}: {error}", file=sys.stderr)
        return 1
    print(f"{deck.count('<section')} slides, {len(deck) / 1e6:.1f} MB: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
