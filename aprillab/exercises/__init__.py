"""The course's automatic checks: one module a chapter, one function an exercise.

A check takes what the reader wrote, tries it on cases of its own, and answers in words: a stub is
called a stub, a wrong answer is compared with the mistakes people make (a transpose, a sign, a
factor, a forgotten bias, a class token counted as a patch), and the message says which one it looks
like. A check never raises: a notebook with unsolved exercises runs from top to bottom.

    >>> from aprillab.exercises import chapter01 as ex
    >>> ex.check_outer_product(my_function)        # doctest: +SKIP
"""

from .feedback import Feedback, expect_close, expect_number, expect_tensor, expect_whole, run, stop

__all__ = ["Feedback", "expect_close", "expect_number", "expect_tensor", "expect_whole", "run", "stop"]
