"""The book: its source leads somewhere everywhere, its check finds what it is for, and a browser
can read the site.

The slow tests build the whole site once, and need what ``pip install -e ".[book]"`` brings; those
with a browser need Chromium besides (tests/chromium.py). Nothing here uses the network, and the
site is opened from its folder.
"""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import book_pages
import build_book
import nbformat
import pytest
import yaml
from book_check import check_site
from chromium import CHROMIUM, SWITCHES, needs_chromium
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


# --- The settings -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    pytest.importorskip("sphinx", reason='Sphinx is not installed: pip install -e ".[book]"')
    return runpy.run_path(str(ROOT / "docs" / "conf.py"))


def test_nothing_runs_and_nothing_is_fetched_while_it_is_built(settings: dict[str, Any]) -> None:
    assert settings["nb_execution_mode"] == "off"
    assert "sphinx.ext.intersphinx" not in settings["extensions"]
    assert Path(settings["mathjax_path"]).name == build_book.MATHJAX_FILES[0]
    assert not [value for name, value in settings.items() if isinstance(value, str) and value.startswith("http")]


def test_the_extra_brings_what_the_settings_name(settings: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {Requirement(text).name for text in project["optional-dependencies"]["book"]}
    needed = {name.partition(".")[0].replace("_", "-") for name in (*settings["extensions"], settings["html_theme"])}
    assert needed | {build_book.MATHJAX} <= names


def test_one_command_builds_it_here_and_where_it_is_published() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/book.yml").read_text(encoding="utf-8"))
    build, publish = (workflow["jobs"][job]["steps"] for job in ("build", "publish"))
    assert "make book" in [step.get("run") for step in build]
    assert build[-1]["with"]["path"] == "build/book"
    assert publish[-1]["uses"].startswith("actions/deploy-pages@")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^book: .*\n\t\$\(BIN\)/python tools/build_book\.py$", makefile, re.M)


# --- The source -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("book") / "source"
    assert book_pages.write_source(folder) > 200
    return folder


def markdown_of(path: Path) -> str:
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return path.read_text(encoding="utf-8")


def test_every_link_of_the_source_leads_to_a_page_of_it(source: Path) -> None:
    pages = [path for path in source.rglob("*") if path.suffix in (".md", ".ipynb") and "extra" not in path.parts]
    assert len(pages) > 40
    seen = 0
    for path in pages:
        if "shown" in path.parts:
            continue  # a file as it is, in a fence
        text = re.sub(r"^(```+).*?^\1", "", markdown_of(path), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?<!\[)`[^`\n]+`(?!\])", "", text)):
            if not re.match(r"[a-z]+:|#", target):
                seen += 1
                assert (path.parent / target.partition("#")[0]).exists(), f"{path.relative_to(source)}: {target}"
    assert seen > 300


def test_every_chapter_is_on_the_map_and_can_be_downloaded(source: Path) -> None:
    front = (source / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^notebooks/(\w+)$", front, re.M)
    assert sorted(set(listed) & set(CHAPTERS)) == CHAPTERS
    for name in CHAPTERS:
        assert f"](notebooks/{name}.ipynb)" in front
        copy = source / "extra" / "downloads" / f"{name}.ipynb"
        assert copy.read_bytes() == (ROOT / "notebooks" / f"{name}.ipynb").read_bytes()
    assert "demo.png" in front[: front.index("## ")]


def test_every_room_of_the_package_has_a_page(source: Path) -> None:
    rooms = {
        path.stem for path in (ROOT / "aprillab").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    pages = {path.stem.partition(".")[2] for path in (source / "api").glob("*.rst") if path.stem.count(".") == 1}
    assert pages == rooms - {"__init__", *book_pages.LEFT_OUT}


def test_a_folder_of_something_else_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.md").write_text("years of work")
    with pytest.raises(book_pages.BookError, match="would be emptied"):
        book_pages.write_source(tmp_path)
    assert (tmp_path / "thesis.md").exists()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository of two modules, a chapter and its pages."""
    root = tmp_path / "repository"
    files = {
        "docs/conf.py": "",
        "docs/index.md": "# Book\n\n[chapter](../notebooks/00_first.ipynb)\n\n<!-- chapters -->\n",
        "docs/measured.md": "# Measured\n",
        "docs/api.md": "# API\n\n<!-- modules -->\n",
        "aprillab/__init__.py": '"""The package."""\n\nfrom .metrics import psnr\n\n__all__ = ["psnr"]\n',
        "aprillab/metrics.py": '"""Scores: :func:`psnr`.\n\nMore.\n"""\n\ndef psnr(): ...\n',
        "studies/one/__init__.py": "ONE = 1\n",
        "notebooks/README.md": "# Course\n\n| [00 · First](00_first.ipynb) | see | 5 min | 1, 5 min | there |\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 00 · First")]), root / "notebooks/00_first.ipynb")
    return root


def test_links_lead_to_the_reference_to_pages_and_to_files(repository: Path, tmp_path: Path) -> None:
    (repository / "notebooks/notes.md").write_text(
        "# N\n\n[`psnr`](../aprillab/metrics.py), [study](../studies/one), [here](README.md#course), [far](https://x.y)\n\n"
        "`[code](nowhere.md)`\n\n```\n[code](nowhere.md)\n```\n"
    )
    book_pages.write_source(tmp_path / "source", repository)
    text = (tmp_path / "source/notebooks/notes.md").read_text()
    assert "[`psnr`](../api/aprillab.metrics.rst)" in text
    assert "[study](../shown/studies/one.md)" in text
    assert "[here](README.md#course), [far](https://x.y)" in text
    assert text.count("[code](nowhere.md)") == 2
    assert "ONE = 1" in (tmp_path / "source/shown/studies/one.md").read_text()
    face = (tmp_path / "source/api/aprillab.rst").read_text()
    assert ":py:obj:`psnr <aprillab.metrics.psnr>`" in face
    assert ":doc:`aprillab.metrics <aprillab.metrics>`" in face
    assert (
        "[`aprillab.metrics`](api/aprillab.metrics.rst): Scores: `psnr`." in (tmp_path / "source/api.md").read_text()
    )
    front = (tmp_path / "source/index.md").read_text()
    assert "[chapter](notebooks/00_first.ipynb)" in front
    assert "**[00 · First](notebooks/00_first.ipynb)**" in front


def test_a_link_that_leads_nowhere_and_a_chapter_without_a_row_are_said(repository: Path, tmp_path: Path) -> None:
    (repository / "notebooks/notes.md").write_text("# N\n\n[gone](gone.md)\n")
    with pytest.raises(book_pages.BookError, match=r"notebooks/notes\.md links to gone\.md"):
        book_pages.write_source(tmp_path / "source", repository)
    (repository / "notebooks/notes.md").write_text("# N\n\n[out](../../outside.md)\n")
    (tmp_path / "outside.md").write_text("")
    with pytest.raises(book_pages.BookError, match="no such file"):
        book_pages.write_source(tmp_path / "source", repository)
    (repository / "notebooks/notes.md").unlink()
    nbformat.write(new_notebook(), repository / "notebooks/A1_second.ipynb")
    with pytest.raises(book_pages.BookError, match=r"no row for A1_second\.ipynb"):
        book_pages.write_source(tmp_path / "source", repository)


def test_an_appendix_has_a_part_of_its_own(repository: Path) -> None:
    nbformat.write(new_notebook(), repository / "notebooks/A1_second.ipynb")
    syllabus = repository / "notebooks/README.md"
    syllabus.write_text(syllabus.read_text() + "| [A1 · Second](A1_second.ipynb) | see more | 9 min | 2 | there |\n")
    parts = re.findall(r"^### (.+)$", book_pages.chapter_map(repository), re.M)
    assert parts == ["I · The leak", "Appendices"]


def test_a_page_gets_one_title() -> None:
    text = "# A\n\n## a\n\n# B\n\n## b\n\n```\n# comment\n```"
    assert book_pages.one_title(text) == "# A\n\n## a\n\n## B\n\n### b\n\n```\n# comment\n```"


def test_equations_are_linked_where_there_are_any() -> None:
    text = "By (4.3), [see (4.3)](x.md), `(4.3)` and $f(4.3)$, but not (0.5) or f(4.3).\n\n"
    text += "$$a = b \\tag{4.3}$$\n\n## On (4.3)"
    assert book_pages.linked_equations(text, {"4.3"}) == (
        "By [(4.3)](#eq-4-3), [see (4.3)](x.md), `(4.3)` and $f(4.3)$, but not (0.5) or f(4.3).\n\n"
        "(eq-4-3)=\n$$a = b \\tag{4.3}$$\n\n## On (4.3)"
    )


def test_sliders_are_explained_and_the_original_stays() -> None:
    cells = [
        new_markdown_cell("# 00 · A"),
        new_code_cell("import torch", metadata={"tags": ["setup"]}),
        new_code_cell("widgets.sliders(f, k=slider)"),
        new_code_cell("widgets.sliders(f, k=slider)", outputs=[new_output("stream", text="there")]),
        new_code_cell("sliders(\n    f)", outputs=[new_output("display_data", {"text/html": "still"})]),
    ]
    notebook = new_notebook(cells=cells)
    before = nbformat.writes(notebook)
    page = book_pages.chapter_page(notebook, "00_a.ipynb", set())
    assert nbformat.writes(notebook) == before
    assert [cell.cell_type for cell in page.cells] == [
        *("markdown", "markdown", "code", "code", "markdown", "code"),
        *("code", "markdown"),
    ]
    assert "downloads/00_a.ipynb" in page.cells[1].source
    assert page.cells[2].metadata.tags == ["setup", "hide-cell"]
    assert "moves in Jupyter" in page.cells[4].source


def test_what_is_missing_is_said_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_book, "find_spec", lambda name: None)
    assert build_book.main(["--to", str(tmp_path / "site")]) == 1
    assert 'Sphinx is not installed: pip install -e ".[book]"' in capsys.readouterr().err


# --- The check of what was built ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="gone.html">a</a>', "links to gone.html, which is not there"),
        ('<a href="index.html#gone">a</a>', "no such place"),
        ('<a href="#gone">a</a>', "no such place"),
        ('<img src="cat.png">', "without alternative text"),
        ('<img src="cat.png" alt="cat">', "without alternative text"),
        ('<img src="https://example.org/cat.png" alt="A cat on a mat.">', "fetches https://example.org"),
        ('<script src="//example.org/mathjax.js"></script>', "fetches //example.org"),
        ('<link rel="stylesheet" href="gone.css">', "fetches gone.css, which is not there"),
        ('<p id="a"></p><p id="a"></p>', "two places are called a"),
        ("<details><summary>Hint</summary>", "1 folded parts are not closed"),
    ],
)
def test_the_check_finds(tmp_path: Path, body: str, problem: str) -> None:
    (tmp_path / "cat.png").touch()
    (tmp_path / "index.html").write_text(f"<html><body>{body}</body></html>")
    (found,) = check_site(tmp_path)
    assert problem in found
    assert found.startswith("index.html: ")


def test_the_check_passes_a_sound_site_and_reads_style_sheets(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/page.html").write_text('<a href="../index.html#top">up</a><a href="mailto:a@b.c">mail</a>')
    (tmp_path / "index.html").write_text(
        '<p id="top"></p><a href="inner/page.html">in</a><link rel="stylesheet" href="book.css?v=1">'
        '<img alt="A cat on a mat." src="data:image/png;base64,AAAA"><details><summary>Hint</summary></details>'
    )
    (tmp_path / "book.css").write_text("p { color: red }")
    assert check_site(tmp_path) == []
    (tmp_path / "book.css").write_text('@font-face { src: url("https://example.org/font.woff") }')
    (found,) = check_site(tmp_path)
    assert found.startswith("book.css: fetches")
    assert check_site(tmp_path / "inner" / "nowhere") == [f"no page in {tmp_path / 'inner' / 'nowhere'}"]


# --- The site ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole book, built once: warnings are errors, and its own check passed."""
    for name in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(name, reason=f'{name} is not installed: pip install -e ".[book]"')
    folder = tmp_path_factory.mktemp("built") / "book"
    assert build_book.main(["--to", str(folder)]) == 0, "the warnings are above"
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site_has_its_pages_and_every_equation(site: Path) -> None:
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {"index.html", "search.html", "notebooks/bibliography.html", "api/aprillab.attacks.invert.html"} <= pages
    assert {f"data/results/{path.stem}.html" for path in (ROOT / "data/results").glob("*.md")} <= pages
    for name in CHAPTERS:
        text = (site / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
        numbers = re.findall(r"\\tag\{(\w+\.\d+)\}", markdown_of(ROOT / "notebooks" / f"{name}.ipynb"))
        for number in numbers:
            assert f"\\tag{{{number}}}" in text
            assert f'id="eq-{number.replace(".", "-").lower()}"' in text
        assert r"\begin{split}" not in text  # Sphinx's, in which MathJax takes no \tag


WIDTHS = (1000, 400)
LOOKED_AT = [
    "index.html",
    "genindex.html",
    "data/results/defences.html",
    *(f"notebooks/{name}.html" for name in CHAPTERS),
]
#: What reaches beyond the window, other than inside a part that scrolls by itself. The theme clips
#: it, so that the page's own width does not tell.
BEYOND = """() => [...document.querySelectorAll('article *')].filter(element => {
  if (element.closest('mjx-assistive-mml, svg')) return false
  const box = element.getBoundingClientRect()
  if (!box.width || box.right <= document.documentElement.clientWidth + 1) return false
  for (let around = element.parentElement; around.tagName != 'ARTICLE'; around = around.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(around).overflowX)) return false
  return true
}).map(element => `${element.tagName} ${element.textContent.slice(0, 60)}`).slice(0, 5)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that notes in ``page.trouble`` what it asked of the network, and what its
    scripts complained of.
    """
    opened = browser.new_page()
    opened.trouble = []
    opened.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else opened.trouble.append(r.url))
    opened.on("requestfailed", lambda r: opened.trouble.append(f"failed: {r.url}"))
    opened.on("pageerror", lambda error: opened.trouble.append(str(error)))
    yield opened
    opened.close()


TYPESET = (
    "!document.querySelector('script[src*=mathjax]') || "
    "(window.MathJax?.startup?.promise && MathJax.startup.promise.then(() => true))"
)


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LOOKED_AT)
def test_formulas_are_typeset_and_nothing_is_wider_than_the_page(site: Path, page: Any, name: str) -> None:
    page.goto((site / name).as_uri())
    page.wait_for_function(TYPESET)
    page.evaluate("document.querySelectorAll('details').forEach(folded => folded.open = true)")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(BEYOND) == [], f"{name} is wider than a window of {width} pixels"
    formulas = page.locator(".math").count()
    assert page.locator(".math mjx-container svg").count() >= formulas
    assert page.locator("[data-mml-node=merror]").count() == 0
    assert formulas > 20 or not re.match(r"notebooks/(0[1-9]|1)", name)
    loaded = page.evaluate(
        "[...document.images].every(image => image.complete && image.naturalWidth > 0 || image.loading == 'lazy')"
    )
    assert loaded
    assert page.trouble == []


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
@pytest.mark.timeout(900)
def test_a_hint_unfolds(site: Path, page: Any) -> None:
    page.goto((site / "notebooks/04_unmodified_vits.html").as_uri())
    hint = page.locator("article details", has=page.locator("summary", has_text="Solution")).first
    inside = hint.locator("pre").first
    assert not inside.is_visible()
    hint.locator("summary").click()
    assert inside.is_visible()
    hint.locator("summary").click()
    assert not inside.is_visible()


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
@pytest.mark.timeout(900)
def test_the_search_works_from_the_folder(site: Path, page: Any) -> None:
    page.goto((site / "index.html").as_uri())
    page.set_viewport_size({"width": 1600, "height": 900})
    box = page.locator("input[name=q]").first
    box.fill("span attack")
    box.press("Enter")
    page.wait_for_function(
        "document.querySelector('#search-results p')?.textContent.includes('found')", timeout=30_000
    )
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.getAttribute('href'))")
    assert re.match(r"notebooks/\d\d_", found[0]), found[:5]  # chapters before names of the package
    assert any(link.startswith("notebooks/07_breaking_the_defence.html") for link in found), found
    assert not [address for address in page.trouble if address.startswith("http")]
