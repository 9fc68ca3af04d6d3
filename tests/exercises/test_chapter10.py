"""Chapter 10's checks against the notebook's own stubs and solutions, and against the
mistakes people make.
"""

import notebook_tools as tools
import pytest
from exercise_tests import exercise_tests

from aprillab import VisionTransformer, leak_map
from aprillab.exercises import chapter10

EXERCISES = {exercise.check: exercise for exercise in tools.exercises(tools.read("10"))}

EQUATIONS = "width - (patches + prefix) - 1"
UNKNOWNS = "min(pixels, patches) if patch_trained else pixels"
LETTERS = '{"B", "C", "E"}'
LEFT, RIGHT = "G.T / noise", "dW / noise"
CEILING = "1 + -(-tokens // (rank * factors))"
TOKENS = "tokens = pictures * patches"
SOLVED = "left(rounds[:t] + rounds[t + 1 :])"
OUTSIDE = "(features - features @ V.T @ V).norm(dim=1) / features.norm(dim=1)"
ALL_AT_ONCE = """G = torch.cat([G.T for G, _ in rounds])
    dW = torch.cat([dW for _, dW in rounds])
    X = torch.linalg.lstsq(G, dW).solution
    return max(range(6), key=lambda t: (rounds[t][1] - rounds[t][0].T @ X).norm() / rounds[t][1].norm())
    """
ONE_BY_ONE = "sum(torch.linalg.lstsq(G.T, dW, driver='gelsd').solution for G, dW in rounds) / len(rounds)"
SUMMED = "torch.linalg.lstsq(sum(G for G, _ in rounds).T, sum(dW for _, dW in rounds), driver='gelsd').solution"
NORMAL = "torch.linalg.solve(left.T @ left, left.T @ right)"
FORETOLD = """def missed(t):
        G, dW = (torch.cat(x) for x in zip(*((G.T, dW) for G, dW in rounds[:t] + rounds[t + 1 :])))
        G_t, dW_t = rounds[t]
        return (dW_t - G_t.T @ torch.linalg.lstsq(G, dW).solution).norm() / dW_t.norm()
    return max(range(6), key=missed)
    """
STACKED = "torch.linalg.lstsq(left, right).solution"
MUTANTS = [
    ("check_span_rounds", EQUATIONS, "width - (patches + prefix)", "LayerNorm's mean"),
    ("check_span_rounds", EQUATIONS, "width - (patches + 1) - 1", "fewer than one token"),
    ("check_span_rounds", EQUATIONS, "width - patches - 1", "are in the span as well"),
    ("check_span_rounds", EQUATIONS, "width - 1", "only the rest are equations"),
    ("check_span_rounds", UNKNOWNS, "pixels", "min(p, n) unknowns"),
    ("check_span_rounds", UNKNOWNS, "min(pixels, patches)", "all p pixels are unknown"),
    ("check_span_rounds", "if not patch_trained:", "if False:", "are the same in every round"),
    ("check_span_rounds", "if not patch_trained:", "if True:", "equations of its own"),
    ("check_span_rounds", "-(-unknowns // equations)", "unknowns // equations", "round up"),
    ("check_span_rounds", "if equations <= 0:", "if False:", "leaves no equation"),
    ("check_span_rounds", "-(-unknowns // equations)", "unknowns / equations", "should be an int"),
    ("check_sets", LETTERS, '{"B", "E"}', "run on C"),
    ("check_sets", LETTERS, '{"C", "E"}', "run on B"),
    ("check_sets", LETTERS, '{"A", "B", "C", "E"}', "run on A"),
    ("check_sets", LETTERS, '{"B", "C", "D", "E"}', "run on D"),
    ("check_sets", LETTERS, '{"B", "C"}', "run on E"),
    ("check_sets", LETTERS, '{"b", "C", "E"}', "letters from A to E"),
    ("check_stack", f"torch.cat([{LEFT}", "torch.cat([G.T", "not right yet"),
    ("check_stack", "/ noise", "* noise", "the worst counts most"),
    ("check_stack", "/ noise", "/ noise**2", "by the deviation"),
    ("check_stack", "/ noise", "/ 1", "count alike"),
    ("check_stack", STACKED, SUMMED, "added up"),
    ("check_stack", STACKED, NORMAL, "digits are lost"),
    ("check_stack", STACKED, ONE_BY_ONE, "averaged"),
    ("check_stack", STACKED, f"{STACKED}.T", "transpose"),
    ("check_rounds", CEILING, "-(-tokens // (rank * factors))", "B is zero"),
    ("check_rounds", CEILING, "1 + tokens // (rank * factors)", "round up"),
    ("check_rounds", CEILING, "1 + -(-tokens // rank)", "every factor A"),
    ("check_rounds", CEILING, "1 + tokens / (rank * factors)", "should be an int"),
    ("check_rounds", TOKENS, "tokens = pictures * patches + prefix", "they are public"),
    ("check_rounds", TOKENS, "tokens = pictures * (patches + prefix)", "public"),
    ("check_rounds", TOKENS, "tokens = patches", "n directions of its own"),
    ("check_odd_round", "def left(some):", f"{ALL_AT_ONCE}def left(some):", "bends that solution"),
    ("check_odd_round", "def left(some):", f"{FORETOLD}def left(some):", "foretells worst"),
    ("check_odd_round", "return min(", "return 1 + min(", "other five still miss"),
    ("check_odd_round", SOLVED, "left([rounds[t]])", "not that one"),
    ("check_odd_round", "return min(", "return max(", "not that one"),
    ("check_odd_round", SOLVED, "-rounds[t][1].norm()", "not that one"),
    ("check_present", "largest=False", "largest=True", "of your candidates are right"),
    ("check_present", "[:pictures]", "[: pictures - 1]", "of your candidates are right"),
    ("check_present", OUTSIDE, "-features.norm(dim=1)", "candidates"),
    ("check_present", OUTSIDE, "(features - features @ V.T @ V).sum(dim=1)", "candidates"),
    ("check_present", OUTSIDE, "-(features @ V[0]).abs() / features.norm(dim=1)", "candidates"),
    ("check_present", ".topk(pictures, largest=False)", ".topk(1, largest=False)", "candidates are asked for"),
    ("check_present", ".indices.tolist()", ".values.tolist()", "whole numbers"),
]  # fmt: skip

TestExercises = exercise_tests(
    chapter10,
    MUTANTS,
    right=[
        ("check_sets", "return ['E', 'C', 'B']"),
        ("check_span_rounds", "room = width - patches - prefix - 1\n"
         "    if not patch_trained:\n        return 1 if pixels <= room else None\n"
         "    return next((T for T in range(1, 10_000) if T * room >= min(pixels, patches)), None)"),
        ("check_present", "V = torch.linalg.svd(gradient.double()).Vh[:pictures]\n"
         "    f = features / features.norm(dim=1, keepdim=True)\n"
         "    return ((f @ V.T).norm(dim=1)).topk(pictures).indices"),
    ],
)  # fmt: skip


@pytest.mark.parametrize("width", [17, 18, 24, 28, 33, 34, 209, 210])
def test_rounds_for_the_span_are_those_of_the_leak_map(width: int) -> None:
    """16 patches of 192 numbers and a class token, by the package's own counts."""
    leaks = leak_map(VisionTransformer(image_size=32, patch_size=8, width=width, depth=2, heads=1, classes=10))
    for row, trained in (("position embedding withheld", True), ("both embeddings frozen", False)):
        assert chapter10.span_rounds(16, 192, width, 1, trained) == leaks[row].rounds, (row, width)


def test_the_five_sets_are_decided_by_attacks() -> None:
    """The text of the exercise says p + n + 2 = 114 ≤ 120; one narrower than the
    count, and B is gone.
    """
    model, sets = chapter10.five_sets()
    assert model.width == 120
    assert set(sets) == set("ABCDE")
    assert chapter10._leaking() == {"B", "C", "E"}


@pytest.mark.parametrize("returned", ["3.0", "True"])
def test_a_round_that_is_no_whole_number_is_said_to_be_none(returned: str) -> None:
    exercise = EXERCISES["check_odd_round"]
    answer = tools.feedback(exercise, chapter10, f"def {exercise.name}(rounds):\n    return {returned}\n")
    assert not answer.passed
    assert "should be an int" in answer.message
