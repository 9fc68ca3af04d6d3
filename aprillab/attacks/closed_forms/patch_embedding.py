"""The patch-embedding system: a ViT that shares its position embedding's gradient gives its patches.

Tokens are z_i = W_e x_i + b_e + E_i, so with G = ∂l/∂E (one row for each patch) the patch
embedding's gradient is

    ∂l/∂W_e = Σ_i (∂l/∂z_i) x_iᵀ = Gᵀ X,                                          (4.3)

a linear system for the patches X. Nothing about the blocks enters, nor the weights. Chapter 04
derives it. We know of no publication that reads the patches off these two gradients.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, dissect, likely_size
from ...preprocessing import Preprocessing
from ...update import Updates
from ..evidence import System, one_image
from ..labels import check_known, check_told, labels_or_none
from ..replay import Loss
from ..result import Condition, Reconstruction, margin, predicted_psnr, report, shown_if
from ..rounds import Left, RoundRead, agreeing, known, read_rounds
from ..verify import verified
from .inputs import grey_patches, pixel_variance, refuse_rows, refuse_zero, shared_gradients
from .known_noise import check_noise, is_noise, natural_patches, noise_as_told, refuse_noise
from .linear_algebra import condition_number, thin_svd
from .stacked_patches import ROUNDING, Equations, most_probable_of, noise_of_entries, residuals_of, stacked
from .weighted_patches import weighted_closed_form

NAME, NEEDS = "embedding_closed_form", ("patch_weight", "position")

_TINY = torch.finfo(torch.float64).tiny
# The prediction is an expectation. Of the exact pictures in data/results/fuzz.csv that it puts between 59 and
# 75 dB, the worst has 4.5 dB less.
_MARGIN_DB = 5.0
_LEAST_PIXELS = 0.01  # of their variance: what a nearly flat grey picture has in model-input space
_SHARP_DB = 60.0  # beyond this, known noise and a prior add nothing to least squares
_SEEN, _FEW = 0.3, 4  # the part of a direction that noise may take; directions enough to judge others by


# --- The equations: tensors in, tensors out. G (n, d), dW = ∂l/∂W_e (d, p), X (n, p), Gᵀ = U diag(s


def solve_patches(b: Tensor, s: Tensor, Vt: Tensor) -> Tensor:
    """The patches X (n, p) with Gᵀ X = dW in the sense of least squares, (4.3), from b = Uᵀ dW.

    Examples
    --------
    >>> G, X = torch.eye(2, 3).double(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    >>> U, s, Vt = thin_svd(G.T)
    >>> solve_patches(U.T @ (G.T @ X), s, Vt).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    return Vt.T @ (b / s[:, None])


def noise_variance(residual: Tensor, n: int, eps: float, scale: float) -> float:
    """Mean square error of an entry of dW, (4.8), from the residual (d, p) of d·p equations.

    There are n·p unknowns. At least that of rounding entries of root mean square ``scale`` once;
    nothing else where no equation is to spare.
    """
    d, p = residual.shape
    rounding = (eps * scale) ** 2
    return rounding if d <= n else max(float(residual.norm()) ** 2 / ((d - n) * p), rounding)


def predicted_mse(noise: float, s: Tensor) -> float:
    """Expected mean square error of the patches in model-input space, (4.7)."""
    return noise * float((1 / s**2).mean())


def least_singular_value(s: Tensor, shape: torch.Size, noise: float, entry: float) -> float:
    """Below this a singular value of G (n, d) may be the doing of noise.

    Of ``noise`` relative to the largest, as rounding is; or of noise of size ``entry`` in each entry,
    which has up to √n + √d of them (Bai and Yin), once it is more than rounding.
    """
    rounding = noise * float(s.max())
    return rounding if noise < ROUNDING else max(rounding, entry * sum(size**0.5 for size in shape))


def without_decay(dW: Tensor, G: Tensor, W_e: Tensor) -> Tensor:
    """dW (d, p) less the multiple of W_e (d, p) that Gᵀ X can explain worst: what weight decay left.

    >>> G, X = torch.eye(1, 3).double(), torch.tensor([[1.0, 2.0]]).double()
    >>> W_e = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double()
    >>> without_decay(G.T @ X + 0.1 * W_e, G, W_e)[1:].abs().max().item() < 1e-15
    True
    """
    if len(G) >= len(dW):
        return dW
    Q = torch.linalg.qr(G.T).Q
    left, of_weights = (A - Q @ (Q.T @ A) for A in (dW, W_e))
    return dW - float((left * of_weights).sum() / of_weights.square().sum()) * W_e


@dataclass(frozen=True)
class Patches:
    """The most probable patches X (n, p), and what is known of their error.

    Attributes
    ----------
    X : Tensor (n, p), in model-input space
    residual : Tensor (d, p)
        What no X explains.
    s : Tensor (min(n, d),)
        Singular values of G.
    rank : int
        Directions of the patches that the update shows; n − rank are filled in grey.
    mse : float
        Expected, in model-input space.
    gain : float
        By how much the update's relative noise is larger in the relative residual.
    """

    X: Tensor
    residual: Tensor
    s: Tensor
    rank: int
    mse: float
    gain: float


def most_probable(dW: Tensor, G: Tensor, noise: float, entry: float, prior: tuple[Tensor, float]) -> Patches:
    """Least squares where the update says more than noise, grey where it does not.

    The noise is relative to an entry's r.m.s. in dW, and of size ``entry`` in G. Patches have the
    mean ``prior[0]`` (p,) and the variance ``prior[1]`` before anything is read, so a direction
    with singular value s is divided by s + λ/s, with λ the noise's variance over theirs. Where
    nothing is damped this is (4.3), its error (4.7); with noise of one size in dW and G λ is that of
    (6.5).
    """
    (n, d), (x0, variance) = G.shape, prior
    U, s, Vt = thin_svd(G.T, noise)
    rank = int((s > least_singular_value(s, G.shape, noise, entry)).sum())
    b, scale = U.T @ dW, _rms(dW)
    residual = torch.addmm(dW, U, b, alpha=-1)
    b -= torch.outer(s * Vt.sum(1), x0)  # of deviations from grey: Uᵀ (dW − Gᵀ 1 x₀ᵀ), of the same residual
    s = s.clamp_min(_TINY)
    sigma2 = noise_variance(residual, n, noise, scale)
    if d > n:
        # Noise in G is in the residual, multiplied by the pixels: it cannot be more than is seen there.
        off = b / (s + sigma2 / variance / s)[:, None]
        pixels = max(_rms(x0) ** 2 + float(off.square().sum()) / (n * len(x0)), _LEAST_PIXELS * variance)
        entry = min(entry, (sigma2 / n / pixels) ** 0.5)
    carried = n * entry**2 * (_rms(x0) ** 2 + variance)
    if d <= n:
        sigma2 = max(sigma2, carried)
    s_used = s + sigma2 / variance / s
    energy = (b / s_used[:, None]).square().mean(1)
    mse = expected_error(energy, s, sigma2, d * entry**2, n, variance)
    gain = (1 + carried / (noise * scale) ** 2) ** 0.5 if scale else 1.0
    return Patches(x0 + solve_patches(b, s_used, Vt), residual, s, rank, mse, gain)


def expected_error(energy: Tensor, s: Tensor, sigma2: float, in_G: float, n: int, variance: float) -> float:
    """Mean square error of n damped patches, in model-input space.

    Each direction has (4.7)'s error with the damped s, which is never more than what is known before
    anything is read. Noise in G, of square ``in_G`` a direction, bends it towards grey besides, once
    s² is no larger. ``energy`` (r,) is that of the patches found, in each direction.
    """
    bent = (in_G / s**2).clamp_max(1.0) ** 2
    damping = sigma2 / variance
    unseen = _energy_of_the_unseen(energy, bent + damping / (s**2 + damping), variance)
    of_noise = len(s) * predicted_mse(sigma2, (s**2 + damping).sqrt())
    return (of_noise + (float(bent.sum()) + n - len(s)) * unseen) / n


def _rms(tensor: Tensor) -> float:
    return float(tensor.norm()) / tensor.numel() ** 0.5


def _energy_of_the_unseen(energy: Tensor, lost: Tensor, variance: float) -> float:
    """What directions that the update does not show are expected to hold: as much as the last of those
    that it does, at most what any pixels have.

    ``energy`` (r,) is that of the patches in each direction, the strongest of G first, ``lost`` (r,)
    how much of it noise took. Where less than a few are seen, anything may be in the others.
    """
    seen = energy[lost < _SEEN]
    if len(seen) < _FEW:
        return variance
    return min(float(seen[-max(len(seen) // 8, _FEW) :].mean()), variance)


# --- The attack -----------------------------------------------------------------------------------


def embedding_closed_form(
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
    noise: float | None = None,
) -> Reconstruction:
    """Solve ``∂l/∂W_e = Gᵀ X`` for the patches of one private image, in one round or several.

    Needs the gradients of the patch embedding and of the position embedding, one image, and rank(G)
    = n ≤ d: independent gradients at the n patches (in architecture B n ≤ d − 1: only LayerNorms
    read the tokens, so every row of G sums to zero). Solved in float64 whatever the update's
    precision. Where the entries have errors of their own, as once Adam's step is undone or as
    :func:`~aprillab.told_errors` tells them of a defence, each counts by its own:
    :mod:`~aprillab.attacks.closed_forms.weighted_patches`.

    Parameters
    ----------
    model : nn.Module
        Only its parts' names and shapes are used to solve, not its weights; the replay uses them.
    update : ClientUpdate, Round, or a sequence of these
        Several rounds of one client and one picture are stacked, (10.1): n ≤ T·d patches, and noise
        averages. The weights of the rounds are needed for the replay alone.
    strict : bool
        Refuse n > d; False returns the patches with the directions that are missing filled in grey.
    anatomy : Anatomy, optional; default is ``dissect(model)``
    preprocessing : Preprocessing, optional; default is the model family's own
    labels : int64 Tensor of shape (1,), optional; if the attacker knows the label
    loss, verify
        As in :func:`~aprillab.attacks.verify.verified`.
    device : where to solve; default is where the update lies
    noise : float, optional
        Standard deviation of the noise in each entry of the update, in its own units, as a protocol tells
        it: ``sigma`` of :func:`~aprillab.defenses.gaussian_noise`, or z·C. Then errors in G are
        reckoned with, and pictures are expected to be natural ones:
        :mod:`~aprillab.attacks.closed_forms.known_noise`. Seconds more at 224×224. What is shown to
        be exact, and how, does not depend on it.

    Returns
    -------
    Reconstruction
        With ``diagnostics``: ``rank``, ``missing`` (n − rank, directions of the patches that are
        filled in), ``condition`` of G, ``residual`` (relative), ``noise`` (of the update), ``decay``
        (the multiple of the weights that was taken off); of several rounds, ``rounds``: which were
        used, and their noise.

    Raises
    ------
    AttackNotApplicable
        If a gradient is not shared, n > d, G is zero, the update is one of Adam's steps, or rounds
        are of different pictures.
    UpdateError
        If the update does not belong to the model, or a tensor that is read is not finite.
    ValueError
        If ``noise`` is not positive and finite.
    """
    check_noise(noise)
    start = time.perf_counter()
    check_told(anatomy, preprocessing, loss)
    anatomy = anatomy or dissect(model)
    preprocessing = preprocessing or anatomy.preprocessing
    rounds = read_rounds(model, update, anatomy)
    check_known(labels, rounds[0].reading.update, anatomy, model)
    options: dict[str, Any] = {
        "preprocessing": preprocessing,
        "labels": labels,
        "loss": loss,
        "verify": verify,
        "device": device,
    }
    if any(r.reading.update.errors is not None for r in rounds):
        refuse_noise(NAME, noise, "the update's entries have errors of their own")
        return weighted_closed_form(NAME, model, rounds, anatomy, needs=NEEDS, strict=strict, **options)
    systems = {r.number: _equations(r, anatomy, device, several=len(rounds) > 1) for r in rounds}
    rounds = tuple(r for r in rounds if systems[r.number].G.any()) or refuse_zero(NAME)
    agreed = agreeing(NAME, rounds, partial(_left_by, systems, anatomy, preprocessing))
    kept = [systems[r.number] for r in agreed.kept]
    # Only LayerNorms read the tokens of architecture B: one equation of each column is 0 = 0.
    (d, p), n, of = kept[0].dW.shape, len(kept[0].G), (len(kept[0].dW) - anatomy.ignores_mean) * len(kept)
    if strict and n > len(kept) * d:
        refuse_rows(NAME, n, d, len(kept), equations=len(kept[0].dW) - anatomy.ignores_mean)
    found, relative, measured = _solve(kept, _prior(anatomy, preprocessing, kept[0]))
    as_told: tuple[Condition, ...] = ()
    if noise is not None:
        refuse_noise(NAME, noise if anatomy.resampling else None, "the position embedding was interpolated")
        unseen = all(is_noise(r.G, noise) for r in kept)
        if unseen or predicted_psnr(found.mse, preprocessing) < _SHARP_DB:
            biases = [r.reading.update.gradients.get(anatomy.patch_bias or "") for r in agreed.kept]
            X, mse = natural_patches(kept, biases, noise, anatomy, preprocessing)
            as_told = (noise_as_told(kept, biases, noise, X, mse, centred=anatomy.ignores_mean),)
            mse = max(mse, found.mse) if as_told[0].state == "contradicted" else mse
            found = replace(found, X=X, mse=mse, rank=0 if unseen else found.rank)
    elif found.rank < n and (smaller := _of_another_size(model, update, anatomy, found.rank, options)) is not None:
        return smaller
    read, over = agreed.kept[0].reading, f" over {len(kept)} rounds" if len(kept) > 1 else ""
    one = one_image(
        anatomy, read.update, noise=measured,
        system=System(f"∂W_e = GᵀX{over}", relative, max(of - n, 0), of, found.gain),
    )  # fmt: skip
    result = report(
        NAME,
        anatomy.tiling.images(found.X[None]),
        conditions=(
            Condition(
                "rank(G) = n", shown_if(found.rank == n), {"rank": found.rank, "n": n, "d": d * len(kept)},
                _words_of_rank(found.rank, n, d * len(kept), anatomy) + over,
            ),
            one,
            *as_told,
            *agreed.conditions,
            margin(predicted_psnr(found.mse, preprocessing), _MARGIN_DB),
        ),
        predicted_psnr=predicted_psnr(found.mse, preprocessing),
        labels=labels_or_none(model, read.update, anatomy, labels, one=one),
        numbers={
            "patches": n, "width": d, "pixels_per_patch": p, "rank": found.rank, "missing": n - found.rank,
            "condition": condition_number(found.s), "residual": relative, "noise": measured, "decay": read.decay,
            **agreed.numbers,
        },
        dtype=read.update.dtype,
        preprocessing=preprocessing,
        start=start,
    )  # fmt: skip
    played = [replace(r, reading=replace(r.reading, sigma=noise or 0.0)) for r in agreed.kept]
    return verified(result, model, played, anatomy, preprocessing=preprocessing, loss=loss, verify=verify)


# --- Check, solve ---------------------------------------------------------------------------------


def _equations(read: RoundRead, anatomy: Anatomy, device: torch.device | str | None, *, several: bool) -> Equations:
    """∂l/∂W_e (d, p) and G (n, d) of one round, or a refusal."""
    name, reading = NAME, read.reading
    shared = shared_gradients(name, reading.update, anatomy, NEEDS, device=device)
    dW, G = shared["patch_weight"].flatten(1), shared["position"][anatomy.position_prefix :]
    if reading.decay and G.any():
        dW = without_decay(dW, G, known(read, [anatomy.patch_weight], name)[anatomy.patch_weight].to(dW).flatten(1))
    entry = reading.noise_of_position
    if reading.noise >= ROUNDING and several:  # a stack needs it as it is, and not on the careful side
        bias = reading.update.gradients.get(anatomy.patch_bias or "")
        entry = noise_of_entries(G, None if bias is None else bias.to(G), centred=anatomy.ignores_mean) or entry
    return Equations(dW, G, reading.noise, entry)


def _prior(anatomy: Anatomy, preprocessing: Preprocessing, equations: Equations) -> tuple[Tensor, float]:
    """Mean (p,) and variance of a patch of which nothing is known: grey, anywhere in [0, 1]."""
    shape = len(equations.G), equations.dW.shape[1]
    return grey_patches(anatomy.tiling, preprocessing, shape)[0].to(equations.G), pixel_variance(preprocessing)


def _solve(rounds: Sequence[Equations], prior: tuple[Tensor, float]) -> tuple[Patches, float, float]:
    """The most probable patches of one round, or of several; their relative residual, and the noise of all."""
    first = rounds[0]
    noise = (sum(r.noise**-2 for r in rounds) / len(rounds)) ** -0.5  # the precise ones weigh more
    if len(rounds) == 1:
        found, size = most_probable(first.dW, first.G, first.noise, first.entry, prior), first.dW.norm()
    else:
        stack = stacked(rounds)
        of_all, size = most_probable_of(stack, prior), stack.dW.norm()
        rank = int((of_all.s > least_singular_value(of_all.s, stack.G.shape, noise, stack.entry)).sum())
        gain = max(r.gain(prior) for r in rounds)
        found = Patches(of_all.X, of_all.residual, of_all.s, rank, of_all.mse, gain)
    return found, float(found.residual.norm() / size) if size else 0.0, noise


def _left_by(
    systems: Mapping[int, Equations], anatomy: Anatomy, preprocessing: Preprocessing, rounds: Sequence[RoundRead]
) -> Left:
    """What one picture leaves of some rounds."""
    some = [systems[r.number] for r in rounds]
    prior = _prior(anatomy, preprocessing, some[0])
    spare = len(some) * (len(some[0].dW) - anatomy.ignores_mean) - len(some[0].G)
    residuals = residuals_of(some, _solve(some, prior)[0].X)
    return Left(residuals, tuple(r.gain(prior) for r in some), spare)


def _of_another_size(
    model: nn.Module, update: Updates, anatomy: Anatomy, rank: int, options: dict[str, Any]
) -> Reconstruction | None:
    """A smaller picture's result, where the rank is that of its patches and its system fixes them.

    The library's interpolation of the position embedding is known, and undone.
    """
    size = likely_size(rank, anatomy)
    if size is None or anatomy != dissect(model):  # what the caller described is not changed
        return None
    result = embedding_closed_form(model, update, anatomy=dissect(model, image_size=size), **options)
    return result if result.determined else None


def _words_of_rank(rank: int, n: int, d: int, anatomy: Anatomy) -> str:
    words = "rank {rank} of n = {n} " + ("≤" if n <= d else ">") + " d = {d}"
    size = likely_size(rank, anatomy)
    if size is None or rank == n:
        return words
    return f"{words}, as a picture of {size[0]}×{size[1]} pixels leaves it: dissect(model, image_size={size[0]})"
