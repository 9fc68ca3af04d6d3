"""The patch-embedding system: a ViT that shares its position embedding's gradient gives its patches.

Tokens are z_i = W_e x_i + b_e + E_i, so with G = ∂l/∂E (one row for each patch) the patch
embedding's gradient is

    ∂l/∂W_e = Σ_i (∂l/∂z_i) x_iᵀ = Gᵀ X,                                          (4.3)

a linear system for the patches X. Nothing about the blocks enters, nor the weights. Chapter 04
derives it. We know of no publication that reads the patches off these two gradients.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, dissect
from ...preprocessing import Preprocessing
from ...update import ClientUpdate
from ..evidence import one_image
from ..labels import labels_or_none
from ..result import AttackNotApplicable, Condition, Reconstruction, predicted_psnr, report
from .inputs import shared_gradients
from .linear_algebra import condition_number, numerical_rank, thin_svd

NEEDS = ("patch_weight", "position")

# Rounding in dW and G leaves a residual of some ε; noise or a second image leave far more.
_RESIDUAL_LIMIT = 1e3  # in units of ε


# --- The equations: tensors in, tensors out. G (n, d), dW = ∂l/∂W_e (d, p), X (n, p), Gᵀ = U diag(s


def solve_patches(dW: Tensor, U: Tensor, s: Tensor, Vt: Tensor) -> Tensor:
    """The patches X (n, p) with Gᵀ X = dW in the sense of least squares, (4.3).

    Examples
    --------
    >>> G, X = torch.eye(2, 3).double(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    >>> solve_patches(G.T @ X, *thin_svd(G.T)).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    return Vt.T @ ((U.T @ dW) / s[:, None])


def noise_variance(residual: Tensor, n: int, eps: float, scale: float) -> float:
    """Mean square error of an entry of dW, (4.8), from the residual (d, p) of d·p equations.

    There are n·p unknowns. At least that of rounding entries of root mean square ``scale`` once;
    nothing else where no equation is to spare.
    """
    d, p = residual.shape
    rounding = (eps * scale) ** 2
    return rounding if d <= n else max(float(residual.square().sum()) / ((d - n) * p), rounding)


def predicted_mse(noise: float, s: Tensor) -> float:
    """Expected mean square error of the patches in model-input space, (4.7)."""
    return noise * float((1 / s**2).mean())


# --- The attack -----------------------------------------------------------------------------------


def embedding_closed_form(
    model: nn.Module,
    update: ClientUpdate,
    *,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    labels: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Reconstruction:
    """Solve ``∂l/∂W_e = Gᵀ X`` for the patches of one private image.

    Needs the gradients of the patch embedding and of the position embedding, one image, and rank(G)
    = n ≤ d: independent gradients at the n patches (in architecture B n ≤ d − 1: only LayerNorms
    read the tokens, so every row of G sums to zero). Solved in float64 whatever the update's
    precision.

    Parameters
    ----------
    model : nn.Module
        Only its parts' names and shapes are used, not its weights.
    update : ClientUpdate
    anatomy : Anatomy, optional; default is ``dissect(model)``
    preprocessing : Preprocessing, optional; default is the model family's own
    labels : int64 Tensor of shape (1,), optional; if the attacker knows the label
    device : where to solve; default is where the update lies

    Returns
    -------
    Reconstruction
        With ``diagnostics``: ``rank``, ``condition`` of G, ``residual`` (relative).

    Raises
    ------
    AttackNotApplicable
        If a gradient is not shared, n > d, or G is zero.
    UpdateError
        If the update does not belong to the model, or a tensor that is read is not finite.
    """
    start = time.perf_counter()
    anatomy = anatomy or dissect(model)
    preprocessing = preprocessing or anatomy.preprocessing
    dW, G = _check(model, update, anatomy, device)
    (d, p), n, eps = dW.shape, len(G), torch.finfo(update.dtype).eps

    # The singular values of G tell rank, condition and error too. Below ε they are noise: (4.5).
    U, s, Vt = thin_svd(G.T)
    rank = numerical_rank(s, eps)
    s_used = s.clamp_min(eps * s[0])
    # The patches: Gᵀ X = ∂l/∂W_e, (4.3).
    X = solve_patches(dW, U, s_used, Vt)
    # What no X explains is noise, (4.8); it predicts the error with no original seen, (4.7).
    residual = dW - G.T @ X
    relative = float(residual.norm() / dW.norm())
    noise = noise_variance(residual, n, eps, float(dW.square().mean().sqrt()))
    predicted = predicted_psnr(predicted_mse(noise, s_used), preprocessing)

    fits = d == n or relative < _RESIDUAL_LIMIT * eps
    one = one_image(anatomy, update)
    conditions = (
        Condition("rank(G) = n", rank == n, {"rank": rank, "n": n, "d": d}, "rank {rank} of n = {n} ≤ d = {d}"),
        one,
        Condition(
            "∂W_e = GᵀX", fits, {"residual": relative, "dtype": str(update.dtype)},
            "relative residual {residual:.1e} in {dtype}",
        ),
    )  # fmt: skip
    return report(
        "embedding_closed_form",
        anatomy.tiling.images(X[None]),
        conditions=conditions,
        predicted_psnr=predicted,
        labels=labels_or_none(model, update, anatomy, labels, one=one),
        numbers={
            "patches": n, "width": d, "pixels_per_patch": p, "rank": rank, "condition": condition_number(s),
            "residual": relative,
        },
        dtype=update.dtype,
        preprocessing=preprocessing,
        start=start,
    )  # fmt: skip


def _check(
    model: nn.Module, update: ClientUpdate, anatomy: Anatomy, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """∂l/∂W_e (d, p) and G (n, d), or a refusal."""
    name = "embedding_closed_form"
    shared = shared_gradients(name, model, update, anatomy, NEEDS, device=device)
    dW = shared["patch_weight"].flatten(1)
    G = shared["position"][anatomy.position_prefix :]
    if len(G) > len(dW):
        raise AttackNotApplicable(
            name,
            f"{len(G)} patches, but gradients of width {len(dW)}: rank(G) = n needs n ≤ d",
            patches=len(G),
            width=len(dW),
        )
    if not G.any():
        raise AttackNotApplicable(
            name,
            "the position embedding's gradient is zero. A head that is still zero (torchvision initializes it so) "
            "passes no gradient down: such an update carries the label and nothing of the image",
        )
    return dW, G
