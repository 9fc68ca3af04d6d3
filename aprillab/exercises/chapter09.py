"""Checks for chapter 09: what a server reads of weights that come back.

References are made of patches, gradients and weights that the check drew itself, and of torch's own
optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .feedback import Feedback, expect_close, expect_number, expect_something, expect_tensor, expect_whole, run, stop

F64 = torch.float64
Mail = list[tuple[Tensor, Tensor]]  # ΔW_e (d, p) and ΔE (n, d) of each client


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _several(answer: Any, what: Sequence[str]) -> Sequence[Any]:
    """The answer as a tuple of so many, or a message that says what it is instead."""
    expect_something(answer)
    if not isinstance(answer, tuple | list) or len(answer) != len(what):
        stop(f"Return {len(what)} things, {' and '.join(what)}, not a {type(answer).__name__}.")
    return answer


def _solved(dE: Tensor, dW: Tensor) -> Tensor:
    return torch.linalg.lstsq(dE.T, dW, driver="gelsd").solution


# --- 9.1: no learning rate told -------------------------------------------------------------------------------------


def check_patches_and_label(function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, int]]) -> Feedback:
    """Exercise 9.1: ``function(dW, dE, db)`` has the patches and the label from what changed."""

    def check() -> str:
        for seed, (n, d, p, classes, label, rate) in enumerate(((5, 9, 4, 6, 2, 0.1), (4, 12, 7, 3, 0, 3.0))):
            X, probabilities = _random(n, p, seed=seed), torch.softmax(_random(classes, seed=seed + 10), 0)
            G = sum((c * _random(n, d, seed=20 + 5 * seed + t) for t, c in enumerate((1.9, 1.0))), torch.zeros(1))
            residual = probabilities - torch.eye(classes, dtype=F64)[label]
            changes = -rate * G.T @ X, -rate * G, -2.9 * rate * residual
            answer = _several(function(*(c.clone() for c in changes)), ("the patches", "the label"))
            mistakes = {
                "Was one side's sign turned, and the other's not?": -X,
                "There is a learning rate in it: it stands on both sides, so take it out on neither or on both.": X
                * rate,
                "There is a learning rate in it, on one side: it cancels if you leave it alone.": X / rate,
            }
            expect_close(expect_tensor(answer[0], (n, p), "X"), X, "X", mistakes=mistakes, tolerance=1e-6)
            said = expect_whole(answer[1], "The label")
            if said == int(changes[2].argmin()):
                stop(
                    f"The label is {label}, not {said}: you took the most negative entry, as of a gradient. A step "
                    "goes against the gradient, so of after − before it is the one that grew."
                )
            if said != label:
                stop(f"The label is {label}, not {said}: which entry of the head's bias grew?")
        return "Right: neither the rate nor the number of steps was needed, and the label is what grew."

    return run(check)


# --- 9.2: undo weight decay -----------------------------------------------------------------------------------------


def check_without_decay(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 9.2: ``function(dW, dE, W, E)`` has the patches of (9.4), whatever a is."""

    def check() -> str:
        for seed, (n, d, p, a) in enumerate(((6, 10, 5, 0.02), (4, 15, 9, 0.3))):
            X, W, E = _random(n, p, seed=seed), _random(d, p, seed=seed + 10), _random(n, d, seed=seed + 20)
            M = 0.1 * _random(n, d, seed=seed + 30)
            M = M - M.mean(1, keepdim=True)  # LayerNorm: no component along (1, …, 1)
            dW, dE = a * W + M.T @ X, a * E + M
            answer = expect_tensor(function(*(t.clone() for t in (dW, dE, W, E))), (n, p), "X")
            rows = dE.sum(0) @ E.sum(0) / (E.sum(0) @ E.sum(0))  # over patches, not over features
            share = (dE * E).sum() / E.square().sum()
            mistakes = {
                "The decay is still in both: find a and take a·W and a·E off.": _solved(dE, dW),
                "The decay is still in dE: a·E comes off as well.": _solved(dE, dW - a * W),
                "The decay is still in dW: a·W comes off as well.": _solved(dE - a * E, dW),
                "a·W and a·E were added: before − after has plus a times the weights in it.": _solved(
                    dE + a * E, dW + a * W
                ),
                "Rows of dE without their mean still have a multiple of E's own in them: find a first.": _solved(
                    dE - dE.mean(1, keepdim=True), dW
                ),
                "You fitted a to all of dE, and M has a share in that. Fit it to sums in which M vanishes.": _solved(
                    dE - share * E, dW - share * W
                ),
                "You summed over the patches. What vanishes is the sum over a token's features, dim 1.": _solved(
                    dE - rows * E, dW - rows * W
                ),
            }
            expect_close(answer, X, "X", mistakes=mistakes, tolerance=1e-5)
        return "Right: n sums that should vanish give the one number, and the rest is chapter 04."

    return run(check)


# --- 9.3: Adam's first step, undone ---------------------------------------------------------------------------------


def check_first_gradient(function: Callable[[Tensor, Tensor, float, float, float], Tensor]) -> Feedback:
    """Exercise 9.3: ``function(before, after, rate, eps, decay)`` is the gradient behind
    AdamW's first step.
    """

    def check() -> str:
        for seed, (rate, eps, decay) in enumerate(((1e-3, 1e-6, 0.0), (1e-2, 1e-4, 0.1), (0.1, 1e-2, 0.5))):
            before, g = _random(5, 8, seed=seed), eps * _random(5, 8, seed=seed + 10)
            weight = torch.nn.Parameter(before.clone())
            optimizer = torch.optim.AdamW([weight], lr=rate, eps=eps, weight_decay=decay)
            weight.grad = g.clone()
            optimizer.step()
            after = weight.detach()
            answer = expect_tensor(function(before.clone(), after.clone(), rate, eps, decay), (5, 8), "The gradient")
            r, raw = ((1 - rate * decay) * before - after) / rate, (before - after) / rate
            later = (before - after / (1 - rate * decay)) / rate
            mistakes = {
                "That is r itself: solve r = g / (|g| + ε) for g.": r,
                "The denominator has |r|, not r: for negative entries it is another number.": eps * r / (1 - r),
                "The weight decay is still in it: AdamW shrinks the weight by 1 − ηλ before it steps.": eps
                * raw
                / (1 - raw.abs()),
                "ε is missing in front.": r / (1 - r.abs()),
                "The denominator is 1 − |r|.": eps * r / (1 + r.abs()),
                "The decay is taken off the wrong weights: it is the old one that shrinks.": eps
                * later
                / (1 - later.abs()),
                "The learning rate is missing in the decay: the weight shrinks by 1 − ηλ, not by 1 − λ.": _undone(
                    ((1 - decay) * before - after) / rate, eps
                ),
                "The decay is taken off the weight after the step: it is the old one that shrinks.": _undone(
                    raw - decay * after, eps
                ),
                "The decay is counted twice: the old weight shrinks, so take (1 − ηλ) times it.": _undone(
                    ((1 + rate * decay) * before - after) / rate, eps
                ),
                "AdamW's decay is no part of its gradient: take it off the weight, not off g.": _undone(raw, eps)
                - decay * before,
                "The learning rate is still in it: divide the step by it first.": _undone(r * rate, eps),
            }
            expect_close(answer, g, "The gradient", mistakes=mistakes, tolerance=1e-6)
        return "Right: one-to-one, entry by entry. In float32 the same lines show what rounding leaves of it."

    return run(check)


def _undone(r: Tensor, eps: float) -> Tensor:
    return eps * r / (1 - r.abs())


# --- 9.4: who holds one photograph ----------------------------------------------------------------------------------

_RATES = (1.0, 1e-9, 2.0, 0.5, 1e-2, 0.1)  # the second: at the end of a schedule
_PICTURES = (3, 2, 1, 0, 8, 2)  # of each client; 0: it did nothing


def _mail(order: Sequence[int], seed: int, n: int = 6, d: int = 14, p: int = 10) -> Mail:
    """What clients send in float32, each with its rate and its number of photographs."""
    mail = []
    for client in order:
        dW, dE = torch.zeros(d, p, dtype=F64), torch.zeros(n, d, dtype=F64)
        for j in range(_PICTURES[client]):
            M = _RATES[client] * _random(n, d, seed=1000 * seed + 50 * client + j)
            dW, dE = dW + M.T @ _random(n, p, seed=1000 * seed + 50 * client + 20 + j), dE + M
        mail.append((dW.float(), dE.float()))
    return mail


def _left(dW: Tensor, dE: Tensor) -> float:
    dW, dE = dW.double(), dE.double()
    return float((dW - dE.T @ _solved(dE, dW)).norm())


def check_holds_one(function: Callable[[Mail], int]) -> Feedback:
    """Exercise 9.4: ``function(mail)`` is the number of the client with one photograph."""

    def check() -> str:
        for seed, order in enumerate(((0, 1, 2, 4, 5), (3, 5, 4, 1, 0, 2), (4, 2, 3, 0))):
            mail = _mail(order, seed)
            wanted, one = order.index(2), "The number of the client"
            answer = expect_whole(function([(dW.clone(), dE.clone()) for dW, dE in mail]), one)
            if answer == wanted:
                continue
            if not 0 <= answer < len(mail):
                stop(f"{one} should be from 0 to {len(mail) - 1}, not {answer}.")
            dW, dE = mail[answer]
            if not dW.any():
                stop(f"Client {answer} did nothing: its weights have not changed, and zero fits anything.")
            relative = _left(dW, dE) / float(dW.norm())
            small = answer == min((i for i in range(len(mail)) if mail[i][0].any()), key=lambda i: mail[i][0].norm())
            hint = " It has the smallest learning rate: divide what is left by the norm of dW." if small else ""
            stop(
                f"Client {answer} holds {_PICTURES[order[answer]]} photographs: the best single picture leaves "
                f"{relative:.0%} of its dW. The right one's leaves a ten-millionth.{hint}"
            )
        return "Right: the equations to spare say who can be attacked, before anybody is."

    return run(check)


# --- 9.5: how fast it learned ---------------------------------------------------------------------------------------


def check_learning_rate(function: Callable[[dict[str, Tensor], dict[str, Tensor]], float]) -> Feedback:
    """Exercise 9.5: ``function(moved, gradient)`` is the rate of one step of SGD."""

    def check() -> str:
        for seed, rate in enumerate((0.05, 2.0)):
            gradient = {name: _random(40, seed=10 * seed + k) ** 3 for k, name in enumerate(("a", "b", "frozen"))}
            gradient["a"][:3] = 1e-9  # an entry that says nothing of the rate
            noise = {name: 1e-5 * rate * _random(40, seed=30 + 10 * seed + k) for k, name in enumerate(gradient)}
            moved = {name: rate * g + noise[name] for name, g in gradient.items()}
            moved["frozen"] = torch.zeros(40, dtype=F64)
            answer = expect_number(
                function(
                    {name: t.float() for name, t in moved.items()}, {name: t.float() for name, t in gradient.items()}
                ),
                "The learning rate",
            )
            if abs(answer / rate - 1) < 1e-3:
                continue
            g, m = torch.cat(list(gradient.values())), torch.cat(list(moved.values()))
            trained = torch.cat([gradient[name] for name in ("a", "b")]), torch.cat([moved[name] for name in "ab"])
            looks = (
                (m @ g / (g @ g), "the frozen tensor is counted as one that moved by zero. Leave it out"),
                (m.norm() / g.norm(), "the frozen tensor is counted as one that moved by zero. Leave it out"),
                ((trained[1] / trained[0]).mean(), "a mean of ratios lets the smallest gradients decide, where "
                 "there is only rounding"),
                ((m / g).mean(), "a mean of ratios lets the smallest gradients decide, and counts what is frozen"),
                (torch.tensor(2 * rate / 3), "the frozen tensor is counted as one that moved by zero. Leave it out"),
                (torch.tensor(1 / rate), "that is one over it"),
                (torch.tensor(-rate), "its sign is turned: moved is before − after"),
            )  # fmt: skip
            hint = next((f": {words}" for value, words in looks if abs(answer / float(value) - 1) < 1e-2), "")
            stop(f"The learning rate is {rate:g}, not {answer:.4g}{hint}.")
        return "Right: one number explains every entry that moved, and the server knows the rate as well."

    return run(check)


# --- 9.6: two local steps by hand -----------------------------------------------------------------------------------


def _by_torch(rate: float, momentum: float, decay: float) -> tuple[float, float, float]:
    """a, c_1 and c_2, from three runs of torch.optim.SGD."""

    def end(weight: float, gradients: tuple[float, float]) -> float:
        w = torch.nn.Parameter(torch.tensor(weight, dtype=F64))
        optimizer = torch.optim.SGD([w], lr=rate, momentum=momentum, weight_decay=decay)
        for g in gradients:
            w.grad = torch.tensor(g, dtype=F64)
            optimizer.step()
        return w.item()

    return 1 - end(1.0, (0.0, 0.0)), -end(0.0, (1.0, 0.0)) / rate, -end(0.0, (0.0, 1.0)) / rate


def check_two_steps(function: Callable[[float, float, float], tuple[float, float, float]]) -> Feedback:
    """Exercise 9.6: ``function(rate, momentum, decay)`` is a, c_1, c_2 after two steps."""

    def check() -> str:
        for rate, momentum, decay in ((0.1, 0.9, 0.0), (0.1, 0.0, 0.5), (0.2, 0.9, 0.3), (1.0, 0.5, 0.1)):
            names = ("a", "c_1", "c_2")
            given = _several(function(rate, momentum, decay), names)
            answer = [expect_number(x, name) for x, name in zip(given, names, strict=True)]
            wanted = _by_torch(rate, momentum, decay)
            off = [abs(x - y) > 1e-9 for x, y in zip(answer, wanted, strict=True)]
            if not any(off):
                continue
            case = f"For η = {rate:g}, μ = {momentum:g}, λ = {decay:g}"
            if abs(answer[1] - wanted[2]) + abs(answer[2] - wanted[1]) < 1e-9:
                stop(f"{case}: c_1 and c_2 have changed places. The first gradient is the one that is taken twice.")
            shrunk = rate * decay
            looks: dict[str, tuple[int, float]] = {
                "the decay is in c_1 as well: what the first step added has shrunk by the second": (1, 1 + momentum),
                "what is left of g_1 in the momentum is missing": (1, 1 - shrunk),
                "that is a without momentum: the decay's first step goes on in b": (0, 1 - (1 - shrunk) ** 2),
                "that is 1 − a, what is left of the old weight": (0, 1 - wanted[0]),
                "the second step shrinks weights that the first has shrunk": (0, shrunk * (2 + momentum)),
                "the decay acts in the second step as well": (0, shrunk),
                "η stands in front of the bracket already": (1, rate * wanted[1]),
                "after the second step nothing shrinks what it added": (2, 1 - shrunk),
            }
            for words, (which, value) in looks.items():
                if off[which] and abs(answer[which] - value) < 1e-9:
                    stop(f"{case}: {names[which]} is {wanted[which]:.6g}, not {answer[which]:.6g}: {words}.")
            which = off.index(True)
            stop(f"{case}: {names[which]} is {wanted[which]:.6g}, not {answer[which]:.6g}.")
        return "Right: three numbers, the same for every tensor, and the picture never minds them."

    return run(check)
