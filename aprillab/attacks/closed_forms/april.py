"""APRIL's closed form (Lu et al., CVPR 2022): the image from the first attention's gradient.

In architecture A the first attention reads the tokens z themselves, and q, k, v are linear in them.
The chain rule then ties three shared things to the one unknown:

    (∂l/∂z) zᵀ = W_Qᵀ ∂l/∂W_Q + W_Kᵀ ∂l/∂W_K + W_Vᵀ ∂l/∂W_V,     ∂l/∂z = ∂l/∂E_pos.

Tokens are rows here, so it reads Gᵀ Z = M, with G = ∂l/∂E_pos, (3.1). The pixels follow from W_e x
= z − E − b_e, (3.2). Both together are Gᵀ (X − X₀) W_eᵀ = B, (A1.1), which the singular vectors of G
and W_e make diagonal, a ∘ y = b, (A1.2). Chapter 02 derives the identity,
chapter 03 solves it, and appendix A1 damps it for what float32 leaves of a gradient.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, dissect
from ...preprocessing import Preprocessing
from ...update import Updates
from ..evidence import System as Spare
from ..evidence import one_image
from ..labels import check_known, check_told, labels_or_none
from ..reading import Reading
from ..replay import Loss
from ..result import Condition, Reconstruction, margin, predicted_psnr, report, shown_if
from ..rounds import read_rounds
from ..verify import verified
from .april_rounds import april_over_rounds
from .april_system import GAIN, MARGIN_DB, System, Systems, patch_gradient, read_system
from .inputs import grey_patches, pixel_variance
from .linear_algebra import condition_number, numerical_rank, row_space_basis

Regularization = Literal["gcv", "none"]

_TINY = torch.finfo(torch.float64).tiny


# --- The equations: tensors in, tensors out -------------------------------------------------------


def tokens_from(G: Tensor, M: Tensor) -> Tensor:
    """Tokens Z (t, d) of least squares Gᵀ Z = M, (3.1); G is (t, d) with t ≤ d, M is (d, d).

    Examples
    --------
    >>> G, Z = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    >>> tokens_from(G, G.T @ Z).allclose(Z)
    True
    """
    return torch.linalg.lstsq(G.T, M, driver=_driver(G)).solution


def patches_from(Z: Tensor, E: Tensor, W_e: Tensor) -> Tensor:
    """Patches X (n, p) whose embedding gave the tokens Z (n, d), (3.2); E (n, d) holds E_i + b_e,
    W_e is (d, p).
    """
    return torch.linalg.lstsq(W_e, (Z - E).T, driver=_driver(Z)).solution.T


def _driver(tensor: Tensor) -> str:
    """LAPACK's SVD-based least squares on a CPU; CUDA has only the QR-based one."""
    return "gelsd" if tensor.device.type == "cpu" else "gels"


@dataclass(frozen=True)
class Diagonal:
    """The system (A1.2), a ∘ y = b, all (n, r), and what belongs to it.

    ``rest`` is the squared residual of the ``spare`` equations that no y can meet. The patches are
    X₀ + V y Qᵀ Rᵀ, with Vᵀ (n, n), Qᵀ (r, r) and the basis R (p, r). The singular values of G_p and
    W_e are ``s`` (n,) and ``s_e`` (r,).
    """

    a: Tensor
    b: Tensor
    rest: float
    spare: int
    s: Tensor
    s_e: Tensor
    U: Tensor
    Vt: Tensor
    Qt: Tensor
    basis: Tensor

    def patches(self, y: Tensor) -> Tensor:
        """Deviations of the patches from X₀, (n, p)."""
        return self.Vt.T @ y @ self.Qt @ self.basis.T


def diagonal(system: System, B: Tensor, basis: Tensor) -> Diagonal:
    """System (A1.2) of the patches in the span of ``basis`` (p, r): all pixels, or the row space
    (3.5).
    """
    d, r = len(B), basis.shape[1]
    U, s, Vt = torch.linalg.svd(system.G_p.T, full_matrices=False)  # (d, n), (n,), (n, n)
    L, s_e, Qt = torch.linalg.svd(system.W_e @ basis, full_matrices=r > d)  # (d, min(d, r)), (min(d, r),), (r, r)
    # Where r > d, W_e does not see r − d directions of a patch.
    unseen = (0, r - len(s_e))
    L, s_e = nn.functional.pad(L, unseen), nn.functional.pad(s_e, unseen)  # (d, r), (r,)
    b = U.T @ B @ L  # (n, r)
    rest = float((B - U @ b @ L.T).square().sum())
    return Diagonal(s[:, None] * s_e[None], b, rest, d * d - b.numel(), s, s_e, U, Vt, Qt, basis)


def stack_rows(diagonal: Diagonal, system: System, dW: Tensor, X0: Tensor) -> Diagonal:
    """The same with ∂l/∂W_e = G_pᵀ X below, s ∘ y = f, scaled to the same noise.

    Two equations a·y = b and c·y = f of equal noise are one: √(a² + c²)·y = (a·b + c·f) / √(a² +
    c²).
    """
    U, (d, p), n = diagonal.U, dW.shape, len(X0)
    f = U.T @ (dW - system.G_p.T @ X0) @ diagonal.Qt.T  # (n, r)
    noise_f = (dW - U @ (U.T @ dW)).square().sum() / max(p * (d - n), 1)
    scale = (diagonal.rest / max(diagonal.spare, 1) / noise_f.clamp_min(_TINY)).sqrt()
    a, b, c, f = diagonal.a, diagonal.b, scale * diagonal.s[:, None].expand_as(diagonal.a), scale * f
    both = (a**2 + c**2).sqrt()
    return replace(diagonal, a=both, b=(a * b + c * f) / both.clamp_min(_TINY))


def damped(a: Tensor, b: Tensor, damping: float) -> Tensor:
    """The y that minimizes Σ (a y − b)² + λ y², entry by entry: Tikhonov's filter (A1.3).

    Examples
    --------
    >>> damped(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 1.0]), 4.0).tolist()
    [1.0, 0.0]
    """
    return a * b / (a**2 + damping).clamp_min(_TINY)


def gcv(a: Tensor, b: Tensor, rest: float, spare: int, damping: float) -> float:
    """The score V of generalized cross-validation, (A1.6): lower predicts better (Golub, Heath &
    Wahba, 1979).
    """
    unused = damping / (a**2 + damping)  # 1 − φ
    freedom = float(unused.sum() + spare)
    return float((unused * b).square().sum() + rest) / freedom**2 if freedom > 0 else float("inf")


def choose_damping(a: Tensor, b: Tensor, rest: float, spare: int, candidates: Sequence[float]) -> float:
    """The candidate λ that generalized cross-validation prefers, with no original seen."""
    return min(candidates, key=lambda damping: gcv(a, b, rest, spare, damping))


def remaining_error(diagonal: Diagonal, damping: float, least: float = 0.0) -> Tensor:
    """Expected squared error of each entry of y, (n, r), (A1.7): σ² / (a² + λ); infinite where
    nothing is known. σ² is at least ``least``, for residuals that no equation is to spare for.
    """
    a, b = diagonal.a, diagonal.b
    noise = torch.tensor(max(diagonal.rest / max(diagonal.spare, 1), least)).to(a)
    unused = damping / (a**2 + damping).clamp_min(_TINY)
    # Enough equations were left unused to see the noise among them too.
    if float(unused.square().sum()) > 1:
        noise = torch.maximum(noise, (unused * b).square().sum() / unused.square().sum())
    return torch.where(a > 0, noise / (a**2 + damping).clamp_min(_TINY), torch.inf)


# --- The attack -----------------------------------------------------------------------------------


def april_closed_form(
    model: nn.Module,
    update: Updates,
    *,
    regularization: Regularization | float = "gcv",
    systems: Systems | None = None,
    prior_pixel: float = 0.5,
    strict: bool = True,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    labels: Tensor | None = None,
    loss: Loss | None = None,
    verify: bool = True,
    device: torch.device | str | None = None,
) -> Reconstruction:
    """Solve APRIL's identity for the tokens of one image, and the patch embedding for its pixels.

    Needs architecture A, the gradients of the position embedding and of the first attention's
    projections, one image, rank(∂l/∂E_pos) = n + 1 ≤ d for the tokens and rank(W_e) = p ≤ d for the
    pixels.

    Both steps are one linear system for the patches X, Gᵀ X W_eᵀ = M − Gᵀ(E + b_e), which the
    singular values of G and of W_e make diagonal. Each component is divided by s_i·s_j, some of
    them tiny: the gradient's rounding errors grow by as much, unless the division is damped.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate, Round, or a sequence of these
        Several rounds of one client are stacked, (10.2), each with its own weights.
    regularization : {"gcv", "none"} or float
        ``"none"`` solves as it stands, in the paper's two steps. ``"gcv"`` damps by Tikhonov's
        filter around a flat picture, as strongly as generalized cross-validation says, which sees
        no original. A number is the damping λ itself, relative to the largest a².
    systems : {"attention", "row_space", "both"}, optional
        ``"attention"`` is APRIL's identity alone. ``"row_space"`` looks for the patches in the row
        space of ∂l/∂W_e, of rank n at most, which can determine them where p > d. ``"both"``
        stacks ∂l/∂W_e = Gᵀ X below (see ``embedding_closed_form``). Default: ``"attention"`` where
        p ≤ d, else ``"row_space"``.
    prior_pixel : float
        The flat picture, a grey level in [0, 1].
    strict : bool
        Refuse n + prefix > d; False returns the damped solution, marked not exact.
    anatomy : Anatomy, optional; default is ``dissect(model)``
    preprocessing : Preprocessing, optional; default is the model family's own
    labels : int64 Tensor of shape (1,), optional; if the attacker knows the label
    loss, verify
        As in :func:`~aprillab.attacks.verify.verified`.
    device : where to solve; default is where the update lies

    Returns
    -------
    Reconstruction
        With ``diagnostics``: ranks and condition numbers of G and W_e, the damping, ``residual``, and
        ``directions_lost`` in each patch (p − d, of which the second step alone learns nothing).

    Raises
    ------
    AttackNotApplicable
        If the model is not of architecture A, a gradient is missing, n + prefix > d, or G is zero.
    UpdateError
        If the update does not belong to the model, or a tensor that is read is not finite.
    ValueError
        If ``regularization`` or ``systems`` is unknown.
    """
    start = time.perf_counter()
    check_told(anatomy, preprocessing, loss)
    _check_options(regularization, systems)
    anatomy = anatomy or dissect(model)
    preprocessing = preprocessing or anatomy.preprocessing
    rounds = read_rounds(model, update, anatomy)
    reading = rounds[0].reading
    check_known(labels, reading.update, anatomy, model)
    if len(rounds) > 1:
        _only_by_default(regularization, systems)
        return april_over_rounds(
            model, rounds, anatomy=anatomy, preprocessing=preprocessing, labels=labels, loss=loss, verify=verify,
            device=device,
        )  # fmt: skip
    system = read_system(rounds[0].weights, reading.update, anatomy, strict=strict, device=device)
    (d, p), n = system.W_e.shape, len(system.G_p)
    systems = systems or ("attention" if p <= d else "row_space")

    if regularization == "none" and systems == "attention":
        solution = _solve_in_two_steps(system)
    else:
        X0 = grey_patches(system.tiling, preprocessing, (n, p), prior_pixel).to(system.G)
        dW = patch_gradient(reading.update, anatomy, systems, like=system.G)
        solution = _solve_as_one(system, X0, dW, systems, regularization, reading.noise)
    predicted = predicted_psnr(solution.mean_square_error(pixel_variance(preprocessing)), preprocessing)
    one = _one_image(system, solution, anatomy, reading)
    found, numbers = _evidence(system, solution, systems, reading.noise)
    result = report(
        "april_closed_form",
        system.tiling.images(solution.X[None]),
        conditions=(*found, one, margin(predicted, MARGIN_DB)),
        predicted_psnr=predicted,
        labels=labels_or_none(model, reading.update, anatomy, labels, one=one),
        numbers={"patches": n, "width": d, "pixels_per_patch": p, **numbers, "regularization": regularization},
        dtype=reading.update.dtype,
        preprocessing=preprocessing,
        start=start,
    )
    return verified(result, model, rounds, anatomy, preprocessing=preprocessing, loss=loss, verify=verify)


# --- Check, solve ---------------------------------------------------------------------------------


def _check_options(regularization: Regularization | float, systems: Systems | None) -> None:
    if isinstance(regularization, str) and regularization not in ("gcv", "none"):
        raise ValueError(f"regularization={regularization!r} is neither 'gcv', 'none' nor a number")
    if systems not in (None, "attention", "row_space", "both"):
        raise ValueError(f"systems={systems!r} is none of 'attention', 'row_space', 'both'")


def _only_by_default(regularization: Regularization | float, systems: Systems | None) -> None:
    if regularization != "gcv" or systems is not None:
        raise ValueError("regularization and systems are for one update; several rounds are solved in one way")


@dataclass(frozen=True)
class _Solution:
    """Patches X (n, p); the expected squared error of each unknown; the residual's norm; λ; and of
    the pixels' step the singular values and the number of unknowns a patch."""

    X: Tensor
    error: Tensor
    residual: Tensor
    damping: float
    patch_side: Tensor
    unknowns: int

    def mean_square_error(self, most: float) -> float:
        """Of the pixels; ``most`` where nothing is known. What was divided may well be off by more."""
        each = torch.where(self.error.isinf(), most, self.error)
        return min(float(each.mean()), most) if each.numel() else most


def _solve_in_two_steps(system: System) -> _Solution:
    """The paper's way: the tokens from Gᵀ Z = M, then the pixels from W_e x = z − E − b_e."""
    (tokens, d), p = system.G.shape, system.W_e.shape[1]
    # The tokens, (3.1), then the pixels, (3.2).
    Z = tokens_from(system.G, system.M)  # (t, d)
    X = patches_from(Z[system.prefix :], system.E[system.prefix :], system.W_e)  # (n, p)
    # What sticks out of the span of G's rows is noise, and every division enlarges it, (A1.7).
    residual = (system.M - system.G.T @ Z).norm()
    s, s_e = torch.linalg.svdvals(system.G_p), torch.linalg.svdvals(system.W_e)
    noise = residual**2 / max(d * (d - tokens), 1)
    # What is rounding beside the largest is left out.
    s = torch.where(s > torch.finfo(s.dtype).eps * d * s[0], s, 0.0)
    error = nn.functional.pad(noise / (s[:, None] * s_e[None]) ** 2, (0, p - len(s_e)), value=torch.inf)
    return _Solution(X, error, residual, 0.0, s_e, p)


def _solve_as_one(
    system: System, X0: Tensor, dW: Tensor, systems: Systems, regularization: Regularization | float, noise: float
) -> _Solution:
    """Both steps at once, Gᵀ (X − X₀) W_eᵀ = B, diagonal in the singular vectors, and damped there."""
    n, p = X0.shape
    # Deviations from grey, (A1.1), of all pixels or in the row space, (3.5), made diagonal, (A1.2).
    B = system.known(X0)
    # A flat picture of model input zero leaves no row space at all.
    by_rows = systems == "row_space" and bool(dW.any())
    basis = row_space_basis(dW, n, noise) if by_rows else torch.eye(p).to(X0)  # (p, r)
    parts = diagonal(system, B, basis)
    if systems == "both":
        parts = stack_rows(parts, system, dW, X0)
    # How much to damp, (A1.6), and the damped solution, (A1.3).
    damping = _damping(regularization, parts)
    X = X0 + parts.patches(damped(parts.a, parts.b, damping))  # (n, p)
    residual = (B - system.G_p.T @ (X - X0) @ system.W_e.T).norm()
    least = noise**2 * float(system.M.square().mean())
    return _Solution(X, remaining_error(parts, damping, least), residual, damping, parts.a.amax(0), basis.shape[1])


def _damping(regularization: Regularization | float, parts: Diagonal) -> float:
    """λ as asked for: given, none, or by cross-validation among 1e-3 to 1e-32 of the largest a²."""
    largest = float(parts.a.max() ** 2) if parts.a.numel() else 0.0
    if largest == 0:
        return 0.0
    if not isinstance(regularization, str):
        return float(regularization) * largest
    if regularization == "none":
        return 0.0
    candidates = [largest * 10 ** (-k / 4) for k in range(12, 129)]
    return choose_damping(parts.a, parts.b, parts.rest, parts.spare, candidates)


def _one_image(system: System, solution: _Solution, anatomy: Anatomy, reading: Reading) -> Condition:
    """The equations Gᵀ Z = M to spare, or the head."""
    d, tokens = len(system.M), len(system.G)
    residual = float(solution.residual / system.M.norm().clamp_min(_TINY))
    spare = Spare("GᵀZ = M", residual, max(d - tokens, 0), d, GAIN)
    return one_image(anatomy, reading.update, noise=reading.noise, system=spare)


def _evidence(
    system: System, solution: _Solution, systems: Systems, noise: float
) -> tuple[tuple[Condition, ...], dict[str, float | str]]:
    """The system's conditions, and the numbers for ``diagnostics``."""
    (d, p), tokens = system.W_e.shape, len(system.G)
    s = torch.linalg.svdvals(system.G)
    rank, rank_e = numerical_rank(s, noise), numerical_rank(solution.patch_side, noise)
    lost = max(p - d, 0) if systems == "attention" else 0
    determined = rank_e == solution.unknowns and lost == 0
    conditions = (
        Condition(
            "rank(∂l/∂E_pos) = n + 1", shown_if(rank == tokens), {"rank": rank, "tokens": tokens, "d": d},
            "rank {rank} of {tokens} ≤ d = {d}" if tokens <= d else "rank {rank} of {tokens} > d = {d}",
        ),
        Condition(
            "pixels determined", shown_if(determined),
            {"rank": rank_e, "unknowns": solution.unknowns, "p": p, "d": d},
            "rank {rank} for {unknowns} unknowns a patch (p = {p}, d = {d})",
        ),
    )  # fmt: skip
    return conditions, {
        "directions_lost": lost,
        "rank": rank,
        "condition": condition_number(s),
        "condition_patch_embedding": condition_number(solution.patch_side),
        "systems": systems,
        "damping": solution.damping,
        "residual": float(solution.residual / system.M.norm().clamp_min(_TINY)),
        "noise": noise,
    }
