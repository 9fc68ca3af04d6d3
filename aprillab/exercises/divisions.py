"""Check of Exercise 1.7 and its eight clients: what each sends of one linear layer, and what a row
over its bias entry then is. Small, in float64, and played by autograd each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .feedback import Feedback, run, stop

RATE, DECAY, PIXELS, UNITS, CLASSES = 0.1, 0.05, 6, 5, 4

Weights = dict[str, Tensor]
Loss = Callable[[Weights], Tensor]


def _weights() -> Weights:
    """W (m, k) and b (m,) of the first layer, and two heads V and U (classes, m)."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"W": (UNITS, PIXELS), "b": (UNITS,), "V": (CLASSES, UNITS), "U": (CLASSES, UNITS)}
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }


def _photographs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x, other = torch.randn(2, PIXELS, generator=generator, dtype=torch.float64)
    return x, other


def _first(weights: Weights, x: Tensor) -> Tensor:
    return torch.tanh(x @ weights["W"].T + weights["b"])


def _error(logits: Tensor, label: int) -> Tensor:
    return cross_entropy(logits[None], torch.tensor([label]))


def _one(x: Tensor, label: int = 1) -> Loss:
    """The plain client: one photograph, one head."""
    return lambda weights: _error(_first(weights, x) @ weights["V"].T, label)


def _trained(
    losses: Sequence[Loss], optimizer: Callable[..., torch.optim.Optimizer], **options: float
) -> tuple[Tensor, Tensor]:
    """What W and b have lost after one local step on each of the losses in turn."""
    weights = _weights()
    before = {name: weights[name].detach().clone() for name in ("W", "b")}
    step = optimizer(list(weights.values()), **options)
    for loss in losses:
        step.zero_grad()
        loss(weights).backward()
        step.step()
    return before["W"] - weights["W"].detach(), before["b"] - weights["b"].detach()


def _gradient(loss: Loss) -> tuple[Tensor, Tensor]:
    weights = _weights()
    by_weight, by_bias = torch.autograd.grad(loss(weights), (weights["W"], weights["b"]))
    return by_weight, by_bias


def _clipped(x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of all tensors, shortened to a norm of 0.01."""
    weights = _weights()
    used = [weights[name] for name in ("W", "b", "V")]
    _one(x)(weights).backward()
    nn.utils.clip_grad_norm_(used, 0.01)
    return used[0].grad, used[1].grad  # type: ignore[return-value]


def shared() -> dict[str, tuple[Tensor, Tensor]]:
    """What each client sends of the first layer: name to (of W, of b), up to the
    server's step size.
    """
    x, other = _photographs()
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    return {
        "two heads": _gradient(
            lambda w: _error(_first(w, x) @ w["V"].T, 1) + _error(_first(w, x) @ w["U"].T, 2),
        ),
        "twins": _gradient(lambda w: _error((_first(w, x) - _first(w, other)) @ w["V"].T, 1)),
        "two steps": _trained([_one(x)] * 2, sgd, lr=RATE),
        "two photographs": _trained([_one(x), _one(other, 2)], sgd, lr=RATE),
        "dropout": _gradient(lambda w: _error((2 * keep * _first(w, x)) @ w["V"].T, 1)),
        "clipped": _clipped(x),
        "decay": _trained([_one(x)], sgd, lr=RATE, weight_decay=DECAY),
        "Adam": _trained([_one(x)], adam, lr=RATE),
    }


def outcome(of_weight: Tensor, of_bias: Tensor) -> str:
    """``picture``, ``mixture`` or ``neither``: what a row over its bias entry is, of two
    photographs.

    Parameters
    ----------
    of_weight : Tensor of shape (m, k)
    of_bias : Tensor of shape (m,); the unit of the largest entry is divided
    """
    unit = int(of_bias.abs().argmax())
    ratio, photographs = of_weight[unit] / of_bias[unit], torch.stack(_photographs())
    if torch.allclose(ratio, photographs[0], atol=1e-9):
        return "picture"
    shares = torch.linalg.lstsq(photographs.T, ratio[:, None]).solution
    return "mixture" if torch.allclose(photographs.T @ shares, ratio[:, None], atol=1e-9) else "neither"


#: Exercise 1.7: why each client's division gives what it gives.
_WHY = {
    "two heads": "both heads send their share to the same outputs y, and δ is the sum of the two",
    "twins": "the same W reads two photographs: one δ xᵀ for each, as in a batch of two",
    "two steps": "both steps add a δ xᵀ with the same x, and (δ + δ′) xᵀ is still a multiple of it",
    "two photographs": "each step adds a δ xᵀ of its own photograph",
    "dropout": "what is left out behind the layer changes δ alone, and a unit left out is a silent one",
    "clipped": "clipping multiplies all tensors by one number, which the division cancels",
    "decay": "each row also has its share of W, and each bias entry of b: δ_j x + λ W_j over δ_j + λ b_j",
    "Adam": "every entry is divided by its own size, and what is left of the photograph is signs",
}


def check_what_comes_out(function: Callable[[], dict[str, str]]) -> Feedback:
    """Exercise 1.7: ``function()`` says for each client what the division gives."""

    def body() -> str:
        answer = function()
        if not isinstance(answer, dict):
            stop(
                f"Return a dictionary, a word for each of the eight clients; you returned a {type(answer).__name__}."
            )
        if missing := [name for name in _WHY if name not in answer]:
            stop(f"Nothing is said of {', '.join(missing)}.")
        if strange := [name for name in _WHY if answer[name] not in ("picture", "mixture", "neither")]:
            stop(f"{strange[0]}: {answer[strange[0]]!r} is not one of 'picture', 'mixture', 'neither'.")
        found = {name: outcome(*parts) for name, parts in shared().items()}
        wrong = [name for name in _WHY if answer[name] != found[name]]
        if wrong:
            right, first = len(_WHY) - len(wrong), wrong[0]
            stop(
                f"{right} of 8 right. {first}: you say {answer[first]}, and autograd's numbers give "
                f"{found[first]}. {_WHY[first][0].upper()}{_WHY[first][1:]}."
            )
        return "Right, all eight: what keeps every row a multiple of one x keeps the picture."

    return run(body)
