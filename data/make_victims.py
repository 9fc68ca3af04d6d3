"""Make the victims' pictures in data/victims/ again, from files that ship inside scikit-image and matplotlib.

    python data/make_victims.py            write the pictures that differ, and the manifest's checksums
    python data/make_victims.py --check    write nothing; say whether pictures, manifest and packages agree

manifest.json is the recipe: which file of which package, which square of it, to what size. This script carries it
out. A source file whose checksum is not the recorded one is not used: a new release of a package may have replaced
the picture. To adopt it, look at it and its licence, set its "source_sha256" to null in the manifest, and run the
script again.

Exit status: 0 all is well; 1 something disagrees; 3 nothing disagrees, but the installed packages lack some of the
sources, so these pictures could not be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = Path(__file__).resolve().parent / "victims"

# JPEG decoders may differ by a level or two; a wrong crop or filter is far outside.
MAX_LEVELS, MEAN_LEVELS = 4, 0.25

FLAT_PATCH, FLAT_LEVELS = 16, 2.0


def source_file(entry: dict[str, Any]) -> Path | None:
    """Where the installed package keeps the picture; None if it does not."""
    module, _, inside = entry["package_file"].partition("/")
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, inside)
        if path.is_file():
            return path
    return None


def render(source: Path, entry: dict[str, Any]) -> Image.Image:
    """The entry's square of the source, as an RGB picture of its size."""
    left, top, right, bottom = entry["crop"]
    with Image.open(source) as picture:
        inside = 0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height
        if not inside or right - left != bottom - top:
            raise SystemExit(f"{entry['name']}: crop {entry['crop']} is no square within {picture.size}")
        size = (entry["size"], entry["size"])
        resampling = Image.Resampling[entry["resampling"].upper()]
        return picture.convert("RGB").crop((left, top, right, bottom)).resize(size, resampling)


def flat_patches(picture: Image.Image) -> int:
    """How many of the 16 × 16 patches vary by less than two 8-bit levels (standard deviation) in every channel."""
    pixels = np.asarray(picture, dtype=np.float64)
    height, width, channels = pixels.shape
    patches = pixels.reshape(height // FLAT_PATCH, FLAT_PATCH, width // FLAT_PATCH, FLAT_PATCH, channels)
    return int((patches.std(axis=(1, 3)).max(axis=-1) < FLAT_LEVELS).sum())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check(entry: dict[str, Any], folder: Path) -> tuple[list[str], str | None]:
    """What disagrees (empty if nothing), and why the source could not be compared (None if it was)."""
    path = folder / entry["file"]
    if not path.is_file():
        return [f"{path} is missing"], None
    with Image.open(path) as file:
        committed = file.convert("RGB")
        mode, size = file.mode, file.size
    wrong = []
    if mode != "RGB" or size != (entry["size"], entry["size"]):
        wrong.append(f"is {mode} of {size}, not RGB of {entry['size']} × {entry['size']}")
    if sha256(path.read_bytes()) != entry["file_sha256"]:
        wrong.append("file_sha256 differs from the manifest's")
    if sha256(committed.tobytes()) != entry["pixels_sha256"]:
        wrong.append("pixels_sha256 differs from the manifest's")
    if not wrong and flat_patches(committed) != entry["flat_patches"]:
        wrong.append(f"has {flat_patches(committed)} flat patches, the manifest says {entry['flat_patches']}")
    source = source_file(entry)
    if source is None:
        return wrong, f"{entry['package']} is not installed or has no {entry['package_file']}"
    if sha256(source.read_bytes()) != entry["source_sha256"]:
        old, new = entry["package_version"], importlib.metadata.version(entry["package"])
        return wrong, f"{entry['package_file']} is another file in {entry['package']} {new} than it was in {old}"
    if size == (entry["size"], entry["size"]):
        difference = np.abs(np.asarray(render(source, entry), dtype=int) - np.asarray(committed, dtype=int))
        if difference.max() > MAX_LEVELS or difference.mean() > MEAN_LEVELS:
            wrong.append(
                f"is not the recipe's picture: {difference.max()} levels off, {difference.mean():.2f} on average"
            )
    return wrong, None


def write(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write one picture where it differs, and return its entry with the measured fields filled in."""
    source = source_file(entry)
    if source is None:
        raise SystemExit(f"{entry['name']}: {entry['package']} is not installed or has no {entry['package_file']}")
    found = sha256(source.read_bytes())
    version = importlib.metadata.version(entry["package"])
    if entry["source_sha256"] is None:
        entry = {**entry, "source_sha256": found, "package_version": version}
    elif entry["source_sha256"] != found:
        raise SystemExit(
            f"{entry['name']}: {entry['package_file']} of {entry['package']} {version} is not the file of "
            f"{entry['package_version']} that the manifest means. Look at it and its licence; to adopt it, set "
            f"source_sha256 to null in {folder / 'manifest.json'}."
        )
    picture = render(source, entry)
    path = folder / entry["file"]
    current = None
    if path.is_file():
        with Image.open(path) as file:
            current = file.tobytes() if file.mode == "RGB" else None
    # A file with the right pixels stays as it is: another zlib packs the same pixels into other bytes.
    if current != picture.tobytes():
        picture.save(path, "PNG", optimize=True)
        print(f"wrote {path}")
    return {
        **entry,
        "flat_patches": flat_patches(picture),
        "pixels_sha256": sha256(picture.tobytes()),
        "file_sha256": sha256(path.read_bytes()),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where manifest.json and the pictures are")
    options = parser.parse_args(arguments)
    manifest = options.folder / "manifest.json"
    entries = json.loads(manifest.read_text(encoding="utf-8"))

    if not options.check:
        entries = [write(entry, options.folder) for entry in entries]
        manifest.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0

    disagree = unknown = 0
    for entry in entries:
        wrong, not_compared = check(entry, options.folder)
        remarks = wrong + ([f"not compared: {not_compared}"] if not_compared else [])
        print(f"{entry['name']}: {'; '.join(remarks) or 'ok'}")
        disagree += bool(wrong)
        unknown += not_compared is not None
    listed = {entry["file"] for entry in entries}
    for stray in sorted(path.name for path in options.folder.glob("*.png") if path.name not in listed):
        print(f"{stray}: not in the manifest")
        disagree += 1
    return 1 if disagree else 3 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
