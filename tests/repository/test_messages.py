"""No code reads the package's own messages: what it needs to know stands in a field, a number or a
type.

Words are for people and change with every better wording; code that looks for a phrase in them goes
wrong silently. Looked for are searches in what says a reason or puts numbers into words
(``refusal.reason``, ``condition.text``, ``str(error)``, and names that were given one of these):
``in``, ``==`` with a string, and methods that cut or compare. Putting words in order is no reading:
``" ".join(words.split())``, ``words.splitlines()``, ``words[0].upper()``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "aprillab"

#: Attributes that hold words for people.
WORDS = {"reason", "labels_reason", "words", "text", "clause", "verdict", "headline", "outcome"}
READS = {
    "startswith", "endswith", "removeprefix", "removesuffix", "partition", "rpartition", "split", "rsplit", "replace",
    "find", "index", "count",
}  # fmt: skip
CLEANED = {"lower", "upper", "casefold", "strip", "lstrip", "rstrip"}
REGULAR = {"search", "match", "fullmatch", "findall", "finditer", "split", "sub"}

_TORCHS = "the message is torch's, which has no type for it"
_READERS = f"{_TORCHS}: the mistake in a reader's own code gets better words"
#: ``file: what is read``, and why. An entry that is needed no more fails, too: strike it out.
ALLOWED = {
    "attacks/result.py: self.words.replace('{', '{{')": "makes a format string of them, whatever they say",
    "update/client.py: 'alloc' in str(error)": _TORCHS,
    "exercises/chapter01.py: 'non-empty TensorList' in str(error)": _READERS,
    "exercises/chapter02.py: 'cannot be multiplied' not in str(error)": _READERS,
    "exercises/chapter05.py: 'does not require grad' in str(error)": _READERS,
    "exercises/chapter05.py: 'not have been used in the graph' in str(error)": _READERS,
}


def readings(source: str) -> list[str]:
    """What reads words for people, each as its code, in the order of lines."""
    tree = ast.parse(source)
    found = [node for scope in _scopes(tree) for node in _readings_in(scope)]
    return [ast.unparse(node) for node in sorted(found, key=lambda node: (node.lineno, node.col_offset))]


def _scopes(tree: ast.Module) -> Iterator[list[ast.AST]]:
    """The nodes of each function, those within it apart, and of the module."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        own, left = [], list(ast.iter_child_nodes(waiting.pop()))
        while left:
            node = left.pop()
            own.append(node)
            if isinstance(node, ast.FunctionDef):
                waiting.append(node)
            else:
                left += ast.iter_child_nodes(node)
        yield own


def _readings_in(scope: list[ast.AST]) -> Iterator[ast.expr]:
    errors = {node.name for node in scope if isinstance(node, ast.ExceptHandler)}
    given = [node for node in scope if isinstance(node, ast.arg) and node.annotation is not None]
    errors |= {node.arg for node in given if re.search("Error|Exception", ast.unparse(node.annotation))}
    names: set[str] = set()
    for _ in range(2):  # a name may have been given another's words
        names |= {name for node in scope for name in _given_words(node, names, errors)}

    def said(node: ast.expr) -> bool:
        return _said(node, names, errors)

    for node in scope:
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for left, how, right in zip(sides, node.ops, sides[1:], strict=False):
                searched = isinstance(how, ast.In | ast.NotIn) and said(right)
                phrase = any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (left, right))
                if searched or (isinstance(how, ast.Eq | ast.NotEq) and phrase and (said(left) or said(right))):
                    yield node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method, owner = node.func.attr, node.func.value
            by_method = method in READS and bool(node.args) and said(owner)
            if by_method or (method in REGULAR and any(map(said, node.args)) and ast.unparse(owner) == "re"):
                yield node


def _given_words(node: ast.AST, names: set[str], errors: set[str | None]) -> Iterator[str]:
    """Names that an assignment gives words, or that a loop gives each of an audit's notes."""
    if isinstance(node, ast.Assign | ast.NamedExpr) and _said(node.value, names, errors):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    elif isinstance(node, ast.For | ast.comprehension) and getattr(node.iter, "attr", "") == "notes":
        targets = [node.target]
    else:
        targets = []
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def _said(node: ast.expr, names: set[str], errors: set[str | None]) -> bool:
    """Whether an expression is words for people."""
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Attribute):
        return node.attr in WORDS
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("str", "repr")
        and node.args
    ):
        return isinstance(node.args[0], ast.Name) and node.args[0].id in errors
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CLEANED:
        return _said(node.func.value, names, errors)
    return False


def in_package(package: Path) -> set[str]:
    """``file: code`` of everything that reads words."""
    return {
        f"{path.relative_to(package).as_posix()}: {code}"
        for path in package.rglob("*.py")
        for code in readings(path.read_text(encoding="utf-8"))
    }


def test_no_code_reads_the_packages_own_words() -> None:
    found = in_package(PACKAGE)
    assert found - ALLOWED.keys() == set(), "it reads words for people: give it a field, a number or a type"
    assert ALLOWED.keys() - found == set(), "no longer there: strike out of ALLOWED"


# --- That it can fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "'failed' in replay.words",
        "'failed' not in found.result.replay.words.lower()",
        "condition.text.removeprefix('not checked: ')",
        "finding.reason.replace(OLD, NEW)",
        "row.outcome.partition(': ')",
        "refusal.reason == 'no position embedding'",
        "re.search('rank (.*) of', condition.text)",
    ],
)
def test_a_reading_is_seen(code: str) -> None:
    assert len(readings(f"x = {code}")) == 1
    assert readings(f"def f(a):\n    def g(b):\n        return [{code} for c in b]") == [code]


def test_words_are_followed_through_names() -> None:
    error = "try: f()\nexcept ValueError as error:\n"
    assert readings(error + "    if 'steps' in str(error): raise") == ["'steps' in str(error)"]
    assert readings(error + "    said = str(error)\n    text = said\n    x = text.strip().startswith('no')") != []
    assert readings("if (why := refusal.reason) and 'narrow' in why: pass") == ["'narrow' in why"]
    assert readings("x = [note for note in found.notes if UNSHARED not in note.lower()]") != []
    assert readings("def f(error: Exception): return 'alloc' in str(error)") == ["'alloc' in str(error)"]
    assert readings("def f(): why = refusal.reason\ndef g(why): return 'narrow' in why") == []


@pytest.mark.parametrize(
    "code",
    [
        "' '.join(words.text.split())",
        "one.words.splitlines()",
        "replay.words[0].upper() + replay.words[1:]",
        "refusal.numbers.get('stopped') == 'interrupted'",
        "'rank' in condition.numbers",
        "note != HEAD_UNNAMED",
        "path.name.removeprefix('a')",
        "str(update.dtype).removeprefix('torch.')",
    ],
)
def test_what_is_no_reading_is_passed_over(code: str) -> None:
    assert readings(f"x = {code}") == []


def test_a_planted_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit/run.py").write_text("notes = [r for r in replays if 'failed' in r.words]\n", encoding="utf-8")
    assert in_package(tmp_path) == {"audit/run.py: 'failed' in r.words"}
