"""What tests let worker processes do: they import it by its name, as they could not import
a test's own file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aprillab.comparison.play import play_group


def dies_at_zero(number: int) -> int:
    if number == 0:
        os._exit(1)
    return number


def dies_once_at_zero(file: Path, number: int) -> int:
    if number == 0 and not file.exists():
        file.touch()
        os._exit(1)
    return number


def waits_once_at_clock(file: Path, task: Any, **options: Any) -> Any:
    """Play a group; the first time that it is the clock's, write this process's number and
    wait to be killed.
    """
    if task[0][0].victims == ("clock",) and not file.exists():
        file.with_suffix(".part").write_text(str(os.getpid()))
        file.with_suffix(".part").rename(file)
        time.sleep(100)
    return play_group(task, **options)


def fails_at_clock(task: Any, **options: Any) -> Any:
    """Play a group; the clock's cannot be played, and of the others' searches none."""
    if task[0][0].victims == ("clock",):
        raise ZeroDivisionError("no clock")
    return play_group(task, **options | {"curve_every": "often"})


@dataclass(frozen=True)
class Square:
    name: str
    number: int
    square: float


def squared(case: tuple[int]) -> Iterator[Square]:
    """Two rows of a case; the greater, the sooner."""
    (number,) = case
    time.sleep(0.3 / number)
    yield Square("plain", number, number**2 / 3)
    if number == 4:
        raise ArithmeticError("four is too much")
    yield Square("negative", -number, number**2 / 3)
