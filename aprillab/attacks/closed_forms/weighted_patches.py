"""The patch-embedding system where each entry has an error of its own, as once Adam's step is undone,
or as a known defence leaves it (then ``uncertain_patches.py`` goes on where much is open).

    Gᵀ X = ∂l/∂W_e        with errors σ_W of the right side's entries, and σ_G of those of G.

They differ by orders of magnitude, so each equation counts by its own. In that of row j and pixel k
the error of G is carried by the pixels, and what is left of it has the variance

    s²_jk = σ_W[j,k]² + Σ_i σ_G[i,j]² x_ik².

Every column of pixels is a least-squares problem with these weights, solved again as x becomes
known. Where the update says nothing, a patch is as the others, and all are around grey.
∂l/∂b_e = Σ_i G_i is one more equation for each column of G. Of entries that are known badly those
that came out small would count too much: so errors are taken as they are for the entry predicted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...preprocessing import Preprocessing
from ...update import ClientUpdate, error_scale
from ..evidence import System, one_image
from ..labels import labels_or_none
from ..replay import Loss
from ..result import AttackNotApplicable, Condition, Reconstruction, State, margin, predicted_psnr, report, shown_if
from ..rounds import Left, RoundRead, agreeing
from ..verify import verified
from .inputs import grey_patches, pixel_variance, refuse_rows, refuse_zero, shared_gradients
from .uncertain_patches import natural_patches_of, with_errors

_ITERATIONS, _BY_THEMSELVES = 12, 2  # the first ones weigh by the errors as they are told
_LEAST_SPREAD = 1e-4  # of the pixels' variance: what patches of a nearly flat picture differ by
_SETTLED = 0.02  # of the patches' variance may still change
_FINEST, _ENOUGH = 0.1, 0.05  # the least factor of told variances; equations to spare, of all, that tell it
_UNKNOWN = 1e3  # times the largest entry: the error of an entry of G of which only the sign is known
_LEAST = 1e-13  # of a tensor's r.m.s.: no entry is known better than float64 computes with it
_CANCELLED = 1e-12  # of the carried variance is left where the bias's equation takes all of it away
_SQUARES = 1e14  # of the equations' size over the prior's: what float64 can hold beside each other
_CONSTANT = 1e300  # the scale of errors that do not depend on their entry
_MARGIN_DB = 5.0
_TOLD = 0.3  # errors are told entry by entry: three times what they explain is another image's, not ten times
_AS_TOLD = 3.0  # times the variances that were told; measured: 0.3 to 1 in float32, 5 to 200 under bfloat16 autocast
_FALSE = 10.0  # times the variances that were told: those are not what is left
_TYPICAL_FOR_RESIDUAL = 10.0  # dB: what a picture that leaves so much then has, measured over steps of Adam, 2 to 20
_SHARP, _NOISY = 1e-3, 0.03  # of the pixels' variance; of an entry of G: beyond, natural pictures are expected
_ALL_BUT = 0.5  # of a patch may be unknown


# --- The equations: tensors in, tensors out -----------------------------------------------------------------------


@dataclass(frozen=True)
class Weighted:
    """Gᵀ X = dW of one round or several, and the errors in it.

    Attributes
    ----------
    dW, dW_error : Tensor (d, p)
    G, G_error : Tensor (n, d)
    total : Tensor (d,)
        Variance of the sum of G's column over its patches and of what it was compared with; infinite
        where it was compared with nothing.
    scale : Tensor (d,)
        Of each equation: beyond this an entry's error grows with the entry's square; infinite where
        it does not.
    """

    dW: Tensor
    dW_error: Tensor
    G: Tensor
    G_error: Tensor
    total: Tensor
    scale: Tensor


def with_bias(weighted: Weighted, bias: Tensor, bias_error: Tensor) -> Weighted:
    """G's columns given their sums over the patches, ∂l/∂b_e (d,): each entry moves by its share.

    Examples
    --------
    >>> G, one = torch.tensor([[1.0], [2.0]]).double(), torch.ones(1, 1).double()
    >>> plain = Weighted(one, one, G, torch.tensor([[0.0], [1.0]]).double(), torch.full((1,), torch.inf), one[0])
    >>> with_bias(plain, torch.tensor([4.0]).double(), torch.zeros(1).double()).G.flatten().tolist()
    [1.0, 3.0]
    """
    variance = weighted.G_error.square()
    total = (variance.sum(0) + bias_error.square()).clamp_min(torch.finfo(torch.float64).tiny)
    G = weighted.G + variance / total * (bias - weighted.G.sum(0))
    return Weighted(weighted.dW, weighted.dW_error, G, weighted.G_error, total, weighted.scale)


def stacked(rounds: Sequence[Weighted]) -> Weighted:
    """One system of several rounds: the equations one below the other, each with its error."""
    return Weighted(
        torch.cat([r.dW for r in rounds]), torch.cat([r.dW_error for r in rounds]),
        torch.cat([r.G for r in rounds], 1), torch.cat([r.G_error for r in rounds], 1),
        torch.cat([r.total for r in rounds]), torch.cat([r.scale for r in rounds]),
    )  # fmt: skip


@dataclass(frozen=True)
class WeightedPatches:
    """The most probable patches, and what is known of their error.

    Attributes
    ----------
    X : Tensor (n, p), in model-input space
    weights : Tensor (d, p)
        Of each equation: one over the variance of what is left of it, ``misfit`` included.
    known : float
        Patches that the update shows, of n: the rest is grey.
    misfit : float
        Variances as the equations to spare show them, over those that were told.
    mse : float
        Expected, in model-input space.
    """

    X: Tensor
    weights: Tensor
    known: float
    misfit: float
    mse: float


def most_probable_weighted(system: Weighted, prior: tuple[Tensor, float]) -> WeightedPatches:
    """Least squares weighted by each equation's error; patches have the mean ``prior[0]`` (p,) and the
    variance ``prior[1]`` before anything is read. How much they differ from each other is found.

    Examples
    --------
    >>> G, X = torch.eye(2, 3).double(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    >>> dW, tiny = G.T @ X, torch.full((3, 2), 1e-9).double()
    >>> system = Weighted(dW, tiny, G, tiny.T, torch.full((3,), torch.inf), torch.full((3,), torch.inf))
    >>> most_probable_weighted(system, (torch.zeros(2).double(), 10.0)).X.round(decimals=6).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    (x0, variance), n, p = prior, len(system.G), system.dW.shape[1]
    X = x0.expand(n, -1).clone()
    doubt, misfit, spread, known = torch.full_like(X, variance), 1.0, variance, 0.0
    for step in range(_ITERATIONS):
        weights = _weights(system, X, doubt, predicted=step >= _BY_THEMSELVES) / misfit
        X, now = _one_step(system, weights, X, x0, _precision(n, variance, spread).to(X))
        settled, doubt = bool((now - doubt).abs().sum() < _SETTLED * now.sum()), now
        known = max(n - float(doubt.sum()) / spread / p, 0.0)
        misfit = max(misfit * _misfit(system, X, weights, known), _FINEST)
        spread = float(((X - X.mean(0)).square() + doubt).mean())
        spread = min(max(spread, _LEAST_SPREAD * variance), variance)
        if settled and step > _BY_THEMSELVES:
            break
    return WeightedPatches(X, weights, known, misfit, float(doubt.mean()))


def _precision(n: int, variance: float, spread: float) -> Tensor:
    """Of the n patches' values of one pixel: of their ``variance``, ``spread`` is each one's own."""
    common = variance - spread
    return (torch.eye(n, dtype=torch.float64) - common / (spread + n * common)) / spread


def _misfit(system: Weighted, X: Tensor, weights: Tensor, known: float) -> float:
    """Weight times square of what is left, over the equations beyond the patches that are known; 1 of none."""
    left = float((weights * (system.dW - system.G.T @ X).square()).sum())
    spare = int((weights > 0).sum()) - known * X.shape[1]
    return left / spare if spare > _ENOUGH * weights.numel() else 1.0


def _weights(system: Weighted, X: Tensor, doubt: Tensor, *, predicted: bool) -> Tensor:
    """1 / s² (d, p) of each equation, for the patches X (n, p), known up to the variance ``doubt``."""
    own = system.dW_error
    if predicted:
        # Most likely is Gᵀ X where f'(Gᵀ X) (r − f(Gᵀ X)) sums to zero, f the step: f' times a secant is a weight.
        scale = system.scale[:, None].to(own).clamp_max(_CONSTANT)
        own = own * (((system.G.T @ X).abs() + scale) / (system.dW.abs() + scale)) ** 1.5
    variances = system.G_error.square()
    carried = variances.T @ (X.square() + doubt)
    of_the_sum = (variances.T @ X).square() / system.total[:, None]
    carried = torch.maximum(carried - of_the_sum, _CANCELLED * carried)
    return 1 / (own.square() + carried)


def _one_step(system: Weighted, weights: Tensor, X: Tensor, x0: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """The patches (n, p) of these weights and of the prior's mean and precision, as a correction of X; and
    the variance of each of their pixels.
    """
    A, root = system.G.T, torch.linalg.cholesky(prior).T
    left, to_grey = system.dW - A @ X, x0 - X
    range_of_squares = A.square().sum(1) @ weights / prior.diagonal().min()
    found, doubt = [], []
    for k, weight in enumerate(weights.T):  # each column of pixels by itself
        if range_of_squares[k] < _SQUARES:
            L = torch.linalg.cholesky(A.T @ (weight[:, None] * A) + prior)
            step = A.T @ (weight * left[:, k]) + prior @ to_grey[:, k]
            found.append(torch.cholesky_solve(step[:, None], L)[:, 0])
        else:  # rounding of the squares would pass for knowledge where the update says nothing
            Q, upper = torch.linalg.qr(torch.cat([weight.sqrt()[:, None] * A, root]))
            step = Q.T @ torch.cat([weight.sqrt() * left[:, k], root @ to_grey[:, k]])
            found.append(torch.linalg.solve_triangular(upper, step[:, None], upper=True)[:, 0])
            L = upper.T
        doubt.append(torch.cholesky_inverse(L).diagonal())
    return X + torch.stack(found, 1), torch.stack(doubt, 1)


# --- The attack: check, solve, report -----------------------------------------------------------------------------


def weighted_closed_form(
    name: str,
    model: nn.Module,
    rounds: Sequence[RoundRead],
    anatomy: Anatomy,
    *,
    needs: tuple[str, ...],
    strict: bool,
    preprocessing: Preprocessing,
    labels: Tensor | None,
    loss: Loss | None,
    verify: bool,
    device: torch.device | str | None,
) -> Reconstruction:
    """The patch-embedding system's reconstruction, where an update has an error for each entry.

    Parameters
    ----------
    name : str
        The attack that asks, and what it needs.
    model, rounds, anatomy, strict, preprocessing, labels, loss, verify, device
        As that attack has them.

    Raises
    ------
    AttackNotApplicable
        As that attack, and if the position embedding was interpolated: the errors of the tokens' rows
        are not known then.
    """
    start = time.perf_counter()
    systems = {r.number: weighted_equations(name, r, anatomy, needs, device) for r in rounds}
    rounds = tuple(r for r in rounds if systems[r.number].G.any()) or refuse_zero(name)
    first = systems[rounds[0].number]
    grey = grey_patches(anatomy.tiling, preprocessing, (len(first.G), first.dW.shape[1]))[0]
    prior = grey.to(first.G), pixel_variance(preprocessing)
    agreed = agreeing(name, rounds, partial(_left_by, systems, prior, anatomy))
    kept = [systems[r.number] for r in agreed.kept]
    system, n, d = stacked(kept), len(first.G), len(first.dW)
    if strict and n > len(kept) * d:
        refuse_rows(name, n, d, len(kept), equations=d - anatomy.ignores_mean)
    found = most_probable_weighted(system, prior)
    if _expects_more(found, agreed.kept, system, pixel_variance(preprocessing) * _SHARP):
        X, mse = natural_patches_of([with_errors(r, anatomy) for r in agreed.kept], anatomy, preprocessing, found.X)
        found = replace(found, X=X, mse=mse if found.misfit <= _AS_TOLD else max(mse, found.mse))
    update, steps = agreed.kept[0].reading.update, max(r.reading.update.local_steps for r in agreed.kept)
    one = one_image(anatomy, update, noise=_explained(system, found), system=_evidence(system, found, kept, anatomy))
    predicted = predicted_psnr(found.mse, preprocessing)
    if steps > 1:
        one = _or_of_steps(one, update.batch_size or 1)
    if steps > 1 or found.misfit > _FALSE:  # what is left is no noise, and does not average
        predicted = min(predicted, _TYPICAL_FOR_RESIDUAL - 20 * math.log10(max(_relative(system, found), 1e-300)))
    result = report(
        name,
        anatomy.tiling.images(found.X[None]),
        conditions=(
            _all_known(found, n), one, *_first(update), *_told(found, update), *agreed.conditions,
            margin(predicted, _MARGIN_DB),
        ),
        predicted_psnr=predicted,
        labels=labels_or_none(model, update, anatomy, labels, one=one),
        numbers={
            "patches": n, "width": d, "pixels_per_patch": first.dW.shape[1], "known": found.known,
            "misfit": found.misfit, "residual": _relative(system, found), "noise": _explained(system, found),
            "decay": 0.0, **agreed.numbers,
        },
        dtype=update.dtype,
        preprocessing=preprocessing,
        start=start,
    )  # fmt: skip
    return verified(result, model, agreed.kept, anatomy, preprocessing=preprocessing, loss=loss, verify=verify)


def weighted_equations(
    name: str, read: RoundRead, anatomy: Anatomy, needs: tuple[str, ...], device: torch.device | str | None
) -> Weighted:
    """One round's equations with their errors; of an update that has none, those of its noise."""
    if anatomy.resampling is not None:
        raise AttackNotApplicable(
            name,
            "the position embedding was interpolated to the picture's size, and the update's entries have errors of "
            "their own (a step of Adam undone): those of the tokens' rows are not known then",
        )
    update = read.reading.update
    shared = shared_gradients(name, update, anatomy, needs, device=device, weighs=True)
    dW, G = shared["patch_weight"].flatten(1), shared["position"][anatomy.position_prefix :]
    scale = error_scale(update)
    told: Mapping[str, Tensor] = update.errors or {
        anatomy.patch_weight: torch.full_like(dW, read.reading.noise * float(dW.square().mean().sqrt())),
        anatomy.position or "": torch.full_like(shared["position"], read.reading.noise_of_position),
    }
    dW_error = told[anatomy.patch_weight].to(dW).reshape(dW.shape)
    G_error = told[anatomy.position or ""].to(G).reshape(-1, G.shape[1])[anatomy.position_prefix :]
    largest, d = max(float(G.abs().max()), float(dW.abs().max())), len(dW)
    system = Weighted(
        dW, dW_error.clamp_min(_LEAST * float(dW.square().mean().sqrt())),
        G, G_error.clamp(_LEAST * float(G.square().mean().sqrt()), _UNKNOWN * largest),
        G.new_full((d,), torch.inf), G.new_full((d,), scale),
    )  # fmt: skip
    bias = anatomy.patch_bias
    if bias is None or update.errors is None or bias not in update.gradients:
        return system
    error = update.errors[bias].to(G).clamp_max(_UNKNOWN * largest)
    return with_bias(system, update.gradients[bias].to(G), error)


def _relative(system: Weighted, found: WeightedPatches) -> float:
    """What is left of the equations over what was to be explained, each in units of its error."""
    left = (found.weights * (system.dW - system.G.T @ found.X).square()).sum()
    return float((left / (found.weights * system.dW.square()).sum().clamp_min(1e-300)).sqrt())


def _explained(system: Weighted, found: WeightedPatches) -> float:
    """The same if the errors are as told: one unit in each."""
    size = float((found.weights * system.dW.square()).sum()) * found.misfit
    return min((int((found.weights > 0).sum()) / max(size, 1e-300)) ** 0.5, 1.0)


def _evidence(system: Weighted, found: WeightedPatches, kept: Sequence[Weighted], anatomy: Anatomy) -> System:
    of = (len(kept[0].dW) - anatomy.ignores_mean) * len(kept)
    over = f" over {len(kept)} rounds" if len(kept) > 1 else ""
    words = f"∂W_e = GᵀX{over}, each equation by its error,"
    return System(words, _relative(system, found), max(of - len(system.G), 0), of, _TOLD)


def _expects_more(found: WeightedPatches, kept: Sequence[RoundRead], system: Weighted, mse: float) -> bool:
    """Whether to expect a natural picture: a defence left the errors, and much is open or G noisy."""
    if any(r.reading.update.eps is not None for r in kept):
        return False
    there = system.G_error < _UNKNOWN * system.G.abs()
    noisy = bool(there.any()) and float((system.G_error / system.G.abs())[there].median()) > _NOISY
    return noisy or found.mse > mse


def _all_known(found: WeightedPatches, n: int) -> Condition:
    words = "{known:.1f} of n = {n} patches stand out from the entries' errors"
    return Condition("patches are known", shown_if(found.known > n - _ALL_BUT), {"known": found.known, "n": n}, words)


def _or_of_steps(one: Condition, said: int) -> Condition:
    """Whether one image is behind several steps that were undone as the first: they leave as much of one image
    as a batch does, so that only the client's own number contradicts it.
    """
    if said > 1 and one.state != "shown":
        return replace(one, state="contradicted", words="the client says batch_size={said}", numbers={"said": said})
    if one.state != "contradicted":
        return one
    return replace(one, state="not checked", words=one.words + ", as later steps of Adam on one image do, too")


def _first(update: ClientUpdate) -> tuple[Condition, ...]:
    """That the steps which were undone, if any were, are one-to-one."""
    if update.eps is None:
        return ()
    if update.local_steps == 1:
        return (Condition("first step", "shown", {}, "the client's first step is one-to-one, entry by entry"),)
    words = "{steps} local steps were undone as if they were all the first: how far the gradient moved is not known"
    return (Condition("first step", "not checked", {"steps": update.local_steps}, words),)


def _told(found: WeightedPatches, update: ClientUpdate) -> tuple[Condition, ...]:
    """That what is left of a first step is the weights' rounding: a forward pass in half precision rounds the
    pixels, too, which no equation shows. Or that it is what a defence was told to leave.
    """
    if update.local_steps > 1:
        return ()
    why = "the errors that were told explain" if update.eps is None else "the weights' rounding explains"
    words = "what is left is {misfit:.2g} times the variance that " + why
    state: State = "shown" if found.misfit <= _AS_TOLD else "contradicted"
    return (Condition("errors are as told", state, {"misfit": found.misfit}, words),)


def _left_by(
    systems: Mapping[int, Weighted], prior: tuple[Tensor, float], anatomy: Anatomy, rounds: Sequence[RoundRead]
) -> Left:
    """What one picture leaves of some rounds, each equation in units of its error."""
    some = [systems[r.number] for r in rounds]
    system = stacked(some)
    found = most_probable_weighted(system, prior)
    residuals, gains, row = [], [], 0
    for one, read in zip(some, rounds, strict=True):
        part = replace(found, weights=found.weights[row : row + len(one.dW)])
        residuals.append(_relative(one, part))
        gains.append(_TOLD * _explained(one, part) / read.reading.noise)
        row += len(one.dW)
    spare = len(some) * (len(some[0].dW) - anatomy.ignores_mean) - len(some[0].G)
    return Left(tuple(residuals), tuple(gains), spare)
