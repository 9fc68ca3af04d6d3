"""Appendix A1's checks against its notebook's own stubs and solutions, and against the
mistakes people make.
"""

from typing import Any

import notebook_tools as tools
import pytest
import torch
from exercise_tests import exercise_tests

import aprillab as al
from aprillab.exercises import appendix_a1

MUTANTS = [
    ("check_damped", "a * b / (a**2 + damping)", "a**2 * b / (a**2 + damping)", "not yet divided by a"),
    ("check_damped", "a * b / (a**2 + damping)", "a * b / (a**2 + damping**2)", "itself is not squared"),
    ("check_damped", "a * b / (a**2 + damping)", "a * b / (a**2 + 2 * damping)", "factor 2 is left over"),
    ("check_damped", "a * b / (a**2 + damping)", "a * b / (a**2 + damping / 2)", "factor 2 is missing"),
    ("check_damped", "a * b / (a**2 + damping)", "b / (a + damping)", "shifts a"),
    ("check_damped", "a * b / (a**2 + damping)", "b / a", "not damped"),
    ("check_damped", "a * b / (a**2 + damping)", "(a**2 / (a**2 + damping)) * (b / a)", "NaN"),
    ("check_damped", "a * b / (a**2 + damping)", "-a * b / (a**2 + damping)", "wrong sign"),
    ("check_left_out", "b[i] - A[i] @ y", "A[i] @ y", "Those are the predictions"),
    ("check_left_out", "b[i] - A[i] @ y", "A[i] @ y - b[i]", "wrong sign"),
    ("check_left_out", "!= i", ">= 0", "fit to all equations, its own"),
    ("check_left_out", " + damping * eye", "", "not damped"),
    ("check_left_out", "b[i] - A[i] @ y", "(b[i] - A[i] @ y) ** 2", "They are squared"),
    ("check_left_out", "return torch.stack(found)", "return torch.stack(found).mean()", "shape"),
    ("check_average_score", "(1 - H.diagonal().mean()) ** 2", "(1 - H.diagonal().mean())", "not squared"),
    ("check_average_score", "(1 - H.diagonal().mean()) ** 2", "1.0", "misfit alone"),
    ("check_average_score", "(1 - H.diagonal().mean()) ** 2", "(1 - 1 / (2 * half + 1)) ** 2", "a point's own share"),
    ("check_average_score", "H.diagonal().mean()", "H.trace()", "divide the trace"),
    (
        "check_average_score",
        "    H = near",
        "    near = near - torch.eye(len(b)).to(b)\n    H = near",
        "keeps each point",
    ),
    ("check_average_score", "(1 - H.diagonal().mean()) ** 2", "H.diagonal().mean() ** 2", "one minus it"),
    ("check_average_score", "near.sum(1, keepdim=True)", "(2 * half + 1)", "averages zeros"),
    ("check_average_score", "square().mean()", "square().sum()", "take their mean"),
    (
        "check_average_score",
        "(b - H @ b).square().mean() / (1 - H.diagonal().mean()) ** 2",
        "((b - H @ b) / (1 - H.diagonal())).square().mean()",
        "ordinary cross-validation",
    ),
    (
        "check_average_score",
        "return float((b - H @ b).square().mean() / (1 - H.diagonal().mean()) ** 2)",
        "r = b - sum(b.roll(k) for k in range(-half, half + 1)) / (2 * half + 1)\n"
        "    return float(r.square().mean() / (1 - 1 / (2 * half + 1)) ** 2)",
        "round to the other side",
    ),
    ("check_expected_error", "bias**2 + ", "", "noise's part alone"),
    ("check_expected_error", " + (noise * a / (a**2 + damping)) ** 2", "", "the noise is missing"),
    ("check_expected_error", "bias**2", "bias", "bias is missing its square"),
    ("check_expected_error", " / (a**2 + damping)) ** 2", " / (a**2 + damping))", "part is missing its square"),
    (
        "check_expected_error",
        "(noise * a / (a**2 + damping)) ** 2",
        "noise * (a / (a**2 + damping)) ** 2",
        "by its square",
    ),
    ("check_expected_error", "noise * a /", "noise * a**2 /", "divided by a as well"),
    ("check_expected_error", "damping * y /", "a**2 * y /", "what is missing of y"),
    (
        "check_expected_error",
        "return bias**2 + (noise * a / (a**2 + damping)) ** 2",
        "return (noise / a) ** 2",
        "plain",
    ),
    (
        "check_expected_error",
        "bias**2 + (noise * a / (a**2 + damping)) ** 2",
        "(bias + noise * a / (a**2 + damping)) ** 2",
        "without a mixed term",
    ),
    ("check_joined", "noise_b / noise_f", "1.0", "count alike"),
    ("check_joined", "noise_b / noise_f", "noise_f / noise_b", "upside down"),
    ("check_joined", "noise_b / noise_f", "(noise_b / noise_f) ** 0.5", "should be squared"),
    ("check_joined", "noise_b / noise_f", "(noise_b / noise_f) ** 2", "squared twice"),
    ("check_joined", ".sqrt()", "", "root is missing"),
    ("check_joined", "(a * b + weight**2 * c * f) / root", "a * b + weight**2 * c * f", "not divided"),
    ("check_joined", "(a * b + weight**2 * c * f) / root", "(a * b + weight**2 * c * f) / root**2", "that is y"),
    ("check_joined", "(a * b + weight**2 * c * f) / root", "(b + f) / root", "own factor first"),
    ("check_joined", "return root, (", "return (", "two tensors"),
]

RIGHT = [
    # The shortcut of (A1.4).
    (
        "check_left_out",
        "H = A @ torch.linalg.solve(A.T @ A + damping * torch.eye(A.shape[1]).to(A), A.T)\n"
        "    return (b - H @ b) / (1 - H.diagonal())",
    ),
    (
        "check_average_score",
        "N = len(b)\n"
        "    windows = [slice(max(i - half, 0), i + half + 1) for i in range(N)]\n"
        "    free = 1 - sum(1 / len(b[w]) for w in windows) / N\n"
        "    return sum(float(b[i] - b[w].mean()) ** 2 for i, w in enumerate(windows)) / N / free**2",
    ),
]

TestExercises = exercise_tests(appendix_a1, MUTANTS, RIGHT)


# --- The appendix's own functions, where its cells do not go -----------------------------------------------------


@pytest.fixture(scope="module")
def appendix() -> dict[str, Any]:
    return tools.definitions(tools.read("A1"))


@pytest.mark.parametrize("options", [{"channels": 3, "class_token": False}, {"depth": 3, "seed": 5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_appendix_agrees_with_the_package(
    appendix: dict[str, Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    model, _, update = appendix["client"]("coins", 16, dtype, patch_size=4, width=96, **options)
    found = al.april_closed_form(model, update)
    assert torch.allclose(appendix["april_damped"](model, update), found.pixels, atol=1e-6)
    if dtype == torch.float32:  # the residual of a float64 gradient is the solver's own rounding
        plain = al.april_closed_form(model, update, regularization="none")
        assert abs(appendix["predicted_db"](model, update) - plain.predicted_psnr) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_leaving_out_at_once_is_leaving_out_one_by_one(appendix: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 4), (9,)))
    solution = {e.check: e.solution for e in tools.exercises(tools.read("A1"))}["check_left_out"]
    slowly = tools.function_of(solution, "left_out")(A, b, 0.3)
    assert torch.allclose(appendix["left_out_at_once"](A, b, 0.3), slowly)


@pytest.mark.parametrize("damping", [1e-3, 0.5, 40.0])
def test_cross_validation_of_a_diagonal_system_is_flat_and_gcv_is_not(
    appendix: dict[str, Any], damping: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(12, generator=generator, dtype=torch.float64)
    A = torch.eye(12, 5, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1])
    assert torch.allclose(appendix["left_out_at_once"](A, b, damping), b)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    score = appendix["toy_gcv"](A, b, damping)
    assert appendix["toy_gcv"](Q @ A, Q @ b, damping) == pytest.approx(score)
    assert appendix["toy_gcv"](A, b, 2 * damping) != pytest.approx(score)
