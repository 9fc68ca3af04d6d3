"""``aprillab invert``: numbers and pictures, pictures of every kind, models and places that cannot
be.
"""

from __future__ import annotations

import json
import math
import shlex
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import SMALL, Run, is_one_error
from PIL import Image

from aprillab.attacks import invert
from aprillab.attacks.searches.problem import Problem
from aprillab.commands import invert as command
from aprillab.commands import round as round_
from aprillab.data import load_victim
from aprillab.update import client_update


def picture(seed: int = 0, height: int = 40, width: int = 48) -> np.ndarray:
    """8-bit RGB levels, smooth enough to be a picture and different in every patch."""
    levels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("options", "attack", "least", "exact"),
    [
        (["--model", "prenorm"], "embedding_closed_form", 90, True),
        (["--model", "prenorm", "--position", "frozen"], "span_closed_form", 80, True),
        (["--model", "prenorm", "--position", "sinusoidal", "--dtype", "float64"], "span_closed_form", 110, True),
        (["--model", "prenorm", "--position", "sinusoidal"], "span_closed_form", 8, False),
        (["--model", "april", "--attack", "april"], "april_closed_form", 60, True),
        (["--model", "april", "--attack", "april", "--dtype", "float64"], "april_closed_form", 150, True),
        (["--model", "april", "--attack", "span", "--label", "7"], "span_closed_form", 60, True),
    ],
)
def test_invert_writes_numbers_and_a_picture(
    run: Run, tmp_path: Path, options: list[str], attack: str, least: float, exact: bool
) -> None:
    code, out, err = run(
        "invert", "chelsea", "--image-size", "32", *options, "--out", "a/b.png", "--json", "c/d.json"
    )
    assert (code, err) == (0, "")
    facts = json.loads((tmp_path / "c/d.json").read_text(encoding="utf-8"))
    assert (facts["attack"], facts["exact"]) == (attack, exact)
    assert facts["psnr"] > least
    assert facts["ssim"] <= 1 + 1e-9
    assert facts["attack_seconds"] > 0
    assert facts["gradient_seconds"] > 0
    assert facts["label"] == facts["true_label"] == (7 if "--label" in options else facts["true_label"])
    assert facts["image_size"] == 32
    assert facts["dtype"] == ("float64" if "float64" in options else "float32")
    assert facts["predicted_psnr"] > 0
    assert f"PSNR {facts['psnr']:.1f} dB" in out
    assert " ".join(facts["reason"].split()) in " ".join(out.split())
    with Image.open(tmp_path / "a/b.png") as figure:
        assert figure.width > 2 * figure.height


def test_json_to_stdout_is_json_alone(run: Run, tmp_path: Path) -> None:
    code, out, err = run("invert", "coffee", *SMALL, "--seed", "5", "--json", "-")
    assert code == 0
    facts = json.loads(out)
    assert facts["seed"] == 5
    assert facts["picture"] == "invert.png"
    assert (tmp_path / "invert.png").exists()
    assert "result   PSNR" in err


def test_refusal_says_why_and_writes_json(run: Run, tmp_path: Path) -> None:
    code, _, err = run("invert", "coffee", *SMALL, "--attack", "april", "--json", "numbers.json")
    assert code == 1
    is_one_error(err, "april refused", "LayerNorm", 'first_block="prenorm"')
    facts = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))
    assert facts["attack"] is None
    assert facts["exact"] is False
    assert "LayerNorm" in facts["reason"]
    assert not (tmp_path / "invert.png").exists()
    code, _, err = run("invert", "coffee", *SMALL, "--attack", "embedding", "--position", "frozen")
    assert code == 1
    is_one_error(err, "position_embedding is fixed or withheld")


def test_seed_decides_weights_and_leaves_the_global_generator(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    run("invert", "coffee", *SMALL, "--json", "a.json")
    assert torch.equal(torch.rand(3), expected)
    run("invert", "coffee", *SMALL, "--json", "b.json")
    run("invert", "coffee", *SMALL, "--seed", "1", "--json", "c.json")
    a, b, c = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "abc")
    assert a["psnr"] == b["psnr"] != c["psnr"]
    assert a["true_label"] == b["true_label"] != c["true_label"]


# --- Searches, losses, and what is asked of a picture -----------------------------------------------------------

TINY = ["--model", "prenorm", "--image-size", "8"]  # 64 patches of one pixel: a search step takes milliseconds


@pytest.mark.parametrize(
    ("attack", "function", "options"),
    [
        ("match", "match_gradients(april)", ["--evaluations", "3"]),
        ("match:dlg", "match_gradients(dlg)", ["--evaluations", "3"]),
        ("span_then_match", "span_then_match", ["--evaluations", "3", "--position", "sinusoidal"]),
        ("span_then_round", "span_then_round", ["--evaluations", "0", "--position", "sinusoidal"]),
    ],
)
def test_every_attack_of_the_catalogue(
    run: Run, tmp_path: Path, attack: str, function: str, options: list[str]
) -> None:
    code, out, _ = run("invert", "coffee", *SMALL, "--attack", attack, *options, "--json", "a.json")
    assert code == 0
    facts = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert facts["attack"] == function
    assert facts["diagnostics"]["evaluations"] == int(options[1])
    assert f"attack   {function}" in out


def test_a_search_has_a_budget_in_seconds(run: Run, tmp_path: Path) -> None:
    assert run("invert", "coffee", *TINY, "--attack", "match", "--seconds", "0.5", "--json", "a.json")[0] == 0
    facts = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert facts["diagnostics"]["stopped"] == "seconds"
    assert facts["attack_seconds"] < 10


def test_a_budget_that_is_none_is_one_line(run: Run) -> None:
    code, _, err = run("invert", "coffee", *SMALL, "--attack", "match", "--evaluations", "0")
    assert code == 2
    is_one_error(err, "--evaluations: max_evaluations=0")


@pytest.mark.parametrize("calls", [1, 4])
def test_interruption_of_a_search_keeps_the_best(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    seen: list[float] = []

    def interrupting(_: object) -> Callable[[dict[str, Any], torch.Tensor], None]:
        def interrupt(entry: dict[str, Any], _: torch.Tensor) -> None:
            seen.append(entry["loss"])
            if len(seen) == calls:
                raise KeyboardInterrupt

        return interrupt

    monkeypatch.setattr(command, "_lines", interrupting)
    code, out, err = run("invert", "coffee", *SMALL, "--attack", "match", "--json", "a.json")
    assert code == 130
    facts = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert facts["diagnostics"]["stopped"] == "interrupted"
    assert facts["diagnostics"]["loss"] == pytest.approx(min(seen))
    assert "the search was interrupted; this is the best it saw" in err
    assert "wrote    invert.png" in out
    assert (tmp_path / "invert.png").exists()


def test_interruption_before_the_first_picture_is_told_from_a_search_that_found_none(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    options = ["coffee", *SMALL, "--attack", "match", "--evaluations", "2"]
    monkeypatch.setattr(Problem, "evaluate", interrupt)
    assert run("invert", *options)[0] == 130
    monkeypatch.setattr("aprillab.attacks.searches.match.run", lambda *_: "diverged")
    code, _, err = run("invert", *options)
    assert code == 1
    is_one_error(err, "no picture with a finite loss", "ended by: diverged")


def test_a_search_without_a_terminal_says_now_and_then_that_it_lives(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_EVERY", 0.0)
    _, out, _ = run("invert", "coffee", *SMALL, "--attack", "match", "--evaluations", "3")
    assert len([line for line in out.splitlines() if line.startswith("search   ")]) == 3


def test_too_narrow_a_model_is_shown_the_ways_on(run: Run) -> None:
    narrow = ["--model", "timm:vit_tiny_patch16_224"]  # 196 patches, width 192
    code, _, err = run("invert", "coffee", *narrow)
    assert code == 1
    is_one_error(err, "196 patches, but gradients of width 192", "--no-strict", "--attack match:april")


def test_no_way_on_that_leads_nowhere(run: Run) -> None:
    code, _, err = run("invert", "coffee", *SMALL, "--position", "none")
    assert code == 1
    is_one_error(err, "every patch obeys the same equations", "--attack match:april searches")
    assert "--no-strict" not in err
    assert "go on" not in run("invert", "coffee", *SMALL, "--no-verify")[1]  # not exact, yet nothing is to be gained


def test_ways_on_are_commands_that_run(run: Run) -> None:
    _, out, _ = run("invert", "coffee", *SMALL, "--position", "sinusoidal", "--seed", "2")
    ways = [shlex.split(line.partition("go on    ")[2]) for line in out.splitlines() if line.startswith("go on")]
    assert {way[-1] for way in ways} == {"span_then_round", "span_then_match"}
    for way in ways:
        assert way[:3] == ["aprillab", "invert", "coffee"]
        assert run(*way[1:], "--evaluations", "1")[0] == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"strict": True, "verify": True, "loss": None}),
        (["--no-strict", "--no-verify"], {"strict": False, "verify": False, "loss": None}),
    ],
)
def test_options_reach_the_attack(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: dict[str, object]
) -> None:
    given: dict[str, object] = {}

    def listen(*arguments: object, **found: object) -> object:
        given.update(found)
        return invert(*arguments, **found)

    monkeypatch.setattr(round_, "invert", listen)
    run("invert", "coffee", *SMALL, *options)
    assert {name: given[name] for name in expected} == expected


def test_the_loss_is_the_client_s_and_the_attacker_knows_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []

    def listen(*arguments: object, **options: object) -> object:
        losses.append(options["loss"])
        return client_update(*arguments, **options)

    monkeypatch.setattr(round_, "client_update", listen)
    code, out, _ = run("invert", "coffee", *SMALL, "--loss", "bce", "--json", "-")
    assert code == 0
    assert json.loads(out)["loss"] == "bce"
    assert float(losses[0](torch.zeros(1, 2), torch.tensor([1]))) == pytest.approx(math.log(2))
    search = ["--attack", "match", "--evaluations", "2"]
    _, out, _ = run("invert", "coffee", *SMALL, "--loss", "cross-entropy,smoothing=0.2", *search, "--json", "-")
    assert json.loads(out)["loss"] == "cross-entropy,smoothing=0.2"
    code, _, err = run("invert", "coffee", *SMALL, "--loss", "bce,weights=1/2")
    assert code == 2
    is_one_error(err, "2 weights, but the model has 1000 classes")


def test_the_reconstruction_alone(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("invert", "coffee", *SMALL, "--reconstruction", "alone/picture.png", "--json", "-")
    assert code == 0
    assert json.loads(out)["reconstruction"] == str(Path("alone/picture.png"))
    expected = (255 * load_victim("coffee", 32)).round().permute(1, 2, 0).numpy()
    with Image.open(tmp_path / "alone/picture.png") as shown:
        assert np.array_equal(np.asarray(shown), expected)


def test_what_was_there_is_replaced_with_a_word(run: Run) -> None:
    assert "(replaced)" not in run("invert", "coffee", *SMALL)[1]
    assert "wrote    invert.png (replaced)" in run("invert", "coffee", *SMALL)[1]


@pytest.mark.parametrize(
    "options", [["--model", "vgg16"], ["--label", "9999"], ["--attack", "april"], ["--image-size", "30"]]
)
def test_a_failed_run_leaves_no_folder(run: Run, tmp_path: Path, options: list[str]) -> None:
    assert run("invert", "coffee", *SMALL, *options, "--out", "new/deeper/x.png")[0] in (1, 2)
    assert not list(tmp_path.iterdir())


# --- Pictures of every kind -----------------------------------------------------------------------------------


def save(kind: str, path: Path) -> Path:
    rgb = picture()
    grey = rgb[..., 0]
    if kind == "grey":
        Image.fromarray(grey).save(path)
    elif kind == "RGBA":
        alpha = np.full((*grey.shape, 1), 128, np.uint8)
        Image.fromarray(np.concatenate([rgb, alpha], -1)).save(path)
    elif kind == "16-bit":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif kind == "animated":
        frames = [Image.fromarray(picture(seed)) for seed in range(3)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


@pytest.mark.parametrize(
    ("kind", "name", "notice"),
    [
        ("grey", "x.png", "a grey picture; its three channels are equal"),
        ("RGBA", "x.png", "composited on white"),
        ("16-bit", "x.png", "16 bits; it is rounded to 8 bits"),
        ("animated", "x.gif", "3 frames or pages; only the first is used"),
    ],
)
def test_unusual_pictures_work_and_are_remarked_on(
    run: Run, tmp_path: Path, kind: str, name: str, notice: str
) -> None:
    path = save(kind, tmp_path / name)
    code, out, err = run("invert", path, *SMALL, "--json", "-")
    assert code == 0
    assert json.loads(out)["psnr"] > 80
    notes = [line for line in err.splitlines() if line.startswith("aprillab: note: ")]
    assert any(notice in note for note in notes)
    assert any("48×40 pixels; cut to its central square and resampled to 32×32" in note for note in notes)


def test_what_is_no_picture(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "words.jpg").write_text("not a picture")
    whole = save("grey", tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for name, fragment in (
        ("empty.png", "empty"),
        ("words.jpg", "not a picture"),
        ("half.png", "cannot be read"),
        ("absent.png", "no such file, and no victim of that name; victims are astronaut"),
        (".", "folder"),
    ):
        code, out, err = run("invert", name, *SMALL)
        assert (code, out) == (2, "")
        is_one_error(err, name, fragment)
    assert run("demo", "--photo", "absent.png")[0] == 2
    assert not (tmp_path / "demo.png").exists()


def test_a_picture_that_is_not_square(run: Run, tmp_path: Path) -> None:
    levels = picture(height=40, width=60)
    Image.fromarray(levels).save(tmp_path / "wide.png")
    options = ["--model", "timm:vit_tiny_patch16_224", "--image-size", "32x48", "--reconstruction", "alone.png"]
    code, out, err = run("invert", "wide.png", *options, "--json", "-")
    assert code == 0
    assert json.loads(out)["image_size"] == [32, 48]
    assert "60×40 pixels (width × height); resampled to 48×32" in err
    with Image.open(tmp_path / "alone.png") as shown, Image.open(tmp_path / "wide.png") as original:
        expected = np.asarray(original.resize((48, 32), Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(np.asarray(shown).astype(int) - expected).max() <= 1


def test_a_colour_picture_of_16_bits_is_remarked_on(run: Run, tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)  # 16 bits, RGB
    rows = b"".join(b"\0" + np.random.default_rng(0).bytes(32 * 6) for _ in range(32))
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    code, _, err = run("invert", "deep.png", *SMALL)
    assert code == 0
    assert "deep.png: a picture of 16 bits a channel; it is rounded to 8 bits" in err


# --- Models that cannot be, and places that cannot be written ---------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--model", "vgg16"], "there is no model 'vgg16'; there are april, prenorm, vit_b_16"),
        (["--model", "timm:nonesuch"], "Unknown model (nonesuch)"),
        (["--model", "timm:resnet18", "--image-size", "32"], "timm:resnet18 cannot be built"),
        (["--model", "vit_b_16", "--image-size", "40"], "vit_b_16 cannot be built at image size 40"),
        (["--model", "transformers:vit", "--image-size", "40"], "multiple of the patch size"),
        (["--model", "prenorm", "--image-size", "30"], "multiple of 8"),
        (["--model", "vit_b_16", "--image-size", "100"], "it must be a multiple of the patch size, 16"),
        (["--model", "vit_b_16", "--image-size", "32x48"], "at image size 32×48: it takes square pictures only"),
        (["--model", "timm:vit_tiny_patch16_224", "--image-size", "30x48"], "do not tile an image of (30, 48)"),
        (["--model", "prenorm", "--image-size", "32", "--label", "1000"], "prenorm has classes 0 to 999"),
    ],
)
def test_models_that_cannot_be(run: Run, options: list[str], fragment: str) -> None:
    code, _, err = run("invert", "coffee", *options)
    assert code == 2
    is_one_error(err, fragment)


@pytest.mark.parametrize("command", [["demo"], ["invert", "coffee", *SMALL]])
@pytest.mark.parametrize(
    ("place", "fragment"),
    [
        ("file.txt/x.png", "no folder that can be written"),
        ("file.txt/deeper/x.png", "no folder that can be written"),
        ("folder.png", "this is a folder"),
        ("x.jpg", "ends in .png"),
    ],
)
def test_pictures_nowhere(run: Run, tmp_path: Path, command: list[str], place: str, fragment: str) -> None:
    (tmp_path / "file.txt").touch()
    (tmp_path / "folder.png").mkdir()
    code, out, err = run(*command, "--out", place)
    assert (code, out) == (2, "")  # refused before anything is computed
    is_one_error(err, fragment)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux's /proc, which not even root can write")
def test_json_where_the_system_forbids_it(run: Run, tmp_path: Path) -> None:
    code, out, err = run("invert", "coffee", *SMALL, "--json", "/proc/numbers.json")
    assert (code, out) == (2, "")
    is_one_error(err, "/proc", "no folder that can be written")


def test_disk_that_fails_at_the_end_leaves_the_numbers(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, out, err = run("invert", "coffee", *SMALL)
    assert code == 2
    is_one_error(err, "invert.png: cannot be written (No space left on device)")
    assert "result   PSNR" in out
