"""Chapter 04's checks against the notebook's own stubs and solutions, and against the
mistakes people make.
"""

from exercise_tests import exercise_tests

from aprillab.exercises import chapter04

SOLVE = "torch.linalg.lstsq(G.T, dW).solution "
CUT = "[anatomy.position_prefix :]"
UNPATCHIFY = "al.unpatchify(X[None], weight.shape[-1], anatomy.image_size)"
MUTANTS = [
    ("check_by_hand", "[[1, -3, 5], [2, -5, 9]]", "[[1, 0, 2], [2, 0, 4]]", "Only the first patch"),
    ("check_by_hand", "[[1, -3, 5], [2, -5, 9]]", "[[0, -3, 3], [0, -5, 5]]", "Only the second patch"),
    ("check_by_hand", "[[1, -3, 5], [2, -5, 9]]", "[[0.5, -1.5, 2.5], [1, -2.5, 4.5]]", "mean over the patches"),
    ("check_by_hand", "[[1, -3, 5], [2, -5, 9]]", "[[1, -2, 4], [3, -5, 11]]", "multiplied rows of G"),
    ("check_by_hand", "[[1, -3, 5], [2, -5, 9]]", "[[1, 2], [-3, -5], [5, 9]]", "transpose"),
    ("check_by_hand", "[[2, 1, -1], [-1, 0, 1]]", "[[-1, 0, 1], [2, 1, -1]]", "changed places"),
    ("check_by_hand", "[[2, 1, -1], [-1, 0, 1]]", "[[3, -1, -4], [-2, 1, 3]]", "solved with the rows of G"),
    ("check_by_hand", "[[2, 1, -1], [-1, 0, 1]]", "[[1, 0, 2], [0, -1, 1]]", "the first picture"),
    ("check_by_hand", "[[2, 1, -1], [-1, 0, 1]]", "[['a', 1, -1], [-1, 0, 1]]", "should be numbers"),
    ("check_by_hand", "return gradient, patches", "return {1: gradient}", "Return two tables"),
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
    ("check_ranks", '"square": 63', '"square": 64', "LayerNorm subtracts the mean"),
    ("check_ranks", '"square, RMSNorm": 64', '"square, RMSNorm": 63', "RMSNorm subtracts no mean"),
    ("check_ranks", '"one block of A": 8', '"one block of A": 16', "5 of 6 right. one block of A: you say 16"),
    ("check_ranks", '"one block": 16', '"one block": 8', "which turns it in a way of its own"),
    ("check_ranks", '"deep": 16', '"deep": 17', "Did you count the class token's row?"),
    ("check_ranks", '"deep": 16, ', "", "No number for deep"),
    ("check_ranks", '"deep": 16', '"deep": 16.5', "should be an int"),
    ("check_attack", "X[None]", "-X[None]", "wrong sign"),
    ("check_attack", "X[None]", "X.roll(1, 0)[None]", "one place off"),
    ("check_attack", UNPATCHIFY, f"al.HALF.to_pixels({UNPATCHIFY})", "model-input space"),
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
    ("check_predicted_mse", "(1 / torch.linalg.svdvals(G) ** 2)", "1 / (torch.linalg.svdvals(G) ** 2)", "mean of s²"),
    (
        "check_predicted_mse",
        "noise * (1 / torch.linalg.svdvals(G) ** 2).mean()",
        "noise * (d - n) / d",
        "mean squared residual",
    ),
    ("check_predicted_mse", "(dW - G.T @ X)", "dW", "equations hold exactly"),
    ("check_predicted_mse", "return float(", "return None and float(", "Nothing was returned"),
]  # fmt: skip

TestExercises = exercise_tests(chapter04, MUTANTS)
