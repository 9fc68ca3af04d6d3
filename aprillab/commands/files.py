"""Files of the command line: places that can be written, checked before anything is computed, and
photographs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..data import PICTURE_FORMATS, PictureError, load_victim, read_picture, victims
from .messages import CommandError, note


def writable_file(name: str, suffix: str = "") -> Path:
    """The path of a file to be written. Its folder is made.

    Raises
    ------
    CommandError
        If it cannot be written, or has not the ``suffix`` of a picture.
    """
    path = Path(name)
    if suffix and path.suffix.lower() != suffix:
        raise CommandError(f"{name}: the picture is written as PNG; give it a name that ends in {suffix}")
    if path.is_dir():
        raise CommandError(f"{name}: this is a folder; name a file")
    writable_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise CommandError(f"{name}: cannot be written (permission denied)")
    return path


def writable_folder(name: str | Path) -> Path:
    """The path of a folder in which a file can be made. It is made with its parents.

    Raises
    ------
    CommandError
        If that cannot be.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"{folder}: no folder that can be written ({error.strerror or error})") from error
    return folder


def write(path: Path, content: bytes) -> None:
    """Write the whole file; a :class:`CommandError` says why it cannot be."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise CommandError(f"{path}: cannot be written ({error.strerror or error})") from error


def photograph(name: str, size: int) -> Tensor:
    """Pixels (3, size, size) of a file, or of a victim by its name; what became of the file is
    noted on stderr.

    Examples
    --------
    >>> photograph("coffee", 32).shape
    torch.Size([3, 32, 32])
    """
    path = Path(name)
    if not path.exists() and name in victims():
        return load_victim(name, size)
    if not path.exists():
        raise PictureError(f"{name}: no such file, and no victim of that name; victims are {', '.join(victims())}")
    pixels = read_picture(path, size)
    for remark in _remarks(path, size):
        note(f"{path}: {remark}")
    return pixels


def _remarks(path: Path, size: int) -> Iterator[str]:
    """What became of a picture that is not a square RGB one of 8 bits. Of the rest ``read_picture``
    warns.
    """
    with Image.open(path, formats=PICTURE_FORMATS) as file:
        mode, (width, height) = file.mode, file.size
    if mode.startswith("I"):
        yield "a grey picture of 16 bits; it is rounded to 8 bits and its three channels are equal"
    elif mode in ("1", "L", "LA"):
        yield "a grey picture; its three channels are equal"
    elif mode not in ("RGB", "P"):
        yield f"a picture of mode {mode}; it becomes RGB"
    if (width, height) != (size, size):
        cut = "" if width == height else "cut to its central square and "
        yield f"{width}×{height} pixels; {cut}resampled to {size}×{size}"
