"""Checks of chapter 03, the closed-form attack. Tokens and patches are rows: Z (n + 1, d), X (n,
p).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models import VisionTransformer
from ..preprocessing import HALF
from ..update import ClientUpdate, client_update
from .feedback import Feedback, expect_close, expect_tensor, run, stop


def check_conditions(function: Callable[[int, int, int, int], tuple[bool, bool]]) -> Feedback:
    """Exercise 3.1: (n + 1 ≤ d, p ≤ d) from image size, patch size, channels and width."""

    def compare(image: int, patch: int, channels: int, width: int) -> None:
        answer = function(image, patch, channels, width)
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            stop(f"Return two truth values, for tokens and for pixels; you returned {answer!r}.")
        n, p = (image // patch) ** 2, channels * patch**2
        right = (n + 1 <= width, p <= width)
        shape = f"image {image}, patch {patch}, {channels} channel(s), width {width}: n = {n}, p = {p}"
        if bool(answer[0]) != right[0]:
            hint = ""
            if n == width:
                hint = " The class token is a token too: it is n + 1 that counts."
            elif n + 1 == width:
                hint = " Equality is enough: a square system with independent columns has one solution."
            elif image // patch + 1 <= width < n:
                hint = " The patches lie in a square grid: their number is a square."
            stop(f"Tokens are {'' if right[0] else 'not '}determined for {shape}.{hint}")
        if bool(answer[1]) != right[1]:
            hint = ""
            if patch**2 <= width < p:
                hint = " A patch has all its channels' numbers."
            elif p == width:
                hint = " Equality is enough: a square system with independent columns has one solution."
            elif (n <= width) == bool(answer[1]) or (n + 1 <= width) == bool(answer[1]):
                hint = " The second system has one unknown for each number in a patch."
            stop(f"Pixels are {'' if right[1] else 'not '}determined for {shape}.{hint}")

    def body() -> str:
        for shape in ((32, 4, 3, 384), (32, 4, 3, 24), (224, 16, 3, 768), (224, 16, 3, 384), (224, 16, 1, 256)):
            compare(*shape)
        for shape in ((32, 4, 3, 64), (32, 4, 3, 65), (8, 4, 3, 48), (28, 7, 1, 48), (28, 7, 1, 17), (32, 8, 3, 191)):
            compare(*shape)
        return "Right, on the borderlines too."

    return run(body)


def check_tokens_from(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 3.2: least-squares tokens Z (t, d) with Gᵀ Z = M."""

    def compare(G: Tensor, M: Tensor, what: str) -> None:
        answer = expect_tensor(function(G.clone(), M.clone()), tuple(G.shape), what)
        inverse = torch.linalg.pinv(G.T)
        mistakes = {
            "It solves Gᵀ Z = Mᵀ: M stands as it is.": inverse @ M.T,
            "It is G M, which forgets to divide by G Gᵀ.": G @ M,
        }
        if G.shape[0] == G.shape[1]:
            mistakes["It solves G Z = M: transpose G."] = torch.linalg.pinv(G) @ M
        expect_close(answer, inverse @ M, what, mistakes=mistakes)

    def body() -> str:
        eye, ones = torch.eye(4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
        compare(2 * eye[:3], 2 * eye[:3].T @ ones, "Z for G = 2·(the first three unit vectors) and M = Gᵀ·1")
        generator = torch.Generator().manual_seed(32)
        for t, d, noise in ((3, 6, 0.0), (5, 5, 0.0), (4, 9, 0.1)):
            G, Z, E = _normal(generator, (t, d), (t, d), (d, d))
            compare(G, G.T @ Z + noise * E, f"Z for t = {t}, d = {d}" + (" and a noisy M" if noise else ""))
        return "Right: exact where it can be, and least squares where M is noisy."

    return run(body)


def check_patches_from(function: Callable[..., Tensor]) -> Feedback:
    """Exercise 3.3: patches X (n, p) from tokens Z (n + 1, d), position embedding, W_e (d, p) and
    b_e (d,).
    """

    def body() -> str:
        generator = torch.Generator().manual_seed(33)
        for n, p, d, noise in ((3, 2, 5, 0.0), (4, 4, 4, 0.0), (4, 3, 8, 0.1)):
            X, W, c, E, bias = _normal(generator, (n, p), (d, p), (1, d), (n + 1, d), (d,))
            Z = torch.cat([c, X @ W.T + bias]) + E
            Z += noise * _normal(generator, (n + 1, d))[0]
            inverse = torch.linalg.pinv(W).T  # (d, p)
            wanted = (Z - E)[1:] @ inverse - bias @ inverse
            what = f"X for n = {n}, p = {p}, d = {d}" + (" and noisy tokens" if noise else "")
            answer = expect_tensor(function(Z.clone(), E.clone(), W.clone(), bias.clone()), (n, p), what)
            mistakes = {
                "The bias b_e was not taken off.": (Z - E)[1:] @ inverse,
                "The bias was added; take it off.": (Z - E)[1:] @ inverse + bias @ inverse,
                "The position embedding was not taken off.": (Z[1:] - bias) @ inverse,
                "The position embedding was added; take it off.": (Z + E)[1:] @ inverse - bias @ inverse,
                "The position embedding is off by one token: patch i stands in row i of both.": (
                    Z[1:] - E[:-1] - bias
                )
                @ inverse,
                "The last token was dropped; the class token is the first.": ((Z - E)[:-1] - bias) @ inverse,
                "That multiplies by W_e where the system W_e x = z − E − b_e has to be solved.": ((Z - E)[1:] - bias)
                @ W,
            }
            expect_close(answer, wanted, what, mistakes=mistakes)
        return "Right: class token dropped, embedding and bias off, one solve for all patches."

    return run(body)


def check_damped(function: Callable[[Tensor, Tensor, float], Tensor]) -> Feedback:
    """Exercise 3.4: the minimizer of Σ (a y − b)² + λ y², entry by entry."""

    def compare(a: Tensor, b: Tensor, damping: float, what: str) -> None:
        answer = expect_tensor(function(a.clone(), b.clone(), damping), tuple(a.shape), what)
        unused = damping / (a**2 + damping)
        mistakes = {
            "That is φ·b: the filtered right side, not yet divided by a.": (1 - unused) * b,
            "The damping enters as λ², but it stands squared already.": a * b / (a**2 + damping**2),
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


def check_choose_damping(function: Callable[[Tensor, Tensor, float, int, Sequence[float]], float]) -> Feedback:
    """Exercise 3.5: the candidate with the least generalized cross-validation score."""

    def best(a: Tensor, b: Tensor, rest: float, spare: int, candidates: Sequence[float], kind: str) -> float:
        def score(damping: float) -> float:
            used = a**2 / (a**2 + damping)
            misfit, free = float(((1 - used) * b).square().sum()), float((1 - used).sum())
            return {
                "gcv": (misfit + rest) / (free + spare) ** 2,
                "greatest": -(misfit + rest) / (free + spare) ** 2,
                "misfit": misfit + rest,
                "squares": (misfit + rest) / (float((1 - used).square().sum()) + spare),
                "squares, squared": (misfit + rest) / (float((1 - used).square().sum()) + spare) ** 2,
                "unsquared": (misfit + rest) / (free + spare),
                "used": (misfit + rest) / (float(used.sum()) + spare) ** 2,
                "rest squared": (misfit + rest**2) / (free + spare) ** 2,
                "no rest": misfit / (free + spare) ** 2,
                "no spare": (misfit + rest) / free**2,
                "neither": misfit / free**2,
            }[kind]

        return min(candidates, key=score)

    reasons = {
        "greatest": "That is where the score is greatest, not least.",
        "misfit": "The misfit alone always prefers the smallest λ: divide it by the freedom left, squared.",
        "neither": "The equations that no picture can meet are missing: rest above, spare below.",
        "no rest": "The rest is missing in the numerator.",
        "no spare": "The spare equations are missing in the denominator.",
        "unsquared": "The denominator is not squared.",
        "squares": "The denominator is the square of a sum, not a sum of squares.",
        "squares, squared": "The denominator is the square of a sum; the terms of the sum are not squared.",
        "used": "The denominator has φ where it should have 1 − φ.",
        "rest squared": "The rest is squared, but it is a squared residual already.",
    }

    def body() -> str:
        generator = torch.Generator().manual_seed(35)
        candidates = [10 ** (-k / 4) for k in range(-8, 49)]
        suspects = set(reasons)  # mistakes that explain every answer so far
        wrong = ""
        for noise, spare in ((1e-1, 3), (1e-2, 400), (1e-3, 0), (1e-4, 400), (3e-1, 100)):
            y, e = _normal(generator, (6, 10), (6, 10))
            a = 10 ** (-4 * torch.rand(6, 10, generator=generator, dtype=torch.float64))
            b, rest = a * y + noise * e, spare * noise**2
            for order in (candidates, candidates[::-1]):
                answer = function(a.clone(), b.clone(), rest, spare, list(order))
                if isinstance(answer, Tensor) and answer.numel() == 1:
                    answer = float(answer)
                if not isinstance(answer, float) or answer not in order:
                    stop(f"Return one of the candidates, not {answer!r}.")
                right = best(a, b, rest, spare, order, "gcv")
                suspects = {kind for kind in suspects if best(a, b, rest, spare, order, kind) == answer}
                if answer != right and not wrong:
                    wrong = f"For noise of {noise:g} you chose λ = {answer:.2g}; the least V is at λ = {right:.2g}."
        if wrong:
            stop(" ".join([wrong, *(reason for kind, reason in reasons.items() if kind in suspects)][:2]))
        return "Right: more noise, more damping, and no original was needed to say how much."

    return run(body)


def check_attack(function: Callable[[VisionTransformer, ClientUpdate], Tensor]) -> Feedback:
    """Exercise 3.6: the whole attack, on models with and without class token and biases, in colour
    and grey.
    """

    def body() -> str:
        shapes: list[tuple[str, dict[str, Any]]] = [
            ("a first model, with class token and biases", {}),
            ("a grey picture", {"channels": 1}),
            ("a model without biases", {"bias": False}),
            ("a model without class token", {"class_token": False}),
            ("larger patches", {"patch_size": 8, "image_size": 16, "width": 200, "heads": 5}),
            ("a model of other weights", {"seed": 36, "depth": 3}),
        ]
        generator = torch.Generator().manual_seed(36)
        for name, options in shapes:
            settings: dict[str, Any] = {"image_size": 12, "patch_size": 4, "width": 60, "depth": 2, "heads": 3}
            model = VisionTransformer(block="april", classes=5, **settings | options).double()
            size = (1, model.channels, model.image_size, model.image_size)
            private = torch.rand(size, generator=generator, dtype=torch.float64)
            update = client_update(model, HALF.to_input(private), torch.tensor([2]))
            what = f"The picture ({name})"
            try:
                returned = function(model, update)
            except NotImplementedError:
                raise
            except Exception as error:
                stop(f"For {name} your code raised {type(error).__name__}: {error}")
            answer = expect_tensor(returned, size, what).detach()
            mistakes = _attack_mistakes(model, private) | _wrong_products(model, update)
            expect_close(answer, private, what, mistakes=mistakes, tolerance=1e-5)
            if answer.dtype != torch.float64:
                name_of = str(answer.dtype).removeprefix("torch.")
                stop(f"{what} is right, but in {name_of}: compute in float64, with .double() on all that you read.")
        return "Right. You have written APRIL's closed form, and it needs nothing but the model and the update."

    return run(body)


def _attack_mistakes(model: VisionTransformer, private: Tensor) -> dict[str, Tensor]:
    """What the picture looks like after the mistakes people make in the attack."""
    W, P = model.patch_embedding.weight.detach().flatten(1), model.patch_size
    inverse = torch.linalg.pinv(W).T  # (d, p)
    images = HALF.to_input(private)
    X = torch.nn.functional.unfold(images, P, stride=P)[0].T  # (n, p), in the order of patchify

    def shown(patches: Tensor, size: int = model.image_size) -> Tensor:
        folded = torch.nn.functional.fold(patches.T[None], (size, size), P, stride=P)
        return HALF.to_pixels(folded)

    laid_out = X.reshape(1, model.channels, model.image_size, model.image_size)
    transposed = X.unflatten(1, (model.channels, P, P)).transpose(-1, -2).flatten(1)
    mistakes = {
        "The patches were only reshaped, and lie one after the other: al.unpatchify puts them in their places.": (
            HALF.to_pixels(laid_out)
        ),
        "It is in model-input space: turn it into pixels.": images,
        "It is in model-input space, clamped: turn it into pixels.": images.clamp(0, 1),
        "Rows and columns of each patch are exchanged.": shown(transposed),
        "Patches are in place, but the grid is transposed: al.unpatchify puts them row by row.": shown(
            X.unflatten(0, (model.image_size // P,) * 2).transpose(0, 1).flatten(0, 1)
        ),
    }
    if model.patch_embedding.bias is not None:
        shift = model.patch_embedding.bias.detach() @ inverse
        mistakes["The patch embedding's bias was not taken off."] = shown(X + shift)
    if model.position_embedding is not None:
        E = model.position_embedding.detach()[0]
        prefix = len(E) - len(X)
        mistakes["The position embedding was not taken off."] = shown(X + E[prefix:] @ inverse)
        mistakes["The position embedding was added; take it off."] = shown(X + 2 * E[prefix:] @ inverse)
        if model.class_token is not None:
            first = model.class_token.detach().flatten() + E[0]
            tokens = torch.cat([first[None], X @ W.T + E[1:]])
            bias = 0 if model.patch_embedding.bias is None else model.patch_embedding.bias.detach()
            tokens[1:] += bias
            cut = ((tokens - E)[:-1] - bias) @ inverse
            mistakes["The class token was taken for the first patch: every patch is one place late."] = shown(cut)
            late = (tokens[1:] - E[:-1] - bias) @ inverse
            mistakes["The position embedding is off by one token."] = shown(late)
    return mistakes


def _wrong_products(model: VisionTransformer, update: ClientUpdate) -> dict[str, Tensor]:
    """The picture, (1, C, H, W) in [0, 1], that the attack makes of a wrong M."""
    weights = {name: w.detach() for name, w in model.state_dict().items()}
    G, P, n = update.gradients["position_embedding"][0], model.patch_size, (model.image_size // model.patch_size) ** 2
    names = [f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value")]
    products = [weights[name].T @ update.gradients[name] for name in names]

    def shown(M: Tensor) -> Tensor:
        tokens = (torch.linalg.lstsq(G.T, M).solution - weights["position_embedding"][0])[-n:]
        tokens = tokens - weights.get("patch_embedding.bias", torch.zeros(()))
        X = torch.linalg.lstsq(weights["patch_embedding.weight"].flatten(1), tokens.T).solution.T  # (n, p)
        folded = torch.nn.functional.fold(X.T[None], (model.image_size, model.image_size), P, stride=P)
        return HALF.to_pixels(folded)

    wrong = {"M is transposed: it is W.T @ gradient, in this order.": shown(torch.stack(products).sum(0).T)}
    names_and_gradients = [(weights[name], update.gradients[name]) for name in names]
    untransposed = torch.stack([w @ g for w, g in names_and_gradients]).sum(0)
    wrong["In M a transpose is missing: it is W.T @ gradient, not W @ gradient."] = shown(untransposed)
    behind = torch.stack([g @ w for w, g in names_and_gradients]).sum(0)
    wrong["In M the factors are exchanged: it is W.T @ gradient, not gradient @ W."] = shown(behind)
    for left_out, name in enumerate(("query", "key", "value")):
        rest = [product for i, product in enumerate(products) if i != left_out]
        wrong[f"The {name}'s product is missing in M."] = shown(torch.stack(rest).sum(0))
    return wrong


def _normal(generator: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal float64 tensors of these shapes."""
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
