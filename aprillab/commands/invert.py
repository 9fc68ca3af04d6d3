"""What the commands of the command line do: words to the terminal, numbers to JSON, pictures to files.

Each takes the parsed arguments and returns an exit code; what it cannot do it raises, and cli.py says in one line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from .. import viz
from ..anatomy import Anatomy, UnknownModelError, dissect, tensors_of
from ..attacks.catalogue import ATTACKS
from ..attacks.result import AttackNotApplicable
from ..audit.report import json_safe, labels_words, picture_name, write_audit
from ..audit.run import TRUST_WORDS, audit
from ..comparison import figures as compare_figures
from ..comparison import run as compare
from ..comparison.records import DTYPES, Case, Row
from ..data import PICTURE_FORMATS, PictureError, load_victim, read_picture, victims
from ..preprocessing import Preprocessing
from ..update import ClientUpdate, UpdateError, load_update
from ..version import __version__
from ..zoo import build_model
from .demo import Round, demo_caption, demo_figure, play_demo, play_round

RESPONSIBLE_USE = (
    "Use this to learn, to audit systems that are yours and to build better defences: attack pictures that are\n"
    "public, or your own, or those of people who said yes."
)


class CommandError(Exception):
    """Bad input or usage; the message is for the user."""


def note(text: str) -> None:
    """A remark that is no error, on stderr."""
    print(f"aprillab: note: {text}", file=sys.stderr)


# --- demo -----------------------------------------------------------------------------------------------------


def run_demo(arguments: argparse.Namespace) -> int:
    out = _writable(arguments.out, ".png")
    start = time.perf_counter()
    pixels = _photograph(arguments.photo, 224)
    print(f"One photograph ({arguments.photo}), three updates, and what a server makes of each.\n")
    row = "{:<23} {:<22} {:<17} {:>7} {:>7} {:>9} {:>12}  {}"
    print(row.format("attack", "model", "client shares", "PSNR dB", "SSIM", "attack s", "gradient s", "exact"))
    print(row.format("-" * 23, "-" * 22, "-" * 17, "-" * 7, "-" * 7, "-" * 9, "-" * 12, "-" * 5))
    rounds = []
    for scene, played in play_demo(pixels):
        rounds.append((scene, played))
        found = played.reconstruction
        shares = "all gradients" if scene.position == "learned" else "all but position"
        print(
            row.format(
                scene.title, scene.model, shares, f"{played.psnr:.1f}", f"{played.ssim:.4f}", f"{found.seconds:.2f}",
                f"{played.gradient_seconds:.2f}", "yes" if found.exact else "no",
            ),
            flush=True,
        )  # fmt: skip
    print(f"\n{demo_caption(pixels)}")
    print("exact: the attack itself verified its conditions and predicts an error below half a grey level.")
    print(
        "gradient s: the client's forward and backward pass, after one forward pass to warm up; attack s: from the "
        "shared gradient\nto the picture. Building the models and drawing are not timed."
    )
    _write(out, viz.to_png(demo_figure(pixels, rounds)))
    print(f"\nwrote {out} ({time.perf_counter() - start:.0f} s in all)\n\n{RESPONSIBLE_USE}")
    return 0


# --- invert ---------------------------------------------------------------------------------------------------


def run_invert(arguments: argparse.Namespace) -> int:
    to_stdout = arguments.json == "-"
    words = sys.stderr if to_stdout else sys.stdout
    out = _writable(arguments.out, ".png")
    json_file = _writable(arguments.json) if arguments.json and not to_stdout else None
    pixels = _photograph(arguments.photo, arguments.image_size)
    model = build_model(
        arguments.model,
        image_size=arguments.image_size,
        position=arguments.position,
        dtype=DTYPES[arguments.dtype],
        seed=arguments.seed,
    )
    label = _label(arguments, model)
    facts: dict[str, Any] = {
        "attack": None, "exact": False, "predicted_psnr": None, "psnr": None, "ssim": None,
        "attack_seconds": None, "gradient_seconds": None,
        "label": None, "reason": None, "diagnostics": {}, "photo": arguments.photo, "model": arguments.model,
        "position": arguments.position, "dtype": arguments.dtype, "seed": arguments.seed,
        "image_size": arguments.image_size, "true_label": label, "picture": None, "version": __version__,
    }  # fmt: skip
    setting = f"position {arguments.position}, {arguments.dtype}, random weights, seed {arguments.seed}"
    print(f"photo    {arguments.photo}, {arguments.image_size}×{arguments.image_size}", file=words)
    print(f"model    {arguments.model}, {setting}", file=words, flush=True)
    refusal = None
    try:
        played = play_round(model, pixels, label, attack=arguments.attack)
    except AttackNotApplicable as error:
        refusal = error
        facts |= {"reason": error.reason, "diagnostics": error.numbers}
    else:
        _tell(played, words)
        found = played.reconstruction
        _write(out, _before_after(arguments, pixels, played))
        print(f"wrote    {out}: private image, reconstruction, difference", file=words)
        facts |= {
            "attack": found.attack, "exact": found.exact, "predicted_psnr": found.predicted_psnr,
            "psnr": played.psnr, "ssim": played.ssim,
            "attack_seconds": found.seconds, "gradient_seconds": played.gradient_seconds,
            "label": None if found.labels is None else int(found.labels[0]), "reason": found.reason,
            "diagnostics": found.diagnostics, "picture": str(out),
        }  # fmt: skip
    text = json.dumps(json_safe(facts), indent=2, allow_nan=False, ensure_ascii=False)
    if to_stdout:
        print(text)
    elif json_file:
        _write(json_file, f"{text}\n".encode())
        print(f"wrote    {json_file}", file=words)
    if refusal:
        raise refusal
    return 0


def _tell(played: Round, words: Any) -> None:
    """A round in a few lines."""
    found = played.reconstruction
    recovered = "not recovered" if found.labels is None else f"{int(found.labels[0])}"
    print(f"client   {played.gradient_seconds:.2f} s for the gradient of one image, label {played.label}", file=words)
    print(f"attack   {found.attack}, {found.seconds:.2f} s, label {recovered}", file=words)
    exact = "exact" if found.exact else "not exact"
    print(f"result   PSNR {played.psnr:.1f} dB, SSIM {played.ssim:.4f}, {exact}", file=words)
    print(f"why      {found.reason}", file=words)
    for name, outcome in found.diagnostics["attacks"].items():
        if name != found.diagnostics["chosen"]:
            print(f"besides  {name} {outcome}", file=words)


def _before_after(arguments: argparse.Namespace, pixels: Tensor, played: Round) -> bytes:
    """The figure of ``invert``; the difference is magnified by the power of ten that makes it visible."""
    reconstruction = played.reconstruction.pixels[0]
    error = float((reconstruction - pixels.to(reconstruction)).square().mean().sqrt())
    scale = next((10.0**k for k in range(15) if error * 10**k > 0.03), 1.0)
    fig = viz.before_after(pixels, reconstruction, title=f"PSNR {played.psnr:.1f} dB", scale=scale)
    fig.supxlabel(
        f"{played.reconstruction.attack}, {arguments.model}, position {arguments.position},\n"
        f"{arguments.dtype}, random weights, {arguments.image_size}×{arguments.image_size}",
        color="0.25",
    )
    return viz.to_png(fig, dpi=150)


def _photograph(name: str, size: int) -> Tensor:
    """Pixels (3, size, size) of a file, or of a victim by its name."""
    path = Path(name)
    if not path.exists() and name in victims():
        return load_victim(name, size)
    if not path.exists():
        raise PictureError(f"{name}: no such file, and no victim of that name; victims are {', '.join(victims())}")
    pixels = read_picture(path, size)
    for remark in _remarks(path, size):
        note(f"{path}: {remark}")
    return pixels


def _remarks(path: Path, size: int) -> Iterator[str]:
    """What became of a picture that is not a square RGB one of 8 bits; what warrants a warning, data.py says."""
    with Image.open(path, formats=PICTURE_FORMATS) as file:
        mode, (width, height) = file.mode, file.size
    if mode.startswith("I"):
        yield "a grey picture of 16 bits; it is rounded to 8 bits and its three channels are equal"
    elif mode in ("1", "L", "LA"):
        yield "a grey picture; its three channels are equal"
    elif mode not in ("RGB", "P"):
        yield f"a picture of mode {mode}; it becomes RGB"
    if (width, height) != (size, size):
        cut = "" if width == height else "cut to its central square and "
        yield f"{width}×{height} pixels; {cut}resampled to {size}×{size}"


def _label(arguments: argparse.Namespace, model: nn.Module) -> int:
    """The label asked for, or one drawn with the seed."""
    classes = len(tensors_of(model)[dissect(model).head_weight or ""])
    if arguments.label is None:
        return int(torch.randint(classes, (), generator=torch.Generator().manual_seed(arguments.seed)))
    if not 0 <= arguments.label < classes:
        raise CommandError(f"--label {arguments.label}: {arguments.model} has classes 0 to {classes - 1}")
    return arguments.label


# --- audit ----------------------------------------------------------------------------------------------------


def run_audit(arguments: argparse.Namespace) -> int:
    folder = _writable_folder(arguments.out)
    update = load_update(arguments.update)
    if unknown := [name for name in arguments.withheld if name in update.gradients]:
        raise CommandError(f"--withheld {unknown[0]}: this gradient is in the update")
    update = replace(update, withheld=(*update.withheld, *arguments.withheld))
    with _here_importable():
        model = _model(arguments.model)
        try:
            anatomy = dissect(model, **dict(arguments.part))
        except UnknownModelError as error:
            hint = "On the command line: --part patch_weight=… --part image_size=… and so on."
            raise CommandError(f"--model {arguments.model}: {error} {hint}") from error
        except (ValueError, TypeError) as error:
            raise CommandError(f"--model {arguments.model}: {error}") from error
        _check_channels(arguments.preprocessing, anatomy, model)
        _check_complete(model, update)
        found = audit(model, update, anatomy=anatomy, preprocessing=arguments.preprocessing)
    print(f"{found.verdict}\n")
    for part in found.parts:
        print(f"  {part.part:<26} {part.state:<13} {part.parameter or ''}")
    print(f"\n  labels: {labels_words(found)}")
    print(f"  {'one image' if found.one_image.holds else 'more than one image, or noise'}: {found.one_image.text}")
    for finding in found.findings:
        print(f"\n  {finding.attack.title} ({finding.attack.name})")
        if finding.result is None:
            print(f"    does not apply: {finding.reason}")
            continue
        print(f"    {TRUST_WORDS[finding.trust]}")
        print(f"    {finding.reason}")
        if finding.replay is not None:
            print(f"    played back through the model, it misses the update by {finding.replay:.1e} of its norm")
        print(f"    picture: {folder / str(picture_name(finding))}")
    for note in found.notes:
        print(f"\n  note: {note}")
    try:
        write_audit(found, folder)
    except OSError as error:
        raise CommandError(f"{folder}: cannot be written ({error.strerror or error})") from error
    print(f"\nwrote {folder / 'report.md'}, report.json" + (", overview.png" if found.applied else ""))
    print(f"\n{RESPONSIBLE_USE}")
    return 0 if found.applied else 1


@contextmanager
def _here_importable() -> Iterator[None]:
    """Let modules in the current folder be imported, as ``python -m`` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _model(text: str) -> nn.Module:
    """What ``MODULE:FUNCTION`` returns, which must be a module of PyTorch's."""
    module_name, _, function_name = text.partition(":")
    if not module_name or not function_name:
        raise CommandError(f"--model {text!r} is not of the form MODULE:FUNCTION, as in my_package.models:build")
    try:
        function = importlib.import_module(module_name)
    except Exception as error:
        raise CommandError(f"--model: module {module_name!r} cannot be imported: {_of_user_code(error)}") from error
    for name in function_name.split("."):
        if not hasattr(function, name):
            raise CommandError(f"--model: module {module_name!r} has no {function_name!r}")
        function = getattr(function, name)
    if not callable(function):
        raise CommandError(f"--model: {text} is no function but a {type(function).__name__}")
    try:
        model = function()
    except Exception as error:
        raise CommandError(f"--model: {text}() failed: {_of_user_code(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model: {text}() returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _of_user_code(error: Exception) -> str:
    """An exception out of the user's own code, and the line it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if frame.filename.startswith("<frozen") else f" ({frame.filename}, line {frame.lineno})"
    return f"{type(error).__name__}: {error}{where}"


def _check_channels(preprocessing: Preprocessing | None, anatomy: Anatomy, model: nn.Module) -> None:
    channels = tensors_of(model)[anatomy.patch_weight].shape[1]
    try:
        (preprocessing or anatomy.preprocessing).to_pixels(torch.zeros(1, channels, 1, 1))
    except ValueError as error:
        raise CommandError(f"--preprocessing: {error}") from error


def _check_complete(model: nn.Module, update: ClientUpdate) -> None:
    """What check_update would say of a missing gradient, with the remedy that the command line has."""
    parameters = dict(model.named_parameters())
    if set(update.gradients) - set(parameters):
        return
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if missing := sorted(trained - set(update.gradients) - set(update.withheld)):
        raise UpdateError(
            f"the update lacks the gradient of {missing[0]!r} ({len(missing)} missing in all). If clients do not "
            f"share it, say so with --withheld {','.join(missing[:3])}{',…' if missing[3:] else ''}; if it is "
            "frozen, set requires_grad=False in the model"
        )


# --- compare --------------------------------------------------------------------------------------------------


def run_compare(arguments: argparse.Namespace) -> int:
    if Path(arguments.name).name != arguments.name:
        raise CommandError(f"--name {arguments.name}: this is the beginning of file names; folders belong to --out")
    path = _writable(str(_writable_folder(arguments.out) / f"{arguments.name}.csv"))
    try:
        torch.zeros(1, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {arguments.device}: {error}") from error
    start = time.perf_counter()
    cases = _compare_cases(arguments)
    print(f"{len(cases)} attacks on {len({case.update for case in cases})} updates", flush=True)
    try:
        rows = compare.run(
            cases, path=path, resume=not arguments.again, max_evaluations=arguments.max_evaluations,
            max_seconds=arguments.max_seconds, device=arguments.device,
        )  # fmt: skip
    except KeyboardInterrupt:
        note(f"{path} has what was done; the same command{', without --again,' * arguments.again} goes on")
        raise
    figures = {}
    for name, (figure, alternative) in _compare_figures(rows, path).items():
        _write(path.with_name(name), viz.to_png(figure))
        figures[name] = alternative
    text = compare.report(rows, _compare_command(arguments), figures)
    _write(path.with_suffix(".md"), text.encode())
    print(f"\n{compare.table(rows)}\n\nwrote {path}, {path.stem}.md and {', '.join(figures)}", end=" ")
    print(f"({time.perf_counter() - start:.0f} s)")
    return 0


def _compare_cases(arguments: argparse.Namespace) -> list[Case]:
    for size in arguments.batch_sizes:
        if left := len(arguments.victims) % size:
            note(f"batches of {size}: {', '.join(arguments.victims[-left:])} left out")
    shape = {name: getattr(arguments, name) for name in ("patch_size", "width", "depth", "heads", "mlp_ratio")}
    cases = []
    for model in arguments.models:
        cases += compare.cross(
            victims=arguments.victims, models=[model], positions=arguments.positions, weights=arguments.weights,
            dtypes=arguments.dtypes, seeds=arguments.seeds, batch_sizes=arguments.batch_sizes,
            attacks=list(ATTACKS) if arguments.attacks == ["all"] else arguments.attacks,
            image_size=arguments.image_size, channels=arguments.channels, classes=arguments.classes,
            labels=arguments.labels, **(shape if model in ("april", "prenorm") else {}),
        )  # fmt: skip
    return cases


def _compare_figures(rows: list[Row], path: Path) -> dict[str, tuple[Figure, str]]:
    """Files, figures and alternative texts; curves and seconds apart for each model, weights and size of batch."""
    found = {}
    for i, page in enumerate(compare_figures.picture_pages(rows, path), start=1):
        found[f"{path.stem}_pictures_{i}.png"] = page, "Private pictures, and beside each what every attack returned"
    settings: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        settings.setdefault((row.case.model, row.case.weights, row.case.batch_size), []).append(row)
    for i, ((model, weights, size), group) in enumerate(settings.items(), start=1):
        setting = f"{model}, weights {weights}, {f'batches of {size}' if size > 1 else 'one image'}"
        number = f"_{i}" if len(settings) > 1 else ""
        for kind, words in (("curves", "Loss and PSNR against evaluations"), ("seconds", "PSNR against seconds")):
            drawn = compare_figures.curves(group, path) if kind == "curves" else compare_figures.seconds(group)
            if drawn is not None:
                drawn.suptitle(setting, fontsize=11, color="0.25")
                found[f"{path.stem}_{kind}{number}.png"] = drawn, f"{words}: {setting}"
    return found


def _compare_command(arguments: argparse.Namespace) -> str:
    """The command that makes the same rows, with every option, so that no default has to stay what it is."""
    words = ["aprillab", "compare"]
    for name, value in vars(arguments).items():
        if name in ("run", "again") or value is None:
            continue
        if name == "out" and Path(value).is_absolute():
            value = Path(value).name  # where it lies on this computer is of no use elsewhere
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)


# --- Files ----------------------------------------------------------------------------------------------------


def _writable(name: str, suffix: str = "") -> Path:
    """The path of a file to be written, its folder made; refused before anything is computed if that cannot be."""
    path = Path(name)
    if suffix and path.suffix.lower() != suffix:
        raise CommandError(f"{name}: the picture is written as PNG; give it a name that ends in {suffix}")
    if path.is_dir():
        raise CommandError(f"{name}: this is a folder; name a file")
    _writable_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise CommandError(f"{name}: cannot be written (permission denied)")
    return path


def _writable_folder(name: str | Path) -> Path:
    """The path of a folder, made with its parents, in which a file can be made."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"{folder}: no folder that can be written ({error.strerror or error})") from error
    return folder


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise CommandError(f"{path}: cannot be written ({error.strerror or error})") from error
