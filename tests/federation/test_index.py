"""The index of a recording is a file like any other: nothing in it is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aprillab.federation import index
from aprillab.federation.index import FORMAT, INDEX, CutOff, Reply, fault_of, name_of, read_index, reply_of
from aprillab.update import UpdateError

ENTRY: dict[str, Any] = {"round": 1, "client": "ada", "node": "7", "sent": "a.safetensors", "file": "b.safetensors"}


def written(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / INDEX).write_text(text, encoding="utf-8")
    return folder


def test_entries_come_back_unread(tmp_path: Path) -> None:
    strange = [3, {"round": "x"}]
    assert read_index(written(tmp_path, {"format": FORMAT, "replies": strange})) == {"replies": strange, "faults": []}


def test_an_index_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_MOST_BYTES", 10)
    with pytest.raises(UpdateError, match="are no index of a recording"):
        read_index(written(tmp_path, {"format": FORMAT}))


@pytest.mark.parametrize("text", ['{"format": ', "[" * 100_000, "\\x00"])
def test_what_is_no_json_is_cut_off(tmp_path: Path, text: str) -> None:
    with pytest.raises(CutOff, match="is cut off or no JSON"):
        read_index(written(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": "another-1"}, "its format is 'another-1'"),
        ([1, 2], "its format is 'list'"),
        ({"format": FORMAT, "faults": {}}, "'faults' must be a list"),
    ],
)
def test_another_format_is_said(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UpdateError) as refusal:
        read_index(written(tmp_path, content))
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"round": 0}, "'round' must be an integer from 1 up, not 0"),
        ({"round": True}, "'round' must be an integer"),
        ({"round": 10**10}, "'round' must be an integer"),
        ({"server_round": 1.5}, "'server_round' must be an integer"),
        ({"file": "/etc/b.safetensors"}, "'file' must be the name of a safetensors file in the folder"),
        ({"sent": "..\\a.safetensors"}, "'sent' must be the name"),
        ({"sent": "a.pt"}, "'sent' must be the name"),
        ({"sent": f"{'a' * 200}.safetensors"}, "'sent' must be the name"),
        ({"metrics": [1]}, "'metrics' must be an object"),
    ],
)
def test_a_reply_that_makes_no_sense_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UpdateError) as refusal:
        reply_of(ENTRY | changed)
    assert words in str(refusal.value)


def test_a_client_without_a_name_has_its_nodes() -> None:
    assert reply_of(ENTRY).client == "ada"
    assert reply_of(ENTRY | {"client": None}).client == "7"
    assert reply_of(ENTRY).server_round == 1


@pytest.mark.parametrize(
    ("said", "images"),
    [(3, 3), (3.0, 3), (3.5, None), (True, None), ("3", None), (0, None), (10**9, None), (float("nan"), None)],
)
def test_a_count_of_pictures_is_believed_if_it_can_be(said: Any, images: int | None) -> None:
    assert Reply(1, 1, "ada", "7", "a", "b", metrics={"num-examples": said}).images == images


def test_of_a_fault_what_makes_no_sense_is_left_out() -> None:
    assert fault_of("x") == index.Fault(0, "", "")
    assert fault_of({"round": True, "client": 3, "words": ["x"]}) == index.Fault(0, "", "")
    long = fault_of({"round": 2, "client": "ada\n", "words": "\x1b[31m" + "x" * 5000})
    assert (long.round, long.client, len(long.words)) == (2, "ada", 2000)
    assert "\x1b" not in long.words
    assert len(name_of("a" * 500)) == 100
