"""Checks for chapter 07: the span attack, and rounding to whole numbers.

References are built from tokens, patches and whole vectors that the check made itself, or from real
models whose private image the check knows; none calls the package's own attack.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..models import VisionTransformer, patchify, sinusoidal_2d
from ..update import client_update
from .feedback import Feedback, expect_close, expect_tensor, run, stop

F64 = torch.float64


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _projector(rows: Tensor) -> Tensor:
    """Onto the span of independent rows (k, d)."""
    Q = torch.linalg.qr(rows.T).Q
    return Q @ Q.T


def check_outside(function: Callable[[Tensor, int], Tensor]) -> Feedback:
    """Exercise 7.1: ``function(D (m, d), k)`` is the projector (d, d) onto what D's k strongest
    directions leave.
    """

    def check() -> str:
        _compare_outside(
            function, torch.eye(3, dtype=F64), torch.eye(3, dtype=F64), 1, "The projector for a diagonal D"
        )
        for m, d, k in ((9, 6, 3), (5, 5, 2), (4, 7, 2)):
            left, right = (torch.linalg.qr(_random(size, size, seed=seed)).Q for size, seed in ((m, k), (d, k + 9)))
            _compare_outside(function, left, right, k, "The projector")
        return "Right: multiply it to a token, and what is left tells how far the token is from the span."

    return run(check)


def _compare_outside(
    function: Callable[[Tensor, int], Tensor], left: Tensor, right: Tensor, k: int, what: str
) -> None:
    """D with these singular vectors in columns, and singular values that fall from 3 to 1."""
    m, d = len(left), len(right)
    count = min(m, d)
    D = left[:, :count] @ torch.diag(torch.linspace(3, 1, count, dtype=F64)) @ right[:, :count].T

    def without(vectors: Tensor) -> Tensor:
        return torch.eye(len(vectors), dtype=F64) - vectors @ vectors.T

    answer = expect_tensor(function(D, k), (d, d), what)
    mistakes = {
        "That is the projector onto the span; what lies outside is asked.": right[:, :k] @ right[:, :k].T,
        "One direction too many is removed.": without(right[:, : k + 1]),
        "One direction too few is removed.": without(right[:, : k - 1]),
        "Those are the weakest directions: svd sorts from large to small.": without(right[:, count - k : count]),
        # Of another shape unless D is square; such are skipped.
        "It is made of the left singular vectors; the span of *rows* has the right ones.": without(left[:, :k]),
    }
    expect_close(answer, without(right[:, :k]), what, mistakes=mistakes)


def check_directions(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 7.2: ``function(u (t, d), gamma (d,), beta (d,))`` gives the unit vectors along C
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

            answer = expect_tensor(function(u.clone(), gamma.clone(), beta.clone()), (t, d), "The directions")
            expect_close(
                answer,
                wanted,
                "The directions",
                mistakes={
                    "β is still in it: LayerNorm adds it last, so it goes first.": unit(u / gamma),
                    "β has the wrong sign: subtract it.": unit((u + beta) / gamma),
                    "γ multiplied once more; undo it by division.": unit((u - beta) * gamma),
                    "γ is still in it.": unit(u - beta),
                    "The order is wrong: u = γ·(…) + β, so subtract β before you divide by γ.": unit(
                        u / gamma - beta
                    ),
                    "The directions are right, their lengths are not 1.": (u - beta) / gamma,
                },
                tolerance=1e-6,
            )
        return "Right: γ and β are public. LayerNorm hides a token's mean and length, and nothing else."

    return run(check)


def check_width_needed(function: Callable[[int, int, int, bool], int]) -> Feedback:
    """Exercise 7.3: ``function(patches, pixels_per_patch, prefix, layernorm)`` is the least width
    d, an int.
    """

    def check() -> str:
        cases = ((16, 192, 3, True), (64, 48, 1, True), (16, 192, 3, False), (196, 768, 1, True), (100, 75, 0, False))
        for n, p, prefix, layernorm in cases:
            wanted = min(p, n) + n + prefix + layernorm
            answer = function(n, p, prefix, layernorm)
            if answer is None or answer is ...:
                stop("Nothing was returned yet. Is there a return at the end?")
            if isinstance(answer, bool) or not isinstance(answer, int):
                stop(f"Return an int, not a {type(answer).__name__}.")
            if answer == wanted:
                continue
            looks = {
                p + n + prefix + layernorm: "x_i lies in the row space of ∂W_e, so it has at most n unknowns.",
                n + n + prefix + layernorm: "a patch of p pixels has at most p unknowns.",
                min(p, n) + n + layernorm: "the tokens before the patches are in the span too.",
                min(p, n) + n + 1 + layernorm: "the prefix may be more or less than one class token.",
                min(p, n) + n + prefix: "LayerNorm's mean takes one dimension.",
                min(p, n) + n + prefix + 1: "without a LayerNorm there is no mean to lose.",
                n + prefix + layernorm: "the equations must also pay for the min(p, n) unknowns.",
            }
            case = f"n = {n}, p = {p}, prefix = {prefix}, layernorm = {layernorm}"
            hint = looks.get(answer)
            stop(f"For {case} the width needed is {wanted}, not {answer}{': ' + hint if hint else '.'}")
        return "Right. You can now tell from a model's shapes alone whether the count is on the attacker's side."

    return run(check)


def _candidate(
    D: Tensor,
    dW: Tensor,
    W_e: Tensor,
    places: Tensor,
    prefix: int,
    *,
    centre: bool = True,
    rows: bool = True,
    extra: int = 0,
    sign: float = -1.0,
) -> Tensor:
    """The exact attack with its parts switchable, so that a wrong answer can be recognized."""
    n, d = places.shape
    C = torch.eye(d, dtype=F64) - (1 / d if centre else 0.0)
    V = torch.linalg.svd(D)[2][: n + prefix + extra]
    outside = (torch.eye(d, dtype=F64) - V.T @ V) @ C
    R = torch.linalg.svd(dW)[2][:n].T if rows else torch.eye(dW.shape[1], dtype=F64)
    Y = torch.linalg.lstsq(outside @ W_e @ R, sign * outside @ places.T, driver="gelsd").solution
    return (R @ Y).T


def check_span_attack(function: Callable[..., Tensor]) -> Feedback:
    """Exercise 7.4: ``function(D, dW, W_e, places, prefix)`` is the patches X (n, p), for γ = 1 and
    β = 0.
    """

    def check() -> str:
        for size, patch, width, prefix in ((8, 4, 56, 1), (12, 6, 40, 1), (8, 4, 56, 0)):
            model = VisionTransformer(
                image_size=size, patch_size=patch, width=width, depth=2, heads=4, classes=4, position="frozen",
                class_token=bool(prefix), seed=3,
            ).double()  # fmt: skip
            images = _random(1, 3, size, size, seed=5)
            gradients = client_update(model, images, torch.tensor([2])).gradients
            D = torch.cat([gradients[f"blocks.0.attention.{part}.weight"] for part in ("query", "key", "value")])
            dW = gradients["patch_embedding.weight"].flatten(1)
            W_e = model.patch_embedding.weight.detach().flatten(1)
            assert model.position_embedding is not None
            assert model.patch_embedding.bias is not None
            places = model.position_embedding.detach()[0, prefix:] + model.patch_embedding.bias.detach()
            X = patchify(images, patch)[0]
            answer = expect_tensor(function(D, dW, W_e, places, prefix), tuple(X.shape), "X")
            known = (D, dW, W_e, places, prefix)
            expect_close(
                answer,
                X,
                "X",
                mistakes={
                    "The right side's sign is wrong: W_e x + e is *in* the span, so what sticks out of W_e x cancels "
                    "what sticks out of e.": _candidate(*known, sign=1.0),
                    "LayerNorm's centring is missing: C z lies in the span, z does not.": _candidate(
                        *known, centre=False
                    ),
                    "A direction is missing: the span has n + prefix dimensions.": _candidate(*known, extra=-1),
                    "Among all solutions it is not the one in the row space of ∂W_e.": _candidate(*known, rows=False),
                },
                tolerance=1e-6,
            )
        return "Right, with fewer and with more pixels a patch than features: the frozen embedding is broken."

    return run(check)


def check_twin(function: Callable[[Tensor, int, int], Tensor]) -> Feedback:
    """Exercise 7.5: ``function(X (n, p), rows, columns)`` is another X' whose tokens lie in the
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


def _plane(S: Tensor, y: Tensor, *, sign: float = -1.0, nearest: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    """The nearest plane with its parts switchable, so that a wrong answer can be recognized."""
    z = torch.zeros_like(y)
    for k in range(len(y) - 1, -1, -1):
        z[k] = nearest((y[k] + sign * (S[k, k + 1 :] @ z[k + 1 :])) / S[k, k])
    return z


def _plane_mistakes(S: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {
        "The numbers are cut off; floor, // and int() do not go to the nearest.": _plane(S, y, nearest=torch.floor),
        "That is S⁻¹y rounded all at once: round each z_k before the coordinates in front of it are computed, with "
        "the rounded value.": torch.linalg.solve(S, y).round(),
        # Three slips, one value: what is subtracted is 0 in each.
        "Nothing was subtracted from y_k. Is the sum over j > k there? Do you go from the first to the last, where "
        "z_j is still 0? Is S transposed? The entries S_jk with j > k, below the diagonal, are 0.": _plane(
            S, y, sign=0.0
        ),
        "The later coordinates were added: subtract them.": _plane(S, y, sign=1.0),
        "S is transposed: row k of S holds S_kj, so go from the last coordinate to the first.": _plane(
            S.T.flip(0, 1), y.flip(0)
        ).flip(0),
    }


def _plane_case(p: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """S (p, p) as a reduced basis has it, y (p,) and z (p,), for which each mistake gives an answer
    of its own.

    y is S z and an error of less than half a step |S_kk| in each coordinate: then the nearest plane
    finds z.
    """
    generator = torch.Generator().manual_seed(seed)

    def within(limit: Tensor | float, *shape: int) -> Tensor:
        return limit * (2 * torch.rand(shape, generator=generator, dtype=F64) - 1)

    steps = 1.5 + within(0.5, p)
    S = within(steps[:, None] / 2, p, p).triu(1) + torch.diag(steps * torch.tensor([1, -1]).repeat(p)[:p])
    while True:
        z = within(9.0, p).round()
        y = S @ z + within(0.9 * steps / 2, p)
        answers = (z, *_plane_mistakes(S, y).values())
        if len({tuple(answer.tolist()) for answer in answers}) == len(answers):
            return S, y, z


def check_nearest_plane(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 7.6: ``function(S (p, p), y (p,))`` is Babai's nearest plane, whole numbers z (p,)
    with S z near y.

    S is upper triangular, its diagonal of either sign. The numbers may come in any dtype.
    """

    def check() -> str:
        one = torch.tensor([[-2.0]], dtype=F64), torch.tensor([-3.3], dtype=F64), torch.tensor([2.0], dtype=F64)
        for S, y, z in (one, *(_plane_case(p, seed) for p, seed in ((4, 1), (4, 2), (12, 3)))):
            what = f"z for p = {len(y)}"
            answer = expect_tensor(function(S.clone(), y.clone()), (len(y),), what).double()
            if not torch.equal(answer, answer.round()):
                stop(f"{what} is not made of whole numbers: round each z_k, before the next one is computed.")
            expect_close(answer, z, what, mistakes=_plane_mistakes(S, y))
        return "Right: an error of less than half of |S_kk| in each coordinate is rounded away, in any dimension."

    return run(check)
