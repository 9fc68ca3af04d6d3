"""The audit of somebody's own federated system: what leaked, how far to trust it, bad input in one line each."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from aprillab.anatomy import dissect
from aprillab.audit import TRUST_WORDS, Audit, audit
from aprillab.audit.report import json_safe, markdown, report
from aprillab.commands import cli
from aprillab.data import load_victim
from aprillab.metrics import psnr
from aprillab.models import VisionTransformer
from aprillab.preprocessing import HALF, UNIT
from aprillab.update import ClientUpdate, client_update, save_update
from aprillab.zoo import build_model

SIZE, LABEL = 16, 6
POSITION = "position_embedding"
ATTENTION = [f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value")]


def vit(**options: object) -> VisionTransformer:
    """16 patches of 48 numbers, width 64, 10 classes."""
    shape = {"image_size": SIZE, "patch_size": 4, "width": 64, "depth": 2, "heads": 4, "classes": 10}
    return VisionTransformer(**{**shape, "seed": 1, **options})


def photograph(dtype: torch.dtype = torch.float32, channels: int = 3) -> Tensor:
    return load_victim("coffee", SIZE, dtype=dtype, channels=channels)


def update_of(model: nn.Module, pictures: Tensor | None = None, **options: object) -> ClientUpdate:
    """What a client with the photograph (or ``pictures``, labels counted from 6 on) shares."""
    pictures = photograph()[None] if pictures is None else pictures
    images = dissect(model).preprocessing.to_input(pictures.to(next(model.parameters())))
    return client_update(model, images, torch.arange(len(images)) + LABEL, **options)


def by_attack(found: Audit) -> dict[str, str]:
    return {finding.attack.name: finding.trust for finding in found.findings}


# --- What it concludes ----------------------------------------------------------------------------------------


def test_exact_pictures_are_called_so() -> None:
    model = vit(block="april")
    found = audit(model, update_of(model))
    assert by_attack(found) == {"embedding": "exact", "april": "exact", "span": "exact"}
    for finding in found.findings:
        assert psnr(finding.result.pixels[0], photograph(torch.float64)) > 60
        assert finding.replay < 1e-3
    assert found.verdict == "This update gives the private picture away, exactly: patch-embedding system."
    assert found.labels.labels.tolist() == [LABEL]
    assert found.one_image.holds
    assert [part.state for part in found.parts] == ["shared"] * 7
    assert not found.notes


def test_what_is_withheld_or_fixed_is_told_apart() -> None:
    model = vit()
    withheld = audit(model, update_of(model, withhold=[POSITION]))
    model.position_embedding.requires_grad_(False)
    fixed = audit(model, update_of(model))
    for found, state in ((withheld, "withheld"), (fixed, "fixed")):
        assert [part.state for part in found.parts] == [state, *["shared"] * 6]
        assert by_attack(found) == {"embedding": "none", "april": "none", "span": "exact"}
        assert found.verdict.endswith("exactly: span attack.")


def test_batch_is_a_mixture_whether_the_client_says_so_or_not() -> None:
    model = vit()
    pictures = torch.stack([photograph(), load_victim("chelsea", SIZE)])
    shared = update_of(model, pictures)
    for update in (shared, replace(shared, batch_size=None), replace(shared, batch_size=1)):
        found = audit(model, update)
        assert not found.one_image.holds
        assert by_attack(found) == {"embedding": "mixture", "april": "none", "span": "mixture"}
        assert "no photograph" in found.verdict
        facts = report(found)
        assert not any(entry["exact"] for entry in facts["attacks"].values())
        assert facts["attacks"]["embedding"]["picture"] == "embedding_mixture.png"
    assert audit(model, replace(shared, batch_size=None)).labels.labels.tolist() == [LABEL, LABEL + 1]


def test_noise_is_not_taken_for_a_batch() -> None:
    model = build_model("prenorm", image_size=32, position="frozen")
    pixels = load_victim("coffee", 32)
    clean = update_of(model, pixels[None])
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: g + 1e-4 * g.std() * torch.randn(g.shape, generator=generator) for name, g in clean.gradients.items()
    }
    found = audit(model, replace(clean, gradients=noisy))
    assert not found.one_image.holds  # the head's gradient is not of rank one, which is all it shows
    assert by_attack(found)["span"] == "likely"
    assert psnr(found.applied[0].result.pixels[0], pixels.double()) > 35


def test_replay_catches_an_optimistic_prediction() -> None:
    model = build_model("prenorm", image_size=32, position="sinusoidal")
    pixels = load_victim("coffee", 32)
    found = audit(model, update_of(model, pixels[None]))
    (finding,) = found.applied
    assert psnr(finding.result.pixels[0], pixels.double()) < 20
    assert finding.result.predicted_psnr > 20
    assert finding.replay > 0.1
    assert finding.trust == "poor"
    assert "gives the private picture away" not in found.verdict


def test_other_weights_than_the_clients_are_noticed() -> None:
    found = audit(vit(seed=2), update_of(vit(seed=1)))
    assert by_attack(found)["embedding"] == "contradicted"
    assert "weights" in found.verdict
    assert report(found)["attacks"]["embedding"]["exact"] is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_believed_less(dtype: torch.dtype) -> None:
    model = vit()
    found = audit(model, update_of(model).to(dtype=dtype))
    assert "exact" not in by_attack(found).values()
    assert any(str(dtype).removeprefix("torch.") in note for note in found.notes)
    # Whatever is called close, likely or coarse really is a picture one recognizes.
    for finding in found.applied:
        if finding.trust in ("close", "likely", "coarse"):
            assert psnr(finding.result.pixels[0], photograph(torch.float64)) > 20


def test_trust_hangs_on_conditions_and_not_on_words() -> None:
    model = vit()
    half = audit(model, update_of(model).to(dtype=torch.float16))
    assert half.applied
    for finding in half.applied:
        failed = [condition for condition in finding.result.conditions if not condition.holds]
        assert finding.result.conditions_hold is not bool(failed)
        assert all(condition.text in finding.reason for condition in failed)
        if failed:
            assert finding.trust not in ("exact", "close", "coarse")
    entry = report(half)["attacks"][half.applied[0].attack.name]
    assert [c["name"] for c in entry["conditions"]] == [c.name for c in half.applied[0].result.conditions]


def test_without_the_head_nothing_is_played_back() -> None:
    model = vit()
    found = audit(model, update_of(model, withhold=["head.weight", "head.bias"]))
    assert found.labels is None
    assert by_attack(found)["embedding"] == "exact"
    assert all(finding.replay is None for finding in found.findings)
    assert any("was not checked" in note for note in found.notes)
    assert "gradient residual: not computed" in markdown(found)


def test_notes_name_dropout_several_steps_and_a_forward_pass_that_fails() -> None:
    class Moody(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("needs a mask")

    inner = vit()
    update = update_of(inner)
    model = Moody(inner, nn.Dropout(0.1))
    renamed = {f"0.{name}": g for name, g in update.gradients.items()}
    found = audit(model, replace(update, gradients=renamed, source="fedavg"))
    assert by_attack(found)["embedding"] == "exact"
    text = " ".join(found.notes)
    assert all(word in text for word in ("dropout", "local step", "RuntimeError: needs a mask"))
    assert len(found.notes) == 3


def test_numbers_beyond_all_bounds_break_nothing() -> None:
    model = vit().double()
    update = update_of(model)
    found = audit(model, replace(update, gradients={name: 1e200 * g for name, g in update.gradients.items()}))
    json.dumps(report(found), allow_nan=False)
    assert markdown(found)


def test_model_and_generator_are_left_alone() -> None:
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update, state = update_of(model), torch.get_rng_state()
    audit(model, update)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_json_safe() -> None:
    assert json_safe({1: math.inf, "a": [math.nan, -0.5], "b": torch.tensor([[1, 2]]), "c": (None, True)}) == {
        "1": None, "a": [None, -0.5], "b": [[1, 2]], "c": [None, True],
    }  # fmt: skip
    assert json_safe(torch.tensor([math.inf])) == [None]
    assert json_safe(torch.float16) == "torch.float16"


# --- The command ----------------------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn
from aprillab import VisionTransformer
from torchvision.models import VisionTransformer as Torchvision

SHAPE = dict(image_size=16, patch_size=4, width=64, depth=2, heads=4, classes=10, seed=1)
NUMBER = 3

def build(): return VisionTransformer(**SHAPE)
def april(): return VisionTransformer(**{**SHAPE, "block": "april", "width": 16, "heads": 2})
def narrow(): return VisionTransformer(**{**SHAPE, "width": 8, "heads": 2})
def grey(): return VisionTransformer(**{**SHAPE, "channels": 1})
def zero(): return Torchvision(16, 4, num_layers=1, num_heads=2, hidden_dim=64, mlp_dim=64, num_classes=10)
def word(): return "a model"
def broken(): raise ValueError("two\\nlines")
def convolution(): return nn.Conv2d(3, 4, 3)
class Stranger(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem, self.place = nn.Conv2d(3, 64, 4, 4), nn.Parameter(torch.randn(16, 64))
            self.out = nn.Linear(64, 10)
    def forward(self, x):
        z = self.stem(x).flatten(2).transpose(1, 2) + self.place
        return self.out(torch.tanh(z).square().mean(1))
class Place:
    build = staticmethod(build)
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(function="build", update="update.safetensors", out="found", *more)``: exit code, stdout, stderr.

    In a folder with the module ``federated`` and a good update of its ``build()``.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "federated.py").write_text(MODULE)
    (tmp_path / "faulty.py").write_text("import torch\nimport no_such_package\n")
    save_update(update_of(vit()), tmp_path / "update.safetensors")

    def call(
        function: str = "federated:build", *more: str, update: str = "update.safetensors", out: str = "found"
    ) -> tuple[int, str, str]:
        monkeypatch.delitem(sys.modules, "federated", raising=False)
        path = list(sys.path)
        code = cli.main(["audit", "--model", function, "--update", str(update), "--out", str(out), *more])
        assert sys.path == path
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return call


def is_one_error(err: str, *fragments: str) -> None:
    last = err.splitlines()[-1]
    assert last.startswith("aprillab: error: "), err
    assert err.count("aprillab: error:") == 1
    for fragment in fragments:
        assert fragment in last, last


def test_command_writes_pictures_numbers_and_words(run: Run, tmp_path: Path) -> None:
    code, out, err = run(out="new/found")
    assert (code, err) == (0, "")
    folder = tmp_path / "new/found"
    assert {path.name for path in folder.iterdir()} == {
        "embedding.png", "span.png", "overview.png", "report.json", "report.md",
    }  # fmt: skip
    original = (255 * photograph()).round().permute(1, 2, 0).numpy().astype(int)
    with Image.open(folder / "embedding.png") as picture:
        assert picture.size == (SIZE, SIZE)
        assert np.array_equal(np.asarray(picture), original)
    facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert facts["labels"] == {"labels": [LABEL], "exact": True, "reason": facts["labels"]["reason"]}
    assert facts["model"]["image_size"] == [SIZE, SIZE]
    assert facts["model"]["tensors"]["position"] == POSITION
    entry = facts["attacks"]["embedding"]
    assert (entry["applies"], entry["exact"], entry["trust"], entry["diagnostics"]["rank"]) == (
        True,
        True,
        "exact",
        16,
    )
    assert entry["predicted_psnr"] > 59
    assert entry["gradient_residual"] < 1e-3
    assert facts["attacks"]["april"]["applies"] is False
    words = (folder / "report.md").read_text(encoding="utf-8")
    for text in (facts["verdict"], TRUST_WORDS["exact"], "rank: 16, for 16 patches", "`position_embedding` | shared"):
        assert text in words
    for text in (facts["verdict"], TRUST_WORDS["exact"], "misses the update by", "report.md", "who said yes"):
        assert text in out


def test_withheld_gradients_have_to_be_declared(run: Run, tmp_path: Path) -> None:
    model = vit()
    gradients = {name: g.contiguous() for name, g in update_of(model, withhold=[POSITION]).gradients.items()}
    save_file({name: g.clone() for name, g in gradients.items()}, tmp_path / "foreign.safetensors")  # no metadata
    code, _, err = run(update="foreign.safetensors")
    assert code == 2
    is_one_error(err, "lacks the gradient of 'position_embedding' (1 missing", "--withheld position_embedding")
    code, out, _ = run("federated:build", "--withheld", POSITION, update="foreign.safetensors")
    assert code == 0
    assert "exactly: span attack" in out
    code, _, err = run("federated:build", "--withheld", POSITION)
    assert code == 2
    is_one_error(err, "--withheld position_embedding: this gradient is in the update")


@pytest.mark.parametrize("function", ["april", "narrow"])
def test_too_many_tokens_for_the_width(run: Run, tmp_path: Path, function: str) -> None:
    options = {"block": "april", "width": 16} if function == "april" else {"width": 8}
    save_update(update_of(vit(heads=2, **options)), tmp_path / "update.safetensors")
    code, out, _ = run(f"federated:{function}")
    facts = json.loads((tmp_path / "found/report.json").read_text(encoding="utf-8"))["attacks"]
    if function == "april":  # n = d: the patches alone still fit, the class token does not
        assert code == 0
        assert facts["embedding"]["applies"]
        assert "17 tokens, but gradients of width 16" in facts["april"]["reason"]
    else:
        assert code == 1
        assert "16 patches, but gradients of width 8" in facts["embedding"]["reason"]
        assert "No closed form applies" in out
        assert "does not make the update safe: gradient matching" in out
    assert "> 16 = d" in facts["span"]["reason"] or "> 8 = d" in facts["span"]["reason"]


def test_nothing_applies_is_said_and_does_not_mean_safe(run: Run, tmp_path: Path) -> None:
    save_update(update_of(vit(), withhold=[POSITION, *ATTENTION]), tmp_path / "update.safetensors")
    code, out, err = run()
    assert (code, err) == (1, "")
    words = (tmp_path / "found/report.md").read_text(encoding="utf-8")
    for text in (out, words):
        assert "No closed form applies" in text
        assert "does not make the update safe" in text
        assert "is not shared" in text
    assert not list((tmp_path / "found").glob("*.png"))


def test_zero_head_leaks_the_label_alone(run: Run, tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path))
    try:
        import federated
    finally:
        sys.path.pop(0)
    save_update(update_of(federated.zero()), tmp_path / "update.safetensors")
    code, out, _ = run("federated:zero")
    assert code == 1
    assert f"labels: {LABEL} (exact" in out
    assert "zero" in out
    assert "torchvision initializes it so" in out


@pytest.mark.parametrize(
    ("option", "preprocessing"), [("unit", UNIT), ("half", HALF), ("0.5,0.5", HALF), ("0/0/0,1/1/1", UNIT)]
)
def test_preprocessing_changes_the_picture_alone(run: Run, tmp_path: Path, option: str, preprocessing) -> None:
    assert run("federated:build", "--preprocessing", option)[0] == 0
    expected = preprocessing.to_pixels(HALF.to_input(photograph()))
    with Image.open(tmp_path / "found/embedding.png") as picture:
        levels = np.asarray(picture).astype(int)
    assert np.abs(levels - (255 * expected).round().permute(1, 2, 0).numpy()).max() <= 1


def test_grey_models_give_grey_pictures(run: Run, tmp_path: Path) -> None:
    save_update(update_of(vit(channels=1), photograph(channels=1)[None]), tmp_path / "update.safetensors")
    assert run("federated:grey")[0] == 0
    with Image.open(tmp_path / "found/embedding.png") as picture:
        assert picture.mode == "L"
    code, _, err = run("federated:grey", "--preprocessing", "imagenet")
    assert code == 2
    is_one_error(err, "--preprocessing", "1 channels")


def test_parts_of_an_unknown_model_by_name(run: Run, tmp_path: Path) -> None:
    code, _, err = run("federated:Stranger")
    assert code == 2
    is_one_error(err, "Stranger is not a Vision Transformer", "stem.weight (64, 3, 4, 4)", "--part patch_weight=…")
    sys.path.insert(0, str(tmp_path))
    try:
        import federated
    finally:
        sys.path.pop(0)
    update = client_update(federated.Stranger(), photograph()[None], torch.tensor([LABEL]))
    save_update(update, tmp_path / "update.safetensors")
    parts = ["patch_weight=stem.weight", "image_size=16", "position=place", "head_weight=out.weight"]
    options = [word for part in [*parts, "head_bias=out.bias"] for word in ("--part", part)]
    code, out, _ = run("federated:Stranger", *options)
    assert code == 0
    assert "exactly: patch-embedding system" in out
    with Image.open(tmp_path / "found/embedding.png") as picture:
        assert np.array_equal(np.asarray(picture), (255 * photograph()).round().permute(1, 2, 0).numpy())
    for part, fragment in (("position=places", "no tensor called places"), ("nose=place", "no part is called nose")):
        code, _, err = run("federated:Stranger", *options, "--part", part)
        assert code == 2
        is_one_error(err, fragment)


# --- Bad updates ----------------------------------------------------------------------------------------------


def changed(gradients: Mapping[str, Tensor], name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    kept = {key: g.clone().contiguous() for key, g in gradients.items() if key != name}
    return kept if tensor is None else {**kept, name: tensor}


HEAD = "head.weight"


@pytest.mark.parametrize(
    ("name", "value", "fragments"),
    [
        (HEAD, None, ["lacks the gradient of 'head.weight'", "--withheld head.weight"]),
        ("extra.weight", torch.ones(2), ["do not belong together", "'extra.weight'"]),
        (HEAD, torch.ones(64, 10), ["head.weight: the update has shape (64, 10)", "(10, 64)"]),
        (HEAD, torch.full((10, 64), math.nan), ["head.weight: 640 of 640 gradient entries are NaN or infinite"]),
        (HEAD, torch.full((10, 64), math.inf), ["head.weight: 640 of 640 gradient entries are NaN or infinite"]),
        (HEAD, torch.ones(10, 64, dtype=torch.int64), ["'head.weight' is torch.int64"]),
    ],
)
def test_tensors_that_are_wrong(
    run: Run, tmp_path: Path, name: str, value: Tensor | None, fragments: list[str]
) -> None:
    save_file(changed(update_of(vit()).gradients, name, value), tmp_path / "update.safetensors")
    code, out, err = run()
    assert (code, out) == (2, "")
    is_one_error(err, *fragments)
    assert not list((tmp_path / "found").iterdir())


def test_files_that_are_wrong(run: Run, tmp_path: Path) -> None:
    gradients = dict(update_of(vit()).gradients)
    whole = (tmp_path / "update.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "words.safetensors").write_text("these are not the gradients you are looking for")
    (tmp_path / "empty.safetensors").touch()
    torch.save(gradients, tmp_path / "pickle.pt")
    save_file({name: torch.zeros_like(g) for name, g in gradients.items()}, tmp_path / "zero.safetensors")
    save_update(update_of(vit(width=32)), tmp_path / "other.safetensors")
    save_update(update_of(build_model("timm:vit_tiny_patch16_224", image_size=16)), tmp_path / "timm.safetensors")
    for name, fragments in (
        ("cut.safetensors", ["not a readable safetensors file, or cut off"]),
        ("words.safetensors", ["not a readable safetensors file"]),
        ("empty.safetensors", ["not a readable safetensors file"]),
        ("pickle.pt", ["a pickle (torch.save), which could run code", "save_update"]),
        ("zero.safetensors", ["all gradients are zero"]),
        ("other.safetensors", ["the update has shape (32,), VisionTransformer (64,)"]),
        ("timm.safetensors", ["the update and VisionTransformer do not belong together"]),
        ("absent.safetensors", ["no such file"]),
        ("found", ["no such file"]),
    ):
        code, out, err = run(update=name)
        assert (code, out) == (2, ""), name
        is_one_error(err, *fragments)


# --- Bad models, bad folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "fragments"),
    [
        ("federated", ["not of the form MODULE:FUNCTION"]),
        (":build", ["not of the form MODULE:FUNCTION"]),
        ("no_such_module:build", ["module 'no_such_module' cannot be imported", "No module named"]),
        ("faulty:build", ["module 'faulty' cannot be imported", "no_such_package", "faulty.py, line 2"]),
        (".federated:build", ["cannot be imported"]),
        ("federated:builds", ["module 'federated' has no 'builds'"]),
        ("federated:NUMBER", ["is no function but a int"]),
        ("federated:word", ["federated:word() returned str, not a torch.nn.Module"]),
        ("federated:broken", ["federated:broken() failed: ValueError: two lines", "federated.py, line"]),
        ("federated:convolution", ["Conv2d is not a Vision Transformer known to aprillab"]),
    ],
)
def test_models_that_are_none(run: Run, function: str, fragments: list[str]) -> None:
    code, out, err = run(function)
    assert (code, out) == (2, "")
    is_one_error(err, *fragments)


def test_a_function_may_be_an_attribute(run: Run) -> None:
    assert run("federated:Place.build")[0] == 0


def test_folders_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in ("file", "file/deeper", *(["/proc/found"] if Path("/proc/self").is_dir() else [])):
        code, shown, err = run(out=out)
        assert (code, shown) == (2, "")
        is_one_error(err, out, "no folder that can be written")
    (tmp_path / "found" / "report.md").mkdir(parents=True)
    code, _, err = run()
    assert code == 2
    is_one_error(err, "found: cannot be written")
