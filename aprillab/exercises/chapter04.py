"""Checks for chapter 04: the patch-embedding system.

Every reference is a sum over patches written out, a system with a known solution, or autograd; none
is the package's own attack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, dissect
from ..attacks.result import AttackNotApplicable
from ..models import VisionTransformer, unpatchify
from ..preprocessing import HALF
from ..update import ClientUpdate, client_update
from .feedback import Feedback, expect_close, expect_numbers, expect_something, expect_tensor, expect_whole, run, stop

F64 = torch.float64


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


#: Exercise 4.1: two tokens' gradients, two patches of three pixels, and what another picture gave.
BY_HAND = {"G": [[1, 2], [3, 5]], "X": [[1, 0, 2], [0, -1, 1]], "other": [[-1, 1, 2], [-1, 2, 3]]}


def check_by_hand(function: Callable[[], tuple[Any, Any]]) -> Feedback:
    """Exercise 4.1: ``function()`` is ∂l/∂W_e (2, 3) of the picture ``BY_HAND``, and the other
    picture's patches (2, 3).
    """

    def check() -> str:
        G, X, other = (torch.tensor(BY_HAND[name], dtype=F64) for name in ("G", "X", "other"))
        W = torch.zeros(2, 3, dtype=F64, requires_grad=True)
        (wanted,) = torch.autograd.grad((G * (X @ W.T)).sum(), W)  # ∂l/∂z_i is row i of G
        answer = function()
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            stop(f"Return two tables, ∂l/∂W_e and the other patches; you returned a {type(answer).__name__}.")
        mistakes = {
            "Only the first patch is in it: W_e is used twice, and what both uses give adds up.": torch.outer(
                G[0], X[0]
            ),
            "Only the second patch is in it: W_e is used twice.": torch.outer(G[1], X[1]),
            "It is the mean over the patches; a matrix that is used twice collects the sum.": wanted / 2,
            "You multiplied rows of G by columns of X: of g_1 x_1ᵀ, the first row is g_11 times x_1.": G @ X,
        }
        expect_close(expect_numbers(answer[0], (2, 3), "∂l/∂W_e"), wanted, "∂l/∂W_e", mistakes=mistakes)
        patches = torch.linalg.solve(G.T, other)
        mistakes = {
            "The two patches have changed places.": patches.flip(0),
            "You solved with the rows of G; row j of ∂l/∂W_e has entry j of *both* g's.": torch.linalg.solve(
                G, other
            ),
            "That is the first picture; another one gave this gradient.": X,
            "That divides each row by one number, as with one input; two patches are mixed in it.": other / G[:, :1],
        }
        expect_close(expect_numbers(answer[1], (2, 3), "The other X"), patches, "The other X", mistakes=mistakes)
        return "Right: two equations for each of the three pixels, and what mixes them is in the update."

    return run(check)


#: Exercise 4.4: each model's options, and why its rank is what it is.
_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "deep": ({"depth": 3}, "There are 16 tokens in 64 dimensions, and nothing ties their gradients together."),
    "square": (
        {"depth": 3, "patch_size": 4},
        "LayerNorm subtracts the mean, so each g_i sums to zero, and one direction is lost.",
    ),
    "square, RMSNorm": (
        {"depth": 3, "patch_size": 4, "rms": True},
        "RMSNorm subtracts no mean, so there is no direction that all tokens lose.",
    ),
    "square, A": (
        {"depth": 3, "patch_size": 4, "block": "april"},
        "In A no LayerNorm stands between the tokens and the attention, so no direction is lost.",
    ),
    "one block of A": (
        {"depth": 1, "block": "april"},
        "The class token reads the patches once. Each of 4 heads sends back one vector by its values and one by its "
        "keys, and every g_i is made of these.",
    ),
    "one block": (
        {"depth": 1},
        "What the heads send back passes each token's own LayerNorm, which turns it in a way of its own.",
    ),
}


def rank_of(*, rms: bool = False, **options: Any) -> int:
    """The rank of G, patch rows only, that autograd gives for a small random ViT in float64."""
    sizes = {"image_size": 32, "patch_size": 8, "width": 64, "heads": 4, "classes": 10, "seed": 1}
    model = VisionTransformer(**(sizes | options)).double()
    if rms:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.LayerNorm):
                    setattr(module, name, torch.nn.RMSNorm(model.width, eps=1e-6, dtype=F64))
    update = client_update(model, _random(1, 3, 32, 32, seed=4), torch.tensor([7]))
    s = torch.linalg.svdvals(update.gradients["position_embedding"][0, 1:])
    return int((s > 1e-13 * s[0]).sum())


def check_ranks(function: Callable[[], dict[str, int]]) -> Feedback:
    """Exercise 4.4: ``function()`` predicts the rank of G for six models."""

    def check() -> str:
        answer = function()
        if not isinstance(answer, dict):
            stop(f"Return a dictionary, a number for each of the six models; you returned a {type(answer).__name__}.")
        if missing := [name for name in _MODELS if name not in answer]:
            stop(f"No number for {', '.join(missing)}.")
        guesses = {name: expect_whole(answer[name], f"The rank of {name!r}") for name in _MODELS}
        found = {name: rank_of(**options) for name, (options, _) in _MODELS.items()}
        wrong = [name for name in _MODELS if guesses[name] != found[name]]
        if wrong:
            name = wrong[0]
            extra = (
                " Did you count the class token's row? G has the patches' alone." if guesses[name] in (17, 65) else ""
            )
            stop(
                f"{6 - len(wrong)} of 6 right. {name}: you say {guesses[name]}, autograd gives {found[name]}. "
                f"{_MODELS[name][1]}{extra}"
            )
        return "Right, all six: the shape gives a bound, and what reads the tokens decides."

    return run(check)


def check_find_prefix(function: Callable[[Tensor, Tensor], int]) -> Feedback:
    """Exercise 4.2: ``function(position_gradient, bias_gradient)`` is the number of rows before the
    patches.

    The gradients have shapes (rows, d) and (d,).
    """

    def check() -> str:
        ones = torch.ones(5, 3, dtype=F64)
        _expect_prefix(function(ones.clone(), 4 * ones[0]), 1, 5, "five rows of ones and a bias gradient of fours")
        for prefix, n, d in ((1, 6, 4), (0, 5, 7), (2, 9, 5), (5, 4, 6)):
            P = _random(prefix + n, d, seed=prefix + n)
            what = f"{prefix + n} random rows"
            _expect_prefix(function(P.clone(), P[prefix:].sum(0)), prefix, prefix + n, what)
            rounded = P[prefix:].flip(0).float().sum(0)
            _expect_prefix(function(P.float(), rounded), prefix, prefix + n, what + " in float32")
        for class_token in (True, False):
            prefix = int(class_token)
            model = VisionTransformer(
                image_size=8, patch_size=4, width=12, depth=2, heads=2, classes=3, seed=5, class_token=class_token
            )
            gradients = client_update(model, _random(1, 3, 8, 8, seed=3).float(), torch.tensor([1])).gradients
            rows, bias = gradients["position_embedding"][0], gradients["patch_embedding.bias"]
            _expect_prefix(
                function(rows.clone(), bias.clone()), prefix, len(rows), "a real ViT's gradient in float32"
            )
        return "Right: (4.4) lets an auditor find the first patch without knowing the model's code."

    return run(check)


def _expect_prefix(answer: Any, prefix: int, rows: int, what: str) -> None:
    if answer is None or answer is ...:
        stop("Nothing was returned yet. For float32 gradients no sum fits exactly: take the one that fits best.")
    if isinstance(answer, bool) or not isinstance(answer, int):
        stop(f"Return an int, the number of rows before the patches, not a {type(answer).__name__}.")
    if answer == prefix:
        return
    looks = ""
    if answer == rows - prefix:
        looks = " That is the number of patches: the rows before them are asked."
    elif answer == prefix - 1:
        looks = " One too few: if the prefix is k, the patches are rows[k:], and row k is the first of them."
    elif answer == prefix + 1:
        looks = " One too many: with prefix = 0 all rows are patches, so the count begins at 0."
    stop(f"For {what} the answer is {prefix}, not {answer}.{looks}")


def check_solve_patches(function: Callable[[Tensor, Tensor, int], Tensor]) -> Feedback:
    """Exercise 4.3: ``function(patch_gradient, position_gradient, prefix)`` is the patches X (n,
    p).

    The gradients come as a ViT shares them, (d, C, P, P) and (1, prefix + n, d).
    """

    def check() -> str:
        # Identity first: with G = I the patches stand in the gradient, ready to be read.
        X = torch.arange(2.0 * 12, dtype=F64).reshape(2, 12)
        P = torch.cat([torch.ones(1, 2, dtype=F64), torch.eye(2, dtype=F64)])
        _compare_patches(function, X, P, 1, "X where every patch has a gradient direction of its own (G = I)")
        for prefix, n, d in ((1, 4, 9), (2, 5, 7), (0, 6, 6), (1, 3, 40)):
            _compare_patches(function, _random(n, 12, seed=n), _random(prefix + n, d, seed=d), prefix, "X")
        return "Right, also where a patch has more pixels than a token has features."

    return run(check)


def _compare_patches(
    function: Callable[[Tensor, Tensor, int], Tensor], X: Tensor, P: Tensor, prefix: int, what: str
) -> None:
    """Patches X (n, 12) under the position gradient P (prefix + n, d)."""
    n, d, W = len(X), P.shape[1], P[prefix:].T @ X
    answer = expect_tensor(function(W.reshape(d, 3, 2, 2).clone(), P[None].clone(), prefix), (n, 12), "X")
    mistakes = {
        "The rows of G are off: the class token's row is in it and the last patch's is not.": _solve(P[:n], W),
        "The class token was solved for as if it were a patch.": _solve(P, W)[:n],
        "Only the first token was cut off; there are `prefix` of them.": _solve(P[1:], W)[:n],
        "It is the gradient's product with G: the system is not solved yet.": P[prefix:] @ W,
    }
    # With G = I the product and the solution are one; the right answer has passed before mistakes
    # are tried.
    expect_close(answer, X, what, mistakes=mistakes, tolerance=1e-6)


def _solve(G: Tensor, W: Tensor) -> Tensor:
    """X of Gᵀ X = W by least squares, of minimal norm where it is not unique."""
    return torch.linalg.lstsq(G.T, W, driver="gelsd").solution


def _synthetic(prefix: int, size: tuple[int, int], d: int, seed: int) -> tuple[ClientUpdate, Anatomy, Tensor]:
    """An update with a known solution, for patches of 2 × 2 pixels in three channels; its patches X
    (n, 12).
    """
    n = (size[0] // 2) * (size[1] // 2)
    X, P = _random(n, 12, seed=seed), _random(prefix + n, d, seed=seed + 1)
    gradients = {"stem.weight": (P[prefix:].T @ X).reshape(d, 3, 2, 2), "places": P[None]}
    anatomy = Anatomy(
        family="exercise", image_size=size, patch_weight="stem.weight", position="places", position_prefix=prefix,
        preprocessing=HALF,
    )  # fmt: skip
    return ClientUpdate(gradients), anatomy, X


def check_attack(function: Callable[[ClientUpdate, Anatomy], Tensor]) -> Feedback:
    """Exercise 4.6: ``function(update, anatomy)`` is the picture (1, C, H, W) in model-input space,
    or a refusal.
    """

    def check() -> str:
        for prefix, size, d in ((1, (4, 4), 9), (0, (4, 6), 16), (2, (6, 4), 11), (2, (4, 4), 5)):
            update, anatomy, X = _synthetic(prefix, size, d, seed=d)
            wanted = unpatchify(X[None], 2, size)
            rows, columns = size[0] // 2, size[1] // 2
            by_columns = X.reshape(columns, rows, 12).transpose(0, 1).reshape(1, -1, 12)
            channels_last = X.reshape(-1, 2, 2, 3).permute(0, 3, 1, 2).reshape(1, -1, 12)
            try:
                found = function(update, anatomy)
            except AttackNotApplicable:
                stop(f"n = {len(X)} patches fit into a width of {d}: do not count the {prefix} prefix rows.")
            answer = expect_tensor(found, (1, 3, *size), "The picture")
            expect_close(
                answer,
                wanted,
                "The picture",
                mistakes={
                    "Patches are laid out column by column; they come row by row.": unpatchify(by_columns, 2, size),
                    "The numbers of a patch come as (channel, y, x), not (y, x, channel).": unpatchify(
                        channels_last, 2, size
                    ),
                    "Height and width are swapped within it.": wanted.transpose(-1, -2),
                    "It was mapped to pixels: return model-input space.": HALF.to_pixels(wanted),
                    "It was mapped to pixels (unclamped): return model-input space.": HALF.to_pixels(
                        wanted, clamp=False
                    ),
                    "The patches are one place off: whose row does G start with?": unpatchify(
                        X.roll(1, 0)[None], 2, size
                    ),
                },
                tolerance=1e-6,
            )
        _attack_real_models(function)
        _attack_must_refuse(function)
        return "Right, on two architectures, and it says no where it must. You can attack a ViT you have never seen."

    return run(check)


def _attack_real_models(function: Callable[[ClientUpdate, Anatomy], Tensor]) -> None:
    """Autograd's gradients of real models, with and without a class token."""
    for options in ({"block": "prenorm"}, {"block": "april"}, {"block": "prenorm", "class_token": False}):
        model = VisionTransformer(
            image_size=12, patch_size=4, width=24, depth=2, heads=3, classes=4, seed=2, **options
        ).double()
        images = _random(1, 3, 12, 12, seed=7)
        update = client_update(model, images, torch.tensor([2]))
        answer = expect_tensor(function(update, dissect(model)), (1, 3, 12, 12), "The picture from a ViT's gradient")
        expect_close(answer, images, f"The picture from a ViT ({options})", tolerance=1e-5)


def _attack_must_refuse(function: Callable[[ClientUpdate, Anatomy], Tensor]) -> None:
    many, anatomy, _ = _synthetic(1, (4, 6), 5, seed=1)
    for update, what in (
        (many, "6 patches and a width of 5 leave the system without a unique solution"),
        (many.without({"places"}), "the position embedding's gradient is not in the update"),
    ):
        try:
            function(update, anatomy)
        except AttackNotApplicable:
            continue
        except NotImplementedError:
            raise
        except Exception as error:
            stop(f"Where {what}, raise al.AttackNotApplicable; your code raised {type(error).__name__}: {error}")
        stop(f"Where {what}, the attack must refuse: raise al.AttackNotApplicable(name, reason).")


def check_predicted_mse(function: Callable[[Tensor, Tensor], float]) -> Feedback:
    """Exercise 4.5: ``function(G (n, d), patch_gradient (d, p))`` is the mean squared error to
    expect of X.
    """

    def check() -> str:
        n, d, p = 4, 12, 6
        exact = _as_number(function(_random(n, d, seed=1), _random(n, d, seed=1).T @ _random(n, p, seed=2)))
        if not 0 <= exact < 1e-12:
            stop(f"Where the equations hold exactly the predicted error is zero, not {exact:.3g}.")
        for n, d, p, seed in ((4, 12, 6, 3), (3, 30, 5, 4), (7, 9, 2, 5)):
            G = _random(n, d, seed=seed) * torch.logspace(0, -2, n, dtype=F64)[:, None]
            W = G.T @ _random(n, p, seed=seed + 1) + 1e-3 * _random(d, p, seed=seed + 2)
            # What no choice of X explains, by a projection rather than by a solve.
            Q = torch.linalg.qr(G.T, mode="complete").Q[:, n:]
            square = float((Q.T @ W).square().sum())
            noise, s = square / ((d - n) * p), torch.linalg.svdvals(G)
            wanted = noise * float((1 / s**2).mean())
            plain, inverse, total, upside_down = (
                square / (d * p) * float((1 / s**2).mean()),
                noise * float((1 / s).mean()),
                wanted * n,
                noise / float((s**2).mean()),
            )
            answer = torch.tensor(_as_number(function(G.clone(), W.clone())), dtype=F64)
            expect_close(
                answer,
                torch.tensor(wanted, dtype=F64),
                "The predicted mean squared error",
                mistakes={
                    "The residual is divided by all d·p equations; the fit leaves (d − n)·p to spare.": torch.tensor(
                        plain, dtype=F64
                    ),
                    "The error of a component is noise / s, so its *square* carries 1/s².": torch.tensor(
                        inverse, dtype=F64
                    ),
                    "It is summed over the n components; a mean squared error is their mean.": torch.tensor(
                        total, dtype=F64
                    ),
                    "That divides by the mean of s²; each component has an s of its own: the mean of 1/s².": (
                        torch.tensor(upside_down, dtype=F64)
                    ),
                    "That is the root of it.": torch.tensor(wanted**0.5, dtype=F64),
                    "That is the noise of one equation; carry it through the solve.": torch.tensor(noise, dtype=F64),
                    "That is the mean squared residual, which judges the equations; X is asked.": torch.tensor(
                        square / (d * p), dtype=F64
                    ),
                },
                tolerance=1e-6,
            )
        return "Right: the equations left over measure the noise, and the singular values say what it does to X."

    return run(check)


def _as_number(answer: Any) -> float:
    expect_something(answer)
    try:
        return float(answer)
    except (TypeError, ValueError):
        stop(f"Return one number, not a {type(answer).__name__}.")
        raise AssertionError from None  # stop never returns
