"""The span attack: patches from the span of the first attention's gradient, the position embedding's withheld.

The gradients of W_Q, W_K, W_V are sums over tokens of (something) u_iᵀ, with u_i the token as the attention reads
it: their rows D lie in span{u_0 … u_n}, and wherever that span is smaller than the width, it is known from D. In
architecture B, u_i = γ ∘ (C z_i)/σ_i + β with C = I − 11ᵀ/d, so C z_i lies in the span of the rows of D/γ and of β/γ:

    C (W_e x_i + b_e + E_i) = (D/γ)ᵀ c_i (+ t β/γ)        for some coefficients c_i.

In architecture A the same holds without C, γ and β. Likewise x_i = (∂l/∂W_e)ᵀ c'_i, for the patch embedding reads
the patches. W_e, b_e and E_i are known to the server, so both are linear in the pixels of patch i alone. Chapter 07
derives it. We know of no publication that attacks a ViT this way; the nearest are DAGER (Petrov et al., NeurIPS
2024, arXiv 2405.15586) and TIGER (arXiv 2606.18312), both for text.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, dissect, tensors_of
from ...metrics import EXACT_TO_8_BITS_DB
from ...models import unpatchify
from ...preprocessing import Preprocessing
from ...update import ClientUpdate, check_update
from ..evidence import one_image
from ..labels import labels_or_none
from ..result import AttackNotApplicable, Condition, Reconstruction, predicted_psnr, report

# Measured on 2 430 attacks (data/results/conditioning.csv): near the verdict, the error predicted from the minimum
# of the least squares was too small by at most this.
_MARGIN_DB = 7.0


def span_closed_form(
    model: nn.Module,
    update: ClientUpdate,
    *,
    strict: bool = True,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    labels: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Reconstruction:
    """Find, patch by patch, the pixels whose token is the smallest combination of the gradient's rows.

    In exact arithmetic the span is a subspace and the pixels are the one solution in it. In finite precision D
    is a noisy matrix, and a token that needs large coefficients c_i carries an error as large; so the attack
    minimizes ‖c_i‖² + r² ‖c'_i‖² over the pixels, one least-squares problem with the same matrix for all patches.
    Rows of D are first scaled to equal noise, which the singular vectors beyond the tokens' number measure.

    Needs the gradients of the first attention's projections and of the patch embedding, the position
    embedding's *values* (public: it is part of the model), one image, and enough width:
    min(p, n) + tokens (+ 1 for the LayerNorm's mean) ≤ d, features with γ = 0 not counted. The E_i + b_e must be
    independent modulo the image of W_e, to the gradient's precision; sinusoids are not, in float32.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate
    strict : bool
        Refuse where the width does not suffice; False returns the smallest solution, marked not exact.
    anatomy, preprocessing, labels, device
        As in :func:`~aprillab.attacks.closed_forms.patch_embedding.embedding_closed_form`.

    Returns
    -------
    Reconstruction
        With ``diagnostics``: ``tokens``, ``width_needed``, ``tokens_above_noise`` (numerical rank of D),
        ``gap`` (the last token's singular value over the largest of the noise).

    Raises
    ------
    AttackNotApplicable
        If a gradient is not shared, the first block is unknown, there is no position embedding, or the width
        does not suffice.
    UpdateError
        If the update does not belong to the model.
    """
    start = time.perf_counter()
    anatomy = anatomy or dissect(model)
    preprocessing = preprocessing or anatomy.preprocessing
    solution = solve_span(model, update, anatomy=anatomy, strict=strict, device=device)
    predicted = predicted_psnr(solution.mean_square_error, preprocessing)
    span, eps = solution.token_side, torch.finfo(update.dtype).eps
    conditions = (
        Condition(
            "enough width", solution.width_needed <= solution.usable_width,
            {"needed": solution.width_needed, "usable": solution.usable_width}, "{needed} needed of {usable}",
        ),
        one_image(anatomy, update),
        Condition(
            "no more directions than tokens", span.excess < 1e3 * eps,
            {"excess": span.excess, "tokens": span.tokens, "dtype": str(update.dtype)},
            "{excess:.1e} of the gradient lies outside {tokens} directions, in {dtype}",
        ),
        Condition(
            "tokens stand out from the noise", span.gap > 2, {"gap": span.gap},
            "the weakest token's singular value is {gap:.1f} times the strongest of the noise",
        ),
        Condition(
            "margin", not 0 <= predicted - EXACT_TO_8_BITS_DB < _MARGIN_DB,
            {"predicted": predicted, "margin": _MARGIN_DB},
            "predicted {predicted:.1f} dB, which can be too optimistic by up to {margin:.0f} dB",
        ),
    )  # fmt: skip
    return report(
        "span_closed_form",
        solution.images,
        conditions=conditions,
        predicted_psnr=predicted,
        labels=labels_or_none(model, update, anatomy, labels),
        numbers=solution.numbers,
        dtype=update.dtype,
        preprocessing=preprocessing,
        start=start,
    )


@dataclass(frozen=True)
class SpanSolution:
    """What the span says of the patches: the most probable ones, and how uncertain each direction is.

    Attributes
    ----------
    patches : Tensor (p, n), in model-input space
    root : Tensor (p, p)
        H, with (HᵀH)⁻¹ · ``variance`` the covariance of a patch's error; it is the same for all patches.
    variance : float
    patch_size, image_size : in pixels
    token_side : the noisy span of the tokens
    width_needed, usable_width : int
    numbers : dict, for ``diagnostics``
    """

    patches: Tensor
    root: Tensor
    variance: float
    patch_size: int
    image_size: tuple[int, int]
    token_side: _Span
    width_needed: int
    usable_width: int
    numbers: dict[str, float]

    @property
    def images(self) -> Tensor:
        """(1, C, H, W)"""
        return unpatchify(self.patches.T[None], self.patch_size, self.image_size)

    @property
    def mean_square_error(self) -> float:
        """Of the pixels, in model-input space, as least squares predicts it from its own minimum.

        Where the problem is so ill-conditioned that the minimum itself shrinks, this is too optimistic.
        """
        inverse = torch.linalg.solve_triangular(self.root, torch.eye(len(self.root)).to(self.root), upper=True)
        return float(self.variance * inverse.square().sum() / len(self.root))

    def directions(self) -> tuple[Tensor, Tensor]:
        """Orthonormal directions in a patch, in rows (p, p), and the standard deviation of the error in each (p,)."""
        s, Vt = torch.linalg.svd(self.root)[1:]
        return Vt, self.variance**0.5 / s.clamp_min(torch.finfo(s.dtype).tiny)


def solve_span(
    model: nn.Module,
    update: ClientUpdate,
    *,
    anatomy: Anatomy,
    batch_size: int = 1,
    strict: bool = True,
    device: torch.device | str | None = None,
) -> SpanSolution:
    """The linear algebra of the span attack, for one image or for a batch.

    With B images the span has the B·n + 1 directions of all their tokens, and a patch is known up to combinations of
    the differences between the images at each place: (B − 1)·n directions of p are open, and the rest is known and
    the same for all images of the batch but for these.

    Raises
    ------
    AttackNotApplicable
        As :func:`span_closed_form`.
    """
    name = "span_closed_form"
    check_update(model, update)
    _check_applies(name, anatomy, update)
    weights = {key: tensor.to(device) for key, tensor in tensors_of(model).items()}
    gradients = update.to(device).gradients
    eps = torch.finfo(update.dtype).eps

    patch_gradient = gradients[anatomy.patch_weight].double().flatten(1)  # (d, p)
    D = torch.cat([rows.of(gradients).double() for rows in _projections(anatomy)])  # (3d, d)
    A, e = _embedding(anatomy, weights)  # (d, p), (d, n): a token is A x_i + e_i
    prenorm = anatomy.first_block == "prenorm"
    beta = torch.zeros_like(A[:, 0])
    if prenorm:
        A, e = A - A.mean(0), e - e.mean(0)  # C z_i
        D, A, e, beta = _undo_layernorm(anatomy, weights, D, A, e)
    (width, p), n = A.shape, e.shape[1]
    d = patch_gradient.shape[0]
    tokens = batch_size * n + anatomy.position_prefix + _extra_prefix(anatomy, weights)
    usable = width + bool(beta.any())  # the direction of β/γ was projected out, and with it the mean's
    unknowns = min(p, batch_size * n)
    needed = unknowns + tokens + prenorm
    if batch_size > 1:
        needed -= (batch_size - 1) * n  # directions that no width would close
    if strict and needed > usable:
        raise AttackNotApplicable(
            name,
            f"min(p, n) + tokens{' + 1' if prenorm else ''} = {needed} > {usable} = d: "
            f"the span of {tokens} tokens leaves {width - tokens} equations for {unknowns} unknowns a patch",
            width_needed=needed,
            width=usable,
        )
    if not D.any() or not patch_gradient.any():
        raise AttackNotApplicable(name, "the first attention's gradient is zero: the head passes nothing down")

    token_side = _noisy_span(D, tokens, eps)
    pixel_side = _noisy_span(patch_gradient, batch_size * n, eps)
    T, t = token_side.coefficients(A), token_side.coefficients(e)  # ‖T x + t‖ = ‖c‖
    R = pixel_side.coefficients(torch.eye(p).to(A))  # ‖R x‖ = ‖c'‖
    X, _ = _smallest(T, t, R, 1.0)
    # Both kinds of coefficient estimate the same amplification of noise: a second solve brings them to one scale.
    c, c_pixel = (T @ X + t).square().sum(0), (R @ X).square().sum(0)  # (n,), (n,)
    ratio = float((c / c_pixel.clamp_min(1e-300)).median().sqrt())
    X, H = _smallest(T, t, R, ratio)  # (p, n)
    objective = (T @ X + t).square().sum(0) + ratio**2 * (R @ X).square().sum(0)  # (n,)
    return SpanSolution(
        patches=X,
        root=H,
        # What is left of the objective, over the equations to spare, is the variance of one coefficient.
        variance=float(objective.mean()) / max(len(T) + len(R) - p, 1),
        patch_size=weights[anatomy.patch_weight].shape[-1],
        image_size=anatomy.image_size,
        token_side=token_side,
        width_needed=needed,
        usable_width=usable,
        numbers={
            "patches": n,
            "tokens": tokens,
            "width": d,
            "usable_width": usable,
            "width_needed": needed,
            "pixels_per_patch": p,
            "tokens_above_noise": token_side.above_noise,
            "gap": token_side.gap,
            "outside": token_side.excess,
            "ratio": ratio,
        },
    )


@dataclass(frozen=True)
class _Span:
    """The row space of a noisy gradient whose rows were scaled to noise of variance 1.

    ``s`` (k,) and ``Vt`` (k, k) are its singular values and right singular vectors, ``floor`` the least singular
    value that pure noise of this shape has.
    """

    s: Tensor
    Vt: Tensor
    floor: float
    tokens: int
    excess: float

    @property
    def damped(self) -> Tensor:
        return (self.s**2 + self.floor**2).sqrt()

    @property
    def gap(self) -> float:
        """The last token's singular value over the first one beyond the tokens."""
        if len(self.s) <= self.tokens:
            return 1.0
        return float(self.s[self.tokens - 1] / self.s[self.tokens].clamp_min(1e-300))

    @property
    def above_noise(self) -> int:
        beyond = self.s[self.tokens] if len(self.s) > self.tokens else self.s[-1]
        return int((self.s > 2 * beyond).sum())

    def coefficients(self, targets: Tensor) -> Tensor:
        """Columns whose norms are those of the smallest c with Dᵀ c ≈ target, for targets in columns (k, m)."""
        return (self.Vt @ targets) / self.damped[:, None]


def _noisy_span(D: Tensor, tokens: int, eps: float) -> _Span:
    """Scale the rows of D (m, k) to equal noise and decompose.

    The noise of a row is measured where no token can be: in the right singular vectors beyond the first ``tokens``.
    """
    rows, k = D.shape
    norms = D.norm(dim=1)
    D = D[norms > 0] / norms[norms > 0, None]
    Vt = torch.linalg.svd(D, full_matrices=len(D) < k)[2]
    if k > tokens:
        beyond = (D @ Vt[tokens:].T).square().mean(1).sqrt()
        excess = float(beyond.square().mean().sqrt() * (k - tokens) ** 0.5)
        noise = beyond.clamp_min(max(0.1 * float(beyond.median()), 1e-3 * eps / k**0.5))
    else:
        excess, noise = 0.0, torch.full_like(norms[norms > 0], eps)
    D = D / noise[:, None]
    s, Vt = torch.linalg.svd(D, full_matrices=len(D) < k)[1:]
    s = torch.cat([s, s.new_zeros(k - len(s))])
    # Bai and Yin: noise of variance 1 in m × k numbers has no singular value below √m − √k.
    return _Span(s, Vt, max(rows**0.5 - k**0.5, 1.0), tokens, excess)


def _smallest(T: Tensor, t: Tensor, R: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """The pixels X (p, n) that minimize ‖T x + t‖² + ratio² ‖R x‖², and a factor H (p, p) with HᵀH the normal matrix.

    By QR and not by the normal equations, whose condition is the square.
    """
    stacked = torch.cat([T, ratio * R])
    Q, H = torch.linalg.qr(stacked)
    right = Q[: len(T)].T @ -t
    return torch.linalg.solve_triangular(H, right, upper=True), H


def _projections(anatomy: Anatomy) -> list:
    return [rows for rows in (anatomy.query, anatomy.key, anatomy.value) if rows is not None]


def _embedding(anatomy: Anatomy, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """W_e (d, p) and b_e + E_i as columns (d, n), float64."""
    W_e = weights[anatomy.patch_weight].double().flatten(1)
    E = weights[anatomy.position].double().flatten(0, -2)[anatomy.position_prefix :]  # type: ignore[index]
    if anatomy.patch_bias is not None:
        E = E + weights[anatomy.patch_bias].double()
    return W_e, E.T


def _extra_prefix(anatomy: Anatomy, weights: dict[str, Tensor]) -> int:
    """Tokens before the patches that have no position of their own (timm's ``no_embed_class``)."""
    prefix = sum(weights[token].flatten(0, -2).shape[0] for token in anatomy.prefix)
    return max(prefix - anatomy.position_prefix, 0)


def _undo_layernorm(
    anatomy: Anatomy, weights: dict[str, Tensor], D: Tensor, A: Tensor, e: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divide the rows of D by γ and project β/γ out of D, A and e.

    Features whose γ is (nearly) zero carry nothing to the attention: they are left out, which costs their width.
    """
    gamma = weights[anatomy.norm_weight].double() if anatomy.norm_weight else torch.ones(len(A)).to(A)
    beta = weights[anatomy.norm_bias].double() if anatomy.norm_bias else torch.zeros_like(gamma)
    alive = gamma.abs() > 1e-3 * gamma.abs().median()
    D, A, e = D[:, alive] / gamma[alive], A[alive], e[alive]
    shift = beta[alive] / gamma[alive]
    if shift.any():
        # An orthonormal basis of what is orthogonal to β/γ: the last columns of a complete QR.
        basis = torch.linalg.qr(shift[:, None], mode="complete").Q[:, 1:]  # (d, d − 1)
        D, A, e = D @ basis, basis.T @ A, basis.T @ e
    return D, A, e, shift


def _check_applies(name: str, anatomy: Anatomy, update: ClientUpdate) -> None:
    if anatomy.first_block not in ("april", "prenorm"):
        raise AttackNotApplicable(
            name,
            "what stands before the first attention is neither nothing (architecture A) nor one LayerNorm "
            f'(architecture B): first_block="{anatomy.first_block}"',
        )
    if anatomy.position is None:
        raise AttackNotApplicable(
            name,
            "without a position embedding every patch obeys the same equations: nothing tells the patches apart, and "
            "x = 0 solves them all when there is no bias",
        )
    needed: dict[str, str | None] = {"patch embedding": anatomy.patch_weight}
    needed |= {part: rows.name if (rows := getattr(anatomy, part)) else None for part in ("query", "key", "value")}
    for part, tensor in needed.items():
        if tensor is None or tensor not in update.gradients:
            raise AttackNotApplicable(name, f"the gradient of the {part} ({tensor}) is not shared")
