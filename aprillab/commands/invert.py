"""``aprillab invert``: attack the gradient of a picture of one's own."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from .. import viz
from ..anatomy import dissect, tensors_of
from ..attacks.catalogue import ATTACKS
from ..attacks.result import AttackNotApplicable
from ..attacks.searches.match import BudgetError
from ..audit.report import json_safe, picture_bytes
from ..comparison.cases import DTYPES
from ..metrics import EXACT_TO_8_BITS_DB
from ..version import __version__
from ..zoo import build_model
from .files import photograph, writable_file, write
from .losses import loss_function
from .messages import CommandError, note
from .round import Played, play_round

_SECONDS = 300.0  # of a search, unless a budget is given
_EVERY = 10.0  # seconds between two lines where there is no terminal for a bar


def run(arguments: argparse.Namespace) -> int:
    """Be client and server, print how it went, and write the figure and, if asked for, the
    reconstruction alone and the numbers.

    Returns
    -------
    int
        130 where a search was interrupted; its best is written.

    Raises
    ------
    AttackNotApplicable
        If no such attack applies; the numbers are written before.
    """
    to_stdout = arguments.json == "-"
    words = sys.stderr if to_stdout else sys.stdout
    files = {
        "picture": writable_file(arguments.out, ".png"),
        "reconstruction": writable_file(arguments.reconstruction, ".png") if arguments.reconstruction else None,
        "json": writable_file(arguments.json) if arguments.json and not to_stdout else None,
    }
    pixels = photograph(arguments.photo, arguments.image_size)
    model = build_model(
        arguments.model, image_size=arguments.image_size, position=arguments.position,
        dtype=DTYPES[arguments.dtype], seed=arguments.seed,
    )  # fmt: skip
    facts = _facts(arguments, _true_label(arguments, model))
    _print_setting(arguments, words)
    played, refusal = _play(arguments, model, pixels, facts["true_label"], words)
    if played is not None:
        facts |= _show(arguments, pixels, played, files, words)
    elif refusal is not None:
        facts |= {"reason": refusal.reason, "diagnostics": refusal.numbers}
    text = json.dumps(json_safe(facts), indent=2, allow_nan=False, ensure_ascii=False)
    if to_stdout:
        print(text)
    elif files["json"]:
        print("wrote   ", write(files["json"], f"{text}\n".encode()), file=words)
    if refusal is not None:
        raise refusal
    if facts["diagnostics"].get("stopped") == "interrupted":
        note("the search was interrupted; this is the best it saw")
        return 130
    return 0


def _true_label(arguments: argparse.Namespace, model: nn.Module) -> int:
    """The label asked for, or one drawn with the seed."""
    classes = _classes(model)
    if arguments.label is None:
        return int(torch.randint(classes, (), generator=torch.Generator().manual_seed(arguments.seed)))
    if not 0 <= arguments.label < classes:
        raise CommandError(f"--label {arguments.label}: {arguments.model} has classes 0 to {classes - 1}")
    return arguments.label


def _classes(model: nn.Module) -> int:
    return len(tensors_of(model)[dissect(model).head_weight or ""])


# --- The round ----------------------------------------------------------------------------------------------------


def _play(
    arguments: argparse.Namespace, model: nn.Module, pixels: Tensor, label: int, words: TextIO
) -> tuple[Played | None, AttackNotApplicable | None]:
    """The round, or why no attack applies and where to go from there."""
    loss = None if arguments.loss is None else loss_function(arguments.loss, _classes(model))
    judging = {"strict": arguments.strict, "verify": arguments.verify}
    search = _search_options(arguments, words)
    try:
        return play_round(
            model, pixels, label, attack=arguments.attack, loss=loss, judging=judging, search=search
        ), None
    except AttackNotApplicable as refusal:
        if refusal.numbers.get("stopped") == "interrupted":  # before it saw anything
            raise KeyboardInterrupt from refusal
        reason = refusal.reason + _way_on(arguments, refusal)
        return None, AttackNotApplicable(refusal.attack, reason, **refusal.numbers)
    except BudgetError as error:
        raise CommandError(f"--evaluations: {error}") from error


def _way_on(arguments: argparse.Namespace, refusal: AttackNotApplicable) -> str:
    """What else there is to try where an attack refused."""
    if arguments.attack in ATTACKS and ATTACKS[arguments.attack].searches:
        return ". --attack match:april needs none of this" if arguments.attack.startswith("span") else ""
    too_small = arguments.strict and refusal.count_fails
    truncated = "--no-strict shows what a linear system that is too small leaves, and " * too_small
    return f". To go on: {truncated}--attack match:april searches, on any model"


def _search_options(arguments: argparse.Namespace, words: TextIO) -> dict[str, Any]:
    """What a search is given: its budget, and how it shows that it lives."""
    seconds = arguments.seconds
    if arguments.evaluations is None and seconds is None:
        seconds = _SECONDS
    options = {"seed": arguments.seed, "max_seconds": seconds, "progress": sys.stderr.isatty()}
    if arguments.evaluations is not None:
        options["max_evaluations"] = arguments.evaluations
    return options | ({} if options["progress"] else {"callback": _lines(words)})


def _lines(words: TextIO) -> Callable[[dict[str, Any], Tensor], None]:
    """A callback that prints a line now and then."""
    last = 0.0

    def show(entry: dict[str, Any], _: Tensor) -> None:
        nonlocal last
        if entry["seconds"] - last >= _EVERY:
            last = entry["seconds"]
            spent = f"{entry['evaluation']} evaluations, {last:.0f} s, loss {entry['loss']:.2e}"
            print(f"search   {spent}", file=words, flush=True)

    return show


# --- What is printed and written ----------------------------------------------------------------------------------


def _print_setting(arguments: argparse.Namespace, words: TextIO) -> None:
    height, width = arguments.image_size
    setting = f"position {arguments.position}, {arguments.dtype}, random weights, seed {arguments.seed}"
    size = f"{height}×{width}" + ("" if height == width else " (height × width)")
    print(f"photo    {arguments.photo}, {size}", file=words)
    print(f"model    {arguments.model}, {setting}", file=words, flush=True)


def _show(
    arguments: argparse.Namespace, pixels: Tensor, played: Played, files: dict[str, Path | None], words: TextIO
) -> dict[str, Any]:
    """Print the round, write its pictures, and return what is known now for the JSON."""
    _print_round(arguments, played, words)
    written: dict[str, Any] = {}
    for kind, content, what in (
        ("picture", _before_after(arguments, pixels, played), "private image, reconstruction, difference"),
        ("reconstruction", picture_bytes(played.reconstruction.pixels[0]), "the reconstruction alone"),
    ):
        if path := files[kind]:
            print(f"wrote    {write(path, content)}: {what}", file=words)
            written[kind] = str(path)
    return _facts_of_round(played) | written


def _print_round(arguments: argparse.Namespace, played: Played, words: TextIO) -> None:
    """Say in a few lines how a round went, and what came of the other attacks that were tried."""
    found = played.reconstruction
    recovered = "not recovered" if found.labels is None else f"{int(found.labels[0])}"
    print(f"client   {played.gradient_seconds:.2f} s for the gradient of one image, label {played.label}", file=words)
    print(f"attack   {found.attack}, {found.seconds:.2f} s, label {recovered}", file=words)
    exact = "exact" if found.exact else "not exact"
    print(f"result   PSNR {played.psnr:.1f} dB, SSIM {played.ssim:.4f}, {exact}", file=words)
    _print_wrapped("why", found.reason, words)
    outcomes, tried = found.diagnostics.get("attacks", {}), found.diagnostics.get("tried", ())
    for name in tried:
        if name != found.diagnostics["chosen"]:
            _print_wrapped("besides", f"{name} {outcomes[name]}", words)
    untried = [name for name in outcomes if name not in tried and ATTACKS[name].searches]
    sharp = (found.predicted_psnr or 0.0) >= EXACT_TO_8_BITS_DB  # whatever else was not checked
    for name in () if sharp else untried:
        print(f"go on    {shlex.join([*arguments.words, '--attack', name])}", file=words)


def _print_wrapped(head: str, text: str, words: TextIO) -> None:
    print(textwrap.fill(text, 110, initial_indent=f"{head:<9}", subsequent_indent=" " * 9), file=words)


def _facts(arguments: argparse.Namespace, label: int) -> dict[str, Any]:
    """The numbers of the JSON file in their order, before any attack: what is not known yet is
    None.
    """
    height, width = arguments.image_size
    return {
        "attack": None, "exact": False, "predicted_psnr": None, "psnr": None, "ssim": None,
        "attack_seconds": None, "gradient_seconds": None,
        "label": None, "reason": None, "diagnostics": {}, "photo": arguments.photo, "model": arguments.model,
        "position": arguments.position, "dtype": arguments.dtype, "loss": str(arguments.loss or "cross-entropy"),
        "seed": arguments.seed, "image_size": height if height == width else [height, width], "true_label": label,
        "picture": None, "reconstruction": None, "version": __version__,
    }  # fmt: skip


def _facts_of_round(played: Played) -> dict[str, Any]:
    found = played.reconstruction
    return {
        "attack": found.attack,
        "exact": found.exact,
        "predicted_psnr": found.predicted_psnr,
        "psnr": played.psnr,
        "ssim": played.ssim,
        "attack_seconds": found.seconds,
        "gradient_seconds": played.gradient_seconds,
        "label": None if found.labels is None else int(found.labels[0]),
        "reason": found.reason,
        "diagnostics": found.diagnostics,
    }


def _before_after(arguments: argparse.Namespace, pixels: Tensor, played: Played) -> bytes:
    """The figure of ``invert``; the difference is magnified by the power of ten that makes it
    visible.
    """
    reconstruction = played.reconstruction.pixels[0]
    error = float((reconstruction - pixels.to(reconstruction)).square().mean().sqrt())
    scale = next((10.0**k for k in range(15) if error * 10**k > 0.03), 1.0)
    title = f"reconstruction, {played.psnr:.1f} dB"
    fig = viz.before_after(pixels, reconstruction, title=title, scale=scale)
    fig.supxlabel(
        f"{played.reconstruction.attack}, {arguments.model}, position {arguments.position},\n"
        f"{arguments.dtype}, random weights, {'×'.join(map(str, arguments.image_size))}",
        color="0.25",
    )
    return viz.to_png(fig, dpi=150)
