"""The check of Exercise 12.5: a detector of fished heads, tried on honest and on
fished ones, and evaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .feedback import Feedback, expect_number, run, stop

F64 = torch.float64
Head = tuple[Tensor, Tensor]  # weight (K, d) and bias (K,)


def drawn(*shape: int, seed: int) -> Tensor:
    """Standard normal float64 numbers of this shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def norm_of(d: int, seed: int) -> Head:
    """γ and β of a LayerNorm, none of them near zero."""
    gamma = 1 + 0.3 * drawn(d, seed=seed).clamp(-2, 2)
    return gamma, 0.1 + 0.2 * drawn(d, seed=seed + 1)


def _trained(K: int, d: int, seed: int, common: float = 0.5) -> Head:
    """A head as training leaves it: rows with something in common, of different
    lengths, and biases.
    """
    lengths = torch.linspace(0.7, 1.4, K, dtype=F64)[torch.randperm(K, generator=torch.Generator().manual_seed(seed))]
    rows = drawn(K, d, seed=seed + 1) / d**0.5 * lengths[:, None]
    return rows + common * drawn(d, seed=seed + 2) / d**0.5, torch.linspace(-1.0, 1.0, K, dtype=F64)


def _honest_heads() -> dict[str, list[Head]]:
    sizes = ((10, 32, 1), (50, 24, 2), (100, 192, 3))
    heads = {
        "a random head": [(drawn(K, d, seed=s) / d**0.5, torch.zeros(K, dtype=F64)) for K, d, s in sizes],
        "a trained head": [_trained(K, d, 10 * s) for K, d, s in sizes],
        "a head of zeros, as libraries begin with": [
            (torch.zeros(K, d, dtype=F64), torch.zeros(K, dtype=F64)) for K, d, _ in sizes
        ],
    }
    # A vector added to all rows changes no probability; here it has nearly all of the
    # first singular value.
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
            gamma, beta = norm_of(W.shape[1], c)
            weight, bias = _one_row(W, c, 0.0)
            weight[c] -= 20 / gamma / (beta / gamma).sum()
            found.setdefault("the head of exercise 12.1, without a bias", []).append((weight, bias))
            v = W[c] * (W.norm(dim=1).median() / W[c].norm())
            weight, bias = v.repeat(len(W), 1), torch.zeros(len(W), dtype=F64)
            weight[c], bias[c] = -v, -20.0
            found.setdefault("the head of exercise 12.4, all rows of one length", []).append((weight, bias))
            shaken = weight + 1e-6 * drawn(*weight.shape, seed=c)
            found.setdefault("the same with rows that differ in the sixth digit", []).append((shaken, bias))
            other = W[c - 1] - (W[c - 1] @ v) / (v @ v) * v  # the same length at a right angle: rank two
            turned = weight.clone()
            turned[c] = other * (v.norm() / other.norm())
            found.setdefault("a head of exercise 12.4, row c at a right angle", []).append((turned, bias))
    return found


def check_strangeness(function: Callable[[Tensor, Tensor], float]) -> Feedback:
    """Exercise 12.5: one threshold on ``function(weight, bias)`` tells honest heads from fished
    ones.
    """

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
