"""Build the book: a site from the chapters, the pages of results, the bibliography and the
docstrings.

    python tools/build_book.py                # into build/book; open build/book/index.html
    python tools/build_book.py --to FOLDER

Needs the extra ``book`` (``pip install -e ".[book]"``) and no network. A warning of Sphinx, a link
that leads nowhere, a picture without alternative text or a page that would fetch anything from
elsewhere fails the build.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from book_check import check_site
from book_pages import ROOT, BookError, write_source

MATHJAX = "sphinx-mathjax-offline"
#: The one file that typesets, and what its menu loads for readers who have formulas read out.
MATHJAX_FILES = ("tex-svg-full.js", "a11y/", "sre/mathmaps/base.json", "sre/mathmaps/en.json")


def copy_mathjax(folder: Path) -> None:
    """MathJax, out of the installed package, into ``folder``."""
    try:
        files = importlib.metadata.files(MATHJAX) or []
    except importlib.metadata.PackageNotFoundError:
        raise BookError(f'{MATHJAX}, which brings MathJax, is not installed: pip install -e ".[book]"') from None
    for file in files:
        _, found, name = file.as_posix().partition("/static/mathjax/")
        if found and name.startswith(MATHJAX_FILES):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), folder / name)
    if not (folder / MATHJAX_FILES[0]).exists():
        raise BookError(f"{MATHJAX} is installed and has no {MATHJAX_FILES[0]}")


def build(folder: Path, source: Path) -> int:
    """Write the source into ``source`` and the site into ``folder``.

    Returns
    -------
    int
        How many pages the site has.

    Raises
    ------
    BookError
        With what is wrong, in words.
    """
    if find_spec("sphinx") is None:
        raise BookError('Sphinx is not installed: pip install -e ".[book]"')
    write_source(source)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "objects.inv").exists():
            raise BookError(f"{folder} is not a site that this command built, and would be emptied: name another")
        shutil.rmtree(folder)
    copy_mathjax(source / "_static" / "mathjax")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-b",
        "html",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        str(source / ".doctrees"),
    ]
    ran = subprocess.run([*command, str(source), str(folder)], cwd=ROOT)
    if ran.returncode:
        raise BookError("Sphinx had the warnings above; the source is in " + str(source))
    if wrong := check_site(folder):
        raise BookError("\n".join(["the site was built, and is wrong:", *wrong]))
    return sum(1 for _ in folder.rglob("*.html"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "book", help="default: build/book")
    folder = parser.parse_args(arguments).to
    start = time.perf_counter()
    try:
        pages = build(folder, folder.with_name(f"{folder.name}-source"))
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{pages} pages in {time.perf_counter() - start:.0f} s: {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
