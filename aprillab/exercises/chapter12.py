"""Checks for chapter 12: heads that let one class pass, what they can be seen by, and what holds without trust.

References are the package's own heads and drawn matrices; no model is built here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .feedback import Feedback, expect_close, expect_number, expect_tensor, expect_whole, plain, run, stop

F64 = torch.float64
Head = tuple[Tensor, Tensor]  # weight (K, d) and bias (K,)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _norm(d: int, seed: int) -> Head:
    """γ and β of a LayerNorm, none of them near zero."""
    gamma = 1 + 0.3 * _random(d, seed=seed).clamp(-2, 2)
    return gamma, 0.1 + 0.2 * _random(d, seed=seed + 1)


def _features(gamma: Tensor, beta: Tensor, count: int, seed: int) -> Tensor:
    """f = γ ⊙ x̂ + β, (count, d), where x̂ has mean zero and norm √d."""
    x = _random(count, len(gamma), seed=seed)
    x = x - x.mean(1, keepdim=True)
    return gamma * x * (len(gamma) ** 0.5 / x.norm(dim=1, keepdim=True)) + beta


# --- 12.1: a head without a bias ------------------------------------------------------------------------------------


def check_without_bias(function: Callable[..., Tensor]) -> Feedback:
    """Exercise 12.1: ``function(W, gamma, beta, c, L)`` gives class c the logit w·f − L, and the others zero."""

    def check() -> str:
        for seed, (K, d, c, L) in enumerate(((5, 12, 2, 20.0), (9, 32, 0, 7.5))):
            W, (gamma, beta) = _random(K, d, seed=10 * seed), _norm(d, 10 * seed + 1)
            answer = function(W.clone(), gamma.clone(), beta.clone(), c, L)
            weight = expect_tensor(answer, (K, d), "The weight").double()
            f = _features(gamma, beta, 6, 10 * seed + 5)
            logits, wanted = f @ weight.T, torch.zeros(6, K, dtype=F64)
            wanted[:, c] = f @ W[c] - L
            if not weight[c].any():
                stop("Row c is zero: then class c has the same probability as all others.")
            others = torch.arange(K) != c
            if bool(weight[others].any()):
                stop("Rows of other classes are not zero. Their logits should be, for every picture.")
            mistakes = {
                "That is w·f + L: the class became probable.": wanted[:, c] + 2 * L,
                "That is w·f alone: the −L is missing.": wanted[:, c] + L,
                "That is −L alone: w is missing.": wanted[:, c] - f @ W[c],
                "You took Σ f_j for constant. γ stretches each entry of x̂, and Σ γ_j x̂_j is not zero: "
                "divide by γ first.": f @ (W[c] - L / beta.sum()),
                "You divided by γ, and not by what the sum then is: Σ f_j/γ_j is Σ β_j/γ_j, and not 1.": f
                @ (W[c] - L / gamma),
                "You took Σ f_j for d or the mean of f for one. Neither is known: γ stretches x̂, and β shifts it.": f
                @ (W[c] - L / d),
                "You used β itself as the direction. β·f changes from picture to picture.": f
                @ (W[c] - L * beta / beta.square().sum()),
            }  # fmt: skip
            expect_close(logits[:, c], wanted[:, c], "Class c's logit", mistakes=mistakes, tolerance=1e-7)
        return (
            "Right: the LayerNorm itself holds a number that is the same for all pictures, and stands in for a bias."
        )

    return run(check)


# --- 12.2: L before a picture was seen ------------------------------------------------------------------------------


def check_strength_for(function: Callable[..., float]) -> Feedback:
    """Exercise 12.2: ``function(w, gamma, beta, K, N, bits)`` is the L at which N others pass 2^−bits at most."""

    def check() -> str:
        for seed, (d, K, N, bits) in enumerate(((16, 10, 7, 24), (64, 1000, 799, 24), (32, 100, 31, 8))):
            w, (gamma, beta) = 0.3 * _random(d, seed=20 * seed), _norm(d, 20 * seed + 1)
            w = w if seed % 2 else w * float(-(w @ beta).sign())  # w·β has either sign
            answer = expect_number(function(w.clone(), gamma.clone(), beta.clone(), K, N, bits), "L")
            most = float(w @ beta) + d**0.5 * float((gamma * w).norm())
            wanted = bits * math.log(2) + math.log(N) + most - math.log(K - 1)
            # Entries of x̂ sum to zero, which exercise 12.1 uses: then a little less is enough, too.
            sharper = wanted - d**0.5 * float((gamma * w).norm() - (gamma * w - (gamma * w).mean()).norm())
            if not (_near(answer, wanted) or _near(answer, sharper)):
                looks = _looks_of_strength(wanted, w, gamma, beta, K, N, bits)
                hint = next((f": {text}" for text, value in looks.items() if _near(answer, value)), "")
                if not hint:
                    hint = ": that is more than is needed" if answer > wanted else ": that is not enough"
                stop(f"For d = {d}, K = {K}, N = {N} and {bits} bits {answer:.4f} is not L{hint}.")
        return "Right: and a thousand times as many pictures cost 6.9 nats."

    return run(check)


def _near(answer: float, wanted: float) -> bool:
    return abs(answer - wanted) < 1e-6 * abs(wanted)


def _looks_of_strength(
    wanted: float, w: Tensor, gamma: Tensor, beta: Tensor, K: int, N: int, bits: int
) -> dict[str, float]:
    """What mistakes give instead of L."""
    d, length, middle = len(w), float((gamma * w).norm()), float(w @ beta)
    root = d**0.5 * length
    return {
        "that is for one other picture. N of them may all pass the most that one can": wanted - math.log(N),
        "w·β is missing": wanted - middle,
        "w·β has a sign, and where it is negative it helps the server": wanted - middle + abs(middle),
        "the bound is √d ‖γ ⊙ w‖, which is less than √d times the largest γ": wanted
        - root
        + d**0.5 * float(w.norm() * gamma.abs().max()),
        "‖γ ⊙ w‖ is less than ‖γ‖ ‖w‖. One inequality is enough": wanted
        - root
        + d**0.5 * float(gamma.norm() * w.norm()),
        "‖x̂‖ is up to √d, and not up to 1": wanted - root + length,
        "‖x̂‖ is up to √d, and not up to d": wanted - root + d * length,
        "γ stretches x̂: the bound is √d ‖γ ⊙ w‖, and not √d ‖w‖": wanted - root + d**0.5 * float(w.norm()),
        "e^−L takes natural logarithms: 2^−bits is e^(−bits ln 2)": wanted - bits * math.log(2) + bits,
        "the other K − 1 classes help the server: their share is subtracted": wanted + 2 * math.log(K - 1),
        "the other K − 1 classes are missing": wanted + math.log(K - 1),
        "there are K − 1 other classes, and not K": wanted + math.log(K - 1) - math.log(K),
        "pictures that pull the other way need a smaller L; it is the largest w·f that counts": wanted - 2 * root,
    }


# --- 12.3: count from the head alone --------------------------------------------------------------------------------


def _counted(seed: int, B: int, of_class: int, bins: int) -> tuple[Tensor, list[int]]:
    """The bias gradients of T = bins + 1 rounds, a little off (no threshold is quite sharp), and the bins."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.randint(0, bins, (B,), generator=generator)
    counts = where.bincount(minlength=bins)
    above = torch.cat([torch.tensor([B]), B - counts.cumsum(0)]).double()
    return (
        above - of_class + 2e-2 * (torch.rand(bins + 1, generator=generator, dtype=F64) - 0.5)
    ) / B, counts.tolist()


def check_counts(function: Callable[[Tensor, int], tuple[int, list[int]]]) -> Feedback:
    """Exercise 12.3: ``function(bias, B)`` is how many are of class c, and how many lie in each bin."""

    def check() -> str:
        for seed, (B, of_class, bins) in enumerate(((8, 2, 5), (32, 7, 6), (6, 6, 3), (12, 0, 4))):
            bias, wanted = _counted(seed, B, of_class, bins)
            answer = function(bias.clone(), B)
            if answer is None or answer is ...:
                stop("Nothing was returned yet. Is there a return at the end?")
            if not isinstance(answer, tuple | list) or len(answer) != 2:
                stop("Return two things: how many are of class c, and the list of counts.")
            members = expect_whole(plain(answer[0]), "How many are of class c")
            listed = plain(answer[1])
            if not isinstance(listed, list | tuple):
                stop(f"The bins' counts should be a list, not a {type(answer[1]).__name__}.")
            between = [expect_whole(plain(value), "A bin's count") for value in listed]
            _check_members(members, of_class, B, bias)
            _check_bins(between, wanted, B, bias)
        return "Right: not a single gradient below the head was needed."

    return run(check)


def _check_members(answer: int, wanted: int, B: int, bias: Tensor) -> None:
    if answer == wanted:
        return
    looks = {
        "the sign: above the last threshold there is nobody, and −B ∂b_c is left": -wanted,
        "the first threshold lies below everybody, so B pictures are counted there besides": B - wanted,
        "the gradient is of the mean loss: times B": round(-float(bias[-1])),
        "int() cuts off: 1.997 pictures are two. Round": int(-B * float(bias[-1])),
    }
    hint = next((f": {text}" for text, value in looks.items() if answer == value), "")
    stop(f"The number of class c among these {B} pictures is not {answer}{hint}.")


def _check_bins(answer: list[int], wanted: list[int], B: int, bias: Tensor) -> None:
    if answer == wanted:
        return
    if len(answer) != len(wanted):
        stop(f"Between {len(bias)} thresholds there are {len(wanted)} bins, and you returned {len(answer)} numbers.")
    above = [round(B * float(value - bias[-1])) for value in bias]
    looks = {
        "the sign: fewer pictures lie above a higher threshold": [-count for count in wanted],
        "the order: the first bin lies above the lowest threshold": wanted[::-1],
        "those are the pictures above each threshold. A bin is a difference of two": above[:-1],
        "those are the pictures above each threshold but the first. A bin is a difference of two": above[1:],
        "int() cuts off: 1.997 pictures are two. Round": (B * (bias[:-1] - bias[1:])).int().tolist(),
    }  # fmt: skip
    hint = next((f": {text}" for text, value in looks.items() if answer == value), "")
    stop(f"The bins do not hold {answer}{hint}.")


# --- 12.4: all rows of one length -----------------------------------------------------------------------------------


def _passed(weight: Tensor, bias: Tensor, f: Tensor, y: Tensor) -> Tensor:
    """‖Wᵀ(p − e_y)‖ for features (N, d) and classes (N,), (12.1)."""
    p = (f @ weight.T + bias).softmax(1)
    return ((p - torch.nn.functional.one_hot(y, len(weight))) @ weight).norm(dim=1)


def check_disguised(function: Callable[[Tensor, Tensor, int, float], Head]) -> Feedback:
    """Exercise 12.4: ``function(W, b, c, L)`` has rows of the honest median length, and class c alone passes."""

    def check() -> str:
        for seed, (K, d, c, L) in enumerate(((10, 24, 3, 20.0), (40, 16, 0, 25.0))):
            W, b = _random(K, d, seed=seed) / d**0.5, 0.1 * _random(K, seed=seed + 1)
            answer = function(W.clone(), b.clone(), c, L)
            if not isinstance(answer, tuple | list) or len(answer) != 2:
                stop("Return two things: the weight and the bias.")
            weight = expect_tensor(answer[0], (K, d), "The weight").double()
            bias = expect_tensor(answer[1], (K,), "The bias").double()
            _check_lengths(weight, float(W.norm(dim=1).median()), c)
            _check_passage(weight, bias, c, L)
        return "Right: lengths say nothing, for what all rows share changes no probability."

    return run(check)


def _check_lengths(weight: Tensor, median: float, c: int) -> None:
    lengths = weight.norm(dim=1)
    off = (lengths / median - 1).abs()
    if float(off.max()) > 0.01:
        k = int(off.argmax())
        who = "Row c" if k == c else f"Row {k}"
        stop(f"{who} has length {lengths[k]:.3f}, and the honest head's median row {median:.3f}.")


def _check_passage(weight: Tensor, bias: Tensor, c: int, L: float) -> None:
    K, d = weight.shape
    f = torch.nn.functional.normalize(_random(400, d, seed=2), dim=1) * 3
    y = torch.arange(400) % K
    passed = _passed(weight, bias, f, y)
    own, others = float(passed[y == c].min()), float(passed[y != c].max())
    if own < 0.05 * float(weight.norm(dim=1).median()):
        stop(
            "Pictures of class c pass hardly anything themselves. Is the class improbable, b_c = −L, and does its "
            "row differ from the others'?"
        )
    if others > math.exp(-L / 2) * own:
        rest = weight[torch.arange(K) != c]
        same = "all the same" if torch.allclose(rest, rest[:1].expand_as(rest)) else "not the same"
        stop(
            f"Lengths are right, and a picture of another class passes {others / own:.1e} of what one of class c "
            f"does; e^(−L/2) is {math.exp(-L / 2):.1e}. The other rows are {same}, and class c's bias is "
            f"{float(bias[c] - bias[torch.arange(K) != c].median()):+.1f} against theirs."
        )


# --- 12.5: a detector, and how it is evaded -------------------------------------------------------------------------


def _trained(K: int, d: int, seed: int, common: float = 0.5) -> Head:
    """A head as training leaves it: rows with something in common, of different lengths, and biases."""
    lengths = torch.linspace(0.7, 1.4, K, dtype=F64)[torch.randperm(K, generator=torch.Generator().manual_seed(seed))]
    rows = _random(K, d, seed=seed + 1) / d**0.5 * lengths[:, None]
    return rows + common * _random(d, seed=seed + 2) / d**0.5, torch.linspace(-1.0, 1.0, K, dtype=F64)


def _honest_heads() -> dict[str, list[Head]]:
    sizes = ((10, 32, 1), (50, 24, 2), (100, 192, 3))
    heads = {
        "a random head": [(_random(K, d, seed=s) / d**0.5, torch.zeros(K, dtype=F64)) for K, d, s in sizes],
        "a trained head": [_trained(K, d, 10 * s) for K, d, s in sizes],
        "a head of zeros, as libraries begin with": [
            (torch.zeros(K, d, dtype=F64), torch.zeros(K, dtype=F64)) for K, d, _ in sizes
        ],
    }
    # A vector added to all rows changes no probability; here it has nearly all of the first singular value.
    heads["a trained head whose rows have much in common"] = [
        _trained(K, d, 10 * s, common=12.0) for K, d, s in sizes
    ]
    heads["a trained head with biases of up to two nats"] = [(W, 2 * b) for W, b in heads["a trained head"]]
    return heads


def _one_row(W: Tensor, c: int, L: float) -> Head:
    weight, bias = torch.zeros_like(W), torch.zeros(len(W), dtype=F64)
    weight[c], bias[c] = W[c], -L
    return weight, bias


def _fished_heads() -> dict[str, list[Head]]:
    found: dict[str, list[Head]] = {}
    for name in ("a random head", "a trained head"):
        for W, _ in _honest_heads()[name]:
            c = len(W) // 3
            for L in (1.0, 5.0, 20.0):
                found.setdefault(f"the head of (12.2) with L = {L:g}", []).append(_one_row(W, c, L))
            gamma, beta = _norm(W.shape[1], c)
            weight, bias = _one_row(W, c, 0.0)
            weight[c] -= 20 / gamma / (beta / gamma).sum()
            found.setdefault("the head of exercise 12.1, without a bias", []).append((weight, bias))
            v = W[c] * (W.norm(dim=1).median() / W[c].norm())
            weight, bias = v.repeat(len(W), 1), torch.zeros(len(W), dtype=F64)
            weight[c], bias[c] = -v, -20.0
            found.setdefault("the head of exercise 12.4, all rows of one length", []).append((weight, bias))
            shaken = weight + 1e-6 * _random(*weight.shape, seed=c)
            found.setdefault("the same with rows that differ in the sixth digit", []).append((shaken, bias))
            other = W[c - 1] - (W[c - 1] @ v) / (v @ v) * v  # the same length at a right angle: rank two
            turned = weight.clone()
            turned[c] = other * (v.norm() / other.norm())
            found.setdefault("a head of exercise 12.4, row c at a right angle", []).append((turned, bias))
    return found


def check_strangeness(function: Callable[[Tensor, Tensor], float]) -> Feedback:
    """Exercise 12.5: one threshold on ``function(weight, bias)`` tells honest heads from fished ones."""

    def score(head: Head, name: str) -> float:
        answer: Any = function(head[0].clone(), head[1].clone())
        if isinstance(answer, Tensor) and answer.numel() == 1:
            answer = answer.item()
        if isinstance(answer, float) and answer == math.inf:
            return answer
        return expect_number(answer, f"The score of {name}")

    def check() -> str:
        honest = {name: [score(head, name) for head in heads] for name, heads in _honest_heads().items()}
        fished = {name: [score(head, name) for head in heads] for name, heads in _fished_heads().items()}
        most, top = max((max(values), name) for name, values in honest.items())
        missed = {name: min(values) for name, values in fished.items() if min(values) <= most}
        if missed:
            name = min(missed, key=lambda key: missed[key])
            why = _why(top, name, honest | fished)
            stop(f"No threshold: {top} has {most:.4g}, and {name} has {missed[name]:.4g}. {why}")
        least = min(min(values) for values in fished.values())
        return (
            f"Right: honest heads have {most:.3g} at most, fished ones {least:.3g} at least. {_evaded(score, most)}"
        )

    return run(check)


def _why(top: str, missed: str, scores: dict[str, list[float]]) -> str:
    """What an honest head that scores high, or a fished one that scores low, tells of the detector."""
    every = [value for values in scores.values() for value in values]
    if max(every) == min(every):
        return "Your score is the same for all heads: does it look at the weight?"
    if "zeros" in top:
        return "Where all rows are alike, no picture of any class passes anything: such a head is not fished."
    if "much in common" in top:
        return (
            "What all rows share changes no probability, and there may be much of it in an honest head. Take it off "
            "before you measure rows or directions."
        )
    if "sixth digit" in missed:
        return "Rows need not be equal to the last digit to be alike: measure how much they differ."
    if "12.4" in missed:
        return "Its rows all have one length. Take off what they have in common before you measure them."
    if "12.1" in missed:
        return "Its biases are zero: the LayerNorm stands in for them."
    if "L = 1" in missed:
        return "Its bias is no larger than an honest one's, so the bias decides nothing. Look at the rows."
    return "What do K − 1 rows of a fished head have in common?"


def _evaded(score: Callable[[Head, str], float], most: float) -> str:
    """The message after success: the detector against Step 8's server."""
    W, b = _trained(100, 192, 30)
    value = score((10 * W, b), "a trained head ten times as sure")
    if value <= most:
        return (
            f"And a trained head with all rows ten times as long has {value:.3g}: you let it pass. In Step 8 it gave "
            "whole digits away. A look at the head cannot see that; a look at your own batch can."
        )
    return (
        f"A trained head with all rows ten times as long has {value:.3g}, and you object; honest training makes rows "
        "longer, too, so a patient server and a long federation look alike to you. A look at your own batch tells "
        "them apart."
    )


# --- 12.6: which sentences are still true ---------------------------------------------------------------------------

_TRUE = "CE"
_WHY = {
    "A": "A follows from nothing: a sum over a hundred phones may be one photograph and e^−L of all others, (12.4)",
    "B": "B: a mean over 32 is what the chapter opened with",
    "C": "C is true. Phones that compare fingerprints know that they all were sent the same, though it may be bad",
    "D": "D: a server that silences all phones but one knows whose the sum is; and a photograph may show who took it",
    "E": "E is true: chapter 11's guarantee was derived without a word on the model",
    "F": "F: looks were evaded in Step 8, and nobody has shown one that refuses every bad model",
    "G": "G: the noise comes after the operator has seen the sum",
}


def check_still_true(function: Callable[[], str]) -> Feedback:
    """Exercise 12.6: ``function()`` is the letters of the sentences that hold whatever the server sends."""

    def check() -> str:
        answer = function()
        if answer is None or answer is ...:
            stop("Nothing was returned yet. Is there a return at the end?")
        if not isinstance(answer, str):
            stop(f'Return letters as one string, such as "ABD", not a {type(answer).__name__}.')
        letters = {letter for letter in answer.upper() if letter.isalpha()}
        unknown = sorted(letters - set(_WHY))
        if unknown:
            stop(f"There are sentences A to G, and no {', '.join(unknown)}.")
        wrong = sorted(letters ^ set(_TRUE))
        if wrong:
            more = f" ({len(wrong)} letters are to be changed.)" if len(wrong) > 1 else ""
            stop(f"Not yet. {_WHY[wrong[0]]}.{more}")
        return "Right: C says little, and holds; E says with which number. The others need an honest server."

    return run(check)
