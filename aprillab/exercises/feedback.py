"""What a check answers, and the comparisons that all checks share."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Feedback:
    """What a check answers; a notebook shows it as a box, green or amber, and elsewhere as a line.

    Attributes
    ----------
    passed : bool
    message : str
    """

    passed: bool
    message: str

    def __repr__(self) -> str:
        return f"{'✓' if self.passed else '✗'} {self.message}"

    def _repr_html_(self) -> str:
        # The class is for Jupyter's themes, the border for front ends that know no such class.
        kind, colour = ("success", "#009E73") if self.passed else ("warning", "#E69F00")
        style = f"border-left:5px solid {colour};padding:0.4em 0.8em;margin:0.3em 0"
        return f'<div class="alert alert-{kind}" style="{style}">{html.escape(repr(self))}</div>'


class _Stop(Exception):
    """Ends a check early with a message for the reader."""


def stop(message: str) -> None:
    """End the running check: the answer is wrong, and ``message`` says how.

    >>> run(lambda: stop("2 is not 3."))
    ✗ 2 is not 3.
    """
    raise _Stop(message)


def run(check: Callable[[], str]) -> Feedback:
    """Run the body of a check; it returns a line of praise, or calls :func:`stop`.

    Whatever the reader's code raises is turned into words.

    >>> run(lambda: "Right: 2 + 2 = 4.")
    ✓ Right: 2 + 2 = 4.
    >>> run(lambda: str(1 / 0))
    ✗ Your code raised ZeroDivisionError: division by zero
    """
    try:
        return Feedback(True, check())
    except _Stop as wrong:
        return Feedback(False, str(wrong))
    except NotImplementedError:
        return Feedback(False, "Still a stub: replace the line that raises NotImplementedError.")
    except Exception as error:
        return Feedback(False, f"Your code raised {type(error).__name__}: {error}")


def expect_something(answer: Any, what: str = "") -> None:
    """Any answer at all, or a message that there is none; with ``what`` it says of which quantity."""
    if answer is None or answer is ...:
        nothing = f"{what}: nothing" if what else "Nothing"
        stop(f"{nothing} was returned yet. Is there a return at the end?")


def expect_tensor(answer: Any, shape: tuple[int, ...], what: str) -> Tensor:
    """The answer as a tensor of this shape, or a message that says what it is instead.

    >>> run(lambda: str(expect_tensor(torch.zeros(3, 2), (2, 3), "G")))
    ✗ G should have shape (2, 3), not (3, 2). That is its transpose.
    """
    expect_something(answer, what)
    if not isinstance(answer, Tensor):
        stop(f"{what} should be a tensor of shape {shape}, but it is a {type(answer).__name__}.")
    if tuple(answer.shape) != shape:
        hint = ""
        if tuple(answer.shape) == shape[::-1] and len(shape) > 1:
            hint = " That is its transpose."
        elif len(shape) > 1 and answer.ndim == len(shape) and answer.shape[0] == shape[0] + 1:
            hint = " One row too many: is the class token among the patches?"
        elif len(shape) > 1 and answer.ndim == len(shape) and answer.shape[0] == shape[0] - 1:
            hint = " One row is missing: was the class token, or a patch, cut off?"
        stop(f"{what} should have shape {shape}, not {tuple(answer.shape)}.{hint}")
    if not torch.isfinite(answer).all():
        stop(f"{what} has entries that are NaN or infinite.")
    return answer


def expect_close(
    answer: Tensor,
    wanted: Tensor,
    what: str,
    *,
    mistakes: Mapping[str, Tensor] | None = None,
    tolerance: float = 1e-8,
) -> None:
    """Compare, and where it differs say which mistake it looks like.

    A tensor is tried for its sign, its transpose and a factor. Any two numbers differ by a factor,
    so of a single number only the plainest relations are said: sign, double, half, inverse, square,
    root.

    Parameters
    ----------
    answer, wanted : tensors of the same shape
    what : str, the quantity's name
    mistakes : message to the value that this mistake gives; shapes may differ (those are skipped)
    tolerance : float, relative to the largest entry of ``wanted``

    Examples
    --------
    >>> wanted = torch.tensor([1.0, 2.0])
    >>> run(lambda: expect_close(3 * wanted, wanted, "G") or "Right.")
    ✗ G is right up to a factor of 3.
    >>> run(lambda: expect_close(torch.tensor(6.0), torch.tensor(3.0), "p") or "Right.")
    ✗ p is 6, twice what it should be.
    """

    def same(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        scale = max(float(b.abs().max()), 1e-300)
        return float((a.double() - b.double()).abs().max()) <= tolerance * scale

    if same(answer, wanted):
        return
    for message, value in (mistakes or {}).items():
        if same(answer, value):
            stop(f"{what} is not right yet. {message}")
    if wanted.numel() == 1:
        stop(_wrong_number(what, float(answer), float(wanted), tolerance))
    if same(-answer, wanted):
        stop(f"{what} has the wrong sign everywhere.")
    if answer.ndim == 2 and answer.shape[0] == answer.shape[1] and same(answer.T, wanted):
        stop(f"{what} is the transpose of what is asked.")
    answer64, wanted64 = answer.double().flatten(), wanted.double().flatten()
    scale = float(answer64 @ wanted64 / (wanted64 @ wanted64).clamp_min(1e-300))
    if scale and same(answer / scale, wanted):
        stop(f"{what} is right up to a factor of {scale:.4g}.")
    worst = float((answer.double() - wanted.double()).abs().max())
    stop(
        f"{what} is not right yet: the largest deviation is {worst:.3g}, the largest entry {wanted.abs().max():.3g}."
    )


def _wrong_number(what: str, got: float, wanted: float, tolerance: float) -> str:
    """What to say of a single number, which is ``got`` and should be ``wanted``."""

    def same(a: float, b: float) -> bool:
        return abs(a - b) <= tolerance * abs(b)

    if same(-got, wanted):
        return f"{what} has the wrong sign: you have {got:.6g}."
    relations = {
        "twice": same(got, 2 * wanted),
        "half": same(got, wanted / 2),
        "the inverse of": same(got * wanted, 1.0),
        "the square of": same(got, wanted**2),
        "the square root of": got > 0 and same(got**2, wanted),
    }
    if wanted and (true := [relation for relation, holds in relations.items() if holds]):
        return f"{what} is {got:.6g}, {' or '.join(true)} what it should be."
    if (relative := abs(got - wanted) / max(abs(wanted), 1e-300)) < 1e-3:
        return f"{what} is {got:.6g}, close to the value it should be, but off by {relative:.1e} of it."
    return f"{what} is {got:.6g}, not the value it should be."


def expect_number(answer: Any, what: str) -> float:
    """The answer as a float, or a message that says what it is instead.

    >>> expect_number(torch.tensor(0.5), "The loss")
    0.5
    >>> run(lambda: str(expect_number(None, "The loss")))
    ✗ The loss: nothing was returned yet. Is there a return at the end?
    """
    expect_something(answer, what)
    if isinstance(answer, Tensor) and answer.numel() == 1:
        answer = answer.item()
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        stop(f"{what} should be a number, not a {type(answer).__name__}.")
    if answer != answer or abs(answer) == float("inf"):
        stop(f"{what} is {answer}: was something divided by zero?")
    return float(answer)


def expect_whole(answer: Any, what: str) -> int:
    """The answer as an int, or a message that says what it is instead.

    >>> expect_whole(torch.tensor(3), "The rank")
    3
    >>> run(lambda: str(expect_whole(3.0, "The rank")))
    ✗ The rank should be an int, not a float.
    """
    if isinstance(answer, Tensor) and answer.numel() == 1 and not answer.is_floating_point():
        answer = answer.item()
    expect_something(answer, what)
    if isinstance(answer, bool) or not isinstance(answer, int):
        stop(f"{what} should be an int, not a {type(answer).__name__}.")
    return answer


def plain(value: Any) -> Any:
    """Tensors, arrays and their numbers as Python's; whole floats of a tensor as ints."""
    if isinstance(value, Tensor) and value.is_floating_point() and bool((value == value.round()).all()):
        value = value.long()
    return value.tolist() if hasattr(value, "tolist") else value


def expect_numbers(answer: Any, shape: tuple[int, ...], what: str) -> Tensor:
    """What was written by hand, lists or tensors, as a float64 tensor of this shape, or a message."""
    try:
        numbers = torch.as_tensor(answer, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        got = "nothing (None)" if answer is None else f"a {type(answer).__name__} that is no table of numbers"
        stop(f"{what} should be numbers of shape {shape}; you returned {got}.")
    return expect_tensor(numbers, shape, what)
