"""The span attack: patches from the span of the first attention's gradient alone.

The gradients of W_Q, W_K, W_V are sums over tokens of (something) u_iᵀ, with u_i the token as the
attention reads it: their rows D lie in span{u_0 … u_n}, and wherever that span is smaller than the
width, it is known from D. In architecture B, u_i = γ ∘ (Π z_i)/σ_i + β with Π = I − 11ᵀ/d, so Π z_i
lies in the span of the rows of D/γ and of β/γ:

    Π (W_e x_i + b_e + E_i) = (D/γ)ᵀ c_i (+ t β/γ)        for some coefficients c_i.

In architecture A the same holds without Π, γ and β; token_equations.py has this and other norms.
Likewise x_i = (∂l/∂W_e)ᵀ c'_i, for the patch
embedding reads the patches. W_e, b_e and E_i are known to the server, so both are linear in the
pixels of patch i alone. Chapter 07 derives it. We know of no publication that attacks a ViT this
way; the nearest are DAGER (Petrov et al., NeurIPS 2024, arXiv 2405.15586) and TIGER (arXiv
2606.18312), both for text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, dissect
from ...metrics import EXACT_TO_8_BITS_DB
from ...preprocessing import Preprocessing
from ...update import Updates
from ..evidence import System, one_image
from ..labels import check_known, check_told, labels_or_none
from ..reading import Reading
from ..replay import Loss
from ..result import Condition, Reconstruction, State, margin, predicted_psnr, report, shown_if
from ..rounds import SENT_WEIGHTS, RoundRead, read_rounds
from ..verify import verified
from .inputs import pixel_variance
from .linear_algebra import numerical_rank
from .probe import adapters_as_read, tokens_as_read
from .second_norm import second_look
from .smallest import smallest_combination
from .span_agreement import agreed_rounds
from .span_rounds import (
    NEEDS,
    Group,
    SpanRound,
    check_model,
    grouped,
    pixel_span,
    refuse_one_place,
    refuse_rows,
    rows_of,
    seen_as_a_whole,
    with_rows,
)
from .span_solution import SpanSolution
from .span_width import NAME, directions_lost, extra_prefix, refuse_width, usable_width, width_needed

__all__ = ["NEEDS", "solve_span", "span_closed_form", "width_needed"]

# Measured on 2 430 attacks (data/results/conditioning.csv): near the verdict, the error predicted
# from the minimum of the least squares was too small by at most this; by 7.8 dB once in 77 pictures
# of data/results/fuzz.csv.
_MARGIN_DB = 7.0
_CLEARLY = 1e3  # times the noise: tables of 2-D sinusoids lie below, learned ones at 10⁵ and more in float32
_BEYOND_DOUBT = EXACT_TO_8_BITS_DB + _MARGIN_DB  # predicted: no second look is needed
_LEAST_GAP = 2.0  # of the last token over the noise: below it they cannot be told apart


# --- The attack -----------------------------------------------------------------------------------


def span_closed_form(
    model: nn.Module,
    update: Updates,
    *,
    strict: bool = True,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    labels: Tensor | None = None,
    loss: Loss | None = None,
    verify: bool = True,
    device: torch.device | str | None = None,
) -> Reconstruction:
    """Find, patch by patch, the pixels whose token is the smallest combination of the rows.

    In exact arithmetic the span is a subspace and the pixels are the one solution in it. In finite
    precision D is a noisy matrix, and a token that needs large coefficients c_i carries an error as
    large; so the attack minimizes ‖c_i‖² + r² ‖c'_i‖² over the pixels, one least-squares problem
    with the same matrix for all patches. Rows of D are first scaled to equal noise, which the
    singular vectors beyond the tokens' number measure.

    Needs a gradient of the first attention, the position embedding's *values* (public: it is part
    of the model), one image, and enough width: min(p, n) + tokens (+ 1 for the
    LayerNorm's mean) ≤ d, features with γ = 0 not counted; p + tokens + 1 where the patch
    embedding's gradient is not shared, because its rows then tell nothing of the patches. The E_i
    + b_e must be independent modulo the image of W_e, to the gradient's precision; sinusoids are
    not, in float32.

    The gradient is that of W_Q, W_K or W_V, as many as are shared, or of LoRA's factors A
    beside them: these have few rows, and as many rounds are needed as it takes to have a row
    for each token. Class token and registers are public, and with few rows, or the keys'
    alone, theirs count.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate, Round, or a sequence of these
        Several rounds of one client and one picture. While the embedding and the norms are frozen,
        their rows are of one D; else each state of the model has its own D, and the costs add up.
    strict : bool
        Refuse where the width or the number of rows does not suffice; False returns the smallest
        solution, marked not exact.
    anatomy : Anatomy, optional; default is ``dissect(model)``
    preprocessing : Preprocessing, optional; default is the model family's own
    labels : int64 Tensor of shape (1,), optional; if the attacker knows the label
    loss, verify
        As in :func:`~aprillab.attacks.verify.verified`.
    device : where to solve; default is where the update lies

    Returns
    -------
    Reconstruction
        With ``diagnostics``: ``tokens``, ``width_needed``, ``tokens_above_noise`` (numerical rank
        of D), ``gap`` (the last token's singular value over the largest of the noise), ``rows`` of
        D and ``rows_of``, what gradients they are of, ``public_rows`` among them, ``groups``
        (states of the model); of several rounds, ``rounds``: which were used, and their noise.

    Raises
    ------
    AttackNotApplicable
        If no such gradient is shared or all are zero, the first block is unknown, there is no
        position embedding, the width or the rows do not suffice, rounds are of different pictures,
        or the values of what is trained below the attention are not known in some round.
    UpdateError
        If the update does not belong to the model.
    """
    start = time.perf_counter()
    check_told(anatomy, preprocessing, loss)
    anatomy = anatomy or dissect(model)
    preprocessing = preprocessing or anatomy.preprocessing
    check_model(anatomy)
    rounds = read_rounds(model, update, anatomy)
    check_known(labels, rounds[0].reading.update, anatomy, model)
    some, remark = with_rows([rows_of(one, anatomy, device) for one in rounds])
    agreed = agreed_rounds(some, anatomy, rounds[0].weights, device)
    reading = agreed.kept[0].reading
    some = [one for one in some if one.read in agreed.kept]
    solution = solve_rounds(some, anatomy=anatomy, strict=strict, device=device, remark=remark)
    predicted = predicted_psnr(min(solution.mean_square_error, pixel_variance(preprocessing)), preprocessing)
    if solution.numbers["ratio"] == 0 and predicted < _BEYOND_DOUBT and len(agreed.kept) == 1:
        client = agreed.kept[0].model(model)
        solution = second_look(client, reading, solution, anatomy, preprocessing)
    one = _one_image(solution, reading, anatomy)
    result = report(
        NAME,
        solution.images,
        conditions=(
            *_conditions(solution, one, predicted, remark),
            *_later_steps(agreed.kept),
            *agreed.conditions,
            *_as_read(model, agreed.kept[0], anatomy, solution),
        ),
        predicted_psnr=predicted,
        labels=labels_or_none(model, reading.update, anatomy, labels, one=one),
        numbers={
            **solution.numbers,
            "rows_of": solution.rows_of,
            **agreed.numbers,
            "noise": reading.noise,
            "decay": reading.decay,
        },
        dtype=reading.update.dtype,
        preprocessing=preprocessing,
        start=start,
    )
    return verified(result, model, agreed.kept, anatomy, preprocessing=preprocessing, loss=loss, verify=verify)


def _as_read(model: nn.Module, read: RoundRead, anatomy: Anatomy, solution: SpanSolution) -> tuple[Condition, ...]:
    """Whether tokens and adapters are given what the equations have, in one round's model."""
    client = read.model(model)
    tokens = tokens_as_read(client, anatomy, read.weights, public=solution.numbers["public_rows"] > 0)
    if not set(solution.rows_of) & set(anatomy.adapters):
        return (tokens,)
    return tokens, adapters_as_read(client, anatomy, read.weights)


def _later_steps(kept: Sequence[RoundRead]) -> tuple[Condition, ...]:
    """Where a client took several steps: all but the first read weights that had moved, and
    the equations do not.
    """
    steps = max(one.reading.update.local_steps for one in kept)
    if steps == 1:
        return ()
    words = "of {steps} local steps all but the first read other weights: the error may be larger"
    return (Condition(SENT_WEIGHTS, "not checked", {"steps": steps}, words, measured=False),)


def _one_image(solution: SpanSolution, reading: Reading, anatomy: Anatomy) -> Condition:
    """Whether one image's tokens are all that is in the span."""
    numbers = solution.numbers
    tokens, rows, width = (int(numbers[name]) for name in ("tokens", "rows", "width_of_rows"))
    # Only where every token is seen does nothing beyond them mean that there is no second image.
    seen, spare = solution.gap > _LEAST_GAP, min(rows, width) - tokens
    # Noise that were as much larger there as rows differ in size would be seen.
    gain = min(numbers["noise_gain"], max(solution.excess / numbers["noise_of_rows"], 1.0))
    system = System("the span", solution.excess, spare, spare + tokens, gain) if seen else None
    return one_image(anatomy, reading.update, system=system, noise=numbers["noise_of_rows"])


def _conditions(solution: SpanSolution, one: Condition, predicted: float, remark: str) -> tuple[Condition, ...]:
    """What the span attack rests on, but for the tokens' way to the attention."""
    return (
        Condition(
            "enough width", shown_if(solution.width_needed <= solution.usable_width),
            {"needed": solution.width_needed, "usable": solution.usable_width}, "{needed} needed of {usable}",
        ),
        one,
        _tokens_seen(solution, remark),
        _places(solution.numbers),
        margin(predicted, _MARGIN_DB),
    )  # fmt: skip


def _tokens_seen(solution: SpanSolution, remark: str) -> Condition:
    """Each token must have a row of its own, and a direction above the noise."""
    rows, tokens = int(solution.numbers["rows"]), int(solution.numbers["tokens"])
    words = "the weakest token's singular value is {gap:.1f} times the strongest of the noise"
    if rows <= tokens:
        words = "{rows:.0f} rows for {tokens:.0f} tokens leave nothing to see the noise by"
    words += f"; {remark}" if remark else ""
    numbers = {"gap": solution.gap, "rows": float(rows), "tokens": float(tokens)}
    return Condition("tokens stand out from the noise", shown_if(solution.gap > _LEAST_GAP), numbers, words)


def solve_span(
    model: nn.Module,
    update: Updates,
    *,
    anatomy: Anatomy,
    batch_size: int = 1,
    strict: bool = True,
    device: torch.device | str | None = None,
) -> SpanSolution:
    """The linear algebra of the span attack, for one image or for a batch, of one round or several.

    With B images the span has the B·n + 1 directions of all their tokens, and a patch is known up
    to combinations of the differences between the images at each place: (B − 1)·n directions of p
    are open, and the rest is known and the same for all images of the batch but for these.

    Raises
    ------
    AttackNotApplicable
        As :func:`span_closed_form`.
    """
    check_model(anatomy)
    rounds, empty = with_rows([rows_of(one, anatomy, device) for one in read_rounds(model, update, anatomy)])
    return solve_rounds(rounds, anatomy=anatomy, batch_size=batch_size, strict=strict, device=device, remark=empty)


def solve_rounds(
    rounds: Sequence[SpanRound],
    *,
    anatomy: Anatomy,
    batch_size: int = 1,
    strict: bool = True,
    device: torch.device | str | None = None,
    remark: str = "",
) -> SpanSolution:
    """As :func:`solve_span`, of rounds that have rows; with a remark for its refusal."""
    weights = rounds[0].read.weights
    p, n = weights[anatomy.patch_weight][0].numel(), anatomy.tiling.count
    tokens = batch_size * n + anatomy.position_prefix + extra_prefix(anatomy, weights)
    groups = seen_as_a_whole(grouped(rounds, anatomy, tokens, device))
    equations, e = [group.equations for group in groups], groups[0].equations.e
    refuse_one_place(e)
    by_rows = any(one.dW is not None for one in rounds)
    # Is the model wide enough for one solution? (7.6)
    norms = directions_lost(anatomy, weights)
    needed = width_needed(n, p, tokens - batch_size * n, norms, batch_size=batch_size, by_rows=by_rows)
    usable = usable_width(equations, tokens + norms)
    if strict:
        if needed > usable:
            unknowns = f"min(p, n) = {min(p, batch_size * n)}" if by_rows else f"p = {p}"
            refuse_width(needed, usable, tokens, unknowns, norms, len(groups))
        refuse_rows(groups, anatomy, remark)
    # What tokens and patches cost as combinations of the gradient's rows, and the smallest of them,
    # (7.7).
    sides, gains = [group.span() for group in groups], [group.gain for group in groups]
    noise = max(map(Group.noise_seen, groups, sides, gains))
    pixel_side = pixel_span(rounds, groups, batch_size * n)
    solution, variance, ratio = smallest_combination(list(zip(equations, sides, strict=True)), pixel_side)
    return SpanSolution(
        patches=solution.patches,
        root=solution.root,
        variance=variance,
        tiling=anatomy.tiling,
        token_sides=tuple(sides),
        width_needed=needed,
        usable_width=usable,
        rows_of=tuple(dict.fromkeys(part for one in rounds for part in one.rows)),
        numbers={
            "patches": n,
            "tokens": tokens,
            "width": len(weights[anatomy.patch_weight]),
            "usable_width": usable,
            "width_needed": needed,
            "pixels_per_patch": p,
            "rows": min(len(one.D) for one in equations),
            "public_rows": max(group.public for group in groups),
            "groups": len(groups),
            "tokens_above_noise": min(side.above_noise for side in sides),
            "gap": min(side.gap for side in sides),
            "outside": max(side.excess for side in sides),
            "width_of_rows": min(one.D.shape[1] for one in equations),
            **_directions_of_places(e, noise),
            "noise_of_rows": noise,
            "noise_gain": max(gains),
            "ratio": ratio,
        },
    )


def _directions_of_places(e: Tensor, noise: float) -> dict[str, float]:
    """How many directions the places e (w, n) span: at all, and clearly above the noise."""
    s = torch.linalg.svdvals(torch.linalg.qr(e, mode="r").R)
    return {"places": numerical_rank(s, noise), "places_clearly": numerical_rank(s, _CLEARLY * noise)}


def _places(numbers: Mapping[str, float]) -> Condition:
    """Each patch must stand at a place that the others' do not combine to: 2-D sinusoids' do."""
    n = numbers["patches"]
    state: State = "shown" if numbers["places_clearly"] == n else "not checked"
    return Condition(
        "places are independent", state if numbers["places"] == n else "contradicted",
        {name: int(numbers[name]) for name in ("patches", "places", "places_clearly")},
        "the positions of {patches} patches span {places} directions, {places_clearly} clearly above the noise",
    )  # fmt: skip
