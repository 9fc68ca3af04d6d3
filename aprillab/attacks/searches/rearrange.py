"""Patches in the wrong place: found by their tokens' gradients, moved by assignment.

Where a patch stands changes the gradient of the loss by little, and no small step leads from one
order of patches to another: searches that know every patch end in an order that is wrong. But the
position embedding's gradient has a row for each place, the gradient of the token that stands there,
and that row follows the patch. So match the rows of the pictures on trial with the shared ones and
put each patch where its row fits. data/results/digits.md measures what that is worth. We know of no
publication of this move.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...anatomy import Tiling


def places_of(rows: Tensor, shared: Tensor) -> Tensor:
    """Where each patch belongs: the assignment whose cosines between rows have the largest sum.

    Parameters
    ----------
    rows, shared : Tensor of shape (n, d)
        ∂l/∂E_pos of the patches' places, for the picture on trial and for the private one.

    Returns
    -------
    int64 Tensor of shape (n,), a permutation
        Patch i belongs at place ``places[i]``. Rows of zeros fit everywhere alike.

    Examples
    --------
    >>> shared = torch.eye(3)
    >>> places_of(5 * shared[[0, 2, 1]], shared)
    tensor([0, 2, 1])
    """
    cosines = torch.nn.functional.normalize(rows.double(), dim=-1)
    cosines = cosines @ torch.nn.functional.normalize(shared.double(), dim=-1).T  # (n, n)
    _, places = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    return torch.from_numpy(places).to(rows.device)


def rearranged(images: Tensor, places: Tensor, tiling: Tiling) -> Tensor:
    """Pictures (B, C, H, W) with patch i moved to place ``places[i]``.

    Examples
    --------
    >>> rearranged(torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.tensor([0, 2, 1]), Tiling.square(1, (1, 3)))
    tensor([[[[1., 3., 2.]]]])
    """
    patches = tiling.patches(images)  # (B, n, p)
    moved = torch.empty_like(patches)
    moved[:, places] = patches
    return tiling.images(moved)
