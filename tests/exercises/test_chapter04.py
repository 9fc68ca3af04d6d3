"""Chapter 04's checks against the notebook's own stubs and solutions, and against the mistakes people make."""

from exercise_tests import exercise_tests

from aprillab.exercises import chapter04

SOLVE = "torch.linalg.lstsq(G.T, dW).solution "
CUT = "[anatomy.position_prefix :]"
UNPATCHIFY = "al.unpatchify(X[None], weight.shape[-1], anatomy.image_size)"
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
    ("check_predicted_mse", "(dW - G.T @ X)", "dW", "equations hold exactly"),
    ("check_predicted_mse", "return float(", "return None and float(", "Nothing was returned"),
]  # fmt: skip

TestExercises = exercise_tests(chapter04, MUTANTS)
