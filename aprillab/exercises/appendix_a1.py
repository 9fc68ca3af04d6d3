"""Checks of appendix A1, what float32 takes and how to win it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .feedback import Feedback, expect_close, expect_number, expect_tensor, run, stop


def check_damped(function: Callable[[Tensor, Tensor, float], Tensor]) -> Feedback:
    """Exercise A1.1: the minimizer of Σ (a y − b)² + λ y², entry by entry."""

    def compare(a: Tensor, b: Tensor, damping: float, what: str) -> None:
        answer = expect_tensor(function(a.clone(), b.clone(), damping), tuple(a.shape), what)
        unused = damping / (a**2 + damping)
        mistakes = {
            "That is φ·b: the filtered right side, not yet divided by a.": (1 - unused) * b,
            "The damping enters as λ², but the sum has λ y²: λ itself is not squared.": a * b / (a**2 + damping**2),
            "A factor 2 is left over: both terms of the derivative have it.": a * b / (a**2 + 2 * damping),
            "A factor 2 is missing: both terms of the derivative have it.": a * b / (a**2 + damping / 2),
            "The denominator needs a², not a.": a * b / (a + damping),
            "That is (1 − φ)·b/a: what the filter takes away.": unused * b / a,
            "That is b/(a + λ): it shifts a instead of minimizing the sum.": b / (a + damping),
            "It is not damped: that is b/a.": b / a,
            "The a in the numerator is missing.": b / (a**2 + damping),
        }
        expect_close(answer, a * b / (a**2 + damping), what, mistakes=mistakes)

    def body() -> str:
        values = torch.tensor([[1.0, 2.0], [4.0, 0.5]], dtype=torch.float64)
        compare(values, torch.ones_like(values), 3.0, "y for b = 1 and λ = 3")
        a, b = _normal(torch.Generator().manual_seed(34), (4, 6), (4, 6))
        for damping in (1e-6, 0.3, 50.0):
            compare(a.abs(), b, damping, f"y for λ = {damping:g}")
        a = torch.tensor([0.0, 1e-30, 2.0], dtype=torch.float64)
        compare(a, torch.ones(3, dtype=torch.float64), 1e-3, "y where some a are zero")
        return "Right: b/a where a is large, nothing where it is small, and no division by zero."

    return run(body)


def check_left_out(function: Callable[[Tensor, Tensor, float], Tensor]) -> Feedback:
    """Exercise A1.2: each equation's residual (N,) when it is predicted by a damped
    fit to the others.
    """

    def compare(A: Tensor, b: Tensor, damping: float, what: str) -> None:
        answer = expect_tensor(function(A.clone(), b.clone(), damping), tuple(b.shape), what)
        size = A.shape[1]
        H = A @ torch.linalg.solve(A.T @ A + damping * torch.eye(size).to(A), A.T)  # (N, N)
        residual, leverage = b - H @ b, H.diagonal()
        wanted = residual / (1 - leverage)
        refits = []
        for i in range(len(b)):
            kept = torch.arange(len(b)) != i
            refits.append(A[i] @ torch.linalg.pinv(A[kept], rtol=1e-12) @ b[kept])
        mistakes = {
            "That is the residual of the fit to all equations, its own among them.": residual,
            "Those are the predictions: take them from b.": b - wanted,
            "Those are the fitted values of the fit to all equations.": H @ b,
            "The fits to the others are not damped.": b - torch.stack(refits),
            "It multiplies by one minus the leverage where it should divide.": residual * (1 - leverage),
            "It divides by the leverage, not by one minus it.": residual / leverage,
            "Each equation has a leverage of its own; the mean will have its turn later.": (
                residual / (1 - leverage.mean())
            ),
            "They are squared: return the residuals themselves.": wanted**2,
        }
        expect_close(answer, wanted, f"{what} ({len(b)} equations, {size} unknowns)", mistakes=mistakes)

    def body() -> str:
        ones = torch.ones(4, 1, dtype=torch.float64)
        compare(ones, torch.tensor([0.0, 2.0, 4.0, 6.0]).double(), 1.0, "What is left of four measurements")
        generator = torch.Generator().manual_seed(2)
        for N, K, damping in ((7, 3, 0.5), (30, 12, 1e-2), (9, 9, 2.0)):
            A, b = _normal(generator, (N, K), (N,))
            compare(A, b, damping, f"What is left for λ = {damping:g}")
        return "Right: every equation was predicted by the others."

    return run(body)


def check_average_score(function: Callable[[Tensor, int], float]) -> Feedback:
    """Exercise A1.3: the score V of a moving average of 2·half + 1 points, cut at the ends."""

    def averaging(N: int, half: int) -> Tensor:
        place = torch.arange(N)
        near = ((place[:, None] - place).abs() <= half).double()
        return near / near.sum(1, keepdim=True)  # (N, N)

    def compare(b: Tensor, half: int, what: str) -> None:
        answer = torch.tensor(expect_number(function(b.clone(), half), what), dtype=torch.float64)
        N, S = len(b), averaging(len(b), half)
        residual, leverage = b - S @ b, S.diagonal()
        misfit, free = residual.square().mean(), 1 - leverage.mean()
        place = torch.arange(N)
        ring = ((place[:, None] - place + half) % N <= 2 * half).double() / (2 * half + 1)
        padded = ((place[:, None] - place).abs() <= half).double() / (2 * half + 1)
        inner = 1 - 1 / (2 * half + 1)
        mistakes = {
            "That is ordinary cross-validation: GCV keeps each point in its mean, and takes the mean leverage.": (
                (residual / (1 - leverage)).square().mean()
            ),
            "Near the ends fewer points are averaged, and a point's own share is larger than 1/(2·half + 1).": (
                misfit / inner**2
            ),
            "The denominator is not squared.": misfit / free,
            "The leverages are summed: divide the trace by the number of points.": misfit / (1 - leverage.sum()) ** 2,
            "That is the misfit alone.": misfit,
            "The squared residuals are summed: take their mean, as of the leverages.": N * misfit / free**2,
            "At the ends it goes round to the other side: average over the points that are there.": (
                (b - ring @ b).square().mean() / inner**2
            ),
            "Beyond the ends it averages zeros: divide by the number of points that are there.": (
                (b - padded @ b).square().mean() / inner**2
            ),
            "The denominator has the leverage where it should have one minus it.": misfit / leverage.mean() ** 2,
            "The root is too much: V is a mean of squares.": misfit.sqrt() / free,
        }
        expect_close(answer, misfit / free**2, what, mistakes=mistakes)

    def body() -> str:
        compare(torch.tensor([6.0, 2.0, 3.0, 0.0, 4.0, 1.0]).double(), 1, "V for (6, 2, 3, 0, 4, 1) and half = 1")
        generator = torch.Generator().manual_seed(3)
        for N, half in ((12, 2), (31, 5), (20, 1)):
            compare(_normal(generator, (N,))[0], half, f"V for {N} points and half = {half}")
        return "Right, at the ends too: any linear smoother can be scored like this."

    return run(body)


def check_expected_error(function: Callable[[Tensor, Tensor, float, float], Tensor]) -> Feedback:
    """Exercise A1.4: bias² + variance of the damped solution, entry by entry."""

    def compare(a: Tensor, y: Tensor, noise: float, damping: float, what: str) -> None:
        answer = expect_tensor(function(a.clone(), y.clone(), noise, damping), tuple(a.shape), what)
        under = a**2 + damping
        bias, spread = damping * y / under, noise * a / under
        mistakes = {
            "That is the noise's part alone; damping also pulls y towards zero.": spread**2,
            "That is what damping takes from y alone; the noise is missing.": bias**2,
            "The noise enters by its square: it is a standard deviation.": bias**2 + spread**2 / noise,
            "The noise of b has to be divided by a as well.": bias**2 + (a * spread) ** 2,
            "That is the plain solution's error, σ²/a².": noise**2 / a**2,
            "Bias and noise are independent: their squares add up, without a mixed term.": (bias + spread) ** 2,
            "The bias is missing its square.": bias + spread**2,
            "The noise's part is missing its square.": bias**2 + spread,
            "The bias is λ y/(a² + λ): what is missing of y, not what is left.": (a**2 * y / under) ** 2 + spread**2,
            "That is the root of it.": (bias**2 + spread**2).sqrt(),
        }
        expect_close(answer, bias**2 + spread**2, what, mistakes=mistakes)

    def body() -> str:
        two = torch.full((2,), 2.0, dtype=torch.float64)
        compare(two, torch.tensor([0.0, 3.0]).double(), 0.5, 4.0, "The error for a = 2, y = 0 and 3, σ = 0.5, λ = 4")
        generator = torch.Generator().manual_seed(4)
        for noise, damping in ((0.1, 1e-3), (2.0, 0.7)):
            a, y = _normal(generator, (3, 5), (3, 5))
            compare(a.abs() + 0.01, y, noise, damping, f"The error for σ = {noise:g}, λ = {damping:g}")
        return "Right: what damping takes from y, and what it lets through of the noise."

    return run(body)


def check_joined(function: Callable[..., tuple[Tensor, Tensor]]) -> Feedback:
    """Exercise A1.5: one system with the noise of the first that says all that two systems say."""

    def compare(a: Tensor, b: Tensor, c: Tensor, f: Tensor, noise_b: float, noise_f: float) -> None:
        what = f"for noises of {noise_b:g} and {noise_f:g}"
        answer: Any = function(a.clone(), b.clone(), c.clone(), f.clone(), noise_b, noise_f)
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            stop(f"Return two tensors, the joined a and the joined b; you returned a {type(answer).__name__}.")
        weight = noise_b / noise_f

        def joined(w: float) -> tuple[Tensor, Tensor]:
            root = (a**2 + w**2 * c**2).sqrt()
            return root, (a * b + w**2 * c * f) / root

        root, right = joined(weight)
        weighed = {
            "The two systems count alike in it; the noisier one should count less.": joined(1.0),
            "The weight is upside down: the noisier system counts more.": joined(1 / weight),
            "The weight should be squared in a² + w² c².": joined(weight**0.5),
            "The weight is squared twice.": joined(weight**2),
        }
        of_a = {reason: pair[0] for reason, pair in weighed.items()} | {
            "The root is missing.": root**2,
            "Squares are to be added, not the numbers themselves.": a + weight * c,
            "That is the first system's a: the second one adds to it.": a,
        }
        of_b = {reason: pair[1] for reason, pair in weighed.items()} | {
            "It is not divided by the joined a.": right * root,
            "It is divided by the joined a twice: that is y.": right / root,
            "The right sides are added as they are: multiply each by its own factor first.": (b + f) / root,
        }
        for name, got, wanted, unlike in (("a", answer[0], root, of_a), ("b", answer[1], right, of_b)):
            named = f"The joined {name} {what}"
            expect_close(expect_tensor(got, tuple(a.shape), named), wanted, named, mistakes=unlike)

    def body() -> str:
        generator = torch.Generator().manual_seed(5)
        for noise_b, noise_f in ((1.0, 1.0), (3.0, 0.5), (1e-3, 2e-2)):
            a, b, c, f = _normal(generator, (4, 5), (4, 5), (4, 5), (4, 5))
            compare(a.abs() + 0.1, b, c.abs() + 0.1, f, noise_b, noise_f)
        return "Right: two systems of different noise are one, and the code for one serves both."

    return run(body)


def _normal(generator: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal float64 tensors of these shapes."""
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
