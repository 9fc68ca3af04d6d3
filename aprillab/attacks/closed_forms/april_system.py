"""What APRIL's closed form reads of a model and an update: the two systems (3.1) and (3.2),
checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, Tiling, position_values, tensors_of
from ...update import ClientUpdate
from ..result import AttackNotApplicable
from .attention_identity import attention_product
from .inputs import shared_gradients

NEEDS = ("position", "query", "key", "value")

Systems = Literal["attention", "row_space", "both"]

# M sums three products of weights and gradients that nearly cancel: noise is that much larger in it.
GAIN = 10.0
# Of the pictures in data/results/fuzz.csv that are predicted between 59 and 75 dB, the worst has
# 11.9 dB less: the noise of G itself is not in the prediction.
MARGIN_DB = 12.0


@dataclass(frozen=True)
class System:
    """What the attack reads: M (d, d), G (t, d), E (t, d) with what is added, W_e (d, p), float64.

    The first ``prefix`` of the t tokens are no patches. ``tiling`` says how a picture is cut into
    patches.
    """

    M: Tensor
    G: Tensor
    E: Tensor
    W_e: Tensor
    prefix: int
    tiling: Tiling

    @property
    def G_p(self) -> Tensor:
        """The patches' rows of G, (n, d)."""
        return self.G[self.prefix :]

    def known(self, X0: Tensor) -> Tensor:
        """B (d, d) of (A1.1), the right side for deviations from the picture X₀ (n, p)."""
        return self.M - self.G.T @ self.E - self.G_p.T @ X0 @ self.W_e.T


def read_system(
    model: nn.Module | Mapping[str, Tensor],
    update: ClientUpdate,
    anatomy: Anatomy,
    *,
    strict: bool = True,
    device: torch.device | str | None = None,
) -> System:
    """The system of a model of architecture A whose update has what the identity needs, or a
    refusal. In place of the model, its tensors by name will do.
    """
    name = "april_closed_form"
    if anatomy.first_block != "april":
        between = "a LayerNorm" if anatomy.norm_weight else "something other than a plain attention"
        raise AttackNotApplicable(
            name,
            f"the first attention does not read the tokens themselves: {between} and a residual stand between "
            f'(first_block="{anatomy.first_block}"), so ∂l/∂E_pos is not the gradient at its input',
            first_block=anatomy.first_block,
        )
    shared = shared_gradients(name, update, anatomy, NEEDS, device=device)
    weights = {key: tensor.to(device) for key, tensor in _tensors(model).items()}
    M = attention_product(anatomy, weights, update.to(device).gradients)  # (d, d)
    G = shared["position"]  # (t, d)
    if len(G) > len(M) and strict:
        raise AttackNotApplicable(
            name,
            f"{len(G)} tokens, but gradients of width {len(M)}: rank(∂l/∂E_pos) = n + 1 needs n + 1 ≤ d. "
            "strict=False returns what is known, damped",
            tokens=len(G),
            width=len(M),
        )
    if not G.any():
        raise AttackNotApplicable(
            name, "the position embedding's gradient is zero: it may be frozen, or the head passes nothing down"
        )
    E = position_values(anatomy, weights).to(G, copy=True)  # (t, d)
    if anatomy.prefix:
        tokens = torch.cat([weights[token].to(G).reshape(-1, E.shape[1]) for token in anatomy.prefix])
        E[: anatomy.position_prefix] += tokens
    if anatomy.patch_bias is not None:
        E[anatomy.position_prefix :] += weights[anatomy.patch_bias].to(G)
    W_e = weights[anatomy.patch_weight].to(G).flatten(1)  # (d, p)
    return System(M, G, E, W_e, anatomy.position_prefix, anatomy.tiling)


def _tensors(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return tensors_of(model) if isinstance(model, nn.Module) else model


def patch_gradient(update: ClientUpdate, anatomy: Anatomy, systems: Systems, *, like: Tensor) -> Tensor:
    """∂l/∂W_e (d, p); zero-sized where the attention's system alone is solved."""
    if systems == "attention":
        return like.new_zeros(0, 0)
    shared = update.gradients.get(anatomy.patch_weight)
    if shared is None:
        raise AttackNotApplicable(
            "april_closed_form", f'systems="{systems}" needs the gradient of {anatomy.patch_weight}'
        )
    return shared.to(like).flatten(1)
