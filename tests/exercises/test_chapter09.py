"""Chapter 09's checks against the notebook's own stubs and solutions, and against the
mistakes people make.
"""

import notebook_tools as tools
import pytest
from exercise_tests import exercise_tests

from aprillab.exercises import chapter09

SOLVED = "torch.linalg.lstsq(dE.T, dW).solution"
TRAINED = "[name for name, m in moved.items() if m.any()]"
TOP = "float(top / sum(gradient[name].double().square().sum() for name in trained))"
UNDECAYED = "torch.linalg.lstsq((dE - a * E).double().T, (dW - a * W).double()).solution"
ALL = "rate * decay * (1 + c_1), c_1, 1.0"
RELATIVE = "float((dW - dE.T @ X).norm() / dW.norm())"
STEP = "((1 - rate * decay) * before - after) / rate"
BACK = "eps * r / (1 - r.abs())"
MUTANTS = [
    ("check_patches_and_label", "db.argmax()", "db.argmin()", "most negative entry"),
    ("check_patches_and_label", "db.argmax()", "db.abs().argmin()", "grew"),
    ("check_patches_and_label", SOLVED, f"-{SOLVED}", "sign turned"),
    ("check_patches_and_label", SOLVED, f"{SOLVED}.T", "transpose"),
    ("check_patches_and_label", SOLVED, "torch.linalg.lstsq(dE.T / 0.1, dW).solution", "learning rate in it"),
    ("check_patches_and_label", "return X, int(db.argmax())", "return X", "Return 2 things"),
    ("check_learning_rate", TRAINED, "list(moved)", "frozen tensor"),
    ("check_learning_rate", TOP, f"1 / {TOP}", "one over it"),
    ("check_learning_rate", TOP, f"-{TOP}", "sign is turned"),
    ("check_learning_rate", TOP, "float(torch.cat([moved[n] / gradient[n] for n in trained]).mean())",
     "smallest gradients decide"),
    ("check_learning_rate", TOP, "float(torch.cat([moved[n] / gradient[n] for n in moved]).mean())",
     "counts what is frozen"),
    ("check_learning_rate", TOP, "sum(float(moved[n] @ gradient[n] / gradient[n].square().sum()) for n in moved) / 3",
     "frozen tensor"),
    ("check_without_decay", UNDECAYED, "torch.linalg.lstsq(dE.T, dW).solution", "still in both"),
    ("check_without_decay", UNDECAYED, "torch.linalg.lstsq((dE - dE.mean(1, keepdim=True)).T, dW).solution",
     "find a first"),
    ("check_without_decay", "(left @ known) / (known @ known)", "(dE * E).sum() / (E * E).sum()", "M has a share"),
    ("check_without_decay", "(dE - a * E)", "dE", "still in dE"),
    ("check_without_decay", "(dW - a * W)", "dW", "still in dW"),
    ("check_without_decay", "a = (left", "a = -(left", "were added"),
    ("check_without_decay", "dE.double().sum(1), E.double().sum(1)", "dE.double().sum(0), E.double().sum(0)",
     "over a token's features"),
    ("check_two_steps", ALL, "rate * decay * (1 + c_1), 1.0, c_1", "changed places"),
    ("check_two_steps", "1 + momentum - rate * decay", "1 + momentum", "in c_1 as well"),
    ("check_two_steps", "1 + momentum - rate * decay", "1 - rate * decay", "momentum is missing"),
    ("check_two_steps", ALL, "1 - (1 - rate * decay) ** 2, c_1, 1.0", "without momentum"),
    ("check_two_steps", ALL, "rate * decay * (2 + momentum), c_1, 1.0", "that the first has shrunk"),
    ("check_two_steps", ALL, "rate * decay, c_1, 1.0", "in the second step as well"),
    ("check_two_steps", ALL, "rate * decay * (1 + c_1), rate * c_1, rate", "in front of the bracket"),
    ("check_two_steps", ALL, "rate * decay * (1 + c_1), c_1, 1 - rate * decay", "nothing shrinks"),
    ("check_two_steps", ALL, "rate * decay * (1 + c_1)", "Return 3 things"),
    ("check_two_steps", ALL, "1 - rate * decay * (1 + c_1), c_1, 1.0", "left of the old weight"),
    ("check_holds_one", RELATIVE, "float((dW - dE.T @ X).norm())", "smallest learning rate"),
    ("check_holds_one", RELATIVE, "float(dW.norm())", "smallest learning rate"),
    ("check_holds_one", 'float("inf")', "0.0", "did nothing"),
    ("check_holds_one", "return min(range", "return 1 + min(range", "photographs"),
    ("check_holds_one", "return min(range", "return max(range", "photographs"),
    ("check_holds_one", "return min(range(len(mail)), key=residuals.__getitem__)", "return min(residuals)",
     "should be an int"),
    ("check_first_gradient", BACK, "r", "r itself"),
    ("check_first_gradient", BACK, "eps * r / (1 - r)", "not r"),
    ("check_first_gradient", BACK, "r / (1 - r.abs())", "ε is missing"),
    ("check_first_gradient", BACK, "eps * r / (1 + r.abs())", "1 − |r|"),
    ("check_first_gradient", BACK, f"-{BACK}", "wrong sign"),
    ("check_first_gradient", STEP, "(before - after) / rate", "still in it"),
    ("check_first_gradient", STEP, "(before - after / (1 - rate * decay)) / rate", "wrong weights"),
    ("check_first_gradient", STEP, f"rate * ({STEP})", "divide the step"),
    ("check_first_gradient", STEP, "((1 + rate * decay) * before - after) / rate", "counted twice"),
    ("check_first_gradient", STEP, "((1 - decay) * before - after) / rate", "learning rate is missing in the decay"),
    ("check_first_gradient", STEP, "(before - after) / rate - decay * after", "after the step"),
    ("check_first_gradient", f"r = {STEP}\n    return {BACK}",
     f"r = (before - after) / rate\n    return {BACK} - decay * before", "no part of its gradient"),
]  # fmt: skip

SEARCHED = """import torch
    from scipy.optimize import minimize_scalar
    dW, dE, W, E = (t.double() for t in (dW, dE, W, E))
    def solved(a):
        return torch.linalg.lstsq((dE - a * E).T, dW - a * W).solution
    def left(a):
        return float((dW - a * W - (dE - a * E).T @ solved(a)).norm() / (dW - a * W).norm())
    start = min((k / 200 for k in range(201)), key=left)
    options = {"xatol": 1e-13}
    return solved(minimize_scalar(left, bounds=(start - 0.01, start + 0.01), method="bounded", options=options).x)
"""

TRAINED_ENTRIES = "m, g = (torch.cat([x[k] for k in moved if moved[k].any()]) for x in (moved, gradient))\n    "

TestExercises = exercise_tests(
    chapter09,
    MUTANTS,
    right=[
        ("check_patches_and_label", "return (-torch.linalg.pinv(dE.T) @ -dW, (-db).argmin())"),
        ("check_learning_rate", TRAINED_ENTRIES + "return (m.norm() / g.norm()).item()"),
        ("check_learning_rate", TRAINED_ENTRIES + "return (m / g).median()"),
        ("check_without_decay", SEARCHED),
        ("check_first_gradient", "r = (before - after) / rate - decay * before\n"
         "    return r.sign() * eps / (1 / r.abs() - 1)"),
    ],
)  # fmt: skip


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_reference_of_two_steps_is_torchs(momentum: float) -> None:
    a, first, second = chapter09._by_torch(0.1, momentum, 0.2)
    assert (first, second) == pytest.approx((1 + momentum - 0.02, 1.0))
    assert a == pytest.approx(0.02 * (2 + momentum - 0.02))


def test_only_one_client_of_the_mail_fits() -> None:
    order = (3, 5, 4, 1, 0, 2)
    left = [chapter09._left(*pair) / max(float(pair[0].norm()), 1e-30) for pair in chapter09._mail(order, 1)]
    assert left[0] == 0.0  # it did nothing
    assert left[5] < 1e-6 < 0.1 < min(left[1:5])


def test_the_three_lines_are_those_that_are_tested() -> None:
    """tests/federation runs Flower's quickstart with them."""

    def added(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("+") and not line.startswith("+++")]

    tested = (tools.ROOT / "tests/federation/quickstart/three_lines.diff").read_text(encoding="utf-8")
    text = "\n".join(cell.source for cell in tools.read("09").cells)
    shown = text.partition("```diff\n")[2].partition("```")[0]
    assert added(shown) == added(tested)
    assert len(added(shown)) == 3
