"""Checks for chapter 11: clipping, noise and what both are worth.

References are the package's own accountant and drawn matrices; nothing is trained here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..privacy import epsilon as epsilon_of
from ..privacy import noise_multiplier as noise_multiplier_of
from .feedback import Feedback, expect_close, expect_number, expect_tensor, expect_whole, run, stop

F64 = torch.float64
Offer = Mapping[str, Any]
Rounds = list[tuple[Tensor, Tensor]]  # what arrived (P,), and each candidate's gradient (M, P)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _near(answer: float, wanted: float, tolerance: float = 1e-3) -> bool:
    return abs(answer - wanted) <= tolerance * abs(wanted)


# --- 11.1: clip each image's gradient -------------------------------------------------------------------------------


def check_clipped_sum(function: Callable[[Tensor, float], Tensor]) -> Feedback:
    """Exercise 11.1: ``function(gradients, C)`` is the sum of the rows, each clipped to C."""

    def check() -> str:
        for seed, (images, entries, C) in enumerate(((5, 8, 1.0), (3, 20, 0.5))):
            rows = _random(images, entries, seed=seed)
            rows *= (C * torch.linspace(0.2, 3.0, images, dtype=F64) / rows.norm(dim=1))[:, None]
            rows[1] = 0.0  # a picture that the model is sure of
            answer = expect_tensor(function(rows.clone(), C), (entries,), "The sum")
            norms = rows.norm(dim=1, keepdim=True)
            clipped = rows * (C / norms.clamp_min(C))
            mistakes = {
                "That is the sum of the gradients as they are: none was clipped.": rows.sum(0),
                "You clipped the sum. Then one image can turn all of it: clip each row before you add.": rows.sum(0)
                * (C / rows.sum(0).norm().clamp_min(C)),
                "You clipped the mean of the images. Clip each row, and add.": rows.mean(0)
                * (C / rows.mean(0).norm().clamp_min(C)),
                "Short gradients were made longer: only those with a norm above C are scaled.": (
                    rows * (C / norms.clamp_min(1e-12))
                ).sum(0),
                "You clipped each entry to [−C, C]. It is the norm of the whole row that counts.": rows.clamp(
                    -C, C
                ).sum(0),
                "That is the mean. The noise is measured against the sum.": clipped.mean(0),
            }
            expect_close(answer, clipped.sum(0), "The sum", mistakes=mistakes, tolerance=1e-9)
        return "Right: whatever one image is, it moves this sum by C at most."

    return run(check)


# --- 11.2: how many rounds a budget allows --------------------------------------------------------------------------


def check_rounds_within(function: Callable[[float, float, float], int]) -> Feedback:
    """Exercise 11.2: ``function(sigma, epsilon, delta)`` is the greatest number of rounds
    within the budget.
    """

    def check() -> str:
        for sigma, budget, delta in ((5.0, 10.0, 1e-5), (1.0, 3.0, 1e-5), (40.0, 8.0, 1e-6), (3000.0, 3.0, 1e-5)):
            answer = expect_whole(function(sigma, budget, delta), "The number of rounds")
            one, spent = noise_multiplier_of(budget, delta=delta), epsilon_of(sigma, delta=delta)
            exact = (sigma / one) ** 2
            wanted = math.floor(exact)
            if answer == wanted or (abs(exact - round(exact)) < 1e-6 and answer == round(exact)):
                continue
            looks = {
                "ε of rounds does not add up, μ² does. That bound is true, and allows far too few": budget // spent,
                "ε does not grow with the root of T either; μ does": (budget / spent) ** 2,
                "μ grows with the root of T, so T with the square of σ": sigma / one,
                "that is one over it": one**2 / sigma**2,
                "with one image more or less the sum moves by C. 2C is what replacing one takes": exact / 4,
            }
            hint = next((f": {words}" for words, value in looks.items() if answer == math.floor(value)), "")
            case = f"For σ = {sigma:g}, ε = {budget:g} and δ = {delta:g}"
            if not hint and answer > wanted:
                rounds = f"{answer} round{'s' if answer > 1 else ''}"
                hint = f": {rounds} would cost {epsilon_of(sigma, rounds=answer, delta=delta):.5g}"
            stop(f"{case} it is {wanted}, not {answer}{hint}.")
        return "Right: the budget is one of μ², and each round takes 1/σ² of it."

    return run(check)


# --- 11.3: σ for a person with several photographs ------------------------------------------------------------------


def check_noise_for(function: Callable[[float, int, int, float], float]) -> Feedback:
    """Exercise 11.3: ``function(epsilon, rounds, photographs, delta)`` is the σ that a person's ε
    needs.
    """

    def check() -> str:
        for wanted_epsilon, rounds, photographs, delta in ((3.0, 1, 1, 1e-5), (3.0, 100, 4, 1e-5), (8.0, 1, 9, 1e-6)):
            answer = expect_number(function(wanted_epsilon, rounds, photographs, delta), "σ")
            one = noise_multiplier_of(wanted_epsilon, delta=delta)
            wanted = one * math.sqrt(rounds) * photographs
            if _near(answer, wanted):
                continue
            looks = {
                "the rounds are missing": one * photographs,
                f"the photographs are missing: with all of them gone the sum moves by up to {photographs}·C": one
                * math.sqrt(rounds),
                "photographs do not add up like noise. They may all point one way: k·C, not √k·C": one
                * math.sqrt(rounds * photographs),
                "rounds add up with their root": one * rounds * photographs,
                "more photographs need more noise, not less": one * math.sqrt(rounds) / photographs,
                "ε of a person is no k-th part of it for each photograph: with δ that is not so, and for large ε it "
                "asks too much": noise_multiplier_of(wanted_epsilon / photographs, rounds=rounds, delta=delta),
            }
            hint = next((f": {words}" for words, value in looks.items() if _near(answer, value)), "")
            stop(
                f"For ε = {wanted_epsilon:g}, T = {rounds}, {photographs} photograph(s) and δ = {delta:g}, σ is "
                f"{wanted:.4g}, not {answer:.4g}{hint}."
            )
        return "Right: a person with k photographs is k images at once, and the noise has to hide all of them."

    return run(check)


# --- 11.4: who was it, from T noisy rounds --------------------------------------------------------------------------

_CANDIDATES, _ENTRIES, _ROUNDS = 24, 40, 30  # whom to choose from; of a gradient; T
_SEEDS_OF_WHO = (0, 29, 6)  # each mistake names wrong ones, and no two the same three


def _watched(seed: int, sigma: float = 0.45) -> tuple[int, Rounds]:
    """The right candidate, and T rounds: what arrived, and every candidate's clipped
    gradient at those weights.

    One other, its twin, has nearly the same direction in every round, and is longer.
    """
    rounds, wanted = [], (7 * seed + 3) % _CANDIDATES
    twin = (wanted + 4) % _CANDIDATES
    common = _random(_CANDIDATES, _ENTRIES, seed=seed)
    for t in range(_ROUNDS):
        rows = _random(_CANDIDATES, _ENTRIES, seed=1000 * seed + 2 * t + 50) + 0.1 * common
        rows[twin] = rows[wanted] + 0.1 * rows[twin]
        rows = torch.nn.functional.normalize(rows, dim=1)
        rows[torch.arange(_CANDIDATES) % 3 == wanted % 3] *= 0.5
        rounds.append((rows[wanted] + sigma * _random(_ENTRIES, seed=1000 * seed + 2 * t + 51), rows))
    return wanted, rounds


def _two_rounds() -> Rounds:
    """Two candidates: the first has the smaller sum of distances, the second that of their squares."""
    y = torch.zeros(2, dtype=torch.float64)
    return [(y, torch.tensor(rows, dtype=y.dtype)) for rows in ([[0, 0], [0.2, 0]], [[0, 0.3], [0, 0.2]])]


def _answers(rounds: Rounds) -> dict[str, int]:
    """What mistakes would name."""
    scores = torch.stack([rows @ y for y, rows in rounds])  # (T, M)
    squares = torch.stack([rows.square().sum(1) for _, rows in rounds])
    each = scores - squares / 2
    mean = torch.stack([y for y, _ in rounds]).mean(0)
    mean_rows = torch.stack([rows for _, rows in rounds]).mean(0)
    return {
        "you named the candidate that is farthest away": int(each.sum(0).argmin()),
        "you used a single round. Noise hides it there: add up what all rounds say": int(each[-1].argmax()),
        "you used the first round alone. Noise hides it there: add up what all rounds say": int(each[0].argmax()),
        "you took inner products alone, and those favour long gradients. Compare distances": int(
            scores.sum(0).argmax()
        ),
        "you let every round vote. Votes forget how sure a round was: add up squared distances": int(
            each.argmax(1).bincount(minlength=each.shape[1]).argmax()
        ),
        "you averaged what arrived and compared it with one round's candidates. The weights moved, and the "
        "candidates' gradients with them": int((rounds[0][1] - mean).norm(dim=1).argmin()),
        "you averaged what arrived, and each candidate's gradients, before you compared. Distances of the means "
        "forget what the rounds say one by one": int((mean_rows - mean).norm(dim=1).argmin()),
        "you compared directions alone. A short gradient says who it is by its length, too": int(
            (scores / squares.sqrt()).sum(0).argmax()
        ),
    }


def check_who(function: Callable[[Rounds], int]) -> Feedback:
    """Exercise 11.4: ``function(rounds)`` is the number of the candidate whose picture
    all rounds were of.
    """

    def check() -> str:
        cases = [_watched(seed) for seed in _SEEDS_OF_WHO]
        answers = [
            expect_whole(function([(y.clone(), rows.clone()) for y, rows in rounds]), "The candidate")
            for _, rounds in cases
        ]
        mistakes = [_answers(rounds) for _, rounds in cases]
        hints = [words for words in mistakes[0] if answers == [named[words] for named in mistakes]]
        for answer, (wanted, _) in zip(answers, cases, strict=True):
            if not 0 <= answer < _CANDIDATES:
                stop(f"There are candidates 0 to {_CANDIDATES - 1}, and no {answer}.")
            if answer != wanted:
                stop(f"It was candidate {wanted}, not {answer}{''.join(f': {words}' for words in hints[:1])}.")
        if expect_whole(function(_two_rounds()), "The candidate") != 1:
            stop(
                "In two rounds candidate 0 was at distances of 0 and 0.3, candidate 1 at 0.2 and 0.2. The second is "
                "more probable: log-likelihoods have squared distances, 0.09 and 0.08."
            )
        return "Right: squared distances add up over rounds as log-likelihoods do, and noise averages away."

    return run(check)


# --- 11.5: break top-k pruning --------------------------------------------------------------------------------------


def _pruned(seed: int, n: int = 5, d: int = 60, p: int = 12, keep: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """X, and ∂W of which only the largest entries are left, with all of G."""
    X, G = torch.nn.functional.normalize(_random(n, p, seed=seed), dim=0), _random(n, d, seed=seed + 1)
    dW = G.T @ X
    least = dW.abs().flatten().kthvalue(round((1 - keep) * dW.numel())).values
    return X, torch.where(dW.abs() > least, dW, 0.0), G


def check_unpruned(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 11.5: ``function(dW, G)`` is X, where dW's small entries were set to zero."""

    def check() -> str:
        for seed in (0, 1):
            X, dW, G = _pruned(100 * seed)
            answer = expect_tensor(function(dW.clone(), G.clone()), tuple(X.shape), "X")
            kept, some, whole = dW != 0, (dW != 0).any(1), (dW != 0).all(1)
            most = kept.sum(1).argsort(descending=True)[: len(G)]
            mistakes = {
                "The zeros are taken at their word: an entry that was pruned says nothing, so drop its equation.": (
                    torch.linalg.lstsq(G.T, dW).solution
                ),
                "You dropped the rows that are zero throughout. The zeros of all other rows are still taken at their "
                "word: choose rows for each column by itself.": torch.linalg.lstsq(G.T[some], dW[some]).solution,
                "You kept the rows that no column was pruned in, and there are too few. Choose rows for each column "
                "by itself.": torch.linalg.lstsq(G.T[whole], dW[whole]).solution,
                "You kept the same rows for all pixels. Each column of ∂W was pruned at places of its own.": (
                    torch.linalg.lstsq(G.T[most], dW[most]).solution
                ),
            }
            if int(whole.sum()) >= len(G):  # never with these sizes, unless somebody changes them
                raise RuntimeError("too many rows were left whole")
            expect_close(answer, X, "X", mistakes=mistakes, tolerance=1e-6)
        return "Right: of 60 equations a pixel some 24 are left, 5 would do, and what is left is exact."

    return run(check)


# --- 11.6: the figure, read for a hospital --------------------------------------------------------------------------

#: What vendors offer a hospital. "noise_multiplier" None: nothing is promised.
OFFERS: tuple[Offer, ...] = (
    {"name": "pruning", "noise_multiplier": None, "rounds": 100, "accuracy": 97.0, "half": 0.5, "attack_db": 8.0},
    {"name": "mild", "noise_multiplier": 2.0, "rounds": 100, "accuracy": 95.0, "half": 0.4, "attack_db": 9.0},
    {"name": "uneven", "noise_multiplier": 19.0, "rounds": 100, "accuracy": 91.0, "half": 4.0, "attack_db": 9.0},
    {"name": "even", "noise_multiplier": 16.0, "rounds": 100, "accuracy": 90.0, "half": 0.6, "attack_db": 9.0},
    {"name": "strong", "noise_multiplier": 60.0, "rounds": 100, "accuracy": 80.0, "half": 1.0, "attack_db": 9.0},
)


def check_choose(function: Callable[[Sequence[Offer], float, float], str | None]) -> Feedback:
    """Exercise 11.6: ``function(offers, least_accuracy, most_epsilon)`` is the offer's name, or
    None.
    """

    def check() -> str:
        for least, most in ((88.0, 4.0), (90.5, 4.0), (75.0, 4.0), (75.0, 1.0), (93.0, 4.0), (75.0, 0.1)):
            answer = function([dict(offer) for offer in OFFERS], least, most)
            if answer is ...:
                stop("Nothing was returned yet. Is there a return at the end?")
            if answer is not None and not isinstance(answer, str):
                stop(f"Return an offer's name or None, not a {type(answer).__name__}.")
            names = [offer["name"] for offer in OFFERS]
            if answer is not None and answer not in names:
                stop(f"{answer!r} is none of the offers: {', '.join(names)}.")
            _check_choice(answer, least, most)
        return "Right: first the promise, then what it costs. What an attack reached has no say in it."

    return run(check)


def _fits(offer: Offer, least: float, most: float) -> bool:
    z = offer["noise_multiplier"]
    return (
        z is not None and epsilon_of(z, rounds=offer["rounds"]) <= most and offer["accuracy"] - offer["half"] >= least
    )


def _check_choice(answer: str | None, least: float, most: float) -> None:
    """Compare with the offer of the greatest assured accuracy among those that fit."""
    fitting = [offer for offer in OFFERS if _fits(offer, least, most)]
    best = max(fitting, key=lambda o: o["accuracy"] - o["half"], default=None)
    case = f"With at least {least:g} % and ε ≤ {most:g}"
    if answer == (best and best["name"]):
        return
    if answer is None:
        assert best is not None
        stop(
            f"{case} there is an offer: {best['name']}, ε = {epsilon_of(best['noise_multiplier'], rounds=100):.2f} "
            f"after its 100 rounds, and {best['accuracy'] - best['half']:.1f} % at the lower end."
        )
    offer = next(o for o in OFFERS if o["name"] == answer)
    z = offer["noise_multiplier"]
    if z is None:
        stop(f"{case}: {answer} promises nothing. That today's attack stops at 8 dB is no ε.")
    spent, alone = (epsilon_of(z, rounds=rounds) for rounds in (offer["rounds"], 1))
    if spent > most:
        hint = f" One round has {alone:.2f}: were the rounds counted?" if alone <= most else ""
        stop(f"{case}: {answer} has ε = {spent:.2f} after its {offer['rounds']} rounds.{hint}")
    lower = offer["accuracy"] - offer["half"]
    if lower < least:
        stop(
            f"{case}: {answer} has {offer['accuracy']:g} ± {offer['half']:g} %, so {lower:g} % at the lower end. "
            "Ask that of the lower end, not of the mean."
        )
    assert best is not None
    stop(
        f"{case}: {answer} fits, and {best['name']} does, too, with more accuracy at the lower end "
        f"({best['accuracy'] - best['half']:g} % against {lower:g} %)."
    )
