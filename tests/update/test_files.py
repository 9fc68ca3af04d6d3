"""The file an update travels in: safetensors, never unpickled, its facts checked."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from updated import changed

from aprillab.update import ClientUpdate, UpdateError, load_update, save_update


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_saved_is_what_is_loaded(update: ClientUpdate, tmp_path: Path, dtype: torch.dtype) -> None:
    sent = replace(update.to(dtype=dtype), batch_size=3, source="fedavg").without(["head.bias"])
    save_update(sent, tmp_path / "update.safetensors")
    received = load_update(str(tmp_path / "update.safetensors"))
    assert (received.withheld, received.batch_size, received.source) == (("head.bias",), 3, "fedavg")
    assert set(received.gradients) == set(sent.gradients)
    for name, g in sent.gradients.items():
        assert received.gradients[name].dtype == dtype
        assert torch.equal(received.gradients[name], g)


def test_gradients_that_share_memory_can_be_saved(update: ClientUpdate, tmp_path: Path) -> None:
    """With one image the class token's gradient is the first row of the position embedding's, in place."""
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


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_tensors_that_are_no_gradients_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"good": torch.ones(2), "bad": torch.ones(2).to(dtype)}, tmp_path / "u")
    with pytest.raises(UpdateError, match=f"'bad' is {dtype}; gradients are torch.float16"):
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
