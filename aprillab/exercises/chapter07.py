"""Checks for chapter 07: the span attack.

References are built from tokens, patches and noise that the check made itself, or from models whose
private image the check knows; none calls the package's own attack.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..models import VisionTransformer, patchify
from ..update import client_update
from .feedback import Feedback, expect_close, expect_tensor, expect_whole, run, stop

F64 = torch.float64


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def check_directions(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 7.1: ``function(u (t, d), gamma (d,), beta (d,))`` gives the unit vectors along Π
    z_i, (t, d).
    """

    def check() -> str:
        for t, d, seed in ((1, 4, 1), (5, 8, 2)):
            z = _random(t, d, seed=seed)
            gamma, beta = _random(d, seed=seed + 1) + 2, _random(d, seed=seed + 2)
            centred = z - z.mean(1, keepdim=True)
            wanted = centred / centred.norm(dim=1, keepdim=True)
            u = torch.nn.functional.layer_norm(z, (d,), gamma, beta, eps=1e-9)

            def unit(x: Tensor) -> Tensor:
                return x / x.norm(dim=1, keepdim=True)

            answer = expect_tensor(function(u.clone(), gamma.clone(), beta.clone()), (t, d), "The answer")
            expect_close(
                answer,
                wanted,
                "The answer",
                mistakes={
                    "β is still in it: LayerNorm adds it last, so it goes first.": unit(u / gamma),
                    "β has the wrong sign: subtract it.": unit((u + beta) / gamma),
                    "γ multiplied once more; undo it by division.": unit((u - beta) * gamma),
                    "γ is still in it.": unit(u - beta),
                    "The order is wrong: u = γ·(…) + β, so subtract β before you divide by γ.": unit(
                        u / gamma - beta
                    ),
                    "u was centred, which does not take β off: LayerNorm centres first and adds β last.": unit(
                        u - u.mean(1, keepdim=True)
                    ),
                    "The directions are right, their lengths are not 1.": (u - beta) / gamma,
                },
                tolerance=1e-6,
            )
        return "Right: γ and β are public. LayerNorm hides a token's mean and length, and nothing else."

    return run(check)


def check_width_needed(function: Callable[[int, int, int, bool], int]) -> Feedback:
    """Exercise 7.2: ``function(patches, pixels_per_patch, prefix, layernorm)`` is the least width
    d, an int.
    """

    def check() -> str:
        cases = ((16, 192, 3, True), (64, 48, 1, True), (16, 192, 3, False), (196, 768, 1, True), (100, 75, 0, False))
        for n, p, prefix, layernorm in cases:
            wanted = min(p, n) + n + prefix + layernorm
            answer = expect_whole(function(n, p, prefix, layernorm), "The width")
            if answer == wanted:
                continue
            looks = {
                p + n + prefix + layernorm: "x_i lies in the row space of ∂W_e, so it has at most n unknowns.",
                n + n + prefix + layernorm: "a patch of p pixels has at most p unknowns.",
                min(p, n) + n + layernorm: "the tokens before the patches are in the span too.",
                min(p, n) + n + 1 + layernorm: "the prefix may be more or less than one class token.",
                min(p, n) + n + prefix: "LayerNorm's mean takes one dimension.",
                min(p, n) + n + prefix + 1: "without a LayerNorm there is no mean to lose.",
                min(p, n) + n + prefix + 2: "β/γ is not centred, so it takes none of the d − 1 centred dimensions.",
                n + prefix + layernorm: "the equations must also pay for the min(p, n) unknowns.",
            }
            case = f"n = {n}, p = {p}, prefix = {prefix}, layernorm = {layernorm}"
            hint = looks.get(answer)
            stop(f"For {case} the width needed is {wanted}, not {answer}{': ' + hint if hint else '.'}")
        return "Right. You can now tell from a model's shapes alone whether the count is on the attacker's side."

    return run(check)


def _candidate(
    D: Tensor, W_e: Tensor, places: Tensor, prefix: int, *, centre: bool = True, extra: int = 0, sign: float = -1.0
) -> Tensor:
    """The exact attack with its parts switchable, so that a wrong answer can be recognized."""
    n, d = places.shape
    centring = torch.eye(d, dtype=F64) - (1 / d if centre else 0.0)
    V = torch.linalg.svd(D)[2][: n + prefix + extra]
    outside = (torch.eye(d, dtype=F64) - V.T @ V) @ centring
    return torch.linalg.lstsq(outside @ W_e, sign * outside @ places.T, driver="gelsd").solution.T


def check_without_rows(function: Callable[..., Tensor | None]) -> Feedback:
    """Exercise 7.3: ``function(D, W_e, places, prefix)`` is the patches X (n, p), for γ = 1 and β =
    0, or None where the equations leave a patch open.
    """

    def check() -> str:
        for size, patch, width, prefix in ((8, 4, 54, 1), (6, 2, 24, 1), (8, 4, 53, 0), (8, 4, 53, 1), (8, 4, 30, 0)):
            D, W_e, places, X = _without_rows_case(size, patch, width, prefix)
            n, p = X.shape
            answer = function(D.clone(), W_e.clone(), places.clone(), prefix)
            equations = width - 1 - n - prefix
            count = f"For d = {width}, n = {n}, p = {p} and prefix = {prefix}"
            if equations < p:
                if answer is not None:
                    stop(
                        f"{count} there is no unique solution, and None is asked: d − 1 − (n + prefix) leaves "
                        f"{equations} independent equations for the {p} pixels of a patch."
                    )
                continue
            if answer is None:
                stop(
                    f"{count} the {equations} independent equations fix the {p} pixels of a patch: solve them. "
                    "If that was your return statement: the bound is not right yet."
                )
            answer = expect_tensor(answer, (n, p), "X")
            known = (D, W_e, places, prefix)
            mistakes = {
                "The right side's sign is wrong: W_e x + e is *in* the span, so what sticks out of W_e x cancels "
                "what sticks out of e.": _candidate(*known, sign=1.0),
                "LayerNorm's centring is missing: Π z lies in the span, z does not.": _candidate(
                    *known, centre=False
                ),
                "A direction is missing: the span has n + prefix dimensions.": _candidate(*known, extra=-1),
            }
            expect_close(answer, X, "X", mistakes=mistakes, tolerance=1e-5)
        return "Right: p + n + prefix + 1 ≤ d, and no gradient of either embedding was needed."

    return run(check)


def _without_rows_case(size: int, patch: int, width: int, prefix: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the server knows, D, W_e and the places, and the patches, (n, p)."""
    model = VisionTransformer(
        image_size=size, patch_size=patch, width=width, depth=2, heads=1, classes=4, position="frozen",
        class_token=bool(prefix), seed=3,
    ).double()  # fmt: skip
    images = _random(1, 3, size, size, seed=5)
    gradients = client_update(model, images, torch.tensor([2])).gradients
    D = torch.cat([gradients[f"blocks.0.attention.{part}.weight"] for part in ("query", "key", "value")])
    assert model.position_embedding is not None
    assert model.patch_embedding.bias is not None
    W_e = model.patch_embedding.weight.detach().flatten(1)
    places = model.position_embedding.detach()[0, prefix:] + model.patch_embedding.bias.detach()
    return D, W_e, places, patchify(images, patch)[0]


def check_equal_noise(function: Callable[[Tensor, int], Tensor]) -> Feedback:
    """Exercise 7.4: ``function(M (m, d), k)`` is M with each row over its noise, (m, d): in all
    rows the noise is equal then.
    """

    def check() -> str:
        for m, d, k, seed in ((300, 150, 5, 1), (240, 160, 9, 2)):
            generator = torch.Generator().manual_seed(seed)
            lengths, noise = (
                low * (high / low) ** torch.rand(m, generator=generator, dtype=F64)
                for low, high in ((3e-2, 1.0), (2e-6, 2e-5))
            )
            signal = _random(m, k, seed=seed + 10) @ _random(k, d, seed=seed + 20)
            rows = signal / signal.norm(dim=1, keepdim=True) + noise[:, None] * _random(m, d, seed=seed + 30)
            M = lengths[:, None] * rows
            answer = expect_tensor(function(M.clone(), k), (m, d), "The rows").double()
            factor = (answer * M).sum(1) / M.square().sum(1)
            if float((answer - factor[:, None] * M).norm() / answer.norm().clamp_min(1e-300)) > 1e-9:
                stop("A row may be scaled and not turned: each row of the answer is a factor times the row of M.")
            _compare_noise(factor, lengths, lengths * noise)
        return "Right: one factor a row, and an error costs the same in each."

    return run(check)


def _compare_noise(factor: Tensor, lengths: Tensor, noise: Tensor) -> None:
    """``factor · noise`` should be the same for all rows, up to what a few dozen numbers can tell."""

    def spread(values: Tensor) -> float:
        return float(values.max() / values.min().clamp_min(1e-300))

    if bool((factor <= 0).any()):
        stop("Some row was turned around, or lost: divide by a length, which is above 0.")
    if spread(factor * noise) < 3:
        return
    looks = {
        "All rows have the same factor, and so their old noise: each row needs a factor of its own.": factor,
        "The rows have length 1. That is right where the error goes with the row's size; here it does not. (Or the "
        "noise was measured along the strongest directions, which have nearly all of the row.)": factor * lengths,
    }
    for message, constant in looks.items():
        if spread(constant) < 1.01:
            stop(f"The noise is not equal yet. {message}")
    if min(spread(factor / noise), spread(factor * lengths.square() / noise)) < 2:
        stop("The noise is not equal yet. It was multiplied once more: divide each row by it.")
    stop(
        f"The noise is not equal yet: the noisiest row has {spread(factor * noise):.0f} times that of the quietest. "
        "Take what each row has in the directions beyond the k strongest."
    )


def check_how_many(function: Callable[[Tensor, int, int], int | None]) -> Feedback:
    """Exercise 7.5: ``function(D (m, d), patches, prefix)`` is the number of images behind an
    update, or None where the span is full.
    """

    def check() -> str:
        # Five tokens before four patches: B·n + prefix over n is B only where n > prefix.
        cases = ((1, 9, 1, 40), (3, 9, 1, 40), (2, 16, 5, 64), (4, 6, 0, 30), (2, 4, 5, 40), (8, 9, 1, 40))
        for images, n, prefix, d in cases:
            tokens = _random(images * n + prefix, d, seed=n + images)
            u = torch.nn.functional.layer_norm(tokens, (d,))
            D = _random(3 * d, len(u), seed=d) @ u
            full = len(u) >= d - 1
            answer = function(D.clone(), n, prefix)
            case = f"For n = {n}, prefix = {prefix}, d = {d} and {min(len(u), d - 1)} directions"
            if full:
                if answer is not None:
                    stop(
                        f"{case} the span is full: LayerNorm's outputs are centred (γ = 1, β = 0), so there are no "
                        "more than d − 1 to be had, and nobody can say how many tokens there were. Return None."
                    )
                continue
            if answer is None:
                stop(f"{case} the span is not full, and the number can be told; you returned None.")
            number = expect_whole(answer, "The number of images")
            if number != images:
                stop(f"{case} there were {images} images, not {number}.{_count_hint(number, images, n, prefix)}")
        return "Right: the class token is the same in every image, so B images have B·n + 1 directions."

    return run(check)


def _count_hint(number: int, images: int, n: int, prefix: int) -> str:
    directions = images * n + prefix
    if number == directions:
        return " That is the number of directions."
    if prefix and number == directions // (n + prefix):
        return (
            " The tokens before the patches have seen nothing yet: they are the same in every image and count once."
        )
    if number in (directions // n, (directions + n - 1) // n):
        return " The tokens before the patches come off first."
    return ""
