"""Checks for chapter 10: sharing fewer tensors, and several rounds.

References are made of patches, gradients and features that the check drew itself. Exercise 10.6 alone
runs the package's attacks: what they do there is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..attacks import AttackNotApplicable, invert
from ..models import VisionTransformer
from ..update import ClientUpdate, client_update
from .feedback import Feedback, expect_close, expect_something, expect_tensor, expect_whole, run, stop

F64 = torch.float64
System = tuple[Tensor, Tensor]  # G (n, d) and ∂W_e (d, p) of one round


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _collection(answer: Any, what: str) -> list[Any]:
    """The answer as a list, or a message that says what it is instead."""
    expect_something(answer, what)
    if isinstance(answer, Tensor) and answer.ndim == 1:
        return answer.tolist()
    if isinstance(answer, str | bytes | Mapping) or not isinstance(answer, Collection):
        stop(f"{what} should be a list or a set, not a {type(answer).__name__}.")
    return list(answer)


# --- 10.1: the stack, weighted ----------------------------------------------------------------------------------


def _solved(systems: Sequence[System], weights: Sequence[float]) -> Tensor:
    left = torch.cat([w * G.T for (G, _), w in zip(systems, weights, strict=True)])
    right = torch.cat([w * dW for (_, dW), w in zip(systems, weights, strict=True)])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution


def _rounds(X: Tensor, d: int, count: int, seed: int, noises: Sequence[float] = ()) -> list[System]:
    """``count`` rounds of the patches X (n, p) with G of their own, and noise in ∂W_e."""
    systems = []
    for t in range(count):
        G = _random(len(X), d, seed=100 * seed + t)
        noise = noises[t] * _random(d, X.shape[1], seed=100 * seed + 50 + t) if noises else 0.0
        systems.append((G, G.T @ X + noise))
    return systems


def check_stack(function: Callable[[list[System], list[float]], Tensor]) -> Feedback:
    """Exercise 10.1: ``function(rounds, noises)`` solves (10.1) with each round at its own weight."""

    def check() -> str:
        for n, d, noises in ((9, 6, (1e-9, 1e-3)), (12, 5, (1e-1, 1e-6, 1e-2, 1e-8)), (4, 8, (0.5, 0.01))):
            X = _random(n, 7, seed=n)
            systems = _rounds(X, d, len(noises), n, noises)
            given = [(G.clone(), dW.clone()) for G, dW in systems]
            answer = expect_tensor(function(given, list(noises)), (n, 7), "X")
            total = torch.stack([G for G, _ in systems]).sum(0), torch.stack([dW for _, dW in systems]).sum(0)
            each = [_solved([system], [1.0]) for system in systems]
            mistakes = {
                "All rounds count alike: divide each by its noise first, both sides.": _solved(
                    systems, [1.0] * len(noises)
                ),
                "Each round is multiplied by its noise, so that the worst counts most: divide.": _solved(
                    systems, noises
                ),
                "Each round is divided by its variance: divide by the deviation, for squares are summed.": _solved(
                    systems, [noise**-2 for noise in noises]
                ),
                "The rounds' equations were added up: then there are no more of them than before. Put them one "
                "below the other.": _solved([total], [1.0]),
                "Each round was solved by itself and the solutions averaged: a round with fewer equations than "
                "unknowns has no solution of its own.": torch.stack(each).mean(0),
                "That is the first round alone.": each[0],
            }
            wanted = _solved(systems, [1 / noise for noise in noises])
            scale = float(wanted.abs().max())
            away = [float((answer.double() - value).abs().max()) / scale for value in (wanted, *mistakes.values())]
            if min(away) > 1e-5 and away[0] < 1e-2:
                stop(
                    f"X is nearly right, and digits are lost: it is off by {away[0]:.0e} of the largest entry. Were "
                    "both sides multiplied by the left one (normal equations)? That squares weights which differ by "
                    "a factor of a million. Leave the stack to lstsq."
                )
            expect_close(answer, wanted, "X", mistakes=mistakes, tolerance=1e-5)
        return "Right: too few equations a round, enough in all, and each counts for what it is worth."

    return run(check)


# --- 10.2: the round of another picture -------------------------------------------------------------------------


def _residuals(systems: Sequence[System], X: Tensor) -> list[float]:
    return [float((dW - G.T @ X).norm() / dW.norm()) for G, dW in systems]


def _foretold(systems: Sequence[System], i: int) -> float:
    """How far the picture of the other rounds misses this one."""
    rest = [system for j, system in enumerate(systems) if j != i]
    return _residuals([systems[i]], _solved(rest, [1.0] * len(rest)))[0]


@dataclass(frozen=True)
class _Odd:
    """Six rounds, one of them of another picture."""

    systems: list[System]
    odd: int


def _six_rounds(seed: int, odd: int, *, scale: float, d: int = 5, n: int = 16) -> _Odd:
    """Rounds too narrow to be solved alone. The odd one, ``scale`` times as strong as the others, bends the
    joint solution to itself, and does not have its largest residual.
    """
    X, other = _random(n, 6, seed=seed), _random(n, 6, seed=seed + 1)
    for attempt in range(1000):
        systems = _rounds(X, d, 6, 1000 * seed + attempt, [1e-9] * 6)
        G = scale * systems[odd][0]
        systems[odd] = (G, G.T @ other)
        left, sizes = _residuals(systems, _solved(systems, [1.0] * 6)), [float(dW.norm()) for _, dW in systems]
        if left.index(max(left)) != odd and (scale > 1 or sizes.index(max(sizes)) != odd):
            return _Odd(systems, odd)
    raise AssertionError("no such rounds were drawn")


def check_odd_round(function: Callable[[list[System]], int]) -> Feedback:
    """Exercise 10.2: ``function(rounds)`` is the number, from 0, of the round that is of another picture."""

    def check() -> str:
        for seed, odd, scale in ((1, 4, 2.0), (2, 0, 1.0), (3, 3, 6.0), (4, 5, 1.0)):
            case = _six_rounds(seed, odd, scale=scale)
            given = [(G.clone(), dW.clone()) for G, dW in case.systems]
            answer = expect_whole(function(given), "The round")
            if answer == odd:
                continue
            if not 0 <= answer < 6:
                stop(f"Rounds are counted from 0 to 5 here; you have {answer}.")
            left = _residuals(case.systems, _solved(case.systems, [1.0] * 6))
            rest = [system for i, system in enumerate(case.systems) if i != answer]
            away = max(_residuals(rest, _solved(rest, [1.0] * 5)))
            words = f"Without round {answer} the other five still miss each other by {away:.1e}: it is not that one."
            foretold = [_foretold(case.systems, i) for i in range(6)]
            if answer == foretold.index(max(foretold)):
                words += (
                    " It is the one that the picture of the other five foretells worst. But when an honest round is "
                    "left out, that picture is bent by the odd one: ask how well the five agree with each other. "
                    "(When all six are solved together, the odd one bends the solution as well.)"
                )
            elif answer == left.index(max(left)):
                words += (
                    " It has the largest residual when all six are solved together, but a strong odd round bends "
                    "that solution to itself, and the others show the residual. Leave one out and solve the rest."
                )
            elif answer == left.index(min(left)):
                words += " It has the smallest residual when all six are solved together; that says nothing of it."
            elif answer == 0:
                words += " Does each residual alone vanish? A round has fewer equations than unknowns here."
            stop(words)
        return "Right: five rounds agree to rounding as soon as the sixth is out."

    return run(check)


# --- 10.3: rounds for the span ----------------------------------------------------------------------------------


def _rounds_for(unknowns: int, equations: int, moves: bool) -> int | None:
    """Rounds that bring so many equations each for so many unknowns; if nothing moves, only the first counts."""
    if equations <= 0 or (not moves and unknowns > equations):
        return None
    return math.ceil(unknowns / equations)


def span_rounds(patches: int, pixels: int, width: int, prefix: int, patch_trained: bool) -> int | None:
    """In how many rounds of one picture (10.3) fixes every patch; None where no number of rounds does.

    >>> span_rounds(196, 768, 384, 1, True)  # ViT-S/16 at 224, position embedding frozen
    2
    """
    unknowns = min(pixels, patches) if patch_trained else pixels
    return _rounds_for(unknowns, width - patches - prefix - 1, patch_trained)


#: Mistaken counts of n patches with p pixels at width d, with t tokens before them, and W_e trained or not.
_MISCOUNTED: dict[str, Callable[[int, int, int, int, bool], int | None]] = {
    "with both embeddings frozen the tokens are the same in every round, and so are the equations": (
        lambda n, p, d, t, trained: _rounds_for(min(p, n) if trained else p, d - n - t - 1, True)
    ),
    "rounds add nothing only where the patch embedding is frozen; where it moves, each has equations of its own": (
        lambda n, p, d, t, trained: _rounds_for(min(p, n) if trained else p, d - n - t - 1, False)
    ),
    "∂W_e is shared, and its rows span the patches: a patch has min(p, n) unknowns": (
        lambda n, p, d, t, trained: _rounds_for(p, d - n - t - 1, trained)
    ),
    "without ∂W_e its row space is not there either: all p pixels are unknown": (
        lambda n, p, d, t, trained: _rounds_for(min(p, n), d - n - t - 1, trained)
    ),
    "LayerNorm's mean takes one equation of each round": (
        lambda n, p, d, t, trained: span_rounds(n, p, d + 1, t, trained)
    ),
    "more or fewer than one token may stand before the patches": (
        lambda n, p, d, t, trained: span_rounds(n, p, d, 1, trained)
    ),
    "the tokens before the patches are in the span as well": (
        lambda n, p, d, t, trained: span_rounds(n, p, d, 0, trained)
    ),
    "the span takes n + prefix of the d directions, and only the rest are equations": (
        lambda n, p, d, t, trained: _rounds_for(min(p, n) if trained else p, d - 1, trained)
    ),
    "the last few unknowns need a round, too: round up": (
        lambda n, p, d, t, trained: (min(p, n) if trained else p) // max(d - n - t - 1, 1)
    ),
}


def check_span_rounds(function: Callable[[int, int, int, int, bool], int | None]) -> Feedback:
    """Exercise 10.3: ``function(patches, pixels, width, prefix, patch_trained)`` is a number of rounds, or None."""

    def check() -> str:
        # In this order each mistake is the first to be seen at one of them.
        cases = (
            (16, 192, 24, 1, True), (16, 192, 23, 4, True), (64, 48, 113, 1, False), (64, 48, 114, 1, False),
            (16, 192, 120, 1, False), (16, 192, 34, 1, True), (196, 768, 384, 1, True), (196, 768, 192, 1, True),
            (196, 768, 198, 1, True), (196, 768, 1024, 1, False),
        )  # fmt: skip
        for case in cases:
            n, p, d, prefix, trained = case
            wanted, given = span_rounds(*case), function(*case)
            answer = None if given is None else expect_whole(given, "The number of rounds")
            if answer == wanted:
                continue
            embedding = "trained" if trained else "frozen"
            words = f"For n = {n}, p = {p}, d = {d}, prefix = {prefix} and the patch embedding {embedding}"
            if answer is not None and answer < 1:
                stop(f"{words}: {answer} rounds? Where the span leaves no equation, no number of rounds is enough.")
            looks = (why for why, count in _MISCOUNTED.items() if count(*case) == answer)
            hint = next((f" One thing to look at: {why}." for why in looks), "")
            right = "no number of rounds is enough" if wanted is None else f"it takes {wanted} round(s)"
            stop(f"{words} {right}, and you have {answer}.{hint}")
        return "Right: where tokens move, rounds make up for a narrow model; where they are frozen, one says it all."

    return run(check)


# --- 10.4: how many rounds --------------------------------------------------------------------------------------


def check_rounds(function: Callable[[int, int, int, int, int], int]) -> Feedback:
    """Exercise 10.4: ``function(patches, prefix, rank, factors, pictures)`` counts the rounds, the silent one too."""

    def check() -> str:
        # In this order each mistake is the first to be seen at one of them.
        cases = ((16, 1, 4, 2, 1), (20, 1, 4, 2, 1), (15, 5, 4, 1, 4), (16, 1, 8, 2, 1), (196, 1, 8, 2, 1))
        for n, prefix, rank, factors, pictures in cases:
            tokens, rows = pictures * n, rank * factors
            wanted = 1 + math.ceil(tokens / rows)
            answer = expect_whole(function(n, prefix, rank, factors, pictures), "The number of rounds")
            if answer == wanted:
                continue
            looks = (
                (1 + math.ceil((tokens + prefix) / rows), "the tokens before the patches are in the span, but they "
                 "are public: LN(c + E_0) needs no round"),
                (1 + math.ceil(pictures * (n + prefix) / rows), "the tokens before the patches are the same in every "
                 "picture, and public besides: they need no round"),
                (1 + tokens // rows, "the last few directions need a round, too: round up"),
                (1 + math.ceil(tokens / rank), "every factor A that reads the first attention's input adds rows"),
                (1 + math.ceil(n / rows), "each further picture brings n directions of its own"),
                (math.ceil(tokens / rows), "in the first round B is zero, and nothing arrives at A"),
            )  # fmt: skip
            case = f"n = {n}, prefix = {prefix}, rank {rank}, {factors} factor(s), {pictures} picture(s)"
            hint = next((f": {words}" for value, words in looks if value == answer), "")
            stop(f"For {case} it takes {wanted} rounds, not {answer}{hint}.")
        return "Right: at rank 8 on q and v a picture of 16 patches is complete after the second round."

    return run(check)


# --- 10.5: who was in the batch ---------------------------------------------------------------------------------


def check_present(function: Callable[[Tensor, Tensor, int], Collection[int]]) -> Feedback:
    """Exercise 10.5: ``function(gradient, features, pictures)`` names the candidates whose features the batch has."""

    def check() -> str:
        for classes, d, pictures, seed in ((10, 24, 1, 1), (10, 24, 3, 2), (20, 32, 5, 3)):
            features = _random(16, d, seed=seed) + 2 * _random(d, seed=seed + 9)  # alike, as features are
            features[::3] *= 4  # and of different lengths
            chosen = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:pictures].sort().values
            errors = _random(pictures, classes, seed=seed + 20)
            gradient = (errors.T @ features[chosen]).float()  # (K, d), rounded as a client's is
            answer = _collection(function(gradient.clone(), features.clone(), pictures), "The candidates")
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in answer):
                stop("Return the candidates' numbers, from 0, as whole numbers.")
            wanted = chosen.tolist()
            if sorted(answer) == wanted:
                continue
            if len(answer) != pictures:
                stop(f"{pictures} candidates are asked for, and you return {len(answer)}.")
            right = len(set(answer) & set(wanted))
            if right == 0 and pictures > 1:
                stop("None of them is right. Do you take the candidates farthest from the span?")
            stop(
                f"With {pictures} in the batch {right} of your candidates are right. A candidate was there if its "
                "features lie in the span of the gradient's rows: compare what sticks out of all "
                f"{pictures} directions with the candidate's own length."
            )
        return "Right: the head alone, no closed form for the pixels, and the list of those present."

    return run(check)


# --- 10.6: which set of tensors leaks ---------------------------------------------------------------------------

_HEAD = ("head.weight", "head.bias")
#: What each of the five sets shares, by the beginnings of names.
_SETS = {
    "A": ("patch_embedding.", *_HEAD),
    "B": ("blocks.0.attention.value.weight", *_HEAD),
    "C": ("blocks.0.attention.key.weight", *_HEAD),
    "D": ("blocks.1.", *_HEAD),
    "E": ("patch_embedding.weight", "position_embedding"),
}
_WHY = {
    "A": "∂W_e = GᵀX, and G is not there: the patches are known up to an invertible matrix",
    "B": "W_V alone has d rows, which span all n + 1 inputs of the first attention, and p + n + 2 = 114 ≤ 120",
    "C": "a shift of all keys changes no attention, so Σ_i ∂l/∂k_i = 0: its rows span the differences of the inputs. "
    "And one input is public, the class token's LN(c + E_0): with its row the span of all 65 is there",
    "D": "what the second block reads has been through attention and MLP, and is not affine in the pixels",
    "E": "G and ∂W_e are both there, and n = 64 ≤ 119: chapter 04's system, whatever else is kept",
}


def five_sets() -> tuple[VisionTransformer, dict[str, list[str]]]:
    """The model of Exercise 10.6, and its five sets of tensors by name.

    >>> model, sets = five_sets()
    >>> sets["C"]
    ['blocks.0.attention.key.weight', 'head.weight', 'head.bias']
    """
    model = VisionTransformer(image_size=32, patch_size=4, width=120, depth=3, heads=3, classes=10, seed=2).double()
    names = [name for name, _ in model.named_parameters()]
    return model, {letter: [name for name in names if name.startswith(starts)] for letter, starts in _SETS.items()}


@cache
def _leaking() -> frozenset[str]:
    """The letters whose tensors alone give the picture: found by attacking."""
    model, sets = five_sets()
    image = _random(1, 3, 32, 32, seed=5).clamp(-1, 1)
    update = client_update(model, image, torch.tensor([3]))
    found = set()
    for letter, names in sets.items():
        kept = tuple(name for name in update.gradients if name not in names)
        part = ClientUpdate({name: update.gradients[name] for name in names}, withheld=kept, batch_size=1)
        try:
            result = invert(model, part, attack="embedding" if letter == "E" else "span")
        except AttackNotApplicable:
            continue
        if float((result.images - image).abs().max()) < 1e-4:
            found.add(letter)
    return frozenset(found)


def check_sets(function: Callable[[dict[str, list[str]]], Collection[str]]) -> Feedback:
    """Exercise 10.6: ``function(sets)`` names the sets of tensors from which a closed form has the picture."""

    def check() -> str:
        answer = _collection(function(five_sets()[1]), "The letters")
        if strange := [letter for letter in answer if letter not in _SETS]:
            stop(f"Return letters from A to E, not {strange[0]!r}.")
        leaking = _leaking()
        for letter, why in _WHY.items():
            if letter in leaking and letter not in answer:
                stop(f"The attack was run on {letter}, which you left out, and the picture came back: {why}.")
            if letter in answer and letter not in leaking:
                stop(f"The attack was run on {letter}, and no closed form gave the picture: {why}.")
        return "Right, and tried: one matrix of the first attention is enough, the keys' with the class token's help."

    return run(check)
