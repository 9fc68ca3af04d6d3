"""The command line end to end: demo and invert, pictures of every kind, and no traceback for bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import VisionTransformer

import aprillab
from aprillab.anatomy import dissect, tensors_of
from aprillab.attacks import AttackNotApplicable
from aprillab.commands import cli, demo, invert
from aprillab.commands.demo import SCENES, demo_figure, play_demo
from aprillab.commands.round import play_round
from aprillab.data import load_victim
from aprillab.metrics import psnr
from aprillab.models import sinusoidal_1d, sinusoidal_2d
from aprillab.training import train
from aprillab.zoo import ModelError, build_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--model", "prenorm", "--image-size", "32"]
TITLES = tuple(scene.title for scene in SCENES)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(*arguments)`` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return call


def is_one_error(err: str, *fragments: str) -> None:
    """stderr ends in one message in the command's form that holds every fragment."""
    last = err.splitlines()[-1]
    assert last.startswith("aprillab: error: "), err
    assert err.count("aprillab: error:") == 1
    for fragment in fragments:
        assert fragment in last, last


def picture(seed: int = 0, height: int = 40, width: int = 48) -> np.ndarray:
    """8-bit RGB levels, smooth enough to be a picture and different in every patch."""
    levels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC))


# --- Usage ----------------------------------------------------------------------------------------------------


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--version"], [f"aprillab {aprillab.__version__}"]),
        (["--help"], ["demo", "invert", "audit", "compare", "Exit codes: 0", "people who said yes"]),
        (["demo", "--help"], ["demo.png", "span attack", "Exit codes"]),
        (["invert", "--help"], ["difference magnified", "attack_seconds", "timm:NAME", "S/8 pixels"]),
        (["compare", "--help"], ["match:april", "mnist:K", "late/{position}-{seed}", "goes on where"]),
        (["audit", "--help"], ["MODULE:FUNCTION", "model.named_parameters()", "torch.save", "--withheld"]),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in expected), arguments
        assert max(map(len, shown.splitlines())) <= 118


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["destroy"], "invalid choice"),
        (["invert"], "PHOTO"),
        (["invert", "coffee", "--attack", "deep"], "'deep'"),
        (["invert", "coffee", "--dtype", "float16"], "float32"),
        (["invert", "coffee", "--image-size", "0"], "'0' is no whole number from 1 up"),
        (["invert", "coffee", "--seed", "-1"], "--seed"),
        (["invert", "coffee", "--seed", "many"], "'many' is no whole number from 0 up"),
        (["audit", "--model", "m:f"], "--update"),
        (["audit", "--model", "m:f", "--update", "u", "--out", "o", "--preprocessing", "loud"], "imagenet"),
        (["audit", "--model", "m:f", "--update", "u", "--out", "o", "--preprocessing", "0.5,-1"], "positive"),
        (["audit", "--model", "m:f", "--update", "u", "--out", "o", "--part", "position"], "PART=TENSOR"),
    ],
)
def test_wrong_usage_is_one_line(run: Run, arguments: list[str], fragment: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    is_one_error(err, fragment, "--help")


def test_no_command_shows_the_help(run: Run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("usage: aprillab")


def test_interruption_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(invert, "play_round", interrupt)
    code, _, err = run("invert", "coffee", *SMALL)
    assert code == 130
    is_one_error(err, "interrupted")


def test_lack_of_memory_is_no_traceback_and_a_bug_is_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(message: str) -> Callable[..., None]:
        def play(*_: object, **__: object) -> None:
            raise RuntimeError(message)

        return play

    monkeypatch.setattr(invert, "play_round", fail("DefaultCPUAllocator: can't allocate memory"))
    code, _, err = run("invert", "coffee", *SMALL)
    assert code == 2
    is_one_error(err, "not enough memory")
    monkeypatch.setattr(invert, "play_round", fail("a bug of ours"))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli.main(["invert", "coffee", *SMALL])


def test_as_a_process_from_another_folder(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "aprillab", "invert", "coffee", *SMALL, "--attack", "april", "--json", "-"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1
    assert json.loads(ran.stdout)["attack"] is None
    is_one_error(ran.stderr, "first_block")
    assert not list(tmp_path.iterdir())


# --- demo -----------------------------------------------------------------------------------------------------


def small_vit(name: str, *, image_size: int, position: str, seed: int) -> torch.nn.Module:
    """``build_model``, with a torchvision model of 16 patches in the place of ViT-B/16."""
    if name != "vit_b_16":
        return build_model(name, image_size=image_size, position=position, seed=seed)
    with torch.random.fork_rng(devices=[]):
        model = VisionTransformer(image_size, 8, num_layers=2, num_heads=4, hidden_dim=256, mlp_dim=256)
        torch.nn.init.normal_(model.heads.head.weight, std=0.02)
    model.encoder.pos_embedding.requires_grad_(position == "learned")
    return model.eval()


def test_demo_plays_three_attacks(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_victim("astronaut", 32)
    monkeypatch.setattr(demo, "photograph", lambda name, size: small if size == 224 else None)
    monkeypatch.setattr(demo, "build_model", small_vit)
    code, out, err = run("demo", "--out", "new/folder/demo.png")
    assert (code, err) == (0, "")
    rows = [re.split(" {2,}| (?=all)", line) for line in out.splitlines() if line.startswith(TITLES)]
    assert [tuple(row[:3]) for row in rows] == [
        ("APRIL's closed form", "architecture A", "all gradients"),
        ("patch-embedding system", "torchvision ViT-B/16", "all gradients"),
        ("span attack", "the same ViT-B/16", "all but position"),
    ]
    for row in rows:
        score, similarity, attack_seconds, gradient_seconds = map(float, row[3:7])
        assert score > 60
        assert 0.99 < similarity <= 1 + 1e-9
        assert attack_seconds < 10
        assert gradient_seconds < 10
        assert row[7] == "yes"
    for text in (
        "random weights, float32, one image, 32×32",
        "warm up",
        "people who said yes",
        "new/folder/demo.png",
    ):
        assert text in out
    with Image.open(tmp_path / "new/folder/demo.png") as figure:
        assert figure.format == "PNG"
        assert figure.width > 2.2 * figure.height


def test_demo_figure_shows_the_pictures_it_was_given() -> None:
    pixels = load_victim("coffee", 32)
    model = build_model("prenorm", image_size=32)
    played = play_round(model, pixels, 3)
    axes = demo_figure(pixels, [(SCENES[1], played)]).axes
    shown = [Tensor(ax.images[0].get_array().astype("float64")).permute(2, 0, 1) for ax in axes]
    assert torch.allclose(shown[0].double(), pixels.double(), atol=1e-7)
    assert psnr(shown[1].double().clamp(0, 1), pixels.double()) > 90
    assert axes[1].get_xlabel() == f"PSNR {played.psnr:.1f} dB"


@pytest.mark.slow
def test_demo_at_full_size(run: Run, tmp_path: Path) -> None:
    rounds = list(play_demo(load_victim("astronaut")))
    assert [scene.attack for scene, _ in rounds] == ["april", "embedding", "span"]
    assert [played.psnr > least for (_, played), least in zip(rounds, (40, 80, 45), strict=True)] == [True] * 3
    assert all(played.reconstruction.labels.tolist() == [played.label] for _, played in rounds)


# --- invert ---------------------------------------------------------------------------------------------------


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
    assert facts["reason"] in out
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


# --- Models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--model", "vgg16"], "there is no model 'vgg16'; there are april, prenorm, vit_b_16"),
        (["--model", "timm:nonesuch"], "Unknown model (nonesuch)"),
        (["--model", "timm:resnet18", "--image-size", "32"], "timm:resnet18 cannot be built"),
        (["--model", "vit_b_16", "--image-size", "40"], "vit_b_16 cannot be built at image size 40"),
        (["--model", "transformers:vit", "--image-size", "40"], "multiple of the patch size"),
        (["--model", "prenorm", "--image-size", "30"], "multiple of 8"),
        (["--model", "prenorm", "--image-size", "32", "--label", "1000"], "prenorm has classes 0 to 999"),
    ],
)
def test_models_that_cannot_be(run: Run, options: list[str], fragment: str) -> None:
    code, _, err = run("invert", "coffee", *options)
    assert code == 2
    is_one_error(err, fragment)


def test_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"pip install 'aprillab\[timm\]'"):
        build_model("timm:vit_tiny_patch16_224", image_size=32)


@pytest.mark.parametrize("name", ["april", "prenorm", "timm:vit_tiny_patch16_224"])
def test_position_of_a_built_model(name: str) -> None:
    learned, *fixed = (
        build_model(name, image_size=32, position=position)
        for position in ("learned", "frozen", "sinusoidal", "sinusoidal-2d")
    )
    where = dissect(learned).position
    embedding, *others = (dict(model.named_parameters())[where] for model in (learned, *fixed))
    assert embedding.requires_grad
    assert not any(other.requires_grad for other in others)
    assert torch.equal(embedding, others[0])
    rows, width = embedding.shape[-2:]
    grid = round((rows - 1) ** 0.5)
    assert torch.allclose(others[1][0], sinusoidal_1d(rows, width).float())
    assert torch.allclose(others[2][0], sinusoidal_2d((grid, grid), width).float())
    for model in fixed:
        same = [n for n, p in learned.named_parameters() if n != where and torch.equal(p, tensors_of(model)[n])]
        assert len(same) == len(list(learned.parameters())) - 1


def test_no_position() -> None:
    own, other = (build_model(name, image_size=32, position="none") for name in ("prenorm", "vit_b_32"))
    assert dissect(own).position is None
    assert torch.equal(own.head.weight, build_model("prenorm", image_size=32).head.weight)
    assert not other.encoder.pos_embedding.any()
    assert not other.encoder.pos_embedding.requires_grad


def test_shape_of_a_built_model() -> None:
    shape = {"image_size": 28, "patch_size": 7, "width": 32, "depth": 3, "heads": 2, "mlp_ratio": 1.5}
    model = build_model("april", channels=1, classes=10, **shape)
    assert model.patch_embedding.weight.shape == (32, 1, 7, 7)
    assert (len(model.blocks), model.heads, model.blocks[0].mlp[0].out_features) == (3, 2, 48)
    partly = build_model("prenorm", image_size=32, depth=1)
    assert (partly.patch_size, partly.width, partly.heads, len(partly.blocks)) == (4, 384, 6, 1)
    for name, options, fragment in (
        ("vit_b_32", {"width": 64, "channels": 1}, "width, channels: only april and prenorm"),
        ("prenorm", {"image_size": 32, "heads": 5}, "width=384 is not a multiple of heads=5"),
        ("prenorm", {"image_size": 32, "patch_size": 5}, "patch_size=5 does not tile"),
        ("prenorm", {"image_size": 32, "depth": 0}, "depth=0 must be positive"),
        ("prenorm", {"channels": 2}, "channels=2"),
        ("prenorm", {"image_size": 32, "width": 66, "heads": 2, "position": "sinusoidal-2d"}, "multiple of 4"),
        ("prenorm", {"position": "spiral"}, "'spiral' is none of learned"),
    ):
        with pytest.raises(ModelError, match=fragment):
            build_model(name, **options)


# --- Weights of a file --------------------------------------------------------------------------------------------

SHAPE = {"image_size": 8, "patch_size": 4, "width": 32, "depth": 1, "heads": 2, "classes": 5}


@pytest.mark.parametrize("position", ["learned", "frozen", "sinusoidal", "none"])
def test_checkpoints_come_back(tmp_path: Path, position: str) -> None:
    """Whether the trained model had its fixed table as a buffer, a frozen parameter, or not at all."""
    model = aprillab.VisionTransformer(**SHAPE, position=position, seed=8)
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "trained.safetensors"
    train(model, images, torch.arange(6) % 5, epochs=1, batch_size=3, checkpoint=file, progress=False)
    built = build_model("prenorm", **SHAPE, position=position, weights=file, dtype=torch.float64)
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensors_of(built)[name], tensor.double()), name
    assert not built.training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in built.named_parameters() if p.requires_grad} == trained
    wrong = {"learned": "none", "frozen": "learned", "sinusoidal": "learned", "none": "sinusoidal"}[position]
    with pytest.raises(ModelError, match=r"trained\.safetensors: .*position"):
        build_model("prenorm", **SHAPE, position=wrong, weights=file)


def test_state_dicts_of_other_libraries(tmp_path: Path) -> None:
    save_file(build_model("vit_b_32", image_size=32, classes=7, seed=5).state_dict(), tmp_path / "vit.safetensors")
    built = build_model("vit_b_32", image_size=32, classes=7, position="frozen", weights=tmp_path / "vit.safetensors")
    same = build_model("vit_b_32", image_size=32, classes=7, seed=5)
    assert all(torch.equal(tensors_of(built)[name], weight) for name, weight in tensors_of(same).items())
    for options, fragment in (
        ({"classes": 6}, "do not fit"),
        ({"classes": 7, "position": "sinusoidal"}, "not the one of position='sinusoidal'"),
        ({"classes": 7, "position": "none"}, "not the one of position='none'"),
    ):
        with pytest.raises(ModelError, match=fragment):
            build_model("vit_b_32", image_size=32, weights=tmp_path / "vit.safetensors", **options)


def test_a_head_of_zeros_from_a_file_stays(tmp_path: Path) -> None:
    model = aprillab.VisionTransformer(**SHAPE)
    torch.nn.init.zeros_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "zero.safetensors")
    assert not build_model("prenorm", **SHAPE, weights=tmp_path / "zero.safetensors").head.weight.any()


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "pickle.pt")
    for name in ("pickle.pt", "absent.safetensors"):
        with pytest.raises(ModelError, match=f"{name}: not a readable safetensors file"):
            build_model("prenorm", **SHAPE, weights=tmp_path / name)


def test_weights_follow_the_seed() -> None:
    one, two, other = (build_model("timm:vit_tiny_patch16_224", image_size=32, seed=seed) for seed in (3, 3, 4))
    for name, weight in tensors_of(one).items():
        assert torch.equal(weight, tensors_of(two)[name]), name
    assert not torch.equal(one.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_zero_head_of_torchvision_is_woken() -> None:
    model = build_model("vit_b_32", image_size=32, classes=10)
    assert 0.015 < model.heads.head.weight.std() < 0.025
    assert psnr(play_round(model, load_victim("coffee", 32), 9).reconstruction.pixels[0], coffee()) > 90
    with pytest.raises(AttackNotApplicable, match="first attention does not read"):
        play_round(model, load_victim("coffee", 32), 0, attack="april")


def coffee() -> Tensor:
    return load_victim("coffee", 32, dtype=torch.float64)


# --- Places that cannot be written -------------------------------------------------------------------------------


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
