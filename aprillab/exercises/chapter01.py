"""Checks for chapter 01, what a gradient reveals; 1.5 and 1.6 are in labels.py, 1.7 in
divisions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .divisions import check_what_comes_out as check_what_comes_out
from .feedback import Feedback, expect_close, expect_numbers, expect_tensor, run, stop
from .labels import check_label_from_bias as check_label_from_bias
from .labels import check_label_from_weight as check_label_from_weight

FLOAT64 = torch.float64


def _randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=FLOAT64)


def _integer(answer: Any, what: str) -> int:
    """The answer as an int; a tensor with one integer is taken too."""
    if isinstance(answer, Tensor) and answer.numel() == 1 and not answer.is_floating_point():
        return int(answer)
    if isinstance(answer, bool) or not isinstance(answer, int):
        got = "nothing (None)" if answer is None else f"a {type(answer).__name__}"
        stop(f"{what} should be an integer, but you returned {got}.")
    return answer


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


#: Exercise 1.1's layer, its loss ½‖y − t‖², and what another client sent of it.
BY_HAND = {"W": [[1, 0, -1], [2, 1, 0]], "b": [0, 1], "x": [2, -1, 3], "t": [-3, 5]}
ANOTHER = {"weight": [[0, 0, 0], [-3, 0, 6]], "bias": [0, -3]}


def check_by_hand(function: Callable[[], tuple[Any, Any, Any]]) -> Feedback:
    """Exercise 1.1: ``function()`` gives δ (2), ∂l/∂W (2, 3) of the layer ``BY_HAND``, and the
    other client's x (3).
    """

    def body() -> str:
        W, b, x, t = (torch.tensor(BY_HAND[name], dtype=FLOAT64) for name in ("W", "b", "x", "t"))
        for parameter in (W, b):
            parameter.requires_grad_()
        y = W @ x + b
        by_weight, delta = torch.autograd.grad((y - t).square().sum() / 2, (W, b))
        y, W = y.detach(), W.detach()
        answer = function()
        if not isinstance(answer, (tuple, list)) or len(answer) != 3:
            stop(f"Return three things, δ, ∂l/∂W and the other x; you returned a {type(answer).__name__}.")
        mistakes = {
            "That is y itself; the loss is ½‖y − t‖², so y − t is asked.": y,
            "The bias b is missing in y.": y - b.detach() - t,
            "That is twice it: the ½ in front of the square takes the 2 away.": 2 * delta,
        }
        expect_close(expect_numbers(answer[0], (2,), "δ"), delta, "δ", mistakes=mistakes)
        mistakes = {
            "W_ji meets x_i alone: each row of it is a multiple of x, and not of W.": delta[:, None] * W,
            "Row j is δ_j times x; every row here is x itself.": x.expand(2, 3),
        }
        expect_close(expect_numbers(answer[1], (2, 3), "∂l/∂W"), by_weight, "∂l/∂W", mistakes=mistakes)
        weight, bias = (torch.tensor(ANOTHER[name], dtype=FLOAT64) for name in ("weight", "bias"))
        mistakes = {
            "That is the row; each of its numbers is δ_2 times one of x.": weight[1],
            "That is the row times its bias entry, where a division is asked.": weight[1] * bias[1],
            "That is the x of the first client; another sent this update.": x,
        }
        expect_close(
            expect_numbers(answer[2], (3,), "The other x"), weight[1] / bias[1], "The other x", mistakes=mistakes
        )
        return "Right: δ and ∂l/∂W as autograd has them, and a picture of three pixels from another client's update."

    return run(body)


def check_invert_linear(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 1.2: ``function(weight_gradient, bias_gradient)`` gives the input x (k,) of a batch
    of one.
    """

    def compare(delta: Tensor, x: Tensor) -> None:
        weight_gradient = torch.outer(delta, x)
        answer = function(weight_gradient, delta.clone())
        if isinstance(answer, Tensor) and not torch.isfinite(answer.double()).all():
            stop(
                f"With ∂l/∂b = {[round(v, 2) for v in delta.tolist()]} your x is not finite: you divided by a zero. "
                "Choose the unit by the size of its bias entry, |∂l/∂b|; the entries may all be negative, and may "
                "sum to zero."
            )
        unit = int(delta.abs().argmax())
        expect_close(
            expect_tensor(answer, tuple(x.shape), "x"),
            x,
            "x",
            mistakes={
                "That is the row itself: divide it by the unit's bias entry.": weight_gradient[unit],
                "That multiplies by the bias entry; x needs a division.": weight_gradient[unit] * delta[unit],
                "Numerator and denominator are exchanged.": delta[unit] / weight_gradient[unit],
            },
        )

    def body() -> str:
        x = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.25], dtype=FLOAT64)
        for entries in ([0.0, 2.0, 0.0], [-0.5, 0.0, -2.0], [1.0, -1.0, 0.0]):
            compare(torch.tensor(entries, dtype=FLOAT64), x)
        generator = torch.Generator().manual_seed(1)
        for m, k in ((6, 9), (9, 4)):
            delta = _randn(m, generator=generator) * (torch.rand(m, generator=generator) > 0.5)
            delta[1] = -1.5
            compare(delta, _randn(k, generator=generator))
        return "Right, with dead units and negative entries too."

    return run(body)


def check_invert_noisy(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 1.3: ``function(weight_gradient, bias_gradient)`` gives the least-squares x (k,)
    from all rows.
    """

    def compare(delta: Tensor, x: Tensor, noise: Tensor) -> None:
        gradient = torch.outer(delta, x) + noise
        wanted = delta @ gradient / (delta @ delta)
        answer = function(gradient.clone(), delta.clone())
        if isinstance(answer, Tensor) and not torch.isfinite(answer.double()).all():
            stop("Your x is not finite: a unit with ∂l/∂b = 0 must get no weight, not a division by zero.")
        ratios, size = gradient / delta[:, None], delta.abs()
        alive = delta != 0
        expect_close(
            expect_tensor(answer, tuple(x.shape), "x"),
            wanted,
            "x",
            mistakes={
                "That is the best single row; the others know something about x as well.": ratios[size.argmax()],
                "That is the plain mean of the rows' ratios: small bias entries count as much as large ones.": ratios[
                    alive
                ].mean(0),
                "That weighs the rows' ratios by |∂l/∂b|; the least-squares weights are its square.": (
                    size[alive] @ ratios[alive] / size.sum()
                ),
                "That divides the sum of the rows by the sum of the entries: rows of opposite sign cancel.": (
                    gradient.sum(0) / delta.sum()
                ),
                "The division by Σ (∂l/∂b)² is missing.": delta @ gradient,
                "That divides by the norm; Σ (∂l/∂b)² is its square.": delta @ gradient / delta.norm(),
            },
        )

    def body() -> str:
        delta = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=FLOAT64)
        x = torch.tensor([0.5, 1.0, -1.0], dtype=FLOAT64)
        compare(delta, x, torch.zeros(4, 3, dtype=FLOAT64))
        generator = torch.Generator().manual_seed(2)
        for m, k in ((8, 5), (20, 7)):
            delta, x = _randn(m, generator=generator), _randn(k, generator=generator)
            delta[0] = 0
            compare(delta, x, 0.1 * _randn(m, k, generator=generator))
        return "Right: rows weighted by (∂l/∂b)², so that a loud unit counts for more than a faint one."

    return run(body)


def _miscount(count: int, batch: int, gradient: Tensor) -> str:
    if count in gradient.shape:
        return (
            "Every singular value is counted, rounding errors included: count those above a tolerance. "
            "float32 needs a larger one than float64."
        )
    if count > batch:
        return "The tolerance is too small: a matrix product's rounding leaves several eps, relative to the largest."
    image, rounding = (torch.linalg.svdvals(gradient)[k] for k in (batch - 1, batch))
    return f"The tolerance is too large: the last image makes {image:.0e} here, and rounding {rounding:.0e}."


def check_count_images(function: Callable[[Tensor], int]) -> Feedback:
    """Exercise 1.4: ``function(weight_gradient)`` counts images by the numerical rank of ∂l/∂W (m,
    k).
    """

    def compare(delta: Tensor, x: Tensor, how: str = "") -> None:
        gradient, batch = delta.T @ x, len(x)
        count = _integer(function(gradient), "The count")
        # By powers of two, which round nothing: a relative tolerance, whatever its size,
        # gives the same count.
        for factor in (2.0**-30, 2.0**20):
            other = _integer(function(gradient * factor), "The count")
            if other != count:
                stop(
                    f"The same gradient times {factor:.0e} changes your count from {count} to {other}: the "
                    "tolerance must be relative to the largest singular value, not absolute."
                )
        if count != batch:
            stop(
                f"You count {count} ({_images(batch)}, {how}{str(x.dtype)[6:]}). {_miscount(count, batch, gradient)}"
            )

    def body() -> str:
        if (count := _integer(function(torch.zeros(4, 6, dtype=FLOAT64)), "The count")) != 0:
            stop(f"A gradient of zeros holds no image; you count {count}.")
        generator = torch.Generator().manual_seed(3)
        for dtype in (torch.float64, torch.float32):
            for batch in (1, 2, 3, 5):
                x = _randn(batch, 40, generator=generator)
                compare(_randn(batch, 24, generator=generator).to(dtype), x.to(dtype))
        # Two pictures of one scene: their small difference is an image's worth of rank all the
        # same.
        delta, first, other = (_randn(*shape, generator=generator) for shape in ((2, 24), (1, 40), (1, 40)))
        for dtype in (torch.float64, torch.float32):
            compare(delta.to(dtype), torch.cat([first, first + 1e-3 * other]).to(dtype), "nearly alike, ")
        return "Right: singular values above the rounding floor, and at least that many images."

    return run(body)


def _called(function: Callable[[Tensor, Tensor], Tensor], gradient: Tensor, bias: Tensor, what: str) -> Any:
    try:
        return function(gradient, bias)
    except NotImplementedError:
        raise
    except Exception as error:
        if "non-empty TensorList" in str(error):
            return stop(f"{what}: nothing to stack. Where no two units agree return (0, k), ratios[:0] for instance.")
        return stop(f"{what}: your code raised {type(error).__name__}: {error}")


def _expect_images(answer: Any, wanted: Tensor, k: int, what: str) -> None:
    """Stop unless the rows of ``answer`` are the images ``wanted`` (N, k), each of them once."""
    if not isinstance(answer, Tensor) or answer.ndim != 2 or answer.shape[1] != k:
        shape = tuple(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        stop(f"Return a tensor of shape (N, {k}), one row for each image found, not {shape}.")
    if not torch.isfinite(answer).all():
        stop(f"{what}: NaN or infinite rows. Leave the units with a zero bias gradient out before you divide.")
    if len(answer) == 0:
        if len(wanted):
            stop(f"{what}: nothing found. Look for {_images(len(wanted))} with two units that agree.")
        return
    if len(wanted) == 0:
        stop(f"{what}: no two units agree here, and you return {len(answer)} rows: these are mixtures.")
    distance = torch.cdist(answer.double(), wanted) / wanted.norm(dim=1)
    nearest = distance.min(1)
    if (far := int((nearest.values > 1e-6).sum())) > 0:
        stop(
            f"{what}: {far} of your {len(answer)} rows are no image of the batch, but mixtures or of another "
            "length. A pure row over its bias entry appears at least twice."
        )
    found = set(nearest.indices.tolist())
    if len(found) < len(wanted):
        stop(f"{what}: you found {len(found)} of {len(wanted)} images.")
    if len(answer) > len(wanted):
        stop(f"{what}: the same image appears several times ({len(answer)} rows for {len(wanted)} images).")


def check_unmix_relu(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 1.8: ``function(weight_gradient, bias_gradient)`` gives the images (N, k) that two
    units agree on.
    """

    def compare(delta: Tensor, x: Tensor, wanted: Tensor, what: str) -> None:
        gradient, bias = delta.T @ x, delta.sum(0)
        _expect_images(_called(function, gradient, bias, what), wanted, x.shape[1], what)

    def body() -> str:
        generator = torch.Generator().manual_seed(6)
        hidden, k = 120, 30
        for batch in (1, 2, 3):
            x = _randn(batch, k, generator=generator)
            active = x @ _randn(hidden, k, generator=generator).T > 0
            delta = _randn(batch, hidden, generator=generator) * active
            alone = (active & (active.sum(0) == 1)).sum(1)
            compare(delta, x, x[alone >= 2], f"ReLU, batch of {batch}")
        x = _randn(3, k, generator=generator)
        compare(_randn(3, hidden, generator=generator), x, x[:0], "No ReLU, batch of 3")
        return "Right: a batch, taken apart exactly, with nothing but the gradient. Zeros give it away."

    return run(body)


def check_no_bias(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 1.9: ``function(W, dW, dV, dc)`` gives x (k,) of a first layer without a bias.

    W and dW have shape (m, k); the head's gradients dV (classes, m) and dc (classes,).
    """

    def compare(W: Tensor, V: Tensor, x: Tensor, label: int) -> None:
        y = W @ x
        a = y.clamp_min(0)
        r = torch.softmax(V @ a, 0)
        r[label] -= 1
        dW = torch.outer((V.T @ r) * (y > 0), x)
        row = dW[dW.norm(dim=1).argmax()]
        u, on = row / row.norm(), y > 0
        size = x.norm() * torch.sign(row @ x)
        everywhere = float(a @ (W @ u) / (W @ u).square().sum())
        answer = expect_tensor(function(W.clone(), dW, torch.outer(r, a), r.clone()), tuple(x.shape), "x")
        expect_close(
            answer,
            x,
            "x",
            tolerance=1e-7,
            mistakes={
                "That is a row of dW: its direction is x's, up to the sign; its length is δ_j's doing.": row,
                "It has the direction, and the length 1: the head tells the length.": u,
                "It has the direction, and the length 1: the head tells the length and the sign.": -u,
                "The length is right, and the sign is wrong: a = relu(W x) is positive where a unit is on.": -x,
                "Units that are off are in the fit: there a = 0, whatever (W u) says.": everywhere * u,
                "You compare with the size of (W u), which loses s's sign.": abs(size) * u,
                "That solves W x = a over the units that are on: where they are fewer than the pixels, many x fit. "
                "dW has the direction of the right one.": torch.linalg.lstsq(W[on], a[on, None]).solution[:, 0],
                "That solves W x = a with the units that are off, and they have a = 0 whatever (W x) says.": (
                    torch.linalg.lstsq(W, a[:, None]).solution[:, 0]
                ),
            },
        )
        assert on.any()

    def body() -> str:
        generator = torch.Generator().manual_seed(8)
        for trial, (m, k, classes) in enumerate(((6, 4, 3), (20, 9, 5), (12, 30, 4), (20, 9, 5))):
            W, V = _randn(m, k, generator=generator), _randn(classes, m, generator=generator)
            compare(W, V, _randn(k, generator=generator), trial % classes)
        return "Right: the next layer's gradients know the length and the sign that this one's do not."

    return run(body)
