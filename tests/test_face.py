"""The package's face: all names are there, and PyTorch comes with the first of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import aprillab

FILE = Path(aprillab.__file__)


def test_type_checkers_and_python_see_the_same_names() -> None:
    tree = ast.parse(FILE.read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and "not" not in ast.unparse(node.test))
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported | {"__version__"} == set(aprillab.__all__)
    assert set(aprillab.__all__) <= set(dir(aprillab))


@pytest.mark.parametrize("name", aprillab.__all__)
def test_every_name_is_there_and_from_the_home_that_the_imports_say(name: str) -> None:
    value = getattr(aprillab, name)
    assert getattr(aprillab, name) is value
    module = getattr(value, "__module__", "aprillab")
    assert module.startswith("aprillab"), f"{name} comes from {module}"


def test_modules_are_attributes() -> None:
    for name in ("anatomy", "attacks", "data", "metrics", "models", "preprocessing", "update"):
        assert getattr(aprillab, name).__name__ == f"aprillab.{name}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'aprillab' has no attribute 'inverse'"):
        aprillab.inverse  # noqa: B018


def test_torch_comes_with_the_first_name() -> None:
    program = (
        "import sys, aprillab; assert 'torch' not in sys.modules; "
        "from aprillab import *; assert psnr is aprillab.psnr; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=FILE.parents[1])
