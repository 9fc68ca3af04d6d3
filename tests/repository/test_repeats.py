"""No ten lines of the package stand twice: what two places do alike, one function does for both.

Lines of code are compared that follow each other: blank lines, comments, lone brackets, imports,
docstrings and the heads of functions, whose arguments are the package's face, are left out. Ten
lines stand twice if they are the same to the letter, or, in functions, the same but for names,
strings and numbers. A list in a function is like any other but for these, so there half of the ten
must differ from each other.
"""

from __future__ import annotations

import ast
import keyword
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "aprillab"
RUN = 10

_STRING = re.compile(r"""[a-z]{,2}("[^"]*"|'[^']*')""")
_NAME = re.compile(r"[^\W\d]\w*")
_NUMBER = re.compile(r"\b\d[\w.]*")
_WORD = re.compile(r"\w")


class Line(NamedTuple):
    """One that counts: white space folded, without the comment behind it."""

    number: int
    text: str
    in_function: bool


# --- Reading ------------------------------------------------------------------------------------------------------


def code_lines(path: Path) -> list[Line]:
    """Those of a file that count."""
    source = path.read_text(encoding="utf-8")
    passed, within = set[int](), set[int]()
    _sort(ast.parse(source), passed, within)
    lines = ((n, " ".join(line.partition("  # ")[0].split())) for n, line in enumerate(source.splitlines(), 1))
    return [
        Line(n, text, n in within)
        for n, text in lines
        if n not in passed and not text.startswith("#") and _WORD.search(text)
    ]


def _sort(node: ast.AST, passed: set[int], within: set[int]) -> None:
    """Adds the lines of imports, of texts that stand alone and of functions' heads to the first, of
    functions to the second.
    """
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.Import | ast.ImportFrom) or (
            isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant)
        ):
            passed.update(range(inner.lineno, (inner.end_lineno or 0) + 1))
        elif isinstance(inner, ast.stmt | ast.ExceptHandler | ast.match_case):
            if isinstance(inner, ast.FunctionDef):
                passed.update(range(inner.lineno, inner.body[0].lineno))
                within.update(range(inner.lineno, (inner.end_lineno or 0) + 1))
            _sort(inner, passed, within)


def by_letter(line: Line) -> str:
    return line.text


def by_shape(line: Line) -> str:
    """With one name for all names, one string for all strings and one number for all numbers,
    within a function.
    """
    if not line.in_function:
        return line.text
    text = _STRING.sub("''", line.text)
    text = _NAME.sub(lambda name: name[0] if keyword.iskeyword(name[0]) else "x", text)
    return _NUMBER.sub("1", text)


def repeats(package: Path, run: int = RUN) -> list[str]:
    """``a.py:3-14 = b.py:20-31``, for each run of lines that stands again elsewhere: where
    its first lines do.
    """
    files = {path.relative_to(package).as_posix(): code_lines(path) for path in sorted(package.rglob("*.py"))}
    return list(dict.fromkeys([*_again(files, run, by_letter, 1), *_again(files, run, by_shape, run // 2)]))


def _again(files: Mapping[str, list[Line]], run: int, alike: Callable[[Line], str], different: int) -> Iterator[str]:
    """Runs that stand again, by what ``alike`` leaves of a line, of which so many
    lines are different.
    """
    places: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for file, lines in files.items():
        texts = [alike(line) for line in lines]
        for i in range(len(texts) - run + 1):
            if len(set(window := tuple(texts[i : i + run]))) >= different:
                found = places.setdefault(window, [])
                if not found or found[-1][0] != file or found[-1][1] + run <= i:  # none overlaps itself
                    found.append((file, i))
    seen: set[tuple[str, int]] = set()
    for found in (found for found in places.values() if len(found) > 1):
        if not {(file, i - 1) for file, i in found} <= seen:
            yield " = ".join(f"{file}:{files[file][i].number}-{files[file][i + run - 1].number}" for file, i in found)
        seen.update(found)


# --- The package --------------------------------------------------------------------------------------------------


def test_no_ten_lines_stand_twice() -> None:
    assert repeats(PACKAGE) == [], "look for what both do, and let one function do it for both"


# --- That this can fail -------------------------------------------------------------------------------------------

TEN = [
    "total = 0", "for name in names:", "    if name is None:", "        continue", "    total += sizes[name]",
    "    seen.add(name)", "if total > 10:", "    raise ValueError(f'{total} is too much')", "print(total)",
    "return total, seen",
]  # fmt: skip
RENAMED = [
    "count = 7", "for key in keys:", "    if key is None:", "        continue", "    count += widths[key]",
    "    met.add(key)", "if count > 99:", "    raise TypeError(f'no: {count}')", "show(count)", "return count, met",
]  # fmt: skip
FIELDS = [f"field_{i}: int = {i}" for i in range(12)]
CALLS = [f"add('option_{i}', {i})" for i in range(12)]


def function(lines: Sequence[str], name: str = "f", head: str = "names, sizes, seen") -> str:
    return f"def {name}({head}):\n" + textwrap.indent("\n".join(lines), "    ") + "\n"


def record(fields: Sequence[str]) -> str:
    return "@dataclass\nclass Record:\n" + textwrap.indent("\n".join(fields), "    ") + "\n"


def wide_head(name: str) -> str:
    return function(["pass"], name, "\n".join(["", *(f"    argument_{i}: int = {i}," for i in range(12)), ""]))


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (function(TEN), "#\n" + function(TEN), ["a.py:2-11 = b.py:3-12"]),
        (function(TEN), function(RENAMED), ["a.py:2-11 = b.py:2-11"]),
        (function(TEN), function(TEN[1:]), []),
        (function(TEN), function(RENAMED[1:]), []),
        (function(TEN) + function(TEN, "g"), "", ["a.py:2-11 = a.py:13-22"]),
        (function([*TEN, "more()"]), function([*TEN, "more()"]), ["a.py:2-11 = b.py:2-11"]),
        (function(TEN), function([*TEN[:6], "", "# why", "(", ")  # why", *TEN[6:]]), ["a.py:2-11 = b.py:2-15"]),
        (function(TEN), function([*TEN[:6], "more()", *TEN[6:]]), []),
        (record(FIELDS), record(FIELDS), ["a.py:1-10 = b.py:1-10"]),
        (record(FIELDS), record([field.replace("field", "column") for field in FIELDS]), []),
        (function(CALLS), function(CALLS), ["a.py:2-11 = b.py:2-11"]),
        (function(CALLS), function([call.replace("option", "choice") for call in CALLS]), []),
        (function(["one()"] * 19), "", []),
        (function(["one()"] * 20), "", ["a.py:2-11 = a.py:12-21"]),
        (*(f"from .{name} import (\n" + "    x,\n" * 12 + ")" for name in "cc"), []),
        (*(function(['"""Words.', *map(str, range(12)), '"""', "pass"]) for _ in "ab"), []),
        (wide_head("f"), wide_head("g"), []),
    ],
)  # fmt: skip
def test_what_stands_twice_is_seen(tmp_path: Path, first: str, second: str, found: list[str]) -> None:
    for name, text in (("a.py", first), ("b.py", second)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert repeats(tmp_path) == found
