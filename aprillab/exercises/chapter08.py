"""Checks for chapter 08: what the span leaves open, and rounding to whole numbers.

References are built from tokens, patches and whole vectors that the check made itself; none calls
the package's own attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..models import sinusoidal_2d
from .feedback import Feedback, expect_close, expect_number, expect_tensor, expect_whole, run, stop

F64 = torch.float64


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _projector(rows: Tensor) -> Tensor:
    """Onto the span of independent rows (k, d)."""
    Q = torch.linalg.qr(rows.T).Q
    return Q @ Q.T


def check_twin(function: Callable[[Tensor, int, int], Tensor]) -> Feedback:
    """Exercise 8.1: ``function(X (n, p), rows, columns)`` is another X' whose tokens lie in the
    span of X's tokens.

    For any 2-D position embedding that is a row's part plus a column's part.
    """

    def check() -> str:
        for rows, columns, width in ((4, 4, 64), (3, 5, 64)):
            n, p = rows * columns, 27
            X, W_e = _random(n, p, seed=rows), _random(width, p, seed=9) / p**0.5
            places = sinusoidal_2d((rows, columns), width)[1:] + 0.1 * _random(width, seed=4)
            answer = expect_tensor(function(X.clone(), rows, columns), (n, p), "X'")
            if float((answer - X).abs().max()) < 1e-3:
                stop("X' is X: change at least one patch.")
            tokens, twins = X @ W_e.T + places, answer @ W_e.T + places
            outside = torch.eye(width, dtype=F64) - _projector(tokens)
            away = (twins @ outside).norm(dim=1) / twins.norm(dim=1)
            pixels_away = (answer @ (torch.eye(p, dtype=F64) - _projector(X))).norm() if n < p else torch.zeros(())
            if float(away.max()) > 1e-8:
                worst = int(away.argmax())
                stop(
                    f"Patch {worst} (from 0, grid {rows} × {columns}): {away[worst]:.1e} of its token leaves the "
                    "span. Do the position embeddings of what you added cancel? Four corners of a rectangle with the "
                    f"signs + − − + do. Patch (r, c) is row r·{columns} + c of X."
                )
            if float(pixels_away) > 1e-8:
                stop("Some patch leaves the row space of X: add combinations of patches, nothing else.")
        return "Right: two pictures, one span. No precision tells them apart by these equations."

    return run(check)


def check_open_directions(function: Callable[[int, int, int, int, bool], int]) -> Feedback:
    """Exercise 8.2: ``function(rows, columns, pixels, images, grid)`` is how many directions of a
    patch stay open at any precision, an int.
    """

    def check() -> str:
        cases = (
            (4, 4, 192, 1, True), (3, 5, 192, 1, True), (4, 4, 192, 2, True), (4, 4, 192, 2, False),
            (3, 5, 192, 3, False), (4, 4, 192, 1, False), (8, 8, 48, 1, True),
        )  # fmt: skip
        for rows, columns, pixels, images, grid in cases:
            n = rows * columns
            rank = rows + columns - 1 if grid else n
            wanted = min(pixels, images * n - rank)
            answer = expect_whole(function(rows, columns, pixels, images, grid), "The number of directions")
            if answer == wanted:
                continue
            looks = {
                images * n - rank: "a patch of p pixels has p directions, and no more can be open.",
                min(pixels, images * n - (rows + columns)): "both halves of the table can give the constant vector: "
                "rows and columns together have one dimension less.",
                min(pixels, images * (n - rank)): "the equations of the images do not stand side by side: their "
                "tokens lie in one span, B·n of them.",
                min(pixels, n - rank): "in a batch, tokens of different images at one place may be subtracted, too.",
                min(pixels, (images - 1) * n): "of a single image, too, combinations of places can vanish.",
                pixels - rank: "combinations of the B·n tokens are open: count these and not the p pixels.",
                rank: "that is the number of places that can be told apart; asked is what is left.",
            }
            table = "2-D sinusoids" if grid else "a random table"
            hint = f": {looks[answer]}" if answer in looks else "."
            stop(
                f"For {rows} × {columns} patches of {pixels} numbers, {table} and {images} image(s) it is {wanted}, "
                f"not {answer}{hint}"
            )
        return "Right: B·n tokens lie in the span, and only as many combinations of them show as E has rank."

    return run(check)


def check_expected_others(function: Callable[[Tensor], float]) -> Feedback:
    """Exercise 8.3: ``function(W (p, p))`` is the expected number of other whole pictures, as a
    power of ten.
    """

    def check() -> str:
        constant = 0.5 * math.log10(2 * math.pi * math.e)
        for p, spread, seed in ((1, 0.0, 1), (3, 2.0, 2), (192, 5.0, 3)):
            uniform = torch.rand(p, generator=torch.Generator().manual_seed(seed), dtype=F64)
            thetas = 10 ** (spread * (2 * uniform - 1)) / 3000
            left, right = (torch.linalg.qr(_random(p, p, seed=seed + more)).Q for more in (4, 5))
            W = left @ torch.diag(1 / thetas) @ right.T
            logs = float(thetas.log10().sum())
            what = f"The power of ten for p = {p}"
            answer = function(W.clone())
            if isinstance(answer, float) and math.isinf(answer):
                stop(f"{what} is {answer}: the product itself is too small or too large; add logarithms.")
            expect_close(
                torch.tensor(expect_number(answer, what), dtype=F64),
                torch.tensor(logs + p * constant, dtype=F64),
                what,
                mistakes={
                    message: torch.tensor(value, dtype=F64)
                    for message, value in {
                        "θ_k is one over a singular value of W: W measures in deviations.": p * constant - logs,
                        "The factor √(2πe) of each direction is missing.": logs,
                        "The factor √(2πe) belongs to each of the p directions, not to the product.": logs + constant,
                        "That is the natural logarithm; take log10.": (logs + p * constant) * math.log(10),
                        "That is the number itself; return its power of ten.": 10 ** (logs + p * constant),
                        "It is √(2πe), and not 2πe.": logs + 2 * p * constant,
                    }.items()
                },
                tolerance=1e-7,
            )
        return "Right. Now put the two tables in, and compare what you find with what you expected."

    return run(check)


def _plane(T: Tensor, t: Tensor, *, sign: float = -1.0, nearest: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    """The nearest plane with its parts switchable, so that a wrong answer can be recognized."""
    m = torch.zeros_like(t)
    for k in range(len(t) - 1, -1, -1):
        m[k] = nearest((t[k] + sign * (T[k, k + 1 :] @ m[k + 1 :])) / T[k, k])
    return m


def _plane_mistakes(T: Tensor, t: Tensor) -> dict[str, Tensor]:
    return {
        "The numbers are cut off; floor, // and int() do not go to the nearest.": _plane(T, t, nearest=torch.floor),
        "That is T⁻¹t rounded all at once: round each m_k before the coordinates in front of it are computed, with "
        "the rounded value.": torch.linalg.solve(T, t).round(),
        # Three slips, one value: what is subtracted is 0 in each.
        "Nothing was subtracted from t_k. Is the sum over j > k there? Do you go from the first to the last, where "
        "m_j is still 0? Is T transposed? The entries T_jk with j > k, below the diagonal, are 0.": _plane(
            T, t, sign=0.0
        ),
        "The later coordinates were added: subtract them.": _plane(T, t, sign=1.0),
        "T is transposed: row k of T holds T_kj, so go from the last coordinate to the first.": _plane(
            T.T.flip(0, 1), t.flip(0)
        ).flip(0),
    }


def _plane_case(p: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """T (p, p) as a reduced basis has it, t (p,) and m (p,), for which each mistake gives an answer
    of its own.

    t is T m and an error of less than half a step |T_kk| in each coordinate: then the nearest plane
    finds m.
    """
    generator = torch.Generator().manual_seed(seed)

    def within(limit: Tensor | float, *shape: int) -> Tensor:
        return limit * (2 * torch.rand(shape, generator=generator, dtype=F64) - 1)

    steps = 1.5 + within(0.5, p)
    T = within(steps[:, None] / 2, p, p).triu(1) + torch.diag(steps * torch.tensor([1, -1]).repeat(p)[:p])
    while True:
        m = within(9.0, p).round()
        t = T @ m + within(0.9 * steps / 2, p)
        answers = (m, *_plane_mistakes(T, t).values())
        if len({tuple(answer.tolist()) for answer in answers}) == len(answers):
            return T, t, m


def check_nearest_plane(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 8.4: ``function(T (p, p), t (p,))`` is Babai's nearest plane, whole numbers m (p,)
    with T m near t.

    T is upper triangular, its diagonal of either sign. The numbers may come in any dtype.
    """

    def check() -> str:
        one = torch.tensor([[-2.0]], dtype=F64), torch.tensor([-3.3], dtype=F64), torch.tensor([2.0], dtype=F64)
        for T, t, m in (one, *(_plane_case(p, seed) for p, seed in ((4, 1), (4, 2), (12, 3)))):
            what = f"m for p = {len(t)}"
            answer = expect_tensor(function(T.clone(), t.clone()), (len(t),), what).double()
            if not torch.equal(answer, answer.round()):
                stop(f"{what} is not made of whole numbers: round each m_k, before the next one is computed.")
            expect_close(answer, m, what, mistakes=_plane_mistakes(T, t))
        return "Right: an error of less than half of |T_kk| in each coordinate is rounded away, in any dimension."

    return run(check)


def check_chance(function: Callable[[Tensor], float]) -> Feedback:
    """Exercise 8.5: ``function(T (p, p))`` is the chance that the nearest plane finds m in t = T
    m + ε, ε standard normal.
    """

    def check() -> str:
        for diagonal, seed in (([2.0], 1), ([3.0, -2.5, 4.0], 2), ([-1.0, 5.0, 2.0, 6.0, -3.0], 3)):
            steps = torch.tensor(diagonal, dtype=F64)
            p = len(steps)
            T = torch.diag(steps) + _random(p, p, seed=seed).triu(1)
            right = torch.erf(steps.abs() / 8**0.5)
            what = f"The chance for p = {p}"
            answer = expect_number(function(T.clone()), what)
            values = {
                "A diagonal entry may be negative: a step has the length |T_kk|.": torch.erf(steps / 8**0.5).prod(),
                "An error of *half* a step is forgiven: |ε_k| < |T_kk| / 2.": torch.erf(steps.abs() / 2**0.5).prod(),
                "That is the chance of ε_k < |T_kk| / 2, with no bound below: an error can be negative, too.": (
                    (1 + right) / 2
                ).prod(),
                "erf(x) is the chance of |ε| < √2 x for a standard normal ε: divide by √2.": torch.erf(
                    steps.abs() / 2
                ).prod(),
                "That is the chance that at least one coordinate is wrong.": 1 - right.prod(),
            }
            if p > 1:
                values |= {
                    "All coordinates must be right, so their chances multiply; that is the least.": right.min(),
                    "All coordinates must be right, so their chances multiply; that is their mean.": right.mean(),
                }
            expect_close(
                torch.tensor(answer, dtype=F64),
                right.prod(),
                what,
                mistakes=values,
                tolerance=1e-7,
            )
        return "Right: the diagonal decides, its smallest entry most, and the entries above it do not matter."

    return run(check)
