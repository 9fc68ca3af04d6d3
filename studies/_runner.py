"""What every study does besides measuring: its options, its page, its end.

A study calls :func:`run_study` with functions of its own. The one that measures fills CSV files, by
:func:`studies._rows.fill` or :func:`aprillab.comparison.run.run`. The one that describes makes of
them the fields of the page's template, pages/NAME.md, and the claims that stand in it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aprillab.comparison.parallel import Workers
from aprillab.comparison.records import CompareError

from ._rows import StudyError

RESULTS = Path(__file__).parent.parent / "data" / "results"
PAGES = Path(__file__).parent / "pages"


class Claim(NamedTuple):
    """A phrase of a page's template, the numbers it rests on, and whether they bear it out."""

    phrase: str
    numbers: Any
    holds: bool


def between(phrase: str, value: float, least: float = -math.inf, most: float = math.inf) -> Claim:
    """The claim of a phrase that rests on one number, which must lie between two others."""
    return Claim(phrase, f"{value:.4g}", least < value < most)


Description = tuple[Mapping[str, Any], Sequence[Claim]]  # the fields of a page, and its claims


def study_parser(name: str, about: str | None, *, alone: str = "") -> argparse.ArgumentParser:
    """The options of all studies; ``about`` is the study's docstring.

    ``alone`` says why a study measures one case at a time, in this process, as most do that measure
    seconds; it then takes neither --jobs nor --dask.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m studies.{name}", description=about, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="the smallest study that has every part; keeps no file")
    parser.add_argument("--report", action="store_true", help="measure nothing: page and figures from the CSV files")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the files, instead of data/results or none")
    jobs = "processes that measure; seconds in the CSV are then of cores that jobs share"
    dask = "of a Dask scheduler whose workers measure, in the folder of this repository: tcp://HOST:PORT"
    refused = f"not here: {alone}" if alone else ""
    parser.add_argument("--jobs", type=_jobs(alone), default=1, metavar="N", help=refused or f"{jobs} (%(default)s)")
    parser.add_argument("--dask", type=_address(alone), metavar="ADDRESS", help=refused or dask)
    return parser


def _jobs(alone: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
        if alone and int(text) > 1:
            raise argparse.ArgumentTypeError(f"this study measures one case at a time: {alone}")
        return int(text)

    return read


def _address(alone: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if alone:
            raise argparse.ArgumentTypeError(f"this study measures one case at a time: {alone}")
        return text

    return read


def run_study(
    name: str,
    options: argparse.Namespace,
    *,
    measure: Callable[[Path, argparse.Namespace], None],
    describe: Callable[[Path, argparse.Namespace], Description] | None = None,
    draw: Callable[[Path, argparse.Namespace], Mapping[str, bytes]] | None = None,
    template: str | None = None,
) -> None:
    """Measure what is missing, then write NAME.md and the figures.

    ``measure``, ``describe`` and ``draw`` get the folder of the files and the options, with
    ``workers`` of --jobs and --dask. ``draw``
    returns PNG files by name, without those that it has no pictures for. A claim that does not hold
    ends the study before the page is written; with --quick, which is too small for most claims, it
    is printed.
    """
    with tempfile.TemporaryDirectory() as nowhere:
        folder = options.out or (Path(nowhere) if options.quick else RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            options.workers = Workers(options.jobs, options.dask)
            if not options.report:
                measure(folder, options)
            if describe:
                text = page(template or name, *describe(folder, options), strict=not options.quick)
                (folder / f"{name}.md").write_text(text, encoding="utf-8")
                print(text if options.quick else f"{name}.md says what the CSV says, and its claims hold")
            for file, png in (draw(folder, options) if draw else {}).items():
                (folder / file).write_bytes(png)
        except (StudyError, CompareError) as error:
            raise SystemExit(f"{name}: {error}") from error
        except KeyboardInterrupt:
            raise SystemExit(f"{name}: interrupted. What is done is kept; the same command goes on") from None


def page(name: str, values: Mapping[str, Any], claims: Iterable[Claim], *, strict: bool = True) -> str:
    """The template, filled in; a StudyError if ``strict`` and a claim does not hold."""
    template = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    said, broken = " ".join(template.split()), []
    for claim in claims:
        if " ".join(claim.phrase.split()) not in said:
            raise StudyError(f"pages/{name}.md does not say what is claimed: {claim.phrase!r}")
        if not claim.holds:
            broken.append(f"“{claim.phrase}” is not borne out by {claim.numbers}")
    if broken and strict:
        raise StudyError("the page is not written: " + "; ".join(broken))
    print("".join(f"too small a study: {text}\n" for text in broken), end="")
    return template.format_map(values)
