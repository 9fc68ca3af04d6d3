"""Checks of Exercises 1.5 and 1.6, the label of one image from its head's gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .feedback import Feedback, expect_whole, run, stop

FLOAT64 = torch.float64


def _residual(classes: int, label: int, generator: torch.Generator) -> Tensor:
    """softmax(logits) − onehot(label) for random logits, (classes,)."""
    r = torch.softmax(2 * torch.randn(classes, generator=generator, dtype=FLOAT64), 0)
    r[label] -= 1
    return r


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
                given = expect_whole(answer, "The label")
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


def check_label_from_weight(function: Callable[[Tensor, bool], int | None]) -> Feedback:
    """Exercise 1.6: ``function(weight_gradient, after_relu)`` gives the label of one image from
    r fᵀ (classes, d) alone, or None where nothing tells it.
    """

    def body() -> str:
        generator = torch.Generator().manual_seed(5)
        width = 16
        plain = torch.randn(width, generator=generator, dtype=FLOAT64)
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
                answer = function(gradient.clone(), "ReLU" in what)
                if answer is None:
                    stop(f"Ten classes, {what}: None, though one row is against all others.")
                given = expect_whole(answer, "The label")
                if given >= 10:
                    stop(f"You say {given}. There are ten classes: is that the index of a column, of a feature?")
                suspects = {why: choose for why, choose in suspects.items() if int(choose(gradient)) == given}
                if given != label and not wrong:
                    wrong = f"Label {label}, {what}: you say {given}."
        if wrong:
            stop(" ".join([wrong, *suspects][:2]))
        _two_classes(function, plain)
        return (
            "Right: the label's row is the one against all others; with two classes a ReLU's signs tell, or nothing."
        )

    return run(body)


def _two_classes(function: Callable[[Tensor, bool], int | None], features: Tensor) -> None:
    for label in (0, 1):
        r = torch.tensor([0.25, -0.25] if label else [-0.25, 0.25], dtype=FLOAT64)
        answer = function(torch.outer(r, features.abs()), True)
        what = f"Two classes after a ReLU, label {label}"
        if answer is None:
            stop(f"{what}: None. Both rows are as long, but no feature is negative, and so r's signs can be seen.")
        if (given := expect_whole(answer, "The label")) != label:
            stop(
                f"{what}: you say {given}. The two rows have one length; the label's is the one of negative numbers."
            )
    gradient = torch.outer(torch.tensor([0.25, -0.25], dtype=FLOAT64), features)
    if (answer := function(gradient, False)) is not None:
        stop(
            f"Two classes, features of both signs: you say {answer}. But r fᵀ = (−r)(−f)ᵀ: the other label with the "
            "features turned round gives the same gradient, so nothing tells. Return None."
        )
