"""Checks for chapter 06: fixing the position embedding, and what else a client can do to its
update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.closed_forms.patch_embedding import embedding_closed_form
from ..data import load_victim
from ..metrics import psnr
from ..models import VisionTransformer
from ..preprocessing import HALF
from ..update import ClientUpdate, client_update
from .feedback import Feedback, expect_close, expect_tensor, run, stop

F64 = torch.float64


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _vit(size: int = 8, width: int = 16, seed: int = 0) -> VisionTransformer:
    return VisionTransformer(
        image_size=size, patch_size=4, width=width, depth=1, heads=2, classes=5, seed=seed
    ).double()


# --- 6.1 ------------------------------------------------------------------------------------------------------


def check_freeze(function: Callable[[nn.Module, str], Any]) -> Feedback:
    """Exercise 6.1: ``function(model, name)`` freezes the parameter of that name and nothing else,
    in place.
    """

    def check() -> str:
        for name in ("position_embedding", "blocks.0.attention.query.weight"):
            model = _vit()
            # A neighbour whose name begins alike: matching by prefix would freeze it, too.
            model.position_embedding_scale = nn.Parameter(torch.ones(1, dtype=F64))
            before = {key: p.detach().clone() for key, p in model.named_parameters()}
            function(model, name)
            parameters = dict(model.named_parameters())
            if missing := sorted(before.keys() - parameters.keys()):
                stop(f"{missing[0]} is no parameter of the model any more: keep it, only stop training it.")
            if any(not torch.equal(p, before[key]) for key, p in parameters.items()):
                stop("A parameter's values changed. To freeze is to keep the values and stop training them.")
            frozen = {key for key, p in parameters.items() if not p.requires_grad}
            if not frozen:
                stop("Nothing is frozen: every parameter still has requires_grad=True.")
            if frozen == parameters.keys():
                stop("Everything is frozen: the model would not learn at all. Freeze one parameter by its name.")
            if name not in frozen:
                stop(f"{name} is still trained; frozen is {', '.join(sorted(frozen))}.")
            if extra := sorted(frozen - {name}):
                stop(f"{extra[0]} is frozen too: compare the whole name, not its beginning.")
        update = client_update(_frozen(function), _random(1, 3, 8, 8, seed=1), torch.tensor([2]))
        assert "position_embedding" not in update.gradients
        return "Right. One flag, and no client has that gradient to share any more."

    return run(check)


def _frozen(function: Callable[[nn.Module, str], Any]) -> nn.Module:
    model = _vit()
    function(model, "position_embedding")
    return model


# --- 6.2 ------------------------------------------------------------------------------------------------------


def check_sinusoids(function: Callable[[int, int, float], Tensor]) -> Feedback:
    """Exercise 6.2: ``function(tokens, width, base)`` is equation (6.1) with tokens in rows,
    (tokens, width).
    """

    def check() -> str:
        first = expect_tensor(function(1, 6, 100.0), (1, 6), "The table of one token")
        expect_close(
            first.double(),
            torch.tensor([[0.0, 1.0] * 3], dtype=F64),
            "Row 0, where every angle is zero,",
            mistakes={
                "Sine and cosine are swapped: sines stand in the even columns.": torch.tensor(
                    [[1.0, 0.0] * 3], dtype=F64
                ),
                "All sines stand before all cosines; they alternate.": torch.tensor(
                    [[0.0] * 3 + [1.0] * 3], dtype=F64
                ),
                "Positions start at 0, not at 1.": _sinusoids(2, 6, 100.0)[1:],
            },
        )
        for tokens, width, base in ((5, 8, 10_000.0), (17, 12, 50.0), (4, 2, 10.0)):
            wanted = _sinusoids(tokens, width, base)
            answer = expect_tensor(function(tokens, width, base), (tokens, width), "The table").double()
            degrees = {
                "The angle is in radians, not in degrees.": _sinusoids(tokens, width, base, turn=math.pi / 180)
            }
            mistakes = {
                "The exponent runs twice too slowly: it is 2k/width for the pair of columns 2k, 2k + 1, not "
                "k/width.": _sinusoids(tokens, width, base, slow=0.5),
                "The exponent runs twice too fast: is the column's number doubled once more?": _sinusoids(
                    tokens, width, base, slow=2.0
                ),
                "The frequencies grow from column to column; they fall: base to a negative power.": _sinusoids(
                    tokens, width, 1 / base
                ),
                **degrees,
            }
            expect_close(answer, wanted, "The table", mistakes=mistakes, tolerance=1e-5)
        return "Right: fixed, known to everybody, and smooth from row to row. Remember that last word for chapter 07."

    return run(check)


def _sinusoids(tokens: int, width: int, base: float, slow: float = 1.0, turn: float = 1.0) -> Tensor:
    """Equation (6.1) entry by entry."""
    table = torch.empty(tokens, width, dtype=F64)
    for i in range(tokens):
        for column in range(width):
            k = column // 2
            angle = turn * i * base ** (-slow * 2 * k / width)
            table[i, column] = math.sin(angle) if column % 2 == 0 else math.cos(angle)
    return table


# --- 6.3 ------------------------------------------------------------------------------------------------------


def check_clip_and_noise(
    function: Callable[[dict[str, Tensor], float, float, torch.Generator], dict[str, Tensor]],
) -> Feedback:
    """Exercise 6.3: ``function(gradients, norm, multiplier, generator)`` clips all together, then
    adds noise.
    """

    def check() -> str:
        gradients = {"a": _random(3, 4, seed=1), "b": 2 * _random(7, seed=2)}
        total = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        generator = torch.Generator().manual_seed(0)
        # Without noise first: the clipping alone.
        for norm in (2 * total, total / 8):
            answer = _gradients(
                function({k: g.clone() for k, g in gradients.items()}, norm, 0.0, generator), gradients
            )
            factor = min(1.0, norm / total)
            for name, g in gradients.items():
                alone = min(1.0, norm / float(g.norm()))
                expect_close(
                    answer[name],
                    factor * g,
                    f"{name}, clipped to {'more than' if factor == 1 else 'an eighth of'} the norm",
                    mistakes={
                        "It was scaled up: an update below the norm stays as it is.": g * norm / total,
                        "Every tensor was clipped by itself; the norm is that of all of them together.": alone * g,
                        "Entries were cut one by one: that changes the direction.": g.clamp(-norm, norm),
                        "It was not clipped.": g,
                        "It is divided by the norm that was measured, but not multiplied by the one allowed.": g
                        / total,
                    },
                )
        _check_noise(function)
        return "Right: bounded first, then noise in proportion to the bound. The order is the whole point."

    return run(check)


def _check_noise(function: Callable[..., dict[str, Tensor]]) -> None:
    """Noise alone, on gradients that are zero: deviation multiplier · norm, independent entries."""
    zeros = {"a": torch.zeros(60, 60, dtype=F64), "b": torch.zeros(60, 60, dtype=F64)}
    norm, multiplier = 0.5, 3.0
    answer = _gradients(function(zeros, norm, multiplier, torch.Generator().manual_seed(1)), zeros)
    noise = torch.stack([answer["a"].flatten(), answer["b"].flatten()])
    if not noise.any():
        stop("No noise was added to an update that is zero.")
    if torch.equal(noise[0], noise[1]):
        stop("Both tensors got the same noise: draw anew for each, from the one generator.")
    if float((noise == noise[:, :1]).double().mean()) > 0.5:
        stop("Every entry of a tensor got the same noise: draw one number for each entry.")
    if abs(float(noise.mean())) > 0.2 * float(noise.std()):
        stop("The noise has a mean that is not zero: torch.randn, not torch.rand.")
    ratio = float(noise.std()) / (multiplier * norm)
    if abs(ratio - 1 / norm) < 0.05 / norm:
        stop(
            "The noise has the deviation `multiplier`; it is multiplier · norm: noise is measured against the bound."
        )
    if abs(ratio - 1 / multiplier) < 0.05 / multiplier:
        stop("The noise has the deviation `norm`; the multiplier is missing.")
    if abs(ratio - 1) > 0.05:
        stop(f"The noise has {ratio:.3g} times the deviation that is asked, multiplier · norm.")
    again = _gradients(function(zeros, norm, multiplier, torch.Generator().manual_seed(1)), zeros)
    if not torch.equal(again["a"], answer["a"]):
        stop("The same generator state gave other noise: draw from the generator that comes in, not the global one.")
    # Large gradients: the noise must not be clipped away with them.
    large = {"a": torch.full((60, 60), 100.0, dtype=F64), "b": torch.zeros(60, 60, dtype=F64)}
    answer = _gradients(function(large, norm, multiplier, torch.Generator().manual_seed(2)), large)
    if float(answer["b"].std()) < 0.5 * multiplier * norm:
        stop("The noise is too small where gradients are large: was it added before clipping?")
    if float(answer["b"].std()) > 2 * multiplier * norm:
        stop("The noise grows with the gradient: it should be measured against `norm`, which is public.")


def _gradients(answer: Any, like: dict[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(answer, dict) or answer.keys() != like.keys():
        stop(f"Return a dict of tensors with the same names, {', '.join(like)}.")
    return {name: expect_tensor(answer[name], tuple(g.shape), name) for name, g in like.items()}


# --- 6.4 ------------------------------------------------------------------------------------------------------


def check_paired_interval(function: Callable[[Sequence[float], Sequence[float]], tuple[float, float]]) -> Feedback:
    """Exercise 6.4: ``function(a, b)`` is the mean of a − b and half the width of its 95 %
    interval.
    """

    def check() -> str:
        mean, half = _pair(function([0.9, 0.8, 0.7], [0.8, 0.7, 0.6]))
        if abs(mean + 0.1) < 1e-9:
            stop("The mean has the wrong sign: it is a − b.")
        if abs(mean - 0.1) > 1e-9:
            stop(f"Three differences of 0.1 have the mean 0.1, not {mean:.4g}.")
        if not half < 1e-9:
            stop(
                f"Where every seed shows the same difference the interval has no width; yours has ±{half:.3g}. "
                "Is it taken from the differences, seed by seed, or from each list by itself?"
            )
        for count, seed in ((5, 1), (3, 2), (12, 3)):
            a, b = _random(count, seed=seed), _random(count, seed=seed + 10)
            gaps = a - b
            mean, half = _pair(function(a.tolist(), b.tolist()))
            if abs(mean + float(gaps.mean())) < 1e-9:
                stop("The mean has the wrong sign: it is a − b.")
            if abs(mean - float(gaps.mean())) > 1e-9:
                stop(f"The mean of a − b is {float(gaps.mean()):.4g} here, not {mean:.4g}.")
            error = float(gaps.std()) / count**0.5
            t = _T[count]
            unpaired = t * float((a.var() + b.var()) / count) ** 0.5
            mistakes = {
                "That is the normal distribution's 1.96; with so few seeds use Student's t.": 1.96 * error,
                "It is not divided by √n: that is the spread of one seed, not of the mean.": t * error * count**0.5,
                "It is the standard error; multiply by Student's t.": error,
                "The variance is divided by n; an estimate from n values divides by n − 1.": t
                * error
                * ((count - 1) / count) ** 0.5,
                "That is the whole width; return half of it.": 2 * t * error,
                "The seeds are not paired: take the differences first.": unpaired,
                "Student's t has n − 1 degrees of freedom here, not n.": _T_WRONG[count] * error,
                "That is the quantile 0.95, which leaves 10 % outside; both tails together get 5 %.": _T_ONE[count]
                * error,
            }
            for message, value in mistakes.items():
                if abs(half - value) < 1e-4 * value:
                    stop(f"Half the width is not right yet. {message}")
            if abs(half - t * error) > 1e-4 * t * error:
                stop(f"Half the width is {t * error:.4g} here, not {half:.4g}.")
        return "Right. An interval that excludes zero is worth more than five pairs of numbers."

    return run(check)


#: Student's t: quantile 0.975 with n − 1 and with n degrees of freedom, quantile 0.95 with n − 1;
#: by n
_T = {3: 4.3026527, 5: 2.7764451, 12: 2.2009852}
_T_WRONG = {3: 3.1824463, 5: 2.5705818, 12: 2.1788128}
_T_ONE = {3: 2.9199856, 5: 2.1318468, 12: 1.7958848}


def _pair(answer: Any) -> tuple[float, float]:
    if not (isinstance(answer, tuple | list) and len(answer) == 2):
        stop(f"Return two numbers, (mean, half width), not {type(answer).__name__}.")
    for part, what in zip(answer, ("mean", "half width"), strict=True):
        if not hasattr(part, "__float__"):
            stop(f"Return two numbers, (mean, half width): the {what} is a {type(part).__name__}.")
    return float(answer[0]), float(answer[1])


# --- 6.5 ------------------------------------------------------------------------------------------------------


def check_average(function: Callable[[list[ClientUpdate]], ClientUpdate]) -> Feedback:
    """Exercise 6.5: ``function(updates)`` is one update, the mean of many of the same image, in
    float64.
    """

    def check() -> str:
        made = [ClientUpdate({"a": torch.tensor([float(i**2), 2.0], dtype=F64)}, batch_size=1) for i in range(4)]
        answer = _update(function(list(made)))
        if answer.keys() != {"a"}:
            stop(f"The mean should have the updates' names, ['a'], not {sorted(answer)}.")
        expect_close(
            expect_tensor(answer["a"], (2,), "The mean"),
            torch.tensor([3.5, 2.0], dtype=F64),
            "The mean",
            mistakes={
                "It is the sum: divide by the number of updates.": torch.tensor([14.0, 8.0], dtype=F64),
                "It is the first update alone.": torch.tensor([0.0, 2.0], dtype=F64),
                "It is the last update alone.": torch.tensor([9.0, 2.0], dtype=F64),
                "It is the lower median.": torch.tensor([1.0, 2.0], dtype=F64),
                "The last update is missing.": torch.tensor([5 / 3, 2.0], dtype=F64),
            },
        )
        # 1 + 1/256 is no bfloat16 number; the mean of 1 and 1 + 2/256 is, in float64.
        coarse = [ClientUpdate({"a": torch.tensor([v], dtype=torch.bfloat16)}) for v in (1.0, 1.0078125)]
        mean = _update(function(coarse))["a"]
        if mean.dtype != F64 or float(mean) != 1.00390625:
            stop(
                f"The mean of coarse updates is finer than they are: average in float64 (yours is {mean.dtype}, "
                f"{float(mean):.8g} where 1.00390625 is asked)."
            )
        _attack_with(function)
        return "Right: the noise fell with the square root of the rounds, and the picture came out of it."

    return run(check)


def _update(answer: Any) -> dict[str, Tensor]:
    if not isinstance(answer, ClientUpdate):
        stop(f"Return an al.ClientUpdate with the mean gradients, not a {type(answer).__name__}.")
    return dict(answer.gradients)


def _attack_with(function: Callable[[list[ClientUpdate]], ClientUpdate]) -> None:
    """Thirty-two noisy updates of one picture: the attack on their mean must gain what √32 gives,
    about 15 dB.
    """
    model = _vit(size=16, width=64)
    pixels = load_victim("astronaut", 16, dtype=F64)[None]
    clean = client_update(model, HALF.to_input(pixels), torch.tensor([1]))
    generator = torch.Generator().manual_seed(0)
    noisy = [
        ClientUpdate(
            {k: g + 1e-5 * torch.randn(g.shape, generator=generator, dtype=F64) for k, g in clean.gradients.items()},
            batch_size=1,
        )
        for _ in range(32)
    ]
    one = float(psnr(embedding_closed_form(model, noisy[0]).pixels, pixels))
    mean = float(psnr(embedding_closed_form(model, function(noisy)).pixels, pixels))
    if mean < one + 8:
        stop(
            f"The attack on the mean of 32 updates reaches {mean:.1f} dB, on one {one:.1f}: √32 should give 15 more."
        )
