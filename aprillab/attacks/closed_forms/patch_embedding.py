"""The patch-embedding system: any ViT that shares its position embedding's gradient gives its patches away.

Tokens are z_i = W_e x_i + b_e + E_i, so with G = ∂l/∂E (one row for each patch) the patch embedding's gradient is

    ∂l/∂W_e = Σ_i (∂l/∂z_i) x_iᵀ = Gᵀ X,

a linear system for the patches X. Nothing about the blocks enters, nor the weights. Chapter 04 derives it. We
know of no publication that reads the patches off these two gradients.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from ...anatomy import Anatomy, dissect
from ...models import unpatchify
from ...preprocessing import Preprocessing
from ...update import ClientUpdate, check_update
from ..evidence import one_image
from ..labels import labels_or_none
from ..result import AttackNotApplicable, Condition, Reconstruction, predicted_psnr, report


def embedding_closed_form(
    model: nn.Module,
    update: ClientUpdate,
    *,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    labels: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> Reconstruction:
    """Solve ``∂l/∂W_e = Gᵀ X`` for the patches of one private image.

    Needs the gradients of the patch embedding and of the position embedding, one image, and
    rank(G) = n ≤ d: independent gradients at the n patches (in architecture B n ≤ d − 1: only LayerNorms read the
    tokens, so every row of G sums to zero). Solved in float64 whatever the update's precision.

    Parameters
    ----------
    model : nn.Module
        Only its parts' names and shapes are used, not its weights.
    update : ClientUpdate
    anatomy : Anatomy, optional
        Default is ``dissect(model)``.
    preprocessing : Preprocessing, optional
        Pixels to model input; default is the model family's own.
    labels : int64 Tensor of shape (1,), optional
        If the attacker knows the label; otherwise it is recovered.
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
        If the update does not belong to the model.
    """
    start = time.perf_counter()
    name = "embedding_closed_form"
    anatomy = anatomy or dissect(model)
    check_update(model, update)
    patch_gradient = update.gradients.get(anatomy.patch_weight)
    position_gradient = update.gradients.get(anatomy.position or "")
    if patch_gradient is None:
        raise AttackNotApplicable(name, f"the gradient of {anatomy.patch_weight} is not shared")
    if position_gradient is None:
        what = f"{anatomy.position} is fixed or withheld" if anatomy.position else "there is no position embedding"
        raise AttackNotApplicable(name, f"no position embedding gradient is shared: {what}")

    W = patch_gradient.to(device, torch.float64).flatten(1)  # (d, p)
    G = position_gradient.to(device, torch.float64).flatten(0, -2)[anatomy.position_prefix :]  # (n, d)
    (d, p), n = W.shape, len(G)
    if n > d:
        raise AttackNotApplicable(
            name, f"{n} patches, but gradients of width {d}: rank(G) = n needs n ≤ d", patches=n, width=d
        )
    if not G.any():
        raise AttackNotApplicable(
            name,
            "the position embedding's gradient is zero. A head that is still zero (torchvision initializes it so) "
            "passes no gradient down: such an update carries the label and nothing of the image",
        )

    # X = lstsq(Gᵀ, ∂l/∂W_e), by the singular values that also tell rank, condition and error.
    U, s, Vt = torch.linalg.svd(G.T, full_matrices=False)  # (d, n), (n,), (n, n)
    eps = torch.finfo(update.dtype).eps
    rank = int((s > eps * s[0]).sum())
    s_used = s.clamp_min(eps * s[0])
    X = Vt.T @ (U.T @ W / s_used[:, None])  # (n, p)

    # The residual is the noise of d·p equations less n·p unknowns: it predicts the error, with no original seen.
    residual = (W - G.T @ X).square().sum()
    rounding = (eps * W.square().mean().sqrt()) ** 2
    noise = torch.maximum(residual / ((d - n) * p), rounding) if d > n else rounding
    preprocessing = preprocessing or anatomy.preprocessing
    predicted = predicted_psnr(float(noise * (1 / s_used**2).mean()), preprocessing)

    relative = float(residual.sqrt() / W.norm())
    conditions = (
        Condition("rank(G) = n", rank == n, {"rank": rank, "n": n, "d": d}, "rank {rank} of n = {n} ≤ d = {d}"),
        one_image(anatomy, update),
        Condition(
            "∂W_e = GᵀX", d == n or relative < 1e3 * eps, {"residual": relative, "dtype": str(update.dtype)},
            "relative residual {residual:.1e} in {dtype}",
        ),
    )  # fmt: skip
    return report(
        name,
        unpatchify(X[None], patch_gradient.shape[-1], anatomy.image_size),
        conditions=conditions,
        predicted_psnr=predicted,
        labels=labels_or_none(model, update, anatomy, labels),
        numbers={
            "patches": n,
            "width": d,
            "pixels_per_patch": p,
            "rank": rank,
            "condition": float(s[0] / s[-1]) if s[-1] > 0 else float("inf"),
            "residual": relative,
        },
        dtype=update.dtype,
        preprocessing=preprocessing,
        start=start,
    )
