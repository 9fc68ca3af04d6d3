"""The span attack: patches from the span of the first attention's gradient alone.

The gradients of W_Q, W_K, W_V are sums over tokens of (something) u_iᵀ, with u_i the token as the
attention reads it: their rows D lie in span{u_0 … u_n}, and wherever that span is smaller than the
width, it is known from D. In architecture B, u_i = γ ∘ (C z_i)/σ_i + β with C = I − 11ᵀ/d, so C z_i
lies in the span of the rows of D/γ and of β/γ:

    C (W_e x_i + b_e + E_i) = (D/γ)ᵀ c_i (+ t β/γ)        for some coefficients c_i.

In architecture A the same holds without C, γ and β; token_equations.py has this and other norms.
Likewise x_i = (∂l/∂W_e)ᵀ c'_i, for the patch
embedding reads the patches. W_e, b_e and E_i are known to the server, so both are linear in the
pixels of patch i alone. Chapter 07 derives it. We know of no publication that attacks a ViT this
way; the nearest are DAGER (Petrov et al., NeurIPS 2024, arXiv 2405.15586) and TIGER (arXiv
2606.18312), both for text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, dissect, tensors_of
from ...preprocessing import Preprocessing
from ...update import ClientUpdate, Updates, only_one
from ..evidence import System, one_image
from ..labels import check_known, check_told, labels_or_none
from ..reading import Reading, read_update
from ..replay import Loss
from ..result import AttackNotApplicable, Condition, Reconstruction, State, margin, predicted_psnr, report, shown_if
from ..rounds import read_rounds
from ..verify import verified
from .inputs import pixel_variance, shared_gradients
from .linear_algebra import numerical_rank
from .noisy_span import noisy_span
from .probe import places_of, tokens_as_read
from .smallest import smallest_combination
from .span_solution import SpanSolution
from .token_equations import TokenEquations, token_equations

NEEDS = ("query", "key", "value")

# Measured on 2 430 attacks (data/results/conditioning.csv): near the verdict, the error predicted
# from the minimum of the least squares was too small by at most this; by 7.8 dB once in 77 pictures
# of data/results/fuzz.csv.
_MARGIN_DB = 7.0
READABLE = ("april", "postnorm", "prenorm", "two norms", "rmsnorm")
_CLEARLY = 1e3  # times the noise: tables of 2-D sinusoids lie below, learned ones at 10⁵ and more in float32
_LEAST_GAP = 2.0  # of the last token over the noise: below it they cannot be told apart


def width_needed(
    patches: int, pixels_per_patch: int, prefix: int, norms: int, *, batch_size: int = 1, by_rows: bool = True
) -> int:
    """The least width d that the count (7.6) allows: ``norms`` is 1 for a LayerNorm before the attention, 2 for two.

    In a batch (B − 1)·n directions stay open at any width: the differences of its images at each
    place. Without the patch embedding's gradient (``by_rows=False``) all p pixels are unknown.

    >>> width_needed(196, 768, 1, True)  # ViT-B/16 at 224
    394
    >>> width_needed(196, 768, 1, True, by_rows=False)
    966
    """
    tokens = batch_size * patches + prefix
    unknowns = min(pixels_per_patch, batch_size * patches) if by_rows else pixels_per_patch
    return unknowns + tokens + int(norms) - (batch_size - 1) * patches


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

    Needs the gradients of the first attention's projections, the position embedding's *values*
    (public: it is part of the model), one image, and enough width: min(p, n) + tokens (+ 1 for the
    LayerNorm's mean) ≤ d, features with γ = 0 not counted; p + tokens + 1 where the patch
    embedding's gradient is not shared, because its rows then tell nothing of the patches. The E_i
    + b_e must be independent modulo the image of W_e, to the gradient's precision; sinusoids are
    not, in float32.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate
    strict : bool
        Refuse where the width does not suffice; False returns the smallest solution, marked not
        exact.
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
        of D), ``gap`` (the last token's singular value over the largest of the noise).

    Raises
    ------
    AttackNotApplicable
        If a gradient is not shared, the first block is unknown, there is no position embedding, or
        the width does not suffice.
    UpdateError
        If the update does not belong to the model.
    """
    start = time.perf_counter()
    check_told(anatomy, preprocessing, loss)
    anatomy = anatomy or dissect(model)
    preprocessing = preprocessing or anatomy.preprocessing
    reading = (rounds := read_rounds(model, only_one("span_closed_form", update), anatomy))[0].reading
    check_known(labels, reading.update, anatomy, model)
    solution = solve_span(model, reading, anatomy=anatomy, strict=strict, device=device)
    error = min(solution.mean_square_error, pixel_variance(preprocessing))
    predicted = predicted_psnr(error, preprocessing)
    conditions = _conditions(solution, reading, anatomy, predicted)
    result = report(
        "span_closed_form",
        solution.images,
        conditions=(*conditions, tokens_as_read(model, anatomy, tensors_of(model))),
        predicted_psnr=predicted,
        labels=labels_or_none(model, reading.update, anatomy, labels),
        numbers={**solution.numbers, "noise": reading.noise, "decay": reading.decay},
        dtype=reading.update.dtype,
        preprocessing=preprocessing,
        start=start,
    )
    return verified(result, model, rounds, anatomy, preprocessing=preprocessing, loss=loss, verify=verify)


def _conditions(
    solution: SpanSolution, reading: Reading, anatomy: Anatomy, predicted: float
) -> tuple[Condition, ...]:
    """What the span attack rests on, but for the tokens' way to the attention."""
    span, numbers = solution.token_side, solution.numbers
    spare = int(numbers["width_of_rows"]) - span.tokens
    # Only where every token is seen does nothing beyond them mean that there is no second image.
    seen = span.gap > _LEAST_GAP
    system = System("the span", span.excess, spare, spare + span.tokens, numbers["noise_gain"]) if seen else None
    return (
        Condition(
            "enough width", shown_if(solution.width_needed <= solution.usable_width),
            {"needed": solution.width_needed, "usable": solution.usable_width}, "{needed} needed of {usable}",
        ),
        one_image(anatomy, reading.update, system=system, noise=reading.noise),
        Condition(
            "tokens stand out from the noise", shown_if(seen), {"gap": span.gap},
            "the weakest token's singular value is {gap:.1f} times the strongest of the noise",
        ),
        _places(numbers),
        margin(predicted, _MARGIN_DB),
    )  # fmt: skip


def solve_span(
    model: nn.Module,
    update: ClientUpdate | Reading,
    *,
    anatomy: Anatomy,
    batch_size: int = 1,
    strict: bool = True,
    device: torch.device | str | None = None,
) -> SpanSolution:
    """The linear algebra of the span attack, for one image or for a batch.

    With B images the span has the B·n + 1 directions of all their tokens, and a patch is known up
    to combinations of the differences between the images at each place: (B − 1)·n directions of p
    are open, and the rest is known and the same for all images of the batch but for these.

    Raises
    ------
    AttackNotApplicable
        As :func:`span_closed_form`.
    """
    reading = update if isinstance(update, Reading) else read_update(model, update, anatomy)
    shared = _check(reading.update, anatomy, device)
    weights = {key: tensor.to(device) for key, tensor in tensors_of(model).items()}
    equations = equations_of(shared, anatomy, weights)
    _refuse_one_place(equations.e)
    dW = _patch_rows(reading.update, anatomy, equations.D)
    (d, p), n = weights[anatomy.patch_weight].flatten(1).shape, equations.e.shape[1]
    tokens = batch_size * n + anatomy.position_prefix + extra_prefix(anatomy, weights)
    # Is the model wide enough for one solution? (7.6)
    norms = directions_lost(anatomy, weights)
    needed = width_needed(n, p, tokens - batch_size * n, norms, batch_size=batch_size, by_rows=dW is not None)
    if strict and needed > equations.usable:
        _refuse_width(needed, equations, tokens, p if dW is None else min(p, batch_size * n), norms)
    # What tokens and patches cost as combinations of the gradient's rows, and the smallest of them,
    # (7.7).
    token_side = noisy_span(equations.D, tokens, reading.noise)
    pixel_side = None if dW is None else noisy_span(dW, batch_size * n, reading.noise)
    solution, variance, ratio = smallest_combination(equations, token_side, pixel_side)
    return SpanSolution(
        patches=solution.patches,
        root=solution.root,
        variance=variance,
        tiling=anatomy.tiling,
        token_side=token_side,
        width_needed=needed,
        usable_width=equations.usable,
        numbers={
            "patches": n,
            "tokens": tokens,
            "width": d,
            "usable_width": equations.usable,
            "width_needed": needed,
            "pixels_per_patch": p,
            "tokens_above_noise": token_side.above_noise,
            "gap": token_side.gap,
            "outside": token_side.excess,
            "width_of_rows": equations.D.shape[1],
            **_directions_of_places(equations.e, reading.noise),
            "noise_gain": _noise_gain(equations.D, tokens),
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


# --- Check ----------------------------------------------------------------------------------------


def _refuse_one_place(e: Tensor) -> None:
    """A position embedding that is still zero, say, tells no patch from another."""
    apart = e - e.mean(1, keepdim=True)
    if float(apart.norm()) <= torch.finfo(torch.float64).eps * len(e) * float(e.norm()):
        raise AttackNotApplicable(
            "span_closed_form",
            "the position embedding is the same at every patch (zero as initialized?): every patch obeys the same "
            "equations, and nothing tells the patches apart",
        )


def _patch_rows(update: ClientUpdate, anatomy: Anatomy, like: Tensor) -> Tensor | None:
    """∂l/∂W_e (d, p); None where it is not shared, or says nothing: the tokens do without."""
    shared = update.gradients.get(anatomy.patch_weight)
    return None if shared is None or not shared.any() else shared.to(like).flatten(1)


def _noise_gain(D: Tensor, tokens: int) -> float:
    """By how much noise, relative to an entry's r.m.s., is larger outside the tokens in rows of length 1."""
    squares = D.square().sum(1)
    squares = squares[squares > 0]
    entry = float(squares.sum()) / D.numel()
    return max(D.shape[1] - tokens, 0) ** 0.5 * (entry * float((1 / squares).mean())) ** 0.5


def _check(update: ClientUpdate, anatomy: Anatomy, device: torch.device | str | None) -> dict[str, Tensor]:
    """The gradients that the span needs, or a refusal."""
    name = "span_closed_form"
    if anatomy.first_block not in READABLE:
        raise AttackNotApplicable(
            name,
            "what stands before the first attention is neither nothing (architecture A) nor one or two norms "
            f'(architecture B): first_block="{anatomy.first_block}"',
        )
    if anatomy.position is None:
        raise AttackNotApplicable(
            name,
            "without a position embedding every patch obeys the same equations: nothing tells the patches apart, and "
            "x = 0 solves them all when there is no bias",
        )
    shared = shared_gradients(name, update, anatomy, NEEDS, device=device)
    if not any(shared[part].any() for part in NEEDS):
        raise AttackNotApplicable(name, "the first attention's gradient is zero: the head passes nothing down")
    return shared


def equations_of(shared: Mapping[str, Tensor], anatomy: Anatomy, weights: Mapping[str, Tensor]) -> TokenEquations:
    """The token equations of a model: its values of W_e, b_e + E_i, γ and β put in."""
    W_e = weights[anatomy.patch_weight].double().flatten(1)  # (d, p)
    places = places_of(anatomy, weights)  # (n, d)
    D = torch.cat([shared[part] for part in ("query", "key", "value")])  # (3d, d)
    if anatomy.first_block in ("april", "postnorm"):
        return token_equations(D, W_e, places)

    def norm(weight: str | None, bias: str | None) -> tuple[Tensor, Tensor | None]:
        gamma = weights[weight].double() if weight else torch.ones_like(W_e[:, 0])
        return gamma, weights[bias].double() if bias else None

    gamma, beta = norm(anatomy.norm_weight, anatomy.norm_bias)
    if anatomy.first_block == "two norms":
        before = norm(anatomy.embedding_norm_weight, anatomy.embedding_norm_bias)
        return token_equations(D, W_e, places, gamma, beta, before=before)
    return token_equations(D, W_e, places, gamma, beta, centred=anatomy.first_block != "rmsnorm")


def directions_lost(anatomy: Anatomy, weights: Mapping[str, Tensor]) -> int:
    """Directions of the width that the norms take, besides the tokens': the mean's, and C β₁."""
    if anatomy.first_block != "two norms":
        return int(anatomy.first_block == "prenorm")
    return 1 + int(anatomy.embedding_norm_bias is not None and bool(weights[anatomy.embedding_norm_bias].any()))


def extra_prefix(anatomy: Anatomy, weights: Mapping[str, Tensor]) -> int:
    """Tokens before the patches that have no position of their own (timm's ``no_embed_class``)."""
    prefix = sum(weights[token].numel() // weights[token].shape[-1] for token in anatomy.prefix)
    return max(prefix - anatomy.position_prefix, 0)


def _refuse_width(needed: int, equations: TokenEquations, tokens: int, unknowns: int, norms: int) -> None:
    usable, width = equations.usable, len(equations.A)
    raise AttackNotApplicable(
        "span_closed_form",
        f"min(p, n) + tokens{f' + {norms}' if norms else ''} = {needed} > {usable} = d: "
        f"the span of {tokens} tokens leaves {width - tokens} equations for {unknowns} unknowns a patch",
        width_needed=needed,
        width=usable,
    )
