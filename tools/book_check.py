"""What is wrong with the built book, read from its HTML: links, anchors, pictures, and
what it would fetch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

#: Elements that make a browser fetch something, and the attribute with the address.
FETCHED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


@dataclass
class Page(HTMLParser):
    """What a page links to, fetches and can be linked to."""

    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    opened: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        if "id" in given:
            (self.repeated if given["id"] in self.anchors else self.anchors).add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "a" and "name" in given:
            self.anchors.add(given["name"])
        if tag == "img":
            self.pictures.append((given.get("alt", ""), given.get("src", "")))
        if given.get(FETCHED.get(tag, "")) and given.get("rel") not in ("next", "prev", "index", "search", "author"):
            self.fetched.append(given[FETCHED[tag]])
        self.opened += tag == "details"

    def handle_endtag(self, tag: str) -> None:
        self.opened -= tag == "details"


def check_site(folder: Path) -> list[str]:
    """What is wrong with the site in ``folder``, a line each; empty if nothing is."""
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        pages[path] = Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    if not pages:
        return [f"no page in {folder}"]
    wrong = []
    for path, page in pages.items():
        name = path.relative_to(folder).as_posix()
        for link in page.links:
            wrong += [f"{name}: {problem}" for problem in _wrong_link(link, path, folder, pages)]
        for address in page.fetched:
            if re.match(r"(?:https?:)?//", address):
                wrong.append(f"{name}: fetches {address}")
            elif not address.startswith("data:") and not _target(address, path).exists():
                wrong.append(f"{name}: fetches {address}, which is not there")
        wrong += [
            f"{name}: a picture without alternative text, {source[:60]}"
            for alt, source in page.pictures
            if len(alt) < 10
        ]
        wrong += [f"{name}: two places are called {anchor}" for anchor in sorted(page.repeated)]
        if page.opened:
            wrong.append(f"{name}: {page.opened} folded parts are not closed")
    for path in sorted(folder.rglob("*.css")):
        if found := re.search(r"(?:url\(\s*['\"]?|@import\s+['\"])(?:https?:)?//[^)'\"]+", path.read_text("utf-8")):
            wrong.append(f"{path.relative_to(folder).as_posix()}: fetches {found[0]}")
    return wrong


def _target(address: str, path: Path) -> Path:
    return (path.parent / unquote(re.split(r"[?#]", address)[0])).resolve() if address else path


def _wrong_link(link: str, path: Path, folder: Path, pages: dict[Path, Page]) -> list[str]:
    if re.match(r"[a-z]+:", link):
        return []
    file, _, anchor = link.partition("#")
    target = _target(file, path) if file else path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return [f"links to {link}, which is not there"]
    known = pages.get(target) or pages.get(folder / target.relative_to(folder.resolve()))
    if anchor and known and unquote(anchor) not in known.anchors:
        return [f"links to {link}, and that page has no such place"]
    return []
