"""APRIL's closed form (Lu et al., CVPR 2022): the private image from the first attention's gradient.

In architecture A the first attention reads the tokens z themselves, and q, k, v are linear in them. The chain rule
then ties three shared things to the one unknown:

    (∂l/∂z) zᵀ = W_Qᵀ ∂l/∂W_Q + W_Kᵀ ∂l/∂W_K + W_Vᵀ ∂l/∂W_V,     ∂l/∂z = ∂l/∂E_pos.

Chapter 02 derives it and chapter 03 solves it. Tokens are rows here, so it reads Gᵀ Z = M, with G = ∂l/∂E_pos.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, dissect, tensors_of
from ...models import unpatchify
from ...preprocessing import Preprocessing
from ...update import ClientUpdate, check_update
from ..evidence import one_image
from ..labels import labels_or_none
from ..result import AttackNotApplicable, Condition, Reconstruction, predicted_psnr, report

Regularization = Literal["gcv", "none"]
Systems = Literal["attention", "row_space", "both"]


def attention_product(anatomy: Anatomy, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """M = W_Qᵀ ∂l/∂W_Q + W_Kᵀ ∂l/∂W_K + W_Vᵀ ∂l/∂W_V, (d, d) float64: the right side of APRIL's identity.

    Parameters
    ----------
    anatomy : Anatomy
    weights, gradients : tensors by name, the model's and the update's

    Returns
    -------
    Tensor of shape (d, d), float64, equal to (∂l/∂z) zᵀ where the attention reads z
    """
    product = torch.zeros(())
    for rows in (anatomy.query, anatomy.key, anatomy.value):
        assert rows is not None
        weight, gradient = rows.of(weights), rows.of(gradients)
        assert weight is not None
        assert gradient is not None
        product = product.to(gradient.device) + weight.to(gradient.device, torch.float64).T @ gradient.double()
    return product


def april_closed_form(
    model: nn.Module,
    update: ClientUpdate,
    *,
    regularization: Regularization | float = "gcv",
    systems: Systems | None = None,
    prior_pixel: float = 0.5,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    labels: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Reconstruction:
    """Solve APRIL's identity for the tokens, and the patch embedding for the pixels, of one private image.

    Needs architecture A, the gradients of the position embedding and of the first attention's projections, one
    image, rank(∂l/∂E_pos) = n + 1 ≤ d for the tokens and rank(W_e) = p ≤ d for the pixels.

    Both steps are one linear system for the patches X, Gᵀ X W_eᵀ = M − Gᵀ(E + b_e), which the singular values of G
    and of W_e make diagonal. Each component is divided by s_i·D_j, some of them tiny: the gradient's rounding errors
    grow by as much, unless the division is damped.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate
    regularization : {"gcv", "none"} or float
        ``"none"`` solves as it stands, in the paper's two steps. ``"gcv"`` damps by Tikhonov's filter around a
        flat picture, as strongly as generalized cross-validation says, which sees no original. A number is
        the damping λ itself, relative to the largest s²D².
    systems : {"attention", "row_space", "both"}, optional
        ``"attention"`` is APRIL's identity alone. ``"row_space"`` looks for the patches in the row space of
        ∂l/∂W_e, of rank n, which determines them where p > d loses pixels. ``"both"`` stacks ∂l/∂W_e = Gᵀ X below
        (see ``embedding_closed_form``). Default: ``"attention"`` where p ≤ d,
        else ``"row_space"``.
    prior_pixel : float
        The flat picture, a grey level in [0, 1].
    anatomy, preprocessing, labels, device
        As in :func:`~aprillab.attacks.closed_forms.patch_embedding.embedding_closed_form`.

    Returns
    -------
    Reconstruction
        With ``diagnostics``: ranks and condition numbers of G and W_e, the damping, ``pixels_lost`` for each
        patch (p − d, where the second step alone cannot know them), ``residual``, ``predicted_psnr``.

    Raises
    ------
    AttackNotApplicable
        If the model is not of architecture A, a gradient is missing, n + prefix > d, or G is zero.
    UpdateError
        If the update does not belong to the model.
    ValueError
        If ``regularization`` or ``systems`` is unknown.
    """
    start = time.perf_counter()
    name = "april_closed_form"
    if isinstance(regularization, str) and regularization not in ("gcv", "none"):
        raise ValueError(f"regularization={regularization!r} is neither 'gcv', 'none' nor a number")
    if systems not in (None, "attention", "row_space", "both"):
        raise ValueError(f"systems={systems!r} is none of 'attention', 'row_space', 'both'")
    anatomy = anatomy or dissect(model)
    preprocessing = preprocessing or anatomy.preprocessing
    check_update(model, update)
    _check_applies(name, anatomy, update)
    weights = {key: tensor.to(device) for key, tensor in tensors_of(model).items()}
    gradients = update.to(device).gradients

    M = attention_product(anatomy, weights, gradients)  # (d, d) = Gᵀ Z
    G = gradients[anatomy.position].to(torch.float64).flatten(0, -2)  # type: ignore[index]  # (n + 1, d)
    E = weights[anatomy.position].to(G).flatten(0, -2).clone()  # type: ignore[index]  # (n + 1, d)
    W_e = weights[anatomy.patch_weight].to(G).flatten(1)  # (d, p)
    prefix = anatomy.position_prefix
    if anatomy.prefix:
        E[:prefix] += torch.cat([weights[token].to(G).flatten(0, -2) for token in anatomy.prefix])
    if anatomy.patch_bias is not None:
        E[prefix:] += weights[anatomy.patch_bias].to(G)
    tokens, (d, p), C = len(G), W_e.shape, weights[anatomy.patch_weight].shape[1]
    n = tokens - prefix
    if tokens > d:
        raise AttackNotApplicable(
            name, f"{tokens} tokens, but gradients of width {d}: rank(∂l/∂E_pos) = n + 1 needs n + 1 ≤ d",
            tokens=tokens, width=d,
        )  # fmt: skip
    if not G.any():
        raise AttackNotApplicable(name, "the position embedding's gradient is zero: the head passes nothing down")
    systems = systems or ("attention" if p <= d else "row_space")
    eps = torch.finfo(update.dtype).eps
    if regularization == "none" and systems == "attention":
        found = _two_steps(M, G, E, W_e, prefix)
    else:
        grey = preprocessing.to_input(torch.full((1, C, 1, 1), prior_pixel).to(G)).flatten()
        X0 = grey.repeat_interleave(p // C).expand(n, p)  # (n, p)
        shared = gradients.get(anatomy.patch_weight)
        if shared is None and systems != "attention":
            raise AttackNotApplicable(name, f'systems="{systems}" needs the gradient of {anatomy.patch_weight}')
        patch_gradient = torch.zeros_like(W_e) if shared is None else shared.to(G).flatten(1)  # (d, p)
        found = _one_system(M, G, E, W_e, prefix, X0, patch_gradient, systems, regularization, eps)

    spread = (
        1 / 12 / sum(std**2 for std in preprocessing.std) * len(preprocessing.std)
    )  # of pixels nothing is known of
    predicted = predicted_psnr(float(found.error.clamp_max(spread).mean()), preprocessing)
    singular = torch.linalg.svdvals(G)
    rank, rank_e = _rank(singular, eps), _rank(found.patch_side, eps)
    relative = float(found.residual / M.norm())
    lost = max(p - d, 0) if systems == "attention" else 0
    conditions = (
        Condition(
            "rank(∂l/∂E_pos) = n + 1", rank == tokens, {"rank": rank, "tokens": tokens, "d": d},
            "rank {rank} of {tokens} ≤ d = {d}",
        ),
        Condition(
            "pixels determined", rank_e == found.unknowns and lost == 0,
            {"rank": rank_e, "unknowns": found.unknowns, "p": p, "d": d},
            "rank {rank} for {unknowns} unknowns a patch (p = {p}, d = {d})",
        ),
        one_image(anatomy, update),
        Condition(
            "GᵀZ = M", tokens == d or relative < 1e4 * eps, {"residual": relative, "dtype": str(update.dtype)},
            "relative residual {residual:.1e} in {dtype}",
        ),
    )  # fmt: skip
    return report(
        name,
        unpatchify(found.X[None], weights[anatomy.patch_weight].shape[-1], anatomy.image_size),
        conditions=conditions,
        predicted_psnr=predicted,
        labels=labels_or_none(model, update, anatomy, labels),
        numbers={
            "patches": n,
            "width": d,
            "pixels_per_patch": p,
            "pixels_lost": lost,
            "rank": rank,
            "condition": _condition(singular),
            "condition_patch_embedding": _condition(found.patch_side),
            "systems": systems,
            "regularization": regularization,
            "damping": found.damping,
            "residual": relative,
        },
        dtype=update.dtype,
        preprocessing=preprocessing,
        start=start,
    )


def _check_applies(name: str, anatomy: Anatomy, update: ClientUpdate) -> None:
    """Refuse what is not architecture A, or lacks a gradient the identity needs."""
    if anatomy.first_block != "april":
        between = "a LayerNorm" if anatomy.norm_weight else "something other than a plain attention"
        raise AttackNotApplicable(
            name,
            f"the first attention does not read the tokens themselves: {between} and a residual stand between "
            f'(first_block="{anatomy.first_block}"), so ∂l/∂E_pos is not the gradient at its input',
            first_block=anatomy.first_block,
        )
    needed: dict[str, str | None] = {"position embedding": anatomy.position, "patch embedding": anatomy.patch_weight}
    needed |= {part: rows.name if (rows := getattr(anatomy, part)) else None for part in ("query", "key", "value")}
    for part, tensor in needed.items():
        if tensor is None:
            raise AttackNotApplicable(name, f"the model has no {part} that dissect() knows of")
        if tensor not in update.gradients and part != "patch embedding":
            raise AttackNotApplicable(name, f"the gradient of the {part} ({tensor}) is not shared")


def _driver(tensor: Tensor) -> str:
    """LAPACK's SVD-based least squares on a CPU; CUDA has only the QR-based one."""
    return "gelsd" if tensor.device.type == "cpu" else "gels"


@dataclass(frozen=True)
class _Solution:
    """Patches X (n, p); the predicted squared error of each unknown; the residual's norm; λ; and of the pixels' step
    the singular values and the number of unknowns a patch."""

    X: Tensor
    error: Tensor
    residual: Tensor
    damping: float
    patch_side: Tensor
    unknowns: int


def _two_steps(M: Tensor, G: Tensor, E: Tensor, W_e: Tensor, prefix: int) -> _Solution:
    """The paper's way: the tokens from Gᵀ Z = M, then the pixels from W_e x = z − E − b_e."""
    (tokens, d), p = G.shape, W_e.shape[1]
    Z = torch.linalg.lstsq(G.T, M, driver=_driver(G)).solution  # (tokens, d)
    X = torch.linalg.lstsq(W_e, (Z - E)[prefix:].T, driver=_driver(G)).solution.T  # (n, p)
    residual = (M - G.T @ Z).norm()
    S, D = torch.linalg.svdvals(G)[: tokens - prefix], torch.linalg.svdvals(W_e)
    noise = residual**2 / max(d * (d - tokens), 1)
    error = nn.functional.pad(noise / (S[:, None] * D[None]) ** 2, (0, p - len(D)), value=torch.inf)
    return _Solution(X, error, residual, 0.0, D, p)


def _one_system(
    M: Tensor, G: Tensor, E: Tensor, W_e: Tensor, prefix: int, X0: Tensor, patch_gradient: Tensor,
    systems: Systems, regularization: Regularization | float, eps: float,
) -> _Solution:  # fmt: skip
    """Both steps at once, Gᵀ (X − X₀) W_eᵀ = B, diagonal in the singular vectors of G and W_e, and damped there."""
    n, (d, p), tiny = len(X0), W_e.shape, torch.finfo(torch.float64).tiny
    Gp = G[prefix:]  # (n, d)
    B = M - G.T @ E - Gp.T @ X0 @ W_e.T  # (d, d)
    basis = _row_space(patch_gradient, n, eps) if systems == "row_space" else torch.eye(p).to(G)  # (p, r)
    r = basis.shape[1]
    U, S, Vt = torch.linalg.svd(Gp.T, full_matrices=False)  # (d, n), (n,), (n, n)
    P, D, Qt = torch.linalg.svd(W_e @ basis, full_matrices=r > d)  # (d, min(d, r)), (min(d, r),), (r, r)
    unseen = (0, r - len(D))  # directions of a patch that W_e does not see, where r > d
    P, D = nn.functional.pad(P, unseen), nn.functional.pad(D, unseen)  # (d, r), (r,)
    a, b = S[:, None] * D[None], U.T @ B @ P  # a ∘ Y = b, both (n, r)
    rest, spare = (B - U @ b @ P.T).square().sum(), d * d - b.numel()  # what no X explains: noise
    noise = rest / max(spare, 1)
    if systems == "both":  # and S ∘ Y = F, scaled to the same noise
        F = U.T @ (patch_gradient - Gp.T @ X0) @ Qt.T
        noise_f = (patch_gradient - U @ (U.T @ patch_gradient)).square().sum() / max(p * (d - n), 1)
        scale = (noise / noise_f.clamp_min(tiny)).sqrt()
        a, b = _stack(a, b, scale * S[:, None].expand_as(a), scale * F)
    damping = _damping(regularization, a, b, float(rest), spare)
    Y = a * b / (a**2 + damping).clamp_min(tiny)  # (n, r)
    X = X0 + Vt.T @ Y @ Qt @ basis.T  # (n, p)
    unused = damping / (a**2 + damping).clamp_min(tiny)
    if float(unused.square().sum()) > 1:  # enough equations were left unused to see the noise among them too
        noise = torch.maximum(noise, (unused * b).square().sum() / unused.square().sum())
    residual = (B - Gp.T @ (X - X0) @ W_e.T).norm()
    error = torch.where(a > 0, noise / (a**2 + damping).clamp_min(tiny), torch.inf)
    return _Solution(X, error, residual, damping, a.amax(0), r)


def _rank(singular_values: Tensor, eps: float) -> int:
    return int((singular_values > eps * singular_values.max()).sum())


def _condition(singular_values: Tensor) -> float:
    least = float(singular_values.min())
    return float(singular_values.max()) / least if least > 0 else float("inf")


def _row_space(patch_gradient: Tensor, n: int, eps: float) -> Tensor:
    """Orthonormal basis (p, r) of the row space of ∂l/∂W_e, r ≤ n: the patches lie in it."""
    s, Vt = torch.linalg.svd(patch_gradient, full_matrices=False)[1:]
    return Vt[: min(n, int((s > eps * s[0]).sum()))].T


def _stack(a: Tensor, b: Tensor, c: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """The two equations a·x = b and c·x = f, of equal noise, as one: √(a² + c²)·x = (a·b + c·f)/√(a² + c²)."""
    both = (a**2 + c**2).sqrt()
    return both, (a * b + c * f) / both.clamp_min(torch.finfo(torch.float64).tiny)


def _damping(regularization: Regularization | float, a: Tensor, b: Tensor, rest: float, spare: int) -> float:
    """Tikhonov's λ in x = a b / (a² + λ): given, none, or the minimum of generalized cross-validation.

    Generalized cross-validation (Golub, Heath & Wahba, 1979) asks how well each equation is predicted by the
    others: V(λ) = (Σ ((1 − φ) b)² + rest) / (Σ (1 − φ) + spare)², with the filter φ = a² / (a² + λ), and ``rest`` the
    squared residual of the ``spare`` equations that no x can meet.
    """
    largest = float(a.max() ** 2)
    if not isinstance(regularization, str):
        return float(regularization) * largest
    if regularization == "none":
        return 0.0

    def score(damping: float) -> float:
        unused = damping / (a**2 + damping)
        return float((unused * b).square().sum() + rest) / float(unused.sum() + spare) ** 2

    return min((largest * 10 ** (-k / 4) for k in range(12, 129)), key=score)
