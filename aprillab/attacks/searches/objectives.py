"""What gradient matching minimizes: distances of gradients, the position term, priors on pictures.

Every function is differentiable and returns a scalar tensor. ``gradients`` are those of the picture
on trial and ``targets`` the shared ones, in the same order, one tensor a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...preprocessing import Preprocessing

Distance = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def _squares(gradients: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """‖g' − g‖² of each tensor; through the norm, whose derivative needs no copy of the squares."""
    return [torch.linalg.vector_norm(g - t).square() for g, t in zip(gradients, targets, strict=True)]


def l2(gradients: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Σ ‖g' − g‖² over all tensors, as in DLG (Zhu et al., NeurIPS 2019).

    >>> l2([torch.tensor([3.0, 5.0])], [torch.tensor([3.0, 4.0])])
    tensor(1.)
    """
    return torch.stack(_squares(gradients, targets)).sum()


def relative_l2(gradients: Sequence[Tensor], targets: Sequence[Tensor], *, eps: float | None = None) -> Tensor:
    """The mean over tensors of ‖g' − g‖² / ‖g‖²: each has a say, however small its gradient.

    A tensor whose gradient is only rounding noise (a key bias: softmax does not see it) would drown
    the others: below ε^¾ times the largest tensor's norm it is left out. ε is that of the precision
    in which the gradients were *shared* (``eps``), which may be coarser than the dtype they are
    compared in, the default.
    """
    weights = relative_weights(targets, eps)
    return (weights * torch.stack(_squares(gradients, targets))).mean()


def balanced_l2(gradients: Sequence[Tensor], targets: Sequence[Tensor], *, eps: float | None = None) -> Tensor:
    """The mean over tensors of ‖g' − g‖² / ½(‖g'‖² + ‖g‖²): relative L2 that does not
    favour weak gradients.

    A wrong gradient, orthogonal to g and r times as long, costs 1 + r² in :func:`relative_l2`:
    a search that is still wrong everywhere does best to make all gradients weak, and stays
    there. Here it costs 2, whatever r. Near g the two agree to first order. Rounding noise is
    left out as there.

    Examples
    --------
    >>> g, wrong = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> [round(float(balanced_l2([r * wrong], [g])), 3) for r in (0.1, 1, 10)]
    [2.0, 2.0, 2.0]
    >>> [round(float(relative_l2([r * wrong], [g])), 3) for r in (0.1, 1, 10)]
    [1.01, 2.0, 101.0]
    """
    weights = relative_weights(targets, eps)
    strengths = weights * torch.stack([torch.linalg.vector_norm(g).square() for g in gradients])  # (‖g'‖ / ‖g‖)²
    return (2 * weights * torch.stack(_squares(gradients, targets)) / (1 + strengths)).mean()


def relative_weights(targets: Sequence[Tensor], eps: float | None = None) -> Tensor:
    """1 / ‖g‖² of each tensor, (k,); 0 for those below ε^¾ of the largest norm."""
    norms = torch.stack([t.norm() for t in targets])
    floor = norms.max() * (eps or torch.finfo(norms.dtype).eps) ** 0.75
    tiny = torch.finfo(norms.dtype).tiny
    return torch.where(norms < floor, 0, 1 / norms.square().clamp_min(tiny))


def l2_l1(gradients: Sequence[Tensor], targets: Sequence[Tensor], *, l1_weight: float = 0.01) -> Tensor:
    """Σ ‖g' − g‖² + w‖g' − g‖₁ over all tensors, as in TAG (Deng et al., 2021).

    TAG's w falls with the depth of the layer; this one does not.

    >>> l2_l1([torch.tensor([3.0, 2.0])], [torch.tensor([3.0, 4.0])], l1_weight=0.5)
    tensor(5.)
    """
    differences = [g - t for g, t in zip(gradients, targets, strict=True)]
    return torch.stack([d.square().sum() + l1_weight * d.abs().sum() for d in differences]).sum()


def cosine(gradients: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """1 − cos of all tensors as one vector, as in Inverting Gradients (Geiping et al., 2020).

    >>> cosine([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 2.0])])
    tensor(1.)
    """
    dot = torch.stack([(g * t).sum() for g, t in zip(gradients, targets, strict=True)]).sum()
    square = torch.stack([g.square().sum() for g in gradients]).sum()
    square_target = torch.stack([t.square().sum() for t in targets]).sum()
    return 1 - dot / (square * square_target).clamp_min(torch.finfo(dot.dtype).tiny).sqrt()


def position_cosine(gradient: Tensor, target: Tensor, *, per_token: bool = True) -> Tensor:
    """1 − cos of the position embedding's gradients: APRIL's term (Lu et al., CVPR 2022).

    It ties each patch to its place: the same patches in another order have nearly the same gradient
    everywhere but here. Taken over the whole embedding, as the paper has it, the class token's row
    outweighs those of the patches by far where the head reads the class token. ``per_token=True``
    takes the mean of the tokens' own 1 − cos.

    Parameters
    ----------
    gradient, target : Tensor of shape (…, tokens, d)
    """
    if not per_token:
        return cosine([gradient], [target])
    dot, square, square_target = (gradient * target).sum(-1), gradient.square().sum(-1), target.square().sum(-1)
    tiny = torch.finfo(dot.dtype).tiny
    return 1 - (dot / (square.clamp_min(tiny) * square_target.clamp_min(tiny)).sqrt()).mean()


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbours in images (B, C, H, W), along rows plus along columns.

    >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
    tensor(1.)
    """
    vertical = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    horizontal = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    return vertical + horizontal


def patch_seams(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Mean square step across the seams of patches (height, width), in images (B, C, H, W).

    After GradViT's prior on patches (Hatamizadeh et al., CVPR 2022), which sums norms of these
    steps: where a picture goes on smoothly, patches in the wrong places show at their borders. 0
    where there is no seam.

    >>> patch_seams(torch.tensor([[[[0.0, 1.0, 3.0, 3.0]]]]), (1, 2))
    tensor(4.)
    """
    height, width = patch_size
    down = images[..., height::height, :] - images[..., height - 1 : -1 : height, :]
    right = images[..., width::width] - images[..., width - 1 : -1 : width]
    return sum((step.square().mean() for step in (down, right) if step.numel()), images.new_zeros(()))


def image_norm(images: Tensor) -> Tensor:
    """Mean square of the model input, 0 for a picture of the preprocessing's mean."""
    return images.square().mean()


def outside_box(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Mean square of what lies outside [0, 1], in pixels."""
    pixels = preprocessing.to_pixels(images, clamp=False)
    return (pixels - pixels.clamp(0, 1)).square().mean()


def group_spread(images: Tensor) -> Tensor:
    """Mean square deviation of restarts (R, B, C, H, W) from their mean (Yin et al., CVPR 2021).

    GradInversion first registers the pictures to one another; here the mean is taken as they lie,
    since a ViT's patches do not shift.
    """
    return (images - images.mean(0)).square().mean()


DISTANCES: dict[str, Distance] = {
    "l2": l2,
    "relative_l2": relative_l2,
    "balanced_l2": balanced_l2,
    "l2_l1": l2_l1,
    "cosine": cosine,
}
"""Gradient distances by the name :func:`~aprillab.attacks.searches.match.match_gradients` takes."""
