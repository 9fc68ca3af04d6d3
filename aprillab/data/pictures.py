"""A user's own photograph, and a picture as a tensor of pixels."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# By content, not by the file's name. Formats whose decoders start another program (EPS) are left
# out.
PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")


class PictureError(ValueError):
    """A file that cannot be used as a picture; the message names the file, the reason and a remedy."""


class PictureWarning(UserWarning):
    """A picture of which only a part, or a changed version, is used."""


def read_picture(
    path: str | os.PathLike[str],
    size: int | tuple[int, int] = 224,
    *,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A photograph from a file: turned upright, cut to its central square (or
    rectangle), resampled.

    Read are PNG, JPEG, GIF, WebP, TIFF, BMP and PPM, by content and not by file name. The camera's
    orientation mark is obeyed. Grey, palette and CMYK pictures become RGB (or grey, with one
    channel), transparency is composited on white, 16-bit grey is scaled from 0…65535, and the
    result is rounded to 8 bits.

    Parameters
    ----------
    path : str or path-like
    size, channels, dtype
        As :func:`load_victim`. A smaller picture is enlarged.

    Returns
    -------
    Tensor, shape (channels, size, size), or (channels, H, W) for a size of (H, W)
        Pixels in [0, 1], on the CPU.

    Raises
    ------
    PictureError
        If the file is missing, a folder, empty, no picture, damaged or cut short, above Pillow's
        limit on pixels (a decompression bomb), or has pixels whose range is not defined (32-bit
        integers, floats).
    ValueError
        If size, channels or dtype is not possible.

    Warns
    -----
    PictureWarning
        If the file holds several frames or pages (the first is used), or is partly transparent.

    Examples
    --------
    >>> import tempfile
    >>> import aprillab as al
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (48, 40), (255, 0, 51)).save(f"{folder}/red.png")
    ...     al.read_picture(f"{folder}/red.png", 32)[:, 0, 0]
    tensor([1.0000, 0.0000, 0.2000])
    """
    check_form(size, channels)
    check_dtype(dtype)
    path = Path(path)
    if not path.exists():
        raise PictureError(f"{path}: there is no such file. Check the name and the folder.")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise PictureError(f"{path}: this is {kind}. Name the picture file itself.")
    image, remarks = _open_picture(path, str(path))
    for remark in remarks:
        warnings.warn(f"{path}: {remark}", PictureWarning, stacklevel=2)
    return to_tensor(image, size, channels, dtype)


def decode_picture(
    content: bytes,
    size: int | tuple[int, int] = 224,
    *,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
    name: str = "your picture",
) -> Tensor:
    """A photograph from a file's bytes, as :func:`read_picture` reads files; nothing
    is written to disk.

    Parameters
    ----------
    content : bytes
        The whole file.
    size, channels, dtype
        As :func:`read_picture`.
    name : str
        What messages call it.

    Raises
    ------
    PictureError, ValueError
        As :func:`read_picture`.

    Warns
    -----
    PictureWarning
        As :func:`read_picture`.

    Examples
    --------
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (48, 40), (255, 0, 51)).save(file, format="png")
    >>> decode_picture(file.getvalue(), 32)[:, 0, 0]
    tensor([1.0000, 0.0000, 0.2000])
    """
    check_form(size, channels)
    check_dtype(dtype)
    image, remarks = _open_picture(io.BytesIO(content), name)
    for remark in remarks:
        warnings.warn(f"{name}: {remark}", PictureWarning, stacklevel=2)
    return to_tensor(image, size, channels, dtype)


def _open_picture(source: Path | io.BytesIO, name: str) -> tuple[Image.Image, list[str]]:
    """The picture, upright, in mode L or RGB, and what to tell its owner."""
    try:
        if not (source.stat().st_size if isinstance(source, Path) else source.getbuffer().nbytes):
            raise PictureError(f"{name}: the file is empty (0 bytes). Copy or export the picture again.")
        return _decode(source, name)
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(
            f"{name}: the file declares more pixels than is safe to unpack ({error}). "
            "If it is really a picture, make it smaller first."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(
            f"{name}: this is not a picture in a format read here ({', '.join(PICTURE_FORMATS)}), "
            "or little is left of one. Save it as PNG or JPEG."
        ) from error
    # Decoders answer damaged input with almost any exception.
    except Exception as error:
        raise PictureError(
            f"{name}: the picture cannot be read: {error or type(error).__name__}. It may be damaged or cut short, "
            "or of a rare kind: copy it again, or save it as an 8-bit PNG or JPEG."
        ) from error


def _decode(source: Path | io.BytesIO, name: str) -> tuple[Image.Image, list[str]]:
    """What Pillow reads: its first frame, upright, in 8 bits, on white."""
    remarks = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(source, formats=PICTURE_FORMATS) as file:
            # A phone's MPO carries previews and depth beside the photograph: nothing to remark on.
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
            if frames > 1:
                remarks.append(f"this holds {frames} frames or pages; only the first is used")
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":
                image = _to_8_bits(image, file.format, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            remarks.append("this is partly transparent; it is composited on white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB"), remarks


def _to_8_bits(image: Image.Image, file_format: str | None, name: str) -> Image.Image:
    """Grey of 16 bits as mode L. Pillow's own conversion cuts everything above 255 to white."""
    # Pillow opens 16-bit PPM files, and in older releases 16-bit PNG files, in the 32-bit mode "I".
    if not (image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM"))):
        raise PictureError(
            f"{name}: its pixels are 32-bit numbers (mode {image.mode}) whose black and white are not defined. "
            "Scale it and save it as an 8-bit or 16-bit PNG."
        )
    levels = np.asarray(image).astype(np.float64) / 65535
    return Image.fromarray(np.rint(255 * levels).astype(np.uint8))


def to_tensor(image: Image.Image, size: int | tuple[int, int], channels: int, dtype: torch.dtype) -> Tensor:
    """The middle of an 8-bit picture, as large as its shape allows, as pixels (channels, H, W).

    Examples
    --------
    >>> to_tensor(Image.new("RGB", (2, 2), (255, 0, 51)), 2, 3, torch.float32)[:, 0, 0]
    tensor([1.0000, 0.0000, 0.2000])
    >>> to_tensor(Image.new("RGB", (40, 30)), (8, 16), 3, torch.float32).shape
    torch.Size([3, 8, 16])
    """
    height, width = (size, size) if isinstance(size, int) else size
    image = image.convert("L" if channels == 1 else "RGB")
    # The largest rectangle of this shape, in whole pixels.
    wide = min(image.width, max(1, image.height * width // height))
    high = min(image.height, max(1, image.width * height // width))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    image = image.crop((left, top, left + wide, top + high))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    levels = torch.from_numpy(np.array(image)).reshape(height, width, channels)
    return levels.permute(2, 0, 1).contiguous().to(dtype) / 255


def check_form(size: int | tuple[int, int], channels: int) -> None:
    """Refuse a size that is no positive whole number, nor two, and other channels than 1 and 3."""
    sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
    if any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides):
        raise ValueError(f"size must be a positive number of pixels, or (height, width); got {size!r}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB); got {channels!r}")


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype that is not floating."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating, since pixels lie in [0, 1]; got {dtype}")
