"""What every chapter's exercises are tested for: the notebook's own stubs and solutions,
and common mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import notebook_tools as tools
import pytest

#: The check; what to replace in the notebook's solution, and by what; words of the message
#: that should come.
Mutant = tuple[str, str, str, str]
NONSENSE = ("None", "torch.full((3,), torch.nan)", "'text'", "(None, None)")
MIN_MUTANTS = 3


def exercise_tests(checks: ModuleType, mutants: Sequence[Mutant], right: Sequence[tuple[str, str]] = ()) -> type:
    """A class of tests for the exercises of one chapter, to be named ``Test…`` where pytest finds
    it.

    ``checks`` is the chapter's module of the package; its last two letters are the chapter's
    number, or the appendix's. ``right`` has other right ways: the check, and a function's body.
    """
    exercises = {exercise.check: exercise for exercise in tools.exercises(tools.read(checks.__name__[-2:].upper()))}

    class Tests:
        @pytest.mark.parametrize("check", exercises)
        def test_the_stub_is_called_a_stub(self, check: str) -> None:
            answer = tools.feedback(exercises[check], checks, exercises[check].stub)
            assert not answer.passed
            assert answer.message.startswith("Still a stub"), answer.message

        @pytest.mark.parametrize("check", exercises)
        def test_the_notebooks_own_solution_passes(self, check: str) -> None:
            answer = tools.feedback(exercises[check], checks, exercises[check].solution)
            assert answer.passed, answer.message

        @pytest.mark.parametrize(("check", "old", "new", "words"), mutants)
        def test_a_mistake_is_named(self, check: str, old: str, new: str, words: str) -> None:
            code = tools.mutate(exercises[check].solution, old, new)
            answer = tools.feedback(exercises[check], checks, code)
            assert not answer.passed, f"{new!r} passes"
            assert words in answer.message, answer.message

        def test_other_right_ways_pass_too(self) -> None:
            for check, body in right:
                head = exercises[check].solution[: exercises[check].solution.index(":\n") + 2]
                answer = tools.feedback(exercises[check], checks, f"{head}    {body}\n")
                assert answer.passed, answer.message

        @pytest.mark.parametrize("check", exercises)
        @pytest.mark.parametrize("returned", NONSENSE)
        def test_nonsense_fails_in_words(self, check: str, returned: str) -> None:
            code = f"def {exercises[check].name}(*_):\n    return {returned}\n"
            answer = tools.feedback(exercises[check], checks, code)
            assert not answer.passed
            assert "Your code raised" not in answer.message, answer.message
            assert len(answer.message) > 20

        def test_every_exercise_has_its_mistakes(self) -> None:
            counts = {check: sum(check == mutant[0] for mutant in mutants) for check in exercises}
            assert min(counts.values()) >= MIN_MUTANTS, counts

    return Tests
