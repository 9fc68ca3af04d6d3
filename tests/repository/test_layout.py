"""How the package is built: which room may import which, and how long files and functions are.

A room is a folder of the package or a file beside them. Its floor is one more than the highest
floor it imports, so that the rooms which import none are on the first. The package's face
(``__init__``) and ``__main__`` count as rooms like the others: nothing imports them, and both
have to fit under the roof. A folder's own ``__init__`` is part of its room. Imports are read
from the source, those inside functions too, absolute or relative, and ``import_module`` where
it is told a name.

A function's body counts from its first statement after the docstring to its end, with comments and
blank lines; its local variables are the names it binds itself, without parameters, names of
comprehensions and of functions within.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "aprillab"

#: From the ground up. A room may import from lower floors alone; rooms on one floor know
#: nothing of each other.
FLOORS = (
    {"version", "models", "preprocessing", "data", "metrics", "viz", "update"},
    {"anatomy", "training", "widgets"},
    {"attacks", "defenses", "dishonest", "privacy"},
    {"zoo", "exercises", "sharing"},
    {"comparison", "audit", "federation", "__init__"},
    {"commands", "playground"},
    {"__main__"},
)
#: The same within attacks/. The files of the first floor may import each other, if
#: there is no circle.
ATTACK_FLOORS = (
    {"result", "pixels", "reading", "rounds", "evidence", "labels", "replay", "client", "compare", "known_entries"}
    | {"verify", "told_errors"},
    {"closed_forms"},
    {"searches"},
    {"grey_levels"},
    {"catalogue"},
    {"invert"},
    {"__init__"},
)
MOST_FLOORS, MOST_FILE_LINES, MOST_BODY_LINES, MOST_LOCALS = 7, 400, 40, 15

#: What is longer, and why. An entry that is needed no more fails, too: strike it out.
LONG_FILES = {}
_FORMULAS = "each mistake is a formula under the chapter's letters, read beside the others"
_LISTED = "a check lists the mistakes it knows, one after another"
LONG_FUNCTIONS = {
    "attacks/closed_forms/april_rounds.py:april_over_rounds": "check, solve and report, with a number each",
    "attacks/closed_forms/patch_embedding.py:embedding_closed_form": "check, solve and report, with a number each",
    "attacks/closed_forms/patch_embedding.py:most_probable": "one formula after another, a letter each",
    "attacks/closed_forms/known_noise.py:most_natural": "one formula after another, a letter each",
    "attacks/closed_forms/uncertain_patches.py:columns_of": "one formula after another, a letter each",
    "attacks/closed_forms/uncertain_patches.py:most_natural_of": "one formula after another, a letter each",
    "attacks/closed_forms/uncertain_patches.py:natural_patches_of": "what the update has, in the prior's order",
    "attacks/closed_forms/weighted_patches.py:weighted_closed_form": "check, solve and report, with a number each",
    "attacks/closed_forms/span.py:solve_rounds": "the chapter's steps in a row, a letter each",
    "exercises/appendix_a1.py:check_average_score": _LISTED,
    "exercises/chapter02.py:check_sticks_out": _LISTED,
    "exercises/chapter02.py:check_sticks_out.body": _FORMULAS,
    "exercises/chapter03.py:check_patches_from.body": _FORMULAS,
    "exercises/chapter03.py:_attack_mistakes": _FORMULAS,
    "exercises/chapter04.py:check_predicted_mse": _LISTED,
    "exercises/chapter04.py:check_predicted_mse.check": _FORMULAS,
}


# --- Reading ------------------------------------------------------------------------------------------------------


def module_name(package: Path, path: Path) -> str:
    """``attacks.searches.match``; a folder's ``__init__`` has the folder's name, and the
    package's own ``""``.
    """
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(package: Path) -> dict[str, list[tuple[str, bool]]]:
    """For each module the modules of the same package that it imports, and whether by the
    package's own name.
    """
    modules = {module_name(package, path): path for path in package.rglob("*.py")}
    return {name: list(_imports_of(name, path, package.name, modules)) for name, path in modules.items()}


def _imports_of(name: str, path: Path, package: str, modules: Mapping[str, Path]) -> Iterator[tuple[str, bool]]:
    here = name.split(".") if name else []
    folder = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == package:
                    yield rest, True
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            told = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            first, _, rest = str(told).partition(".")
            if first == package:
                yield rest, True
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                start = folder[: len(folder) - node.level + 1]
            elif (node.module or "").partition(".")[0] == package:
                start = []
            else:
                continue
            source = (node.module or "").split(".") if node.module else []
            base = [*start, *(source if node.level else source[1:])]
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                yield inner if inner in modules else ".".join(base), node.level == 0


def rooms(imports: Mapping[str, Sequence[tuple[str, bool]]], folder: str = "") -> dict[str, set[str]]:
    """Which room of a folder imports which others of it. The folder's own ``__init__`` is the
    room ``__init__``.
    """
    inside = f"{folder}." if folder else ""

    def room(module: str) -> str | None:
        if module == folder:
            return "__init__"
        return module.removeprefix(inside).partition(".")[0] if module.startswith(inside) else None

    graph: dict[str, set[str]] = {}
    for module, imported in imports.items():
        if (own := room(module)) is not None:
            graph.setdefault(own, set()).update(other for name, _ in imported if (other := room(name)) is not None)
    return {own: others - {own} for own, others in graph.items()}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def highest_floor(graph: Mapping[str, set[str]]) -> int:
    """Floors of a graph without a circle."""
    floors: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        floors[room] = 1 + max((floors[other] for other in graph.get(room, ())), default=0)
    return max(floors.values())


def upward(graph: Mapping[str, set[str]], floors: Sequence[set[str]], *, neighbours: bool = False) -> list[str]:
    """Imports that do not lead down, and rooms that have no floor."""
    level = {room: i for i, floor in enumerate(floors) for room in floor}
    found = [f"{room} has no floor" for room in sorted(graph.keys() - level.keys())]
    for room, others in graph.items():
        for other in sorted(others & level.keys()):
            if room in level and level[other] + (not neighbours) > level[room]:
                found.append(f"{room} imports {other}")
    return found


def faces_from_inside(imports: Mapping[str, Sequence[tuple[str, bool]]]) -> list[str]:
    """Modules that import the face of a folder they are in, or the package by its name."""
    found = []
    for module, imported in imports.items():
        parts = module.split(".") if module else []
        above = {".".join(parts[:i]) for i in range(len(parts))}
        for name, by_package in imported:
            if name in above or by_package:
                found.append(f"{module or '__init__'} imports {name or 'the package itself'}")
    return found


def long_files(package: Path, most: int = MOST_FILE_LINES) -> set[str]:
    return {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > most
    }


def long_functions(package: Path) -> set[str]:
    """``file:function`` of those with too many lines or local variables, with the names
    they are nested in.
    """
    found = set()
    for path in package.rglob("*.py"):
        for name, node in _functions(ast.parse(path.read_text(encoding="utf-8"))):
            if body_lines(node) > MOST_BODY_LINES or len(local_variables(node)) > MOST_LOCALS:
                found.add(f"{path.relative_to(package).as_posix()}:{name}")
    return found


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield f"{prefix}{node.name}", node
        inner = f"{prefix}{node.name}." if isinstance(node, ast.FunctionDef | ast.ClassDef) else prefix
        yield from _functions(node, inner)


def body_lines(function: ast.FunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def local_variables(function: ast.FunctionDef) -> set[str]:
    names = set()
    left: list[ast.AST] = list(function.body)
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            names |= {inner.target.id for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)}
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                names.add(node.name)
            left += ast.iter_child_nodes(node)
    given = function.args
    return names - {argument.arg for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs]}


def capital_letters(path: Path) -> set[str]:
    """Variables and arguments of one capital letter, such as ``G``, or of one with an
    addition: ``W_e``, ``dW``.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return {name for name in names if re.fullmatch(r"d?[A-Z](_[a-z]|[a-z0])?", name)}


# --- The package --------------------------------------------------------------------------------------------------

IMPORTS = read_imports(PACKAGE)


def test_no_circle_among_files_or_rooms() -> None:
    assert circle({module: {name for name, _ in imported} for module, imported in IMPORTS.items()}) == []
    assert circle(rooms(IMPORTS)) == []
    assert circle(rooms(IMPORTS, "attacks")) == []


def test_arrows_point_down() -> None:
    assert upward(rooms(IMPORTS), FLOORS) == []
    assert upward(rooms(IMPORTS, "attacks"), ATTACK_FLOORS, neighbours=True) == []


def test_every_floor_has_its_rooms() -> None:
    assert set().union(*FLOORS) == set(rooms(IMPORTS))
    assert set().union(*ATTACK_FLOORS) == set(rooms(IMPORTS, "attacks"))


def test_at_most_seven_floors() -> None:
    assert len(FLOORS) <= MOST_FLOORS
    assert highest_floor(rooms(IMPORTS)) <= MOST_FLOORS


def test_nobody_imports_a_face_from_inside() -> None:
    assert faces_from_inside(IMPORTS) == []


def test_files_fit_in_the_head() -> None:
    assert long_files(PACKAGE) - LONG_FILES.keys() == set(), f"files over {MOST_FILE_LINES} lines"
    assert LONG_FILES.keys() - long_files(PACKAGE) == set(), "no longer too long: strike out of LONG_FILES"


def test_functions_fit_on_the_screen() -> None:
    found = long_functions(PACKAGE)
    words = f"over {MOST_BODY_LINES} lines or {MOST_LOCALS} local variables: look for the step that wants a name"
    assert found - LONG_FUNCTIONS.keys() == set(), words
    assert LONG_FUNCTIONS.keys() - found == set(), "no longer too long: strike out of LONG_FUNCTIONS"


def test_the_attacks_page_names_every_file() -> None:
    page = (PACKAGE / "attacks/README.md").read_text(encoding="utf-8").partition("## Notation")[0]
    named = set(re.findall(r"`(?:[a-z_]+/)?([a-z_]+\.py|[a-z_]+/)`", page))
    files = {path.relative_to(PACKAGE / "attacks") for path in (PACKAGE / "attacks").rglob("*.py")}
    missing = {path.as_posix() for path in files if not named & {path.name, f"{path.parts[0]}/"}}
    assert {name for name in missing if not name.endswith("__init__.py")} == set()


def test_the_notation_has_every_capital_letter() -> None:
    table = (PACKAGE / "attacks/README.md").read_text(encoding="utf-8").partition("## Notation")[2]
    known = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", table)}
    used = {name for path in (PACKAGE / "attacks").rglob("*.py") for name in capital_letters(path)}
    assert used - known == set(), "a letter that the table in attacks/README.md does not have"


# --- That each of these can fail ----------------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path: Path):  # type: ignore[no-untyped-def]
    """``build({"a.py": "…"})``: a package ``house`` with these files, and an empty
    ``__init__.py`` in each folder.
    """

    def make(files: Mapping[str, str]) -> Path:
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "house" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (path.parent / "__init__.py").exists():
                (path.parent / "__init__.py").touch()
            path.write_text(text, encoding="utf-8")
        return tmp_path / "house"

    return make


def test_imports_of_every_kind_are_read(build) -> None:  # type: ignore[no-untyped-def]
    house = build(
        {
            "a.py": "",
            "b.py": "from . import a\nimport torch\nfrom torch import nn",
            "c.py": "def f():\n    from .a import f",
            "d/e.py": "from .. import a\nfrom .g import x\nfrom ..b import y",
            "d/g.py": "import house.a\nfrom house.d import e\nfrom house import b, f",
            "h.py": "from importlib import import_module\nx = import_module('house.d.e')\ny = import_module('torch')",
        }
    )
    imports = read_imports(house)
    assert imports["b"] == [("a", False)]
    assert imports["c"] == [("a", False)]
    assert imports["d.e"] == [("a", False), ("d.g", False), ("b", False)]
    assert sorted(imports["d.g"]) == [("", True), ("a", True), ("b", True), ("d.e", True)]
    assert imports["h"] == [("d.e", True)]
    assert rooms(imports) == {
        "__init__": set(), "a": set(), "b": {"a"}, "c": {"a"}, "d": {"__init__", "a", "b"}, "h": {"d"},
    }  # fmt: skip
    assert rooms(imports, "d") == {"__init__": set(), "e": {"g"}, "g": {"e"}}


def test_a_circle_is_seen_even_within_functions(build) -> None:  # type: ignore[no-untyped-def]
    house = build({"a/x.py": "def f():\n    from ..b.y import g", "b/y.py": "", "b/z.py": "from ..a.x import f"})
    imports = read_imports(house)
    assert circle({module: {name for name, _ in imported} for module, imported in imports.items()}) == []
    assert set(circle(rooms(imports))) == {"a", "b"}


def test_an_arrow_up_or_aside_is_seen(build) -> None:  # type: ignore[no-untyped-def]
    graph = rooms(read_imports(build({"a.py": "", "b.py": "from .a import f", "c.py": "from house.b import g"})))
    assert upward(graph, [{"a"}, {"b"}, {"c", "__init__"}]) == []
    assert upward(graph, [{"b"}, {"a"}, {"c", "__init__"}]) == ["b imports a"]
    assert upward(graph, [{"a"}, {"b", "c", "__init__"}]) == ["c imports b"]
    assert upward(graph, [{"a"}, {"b", "c", "__init__"}], neighbours=True) == []
    assert upward(graph, [{"a"}, {"b"}, {"__init__"}]) == ["c has no floor"]


def test_an_eighth_floor_is_seen(build) -> None:  # type: ignore[no-untyped-def]
    house = build({f"r{i}.py": f"from . import r{i - 1}" if i else "" for i in range(8)})
    assert highest_floor(rooms(read_imports(house))) == MOST_FLOORS + 1


def test_a_face_imported_from_inside_is_seen(build) -> None:  # type: ignore[no-untyped-def]
    house = build(
        {
            "__init__.py": "from .d import f",
            "d/__init__.py": "from .e import f",
            "d/e.py": "",
            "d/g.py": "from . import f",
            "d/h.py": "from .. import f\nfrom . import e",
            "i.py": "from .d import f\nfrom house.d.e import f",
        }
    )
    assert sorted(faces_from_inside(read_imports(house))) == [
        "d.g imports d",
        "d.h imports the package itself",
        "i imports d.e",
    ]


def test_what_is_too_long_is_seen(build) -> None:  # type: ignore[no-untyped-def]
    def function(name: str, lines: Sequence[str]) -> str:
        return f"def {name}(x):\n    'Words.'\n" + textwrap.indent("\n".join(lines), "    ") + "\n"

    few, many = ([f"y{i}, x = x" for i in range(count)] for count in (15, 16))
    house = build(
        {
            "fits.py": function("f", ["x = 1"] * 40) + "#\n" * (400 - 42),
            "long.py": "#\n" * 401,
            "a/lines.py": "class A:\n" + textwrap.indent(function("g", ["x = 1"] * 41), "    "),
            "names.py": function("f", [*few, "[z for z in x]", "lambda z: z"])
            + function("g", [*few, "def inner(): pass"])
            + function("h", ["def inner():", *(f"    {line}" for line in many)])
            + function("k", [*few, "try: pass", "except E as e: pass"]),
        }
    )
    assert long_files(house) == {"long.py"}
    assert long_functions(house) == {"a/lines.py:A.g", "names.py:g", "names.py:h.inner", "names.py:k"}


def test_capital_letters_are_those_that_are_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "def f(G, width):\n    W_e, dW, X0, GG = G, G.T, 1, 2\n    return Q(W_e) + LIMIT\n", encoding="utf-8"
    )
    assert capital_letters(path) == {"G", "W_e", "dW", "X0"}
