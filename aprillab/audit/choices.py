"""What a client could leave out of the update that was audited, asked of the leak map."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..anatomy import Anatomy
from ..sharing.groups import ATTENTION, HEAD, PATCH, POSITION, groups_of
from ..update import ClientUpdate

#: The rows of the leak map that :func:`choices_of` asks for: this update, and the same without some
#: tensors, those first that are the fewest or are often kept anyway.
THIS = "this update"
WITHOUT_POSITION = f"{THIS} without the position embedding"
WITHOUT_ATTENTION = f"{THIS} without the first attention"
WITHOUT_EMBEDDINGS = f"{THIS} without both embeddings"
WITHOUT_POSITION_AND_ATTENTION = f"{THIS} without the position embedding and the first attention"
WITHOUT_ALL_THREE = f"{THIS} without both embeddings and the first attention"
HEAD_ALONE = f"the head of {THIS} alone"


def choices_of(model: nn.Module, anatomy: Anatomy, update: ClientUpdate) -> dict[str, tuple[str, ...]]:
    """Names of the parameters that would be shared, by choice; :data:`THIS` is as it was.

    A choice that leaves out nothing of this update, or nothing more than the one before, or all
    of it, is not there.

    >>> import torch, aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> update = al.client_update(model, torch.zeros(1, 3, 8, 8), torch.tensor([3]))
    >>> shared = choices_of(model, al.dissect(model), update)
    >>> sorted(set(shared[THIS]) - set(shared[WITHOUT_EMBEDDINGS]))
    ['class_token', 'patch_embedding.bias', 'patch_embedding.weight', 'position_embedding']
    """
    groups = groups_of(model, anatomy)
    shared = tuple(name for name, _ in model.named_parameters() if name in update.gradients)
    position = (anatomy.position,) if anatomy.position else ()
    embeddings = (*groups.get(PATCH, ()), *groups.get(POSITION, ()))
    attention = (*groups.get(ATTENTION, ()), *anatomy.adapters)
    left_out: dict[str, Collection[str]] = {
        WITHOUT_POSITION: position,
        WITHOUT_ATTENTION: attention,
        WITHOUT_EMBEDDINGS: embeddings,
        WITHOUT_POSITION_AND_ATTENTION: (*position, *attention),
        WITHOUT_ALL_THREE: (*embeddings, *attention),
        HEAD_ALONE: set(shared) - {*groups.get(HEAD, ())},
    }
    found = {THIS: shared}
    for choice, names in left_out.items():
        kept = tuple(name for name in shared if name not in names)
        if kept and kept not in found.values():
            found[choice] = kept
    return found
