"""Model, update and recipe as a problem: what is known, what is looked for, and in
which coordinates.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...anatomy import Anatomy, UnknownModelError, dissect, hooked
from ...models import patchify
from ...preprocessing import Preprocessing
from ...update import ClientUpdate, logits_of
from ..client import draws
from ..labels import assumed_batch_size, recover_labels
from ..result import AttackNotApplicable
from .coordinates import Coordinates, row_space_of
from .problem import Loss, Position, Problem
from .recipes import Adam, Recipe
from .recorded import EvaluationGraph
from .slopes import matcher


def pose(
    model: nn.Module,
    update: ClientUpdate,
    recipe: Recipe,
    *,
    labels: Tensor | str | None,
    batch_size: int | None,
    image_shape: tuple[int, int, int] | None,
    coordinates: Coordinates | None,
    loss: Loss,
    dtype: torch.dtype,
    device: torch.device | str | None,
    anatomy: Anatomy | None,
    preprocessing: Preprocessing | None,
    seed: int,
) -> Problem:
    """The problem behind a call of :func:`~aprillab.match_gradients`, whose arguments these are."""
    anatomy = anatomy or _anatomy_of(model, image_shape)
    batch_size = assumed_batch_size(update, labels, batch_size)
    shape = (batch_size, *(image_shape or (_channels(model, anatomy), *anatomy.image_size)))
    asked = recipe.labels if labels is None else labels
    known, labels_how = _labels(model, update, anatomy, asked, batch_size)
    names = list(update.gradients)
    # The rows of an embedding that was interpolated are no patches: it is matched like
    # any other tensor.
    k = names.index(anatomy.position) if anatomy.position in names and anatomy.resampling is None else None
    like = torch.zeros((), device=device or update.gradients[names[0]].device, dtype=dtype)
    targets = [update.gradients[name].detach().to(like) for name in names]
    # A copy to search on: in another dtype as a rule, and models may keep parts of their last pass.
    # (functional_call would exchange all tensors at every evaluation: half a millisecond for 72.)
    copied = _with_linear_patches(copy.deepcopy(model), anatomy).to(like.device, dtype).requires_grad_(False)
    hooked(copied, replace(anatomy, root=""))  # pictures on trial are model input
    parameters = dict(copied.named_parameters())
    coordinates = coordinates or _row_space(update, anatomy, batch_size, recipe)
    if coordinates is not None and isinstance(recipe.optimizer, Adam) and recipe.optimizer.clamp:
        raise ValueError("clamp=True works on pixels, and the search has coordinates: choose one")
    problem = Problem(
        model=copied,
        parameters=[parameters[name].requires_grad_() for name in names],
        targets=targets,
        position=None
        if k is None or recipe.position_term is None
        else Position(k, recipe.position_term, anatomy.position_prefix, anatomy.tiling),
        recipe=recipe,
        match=matcher(recipe.distance, targets, torch.finfo(update.dtype).eps),
        shape=shape,
        labels=None if known is None else known.to(like.device),
        labels_how=labels_how,
        classes=_count_classes(copied, like.expand(shape)) if known is None else None,
        loss=loss,
        preprocessing=preprocessing or anatomy.preprocessing,
        coordinates=None if coordinates is None else coordinates.to(like),
        patch_size=anatomy.tiling.patch_size if recipe.priors.seams else None,
        seed=seed,
        draws=_draws(copied, like.expand(shape)),
    )
    return replace(problem, recording=EvaluationGraph(problem.restart) if recordable(problem) else None)


def recordable(problem: Problem) -> bool:
    """Whether evaluations may be recorded: on CUDA, where the model draws nothing at
    random, as dropout does.
    """
    return problem.device.type == "cuda" and not problem.draws


def _draws(model: nn.Module, images: Tensor) -> bool:
    """Whether the model draws at random; the caller's random state is kept."""
    with undisturbed(images.device):
        return draws(model, images)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """The caller's random state is kept, and attention has a second derivative
    (chapter 05, step 2).
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


class _PatchLinear(nn.Conv2d):
    """A convolution whose windows do not overlap, as what it is: a linear layer of patches."""

    def forward(self, images: Tensor) -> Tensor:
        size = self.kernel_size[0]
        patches = patchify(images, size)  # (B, n, p)
        tokens = nn.functional.linear(patches, self.weight.flatten(1), self.bias)  # (B, n, d)
        return tokens.transpose(1, 2).unflatten(2, (images.shape[-2] // size, images.shape[-1] // size))


def _with_linear_patches(model: nn.Module, anatomy: Anatomy) -> nn.Module:
    """A ViT's patch embedding as a linear layer, in place: a convolution's second
    derivative is slow.

    In float32 on one thread it takes a twentieth of an evaluation of a small ViT.
    """
    module = model.get_submodule(anatomy.patch_weight.rpartition(".")[0])
    if type(module) is nn.Conv2d and module.kernel_size == module.stride and module.groups == 1:
        height, width = module.kernel_size
        tiles = not (anatomy.image_size[0] % height or anatomy.image_size[1] % width)
        if height == width and tiles and module.padding == (0, 0) and module.dilation == (1, 1):
            module.__class__ = _PatchLinear
    return model


def _row_space(update: ClientUpdate, anatomy: Anatomy, batch_size: int, recipe: Recipe) -> Coordinates | None:
    gradient = update.gradients.get(anatomy.patch_weight)
    if not recipe.row_space or gradient is None:
        return None
    return row_space_of(gradient, batch_size, anatomy.tiling)


def _anatomy_of(model: nn.Module, image_shape: tuple[int, int, int] | None) -> Anatomy:
    """The ViT's anatomy, or of another classifier what the label recovery reads: its
    last linear layer.
    """
    try:
        return dissect(model)
    except UnknownModelError:
        if image_shape is None:
            raise AttackNotApplicable(
                "match_gradients",
                f"the shape of the images that {type(model).__name__} takes is unknown: give image_shape=(C, H, W)",
            ) from None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = {part: f"{linear[-1]}.{part}".lstrip(".") for part in ("weight", "bias")} if linear else {}
    return Anatomy(
        family="another classifier",
        image_size=image_shape[1:],
        patch_weight="",
        head_weight=names.get("weight"),
        head_bias=names.get("bias"),
    )


def _labels(
    model: nn.Module, update: ClientUpdate, anatomy: Anatomy, labels: Tensor | str, batch_size: int
) -> tuple[Tensor | None, str]:
    """Labels to match with, None where they are to be optimized, and a word on where they come
    from.
    """
    if isinstance(labels, Tensor):
        if labels.shape != (batch_size,) or labels.is_floating_point():
            raise ValueError(
                f"labels must be {batch_size} integers (batch_size={batch_size}), "
                f"not {tuple(labels.shape)} of {labels.dtype}"
            )
        head = dict(model.named_parameters()).get(anatomy.head_weight or anatomy.head_bias or "")
        if head is not None and not 0 <= int(labels.min()) <= int(labels.max()) < len(head):
            raise ValueError(f"labels={labels.tolist()}: the model has classes 0 to {len(head) - 1}")
        return labels, "known to the attacker"
    if labels not in ("recover", "optimize"):
        raise ValueError(f"labels={labels!r} is neither a tensor nor one of 'recover', 'optimize'")
    if labels == "optimize":
        return None, "optimized along with the pictures"
    try:
        found = recover_labels(model, update, batch_size=batch_size, anatomy=anatomy)
    except AttackNotApplicable as refusal:
        return None, f"optimized along with the pictures, since they cannot be recovered: {refusal.reason}"
    return found.labels, f"recovered, {'exact' if found.exact else 'not certain'}: {found.reason}"


def _count_classes(model: nn.Module, images: Tensor) -> int:
    with undisturbed(images.device), torch.no_grad():
        return logits_of(model, images).shape[-1]


def _channels(model: nn.Module, anatomy: Anatomy) -> int:
    return anatomy.channels or dict(model.named_parameters())[anatomy.patch_weight].shape[1]
