"""Which rounds of the span attack are of one picture: what they leave together, and what
without one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...anatomy import Anatomy
from ..rounds import Agreement, Left, RoundRead, agreeing, not_checked, without_one
from .noisy_span import NoisySpan, residuals_by_row
from .smallest import smallest_combination
from .span_rounds import Group, SpanRound, grouped, pixel_span
from .span_width import NAME, directions_lost, extra_prefix, usable_width, width_needed

# Times the format's ε. Measured at 32×32, d = 80 to 384, float32: outside one span rounds of one
# picture leave up to 1.1, and with adapters' rows of another one 240 and more; of several states'
# tokens up to 140, and 3 000 and more.
_ROUNDING, _OF_STATES = 10.0, 1e3
_MUCH_BETTER = 0.03  # of the residual: noise alone does not shrink so by a few rounds less
_LEFT_OUT = 4  # rounds, in search of a better agreement


def agreed_rounds(
    rounds: Sequence[SpanRound], anatomy: Anatomy, weights: Mapping[str, Tensor], device: torch.device | str | None
) -> Agreement:
    """Which rounds show one picture.

    Rounds of one state of the model must have one span. Rounds of several states must have one
    solution: each patch's token must be a small combination of each state's rows. Adapters' rows
    are few, and the weakest tokens in them small: another picture's rows push these out of the span
    and leave no more than noise might. So where some rounds agree much better without the others,
    what they leave counts as the noise.

    Parameters
    ----------
    rounds : sequence of SpanRound
    anatomy : Anatomy
    weights : tensors of the model, for their shapes
    device : where to solve

    Raises
    ------
    AttackNotApplicable
        As :func:`~aprillab.attacks.rounds.agreeing`.
    """
    by_number = {one.read.number: one for one in rounds}
    n, p = anatomy.tiling.count, weights[anatomy.patch_weight][0].numel()
    tokens, lost = n + anatomy.position_prefix + extra_prefix(anatomy, weights), directions_lost(anatomy, weights)
    spans: dict[tuple[int, ...], NoisySpan] = {}
    several = len(rounds) > 1 and len(grouped(rounds, anatomy, tokens, device)) > 1

    def left(some: Sequence[RoundRead]) -> Left:
        own = [by_number[read.number] for read in some]
        groups = grouped(own, anatomy, tokens, device)
        found = left_by_spans(own, groups)
        if not several:
            return found
        by_rows = any(one.dW is not None for one in own)
        needed = width_needed(n, p, tokens - n, lost, by_rows=by_rows)
        usable = usable_width([group.equations for group in groups], tokens + lost)
        if len(groups) == 1:  # is it of one picture by itself? A state too narrow for one cannot say
            return Left(found.residuals, found.gains, min(found.spare, usable - needed + 1))
        misses = _misses(own, groups, spans, n)
        residuals = tuple(map(max, found.residuals, misses))
        return Left(residuals, found.gains, min(found.spare, usable - needed))

    read = [one.read for one in rounds]
    limit = _limit_by_the_best(read, left, several) if len(read) > 1 else None
    if limit is None and several and (most := max(left(read).residuals)) >= _rounding(read, several):
        # What ill-conditioned systems leave of one picture, others leave of two.
        return not_checked(read, f"the rounds' systems together leave {most:.1e}, and no fewer do better")
    if limit is None:
        return agreeing(NAME, read, left if not several else lambda some: _whatever_they_miss(left(some), some))

    def strictly(some: Sequence[RoundRead]) -> Left:
        found = left(some)
        noise = limit / 1e3 if limit < 1e-4 else limit / 10  # so that limit_of() says this limit
        return Left(found.residuals, tuple(noise / one.reading.noise for one in some), found.spare)

    return agreeing(NAME, read, strictly)


def left_by_spans(rounds: Sequence[SpanRound], groups: Sequence[Group]) -> Left:
    """What the spans of the tokens leave of each round's rows, those of one state taken together."""
    residuals, gains, spare = dict[int, float](), dict[int, float](), 0
    for group in groups:
        D = group.equations.D
        outside = group.by_round(residuals_by_row(D, group.tokens, group.coarser))
        for one, left, gain in zip(group.rounds, outside, group.gains(), strict=True):
            residuals[one.read.number] = float(left.square().mean().sqrt())
            gains[one.read.number] = gain
        spare += max(min(D.shape) - group.tokens, 0)
    numbers = [one.read.number for one in rounds]
    return Left(tuple(residuals[n] for n in numbers), tuple(gains[n] for n in numbers), spare)


def _misses(
    rounds: Sequence[SpanRound], groups: Sequence[Group], spans: dict[tuple[int, ...], NoisySpan], patches: int
) -> list[float]:
    """By how much noise can put off the tokens of the solution of all states, in each
    round's state, relative.

    It is large where they are no small combination of that state's rows.
    """
    for group in groups:
        key = tuple(one.read.number for one in group.rounds)
        spans[key] = spans.get(key) or group.span()
    sides = [(group.equations, spans[tuple(one.read.number for one in group.rounds)]) for group in groups]
    X = smallest_combination(sides, pixel_span(rounds, groups, patches))[0].patches
    found: dict[int, float] = {}
    for group, (equations, span) in zip(groups, sides, strict=True):
        tokens = equations.A @ X + equations.e
        miss = float((span.coefficients(tokens).square().sum(0).mean() / tokens.square().mean()).sqrt())
        found |= {one.read.number: miss for one in group.rounds}
    return [found[one.read.number] for one in rounds]


def _limit_by_the_best(
    read: Sequence[RoundRead], left: Callable[[Sequence[RoundRead]], Left], several: bool
) -> float | None:
    """A limit for the residuals, where leaving out a few rounds shrinks them as noise alone does
    not.
    """
    kept, full = list(read), left(read)
    now_left = full
    most = max(full.residuals)
    if full.spare <= 0 or most < _rounding(read, several) or (full.excess(read) > 1 and not several):
        return None
    for _ in range(min(_LEFT_OUT, len(read) - 1)):
        fewer = without_one(kept, now_left)
        tried = [left(some) for some in fewer]
        best = min(range(len(fewer)), key=lambda i: max(tried[i].residuals))
        kept, now_left = fewer[best], tried[best]
        if tried[best].spare <= 0:
            return None
        if (now := max(tried[best].residuals)) < _MUCH_BETTER * most:
            return now / _MUCH_BETTER**0.5
    return None


def _rounding(read: Sequence[RoundRead], several: bool) -> float:
    """What rounding may leave of rounds of one picture."""
    eps = max(torch.finfo(one.reading.update.dtype).eps for one in read)
    return (_OF_STATES if several else _ROUNDING) * eps


def _whatever_they_miss(left: Left, some: Sequence[RoundRead]) -> Left:
    """Of several states the same, with no limit: nothing agrees better than all of them."""
    return Left(
        left.residuals, tuple(max(g, 1 / r.reading.noise) for g, r in zip(left.gains, some, strict=True)), left.spare
    )
