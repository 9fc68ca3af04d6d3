"""A number that clients compare: were all of them sent the same model?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 of a model's tensors: their names, dtypes, shapes and bits, in the order of the
    names.

    Against a server that sends clients different models (:func:`~aprillab.dishonest.silenced`),
    which no client can see on its own: compared over a channel that is not the server's.

    Parameters
    ----------
    model : nn.Module or state dict
        On any device; as it was received, before anything is trained.

    Returns
    -------
    str, 64 hexadecimal digits

    Examples
    --------
    >>> import aprillab as al
    >>> shape = {"image_size": 8, "patch_size": 4, "width": 24, "depth": 1, "heads": 2, "classes": 5}
    >>> one, other = (al.VisionTransformer(**shape, seed=seed) for seed in (0, 0))
    >>> len({fingerprint(one), fingerprint(other.state_dict())})
    1
    >>> len({fingerprint(one), fingerprint(al.dishonest.silenced(one))})
    2
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
