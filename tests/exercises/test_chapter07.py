"""Chapter 07's checks against the notebook's own stubs and solutions, and against the mistakes people make."""

import notebook_tools as tools
import pytest
from exercise_tests import exercise_tests

from aprillab.exercises import chapter07

EXERCISES = {exercise.check: exercise for exercise in tools.exercises(tools.read("07"))}

BASIS = "torch.linalg.svd(dW, full_matrices=False).Vh[:n].T "
CENTRING = "        columns = columns - columns.mean(0)\n"
ZEROS = "z = torch.zeros_like(y)"
BACKWARD = "range(len(y) - 1, -1, -1)"
ROWS = f"{BACKWARD}:\n        later = S[k, k + 1 :] @ z[k + 1 :]"
ROWS_OF_THE_TRANSPOSE = "range(len(y)):\n        later = S[:k, k] @ z[:k]"
ROUNDED = "((y[k] - later) / S[k, k]).round()"
MUTANTS = [
    ("check_outside", "torch.eye(D.shape[1]).to(D) - Vh.T @ Vh", "Vh.T @ Vh", "onto the span"),
    ("check_outside", "[:k] ", "[: k + 1] ", "too many"),
    ("check_outside", "[:k] ", "[: k - 1] ", "too few"),
    ("check_outside", "[:k] ", "[min(D.shape) - k : min(D.shape)] ", "weakest"),
    ("check_outside", "svd(D).Vh[:k] ", "svd(D if len(D) != D.shape[1] else D.T).Vh[:k] ", "left singular"),
    ("check_outside", "torch.eye(D.shape[1])", "torch.eye(len(D))", "RuntimeError"),
    ("check_directions", "(u - beta) / gamma", "u / gamma", "β is still in it"),
    ("check_directions", "(u - beta) / gamma", "(u + beta) / gamma", "wrong sign"),
    ("check_directions", "(u - beta) / gamma", "(u - beta) * gamma", "division"),
    ("check_directions", "(u - beta) / gamma", "u - beta", "γ is still in it"),
    ("check_directions", "x / x.norm(dim=1, keepdim=True)", "x", "lengths"),
    ("check_directions", "x / x.norm(dim=1, keepdim=True)", "-x / x.norm(dim=1, keepdim=True)", "wrong sign"),
    ("check_width_needed", "min(pixels_per_patch, patches)", "pixels_per_patch", "row space"),
    ("check_width_needed", "min(pixels_per_patch, patches)", "patches", "at most p unknowns"),
    ("check_width_needed", "min(pixels_per_patch, patches)", "max(pixels_per_patch, patches)", "row space"),
    ("check_width_needed", "min(pixels_per_patch, patches) + ", "", "pay for"),
    ("check_width_needed", " + prefix", "", "before the patches"),
    ("check_width_needed", " + prefix", " + 1", "more or less than one"),
    ("check_width_needed", " + int(layernorm)", "", "mean takes one dimension"),
    ("check_width_needed", " + int(layernorm)", " + 1", "no mean to lose"),
    ("check_span_attack", "-outside(places.T)", "outside(places.T)", "right side's sign"),
    ("check_span_attack", CENTRING, "", "centring"),
    ("check_span_attack", "[: n + prefix]", "[:n]", "A direction is missing"),
    ("check_span_attack", BASIS, "torch.eye(dW.shape[1]).to(dW) ", "row space of ∂W_e"),
    ("check_span_attack", "(R @ Y).T", "R @ Y", "transpose"),
    ("check_twin", "twin[0] = X[0] + corners", "", "X' is X"),
    ("check_twin", " - X[columns] + ", " + X[columns] - ", "signs + − − +"),
    ("check_twin", "X[columns + 1]", "X[columns + 2]", "leaves the span"),
    ("check_twin", "X[0] + corners", "X[0] + 1", "position embeddings"),
    ("check_twin", "return twin", "return twin.T", "transpose"),
    ("check_nearest_plane", ZEROS, "return torch.linalg.solve(S, y).round()", "all at once"),
    ("check_nearest_plane", ZEROS, "return torch.linalg.solve(S, y)", "not made of whole numbers"),
    ("check_nearest_plane", ROUNDED, ROUNDED.removesuffix(".round()"), "not made of whole numbers"),
    ("check_nearest_plane", ".round()", ".floor()", "floor"),
    ("check_nearest_plane", ".round()", ".trunc()", "int()"),
    ("check_nearest_plane", BACKWARD, "range(len(y))", "from the first to the last"),
    ("check_nearest_plane", "y[k] - later", "y[k]", "Nothing was subtracted"),
    ("check_nearest_plane", "y[k] - later", "y[k] + later", "were added"),
    ("check_nearest_plane", "S[k, k + 1 :]", "S[k + 1 :, k]", "Is S transposed?"),
    ("check_nearest_plane", ROWS, ROWS_OF_THE_TRANSPOSE, "S is transposed"),
    ("check_nearest_plane", "/ S[k, k]", "/ S[k, k].abs()", "wrong sign"),
    ("check_nearest_plane", "return z", "return z[:, None]", "shape (1,), not (1, 1)"),
]  # fmt: skip

# The two projections commute for γ = 1 and β = 0.
SPAN_FIRST = """import torch
    n = len(places)
    V = torch.linalg.svd(D).Vh[: n + prefix]
    R = torch.linalg.svd(dW, full_matrices=False).Vh[:n].T
    def outside(columns):
        columns = columns - V.T @ (V @ columns)
        return columns - columns.mean(0)
    return (R @ torch.linalg.lstsq(outside(W_e @ R), -outside(places.T)).solution).T"""
RIGHT = [("check_span_attack", SPAN_FIRST)]

TestExercises = exercise_tests(chapter07, MUTANTS, RIGHT)


@pytest.mark.parametrize(
    ("old", "new"), [(ZEROS, "z = y"), ("return z", "return z.long()"), (ROUNDED, f"{ROUNDED}\n        S[k] = 0")]
)
def test_the_nearest_plane_may_overwrite_what_it_gets_and_answer_in_integers(old: str, new: str) -> None:
    exercise = EXERCISES["check_nearest_plane"]
    answer = tools.feedback(exercise, chapter07, tools.mutate(exercise.solution, old, new))
    assert answer.passed, answer.message


def test_a_mistake_that_also_overwrites_what_it_gets_is_named() -> None:
    exercise = EXERCISES["check_nearest_plane"]
    code = tools.mutate(tools.mutate(exercise.solution, ZEROS, "z = y"), "y[k] - later", "y[k] + later")
    assert "were added" in tools.feedback(exercise, chapter07, code).message
