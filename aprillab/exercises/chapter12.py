"""Checks for chapter 12: heads that let one class pass, what they can be seen by, and what
holds without trust.

The check of 12.5 is in detectors.py. References are the package's own heads and drawn matrices; no
model is built here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .detectors import F64, Head, drawn, norm_of
from .detectors import check_strangeness as check_strangeness
from .feedback import (
    Feedback,
    expect_close,
    expect_number,
    expect_something,
    expect_tensor,
    expect_whole,
    plain,
    run,
    stop,
)


def _features(gamma: Tensor, beta: Tensor, count: int, seed: int) -> Tensor:
    """f = γ ⊙ x̂ + β, (count, d), where x̂ has mean zero and norm √d."""
    x = drawn(count, len(gamma), seed=seed)
    x = x - x.mean(1, keepdim=True)
    return gamma * x * (len(gamma) ** 0.5 / x.norm(dim=1, keepdim=True)) + beta


# --- 12.1: a head without a bias ------------------------------------------------------------------------------------


def check_without_bias(function: Callable[..., Tensor]) -> Feedback:
    """Exercise 12.1: ``function(W, gamma, beta, c, L)`` gives class c the logit w·f − L,
    and the others zero.
    """

    def check() -> str:
        for seed, (K, d, c, L) in enumerate(((5, 12, 2, 20.0), (9, 32, 0, 7.5))):
            W, (gamma, beta) = drawn(K, d, seed=10 * seed), norm_of(d, 10 * seed + 1)
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
    """Exercise 12.2: ``function(w, gamma, beta, K, N, bits)`` is the L at which N others
    pass 2^−bits at most.
    """

    def check() -> str:
        for seed, (d, K, N, bits) in enumerate(((16, 10, 7, 24), (64, 1000, 799, 24), (32, 100, 31, 8))):
            w, (gamma, beta) = 0.3 * drawn(d, seed=20 * seed), norm_of(d, 20 * seed + 1)
            w = w if seed % 2 else w * float(-(w @ beta).sign())  # w·β has either sign
            answer = expect_number(function(w.clone(), gamma.clone(), beta.clone(), K, N, bits), "L")
            most = float(w @ beta) + d**0.5 * float((gamma * w).norm())
            wanted = bits * math.log(2) + math.log(N) + most - math.log(K - 1)
            # Entries of x̂ sum to zero, which exercise 12.1 uses: then a little less is enough,
            # too.
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
    """The bias gradients of T = bins + 1 rounds, a little off (no threshold is quite
    sharp), and the bins.
    """
    generator = torch.Generator().manual_seed(seed)
    where = torch.randint(0, bins, (B,), generator=generator)
    counts = where.bincount(minlength=bins)
    above = torch.cat([torch.tensor([B]), B - counts.cumsum(0)]).double()
    return (
        above - of_class + 2e-2 * (torch.rand(bins + 1, generator=generator, dtype=F64) - 0.5)
    ) / B, counts.tolist()


def check_counts(function: Callable[[Tensor, int], tuple[int, list[int]]]) -> Feedback:
    """Exercise 12.3: ``function(bias, B)`` is how many are of class c, and how many lie in each
    bin.
    """

    def check() -> str:
        for seed, (B, of_class, bins) in enumerate(((8, 2, 5), (32, 7, 6), (6, 6, 3), (12, 0, 4))):
            bias, wanted = _counted(seed, B, of_class, bins)
            answer = function(bias.clone(), B)
            expect_something(answer)
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
    """Exercise 12.4: ``function(W, b, c, L)`` has rows of the honest median length, and
    class c alone passes.
    """

    def check() -> str:
        for seed, (K, d, c, L) in enumerate(((10, 24, 3, 20.0), (40, 16, 0, 25.0))):
            W, b = drawn(K, d, seed=seed) / d**0.5, 0.1 * drawn(K, seed=seed + 1)
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
    f = torch.nn.functional.normalize(drawn(400, d, seed=2), dim=1) * 3
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
    """Exercise 12.6: ``function()`` is the letters of the sentences that hold whatever the server
    sends.
    """

    def check() -> str:
        answer = function()
        expect_something(answer)
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
