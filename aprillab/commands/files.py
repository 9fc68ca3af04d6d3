"""Files of the command line: places that can be written, checked before anything is computed and
made when there is something to write, and photographs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..data import PICTURE_FORMATS, PictureError, load_victim, read_picture, victims
from .messages import CommandError, note


def writable_file(name: str, suffix: str = "") -> Path:
    """The path of a file to be written. Nothing is made yet.

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
    """The path of a folder in which a file can be made, or that can be made. Nothing is made yet.

    Raises
    ------
    CommandError
        If that cannot be.
    """
    folder = Path(name)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise CommandError(f"{folder}: no folder that can be written ({error.strerror or error})") from error
    return folder


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; those still empty at the end are taken away again."""
    new = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{folder}: no folder that can be written ({error.strerror or error})") from error
    try:
        yield
    finally:
        for place in new:
            with suppress(OSError):  # not empty
                place.rmdir()


def write(path: Path, content: bytes) -> str:
    """Write the whole file, and make its folder; returns its name and whether another was there.

    Raises
    ------
    CommandError
        If it cannot be written.
    """
    replaced = " (replaced)" if path.exists() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise CommandError(f"{path}: cannot be written ({error.strerror or error})") from error
    return f"{path}{replaced}"


def photograph(name: str, size: int | tuple[int, int]) -> Tensor:
    """Pixels (3, H, W) of a file, or of a victim by its name; what became of the file is noted on
    stderr.

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
    remark_on(path, (size, size) if isinstance(size, int) else size)
    return pixels


def remark_on(path: Path, size: tuple[int, int]) -> None:
    """Note what became of a picture that is no RGB one of 8 bits and this size. Of the rest
    ``read_picture`` warns.
    """
    for remark in _remarks(path, size):
        note(f"{path}: {remark}")


def _remarks(path: Path, size: tuple[int, int]) -> Iterator[str]:
    with Image.open(path, formats=PICTURE_FORMATS) as file:
        mode, (width, height) = file.mode, file.size
        if file.getexif().get(_ORIENTATION, 1) >= 5:  # lies on its side
            width, height = height, width
    if mode.startswith("I"):
        yield "a grey picture of 16 bits; it is rounded to 8 bits and its three channels are equal"
    elif mode in ("1", "L", "LA"):
        yield "a grey picture; its three channels are equal"
    elif mode not in ("RGB", "P"):
        yield f"a picture of mode {mode}; it becomes RGB"
    if not mode.startswith("I") and _bits_of_png(path) == 16:
        yield "a picture of 16 bits a channel; it is rounded to 8 bits"
    if (height, width) != size:
        shape = "square" if size[0] == size[1] else "rectangle"
        cut = "" if height * size[1] == width * size[0] else f"cut to its central {shape} and "
        which = "" if size[0] == size[1] else " (width × height)"
        yield f"{width}×{height} pixels{which}; {cut}resampled to {size[1]}×{size[0]}"


_ORIENTATION = 0x0112  # of Exif


def _bits_of_png(path: Path) -> int | None:
    """Bits a channel, which Pillow does not tell for colours; None where it is no PNG."""
    with path.open("rb") as file:
        head = file.read(25)
    return head[24] if head.startswith(b"\x89PNG\r\n") and len(head) == 25 else None
