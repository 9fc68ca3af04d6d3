"""Checks for chapter 05: gradient matching.

References are sums written out number by number, or central differences, never the package's objectives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models import VisionTransformer
from .feedback import Feedback, expect_close, expect_tensor, run, stop

F64 = torch.float64
SHAPES = (((2, 3), (4,)), ((5,), (2, 2), (3, 1, 2)), ((1, 4, 3), (6,)))

Distance = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
Step = Callable[[nn.Module, Tensor, Tensor, list[Tensor], float], tuple[Tensor, float]]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def _values(tensors: Sequence[Tensor]) -> list[float]:
    return [value for tensor in tensors for value in tensor.flatten().tolist()]


def _scalar(answer: Any, what: str) -> Tensor:
    if isinstance(answer, float | int) and not isinstance(answer, bool):
        stop(f"{what} is a plain number: keep it a tensor (no .item()), or nothing can be differentiated.")
    return expect_tensor(answer, (), what)


def _must_differentiate(function: Callable[[Tensor], Tensor], at: Tensor, what: str, h: float = 1e-6) -> None:
    """The value must carry a graph back to its input, all of it: the attack descends on it."""
    probe = at.clone().requires_grad_()
    value = function(probe)
    if not value.requires_grad:
        stop(f"{what} has lost its graph: no .detach(), .item() or torch.no_grad(); the attack differentiates it.")
    (slope,) = torch.autograd.grad(value, probe)
    direction = _random(*at.shape, seed=7)
    with torch.no_grad():
        wanted = float(function(at + h * direction) - function(at - h * direction)) / (2 * h)
    if abs(float((slope * direction).sum()) - wanted) > 1e-4 * max(1.0, abs(wanted)):
        stop(f"{what} has the right value and a wrong derivative: a part of it has lost its graph (.detach()?).")


def _compare(what: str, answers: list[Tensor], wanted: list[float], mistakes: list[dict[str, float]]) -> None:
    """Several scalars at once: a common factor or sign is then no accident of a single number."""
    columns = {m: torch.tensor([case[m] for case in mistakes], dtype=F64) for m in mistakes[0]}
    expect_close(torch.stack([a.detach().double() for a in answers]), torch.tensor(wanted, dtype=F64), what,
        mistakes=columns)  # fmt: skip


def _pairs() -> list[tuple[list[Tensor], list[Tensor]]]:
    """Gradients of a picture on trial and shared ones, the tensors of quite different sizes."""
    cases = []
    for k, shapes in enumerate(SHAPES):
        scales = [10.0 ** (-i) for i in range(len(shapes))]
        scaled = list(enumerate(zip(scales, shapes, strict=True), 10 * k))
        g, t = ([s * _random(*shape, seed=first + i) for i, (s, shape) in scaled] for first in (0, 90))
        cases.append((g, t))
    return cases


def check_dlg_step(function: Step) -> Feedback:
    """Exercise 5.1: ``function(model, images, labels, shared, step)`` is (images after, loss before)."""

    def check() -> str:
        for seed, model in enumerate((_perceptron(), _tiny_vit())):
            parameters = list(model.parameters())
            labels = torch.tensor([1])
            private, trial = _random(1, 1, 4, 4, seed=60 + seed), _random(1, 1, 4, 4, seed=70 + seed)
            shared = _gradients(model, private, labels)
            answer = _step(function, model, private, labels, shared)
            at_rest = "The picture after a step from the private image, where the distance is 0,"
            expect_close(answer[0], private, at_rest, mistakes=_steps_of_the_cross_entropy(model, private, labels))
            wanted = float(_matching_loss(model, trial, labels, shared))
            slope = _central_differences(model, trial, labels, shared)
            step = 0.1 / float(slope.norm())
            images, loss = _step(function, model, trial, labels, shared, step)
            after = float(_matching_loss(model, trial - step * slope, labels, shared))
            expect_close(_number(loss), _number(wanted), "The loss",
                mistakes={"That is the loss after the step: return the one before it.": _number(after),
                          "That is the root of it: DLG's distance is squared.": _number(math.sqrt(wanted)),
                          "You take means over entries; DLG sums them.": torch.stack(
                              list(map(nn.functional.mse_loss, _gradients(model, trial, labels), shared))).sum()},
                tolerance=1e-4)  # fmt: skip
            expect_close(images, trial - step * slope, "The picture after the step",
                mistakes={"It goes uphill: subtract the step.": trial + step * slope,
                          "The picture has not moved.": trial,
                          "The step has twice the length.": trial - 2 * step * slope,
                          "It moves by the sign of the slope, as signed Adam would; here by the slope itself.": trial
                          - step * slope.sign(),
                          "That is the step alone: take it off the picture.": -step * slope,
                          "That is the slope: move the picture against it.": slope},
                tolerance=1e-5)  # fmt: skip
            if any(p.grad is not None for p in parameters):
                stop("The model's .grad is filled: use torch.autograd.grad for both derivatives, not .backward().")
            if images.requires_grad:
                stop("The new picture still hangs on the graph: detach it, or memory grows with every step.")
        return "Right: a derivative of a derivative, and downhill. Repeat it a few hundred times and you have DLG."

    return run(check)


def _step(
    function: Callable[..., Any], model: nn.Module, images: Tensor, labels: Tensor, shared: list[Tensor],
    step: float = 1.0,
) -> tuple[Tensor, float]:  # fmt: skip
    """The reader's answer, taken apart; the error that everybody meets first gets words."""
    try:
        answer = function(model, images.clone(), labels, [g.clone() for g in shared], step)
    except RuntimeError as error:
        if "does not require grad" in str(error) or "not have been used in the graph" in str(error):
            stop(
                "Autograd finds no path from the loss to the picture. Two things are needed: the picture must "
                "require a gradient, and the first torch.autograd.grad needs create_graph=True."
            )
        raise
    if not (isinstance(answer, tuple) and len(answer) == 2):
        stop("Return two things: the picture after the step, and the loss before it.")
    picture = expect_tensor(answer[0], tuple(images.shape), "The picture after the step")
    return picture, float(answer[1])


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    loss = nn.functional.cross_entropy(model(images), labels)
    return [g.detach() for g in torch.autograd.grad(loss, list(model.parameters()))]


def _steps_of_the_cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The step of 1 along ∂l/∂x, of the client's loss and not of the distance."""
    pixels, what = images.detach().requires_grad_(), "The derivative must be that of the distance; yours is that of"
    slope = torch.autograd.grad(nn.functional.cross_entropy(model(pixels), labels), pixels)[0]
    return {f"{what} the cross-entropy.": images - slope, f"{what} the cross-entropy, and uphill.": images + slope}


def _matching_loss(model: nn.Module, images: Tensor, labels: Tensor, shared: Sequence[Tensor]) -> Tensor:
    mine = _gradients(model, images, labels)
    return torch.stack([(a - b).square().sum() for a, b in zip(mine, shared, strict=True)]).sum()


def _central_differences(model: nn.Module, images: Tensor, labels: Tensor, shared: Sequence[Tensor]) -> Tensor:
    """The slope of the matching loss at the picture, pixel by pixel."""
    slope, h = torch.zeros_like(images), 1e-5
    for k in range(images.numel()):
        nudge = torch.zeros_like(images).flatten()
        nudge[k] = h
        up, down = (images + s * nudge.reshape(images.shape) for s in (1, -1))
        difference = _matching_loss(model, up, labels, shared) - _matching_loss(model, down, labels, shared)
        slope.view(-1)[k] = difference / (2 * h)
    return slope


def _perceptron() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _tiny_vit() -> nn.Module:
    return VisionTransformer(
        image_size=4, patch_size=2, channels=1, width=8, depth=1, heads=2, classes=3, seed=5
    ).double()


def check_cosine_distance(function: Distance) -> Feedback:
    """Exercise 5.2: ``function(gradients, targets)`` is 1 − cos of all tensors taken as one vector."""

    def check() -> str:
        what = "The cosine distance"
        g = [_random(2, 3, seed=3), _random(4, seed=4), _random(5, seed=5)]
        parallel = float(_scalar(function(g, [3 * x for x in g]), what))
        if abs(parallel) > 1e-7:
            tell = {
                1.0: "That is the cosine; the distance is 1 minus it.",
                -1.0: "That is −cos; add 1.",
                -2.0: "A cosine for each tensor was summed; all tensors together make one vector, with one cosine.",
            }.get(round(parallel, 9), "Divide by both lengths: the distance must not feel the factor 3.")
            stop(f"{what} of gradients that are parallel should be 0, not {parallel:.4g}. {tell}")
        opposite = float(function(g, [-x for x in g]))
        if abs(opposite - 2) > 1e-7:
            stop(f"{what} of opposite gradients should be 2, not {opposite:.4g}: the cosine has a sign.")
        found = []
        for g, t in _pairs():
            a, b = _values(g), _values(t)
            wanted = 1 - _cosine(a, b)
            each = [_apart([x], [y]) for x, y in zip(g, t, strict=True)]
            mistakes = {
                "It is the mean of one cosine for each tensor; here all tensors are one long vector.": sum(each)
                / len(each),
                "It is a sum of one distance for each tensor; here all tensors are one long vector.": sum(each),
                "Only the first tensor is in it.": each[0],
                "Only the last tensor is in it.": each[-1],
                "The cosine is squared, or its sign lost.": 1 - abs(_cosine(a, b)),
                "It is the angle, which is 0, 1, 2 as well; take 1 − cos.": math.acos(_cosine(a, b)) * 2 / math.pi,
                "The product of the norms is a root short: ‖g'‖‖g‖, not ‖g'‖²‖g‖².": 1
                - sum(x * y for x, y in zip(a, b, strict=True)) / (sum(x * x for x in a) * sum(y * y for y in b)),
            }
            answer = _scalar(function([x.clone() for x in g], [x.clone() for x in t]), what)
            found.append((answer, wanted, mistakes))
        _compare(what, *map(list, zip(*found, strict=True)))
        for g, t in _pairs():
            _must_differentiate(lambda x, g=g, t=t: function([x, *g[1:]], t), g[0], what)  # type: ignore[misc]
        return "Right: it sees the gradient's direction and nothing of its length."

    return run(check)


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def _apart(g: Sequence[Tensor], t: Sequence[Tensor]) -> float:
    """1 − cos of two lists of tensors, each as one long vector."""
    return 1 - _cosine(_values(g), _values(t))


def check_position_term(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 5.3: ``function(gradient, target)``, (1, tokens, d): the mean of the tokens' 1 − cos."""

    def check() -> str:
        what = "The position term"
        _of_parallel_tokens(function, what)
        found = []
        for k, (tokens, d) in enumerate(((3, 5), (5, 4), (17, 8))):
            g, t = _random(1, tokens, d, seed=40 + k), _random(1, tokens, d, seed=50 + k)
            t[0, 0] *= 100  # the class token's row is the loudest where the head reads it
            each = _of_tokens(g, t)
            columns = [1 - _cosine(a.tolist(), b.tolist()) for a, b in zip(g[0].T, t[0].T, strict=True)]
            mistakes = {
                "It is one cosine of the whole embedding; one for each token is asked.": _apart([g], [t]),
                "It is summed over the tokens; their mean is asked.": sum(each),
                "The class token is left out; its row counts like the others.": sum(each[1:]) / (tokens - 1),
                "The last token is left out.": sum(each[:-1]) / (tokens - 1),
                "The cosines run over the tokens, one for each feature; take the last dimension.": sum(columns) / d,
                "It is the mean cosine; take 1 minus it.": 1 - sum(each) / tokens,
            }
            answer = _scalar(function(g.clone(), t.clone()), what)
            found.append((answer, sum(each) / tokens, mistakes))
        _compare(what, *map(list, zip(*found, strict=True)))
        g, t = _random(1, 4, 6, seed=31), _random(1, 4, 6, seed=32)
        _must_differentiate(lambda x: function(x, t), g, what)
        return "Right: every patch has one vote on where it stands, the quiet ones included."

    return run(check)


def _of_parallel_tokens(function: Callable[[Tensor, Tensor], Tensor], what: str) -> None:
    """Tokens that are parallel, each with a length of its own: 0, and what else comes out tells the mistake."""
    t = _random(1, 4, 6, seed=30)
    lengths = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=F64)[None, :, None]
    same = float(_scalar(function(t * lengths, t.clone()), what))
    if abs(same) > 1e-9:
        mine, theirs = (t * lengths)[0].norm(dim=-1), t[0].norm(dim=-1)
        divided = {  # the dot product of a token is the product of both norms here
            " You divide by the squared norms: take their roots, or .norm().": 1 / (mine * theirs),
            " You divide by the roots of the norms: by the norms themselves.": (mine * theirs).sqrt(),
            " The target's norm is missing below the line.": theirs,
            " The gradient's own norm is missing below the line.": mine,
            " Nothing is normalized: divide by both norms, token by token.": mine * theirs,
        }
        wrong = (words for words, cos in divided.items() if abs(same - float(1 - cos.mean())) < 1e-9)
        tell = (
            " That is the cosine itself; take 1 minus it." if abs(same - 1) < 1e-9
            else " That is −cos; add 1." if abs(same + 1) < 1e-9
            else words if (words := next(wrong, ""))
            else " The tokens' lengths should not matter: normalize each token by itself, over its features."
        )  # fmt: skip
        stop(f"{what} of tokens that are parallel, each with a length of its own, is 0, not {same:.4g}.{tell}")


def check_with_position_term(
    function: Callable[[Sequence[Tensor], Sequence[Tensor], int, float], Tensor],
) -> Feedback:
    """Exercise 5.4: ``function(gradients, targets, place, weight)``: 1 − cos, and the term of tensor ``place``."""

    def check() -> str:
        what = "The distance with the term"
        cases = [_with_an_embedding(seed, place) for seed, place in ((0, 0), (1, 2), (2, 1))]
        found = []
        for (g, t, place), weight in zip(cases, (1.0, 0.25, 8.0), strict=True):
            distance, each = _apart(g, t), _of_tokens(g[place], t[place])
            alone = [_apart([x], [y]) for x, y in zip(g, t, strict=True)]
            rest = _apart(g[:place] + g[place + 1 :], t[:place] + t[place + 1 :])
            squares = sum((a - b) ** 2 for a, b in zip(_values(g), _values(t), strict=True))
            term = sum(each) / len(each)
            mistakes = {
                "The term has no weight.": distance + term,
                "The term is missing.": distance,
                "The weight multiplies the distance; it belongs to the term.": weight * distance + term,
                "The weight multiplies both parts; it belongs to the term.": weight * (distance + term),
                "The term is taken off: it is a distance, too, so add it.": distance - weight * term,
                "The term is one cosine of the whole embedding; every token has its own.": distance
                + weight * alone[place],
                "The tokens' terms are summed; take their mean.": distance + weight * sum(each),
                "The class token is left out of the term.": distance + weight * sum(each[1:]) / (len(each) - 1),
                "The embedding's gradient is missing in the distance; it stays there as well.": rest
                + weight * term,
                "The distance is a mean over tensors; it is one cosine of all tensors as one long vector.": sum(alone)
                / len(alone) + weight * term,
                "The term reads the first tensor; the embedding's is at index `place`.": distance
                + weight * float(1 - nn.functional.cosine_similarity(g[0], t[0], dim=-1).mean()),
                "The distance is DLG's squared one; Inverting Gradients takes 1 − cos.": squares + weight * term,
            }  # fmt: skip
            answer = _scalar(function([x.clone() for x in g], [x.clone() for x in t], place, weight), what)
            found.append((answer, distance + weight * term, mistakes))
        _compare(what, *map(list, zip(*found, strict=True)))
        g, t, place = cases[1]
        _must_differentiate(lambda x: function([*g[:place], x, *g[place + 1 :]], t, place, 1.0), g[place], what)
        return "Right: the same distance, and one more voice that knows where each patch belongs. Now race it."

    return run(check)


def _with_an_embedding(seed: int, place: int) -> tuple[list[Tensor], list[Tensor], int]:
    """Three tensors of trial and target, the one at ``place`` an embedding's, with a loud class token."""
    shapes: list[tuple[int, ...]] = [(3, 4), (5,)]
    shapes.insert(place, (1, 4 + seed, 6))
    g, t = ([_random(*shape, seed=s + 10 * seed + k) for k, shape in enumerate(shapes)] for s in (200, 300))
    t[place][0, 0] *= 30
    return g, t, place


def _of_tokens(gradient: Tensor, target: Tensor) -> list[float]:
    """1 − cos of every token's row."""
    return [1 - _cosine(a.tolist(), b.tolist()) for a, b in zip(gradient[0], target[0], strict=True)]


def check_places(function: Callable[[Tensor, Tensor], Tensor]) -> Feedback:
    """Exercise 5.5: ``function(rows, shared)``, both (n, d): the places, int64 (n,), of largest cosines."""

    def check() -> str:
        shared = _of_lengths(_random(5, 8, seed=80), 0.2, 8.0, 40.0, 5.0, 0.8)
        belongs = torch.tensor([2, 0, 3, 4, 1])
        rows = _of_lengths(shared[belongs], 1.0, 1.0, 1.0, 1.0, 1.0)
        loud = _of_lengths(rows + 0.02 * _random(5, 8, seed=79), 0.03, 0.5, 3.0, 45.0, 70.0)
        _expect_places(function, loud, shared, belongs, "Five patches whose rows are the shared ones, scaled")
        for seed in range(4):
            noisy = rows + 0.5 * _random(5, 8, seed=81 + seed)
            _expect_places(function, noisy, shared, _best_order(noisy, shared), "Five patches, found roughly")
        shared = torch.eye(3, dtype=F64)
        rows = torch.tensor([[0.8, 0.55, 0.0], [0.75, -0.3, 0.3], [0.1, 0.2, 0.9]], dtype=F64)
        _expect_places(function, rows, shared, _best_order(rows, shared), "Three patches, two with one favourite")
        return "Right: a jigsaw laid without the picture on its box. The gradient of the embedding is the box."

    return run(check)


def _of_lengths(rows: Tensor, *lengths: float) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True) * torch.tensor(lengths, dtype=F64)[:, None]


def _best_order(rows: Tensor, shared: Tensor, by_distance: bool = False) -> Tensor:
    """The order with the largest sum of cosines, or the least one of squared distances, all orders tried."""
    fit = [[_cosine(a.tolist(), b.tolist()) for b in shared] for a in rows]
    if by_distance:
        fit = (-(rows[:, None] - shared[None]).square().sum(-1)).tolist()
    orders = itertools.permutations(range(len(rows)))
    return torch.tensor(max(orders, key=lambda order: sum(fit[i][j] for i, j in enumerate(order))))


def _expect_places(
    function: Callable[[Tensor, Tensor], Tensor], rows: Tensor, shared: Tensor, wanted: Tensor, case: str
) -> None:
    answer = function(rows.clone(), shared.clone())
    if isinstance(answer, list | tuple) and all(hasattr(value, "__index__") for value in answer):
        answer = torch.tensor([value.__index__() for value in answer])
    answer = expect_tensor(answer, (len(rows),), "The list of places")
    if torch.equal(answer.long(), wanted) and bool((answer == answer.round()).all()):
        return
    if sorted(answer.tolist()) != list(range(len(rows))):
        stop(
            f"{case}: {answer.tolist()} puts two patches at one place. Each place takes one: choose the best "
            "assignment of all, not the best place for each."
        )
    worst, by_distance = _best_order(rows, -shared), _best_order(rows, shared, by_distance=True)
    mistakes = {
        "That is the inverse: entry i is the place of patch i, not the patch of place i.": wanted.argsort(),
        "That is the assignment that fits worst: maximize the cosines.": worst,
        "The longest rows decided: take cosines, not products or distances of rows as they are.": by_distance,
        "That is each patch where it is.": torch.arange(len(rows)),
    }
    for words, order in mistakes.items():
        if torch.equal(answer.long(), order):
            stop(f"{case}: not right yet. {words}")
    stop(f"{case}: the places are {wanted.tolist()}, not {answer.tolist()}.")
