"""The victims, their manifest, and the script that makes them."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from aprillab.data import folders, load_victim, load_victims, mnist5k, victim_info, victims
from aprillab.data.victims import _manifest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "victims"


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
    # Nearest or plain bilinear sampling keeps the gravel's full contrast at 1/7 of the size;
    # averaging does not.
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
    monkeypatch.setattr(folders.resources, "files", lambda package: tmp_path / package)
    monkeypatch.setattr(folders, "__file__", str(tmp_path / "aprillab" / "data" / "folders.py"))
    _manifest.cache_clear()
    try:
        assert victims() == [entry["name"] for entry in manifest]
        assert load_victim(manifest[2]["name"]).shape == (3, 224, 224)
        shutil.rmtree(tmp_path / "aprillab" / "_victims")
        _manifest.cache_clear()
        with pytest.raises(FileNotFoundError, match=r"pip install -e \."):
            victims()
    finally:
        _manifest.cache_clear()


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
