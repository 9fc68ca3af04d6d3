"""``aprillab invert``: attack the gradient of a picture of one's own."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, TextIO, get_args

import torch
from torch import Tensor, nn

from .. import viz
from ..anatomy import dissect, tensors_of
from ..attacks.catalogue import CLOSED_FORMS
from ..attacks.result import AttackNotApplicable
from ..audit.report import json_safe
from ..comparison.cases import DTYPES
from ..version import __version__
from ..zoo import MODEL_NAMES, Position, build_model
from .arguments import PHOTO, whole
from .files import photograph, writable_file, write
from .messages import EXIT_CODES, CommandError
from .round import Round, play_round

_MODELS = f"""models: {MODEL_NAMES}
  april and prenorm are this package's architectures A and B. At image sizes from 112 up that are multiples of 16
  they have the shape of ViT-B/16; at other multiples of 8, 64 patches of S/8 pixels, width 384, 4 blocks, 6 heads.
  timm and transformers models need these libraries. All weights are random, and no head is zero."""
_JSON = """JSON: attack, exact, predicted_psnr and psnr (dB), ssim, attack_seconds, gradient_seconds,
  label (recovered), true_label, reason, diagnostics, photo, model, position, dtype, seed, image_size, picture,
  version. Infinities and NaN become null. Where no attack applies, attack is null and reason says why.
  gradient_seconds is one forward and backward pass, after a forward pass to warm up."""


def add_arguments(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    invert = commands.add_parser(
        "invert", formatter_class=argparse.RawDescriptionHelpFormatter,
        help="attack the gradient of a picture of your own",
        description="Be the client, who shares the gradient of one private picture, and the server, who\nattacks it.",
        epilog=f"{_MODELS}\n\n{_JSON}\n\n{EXIT_CODES}",
    )  # fmt: skip
    invert.add_argument("photo", metavar="PHOTO", help=PHOTO)
    invert.add_argument("--model", default="vit_b_16", metavar="NAME", help="see below (%(default)s)")
    invert.add_argument(
        "--position", default="learned", choices=get_args(Position), metavar="P",
        help="learned: trained, its gradient shared; frozen: random and not trained; sinusoidal, sinusoidal-2d: "
        "fixed to sinusoids; none (%(default)s)",
    )  # fmt: skip
    invert.add_argument(
        "--attack", default="auto", choices=["auto", *CLOSED_FORMS],
        help="auto takes the strongest that applies (%(default)s)",
    )  # fmt: skip
    invert.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the client (%(default)s)")
    invert.add_argument("--seed", default=0, type=whole(0), metavar="N", help="of weights and label (%(default)s)")
    invert.add_argument("--label", type=whole(0), metavar="N", help="the private label (drawn with the seed)")
    invert.add_argument("--image-size", default=224, type=whole(1), metavar="S", help="in pixels (%(default)s)")
    invert.add_argument(
        "--out", default="invert.png", metavar="PNG",
        help="figure to write: private image, reconstruction, difference magnified (%(default)s)",
    )  # fmt: skip
    invert.add_argument(
        "--json", metavar="FILE", help="also write the numbers as JSON; - for stdout, and words to stderr"
    )
    invert.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Be client and server, print how it went, and write the figure and, if asked for, the numbers.

    Raises
    ------
    AttackNotApplicable
        If no such attack applies; the numbers are written before.
    """
    to_stdout = arguments.json == "-"
    words = sys.stderr if to_stdout else sys.stdout
    out = writable_file(arguments.out, ".png")
    json_file = writable_file(arguments.json) if arguments.json and not to_stdout else None
    pixels = photograph(arguments.photo, arguments.image_size)
    model = build_model(
        arguments.model,
        image_size=arguments.image_size,
        position=arguments.position,
        dtype=DTYPES[arguments.dtype],
        seed=arguments.seed,
    )
    label = _true_label(arguments, model)
    _print_setting(arguments, words)
    facts = _facts(arguments, label)
    refusal = None
    try:
        played = play_round(model, pixels, label, attack=arguments.attack)
    except AttackNotApplicable as error:
        refusal = error
        facts |= {"reason": error.reason, "diagnostics": error.numbers}
    else:
        _print_round(played, words)
        write(out, _before_after(arguments, pixels, played))
        print(f"wrote    {out}: private image, reconstruction, difference", file=words)
        facts |= _facts_of_round(played) | {"picture": str(out)}
    text = json.dumps(json_safe(facts), indent=2, allow_nan=False, ensure_ascii=False)
    if to_stdout:
        print(text)
    elif json_file:
        write(json_file, f"{text}\n".encode())
        print(f"wrote    {json_file}", file=words)
    if refusal:
        raise refusal
    return 0


def _true_label(arguments: argparse.Namespace, model: nn.Module) -> int:
    """The label asked for, or one drawn with the seed."""
    classes = len(tensors_of(model)[dissect(model).head_weight or ""])
    if arguments.label is None:
        return int(torch.randint(classes, (), generator=torch.Generator().manual_seed(arguments.seed)))
    if not 0 <= arguments.label < classes:
        raise CommandError(f"--label {arguments.label}: {arguments.model} has classes 0 to {classes - 1}")
    return arguments.label


def _print_setting(arguments: argparse.Namespace, words: TextIO) -> None:
    setting = f"position {arguments.position}, {arguments.dtype}, random weights, seed {arguments.seed}"
    print(f"photo    {arguments.photo}, {arguments.image_size}×{arguments.image_size}", file=words)
    print(f"model    {arguments.model}, {setting}", file=words, flush=True)


def _print_round(played: Round, words: TextIO) -> None:
    """Say in a few lines how a round went, and what came of the other attacks that were tried."""
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


def _facts(arguments: argparse.Namespace, label: int) -> dict[str, Any]:
    """The numbers of the JSON file in their order, before any attack: what is not known yet is
    None.
    """
    return {
        "attack": None, "exact": False, "predicted_psnr": None, "psnr": None, "ssim": None,
        "attack_seconds": None, "gradient_seconds": None,
        "label": None, "reason": None, "diagnostics": {}, "photo": arguments.photo, "model": arguments.model,
        "position": arguments.position, "dtype": arguments.dtype, "seed": arguments.seed,
        "image_size": arguments.image_size, "true_label": label, "picture": None, "version": __version__,
    }  # fmt: skip


def _facts_of_round(played: Round) -> dict[str, Any]:
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


def _before_after(arguments: argparse.Namespace, pixels: Tensor, played: Round) -> bytes:
    """The figure of ``invert``; the difference is magnified by the power of ten that makes it
    visible.
    """
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
