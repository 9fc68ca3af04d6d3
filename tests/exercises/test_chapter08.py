"""Chapter 08's checks against the notebook's own stubs and solutions, and against the
mistakes people make.
"""

import notebook_tools as tools
import pytest
from exercise_tests import exercise_tests

from aprillab.exercises import chapter08

EXERCISES = {exercise.check: exercise for exercise in tools.exercises(tools.read("08"))}

OPEN = "min(pixels, images * n - rank)"
LOGS = "(math.sqrt(2 * math.pi * math.e) * thetas).log10().sum().item()"
ZEROS = "m = torch.zeros_like(t)"
BACKWARD = "range(len(t) - 1, -1, -1)"
ROWS = f"{BACKWARD}:\n        later = T[k, k + 1 :] @ m[k + 1 :]"
ROWS_OF_THE_TRANSPOSE = "range(len(t)):\n        later = T[:k, k] @ m[:k]"
ROUNDED = "((t[k] - later) / T[k, k]).round()"
CHANCE = "torch.erf(steps / 8**0.5).prod().item()"
MUTANTS = [
    ("check_twin", "twin[0] = X[0] + corners", "", "X' is X"),
    ("check_twin", " - X[columns] + ", " + X[columns] - ", "signs + − − +"),
    ("check_twin", "X[columns + 1]", "X[columns + 2]", "leaves the span"),
    ("check_twin", "X[0] + corners", "X[0] + 1", "position embeddings"),
    ("check_twin", "return twin", "return twin.T", "transpose"),
    ("check_open_directions", OPEN, "images * n - rank", "no more can be open"),
    ("check_open_directions", "rows + columns - 1", "rows + columns", "one dimension less"),
    ("check_open_directions", OPEN, "min(pixels, n - rank)", "different images at one place"),
    ("check_open_directions", OPEN, "min(pixels, images * (n - rank))", "do not stand side by side"),
    ("check_open_directions", OPEN, "min(pixels, (images - 1) * n)", "combinations of places"),
    ("check_open_directions", OPEN, "rank", "what is left"),
    ("check_open_directions", OPEN, "pixels - rank", "not the p pixels"),
    ("check_open_directions", "if grid else n", "if not grid else n", "it is 9"),
    ("check_open_directions", OPEN, "float(images * n - rank)", "not a float"),
    ("check_expected_others", "1 / torch.linalg.svdvals(W)", "torch.linalg.svdvals(W)", "one over a singular value"),
    ("check_expected_others", LOGS, "thetas.log10().sum().item()", "is missing"),
    ("check_expected_others", ".log10()", ".log()", "natural logarithm"),
    ("check_expected_others", LOGS, "(2 * math.pi * math.e * thetas).log10().sum().item()", "not 2πe"),
    ("check_expected_others", ".log10().sum().item()", ".prod().log10().item()", "add logarithms"),
    ("check_expected_others", ".log10().sum().item()", ".prod().item()", "return its power of ten"),
    ("check_expected_others", LOGS, "thetas.log10().sum().item() + math.log10(4.1327313541)", "each of the p"),
    ("check_nearest_plane", ZEROS, "return torch.linalg.solve(T, t).round()", "all at once"),
    ("check_nearest_plane", ZEROS, "return torch.linalg.solve(T, t)", "not made of whole numbers"),
    ("check_nearest_plane", ROUNDED, ROUNDED.removesuffix(".round()"), "not made of whole numbers"),
    ("check_nearest_plane", ".round()", ".floor()", "floor"),
    ("check_nearest_plane", ".round()", ".trunc()", "int()"),
    ("check_nearest_plane", BACKWARD, "range(len(t))", "from the first to the last"),
    ("check_nearest_plane", "t[k] - later", "t[k]", "Nothing was subtracted"),
    ("check_nearest_plane", "t[k] - later", "t[k] + later", "were added"),
    ("check_nearest_plane", "T[k, k + 1 :]", "T[k + 1 :, k]", "Is T transposed?"),
    ("check_nearest_plane", ROWS, ROWS_OF_THE_TRANSPOSE, "T is transposed"),
    ("check_nearest_plane", "/ T[k, k]", "/ T[k, k].abs()", "wrong sign"),
    ("check_nearest_plane", "return m", "return m[:, None]", "shape (1,), not (1, 1)"),
    ("check_chance", "T.diagonal().abs()", "T.diagonal()", "may be negative"),
    ("check_chance", ".prod()", ".min()", "that is the least"),
    ("check_chance", ".prod()", ".mean()", "that is their mean"),
    ("check_chance", "8**0.5", "2**0.5", "*half* a step"),
    ("check_chance", "8**0.5", "2", "divide by √2"),
    ("check_chance", CHANCE, "((1 + torch.erf(steps / 8**0.5)) / 2).prod().item()", "no bound below"),
    ("check_chance", CHANCE, "(1 - torch.erf(steps / 8**0.5).prod()).item()", "at least one coordinate"),
]  # fmt: skip

TestExercises = exercise_tests(chapter08, MUTANTS)


@pytest.mark.parametrize(
    ("old", "new"), [(ZEROS, "m = t"), ("return m", "return m.long()"), (ROUNDED, f"{ROUNDED}\n        T[k] = 0")]
)
def test_the_nearest_plane_may_overwrite_what_it_gets_and_answer_in_integers(old: str, new: str) -> None:
    exercise = EXERCISES["check_nearest_plane"]
    answer = tools.feedback(exercise, chapter08, tools.mutate(exercise.solution, old, new))
    assert answer.passed, answer.message


def test_a_mistake_that_also_overwrites_what_it_gets_is_named() -> None:
    exercise = EXERCISES["check_nearest_plane"]
    code = tools.mutate(tools.mutate(exercise.solution, ZEROS, "m = t"), "t[k] - later", "t[k] + later")
    assert "were added" in tools.feedback(exercise, chapter08, code).message
