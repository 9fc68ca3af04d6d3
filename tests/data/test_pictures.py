"""A user's own photograph: every format, every orientation, and files that are none."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aprillab.data import PictureError, PictureWarning, decode_picture, read_picture


def corners(size: int = 40) -> Image.Image:
    """A square with four colours, so that a flip, a turn or a swapped axis shows: red
    green / blue white.
    """
    image = Image.new("RGB", (size, size), (255, 0, 0))
    half = size // 2
    image.paste((0, 255, 0), (half, 0, size, half))
    image.paste((0, 0, 255), (0, half, half, size))
    image.paste((255, 255, 255), (half, half, size, size))
    return image


def seen_corners(picture: torch.Tensor) -> list[list[float]]:
    side = picture.shape[-1]
    return [
        [round(value, 2) for value in picture[:, y, x].tolist()]
        for y, x in ((2, 2), (2, side - 3), (side - 3, 2), (side - 3, side - 3))
    ]


FOUR = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("png", {}), ("bmp", {}), ("ppm", {}), ("tiff", {}), ("webp", {"lossless": True}), ("gif", {})],
)
def test_every_format(tmp_path: Path, suffix: str, options: dict) -> None:
    path = tmp_path / f"picture.{suffix}"
    corners().save(path, **options)
    picture = read_picture(path, 40)
    assert picture.shape == (3, 40, 40)
    assert picture.dtype == torch.float32
    assert seen_corners(picture) == FOUR


def test_jpeg_by_content_and_not_by_name(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    corners().save(path, "JPEG", quality=100, subsampling=0)
    assert torch.tensor(seen_corners(read_picture(str(path), 40))).sub(torch.tensor(FOUR)).abs().max() < 0.03


def test_the_middle_square_is_kept(tmp_path: Path) -> None:
    for size, box in (((81, 40), (20, 0)), ((40, 81), (0, 20))):
        image = Image.new("RGB", size, (9, 9, 9))
        image.paste(corners(), box)
        image.save(tmp_path / "wide.png")
        assert seen_corners(read_picture(tmp_path / "wide.png", 40)) == FOUR


@pytest.mark.parametrize(("height", "width"), [(2, 6), (6, 2), (8, 4), (3, 3), (4, 8)])
def test_the_middle_rectangle_is_kept(tmp_path: Path, height: int, width: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "x.png")
    scale = min(8 / height, 12 / width)
    high, wide = int(height * scale), int(width * scale)
    top, left = (8 - high) // 2, (12 - wide) // 2
    cut = Image.fromarray(levels[top : top + high, left : left + wide])
    expected = np.asarray(cut.resize((width, height), Image.Resampling.LANCZOS))
    shown = read_picture(tmp_path / "x.png", (height, width))
    assert shown.shape == (3, height, width)
    assert np.array_equal((255 * shown).round().permute(1, 2, 0).numpy(), expected)


def test_resampling_to_the_size_asked_for(tmp_path: Path) -> None:
    corners(200).save(tmp_path / "large.png")
    assert seen_corners(read_picture(tmp_path / "large.png", 32)) == FOUR
    assert seen_corners(read_picture(tmp_path / "large.png", 300)) == FOUR
    assert read_picture(tmp_path / "large.png").shape == (3, 224, 224)
    Image.new("RGB", (1, 1), (51, 102, 153)).save(tmp_path / "dot.png")
    assert read_picture(tmp_path / "dot.png", 4)[:, 3, 0].tolist() == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_s_orientation_is_obeyed(tmp_path: Path, orientation: int) -> None:
    stored_as = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # the viewer turns it clockwise by 90° again
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = corners() if orientation == 1 else corners().transpose(stored_as[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    assert seen_corners(read_picture(tmp_path / "turned.png", 40)) == FOUR


def test_grey_becomes_three_equal_channels_and_colour_one(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 51).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png", 8).unique().tolist() == pytest.approx([0.2])
    corners().save(tmp_path / "colour.png")
    grey = read_picture(tmp_path / "colour.png", 40, channels=1)
    assert grey.shape == (1, 40, 40)
    assert [value for (value,) in seen_corners(grey)] == pytest.approx([0.299, 0.587, 0.114, 1], abs=0.006)


def test_one_bit_and_palette(tmp_path: Path) -> None:
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    assert read_picture(tmp_path / "bit.png", 8).unique().tolist() == [1]
    corners().quantize(16).save(tmp_path / "palette.png")
    assert seen_corners(read_picture(tmp_path / "palette.png", 40)) == FOUR


def test_cmyk(tmp_path: Path) -> None:
    corners().convert("CMYK").save(tmp_path / "print.tiff")
    assert seen_corners(read_picture(tmp_path / "print.tiff", 40)) == FOUR


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    image = corners().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    image.save(tmp_path / "opaque.png")
    assert seen_corners(read_picture(tmp_path / "opaque.png", 40)) == FOUR

    half = Image.new("RGBA", (8, 8), (255, 0, 0, 51))
    half.save(tmp_path / "half.png")
    with pytest.warns(PictureWarning, match=r"half\.png: this is partly transparent; it is composited on white"):
        assert read_picture(tmp_path / "half.png", 8)[:, 0, 0].tolist() == pytest.approx([1, 0.8, 0.8], abs=0.003)

    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "grey.png")
    with pytest.warns(PictureWarning, match="transparent"):
        assert read_picture(tmp_path / "grey.png", 8).unique().tolist() == [1]

    palette = corners().quantize(4)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    with pytest.warns(PictureWarning, match="transparent"):
        assert seen_corners(read_picture(tmp_path / "palette.png", 40)) == [[1, 1, 1], *FOUR[1:]]


@pytest.mark.parametrize("suffix", ["png", "tiff", "ppm"])
def test_16_bits_are_scaled_and_not_cut(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 255], [13107, 65535]], dtype=np.uint16).repeat(4, 0).repeat(4, 1)
    Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    picture = read_picture(tmp_path / f"deep.{suffix}", 8)
    assert picture.shape == (3, 8, 8)
    assert picture[0, ::7, ::7].flatten().tolist() == pytest.approx([0, 1 / 255, 0.2, 1])


def test_16_bits_a_channel_in_colour(tmp_path: Path) -> None:
    # Pillow writes no such file, so it is put together here.
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + np.array([[0, 13107, 65535]] * 4, dtype=">u2").tobytes()
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    path = tmp_path / "deep.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
    )
    assert read_picture(path, 4)[:, 1, 2].tolist() == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_of_several_frames_the_first_is_used_and_this_is_said(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    others = [Image.new("RGB", (40, 40), colour) for colour in ("black", "grey")]
    corners().save(path, save_all=True, append_images=others, **({"lossless": True} if suffix == "webp" else {}))
    with pytest.warns(
        PictureWarning, match=rf"moving\.{suffix}: this holds 3 frames or pages; only the first is used"
    ):
        picture = read_picture(path, 40)
    assert seen_corners(picture) == FOUR


def test_a_phone_s_preview_pictures_are_passed_over_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    corners(64).save(
        path, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))], quality=100, subsampling=0
    )
    with Image.open(path) as image:
        assert image.format == "MPO"
    assert torch.tensor(seen_corners(read_picture(path, 64))).sub(torch.tensor(FOUR)).abs().max() < 0.03


def test_what_is_no_picture_file(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"absent\.png: there is no such file"):
        read_picture(tmp_path / "absent.png")
    with pytest.raises(PictureError, match=r"this is a folder\. Name the picture file itself"):
        read_picture(tmp_path)
    corners().save(tmp_path / "program.eps")  # a format that Pillow hands to another program
    with pytest.raises(PictureError, match=r"program\.eps: this is not a picture in a format read here"):
        read_picture(tmp_path / "program.eps")
    (tmp_path / "empty.png").touch()
    with pytest.raises(PictureError, match=r"empty\.png: the file is empty \(0 bytes\)"):
        read_picture(tmp_path / "empty.png")
    for name, content in (
        ("notes.jpg", b"not a picture"),
        ("vector.svg", b"<svg/>"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            PictureError, match=rf"{name}: this is not a picture in a format read here .*Save it as PNG"
        ):
            read_picture(tmp_path / name)
    assert issubclass(PictureError, ValueError)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such files on Windows")
def test_a_device_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="not a regular file"):
        read_picture("/dev/zero")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corners().save(tmp_path / "locked.png")

    def deny(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", deny)
    with pytest.raises(PictureError, match=r"locked\.png: the picture cannot be read: .*Permission denied"):
        read_picture(tmp_path / "locked.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "bmp"])
def test_a_truncated_picture_is_never_half_shown(tmp_path: Path, suffix: str) -> None:
    load = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(load).save(tmp_path / f"whole.{suffix}")
    content = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for kept in (1, 9, 40, len(content) // 3, len(content) // 2, len(content) * 3 // 4):
        path.write_bytes(content[:kept])
        with pytest.raises(PictureError, match=rf"cut\.{suffix}: .*(cut short|little is left)"):
            read_picture(path)


def test_flipped_bits_give_an_error_or_a_picture_and_nothing_else(tmp_path: Path) -> None:
    corners(24).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    refused = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        (tmp_path / "damaged.png").write_bytes(damaged)
        try:
            assert read_picture(tmp_path / "damaged.png", 8).isfinite().all()
        except PictureError:
            refused += 1
    assert refused > len(content) // 2


@pytest.mark.parametrize("factor", [1, 3])
def test_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: int) -> None:
    # above the limit Pillow only warns, above twice the limit it raises: neither is let through
    corners(40).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1599 // factor)
    with pytest.raises(PictureError, match=r"bomb\.png: the file declares more pixels than is safe"):
        read_picture(tmp_path / "bomb.png")


def test_32_bit_numbers_have_no_defined_white(tmp_path: Path) -> None:
    for dtype in (np.int32, np.float32):
        Image.fromarray(np.ones((8, 8), dtype=dtype)).save(tmp_path / "numbers.tiff")
        with pytest.raises(PictureError, match=r"numbers\.tiff: its pixels are 32-bit numbers \(mode [IF]\)"):
            read_picture(tmp_path / "numbers.tiff")


def test_impossible_forms_are_refused_before_the_file_is_opened() -> None:
    with pytest.raises(ValueError, match="size must be"):
        read_picture("absent.png", 0)
    with pytest.raises(ValueError, match="channels must be"):
        read_picture("absent.png", channels=2)
    with pytest.raises(ValueError, match="dtype must be"):
        read_picture("absent.png", dtype=torch.int32)


# --- From bytes ---------------------------------------------------------------------------------------------------


def test_bytes_are_read_as_their_file_is(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.effect_noise((60, 40), 80).convert("RGB").save(path)
    assert torch.equal(decode_picture(path.read_bytes(), 32), read_picture(path, 32))
    assert decode_picture(path.read_bytes(), (8, 16), channels=1, dtype=torch.float64).shape == (1, 8, 16)


def test_bytes_that_are_no_picture_are_called_by_the_name_given() -> None:
    with pytest.raises(PictureError, match=r"^mine: the file is empty"):
        decode_picture(b"", name="mine")
    with pytest.raises(PictureError, match=r"^your picture: this is not a picture"):
        decode_picture(b"%PDF-1.7")
    with pytest.raises(ValueError, match="channels must be"):
        decode_picture(b"", channels=2)


def test_several_frames_in_bytes_are_said_too() -> None:
    file, frames = io.BytesIO(), [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(file, format="gif", save_all=True, append_images=frames[1:])
    with pytest.warns(PictureWarning, match=r"^mine: this holds 2 frames"):
        decode_picture(file.getvalue(), 8, name="mine")
