"""Checks of chapter 03, the closed-form attack. Tokens and patches are rows: Z (n + 1, d), X (n,
p). The model of Exercise 3.5 is here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models import AprilBlock, VisionTransformer
from ..preprocessing import HALF
from ..update import ClientUpdate, client_update
from .feedback import Feedback, expect_close, expect_tensor, expect_whole, run, stop


def check_tokens_from(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 3.1: least-squares tokens Z (t, d) with Gᵀ Z = M."""

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
    """Exercise 3.2: patches X (n, p) from tokens Z (n + 1, d), position embedding, W_e (d, p) and
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


def check_conditions(function: Callable[[int, int, int, int], tuple[bool, bool]]) -> Feedback:
    """Exercise 3.3: (n + 1 ≤ d, p ≤ d) from image size, patch size, channels and width."""

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


def check_most_rank(function: Callable[[int, int, int, int], int]) -> Feedback:
    """Exercise 3.4: the largest rank of G for one block, n patches, width d, H heads, and T tokens
    before the patches, which are all that the head reads.
    """

    def body() -> str:
        shapes = [(40, 48, 2, 1), (40, 48, 2, 2), (40, 60, 3, 2), (40, 48, 6, 1), (40, 24, 6, 2)]
        shapes += [(10, 48, 6, 1), (10, 48, 2, 3), (4, 24, 2, 1), (40, 48, 1, 4)]
        suspects, wrong = set(_RANKS), ""
        for seed, (n, d, heads, read) in enumerate(shapes):
            what = f"The rank for {n} patches, width {d}, {heads} head(s) and {read} token(s) that are read"
            answer = expect_whole(function(n, d, heads, read), what)
            measured = _rank_of_one_block(n, d, heads, read, seed)
            suspects = {reason for reason in suspects if _RANKS[reason](n, d, heads, read) == answer}
            if answer != measured and not wrong:
                wrong = f"{what}: you say {answer}, a random model has {measured}."
        if wrong:
            stop(" ".join([wrong, *sorted(suspects)[:1]]))
        return "Right: measured on nine random models, each has the rank that you say."

    return run(body)


#: What people answer instead, and why it is not so.
_RANKS: dict[str, Callable[[int, int, int, int], int]] = {
    "Each token that is read brings two directions a head of its own.": lambda n, d, h, t: min(d, n + t, 2 * h + t),
    "That is the count for one token that is read.": lambda n, d, h, t: min(d, n + t, 2 * h + 1),
    "A matrix has no more rank than it has columns: the width.": lambda n, d, h, t: min(n + t, (2 * h + 1) * t),
    "A matrix has no more rank than it has rows: all tokens.": lambda n, d, h, t: min(d, (2 * h + 1) * t),
    "The tokens that are read have a query each, whose gradient adds one direction to its own row.": (
        lambda n, d, h, t: min(d, n + t, 2 * h * t)
    ),
    "That is what the shape allows; one block sends back less.": lambda n, d, h, t: min(d, n + t),
    "Each head has two directions, the value's and the key's.": lambda n, d, h, t: min(d, n + t, (h + 1) * t),
    "Each token that is read adds a direction by its query: T in all, not one.": (
        lambda n, d, h, t: min(d, n + t, 2 * h * t + 1)
    ),
    "A matrix has no more rank than it has rows, or than it has columns.": lambda n, d, h, t: (2 * h + 1) * t,
    "The tokens that are read are rows of G too: it has n + T rows.": lambda n, d, h, t: min(d, n, (2 * h + 1) * t),
    "The query's gradient is one direction for all heads together: it comes back to one row.": (
        lambda n, d, h, t: min(d, n + t, 3 * h * t)
    ),
}


def _rank_of_one_block(n: int, d: int, heads: int, read: int, seed: int) -> int:
    """The rank of ∂l/∂z, measured on random tokens, a random attention and a random loss
    of ``read`` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    z, *projections, readout = _normal(generator, (n + read, d), (d, d), (d, d), (d, d), (read, d))
    z.requires_grad_()
    parts = [(z @ W / math.sqrt(d)).unflatten(1, (heads, -1)).transpose(0, 1) for W in projections]
    q, k, v = parts  # (heads, tokens, d / heads)
    seen = (q @ k.mT / math.sqrt(d // heads)).softmax(-1) @ v
    loss = (torch.tanh(seen.transpose(0, 1).flatten(1)[:read]) * readout).sum()
    (gradient,) = torch.autograd.grad(loss, z)
    s = torch.linalg.svdvals(gradient)
    return int((s > 1e-11 * s[0]).sum())


class ParallelBlock(AprilBlock):
    """Attention and MLP side by side: both read the tokens, and what they make of them is added."""

    def forward(self, z: Tensor) -> Tensor:
        return self.attention(z) + self.mlp(z)


def side_by_side(**options: Any) -> VisionTransformer:
    """A Vision Transformer of architecture A whose first block is a :class:`ParallelBlock`, seed 0.

    Takes the options of :class:`~aprillab.models.VisionTransformer`, ``block`` excepted.

    Examples
    --------
    >>> model = side_by_side(image_size=12, patch_size=4, width=60, depth=2, heads=3, classes=5)
    >>> type(model.blocks[0]).__name__, model(torch.zeros(1, 3, 12, 12)).shape
    ('ParallelBlock', torch.Size([1, 5]))
    """
    model = VisionTransformer(block="april", **options)
    replaced = model.blocks[0]
    reader = replaced.get_submodule("mlp.0")
    assert isinstance(reader, nn.Linear)
    block = ParallelBlock(model.width, model.heads, reader.out_features, reader.bias is not None)
    block.load_state_dict(replaced.state_dict())
    model.blocks[0] = block
    return model


def check_attack(function: Callable[[VisionTransformer, ClientUpdate], Tensor]) -> Feedback:
    """Exercise 3.5: the whole attack on models whose first block has attention and MLP side by
    side, with and without class token and biases, in colour and grey.
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
            model = side_by_side(classes=5, **settings | options).double()
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
        return "Right: every layer that reads the tokens has its product in M, and the rest is chapter 03's attack."

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
    names = [f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value")] + ["blocks.0.mlp.0.weight"]
    products = [weights[name].T @ update.gradients[name] for name in names]

    def shown(M: Tensor) -> Tensor:
        tokens = (torch.linalg.lstsq(G.T, M).solution - weights["position_embedding"][0])[-n:]
        tokens = tokens - weights.get("patch_embedding.bias", torch.zeros(()))
        X = torch.linalg.lstsq(weights["patch_embedding.weight"].flatten(1), tokens.T).solution.T  # (n, p)
        folded = torch.nn.functional.fold(X.T[None], (model.image_size, model.image_size), P, stride=P)
        return HALF.to_pixels(folded)

    wrong = {"M is transposed: it is W.T @ gradient, in this order.": shown(torch.stack(products).sum(0).T)}
    for left_out, name in enumerate(("query", "key", "value", "MLP")):
        rest = [product for i, product in enumerate(products) if i != left_out]
        wrong[f"The {name}'s product is missing in M."] = shown(torch.stack(rest).sum(0))
    wrong["In M is the MLP's product alone."] = shown(products[-1])
    return wrong


def _normal(generator: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal float64 tensors of these shapes."""
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
