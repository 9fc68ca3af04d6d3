"""Chapter 11's checks against the notebook's own stubs and solutions, and against the
mistakes people make.
"""

import math

import pytest
import torch
from exercise_tests import exercise_tests

from aprillab.exercises import chapter11
from aprillab.privacy import epsilon

CLIPPED = "(gradients * (C / norms.clamp_min(C))).sum(0)"
WITHIN = "math.floor((sigma / one) ** 2)"
NOISE = "photographs * rounds**0.5 * one"
NEAREST = "distance = sum((rows - y).square().sum(1) for y, rows in rounds)\n    return int(distance.argmin())"
KEPT = "kept = column != 0"
FITS = 'if al.privacy.epsilon(z, rounds=offer["rounds"]) <= most_epsilon:'
MUTANTS = [
    ("check_clipped_sum", CLIPPED, "gradients.sum(0)", "none was clipped"),
    ("check_clipped_sum", CLIPPED, "(lambda s: s * min(1.0, C / float(s.norm())))(gradients.sum(0))",
     "clipped the sum"),
    ("check_clipped_sum", CLIPPED, "(lambda s: s * min(1.0, C / float(s.norm())))(gradients.mean(0))",
     "clipped the mean"),
    ("check_clipped_sum", CLIPPED, "(gradients * (C / norms.clamp_min(1e-12))).sum(0)", "made longer"),
    ("check_clipped_sum", CLIPPED, "(gradients * (C / norms)).sum(0)", "NaN"),
    ("check_clipped_sum", CLIPPED, "gradients.clamp(-C, C).sum(0)", "each entry"),
    ("check_clipped_sum", ".sum(0)", ".mean(0)", "That is the mean"),
    ("check_clipped_sum", CLIPPED, "gradients * (C / norms.clamp_min(C))", "should have shape"),
    ("check_rounds_within", WITHIN, "math.floor(epsilon / al.privacy.epsilon(sigma, delta=delta))",
     "does not add up"),
    ("check_rounds_within", WITHIN, "math.floor((epsilon / al.privacy.epsilon(sigma, delta=delta)) ** 2)",
     "root of T either"),
    ("check_rounds_within", WITHIN, "math.floor(sigma / one)", "square of σ"),
    ("check_rounds_within", WITHIN, "math.floor((one / sigma) ** 2)", "one over it"),
    ("check_rounds_within", WITHIN, "math.floor((sigma / (2 * one)) ** 2)", "replacing one"),
    ("check_rounds_within", WITHIN, "math.ceil((sigma / one) ** 2)", "would cost"),
    ("check_rounds_within", WITHIN, "(sigma / one) ** 2", "should be an int"),
    ("check_noise_for", NOISE, "photographs * one", "rounds are missing"),
    ("check_noise_for", NOISE, "rounds**0.5 * one", "photographs are missing"),
    ("check_noise_for", NOISE, "(photographs * rounds) ** 0.5 * one", "√k"),
    ("check_noise_for", NOISE, "photographs * rounds * one", "with their root"),
    ("check_noise_for", NOISE, "rounds**0.5 * one / photographs", "not less"),
    ("check_noise_for", NOISE,
     "al.privacy.noise_multiplier(epsilon / photographs, rounds=rounds, delta=delta)", "k-th part"),
    ("check_who", NEAREST, NEAREST.replace("argmin", "argmax"), "farthest away"),
    ("check_who", NEAREST, "y, rows = rounds[-1]\n    return int((rows - y).norm(dim=1).argmin())", "single round"),
    ("check_who", NEAREST, "y, rows = rounds[0]\n    return int((rows - y).norm(dim=1).argmin())", "first round"),
    ("check_who", NEAREST, "return int(sum(rows @ y for y, rows in rounds).argmax())", "favour long"),
    ("check_who", NEAREST,
     "votes = [int((rows - y).norm(dim=1).argmin()) for y, rows in rounds]\n"
     "    return max(set(votes), key=votes.count)", "vote"),
    ("check_who", NEAREST,
     "mean = torch.stack([y for y, _ in rounds]).mean(0)\n"
     "    return int((rounds[0][1] - mean).norm(dim=1).argmin())", "averaged what arrived"),
    ("check_who", NEAREST,
     "y, rows = (torch.stack(x).mean(0) for x in zip(*rounds))\n"
     "    return int((rows - y).norm(dim=1).argmin())", "before you compared"),
    ("check_who", NEAREST, NEAREST.replace(".square().sum(1)", ".norm(dim=1)"), "squared distances, 0.09"),
    ("check_unpruned", KEPT, "kept = torch.ones_like(column, dtype=torch.bool)", "at their word"),
    ("check_unpruned", KEPT, "kept = (dW != 0).any(1)", "still taken at their word"),
    ("check_unpruned", KEPT, "kept = (dW != 0).all(1)", "too few"),
    ("check_unpruned", KEPT, "kept = (dW != 0).sum(1).argsort(descending=True)[: len(G)]", "same rows"),
    ("check_unpruned", "return torch.stack(columns, 1)", "return torch.stack(columns)", "transpose"),
    ("check_choose", "if z is None or low < least_accuracy:\n            continue\n        " + FITS,
     "if low < least_accuracy:\n            continue\n        "
     "if z is None or al.privacy.epsilon(z, rounds=offer[\"rounds\"]) <= most_epsilon:", "promises nothing"),
    ("check_choose", FITS, "if al.privacy.epsilon(z) <= most_epsilon:", "were the rounds counted"),
    ("check_choose", '- offer["half"]', "", "lower end"),
    ("check_choose", "low < least_accuracy", 'offer["accuracy"] < least_accuracy', "lower end"),
    ("check_choose", "max(fitting)", "min(fitting)", "more accuracy"),
    ("check_choose", "if fitting else None", "if len(fitting) > 1 else None", "there is an offer"),
    ("check_choose", "max(fitting)[1]", "max(fitting)[0]", "name or None"),
]  # fmt: skip

BISECTED = """low, high = 0, 10**9
    while high - low > 1:
        middle = (low + high) // 2
        fits = al.privacy.epsilon(sigma, rounds=middle, delta=delta) <= epsilon
        low, high = (middle, high) if fits else (low, middle)
    return low
"""

TestExercises = exercise_tests(
    chapter11,
    MUTANTS,
    right=[
        ("check_clipped_sum", "rows = [g * min(1.0, C / max(float(g.norm()), 1e-30)) for g in gradients]\n"
         "    return torch.stack(rows).sum(0)"),
        ("check_rounds_within", BISECTED),
        ("check_noise_for", "return photographs * al.privacy.noise_multiplier(epsilon, rounds=rounds, delta=delta)"),
        ("check_who", "total = sum(rows @ y - rows.square().sum(1) / 2 for y, rows in rounds)\n"
         "    return total.argmax()"),
        ("check_unpruned", "return torch.stack([torch.linalg.pinv(G.T[k]) @ w[k] for w in dW.T "
         "for k in [w.nonzero().squeeze(1)]], 1)"),
    ],
)  # fmt: skip


@pytest.mark.parametrize("seed", chapter11._SEEDS_OF_WHO)
def test_all_rounds_name_the_right_one_and_mistakes_another(seed: int) -> None:
    wanted, rounds = chapter11._watched(seed)
    distance = sum((rows - y).square().sum(1) for y, rows in rounds)
    first, second = distance.topk(2, largest=False).values
    assert int(distance.argmin()) == wanted
    assert second - first > 1  # not by a hair
    assert wanted not in chapter11._answers(rounds).values()


def test_pruned_columns_have_equations_to_spare() -> None:
    for seed in (0, 100):
        X, dW, G = chapter11._pruned(seed)
        kept = dW != 0
        assert kept.sum(0).min() > 2 * len(G)
        assert float(kept.double().mean()) == pytest.approx(0.4, abs=0.01)
        assert torch.allclose(dW[kept], (G.T @ X)[kept])


def test_each_offer_is_there_for_a_mistake() -> None:
    offers = {offer["name"]: offer for offer in chapter11.OFFERS}
    z = {name: offer["noise_multiplier"] for name, offer in offers.items()}
    assert offers["pruning"]["accuracy"] == max(o["accuracy"] for o in offers.values())
    assert epsilon(z["mild"]) < 4 < epsilon(z["mild"], rounds=100)
    assert offers["uneven"]["accuracy"] > offers["even"]["accuracy"]
    assert offers["uneven"]["accuracy"] - offers["uneven"]["half"] < 88 < offers["even"]["accuracy"] - 0.6
    assert all(math.isfinite(o["attack_db"]) for o in offers.values())
