"""``aprillab compare``: attacks side by side on the same updates, as a table and figures."""

from __future__ import annotations

import argparse
import re
import shlex
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from .. import viz
from ..comparison import figures
from ..comparison.cases import Case, cross
from ..comparison.parallel import Workers
from ..comparison.records import Row, read_rows
from ..comparison.run import run as run_cases
from ..comparison.table import report, table
from .files import made, writable_file, writable_folder, write
from .messages import CommandError, note


def run(arguments: argparse.Namespace) -> int:
    """Play all cases, and write the rows, the figures and the page."""
    if Path(arguments.name).name != arguments.name:
        raise CommandError(f"--name {arguments.name}: this is the beginning of file names; folders belong to --out")
    path = writable_file(str(writable_folder(arguments.out) / f"{arguments.name}.csv"))
    workers = Workers(arguments.jobs, arguments.dask)
    if workers.dask is None:  # a cluster may have another device
        try:
            torch.zeros(1, device=arguments.device)
        except (RuntimeError, AssertionError) as error:
            raise CommandError(f"--device {arguments.device}: {error}") from error
    cases = _cases(arguments)
    print(f"{len(cases)} attacks on {len({case.update for case in cases})} updates", flush=True)
    with made(path.parent):
        _play_and_write(arguments, cases, path, workers)
    return 0


def _play_and_write(arguments: argparse.Namespace, cases: list[Case], path: Path, workers: Workers) -> None:
    start = time.perf_counter()
    if arguments.again and path.exists():
        note(f"{path}: begun anew")
    try:
        rows = run_cases(
            cases, path=path, resume=not arguments.again, max_evaluations=arguments.max_evaluations,
            max_seconds=arguments.max_seconds, device=arguments.device, workers=workers,
        )  # fmt: skip
    except KeyboardInterrupt:
        note(f"{path} has what was done; the same command{', without --again,' * arguments.again} goes on")
        raise
    written = {}
    for name, (figure, alternative) in _figures(rows, path).items():
        write(path.with_name(name), viz.to_png(figure))
        written[name] = alternative
    command, page = _command(arguments), path.with_suffix(".md")
    _note_other_page(page, command)
    write(page, (report(rows, command, written) + _other_rows(rows, path)).encode())
    print(f"\n{table(rows)}\n\nwrote {path}, {page.name} and {', '.join(written)}", end=" ")
    print(f"({time.perf_counter() - start:.0f} s)")


def _note_other_page(page: Path, command: str) -> None:
    """Say so where the page is of another command, whose rows it will no longer show."""
    if page.is_file():
        before = re.search(r"Made by `(.*?)`", page.read_text(encoding="utf-8", errors="replace"))
        if before and before[1] != command:
            note(f"{page} and its figures now show this command's rows; another's are made by: {before[1]}")


def _other_rows(rows: list[Row], path: Path) -> str:
    """A sentence for the page on the CSV's rows that it does not show; empty if there are none."""
    other = len(read_rows(path)) - len(rows)
    if not other:
        return ""
    note(f"{path} has {other} rows of other settings besides, which {path.stem}.md does not show")
    return f"\n{path.name} has {other} rows of other settings besides, which this page does not show.\n"


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
            attacks=arguments.attacks,
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
    """The command that makes the same rows, with every option but where they are computed, so that
    no default has to stay what it is.
    """
    words = ["aprillab", "compare"]
    for name, value in vars(arguments).items():
        if name in ("command", "words", "again", "jobs", "dask") or value is None:
            continue
        if name == "out" and Path(value).is_absolute():
            value = Path(value).name  # where it lies on this computer is of no use elsewhere
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)
