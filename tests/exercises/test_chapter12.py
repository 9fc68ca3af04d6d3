"""Chapter 12's checks against the notebook's own stubs and solutions, and against the
mistakes people make.
"""

import math

import pytest
import torch
from exercise_tests import exercise_tests

from aprillab.exercises import chapter12, detectors

U = "u = (1 / gamma) / (beta / gamma).sum()"
ROW = "W[c] - L * u"
BOUND = "bits * math.log(2) + math.log(N) + float(most) - math.log(K - 1)"
MOST = "w @ beta + len(w) ** 0.5 * (gamma * w).norm()"
MEMBERS = "round(-B * float(bias[-1]))"
BINS = "[round(B * float(low - high)) for low, high in zip(bias[:-1], bias[1:])]"
EQUAL = "return float((weight[:, None] == weight[None]).all(-1).sum(1).max() > 1)\n"
SCORE = "(weight - weight.median(dim=0).values).norm(dim=1)"
SHARE = "s = torch.linalg.svdvals(weight) ** 2\n    return float(s[0] / s.sum()) if s.any() else 0.0\n"
MUTANTS = [
    ("check_without_bias", U, "u = torch.ones_like(beta) / beta.sum()", "γ stretches"),
    ("check_without_bias", U, "u = 1 / gamma", "what the sum then is"),
    ("check_without_bias", U, "u = beta / (beta @ beta)", "β itself"),
    ("check_without_bias", U, "u = torch.ones_like(beta) / len(beta)", "Neither is known"),
    ("check_without_bias", ROW, "W[c] + L * u", "became probable"),
    ("check_without_bias", ROW, "W[c]", "−L is missing"),
    ("check_without_bias", ROW, "-L * u", "w is missing"),
    ("check_without_bias", ROW, "0 * u", "Row c is zero"),
    ("check_without_bias", "torch.zeros_like(W)", "W.clone()", "not zero"),
    ("check_without_bias", "return weight", "return weight.T", "transpose"),
    ("check_strength_for", "math.log(N)", "0", "N of them"),
    ("check_strength_for", "w @ beta + ", "", "w·β is missing"),
    ("check_strength_for", "w @ beta", "(w @ beta).abs()", "has a sign"),
    ("check_strength_for", "(gamma * w).norm()", "w.norm() * gamma.abs().max()", "times the largest γ"),
    ("check_strength_for", "(gamma * w).norm()", "gamma.norm() * w.norm()", "One inequality"),
    ("check_strength_for", BOUND, BOUND + " + 1", "more than is needed"),
    ("check_strength_for", BOUND, BOUND + " - 1", "not enough"),
    ("check_strength_for", "len(w) ** 0.5 * ", "", "not up to 1"),
    ("check_strength_for", "len(w) ** 0.5", "len(w)", "not up to d"),
    ("check_strength_for", "(gamma * w).norm()", "w.norm()", "γ stretches x̂"),
    ("check_strength_for", "bits * math.log(2)", "bits", "natural logarithms"),
    ("check_strength_for", "- math.log(K - 1)", "+ math.log(K - 1)", "is subtracted"),
    ("check_strength_for", " - math.log(K - 1)", "", "classes are missing"),
    ("check_strength_for", "math.log(K - 1)", "math.log(K)", "K − 1 other classes"),
    ("check_strength_for", "w @ beta + len(w) ** 0.5", "w @ beta - len(w) ** 0.5", "largest w·f"),
    ("check_counts", MEMBERS, "round(B * float(bias[-1]))", "−B ∂b_c is left"),
    ("check_counts", MEMBERS, "round(B * float(bias[0]))", "counted there besides"),
    ("check_counts", MEMBERS, "round(-float(bias[-1]))", "times B"),
    ("check_counts", MEMBERS, "int(-B * float(bias[-1]))", "cuts off"),
    ("check_counts", BINS, "[round(B * float(high - low)) for low, high in zip(bias[:-1], bias[1:])]", "the sign"),
    ("check_counts", BINS, BINS + "[::-1]", "the order"),
    ("check_counts", BINS, "[round(B * float(low - bias[-1])) for low in bias[:-1]]", "above each threshold"),
    ("check_counts", BINS, "[round(B * float(low - bias[-1])) for low in bias]", "you returned"),
    ("check_counts", BINS, "[int(B * float(low - high)) for low, high in zip(bias[:-1], bias[1:])]", "cuts off"),
    ("check_counts", BINS, "3", "should be a list"),
    ("check_counts", BINS, "[B * float(low - high) for low, high in zip(bias[:-1], bias[1:])]", "should be an int"),
    ("check_disguised", "weight[c], bias[c] = -v, -L", "weight[c], bias[c] = v, -L", "hardly anything"),
    ("check_disguised", "weight[c], bias[c] = -v, -L", "weight[c], bias[c] = -v, 0.0", "+0.0 against"),
    ("check_disguised", "weight[c], bias[c] = -v, -L", "weight[c], bias[c] = W[c] + v, -L", "Row c has length"),
    ("check_disguised", "v.repeat(len(W), 1)", "torch.zeros_like(W)", "has length 0.000"),
    ("check_disguised", "v.repeat(len(W), 1)", "W / W.norm(dim=1, keepdim=True) * v.norm()", "not the same"),
    ("check_disguised", "return weight, bias", "return weight.T, bias", "transpose"),
    ("check_strangeness", SCORE, "weight.norm(dim=1)", "have in common before"),
    ("check_strangeness", "rows = " + SCORE, SHARE + "    rows = " + SCORE, "changes no probability"),
    ("check_strangeness", "rows = " + SCORE, SHARE.replace("** 2", "** 1") + "    rows = " + SCORE,
     "changes no probability"),
    ("check_strangeness", "return float(rows", EQUAL + "    return float(rows", "to the last digit"),
    ("check_strangeness", "return float(rows", "return float(bias.abs().max())\n    return float(rows",
     "No threshold"),
    ("check_strangeness", "    if not rows.any():\n        return 0.0", "    if False:\n        return 0.0",
     "divided by zero"),
    ("check_strangeness", "        return 0.0", "        return 1e9", "passes anything"),
    ("check_strangeness", "rows = " + SCORE, "return 1.0\n    rows = " + SCORE, "the same for all heads"),
    ("check_strangeness", "rows.max() / rows.median().clamp_min(1e-6 * rows.max())", "rows.max()", "No threshold"),
    ("check_still_true", '"CE"', '"ACE"', "A follows from nothing"),
    ("check_still_true", '"CE"', '"BCE"', "opened with"),
    ("check_still_true", '"CE"', '"CDE"', "knows whose"),
    ("check_still_true", '"CE"', '"C"', "E is true"),
    ("check_still_true", '"CE"', '"E"', "C is true"),
    ("check_still_true", '"CE"', '"CEFG"', "2 letters"),
    ("check_still_true", '"CE"', '"CEG"', "after the operator"),
    ("check_still_true", '"CE"', '"CEX"', "no X"),
    ("check_still_true", '"CE"', "12", "one string"),
]  # fmt: skip

SINGULAR = """rows = weight - weight.mean(0)
    s = torch.linalg.svdvals(rows) ** 2
    return float(len(s) * (s ** 2).sum() / s.sum() ** 2) if s.sum() > 0 else 1.0
"""
CENTRED = """s = torch.linalg.svdvals(weight - weight.mean(0))
    return float(s[0] / s.sum()) if s.any() else 0.0
"""
PAIRS = """apart = torch.cdist(weight, weight)
    apart = apart[~torch.eye(len(apart), dtype=torch.bool)]
    return float(apart.max() / apart.median().clamp_min(1e-6 * apart.max())) if apart.any() else 0.0
"""
ROTATED = """unit = torch.linalg.qr(torch.stack([W[0], W[1]]).T).Q
    length = W.norm(dim=1).median()
    weight, bias = (length * unit[:, 0]).repeat(len(W), 1), b.clone() * 0
    weight[c], bias[c] = length * unit[:, 1], -L
    return weight, bias
"""

TestExercises = exercise_tests(
    chapter12,
    MUTANTS,
    right=[
        ("check_without_bias", "u = torch.linalg.pinv((1 / gamma)[None])[:, 0] * 0 + 1 / gamma\n"
         "    weight = torch.zeros_like(W)\n    weight[c] = W[c] - L * u / (u @ beta)\n    return weight"),
        ("check_counts", "above = (B * (bias - bias[-1])).round().int()\n"
         "    return int(-(B * bias[-1]).round()), (above[:-1] - above[1:]).tolist()"),
        ("check_strength_for", "v = gamma * w\n    most = w @ beta + len(w) ** 0.5 * (v - v.mean()).norm()\n"
         "    return bits * 0.6931471805599453 + math.log(N / (K - 1)) + float(most)"),
        ("check_counts", "import numpy as np\n    above = np.round(B * (bias - bias[-1]).numpy()).astype(int)\n"
         "    return np.int64(round(-B * float(bias[-1]))), above[:-1] - above[1:]"),
        ("check_counts", "return (-B * bias[-1]).round(), (B * (bias[:-1] - bias[1:])).round()"),
        ("check_disguised", ROTATED),
        ("check_strangeness", SINGULAR),
        ("check_strangeness", CENTRED),
        ("check_strangeness", PAIRS),
        ("check_still_true", 'return "e, c"'),
    ],
)  # fmt: skip


def test_the_disguised_head_of_the_check_is_fished() -> None:
    """What the detector's check calls fished lets class c alone pass."""
    for name, heads in detectors._fished_heads().items():
        for weight, bias in heads:
            K, d = weight.shape
            f = torch.nn.functional.normalize(detectors.drawn(200, d, seed=5), dim=1) * 3
            if "12.1" in name:
                f = chapter12._features(*detectors.norm_of(d, K // 3), 200, 5)
            y = torch.arange(200) % K
            passed = chapter12._passed(weight, bias, f, y)
            c = K // 3
            assert passed[y == c].min() > 2 * passed[y != c].max(), name


@pytest.mark.parametrize("scale_free", [True, False])
def test_success_says_how_the_detector_is_evaded(scale_free: bool) -> None:
    def score(weight: torch.Tensor, bias: torch.Tensor) -> float:
        rows = (weight - weight.median(dim=0).values).norm(dim=1)
        if not rows.any():
            return 0.0
        ratio = float(rows.max() / rows.median().clamp_min(1e-9))
        return ratio if scale_free else max(ratio, 4.0 if rows.median() > 5 else 0.0)

    answer = chapter12.check_strangeness(score)
    assert answer.passed, answer.message
    assert ("you let it pass" in answer.message) == scale_free
    assert ("you object" in answer.message) == (not scale_free)


def test_strength_is_enough_for_any_features() -> None:
    """The bound of exercise 12.2 holds for drawn features, with room."""
    w, (gamma, beta) = detectors.drawn(64, seed=3), detectors.norm_of(64, 4)
    K, N, bits = 100, 799, 24
    L = bits * math.log(2) + math.log(N) + float(w @ beta + 8 * (gamma * w).norm()) - math.log(K - 1)
    f = chapter12._features(gamma, beta, N, 5)
    assert float((f @ w - L).exp().sum() / (K - 1)) <= 2.0**-bits
