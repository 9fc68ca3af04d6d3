"""Checks of chapter 02, the attention identity. Tokens are rows: (t, d)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models import Block, VisionTransformer
from ..update import client_update
from .feedback import Feedback, expect_close, expect_tensor, run, stop


def check_linear_backward(function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Feedback:
    """Exercise 2.1: ∂l/∂W (k, d) and ∂l/∂Z (t, d) of Q = Z Wᵀ, from ∂l/∂Q (t, k)."""

    def compare(t: int, k: int, d: int, generator: torch.Generator) -> None:
        Z, W, dQ = _normal(generator, (t, d), (k, d), (t, k))
        Z.requires_grad_()
        W.requires_grad_()
        dW, dZ = torch.autograd.grad((Z @ W.T * dQ).sum(), (W, Z))
        try:
            answer = function(dQ.clone(), Z.detach().clone(), W.detach().clone())
        except RuntimeError as error:
            if "cannot be multiplied" not in str(error):
                raise
            shapes = f"dQ is (t, k) = {(t, k)}, Z is (t, d) = {(t, d)}, W is (k, d) = {(k, d)}"
            stop(f"Two shapes do not fit: {error}. In code tokens are rows: {shapes}.")
        what = f"for t = {t}, k = {k}, d = {d}"
        first, second = _two(answer, "the gradient of W and the gradient of Z")
        if isinstance(first, Tensor) and tuple(first.shape) == (t, d) != (k, d):
            stop("The two are in the wrong order: the gradient of W comes first.")
        mistakes = {
            "It is the mean over tokens; the gradient of a shared weight is the sum.": dW / t,
            "Only the first token was used; the sum runs over all of them.": torch.outer(dQ[0], Z[0].detach()),
        }
        first = expect_tensor(first, (k, d), f"The gradient of W {what}")
        expect_close(first, dW, f"The gradient of W {what}", mistakes=mistakes)
        second = expect_tensor(second, (t, d), f"The gradient of Z {what}")
        mistakes = {}
        if k == d:
            mistakes["W is transposed: going forth took Wᵀ, going back takes W."] = dQ @ W.detach().T
        mistakes["Every token got the same row: token s has its own, from row s of dQ."] = dZ.mean(0).expand(t, d)
        expect_close(second, dZ, f"The gradient of Z {what}", mistakes=mistakes)

    def body() -> str:
        generator = torch.Generator().manual_seed(21)
        for t, k, d in ((1, 2, 3), (5, 2, 3), (6, 4, 4)):
            compare(t, k, d, generator)
        return "Right: to the weight goes dQᵀ Z, summed over tokens; to the tokens goes dQ W, token by token."

    return run(body)


# --- Exercise 2.2: ten attentions of tokens z (t, d) and W_Q, W_K, W_V (d, d), each with 4 heads where it says so ---

_HEADS = 4


def _attend(q: Tensor, k: Tensor, v: Tensor, scores: Callable[[Tensor], Tensor] = lambda scores: scores) -> Tensor:
    """Softmax attention of one head on rows, with something done to its scores."""
    return torch.softmax(scores(q @ k.T) / q.shape[1] ** 0.5, dim=-1) @ v


def _heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Several heads; keys and values of fewer rows are shared by neighbouring heads."""
    width = q.shape[1] // _HEADS
    share = _HEADS * width // k.shape[1]
    parts = [x.split(width, dim=1) for x in (q, k, v)]
    return torch.cat([_attend(parts[0][h], parts[1][h // share], parts[2][h // share]) for h in range(_HEADS)], dim=1)


def _distance(scores: Tensor) -> Tensor:
    places = torch.arange(len(scores), dtype=scores.dtype)
    return scores - (places[:, None] - places).abs()


def _rotated(x: Tensor) -> Tensor:
    """Pairs of entries of row s turned by angles in proportion to s."""
    half = x.shape[1] // 2
    angles = torch.arange(len(x), dtype=x.dtype)[:, None] / 10.0 ** torch.arange(half, dtype=x.dtype)
    a, b = x[:, :half], x[:, half : 2 * half]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=1)


def _normed(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[1:])


def _late(z: Tensor) -> Tensor:
    """Tokens with fixed positions added."""
    return z + torch.sin(torch.arange(z.numel(), dtype=z.dtype)).reshape(z.shape)


Attention = Callable[..., Tensor]

#: Name of the change to the attention that has it: tokens (t, d) and weights, (d, d) or
#: (d/2, d), to (t, d).
CHANGES: dict[str, Attention] = {
    "biases": lambda z, Q, K, V: _attend(z @ Q.T + 1, z @ K.T - 2, z @ V.T + 3),
    "heads": lambda z, Q, K, V: _heads(z @ Q.T, z @ K.T, z @ V.T),
    "grouped heads": lambda z, Q, K, V: _heads(z @ Q.T, z @ K.T, z @ V.T),
    "outside": lambda z, Q, K, V: torch.softmax(z @ Q.T @ K @ z.T, dim=-1) @ z @ V.T / len(Q) ** 0.5,
    "distances": lambda z, Q, K, V: _attend(z @ Q.T, z @ K.T, z @ V.T, _distance),
    "rotations": lambda z, Q, K, V: _attend(_rotated(z @ Q.T), _rotated(z @ K.T), z @ V.T),
    "normed": lambda z, Q, K, V: _attend(_normed(z @ Q.T), _normed(z @ K.T), z @ V.T),
    "tied": lambda z, QK, V: _attend(z @ QK.T, z @ QK.T, z @ V.T),
    "late": lambda z, Q, K, V: _attend(_late(z) @ Q.T, _late(z) @ K.T, z @ V.T),
    "shortcut": lambda z, Q, K, V: _attend(z @ Q.T, z @ K.T, z @ V.T + z),
}


def changed_sides(change: str, z: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gᵀ Z and M, (d, d) each, of an attention with one of :data:`CHANGES`, and a loss behind it.

    Parameters
    ----------
    change : str, a key of ``CHANGES``
    z : Tensor of shape (t, d), d a multiple of 8, float64; the tokens as rows
    seed : int, for the weights

    Examples
    --------
    >>> z = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    >>> left, right = changed_sides("heads", z)
    >>> left.allclose(right)
    True
    """
    d = z.shape[1]
    kv = d // 2 if change == "grouped heads" else d
    shapes = [(d, d), (d, d)] if change == "tied" else [(d, d), (kv, d), (kv, d)]
    weights = [W.mul(0.3).requires_grad_() for W in _normal(torch.Generator().manual_seed(seed), *shapes)]
    z = z.detach().clone().requires_grad_()
    G, *gradients = torch.autograd.grad(torch.sin(CHANGES[change](z, *weights)).sum(), (z, *weights))
    products = [W.detach().T @ g for W, g in zip(weights, gradients, strict=True)]
    return G.T @ z.detach(), torch.stack(products).sum(0)


_WHY = {
    "biases": "What does a constant do to the slope between z and q?",
    "heads": "At which point of the computation is q cut into heads: before W_Q is applied, or after?",
    "grouped heads": "W_K and W_V are smaller, but is k still a linear map of z? Who shares it comes later.",
    "outside": "Does the division touch the tokens, or only what was made of q and k?",
    "distances": "Is the penalty added to the tokens, or to the scores?",
    "rotations": "Is the token rotated, or what the projection made of it?",
    "normed": "This LayerNorm comes after the projections. Is q itself not still W_Q z?",
    "tied": "One matrix then collects two gradients, from q and from k. Add up its two roads.",
    "late": "What do W_Q and W_K multiply: the tokens, or something else?",
    "shortcut": "Is there a road from z to the output that passes no projection?",
}


def check_survives(function: Callable[[str], bool]) -> Feedback:
    """Exercise 2.2: for each of the ten changes, whether Gᵀ Z = M still holds."""

    def body() -> str:
        (z,) = _normal(torch.Generator().manual_seed(22), (5, 8))
        wrong = []
        for change in CHANGES:
            left, right = changed_sides(change, z)
            holds = float((left - right).norm() / right.norm()) < 1e-10
            answer = function(change)
            if answer is None:
                stop(f'For "{change}" nothing was returned. Is there a return at the end?')
            if not isinstance(answer, bool):
                stop(f'For "{change}" the answer should be True or False, not a {type(answer).__name__}.')
            if answer != holds:
                wrong.append(change)
        if wrong:
            count = len(CHANGES) - len(wrong)
            stop(f"{count} of {len(CHANGES)} are right. Think again of {wrong[0]!r}. {_WHY[wrong[0]]}")
        return "Right, all ten: what comes after q, k and v never matters; what goes round the projections does."

    return run(body)


def check_hidden_gradients(function: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Feedback:
    """Exercise 2.3: gradients of the prefix tokens (prefix, d) and of the patch bias (d,), from the
    position embedding's (1, prefix + n, d).
    """

    def compare(rows: Tensor, prefix: int, tokens: Tensor, bias: Tensor) -> None:
        answer = _two(function(rows[None].clone(), prefix), "the prefix tokens' gradients and the bias's gradient")
        what = f"With {prefix} prefix token{'' if prefix == 1 else 's'} the prefix tokens' gradient"
        if isinstance(answer[0], Tensor) and answer[0].shape == bias.shape and answer[0].allclose(bias):
            stop("The two are in the wrong order: the prefix tokens' gradients come first.")
        found = expect_tensor(answer[0], (prefix, rows.shape[1]), what)
        mistakes = {"They are the last rows; the prefix tokens come first.": rows[len(rows) - prefix :]}
        if prefix:
            expect_close(found, tokens, what, mistakes=mistakes)
        what = f"With {prefix} prefix token{'' if prefix == 1 else 's'} the bias's gradient"
        found = expect_tensor(answer[1], (rows.shape[1],), what)
        mistakes = {
            "It is the mean over the patches; n uses of a parameter give a sum.": bias / (len(rows) - prefix),
            "Only row 0 was left out: there can be more prefix tokens than one, or none.": rows[1:].sum(0),
            "The prefix tokens' rows are in the sum: b_e is added to the patches alone.": rows.sum(0),
            "It leaves out the last rows, which are patches; the prefix tokens come first.": rows[
                : len(rows) - prefix
            ].sum(0),
        }
        expect_close(found, bias, what, mistakes=mistakes)

    def body() -> str:
        rows = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0], [1000.0, 2000.0]], dtype=torch.float64)
        for prefix in (1, 2, 0):
            compare(rows, prefix, rows[:prefix], rows[prefix:].sum(0))
        (images,) = _normal(torch.Generator().manual_seed(24), (1, 3, 8, 8))
        for token in (True, False):
            model = VisionTransformer(
                image_size=8, patch_size=4, width=24, depth=1, heads=3, classes=5, class_token=token, seed=24
            ).double()
            shared = client_update(model, images, torch.tensor([2])).gradients
            rows = shared["position_embedding"][0]
            tokens = shared["class_token"].flatten()[None] if token else rows[:0]
            compare(rows, int(token), tokens, shared["patch_embedding.bias"])
        return "Right, and it held for whole ViTs of architecture B: withholding these two hides nothing."

    return run(body)


def check_all_readers(function: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]) -> Feedback:
    """Exercise 2.4: Gᵀ Z (d, d) of a parallel first block, from weights and gradients by name."""

    def body() -> str:
        generator = torch.Generator().manual_seed(26)
        for t, d, hidden in ((5, 6, 6), (7, 8, 24)):
            (z,) = _normal(generator, (t, d))
            maps = dict.fromkeys(("query", "key", "value", "out", "shortcut"), (d, d))
            maps |= {"mlp.in": (hidden, d), "mlp.out": (d, hidden)}
            weights = dict(zip(maps, _normal(generator, *maps.values()), strict=True))
            G, gradients = _parallel_block(z, weights)
            answer = function(
                {name: W.clone() for name, W in weights.items()}, {name: g.clone() for name, g in gradients.items()}
            )
            what = f"Gᵀ Z for t = {t}, d = {d} and {hidden} hidden units"
            products = {name: weights[name].T @ gradients[name] for name in maps}
            answer = expect_tensor(answer, (d, d), what)
            expect_close(answer, G.T @ z, what, mistakes=_reader_mistakes(products))
        return "Right: five linear maps read the tokens, and each has its term. What reads later has none."

    return run(body)


def _parallel_block(z: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients at z (t, d) and of the weights for W_S z + W_O attention(z) + W_2
    gelu(W_1 z), as rows.
    """
    z = z.clone().requires_grad_()
    W = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    attended = _attend(z @ W["query"].T, z @ W["key"].T, z @ W["value"].T) @ W["out"].T
    mlp = torch.nn.functional.gelu(z @ W["mlp.in"].T) @ W["mlp.out"].T
    y = z @ W["shortcut"].T + attended + mlp
    G, *gradients = torch.autograd.grad(torch.sin(y).sum(), (z, *W.values()))
    return G, dict(zip(W, gradients, strict=True))


def _reader_mistakes(products: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is returned if one map is forgotten, or one that does not read the tokens comes in."""
    readers = ("query", "key", "value", "shortcut", "mlp.in")
    right = torch.stack([products[name] for name in readers]).sum(0)
    attention = torch.stack([products[name] for name in readers[:3]]).sum(0)
    mistakes = {
        "That is the attention alone: what else reads the tokens?": attention,
        "W_O is in the sum, but it reads what the attention made, and not the tokens.": right + products["out"],
        "Every matrix is in the sum; W_O and W_2 do not read the tokens.": right + products["out"],
    }
    if products["mlp.out"].shape == right.shape:
        everything = right + products["out"] + products["mlp.out"]
        mistakes["Every matrix is in the sum; W_O and W_2 do not read the tokens."] = everything
        mistakes["W_2 is in the sum, but it reads the MLP's hidden units."] = right + products["mlp.out"]
    mistakes |= {
        f'The term of "{name}" is missing: it reads the tokens, too.': right - products[name] for name in readers
    }
    return mistakes


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
            "GᵀG is a projector only where the rows of G are orthonormal; here they are not.": float(
                (M - G.T @ (G @ M)).norm() / M.norm()
            ),
            "It is relative to the part inside the span; divide by the norm of M.": out / inside if inside else out,
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


def _two(answer: Any, what: str) -> tuple[Any, Any]:
    """The two parts of an answer, or a message that says what they should be."""
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        stop(f"Return two tensors: {what}.")
    return answer[0], answer[1]
