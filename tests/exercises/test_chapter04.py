"""Chapter 04's checks against the notebook's own stubs and solutions, and against the mistakes people make."""

import notebook_tools as tools
import pytest

from aprillab.exercises import chapter04

EXERCISES = {exercise.check: exercise for exercise in tools.exercises(tools.read("04"))}

SOLVE = "torch.linalg.lstsq(G.T, dW).solution "
CUT = "[anatomy.position_prefix :]"
#: check, what to replace in the solution, by what, and a word of the message that should come
MUTANTS = [
    ("check_patch_gradient", "G.T @ X", "X.T @ G", "transpose"),
    ("check_patch_gradient", "G.T @ X", "-G.T @ X", "wrong sign"),
    ("check_patch_gradient", "G.T @ X", "G.T @ X / len(X)", "mean over the patches"),
    ("check_patch_gradient", "G.T @ X", "G[1:].T @ X[1:]", "class token"),
    ("check_patch_gradient", "G.T @ X", "G[:-1].T @ X[:-1]", "last patch is missing"),
    ("check_patch_gradient", "G.T @ X", "torch.outer(G.sum(0), X.sum(0))", "sum of outer products"),
    ("check_patch_gradient", "G.T @ X", "G @ X.T", "shape"),
    ("check_find_prefix", "int(distances.argmin())", "len(rows) - int(distances.argmin())", "number of patches"),
    ("check_find_prefix", "int(distances.argmin())", "int(distances.argmin()) + 1", "One too many"),
    ("check_find_prefix", "int(distances.argmin())", "int(distances.argmin()) - 1", "One too few"),
    ("check_find_prefix", "int(distances.argmin())", "distances.argmin()", "Return an int"),
    ("check_find_prefix", "rows[k:]", "rows[:k]", "the answer is"),
    ("check_find_prefix", "int(distances.argmin())",
     "([k for k, x in enumerate(distances) if x == 0] + [None])[0]", "fits best"),
    ("check_solve_patches", "[prefix:]", "[: len(position_gradient[0]) - prefix]", "class token's row"),
    ("check_solve_patches", "[prefix:]", "", "class token"),
    ("check_solve_patches", "[prefix:]", "[1:]", "One row"),
    ("check_solve_patches", SOLVE, "(G @ dW) ", "not solved yet"),
    ("check_solve_patches", SOLVE, SOLVE.strip() + ".T ", "transpose"),
    ("check_solve_patches", SOLVE, "-" + SOLVE, "sign"),
    ("check_solve_patches", SOLVE, "2 * " + SOLVE, "factor of 2"),
    ("check_attack", "X[None]", "-X[None]", "wrong sign"),
    ("check_attack", "X[None]", "X.roll(1, 0)[None]", "one place off"),
    ("check_attack", "return al.unpatchify(", "return al.HALF.to_pixels(al.unpatchify(", "model-input space"),
    ("check_attack", "anatomy.image_size)", "anatomy.image_size).mT", "swapped"),
    ("check_attack", "X[None]", "X.reshape(n, -1, 3).transpose(1, 2).reshape(1, n, -1)", "channel, y, x"),
    ("check_attack", CUT, "[1:]", "Error"),
    ("check_attack", CUT, f"{CUT}.flip(0)", "not right"),
    ("check_attack", "if n > d:", "if False:", "must refuse"),
    ("check_attack", "if n > d:", "if n + anatomy.position_prefix > d:", "do not count the 2 prefix rows"),
    ("check_attack", "    if weight is None or position is None:", "    if False:", "AttributeError"),
    ("check_predicted_mse", "(d - n)", "d", "d·p equations"),
    ("check_predicted_mse", "** 2).mean()", ").mean()", "1/s²"),
    ("check_predicted_mse", "** 2).mean()", "** 2).sum()", "summed"),
    ("check_predicted_mse", ".mean())", ".mean()) ** 0.5", "root"),
    ("check_predicted_mse", "noise * (1 / torch.linalg.svdvals(G) ** 2).mean()", "noise", "carry it through"),
    ("check_predicted_mse", "(dW - G.T @ X)", "dW", "equations hold exactly"),
    ("check_predicted_mse", "return float(", "return None and float(", "Nothing was returned"),
]  # fmt: skip


@pytest.mark.parametrize("check", EXERCISES)
def test_the_stub_is_called_a_stub(check: str) -> None:
    answer = tools.feedback(EXERCISES[check], chapter04, EXERCISES[check].stub)
    assert not answer.passed
    assert answer.message.startswith("Still a stub")


@pytest.mark.parametrize("check", EXERCISES)
def test_the_notebooks_own_solution_passes(check: str) -> None:
    answer = tools.feedback(EXERCISES[check], chapter04, EXERCISES[check].solution)
    assert answer.passed, answer.message


@pytest.mark.parametrize(("check", "old", "new", "word"), MUTANTS)
def test_a_mistake_fails_and_is_named(check: str, old: str, new: str, word: str) -> None:
    code = tools.mutate(EXERCISES[check].solution, old, new)
    if "to_pixels(" in new:
        code = code.replace("anatomy.image_size)", "anatomy.image_size))")
    answer = tools.feedback(EXERCISES[check], chapter04, code)
    assert not answer.passed
    assert word in answer.message, answer.message


def test_every_exercise_has_three_mutants_at_least() -> None:
    for check in EXERCISES:
        assert sum(mutant[0] == check for mutant in MUTANTS) >= 3, check
