"""Checks of chapter 02, the attention identity. Tokens are rows: (t, d)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models import Block, VisionTransformer
from ..update import client_update
from .feedback import Feedback, expect_close, expect_tensor, run, stop


def check_projection_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 2.1: ∂l/∂W of Q = Z Wᵀ, (k, d), from ∂l/∂Q (t, k) and Z (t, d)."""

    def body() -> str:
        one = expect_tensor(function(torch.zeros(4, 2), torch.ones(4, 3)), (2, 3), "The gradient for dQ = 0")
        expect_close(one, torch.zeros(2, 3), "The gradient for dQ = 0")
        generator = torch.Generator().manual_seed(21)
        for t, k, d in ((1, 2, 3), (5, 2, 3), (6, 4, 4)):
            Z, W, dQ = _normal(generator, (t, d), (k, d), (t, k))
            W.requires_grad_()
            (wanted,) = torch.autograd.grad((Z @ W.T * dQ).sum(), W)
            what = f"The gradient for t = {t}, k = {k}, d = {d}"
            answer = expect_tensor(function(dQ.clone(), Z.clone()), (k, d), what)
            mistakes = {
                "It is the mean over tokens; the gradient of a shared weight is the sum.": wanted / t,
                "Only the first token was used; the sum runs over all of them.": torch.outer(dQ[0], Z[0]),
            }
            expect_close(answer, wanted, what, mistakes=mistakes)
        return "Right: what flows back times what flowed in, summed over the tokens."

    return run(body)


def check_token_gradient(function: Callable[..., Tensor]) -> Feedback:
    """Exercise 2.2: ∂l/∂Z (t, d) from the gradients at Q, K, V and the three weights."""

    def body() -> str:
        eye, zero = torch.eye(3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
        dQ, dK, dV = (zero.index_fill(1, torch.tensor([column]), 1.0) for column in range(3))
        what = "The gradient for W_Q = W_K = W_V = I, and dQ, dK, dV one in columns 1, 2, 3 in turn and else zero"
        easy = expect_tensor(function(dQ, dK, dV, eye, eye, eye), (4, 3), what)
        doors = (("queries", dQ), ("keys", dK), ("values", dV))
        mistakes = {f"The door of the {name} is missing.": 1 - back for name, back in doors}
        mistakes |= {f"The road of the {name} comes in with the wrong sign.": 1 - 2 * back for name, back in doors}
        mistakes["It is the mean of the three roads; the chain rule adds them."] = (zero + 1) / 3
        expect_close(easy, zero + 1, what, mistakes=mistakes)
        generator = torch.Generator().manual_seed(22)
        for t, k, d in ((5, 4, 4), (5, 2, 4)):
            Z, *rest = _normal(generator, (t, d), (k, d), (k, d), (k, d), (t, k), (t, k), (t, k))
            weights, back = rest[:3], rest[3:]
            Z.requires_grad_()
            loss = torch.stack([(Z @ W.T * g).sum() for W, g in zip(weights, back, strict=True)]).sum()
            (wanted,) = torch.autograd.grad(loss, Z)
            what = f"The gradient at the tokens for t = {t}, k = {k}, d = {d}"
            answer = expect_tensor(function(*(x.clone() for x in (*back, *weights))), (t, d), what)
            mistakes = {}
            if k == d:
                transposed = torch.stack([g @ W.T for W, g in zip(weights, back, strict=True)]).sum(0)
                mistakes["The weights are transposed: going back takes W, since going forth took Wᵀ."] = transposed
                mixed = back[0] @ weights[2] + back[1] @ weights[1] + back[2] @ weights[0]
                mistakes["Queries and values are mixed up."] = mixed
            expect_close(answer, wanted, what, mistakes=mistakes)
        return "Right: three roads back to the tokens, added."

    return run(body)


def check_fused_right_side(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 2.3: M (d, d) from a fused projection's weight and gradient, (3d, d) each."""

    def body() -> str:
        eye = torch.eye(3, dtype=torch.float64)
        stacked = torch.cat([eye, 2 * eye, 3 * eye])
        what = "M for blocks I, 2I, 3I and a gradient of the same blocks"
        easy = expect_tensor(function(stacked, stacked), (3, 3), what)
        blocks = {
            f"Only the block of the {name} went in.": factor * eye
            for name, factor in (("queries", 1), ("keys", 4), ("values", 9))
        }
        missing = {
            f"The block of the {name} is missing.": factor * eye
            for name, factor in (("queries", 13), ("keys", 10), ("values", 5))
        }
        expect_close(easy, 14 * eye, what, mistakes=blocks | missing)
        generator = torch.Generator().manual_seed(23)
        for d in (4, 6):
            weight, gradient = _normal(generator, (3 * d, d), (3 * d, d))
            blocks_of = zip(weight.chunk(3), gradient.chunk(3), strict=True)
            wanted = sum((W.T @ g for W, g in blocks_of), torch.zeros(d, d, dtype=torch.float64))
            what = f"M for random weights of width {d}"
            answer = expect_tensor(function(weight.clone(), gradient.clone()), (d, d), what)
            blocks_of = zip(weight.chunk(3), gradient.chunk(3), strict=True)
            untransposed = sum((W @ g for W, g in blocks_of), torch.zeros(d, d, dtype=torch.float64))
            expect_close(
                answer,
                wanted,
                what,
                mistakes={
                    "It is Mᵀ, the transpose: the weight comes first, transposed.": wanted.T,
                    "The weights' blocks are not transposed: the identity has W_Qᵀ.": untransposed,
                },
            )
        return "Right. One product: the sum over Q, K and V is the sum over stacked rows."

    return run(body)


def check_hidden_gradients(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Feedback:
    """Exercise 2.4: class token's and patch bias's gradients (d,) from the position embedding's (1,
    n + 1, d).
    """

    def two(answer: Any, d: int) -> tuple[Tensor, Tensor]:
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            stop("Return two tensors: the class token's gradient and the bias's.")
        token, bias = answer
        return (
            expect_tensor(token, (d,), "The class token's gradient"),
            expect_tensor(bias, (d,), "The bias's gradient"),
        )

    def compare(answer: Any, rows: Tensor, token: Tensor, bias: Tensor) -> None:
        found_token, found_bias = two(answer, rows.shape[1])
        token_mistakes = {
            "It is the last row; the class token comes first.": rows[-1],
            "It is the sum of all rows; the class token is added to token 0 alone.": rows.sum(0),
            "It is the bias's: are the two in the right order?": bias,
        }
        expect_close(found_token, token, "The class token's gradient", mistakes=token_mistakes)
        bias_mistakes = {
            "The class token's row is in the sum: b_e is added to the patches only.": rows.sum(0),
            "It is the mean over the patches; n uses of a parameter give a sum.": bias / (len(rows) - 1),
            "It leaves out the last row, which is a patch; the class token is the first.": rows[:-1].sum(0),
        }
        expect_close(found_bias, bias, "The bias's gradient", mistakes=bias_mistakes)

    def body() -> str:
        rows = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0], [1000.0, 2000.0]], dtype=torch.float64)
        compare(function(rows[None]), rows, rows[0], rows[1:].sum(0))
        model = VisionTransformer(
            image_size=8, patch_size=4, width=24, depth=1, heads=3, classes=5, block="prenorm", seed=24
        ).double()
        (images,) = _normal(torch.Generator().manual_seed(24), (1, 3, 8, 8))
        gradients = client_update(model, images, torch.tensor([2])).gradients
        rows = gradients["position_embedding"]
        answer = function(rows.clone())
        compare(answer, rows[0], gradients["class_token"].flatten(), gradients["patch_embedding.bias"])
        return "Right, and it held for a whole ViT of architecture B: withholding these two hides nothing."

    return run(body)


def check_sticks_out(function: Callable[[Tensor, Tensor], float]) -> Feedback:
    """Exercise 2.5: relative norm of the part of M (d, d) outside the row space of G (t, d)."""

    def value(G: Tensor, M: Tensor) -> float:
        answer = function(G.clone(), M.clone())
        if isinstance(answer, Tensor) and answer.numel() == 1:
            answer = float(answer)
        if not isinstance(answer, float | int) or answer != answer:
            stop(f"Return one number between 0 and 1, not {answer!r}.")
        return float(answer)

    def compare(G: Tensor, M: Tensor, what: str, tolerance: float = 1e-8) -> None:
        answer = value(G, M)
        basis = torch.linalg.svd(G, full_matrices=False)[2]  # (t, d)
        out = float((M - basis.T @ (basis @ M)).norm() / M.norm())
        if abs(answer - out) <= tolerance:
            return
        wrong_side = float((M - (M @ basis.T) @ basis).norm() / M.norm())
        inside = float((basis @ M).norm() / M.norm())
        candidates = {
            "The projector stands on the wrong side: M's columns must lie in the span, not its rows.": wrong_side,
            "It is the part inside the span; asked is the part that sticks out.": inside,
            "It is not relative: divide by the norm of M.": out * float(M.norm()),
            "It is squared: take norms, not squares of norms.": out**2,
        }
        for message, wrong in candidates.items():
            if abs(answer - wrong) <= tolerance * max(1.0, wrong):
                stop(f"{what}: {answer:.4g}, but it should be {out:.4g}. {message}")
        if abs(answer - out) <= 1e-6:
            stop(
                f"{what}: {answer:.9g}, but it should be {out:.9g}. That is right to float32's precision only: "
                "is there a conversion on the way, such as torch.tensor(number)?"
            )
        stop(f"{what}: {answer:.4g}, but it should be {out:.4g}.")

    def body() -> str:
        G = torch.tensor([[2.0, 0.0, 0.0], [0.0, 5.0, 0.0]], dtype=torch.float64)  # its rows span e₁ and e₂
        M = torch.tensor([[3.0, 3.0, 3.0], [1.0, 1.0, 1.0], [4.0, 0.0, 4.0]], dtype=torch.float64)
        compare(G, M, "For G with rows 2e₁ and 5e₂")
        generator = torch.Generator().manual_seed(25)
        for t, d in ((3, 8), (6, 10)):
            G, Z, M = _normal(generator, (t, d), (t, d), (d, d))
            compare(G, G.T @ Z, f"For M = GᵀZ, with t = {t} and d = {d}")
            compare(G, M, f"For a random M, with t = {t} and d = {d}")
            compare(G, G.T @ Z + 0.01 * M, "For GᵀZ with a little noise")
        images, labels = _normal(generator, (2, 3, 8, 8))[0], torch.tensor([1, 4])
        clients: list[tuple[Block, int]] = [("april", 1), ("april", 2), ("prenorm", 1)]
        for block, batch in clients:
            model = VisionTransformer(
                image_size=8, patch_size=4, width=24, depth=2, heads=3, classes=5, block=block, seed=25
            ).double()
            gradients = client_update(model, images[:batch], labels[:batch]).gradients
            first = "blocks.0.attention."
            weights = dict(model.named_parameters())
            parts = [f"{first}{part}.weight" for part in ("query", "key", "value")]
            M = torch.stack([weights[name].detach().T @ gradients[name] for name in parts]).sum(0)
            what = f'For a client with block="{block}" and {batch} picture{"s" if batch > 1 else ""}'
            compare(gradients["position_embedding"][0], M, what)
        return "Right: 0 for one picture in architecture A, and plainly not for a batch or for architecture B."

    return run(body)


def _normal(generator: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal float64 tensors of these shapes."""
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
