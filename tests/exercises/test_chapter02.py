"""Chapter 02's checks against the notebook's own stubs and solutions, and against the mistakes people make."""

from exercise_tests import exercise_tests

from aprillab.exercises import chapter02

MUTANTS = [
    ("check_projection_gradient", "dQ.T @ Z", "Z.T @ dQ", "transpose"),
    ("check_projection_gradient", "dQ.T @ Z", "-dQ.T @ Z", "wrong sign"),
    ("check_projection_gradient", "dQ.T @ Z", "dQ.T @ Z / len(Z)", "mean over tokens"),
    ("check_projection_gradient", "dQ.T @ Z", "torch.outer(dQ[0], Z[0])", "first token"),
    ("check_projection_gradient", "dQ.T @ Z", "2 * dQ.T @ Z", "factor of 2"),
    ("check_token_gradient", "dQ @ W_Q + dK @ W_K + dV @ W_V", "dQ @ W_Q.T + dK @ W_K.T + dV @ W_V.T", "transposed"),
    ("check_token_gradient", " + dV @ W_V", "", "values is missing"),
    ("check_token_gradient", "dQ @ W_Q + dK @ W_K", "dK @ W_K", "queries is missing"),
    ("check_token_gradient", "dQ @ W_Q + dK @ W_K + dV @ W_V", "dQ @ W_V + dK @ W_K + dV @ W_Q", "mixed up"),
    ("check_token_gradient", "return dQ @ W_Q", "return -dQ @ W_Q", "queries comes in with the wrong sign"),
    ("check_token_gradient", "dQ @ W_Q + dK @ W_K + dV @ W_V", "-(dQ @ W_Q + dK @ W_K + dV @ W_V)", "wrong sign"),
    ("check_token_gradient", "dQ @ W_Q + dK @ W_K + dV @ W_V", "(dQ @ W_Q + dK @ W_K + dV @ W_V) / 3", "mean"),
    ("check_fused_right_side", "weight.T @ gradient", "gradient.T @ weight", "transpose"),
    ("check_fused_right_side", "weight.T @ gradient", "weight @ gradient.T", "shape (3, 3)"),
    (
        "check_fused_right_side",
        "weight.T @ gradient",
        "weight[: weight.shape[1]].T @ gradient[: weight.shape[1]]",
        "queries went in",
    ),
    (
        "check_fused_right_side",
        "weight.T @ gradient",
        "weight[: 2 * weight.shape[1]].T @ gradient[: 2 * weight.shape[1]]",
        "values is missing",
    ),
    (
        "check_fused_right_side",
        "weight.T @ gradient",
        "sum(W @ g for W, g in zip(weight.chunk(3), gradient.chunk(3)))",
        "not transposed",
    ),
    ("check_hidden_gradients", "rows[1:].sum(0)", "rows.sum(0)", "class token's row is in the sum"),
    ("check_hidden_gradients", "rows[1:].sum(0)", "rows[1:].mean(0)", "mean"),
    ("check_hidden_gradients", "rows[0], rows[1:].sum(0)", "rows[-1], rows[:-1].sum(0)", "last row"),
    ("check_hidden_gradients", "rows[1:].sum(0)", "rows[:-1].sum(0)", "is a patch"),
    ("check_hidden_gradients", "rows[0], rows[1:].sum(0)", "rows[1:].sum(0), rows[0]", "right order"),
    ("check_hidden_gradients", "rows[0], rows[1:].sum(0)", "rows[0]", "two tensors"),
    ("check_hidden_gradients", "rows[0],", "-rows[0],", "wrong sign"),
    ("check_sticks_out", "M - B @ (B.T @ M)", "M - (M @ B) @ B.T", "wrong side"),
    ("check_sticks_out", "M - B @ (B.T @ M)", "B @ (B.T @ M)", "inside the span"),
    ("check_sticks_out", " / M.norm()", "", "not relative"),
    ("check_sticks_out", "/ M.norm())", "/ M.norm()) ** 2", "squared"),
    ("check_sticks_out", "torch.linalg.qr(G.T).Q", "G.T", "should be"),
    ("check_sticks_out", "return float(", "return None and float(", "one number"),
    (
        "check_sticks_out",
        "float((M - B @ (B.T @ M)).norm() / M.norm())",
        "torch.tensor(float((M - B @ (B.T @ M)).norm() / M.norm()))",
        "right to float32's precision only",
    ),
]

TestExercises = exercise_tests(chapter02, MUTANTS)
