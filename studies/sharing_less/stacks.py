"""Several rounds of one picture: played, and the span's systems stacked and solved once, to confirm counts with.

Where the embeddings are trained each round's W_e and E make other equations of the same pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.anatomy import tensors_of
from aprillab.attacks.closed_forms.noisy_span import noisy_span
from aprillab.attacks.closed_forms.smallest import smallest
from aprillab.attacks.closed_forms.span_rounds import equations_of
from aprillab.attacks.closed_forms.span_width import extra_prefix

RATE = 0.1  # of the server's step between rounds


def play(
    model: nn.Module, images: Tensor, labels: Tensor, rounds: int, others: tuple[Tensor, Tensor]
) -> list[al.Round]:
    """So many rounds of one client; between them the server steps by the mean gradient of all clients.

    ``others`` are the images and labels of the other clients, one each.
    """
    model, found = copy.deepcopy(model), []
    for _ in range(rounds):
        sent = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}  # the rest stays
        found.append(al.Round(sent, al.client_update(model, images, labels)))
        if len(found) < rounds:
            together = al.client_update(model, torch.cat([images, others[0]]), torch.cat([labels, others[1]]))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in together.gradients:
                        parameter -= RATE * together.gradients[name]
    return found


def stacked_span(
    model: nn.Module, rounds: Sequence[al.Round], anatomy: al.Anatomy, *, by_rows: bool = True
) -> Tensor:
    """The picture (1, C, H, W) whose tokens are the smallest combinations of each round's rows, (7.7)."""
    sides, eps = [], torch.finfo(rounds[0].update.dtype).eps
    frozen = tensors_of(model)
    for weights, update in (({**frozen, **r.state}, r.update) for r in rounds):
        D = torch.cat([getattr(anatomy, part).of(update.gradients).double() for part in ("query", "key", "value")])
        equations = equations_of(D, anatomy, weights)
        tokens = anatomy.tiling.count + anatomy.position_prefix + extra_prefix(anatomy, weights)
        side = noisy_span(equations.D, tokens, eps)
        sides.append((side.coefficients(equations.A), side.coefficients(equations.e)))
    T, t = (torch.cat(parts) for parts in zip(*sides, strict=True))
    R = torch.eye(T.shape[1], dtype=T.dtype)
    if by_rows:
        dW = torch.cat([r.update.gradients[anatomy.patch_weight].double().flatten(1) for r in rounds])
        R = noisy_span(dW, anatomy.tiling.count, eps).coefficients()
    normal = T.T @ T, R.T @ R
    if not by_rows:
        return anatomy.tiling.images(smallest(T, t, R, 1e-12 * float(T.norm()), normal).patches.T[None])
    first = smallest(T, t, R, 1.0, normal)
    ratio = float((first.token_cost / first.pixel_cost.clamp_min(1e-300)).median().sqrt())
    return anatomy.tiling.images(smallest(T, t, R, ratio, normal).patches.T[None])
