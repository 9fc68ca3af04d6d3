"""The file an update travels in: safetensors, never unpickled, its facts checked."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from updated import changed

from aprillab.update import ClientUpdate, UpdateError, files, load_update, save_update


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_saved_is_what_is_loaded(update: ClientUpdate, tmp_path: Path, dtype: torch.dtype) -> None:
    said = {"learning_rate": 0.1, "local_steps": 5, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    sent = replace(update.to(dtype=dtype), batch_size=3, source="fedavg", rounding=1e-3, **said).without(
        ["head.bias"]
    )
    save_update(sent, tmp_path / "update.safetensors")
    received = load_update(str(tmp_path / "update.safetensors"))
    assert (received.withheld, received.batch_size, received.source) == (("head.bias",), 3, "fedavg")
    assert received.facts() == sent.facts()
    assert {name: getattr(received, name) for name in said} == said
    assert received.rounding == 1e-3
    assert set(received.gradients) == set(sent.gradients)
    for name, g in sent.gradients.items():
        assert received.gradients[name].dtype == dtype
        assert torch.equal(received.gradients[name], g)


def test_gradients_that_share_memory_can_be_saved(update: ClientUpdate, tmp_path: Path) -> None:
    """With one image the class token's gradient is the first row of the position
    embedding's, in place.
    """
    pointers = [update.gradients[n].untyped_storage().data_ptr() for n in ("class_token", "position_embedding")]
    assert pointers[0] == pointers[1], "not what this test is about any more"
    transposed = changed(update, "head.weight", lambda g: g.T.contiguous().T)
    save_update(transposed, tmp_path / "u")
    for name, g in load_update(tmp_path / "u").gradients.items():
        assert torch.equal(g, update.gradients[name])


@pytest.mark.parametrize("low_byte", [0x80, 0x50])
def test_a_header_whose_length_looks_like_a_pickle_is_no_pickle(tmp_path: Path, low_byte: int) -> None:
    for padding in range(20_000):
        save_update(ClientUpdate({"w" * (1 + padding): torch.ones(2)}), tmp_path / "u")
        start = (tmp_path / "u").read_bytes()[:2]
        if start[0] == low_byte:
            break
    assert start[0] == low_byte
    assert load_update(tmp_path / "u").gradients["w" * (1 + padding)].tolist() == [1, 1]


def test_any_safetensors_file_of_gradients_will_do(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "plain")
    update = load_update(tmp_path / "plain")
    assert (update.withheld, update.batch_size, update.source) == ((), None, "fedsgd")
    assert update.facts() == ClientUpdate({"w": torch.ones(2)}).facts()


def test_files_of_the_first_version_are_read(tmp_path: Path) -> None:
    facts = {"withheld": ["b"], "batch_size": 2, "source": "fedavg"}
    metadata = {"format": "aprillab-update-1", "update": json.dumps(facts | {"a later field": [1]})}
    save_file({"w": torch.ones(2)}, tmp_path / "old", metadata=metadata)
    read = load_update(tmp_path / "old").facts()
    assert {name: read[name] for name in facts} == facts
    assert (read["learning_rate"], read["local_steps"], read["momentum"]) == (None, 1, None)


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, kind: str) -> None:
    path, crater = tmp_path / "update.pt", tmp_path / "crater"
    content = {"w": torch.ones(2), "bomb": Bomb(crater)}
    if kind in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    else:
        path.write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    with pytest.raises(UpdateError, match=r"update.pt: a pickle \(torch.save\), which could run code"):
        load_update(path)
    assert not crater.exists()
    torch.load(path, weights_only=False) if kind in ("zip", "legacy") else pickle.loads(path.read_bytes())
    assert crater.exists(), "the bomb was a dud"


def test_files_that_are_no_update(update: ClientUpdate, tmp_path: Path) -> None:
    save_update(update, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    unreadable = "not a readable safetensors file, or cut off"
    for name, content in {
        "empty": b"",
        "four bytes": b"abcd",
        "half a header": whole[:50],
        "one byte short": whole[:-1],
        "half": whole[: len(whole) // 2],
        "one byte more": whole + b"\0",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "text": b"label,gradient\n1,0.5\n" * 20,
        "huge header": struct.pack("<Q", 2**62) + b"{}",
        "old pickle": pickle.dumps([1, 2, 3], protocol=0),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UpdateError, match=unreadable) as error:
            load_update(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing" / "deeper"):
        with pytest.raises(UpdateError, match="no such file"):
            load_update(path)
    save_file({}, tmp_path / "nothing")
    with pytest.raises(UpdateError, match="holds no tensor"):
        load_update(tmp_path / "nothing")


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.uint16, torch.complex64, *FLOAT8])
def test_tensors_that_are_no_gradients_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"good": torch.ones(2), "bad": torch.ones(2).to(dtype)}, tmp_path / "u")
    remedy = r"convert it with .float\(\)" if dtype in FLOAT8 else "leave counters and masks out"
    with pytest.raises(UpdateError, match=f"u: 'bad' is {dtype}; gradients are torch.float16.*: {remedy}"):
        load_update(tmp_path / "u")


@pytest.mark.parametrize("dtype", ["int32", "bool", "float16", "float32", "float64"])
def test_files_that_numpy_wrote_are_read_or_refused_in_a_sentence(tmp_path: Path, dtype: str) -> None:
    save_arrays({"w": np.ones((2, 3), dtype)}, tmp_path / "u")
    if "float" in dtype:
        assert load_update(tmp_path / "u").gradients["w"].dtype == getattr(torch, dtype)
    else:
        with pytest.raises(UpdateError, match=f"'w' is torch.{dtype}; gradients are"):
            load_update(tmp_path / "u")


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "U64", "C64", "BF17"])
def test_dtypes_that_few_versions_know_are_one_error(tmp_path: Path, dtype: str) -> None:
    """Some versions of safetensors and torch read these, others fail in ways of their own."""
    size = {"F4": 1, "F6_E2M3": 3, "F8_E8M0": 4, "BF17": 8}.get(dtype, 32)
    header = json.dumps({"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, size]}})
    (tmp_path / "u").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(size))
    with pytest.raises(UpdateError, match=str(tmp_path)):
        load_update(tmp_path / "u")


def test_whatever_safetensors_raises_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "u")
    for raised in (ValueError("v"), AttributeError("no float4"), RuntimeError("r"), KeyError("k"), MemoryError("m")):

        def fail(*_: object, error: Exception = raised, **__: object) -> None:
            raise error

        monkeypatch.setattr(files, "safe_open", fail)
        with pytest.raises(UpdateError, match="u: not a readable safetensors file, or cut off"):
            load_update(tmp_path / "u")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("{", "not an aprillab update's"),
        ("[1]", "not an aprillab update's"),
        ("null", "not an aprillab update's"),
        ("[" * 100_000, "not an aprillab update's"),
        ('{"batch_size": ' + "9" * 5000 + "}", "not an aprillab update's"),
        (json.dumps({"withheld": "head.bias"}), "'withheld' must be a list of names, not 'head.bias'"),
        (json.dumps({"withheld": ["a", 1]}), "'withheld' must be a list of names"),
        (json.dumps({"withheld": None}), "'withheld' must be a list of names"),
        (json.dumps({"batch_size": 0}), "'batch_size' must be an integer from 1 to 1000000, not 0"),
        (json.dumps({"batch_size": -3}), "'batch_size' must be an integer"),
        (json.dumps({"batch_size": True}), "'batch_size' must be an integer from 1 to 1000000, not True"),
        (json.dumps({"batch_size": 2.0}), "'batch_size' must be an integer"),
        (json.dumps({"batch_size": "2"}), "'batch_size' must be an integer"),
        (json.dumps({"batch_size": 10**12}), "'batch_size' must be an integer"),
        (json.dumps({"source": "gossip"}), "'source' must be 'fedsgd' or 'fedavg', not 'gossip'"),
        (json.dumps({"source": ["fedsgd"]}), "'source' must be"),
        (json.dumps({"withheld": ["w"]}), "metadata 'w' is in the update and among the withheld"),
        (json.dumps({"batch_size": 1, "labels": [3, 5]}), "'batch_size' is 1 and there are 2 'labels': correct one"),
        (json.dumps({"learning_rate": 0}), "u: metadata 'learning_rate' must be positive and finite, not 0"),
        (json.dumps({"learning_rate": "fast"}), "'learning_rate' must be positive and finite, not 'fast'"),
        ('{"learning_rate": Infinity}', "'learning_rate' must be positive and finite, not inf"),
        (json.dumps({"learning_rate": 10**400}), "'learning_rate' must be positive and finite"),
        (json.dumps({"local_steps": 0}), "'local_steps' must be an integer from 1"),
        (json.dumps({"local_steps": None}), "'local_steps' must be an integer from 1"),
        (json.dumps({"momentum": 1}), "'momentum' must be at least 0 and below 1, not 1"),
        ('{"momentum": NaN}', "'momentum' must be at least 0 and below 1, not nan"),
        (json.dumps({"nesterov": 1}), "'nesterov' must be True or False, not 1"),
        (json.dumps({"nesterov": True}), "'nesterov' needs a 'momentum' above 0"),
        (json.dumps({"weight_decay": -1}), "'weight_decay' must be at least 0 and finite, not -1"),
        (json.dumps({"rounding": {}}), "'rounding' must be at least 0 and finite"),
    ],
)
def test_metadata_that_lies_is_refused(tmp_path: Path, facts: str, message: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "u", metadata={"update": facts})
    with pytest.raises(UpdateError, match=message):
        load_update(tmp_path / "u")


def test_where_nothing_can_be_written(update: ClientUpdate, tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "u", tmp_path):
        with pytest.raises(UpdateError, match="cannot be written") as error:
            save_update(update, path)
        assert str(path) in str(error.value)
