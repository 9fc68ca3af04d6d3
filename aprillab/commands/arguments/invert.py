"""Arguments of ``aprillab invert``."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from ..losses import LOSSES
from ..messages import EXIT_CODES
from .names import ATTACKS, DTYPES, MODELS, POSITIONS
from .types import PHOTO, add_judging, attack, positive, size, whole

_ATTACKS = f"""{textwrap.fill(f"attacks: auto, {', '.join(ATTACKS)}", 116, subsequent_indent="  ")}
  match is short for match:april. A search shows its progress; Ctrl-C ends it and writes the best so far."""
_MODELS = f"""models: {MODELS}
  april and prenorm are this package's architectures A and B. At image sizes from 112 up that are multiples of 16
  they have the shape of ViT-B/16; at other multiples of 8, 64 patches of S/8 pixels, width 384, 4 blocks, 6 heads.
  timm and transformers models need these libraries. All weights are random, and no head is zero."""
_JSON = """JSON: attack, exact, predicted_psnr and psnr (dB), ssim, attack_seconds, gradient_seconds,
  label (recovered), true_label, reason, diagnostics, photo, model, position, dtype, loss, seed, image_size,
  picture, reconstruction (files), version. Infinities and NaN become null. Where no attack applies, attack is
  null and reason says why. gradient_seconds is one forward and backward pass, after a forward pass to warm up."""


def add_arguments(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    invert = commands.add_parser(
        "invert",
        help="attack the gradient of a picture of your own",
        description="Be the client, who shares the gradient of one private picture, and the server, who\nattacks it.",
        epilog=f"{_ATTACKS}\n\n{_MODELS}\n\n{LOSSES}\n\n{_JSON}\n\n{EXIT_CODES}",
    )
    invert.add_argument("photo", metavar="PHOTO", help=PHOTO)
    invert.add_argument("--model", default="vit_b_16", metavar="NAME", help="see below (%(default)s)")
    invert.add_argument(
        "--position", default="learned", choices=POSITIONS, metavar="P",
        help="learned: trained, its gradient shared; frozen: random and not trained; sinusoidal, sinusoidal-2d: "
        "fixed to sinusoids; none (%(default)s)",
    )  # fmt: skip
    _add_attack(invert)
    invert.add_argument("--dtype", default="float32", choices=DTYPES, help="of the client (%(default)s)")
    invert.add_argument("--seed", default=0, type=whole(0), metavar="N", help="of weights and label (%(default)s)")
    invert.add_argument("--label", type=whole(0), metavar="N", help="the private label (drawn with the seed)")
    invert.add_argument(
        "--image-size", default=(224, 224), type=size, metavar="S",
        help="pixels a side; HxW, height first, for models that take it: timm's and transformers' (224)",
    )  # fmt: skip
    invert.add_argument(
        "--out", default="invert.png", metavar="PNG",
        help="figure to write: private image, reconstruction, difference magnified (%(default)s)",
    )  # fmt: skip
    invert.add_argument("--reconstruction", metavar="PNG", help="also write the reconstruction alone, pixel by pixel")
    invert.add_argument(
        "--json", metavar="FILE", help="also write the numbers as JSON; - for stdout, and words to stderr"
    )


def _add_attack(invert: argparse.ArgumentParser) -> None:
    invert.add_argument(
        "--attack", default="auto", type=_attack, metavar="A",
        help="auto takes the strongest closed form that applies; others are searches; see below (%(default)s)",
    )  # fmt: skip
    invert.add_argument(
        "--evaluations", type=whole(0), metavar="N",
        help="a search ends after so many gradients of candidates (2000; span_then_round: 1200)",
    )  # fmt: skip
    invert.add_argument(
        "--seconds", type=positive, metavar="S",
        help="and after so many seconds; its result then depends on the machine (300, or none with --evaluations)",
    )  # fmt: skip
    add_judging(invert, strict=True)


def _attack(text: str) -> str:
    return text if text == "auto" else attack(text)
