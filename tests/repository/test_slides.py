"""The half day's slides: made of the text and the chapters' figures, one file, and nothing
runs out of a slide.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import make_slides
import nbformat
import notebook_tools as tools
import pytest
from chromium import CHROMIUM, SWITCHES, needs_chromium
from nbformat.v4 import new_code_cell, new_notebook, new_output

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def figure(alt: str, caption: str) -> str:
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{PIXEL}"><figcaption>{caption}</figcaption></figure>'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a notebook of one cell that shows two figures."""
    shown = [figure("A cat.", "The client&#x27;s cat."), figure("A dog.", "The dog.")]
    outputs = [new_output("display_data", {"text/html": text}) for text in shown]
    cell = new_code_cell("show()", outputs=outputs, id="c1")
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "01_a.ipynb")
    return tmp_path


@pytest.fixture(scope="module")
def deck(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slides") / "half-day.html"
    assert make_slides.main(["--out", str(out)]) == 0
    return out


def test_figures_keep_their_captions_and_alternative_texts(deck: Path) -> None:
    page = deck.read_text(encoding="utf-8")
    text = make_slides.TEXT.read_text(encoding="utf-8")
    named = re.findall(r"^\[figure ([^\]]+)\]\(([^)]+)\)$", text, re.M)
    assert len(named) >= 10
    for which, target in named:
        found = make_slides.figure_named(which, (make_slides.TEXT.parent / target).resolve())
        assert f'<img alt="{found.alt}" src="{found.source}"><figcaption>{found.caption}</figcaption>' in page
        assert len(html.unescape(found.alt)) > 20
        assert found.caption
    assert not re.findall(r"<img(?![^>]*\balt=\"[^\"]+\")[^>]*>", page)


def test_exercises_are_called_what_the_chapters_call_them() -> None:
    named = re.findall(r"Exercise (\d+)\.(\d+), \*(.+?)\*", make_slides.TEXT.read_text(encoding="utf-8"))
    assert len(named) >= 3
    for chapter, number, title in named:
        cells = tools.read(chapter.zfill(2)).cells
        assert any(f"### Exercise {chapter}.{number} · {title} · " in cell.source for cell in cells), title


def test_what_teachers_are_told_to_expect_is_what_the_chapters_print() -> None:
    page = (tools.ROOT / "docs/teaching.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+–\d+ \| (.*?) \|", page, re.M)
    quoted = 0
    chapter = "00"
    for expected in rows:
        if found := re.search(r"chapter (\d\d)", expected):
            chapter = found[1]
        printed = "".join(
            output.get("text", "") for cell in tools.read(chapter).cells for output in cell.get("outputs", [])
        )
        for words in re.findall(r'"([^"]+)"', expected):
            assert words in printed, f"chapter {chapter} prints no {words!r}"
            quoted += 1
    assert quoted >= 6


def test_it_needs_nothing_else(deck: Path) -> None:
    page = deck.read_text(encoding="utf-8")
    assert not re.findall(r"<link|@import|<script src|(?:src|href)=\"(?!data:)", page)
    assert "$" not in re.sub(
        r"<script>.*?</script>", "", page, flags=re.S
    )  # neither a formula nor a place left unset


def test_a_figure_is_named_by_its_cell_or_its_caption(folder: Path) -> None:
    path = folder / "01_a.ipynb"
    assert make_slides.figure_named("c1", path).alt == "A cat."
    assert make_slides.figure_named("c1.2", path).alt == "A dog."
    assert make_slides.figure_named("client's cat", path).alt == "A cat."
    with pytest.raises(
        make_slides.SlideError, match=r"01_a\.ipynb has 0 figures 'gone'; it has\n  c1: The client's cat"
    ):
        make_slides.figure_named("gone", path)
    with pytest.raises(make_slides.SlideError, match="has 2 figures 'The '"):
        make_slides.figure_named("The ", path)


def test_a_slide_is_words_figures_formulas_and_notes(folder: Path) -> None:
    text = (
        "## One\n\nWords and $x < 1$.\n\n[figure c1](01_a.ipynb)\n\n<!-- Ask <them>. -->\n---\n\n$$\\frac{a}{b}$$\n"
    )
    page = make_slides.slides(text, folder)
    assert page.count("<section") == 2
    first = re.search(r"<section.*?</section>", page, re.S)[0]
    assert "<h2>One</h2>" in first
    assert 'alt="A cat."' in first
    assert 'alt="x &lt; 1"' in first
    assert "[figure" not in page
    assert 'data-slide="1" aria-label="notes"><p>Ask &lt;them&gt;.</p>' in page
    assert r'class="formula" alt="\frac{a}{b}"' in page


def test_what_is_wrong_is_said_with_its_slide(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, words in (
        ("# A\n---\n[figure c1](02_gone.ipynb)", "slide 2: there is no notebook 02_gone.ipynb"),
        ("# A\n---\n$\\nonsense$", "slide 2: matplotlib cannot set $\\nonsense$"),
    ):
        (folder / "text.md").write_text(text)
        assert make_slides.main([str(folder / "text.md"), "--out", str(folder / "deck.html")]) == 1
        assert words in capsys.readouterr().err
        assert not (folder / "deck.html").exists()


#: Parts of the shown slide that reach beyond it, pictures that are missing, and pictures too
#: small to be read.
BEYOND = """() => {
  const slide = document.querySelector('.slide.shown'), edge = slide.getBoundingClientRect()
  const beyond = [...slide.querySelectorAll('*')].filter(part => {
    const box = part.getBoundingClientRect()
    return box.width && (box.left < edge.left - 1 || box.right > edge.right + 1 || box.bottom > edge.bottom + 1)
  })
  const pictures = [...slide.querySelectorAll('figure img')]
  const small = pictures.filter(image => image.clientHeight < 200 || !image.naturalWidth)
  return [...beyond, ...small].map(part => `${part.tagName} ${part.textContent.slice(0, 60)}`)
}"""


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
def test_nothing_runs_out_of_a_slide(deck: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        trouble: list[str] = []
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else trouble.append(r.url))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.goto(deck.as_uri())
        count = page.evaluate("slides.length")
        assert count == deck.read_text(encoding="utf-8").count("<section")
        for number in range(1, count + 1):
            assert page.locator(".slide.shown .foot").inner_text() == str(number)
            assert page.evaluate(BEYOND) == [], f"slide {number}"
            page.keyboard.press("ArrowRight")
        assert page.locator(".slide.shown .foot").inner_text() == str(count)  # the last one stays
        page.keyboard.press("Home")
        assert page.locator(".notes.shown").is_hidden()
        page.keyboard.press("n")
        assert page.locator(".notes.shown").is_visible()
        page.locator("#on").click()
        assert (
            page.locator(".aloud").inner_text()
            == f"Slide 2 of {count}: {page.locator('.slide.shown h2').inner_text()}"
        )
        page.set_viewport_size({"width": 640, "height": 480})
        box = page.locator(".slide.shown").bounding_box()
        assert (round(box["width"]), round(box["height"])) == (640, 360)
        assert trouble == []
        browser.close()
