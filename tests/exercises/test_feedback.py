"""What the checks are made of: comparing an answer with the right one, and saying what it is
instead.
"""

import pytest
import torch

from aprillab.exercises import expect_close, expect_tensor, run, stop


def said(answer: torch.Tensor | float, wanted: torch.Tensor | float, **options: object) -> str:
    """What ``expect_close`` says of an answer; empty if it is right. Numbers become float64
    tensors.
    """
    answer, wanted = (torch.as_tensor(value, dtype=torch.float64) for value in (answer, wanted))

    def check() -> str:
        expect_close(answer, wanted, "The loss", **options)
        return ""

    return run(check).message


@pytest.mark.parametrize(
    ("got", "wanted", "message"),
    [
        (-3.0, 3.0, "The loss has the wrong sign: you have -3."),
        (1.0, -1.0, "The loss has the wrong sign: you have 1."),
        (6.0, 3.0, "The loss is 6, twice what it should be."),
        (-6.0, -3.0, "The loss is -6, twice what it should be."),
        (1.5, 3.0, "The loss is 1.5, half what it should be."),
        (0.2, 5.0, "The loss is 0.2, the inverse of what it should be."),
        (9.0, 3.0, "The loss is 9, the square of what it should be."),
        (3.0, 9.0, "The loss is 3, the square root of what it should be."),
        (4.0, 2.0, "The loss is 4, twice or the square of what it should be."),
        (9.0, 5.0, "The loss is 9, not the value it should be."),
        (-6.0, 3.0, "The loss is -6, not the value it should be."),
        (-3.0, 9.0, "The loss is -3, not the value it should be."),
        (2.0, 0.0, "The loss is 2, not the value it should be."),
        (0.0, 2.0, "The loss is 0, not the value it should be."),
        (5.0001, 5.0, "The loss is 5.0001, close to the value it should be, but off by 2.0e-05 of it."),
        (10.0001, 5.0, "The loss is 10.0001, not the value it should be."),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_of_a_single_number_only_what_is_exactly_so_is_said(
    got: float, wanted: float, message: str, shape: tuple[int, ...]
) -> None:
    answer, right = (torch.full(shape, value, dtype=torch.float64) for value in (got, wanted))
    assert said(answer, right) == message


def test_a_right_number_passes() -> None:
    assert said(3.0, 3.0) == ""
    assert said(3.0 + 1e-9, 3.0) == ""
    assert said(3.1, 3.0, tolerance=0.1) == ""
    assert said(0.0, 0.0) == ""


def test_a_numbers_own_mistakes_come_first() -> None:
    mistakes = {"Divide by n.": torch.tensor(6.0)}
    assert said(6.0, 3.0, mistakes=mistakes) == "The loss is not right yet. Divide by n."
    assert said(1.5, 3.0, mistakes=mistakes) == "The loss is 1.5, half what it should be."


def test_of_a_tensor_a_factor_is_said() -> None:
    wanted = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert "right up to a factor of 3" in said(3 * wanted, wanted)
    assert "right up to a factor of -0.5" in said(-wanted / 2, wanted)
    assert "wrong sign everywhere" in said(-wanted, wanted)
    assert "transpose" in said(wanted.T, wanted)
    assert "the largest deviation is 1, the largest entry 4" in said(wanted + 1, wanted)
    assert "factor" not in said(torch.zeros(2, 2), wanted)
    assert "factor" not in said(wanted, torch.zeros(2, 2))


def test_what_is_no_answer_is_said_in_words() -> None:
    def check(answer: object) -> str:
        return run(lambda: str(expect_tensor(answer, (3, 2), "W"))).message

    assert "nothing was returned" in check(None)
    assert "should be a tensor of shape (3, 2), but it is a list" in check([1.0])
    assert "That is its transpose" in check(torch.zeros(2, 3))
    assert "class token among the patches" in check(torch.zeros(4, 2))
    assert "One row is missing" in check(torch.zeros(2, 2))
    assert "NaN" in check(torch.full((3, 2), torch.nan))


def test_a_check_never_raises() -> None:
    assert repr(run(lambda: "Right.")) == "✓ Right."
    assert repr(run(lambda: stop("Not yet."))) == "✗ Not yet."
    assert run(lambda: 1 / 0).message == "Your code raised ZeroDivisionError: division by zero"


def test_a_notebook_shows_a_box_in_another_colour() -> None:
    right, wrong = run(lambda: "Right.")._repr_html_(), run(lambda: stop("a < b & c"))._repr_html_()
    assert "alert-success" in right
    assert "✓ Right." in right
    assert "alert-warning" in wrong
    assert "✗ a &lt; b &amp; c" in wrong
