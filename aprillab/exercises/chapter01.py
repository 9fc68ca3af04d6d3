"""Checks for chapter 01, what a gradient reveals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .feedback import Feedback, expect_close, expect_tensor, run, stop

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


def _residual(classes: int, label: int, generator: torch.Generator) -> Tensor:
    """softmax(logits) − onehot(label) for random logits, (classes,)."""
    r = torch.softmax(2 * _randn(classes, generator=generator), 0)
    r[label] -= 1
    return r


def check_outer_product(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Feedback:
    """Exercise 1.1: ``function(delta, x)`` gives ∂l/∂W (m, k) and ∂l/∂b (m,) from delta (B, m) and
    x (B, k).
    """

    def compare(delta: Tensor, x: Tensor) -> None:
        answer = function(delta, x)
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            stop(f"Return two tensors, ∂l/∂W and ∂l/∂b; you returned a {type(answer).__name__}.")
        (batch, m), k = delta.shape, x.shape[1]
        # The reference is autograd on l = Σ δ·(Wx + b), whose gradient at the output is δ.
        weight = torch.zeros(m, k, dtype=FLOAT64, requires_grad=True)
        bias = torch.zeros(m, dtype=FLOAT64, requires_grad=True)
        loss = (delta * (x @ weight.T + bias)).sum()
        by_weight, by_bias = torch.autograd.grad(loss, (weight, bias))
        mean = "Divided by the batch size once too often: the mean over the batch is already in δ."
        expect_close(
            expect_tensor(answer[0], (m, k), "∂l/∂W"),
            by_weight,
            "∂l/∂W",
            mistakes={mean: by_weight / batch, "Only the first image is in it.": torch.outer(delta[0], x[0])},
        )
        expect_close(
            expect_tensor(answer[1], (m,), "∂l/∂b"),
            by_bias,
            "∂l/∂b",
            mistakes={mean: by_bias / batch, "Only the first image is in it.": delta[0]},
        )

    def body() -> str:
        compare(torch.zeros(2, 3, dtype=FLOAT64), torch.ones(2, 4, dtype=FLOAT64))
        compare(torch.eye(3, dtype=FLOAT64), torch.arange(12, dtype=FLOAT64).reshape(3, 4))
        generator = torch.Generator().manual_seed(0)
        for batch, m, k in ((1, 5, 7), (4, 5, 7), (3, 6, 2)):
            compare(_randn(batch, m, generator=generator), _randn(batch, k, generator=generator))
        return "Right: one outer product for each image, summed. Autograd agrees."

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
        # By powers of two, which round nothing: a relative tolerance, whatever its size, gives the same count.
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
        # Two pictures of one scene: their small difference is an image's worth of rank all the same.
        delta, first, other = (_randn(*shape, generator=generator) for shape in ((2, 24), (1, 40), (1, 40)))
        for dtype in (torch.float64, torch.float32):
            compare(delta.to(dtype), torch.cat([first, first + 1e-3 * other]).to(dtype), "nearly alike, ")
        return "Right: singular values above the rounding floor, and at least that many images."

    return run(body)


def check_label_from_bias(function: Callable[[Tensor], int | None]) -> Feedback:
    """Exercise 1.5: ``function(bias_gradient)`` gives the label, or None where the signs prove a
    batch.
    """

    def body() -> str:
        generator = torch.Generator().manual_seed(4)
        for classes in (3, 10, 2):
            for label in range(classes):
                r = _residual(classes, label, generator)
                if classes == 2:
                    r = torch.tensor([0.25, -0.25] if label else [-0.25, 0.25], dtype=FLOAT64)
                answer = function(r.clone())
                if answer is None:
                    stop(f"{classes} classes, label {label}: None, though exactly one entry is negative.")
                given = _integer(answer, "The label")
                if given == label:
                    continue
                text = f"{classes} classes, label {label}: you say {given}."
                if classes > 2 and given == int(r.argmax()):
                    stop(f"{text} That is the largest entry; the label's is the negative one.")
                if given == int(r.abs().argmax()):
                    stop(f"{text} With two classes both entries have the same size: only the sign tells them apart.")
                if given == int(r.abs().argmin()):
                    stop(f"{text} That is the entry of the smallest size; look at the signs.")
                stop(text)
        both = (_residual(10, 3, generator) + _residual(10, 7, generator)) / 2
        both[[3, 7]] = -both[[3, 7]].abs().clamp_min(0.1)
        if (answer := function(both)) is not None:
            stop(f"Entries 3 and 7 are both negative, so this is a batch; return None, not {answer!r}.")
        return "Right: one negative entry is a label, several are a batch."

    return run(body)


def _row_against(name: str) -> str:
    why = "Where that row is the label's own, all others point against it, and the label's product alone is positive."
    return f"You take the row whose product with {name} is the least. {why}"


#: Mistakes in Exercise 1.6: what to say of each, and the row it chooses of a gradient (classes, d).
_WRONG_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    _row_against("the first row"): lambda g: (g @ g[0]).argmin(),
    _row_against("the last row"): lambda g: (g @ g[-1]).argmin(),
    _row_against("the longest row"): lambda g: (g @ g[g.norm(dim=1).argmax()]).argmin(),
    "That is a row sum: it is r_c Σf, and says nothing of r_c unless Σf > 0.": lambda g: g.sum(1).argmin(),
    "That is the largest row sum: r_c Σf says nothing of r_c unless Σf < 0.": lambda g: g.sum(1).argmax(),
    "That is the smallest row; the label's is as long as all others together.": lambda g: g.norm(dim=1).argmin(),
    "That is one column's least entry: its sign is also the feature's sign.": lambda g: g[:, 0].argmin(),
    "That is one column's largest entry: its sign is also the feature's sign.": lambda g: g[:, 0].argmax(),
}  # fmt: skip


def check_label_from_weight(function: Callable[[Tensor], int]) -> Feedback:
    """Exercise 1.6: ``function(weight_gradient)`` gives the label of one image from r fᵀ (classes,
    d) alone.
    """

    def body() -> str:
        generator = torch.Generator().manual_seed(5)
        width = 16
        plain = _randn(width, generator=generator)
        centred = plain - plain.mean()
        kinds = {
            "negative features": -plain.abs(),
            "positive features (after a ReLU)": plain.abs(),
            "features that sum to zero (after a LayerNorm)": centred,
            "the same with all signs turned": -centred,
        }
        suspects, wrong = dict(_WRONG_ROWS), ""  # mistakes that explain every answer so far
        for what, features in kinds.items():
            for label in range(10):
                gradient = torch.outer(_residual(10, label, generator), features)
                given = _integer(function(gradient.clone()), "The label")
                if given >= 10:
                    stop(f"You say {given}. There are ten classes: is that the index of a column, of a feature?")
                suspects = {why: choose for why, choose in suspects.items() if int(choose(gradient)) == given}
                if given != label and not wrong:
                    wrong = f"Label {label}, {what}: you say {given}."
        if wrong:
            stop(" ".join([wrong, *suspects][:2]))
        return "Right: the label's row is the one against all others, whatever the features sum to."

    return run(body)


def check_label_counts(function: Callable[[Tensor, int], Tensor]) -> Feedback:
    """Exercise 1.7: ``function(bias_gradient, batch_size)`` gives the counts (classes,) behind a
    zero head.
    """

    def compare(counts: list[int], dtype: torch.dtype) -> None:
        wanted = torch.tensor(counts)
        batch, classes = int(wanted.sum()), len(counts)
        # The reference is autograd: logits of zero, labels as counted.
        logits = torch.zeros(batch, classes, dtype=dtype, requires_grad=True)
        labels = torch.repeat_interleave(torch.arange(classes), wanted)
        gradient = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), logits)[0].sum(0)
        answer = expect_tensor(function(gradient.clone(), batch), (classes,), "The tensor of counts")
        exact = batch * (1 / classes - gradient.double())
        expect_close(
            answer.double(),
            wanted.double(),
            "The tensor of counts",
            tolerance=1e-9,
            mistakes={
                "Divided by the batch size still: the gradient is a mean over B images.": exact / batch,
                "Still divided by the batch size, and then rounded.": (exact / batch).round(),
                "Off by B/K each: p = 1/K is still in it.": -batch * gradient.double(),
                "Not whole numbers yet: round them.": exact,
                "A sign is wrong: a label lowers its entry, so ∂l/∂b is subtracted from 1/K.": (
                    batch * (1 / classes + gradient.double())
                ).round(),
                "Cut off where rounding is needed: 2.9999999 is three.": exact.long().double(),
            },
        )
        if answer.is_floating_point():
            stop("Right numbers, but counts are whole: return an integer tensor (.round().long()).")

    def body() -> str:
        compare([2, 1, 0, 5], FLOAT64)  # a batch first: with one image a forgotten B does not show
        compare([1, 0, 0], FLOAT64)
        for counts in ([1, 0, 3, 0, 0, 2, 1], [7, 0, 11, 1, 2, 0, 0, 0, 3, 6]):
            compare(counts, torch.float32)
        return "Right: a zero head passes no gradient down, and counts the labels exactly."

    return run(body)


def _called(function: Callable[[Tensor, Tensor], Tensor], gradient: Tensor, bias: Tensor, what: str) -> Any:
    try:
        return function(gradient, bias)
    except NotImplementedError:
        raise
    except Exception as error:
        return stop(f"{what}: your code raised {type(error).__name__}: {error}")


def check_unmix_relu(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 1.8: ``function(weight_gradient, bias_gradient)`` gives the images (N, k) that two
    units agree on.
    """

    def compare(delta: Tensor, x: Tensor, wanted: Tensor, what: str) -> None:
        gradient, bias = delta.T @ x, delta.sum(0)
        answer = _called(function, gradient, bias, what)
        if not isinstance(answer, Tensor) or answer.ndim != 2 or answer.shape[1] != x.shape[1]:
            shape = tuple(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
            stop(f"Return a tensor of shape (N, {x.shape[1]}), one row for each image found, not {shape}.")
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
                f"{what}: {far} of your {len(answer)} rows are mixtures of images. A pure row appears at least twice."
            )
        found = set(nearest.indices.tolist())
        if len(found) < len(wanted):
            stop(f"{what}: you found {len(found)} of {len(wanted)} images.")
        if len(answer) > len(wanted):
            stop(f"{what}: the same image appears several times ({len(answer)} rows for {len(wanted)} images).")

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
