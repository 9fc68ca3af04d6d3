"""Who was it? Three ways to name one of a gallery: by the picture, by the features, by the
gradients.

Each gives the rank of the right one, from 1; half of those that are level with it count before it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import aprillab as al

from .clients import ADAM, CLIPPING, PLAYED, STOCHASTIC, TOGETHER, Cell, Shared, adam_step, defended, flat
from .victims import Scene


def rank_of(scores: Tensor, right: int) -> float:
    """Of the right one by its score (M,), the greatest first.

    >>> rank_of(torch.tensor([0.1, 0.5, 0.3]), 2), rank_of(torch.zeros(3), 0)
    (2.0, 2.0)
    """
    scores = scores.nan_to_num(-torch.inf)
    before, level = (scores > scores[right]).sum(), (scores == scores[right]).sum() - 1
    return float(1 + before + level / 2)


def by_picture(pixels: Tensor, gallery: Tensor, right: int) -> float:
    """By the smallest distance of the picture (C, H, W) after the best gain, not
    negative, and offset.

    That is the greatest correlation.
    """
    seen, each = pixels.double().flatten(), gallery.double().flatten(1)
    seen, each = seen - seen.mean(), each - each.mean(1, keepdim=True)
    length = (each.norm(dim=1) * seen.norm()).clamp_min(1e-12)
    return rank_of(each @ seen / length, right)


def by_features(update: al.ClientUpdate, stage: Scene, features: Tensor, right: int) -> float:
    """By the cosine between what the head's gradient says that it read, and each
    picture's features (M, d).

    ∂W = δ hᵀ and ∂b = δ for one picture: h is the first right singular vector of both side by side.
    δ is negative at the label, which is known, and there alone. Of signs give the features' signs.
    """
    weight = update.gradients[stage.anatomy.head_weight or ""].double()
    bias = update.gradients[stage.anatomy.head_bias or ""].double()
    U, _, Vt = torch.linalg.svd(torch.cat([weight, bias[:, None]], 1), full_matrices=False)
    h = Vt[0, :-1] * -torch.sign(U[stage.labels[right], 0])
    return rank_of(torch.nn.functional.cosine_similarity(features, h[None]), right)


# --- By gradients -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def gradients_of(stage: Scene) -> tuple[Tensor, Tensor]:
    """The gradient of each picture of the gallery with its own label (M, N), and their products (M,
    M).
    """
    rows = al.privacy.clipped_gradients(stage.model, stage.input_of(stage.pixels), stage.labels, 1e30)
    return rows, (rows @ rows.T).double()


def names_of(stage: Scene) -> list[str]:
    """Of the trained parameters, in the order of :func:`gradients_of`."""
    return [name for name, p in stage.model.named_parameters() if p.requires_grad]


def by_gradients(stage: Scene, cell: Cell, shared: Sequence[Shared]) -> list[float]:
    """Ranks of the victims by what the gallery's pictures would have sent.

    A defence without randomness is played, and the least distance taken. Of noise the nearest
    clipped gradient is the most probable; of stochastic rounding the nearest, each tensor in its
    own steps; of several pictures in one update whom it takes for one of them: :func:`_by_share`.
    """
    if cell.defence in TOGETHER:
        return [_by_share(stage, one, cell.images, k) for k, one in enumerate(shared)]
    if cell.defence in PLAYED and cell.defence != CLIPPING and not cell.multiplier:
        return _by_playing(stage, cell, shared)
    return [_by_distance(stage, cell, one, k) for k, one in enumerate(shared)]


def _by_distance(stage: Scene, cell: Cell, one: Shared, right: int) -> float:
    rows, weights, names = gradients_of(stage)[0], 1.0, [*one.update.gradients]
    known = torch.cat([
        torch.full((p.numel(),), float(name in one.update.gradients))
        for name, p in stage.model.named_parameters() if p.requires_grad
    ]).bool()  # fmt: skip
    seen = flat(one.update, names)
    rows = rows if bool(known.all()) else rows[:, known]
    if cell.defence == STOCHASTIC:
        weights = torch.cat([_steps(one.update.gradients[name]) for name in names])
    lengths = rows.norm(dim=1)
    scales = (one.clip / lengths).clamp_max(1.0) if one.clip else torch.ones_like(lengths)
    weighed = rows if isinstance(weights, float) else rows / weights
    seen = seen / weights
    squares = weighed.square().sum(1).double() * scales.double() ** 2
    return rank_of(2 * scales.double() * (weighed @ seen).double() - squares, right)


def _steps(gradient: Tensor) -> Tensor:
    """The distance of neighbouring levels, for each entry: the least difference that is there."""
    levels = gradient.double().abs().unique()
    gaps = levels.diff()
    gaps = gaps[gaps > 1e-6 * levels.max()]
    step = float(gaps.min()) if len(gaps) else max(float(levels.max()), 1e-12)
    return torch.full((gradient.numel(),), step)


def _by_playing(stage: Scene, cell: Cell, shared: Sequence[Shared]) -> list[float]:
    names = [*shared[0].update.gradients]
    seen = torch.stack([flat(one.update, names) for one in shared])
    distances = torch.stack(
        [(flat(played, names) - seen).double().square().sum(1) for played in _played(stage, cell)]
    )
    return [rank_of(-distances[:, k], k) for k in range(len(shared))]


def _played(stage: Scene, cell: Cell):  # type: ignore[no-untyped-def]
    """What each picture of the gallery would have sent, one after another."""
    if cell.defence == ADAM:
        for k in range(len(stage.pixels)):
            yield adam_step(stage, stage.pixels[k : k + 1], stage.labels[k : k + 1])
        return
    names = names_of(stage)
    shapes = [stage.model.get_parameter(name).shape for name in names]
    for row in gradients_of(stage)[0]:
        parts = row.split([shape.numel() for shape in shapes])
        own = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        yield defended(al.ClientUpdate(own), cell, None)


def _by_share(stage: Scene, one: Shared, number: int, right: int) -> float:
    """By the likelihood of each candidate's having its share 1/B in the update,
    against having none.

    The other B − 1 pictures are unknown, and their gradients are taken for normal with the second
    moments of the gallery's; what lies outside its span is of that size in every direction.
    """
    rows, products = gradients_of(stage)
    seen = flat(one.update, names_of(stage))
    seen = seen / (1 if one.update.batch_size else number)  # a sum, of as many clients as the server knows
    along = (rows @ seen).double()
    variance = (number - 1) / (len(rows) * number**2)
    outside = float(seen.double().square().sum()) - float(along @ torch.linalg.lstsq(products, along[:, None])
                                                          .solution[:, 0])  # fmt: skip
    floor = max(outside, 1e-9 * float(seen.square().sum())) / rows.shape[1]
    system = floor * torch.eye(len(rows), dtype=torch.float64) + variance * products
    Q, R = (torch.linalg.solve(system, right_side) for right_side in (along, products))
    without = (1 - variance * R.diagonal()).clamp_min(1e-9)  # each candidate is not among its own others
    r = R.diagonal() / without
    return rank_of(Q / without / number - r / (2 * number**2), right)
