"""The victims in ``data/victims``: photographs that are free to share, each with its source and its
licence.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources.abc import Traversable

import torch
from PIL import Image
from torch import Tensor

from .folders import data_folder
from .pictures import check_dtype, check_form, to_tensor


@dataclass(frozen=True)
class VictimInfo:
    """What the manifest records of one victim, all of them in the public domain or free of known
    restrictions.

    Attributes
    ----------
    name : str
    file : str
        File name within the victims' folder.
    title, alt : str
        A caption in human words, and one sentence for those who do not see the picture.
    source, author, url : str
        Where the photograph comes from.
    licence, licence_statement, licence_where : str
        The licence in short, the words in which it is given, and where they stand.
    package, package_version, package_file, source_sha256 : str
        The installed file that it was cut from, and the SHA-256 of that file.
    crop : tuple of int
        (left, top, right, bottom) in the source's pixels.
    resampling : str
    size : int
        Side in pixels.
    flat_patches : int
        How many of the 16 × 16 patches (196 at 224 × 224) hardly vary: a standard deviation under
        two 8-bit levels in every channel.
    pixels_sha256, file_sha256 : str
        SHA-256 of the RGB bytes, row by row, and of the PNG file as committed.
    """

    name: str
    file: str
    title: str
    alt: str
    source: str
    author: str
    licence: str
    licence_statement: str
    licence_where: str
    url: str
    package: str
    package_version: str
    package_file: str
    source_sha256: str
    crop: tuple[int, int, int, int]
    resampling: str
    size: int
    flat_patches: int
    pixels_sha256: str
    file_sha256: str


def victims() -> list[str]:
    """Names of the victims, faces first.

    Examples
    --------
    >>> import aprillab as al
    >>> al.victims()[:2], len(al.victims())
    (['astronaut', 'grace_hopper'], 16)
    """
    return list(_manifest())


def victim_info(name: str) -> VictimInfo:
    """Title, alternative text, source, licence and checksums of one victim.

    Raises
    ------
    ValueError
        If there is no victim of that name.

    Examples
    --------
    >>> import aprillab as al
    >>> al.victim_info("astronaut").size
    224
    """
    try:
        return _manifest()[name]
    except KeyError:
        raise ValueError(f"there is no victim {name!r}; there are: {', '.join(_manifest())}") from None


def load_victim(
    name: str, size: int | tuple[int, int] = 224, *, channels: int = 3, dtype: torch.dtype = torch.float32
) -> Tensor:
    """One victim, at any size.

    Parameters
    ----------
    name : str
        One of :func:`victims`.
    size : int, or (height, width)
        Side in pixels. Other sizes than the stored 224 are resampled with a Lanczos filter
        (antialiased) and rounded to 8 bits; of other shapes, the middle is cut out first.
    channels : {1, 3}
        1 gives the luminance (ITU-R BT.601).
    dtype : torch.dtype
        A floating one.

    Returns
    -------
    Tensor, shape (channels, size, size), or (channels, height, width)
        Pixels in [0, 1], on the CPU.

    Raises
    ------
    ValueError
        For an unknown name, a size that is no positive integer, other channels, or a dtype that is
        not floating.

    Examples
    --------
    >>> import aprillab as al
    >>> pixels = al.load_victim("astronaut", 32)
    >>> pixels.shape, round(float(pixels.mean()), 2)
    (torch.Size([3, 32, 32]), 0.55)
    """
    check_form(size, channels)
    check_dtype(dtype)
    with (_victims_folder() / victim_info(name).file).open("rb") as file, Image.open(file) as image:
        return to_tensor(image, size, channels, dtype)


def load_victims(
    names: list[str] | None = None,
    size: int = 224,
    *,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, list[str]]:
    """Several victims as one batch.

    Parameters
    ----------
    names : list of str, optional
        All of :func:`victims` by default.
    size, channels, dtype
        As :func:`load_victim`.

    Returns
    -------
    pictures : Tensor, shape (N, channels, size, size)
        Pixels in [0, 1].
    names : list of str

    Raises
    ------
    ValueError
        As :func:`load_victim`, and for an empty list.

    Examples
    --------
    >>> import aprillab as al
    >>> pictures, names = al.load_victims(["coffee", "rocket"], 32, channels=1)
    >>> pictures.shape, names
    (torch.Size([2, 1, 32, 32]), ['coffee', 'rocket'])
    """
    names = victims() if names is None else list(names)
    if not names:
        raise ValueError("names is empty: leave it out for all victims, or name at least one")
    return torch.stack([load_victim(name, size, channels=channels, dtype=dtype) for name in names]), names


@functools.cache
def _manifest() -> dict[str, VictimInfo]:
    entries = json.loads((_victims_folder() / "manifest.json").read_text(encoding="utf-8"))
    return {entry["name"]: VictimInfo(**{**entry, "crop": tuple(entry["crop"])}) for entry in entries}


def _victims_folder() -> Traversable:
    return data_folder("victims", "manifest.json")
