"""``aprillab federation`` in this process, and ``aprillab audit --recording``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import Run, is_one_error

from aprillab.commands.recorded import folders_of
from aprillab.federation import example_recording, flower

SMALL = ["--in-process", "--image-size", "16", "--patch-size", "8", "--width", "48", "--depth", "1"]
MODEL = """
from aprillab.federation.course import model_of

def build():
    return model_of({"width": 64, "depth": 1})

def other():
    return model_of({"width": 96, "depth": 1})
"""


def test_what_the_server_has_is_written_for_each_client_and_round(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    code, out, err = run("federation", "--out", "fed", *SMALL, "--local-steps", 3, "--momentum", 0.9)
    assert code == 0, err
    assert out.count("patch-embedding system") == 4
    numbers = json.loads((tmp_path / "fed" / "federation.json").read_text(encoding="utf-8"))
    assert {(one["client"], one["round"]) for one in numbers["seen"]} == {
        (f"client-{i}", j) for i in (1, 2) for j in (1, 2)
    }
    for one in numbers["seen"]:
        assert one["attack"] == "embedding_closed_form"
        assert one["exact"]
        assert one["psnr"] > 60
        assert 0 < one["seconds"] < 60
    assert numbers["clients"] == {"client-1": ["astronaut"], "client-2": ["grace_hopper"]}
    assert (numbers["faults"], numbers["in_process"]) == ([], True)
    made = {path.relative_to(tmp_path / "fed").as_posix() for path in (tmp_path / "fed").rglob("*") if path.is_file()}
    wanted = {"federation.log", "federation.png", "recording/recording.json", "audits/summary.json"}
    wanted |= {f"audits/client-{i}/round-{j}/report.md" for i in (1, 2) for j in (1, 2)}
    assert wanted <= made
    assert "[ROUND 2/2]" in (tmp_path / "fed" / "federation.log").read_text(encoding="utf-8")
    code, _, err = run("federation", "--out", "fed", *SMALL, "--rounds", 1, "--clients", 1)  # what was there goes
    assert code == 0, err
    assert [path.name for path in sorted((tmp_path / "fed" / "recording").glob("*-reply-*"))] == [
        "round-0001-reply-1.safetensors"
    ]


def test_a_batch_is_a_mixture(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    code, _, err = run("federation", "--out", "fed", *SMALL, "--images", 4, "--clients", 1, "--rounds", 1)
    assert code == 0, err
    (one,) = json.loads((tmp_path / "fed" / "federation.json").read_text(encoding="utf-8"))["seen"]
    assert (one["images"], one["exact"]) == (4, False)
    assert one["psnr"] < 30


def test_without_flower_one_line_says_the_remedy(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flower, "find_spec", lambda name: None)
    code, out, err = run("federation", "--out", "fed")
    assert (code, out) == (2, "")
    is_one_error(err, "Flower is not installed", 'pip install "aprillab[federation]"')
    assert not (tmp_path / "fed").exists()


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--momentum", "2"], "'momentum'"),
        (["--optimizer", "adam", "--momentum", "0.9"], "is of SGD"),
        (["--patch-size", "7"], "no such model: patch_size=7 does not tile image_size=16"),
        (["--heads", "5"], "no such model: width=48 is not a multiple of heads=5"),
    ],
)
def test_what_makes_no_sense_is_one_line_before_anything_starts(run: Run, words: list[str], fragment: str) -> None:
    pytest.importorskip("flwr")
    code, out, err = run("federation", "--out", "fed", *SMALL, *words)
    assert (code, out) == (2, "")
    is_one_error(err, fragment)


def test_where_no_client_moved_anything_all_is_written_still(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    code, out, err = run("federation", "--out", "fed", *SMALL, "--classes", 1, "--clients", 1, "--rounds", 1)
    assert (code, "A server and 1 client, in this process: 1 round;" in out) == (1, True), err
    (one,) = json.loads((tmp_path / "fed" / "federation.json").read_text(encoding="utf-8"))["seen"]
    assert (one["attack"], "the two states are the same" in one["reason"]) == (None, True)
    assert json.loads((tmp_path / "fed" / "audits" / "summary.json").read_text(encoding="utf-8"))["audits"] == []


# --- aprillab audit --recording -----------------------------------------------------------------------------------


@pytest.fixture
def recording(tmp_path: Path, run: Run) -> Path:
    (tmp_path / "mine.py").write_text(MODEL, encoding="utf-8")
    return Path(shutil.copytree(example_recording().folder, tmp_path / "recording"))


def test_every_client_in_every_round(run: Run, recording: Path, tmp_path: Path) -> None:
    words = ["audit", "--recording", recording, "--model", "mine:build", "--out", "report"]
    code, out, err = run(*words)
    assert code == 0, err
    lines = [line for line in out.splitlines() if ", round" in line]
    assert [line.partition(".")[0] for line in lines] == [
        *(f"batch, round {i}: unclear" for i in (1, 2, 3)), "batch, rounds together: unclear",
        *(f"{name}, round {i}: exact" for name in ("momentum", "one-step") for i in (1, 2, 3)),
    ]  # fmt: skip
    assert "what to do about the worst of them (momentum in round 1), by its cost" in out
    assert "Adam, of two local steps or more in a round (chapter 09)" in out
    page = (tmp_path / "report/momentum/round-1/report.md").read_text(encoding="utf-8")
    section = page.partition("## What to do about it")[2]
    assert "For the 3 rounds of 5 local steps of this client together: σ = 2.32 for ε = 8" in section
    assert "repository: `notebooks/09_a_real_federation.ipynb`" in section
    code, out, _ = run(*words, "--client", "batch", "--round", 2, "--quiet")
    assert (code, out.count("\n")) == (1, 1)
    assert run(*words, "--client", "one-step", "--fail-on", "exact")[0] == 3


def test_a_recording_that_is_cut_off_leaves_the_others(run: Run, recording: Path) -> None:
    path = recording / "round-0001-reply-1.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    code, out, err = run("audit", "--recording", recording, "--model", "mine:build", "--out", "report", "--round", 1)
    assert code in (0, 1)
    assert out.count(", round 1:") == 2
    assert "is cut off or foreign" in err


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--client", "carl"], "no reply of a client 'carl' can be used; those of these can: batch, momentum"),
        (["--round", "7"], "no reply in round 7"),
        (["--training", "steps=3"], "no such key; there are optimizer"),
        (["--training", "local-steps=0"], "'steps'"),
        (["--training", "steps"], "KEY=VALUE"),
        (["--state", "x"], "--state is of an --update"),
        (["--update", "x"], "not allowed with"),
        (["--model", "mine:other"], "no reply can be audited"),
    ],
)
def test_wrong_usage_is_one_line(run: Run, recording: Path, words: list[str], fragment: str) -> None:
    code, _, err = run("audit", "--recording", recording, "--model", "mine:build", "--out", "report", *words)
    assert code == 2
    is_one_error(err, fragment)


def test_what_is_of_a_recording_is_refused_with_an_update(run: Run, recording: Path) -> None:
    code, _, err = run("audit", "--update", "x", "--model", "mine:build", "--out", "report", "--client", "a")
    assert code == 2
    is_one_error(err, "--client is of a recording")


def test_a_folder_for_each_client_whatever_it_is_called() -> None:
    folders = folders_of(["a/b", "a_b", "A/B", "../..", "", "é"])
    assert len({name.lower() for name in folders.values()}) == 6
    assert all(set(name) <= set("abAB_client-0123456789") for name in folders.values())
