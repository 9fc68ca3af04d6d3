"""Chapter 02's checks against the notebook's own stubs and solutions, and against the
mistakes people make.
"""

from exercise_tests import exercise_tests

from aprillab.exercises import chapter02

MUTANTS = [
    ("check_linear_backward", "dQ.T @ Z, dQ @ W", "Z.T @ dQ, dQ @ W", "transpose"),
    ("check_linear_backward", "dQ.T @ Z, dQ @ W", "dQ @ W, dQ.T @ Z", "wrong order"),
    ("check_linear_backward", "dQ.T @ Z,", "dQ.T @ Z / len(Z),", "mean over tokens"),
    ("check_linear_backward", "dQ.T @ Z,", "torch.outer(dQ[0], Z[0]),", "first token"),
    ("check_linear_backward", "dQ @ W", "dQ @ (W.T if len(W) == len(W.T) else W)", "going back takes W"),
    ("check_linear_backward", "dQ.T @ Z, dQ @ W", "dQ @ Z.T, W.T @ dQ", "tokens are rows"),
    ("check_linear_backward", "dQ @ W", "(dQ @ W).mean(0).expand_as(Z)", "same row"),
    ("check_linear_backward", "dQ @ W", "-dQ @ W", "wrong sign"),
    ("check_linear_backward", "dQ.T @ Z, dQ @ W", "dQ.T @ Z", "two tensors"),
    ("check_survives", '("late", "shortcut")', '("late",)', "passes no projection"),
    ("check_survives", '("late", "shortcut")', '("shortcut",)', "What do W_Q and W_K multiply"),
    ("check_survives", '("late", "shortcut")', '("late", "shortcut", "rotations")', "Is the token rotated"),
    ("check_survives", "not in", "in", "0 of 10"),
    ("check_survives", "not in", "== ", "2 of 10"),
    ("check_survives", 'return change not in ("late", "shortcut")', "return 'yes'", "True or False"),
    ("check_hidden_gradients", "rows[prefix:].sum(0)", "rows.sum(0)", "are in the sum"),
    ("check_hidden_gradients", "rows[prefix:].sum(0)", "rows[prefix:].mean(0)", "mean"),
    ("check_hidden_gradients", "rows[prefix:].sum(0)", "rows[1:].sum(0)", "more prefix tokens than one"),
    ("check_hidden_gradients", "rows[:prefix],", "rows[len(rows) - prefix:],", "last rows"),
    ("check_hidden_gradients", "rows[prefix:].sum(0)", "rows[:len(rows) - prefix].sum(0)", "are patches"),
    ("check_hidden_gradients", "rows[:prefix], rows[prefix:].sum(0)", "rows[prefix:].sum(0), rows[:prefix]", "order"),
    ("check_hidden_gradients", "rows[:prefix], rows[prefix:].sum(0)", "rows[:prefix]", "two tensors"),
    ("check_hidden_gradients", "rows[:prefix],", "-rows[:prefix],", "wrong sign"),
    ("check_all_readers", ', "shortcut", "mlp.in"', "", "attention alone"),
    ("check_all_readers", ', "mlp.in"', "", '"mlp.in" is missing'),
    ("check_all_readers", ', "shortcut"', "", '"shortcut" is missing'),
    ("check_all_readers", '"key", ', "", '"key" is missing'),
    ("check_all_readers", '"mlp.in")', '"mlp.in", "out")', "W_O is in the sum"),
    ("check_all_readers", '"mlp.in")', '"mlp.in", "mlp.out")', "hidden units"),
    ("check_all_readers", '"mlp.in")', '"mlp.in", "out", "mlp.out")', "Every matrix"),
    ("check_all_readers", "weights[name].T @ gradients[name]", "gradients[name].T @ weights[name]", "transpose"),
    ("check_sticks_out", "M - basis @ (basis.T @ M)", "M - (M @ basis) @ basis.T", "wrong side"),
    ("check_sticks_out", "M - basis @ (basis.T @ M)", "basis @ (basis.T @ M)", "inside the span"),
    ("check_sticks_out", " / M.norm()", "", "not relative"),
    ("check_sticks_out", "/ M.norm()", "/ (basis.T @ M).norm()", "relative to the part inside"),
    ("check_sticks_out", "/ M.norm())", "/ M.norm()) ** 2", "squared"),
    ("check_sticks_out", "torch.linalg.qr(G.T).Q", "G.T", "rows of G are orthonormal"),
    ("check_sticks_out", "return float(", "return None and float(", "one number"),
    (
        "check_sticks_out",
        "float((M - basis @ (basis.T @ M)).norm() / M.norm())",
        "torch.tensor(float((M - basis @ (basis.T @ M)).norm() / M.norm()))",
        "right to float32's precision only",
    ),
]

RIGHT = [("check_survives", "return {'late': False, 'shortcut': False}.get(change, True)")]

TestExercises = exercise_tests(chapter02, MUTANTS, RIGHT)
