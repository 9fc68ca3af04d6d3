"""``aprillab audit``: files and words, and bad updates, models and folders in one line each."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from audited import ATTENTION, LABEL, POSITION, SIZE, photograph, update_of, vit
from command_line import Run, is_one_error
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import aprillab
from aprillab.attacks import verdict
from aprillab.audit import TRUST_WORDS, Audit, Finding, audit
from aprillab.commands import audit as command
from aprillab.commands import cli
from aprillab.commands.messages import patience
from aprillab.data import load_victim
from aprillab.preprocessing import HALF, UNIT
from aprillab.update import client_update, save_update
from aprillab.zoo import build_model

ROOT = Path(__file__).resolve().parents[2]
MODULE = '''
import torch
from torch import nn
from aprillab import VisionTransformer
from torchvision.models import VisionTransformer as Torchvision

SHAPE = dict(image_size=16, patch_size=4, width=64, depth=2, heads=4, classes=10, seed=1)
NUMBER = 3

def build(): return VisionTransformer(**SHAPE)
def april(): return VisionTransformer(**{**SHAPE, "block": "april", "width": 16, "heads": 2})
def thin(): return VisionTransformer(**{**SHAPE, "width": 12, "heads": 2})
def narrow(): return VisionTransformer(**{**SHAPE, "width": 8, "heads": 2})
def grey(): return VisionTransformer(**{**SHAPE, "channels": 1})
def zero(): return Torchvision(16, 4, num_layers=1, num_heads=2, hidden_dim=64, mlp_dim=64, num_classes=10)
def word(): return "a model"
def sized(width): return VisionTransformer(**SHAPE)
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
class Beheaded(Stranger):
    """A head that is not the last layer to be registered: nothing but its owner tells it."""
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
    def forward(self, x):
        z = self.stem(x).flatten(2).transpose(1, 2) + self.place
        return self.out(self.norm(torch.tanh(z).square().mean(1)))
class Place:
    build = staticmethod(build)
'''


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(function="build", update="update.safetensors", out="found", *more)``: exit
    code, stdout, stderr.

    In a folder with the module ``federated`` and a good update of its ``build()``.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "federated.py").write_text(MODULE)
    (tmp_path / "faulty.py").write_text("import torch\nimport no_such_package\n")
    save_update(update_of(vit()), tmp_path / "update.safetensors")

    def call(
        function: str = "federated:build",
        *more: str,
        update: str | Sequence[str] = "update.safetensors",
        out: str = "found",
    ) -> tuple[int, str, str]:
        monkeypatch.delitem(sys.modules, "federated", raising=False)
        path = list(sys.path)
        files = [str(update)] if isinstance(update, str | Path) else list(update)
        code = cli.main(["audit", "--model", function, "--update", *files, "--out", str(out), *more])
        assert sys.path == path
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return call


def test_command_writes_pictures_numbers_and_words(run: Run, tmp_path: Path) -> None:
    code, out, err = run(out="new/found")
    assert code == 0
    assert [line.partition(": ")[2] for line in err.splitlines()] == [
        "note: update.safetensors: 40 tensors in float32",
        "note: VisionTransformer (aprillab), images of 16×16, input assumed normalized by mean 0.5, std 0.5",
        "note: trying the closed forms, which takes seconds to a minute …",
    ]
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
    for text in (facts["verdict"], "patch-embedding system: exact, predicted", "report.md", "who said yes"):
        assert text in out
    assert len(out.splitlines()) < len(words.splitlines()) / 3
    assert max(map(len, out.splitlines())) <= 118


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
    code, out, _ = run(f"federated:{function}", "--strict")
    facts = json.loads((tmp_path / "found/report.json").read_text(encoding="utf-8"))["attacks"]
    if function == "april":  # n = d: the patches alone still fit, the class token does not
        assert code == 0
        assert facts["embedding"]["applies"]
        assert "17 tokens, but gradients of width 16" in facts["april"]["reason"]
    else:
        assert code == 1
        assert "16 patches, but gradients of width 8" in facts["embedding"]["reason"]
        assert "No closed form applies" in out
        assert "does not make the update safe: gradient matching" in " ".join(out.split())
    assert "> 16 = d" in facts["span"]["reason"] or "> 8 = d" in facts["span"]["reason"]
    # Without --strict the pictures are shown, with what is missing.
    run(f"federated:{function}")
    facts = json.loads((tmp_path / "found/report.json").read_text(encoding="utf-8"))["attacks"]
    assert facts["span"]["applies"]
    assert not facts["span"]["exact"]
    assert (tmp_path / "found/span.png").exists()


def test_nothing_applies_is_said_and_does_not_mean_safe(run: Run, tmp_path: Path) -> None:
    save_update(update_of(vit(), withhold=[POSITION, *ATTENTION]), tmp_path / "update.safetensors")
    code, out, err = run()
    assert code == 1
    assert "error" not in err
    words = (tmp_path / "found/report.md").read_text(encoding="utf-8")
    for text in (" ".join(out.split()), words):
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
    words = (tmp_path / "found/report.md").read_text(encoding="utf-8")
    assert "torchvision initializes it so" in words
    assert "zero" in words


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
    assert not (tmp_path / "found").exists()


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
        ("federated:sized", ["'width'", "it is called without arguments", "federated.py, line 17"]),
        ("federated:convolution", ["Conv2d is not a Vision Transformer known to aprillab", "match_gradients"]),
    ],
)
def test_models_that_are_none(run: Run, function: str, fragments: list[str]) -> None:
    code, out, err = run(function)
    assert (code, out) == (2, "")
    is_one_error(err, *fragments)


def test_a_function_may_be_an_attribute(run: Run) -> None:
    assert run("federated:Place.build")[0] == 0


def test_a_module_may_have_a_hyphen_as_scripts_do(run: Run, tmp_path: Path) -> None:
    (tmp_path / "train-vit.py").write_text("from federated import build")
    assert run("train-vit:build")[0] == 0


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


# --- What machines, and people who file it, are told ---------------------------------------------------------------


def of_report(folder: Path) -> dict:
    return json.loads((folder / "found/report.json").read_text(encoding="utf-8"))


def test_an_audit_can_be_filed(run: Run, tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    assert run("federated:build", "--loss", "cross-entropy")[0] == 0
    facts, words = of_report(tmp_path), (tmp_path / "found/report.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((tmp_path / "update.safetensors").read_bytes()).hexdigest()
    assert facts["aprillab"] == aprillab.__version__
    assert before <= datetime.fromisoformat(facts["date"]) <= datetime.now(UTC)
    assert facts["model"]["built_by"] == "federated:build"
    assert (facts["update"]["file"], facts["update"]["sha256"]) == ("update.safetensors", digest)
    assert (facts["leak"], facts["exit_code"], facts["update"]["loss"]) == ("exact", 0, "cross-entropy")
    command = "aprillab audit --model federated:build --update update.safetensors --out found --loss cross-entropy"
    assert facts["command"] == command
    for text in (command, digest, facts["date"], "`exact`, exit code 0", "mean 0.5, std 0.5", "`federated:build`"):
        assert text in words


def test_what_to_do_is_printed_drawn_up_and_written_as_data(run: Run, tmp_path: Path) -> None:
    _, out, _ = run()
    words = (tmp_path / "found/report.md").read_text(encoding="utf-8")
    section = words.partition("## What to do about it")[2].partition("\n## ")[0]
    facts = of_report(tmp_path)
    assert len(facts["what_to_do"]) > 6
    for one in facts["what_to_do"]:
        assert f"| {one['change']} | " in section
        assert one["words"].splitlines()[0] in section
        assert f"{one['change']} (chapter {one['chapter'][:2]})" in out
    for text in ("span attack", "Secure aggregation", "Differential privacy", "Audit again", "σ = 1.39 for ε = 3"):
        assert text in section
    assert "σ = 0.60 for ε = 8 and σ = 1.39 for ε = 3" in out
    assert re.search(r"no +freeze or withhold the position embedding alone \(chapter 07\)", out)
    assert re.search(r"no closed form is left +freeze or withhold both embeddings \(chapter 10\)", out)
    assert re.search(r"yes, a guarantee +clip each image's gradient and add noise \(chapter 11\)", out)
    named = re.findall(r"`((?:notebooks|data)/[^`]+)`", section)
    assert len(named) > 3
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize(
    ("leak", "options", "code"),
    [
        ("exact", [], 0), ("close", [], 0), ("likely", [], 0), ("coarse", [], 0), ("unclear", [], 1), ("none", [], 1),
        ("exact", ["--fail-on", "coarse"], 3), ("coarse", ["--fail-on", "coarse"], 3),
        ("unclear", ["--fail-on", "coarse"], 0), ("unclear", ["--fail-on", "unclear"], 3),
        ("none", ["--fail-on", "unclear"], 0), ("close", ["--fail-on", "exact"], 0),
    ],
)  # fmt: skip
def test_exit_codes_tell_what_was_found(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leak: str, options: list[str], code: int
) -> None:
    monkeypatch.setattr(Audit, "leak", property(lambda _: leak))
    assert run("federated:build", *options)[0] == code
    facts = of_report(tmp_path)
    assert (facts["leak"], facts["exit_code"]) == (leak, code)


def test_a_batch_has_no_photograph_and_no_quality_of_one(run: Run, tmp_path: Path) -> None:
    pictures = torch.stack([photograph(), load_victim("chelsea", SIZE)])
    save_update(update_of(vit(), pictures), tmp_path / "update.safetensors")
    code, out, _ = run()
    assert code == 1
    facts, words = of_report(tmp_path), (tmp_path / "found/report.md").read_text(encoding="utf-8")
    assert facts["leak"] == "unclear"
    mixtures = [entry for entry in facts["attacks"].values() if entry["trust"] == "mixture"]
    assert mixtures
    for entry in mixtures:
        assert entry["predicted_psnr"] is None
        assert "dB" not in entry["reason"]
        assert entry["picture"].endswith("_mixture.png")
    assert " dB" not in out
    assert " dB" not in words.partition("## The attacks")[2].partition("## ")[0]


def test_an_infinite_prediction_is_no_number(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(finding: Finding) -> Finding:
        if finding.result is None:
            return finding
        result = replace(finding.result, predicted_psnr=math.inf)
        return replace(finding, result=result, reason=verdict(result.conditions, math.inf)[1])

    def sure(*arguments: object, **options: object) -> Audit:
        found = audit(*arguments, **options)
        return replace(found, findings=tuple(map(endless, found.findings)))

    monkeypatch.setattr(command, "audit", sure)
    code, out, _ = run()
    assert code == 0
    assert of_report(tmp_path)["attacks"]["embedding"]["predicted_psnr"] is None
    assert "inf" not in out
    assert "inf dB" not in (tmp_path / "found/report.md").read_text(encoding="utf-8")


def test_an_audit_that_takes_long_says_that_it_lives(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: object, **options: object) -> Audit:
        time.sleep(0.3)
        return audit(*arguments, **options)

    monkeypatch.setattr(command, "audit", slow)
    monkeypatch.setattr(command, "patience", partial(patience, every=0.05))
    _, _, err = run()
    assert err.count("aprillab: note: still at it, ") >= 3
    _, _, err = run("federated:build", "--quiet")
    assert err == ""


STEPS = ["reading the update", "patch-embedding system", "APRIL's closed form", "span attack", "labels", "drawing"]


def test_a_terminal_sees_each_step_as_it_begins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    run()
    lines = [line for line in screen.getvalue().splitlines() if re.match(r"aprillab: note: +\d+ s  ", line)]
    assert len(lines) == len(STEPS)
    assert all(step in line for step, line in zip(STEPS, lines, strict=True))
    assert "replay" in lines[1]
    screen.truncate(0)
    run("federated:build", "--no-verify")
    assert "replay" not in screen.getvalue()
    screen.truncate(0)
    run("federated:build", "--quiet")
    assert screen.getvalue().strip("\0") == ""


def test_elsewhere_it_is_said_now_and_then_which_step_it_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: object, progress: Callable[[str], None], **options: object) -> Audit:
        def step(words: str) -> None:
            progress(words)
            time.sleep(0.3 * words.startswith("span attack"))

        return audit(*arguments, progress=step, **options)

    monkeypatch.setattr(command, "audit", slow)
    monkeypatch.setattr(command, "patience", partial(patience, every=0.1))
    _, _, err = run()
    assert re.search(r"note: still at it, \d+ s: span attack, and a replay", err)
    assert "0 s  span attack" not in err


def test_quiet_prints_the_verdict_alone(run: Run) -> None:
    code, out, err = run("federated:build", "--quiet")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["This update gives the private picture away, exactly: patch-embedding system."]


def test_an_earlier_audit_is_replaced_whole(run: Run, tmp_path: Path) -> None:
    run()
    (tmp_path / "found/mine.png").touch()
    save_update(update_of(vit(), withhold=[POSITION]), tmp_path / "update.safetensors")
    _, out, _ = run()
    assert "report.md (replaced)" in out
    assert sorted(path.name for path in (tmp_path / "found").glob("*.png")) == [
        "mine.png",
        "overview.png",
        "span.png",
    ]


def test_pictures_stay_where_no_audit_was(run: Run, tmp_path: Path) -> None:
    (tmp_path / "found").mkdir()
    (tmp_path / "found/april.png").touch()
    run()
    assert (tmp_path / "found/april.png").exists()


def test_another_normalization_than_the_assumed_is_noticed(run: Run, tmp_path: Path) -> None:
    save_update(client_update(vit(), photograph()[None], torch.tensor([LABEL])), tmp_path / "update.safetensors")
    _, out, _ = run()
    assert "normalization (--preprocessing): assumed: mean ½" in out
    assert "would fit better" in " ".join(out.split())
    assert json.loads((tmp_path / "found/report.json").read_text())["normalization"]["state"] == "contradicted"
    _, out, _ = run("federated:build", "--preprocessing", "unit")
    assert "would fit better" not in out


def test_a_head_that_nobody_named_is_not_called_withheld(run: Run, tmp_path: Path) -> None:
    sys.path.insert(0, str(tmp_path))
    try:
        import federated
    finally:
        sys.path.pop(0)
    update = client_update(federated.Beheaded(), photograph()[None], torch.tensor([LABEL]))
    save_update(update, tmp_path / "update.safetensors")
    parts = ["patch_weight=stem.weight", "image_size=16", "position=place"]
    _, out, _ = run("federated:Beheaded", *(word for part in parts for word in ("--part", part)))
    words = (tmp_path / "found/report.md").read_text(encoding="utf-8")
    for text in (out, words):
        assert "--part head_weight=… --part head_bias=…" in text
        assert "head's gradient" not in text
    states = {part["part"]: part["state"] for part in of_report(tmp_path)["parts"]}
    assert states["head, weight"] == states["head, bias"] == "not named"
    assert "| head, weight |  | not named |" in words


@pytest.mark.parametrize(
    ("options", "strict", "verify", "loss"),
    [([], False, True, False), (["--strict", "--no-verify", "--loss", "bce"], True, False, True)],
)
def test_options_reach_the_audit(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: list[str], strict: bool, verify: bool, loss: bool
) -> None:
    given: dict = {}

    def listen(*arguments: object, **found: object) -> Audit:
        given.update(found)
        return audit(*arguments, **found)

    monkeypatch.setattr(command, "audit", listen)
    run("federated:build", *options)
    assert (given["strict"], given["verify"], given["loss"] is not None) == (strict, verify, loss)


def test_weights_of_classes_that_the_model_does_not_have(run: Run, tmp_path: Path) -> None:
    code, out, err = run("federated:build", "--loss", "bce,weights=1/2")
    assert (code, out) == (2, "")
    is_one_error(err, "--loss bce,weights=1/2: 2 weights, but the model has 10 classes")
    assert not (tmp_path / "found").exists()


def test_rounds_are_read_together_with_the_weights_that_were_sent(run: Run, tmp_path: Path) -> None:
    model = vit(width=12, heads=2)  # narrower than its 16 patches: one update does not do
    for number in (1, 2, 3):
        save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / f"state{number}.safetensors")
        update = update_of(model)
        save_update(update, tmp_path / f"round{number}.safetensors")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 0.1 * update.gradients[name]
    rounds, states = ([f"{kind}{number}.safetensors" for number in (2, 3)] for kind in ("round", "state"))
    code, out, err = run("federated:thin", "--state", *states, update=("round2.safetensors", "round3.safetensors"))
    assert code == 0, err
    assert "exactly: patch-embedding system" in out
    facts = json.loads((tmp_path / "found/report.json").read_text(encoding="utf-8"))
    assert facts["update"]["file"] == ", ".join(rounds)
    assert any("2 rounds of one client were read together" in note for note in facts["notes"])
    code, _, err = run("federated:thin", "--state", states[0], update=rounds)
    assert code == 2
    is_one_error(err, "--state: 1 files for 2 of --update: one for each round")
