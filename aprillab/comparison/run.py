"""The results comparison: every attack on the same updates, one CSV row each, that can be gone on with later.

    cases = cross(victims=("astronaut", "chelsea"), attacks=("span", "match:april"), positions=("learned", "frozen"))
    rows = run(cases, path="compare.csv")
    print(table(rows))

Beside ``compare.csv`` lie ``compare_curves.csv``, how each search went, and ``compare_pictures/``, what came of it
(compare_records.py has the columns). Attacks see model and update, and the labels where a case says so.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..anatomy import dissect
from ..attacks.catalogue import ATTACKS
from ..attacks.result import AttackNotApplicable
from ..attacks.searches.match import match_gradients
from ..attacks.searches.recipes import RECIPES, Recipe
from ..data import load_victim, mnist5k
from ..metrics import match_batch, psnr, ssim
from ..models import VisionTransformer
from ..preprocessing import Preprocessing
from ..update import ClientUpdate, UpdateError, client_update, logits_of
from ..version import __version__
from ..zoo import build_model
from .records import (
    DTYPES,
    POINT_COLUMNS,
    ROW_COLUMNS,
    Case,
    CompareError,
    Point,
    Row,
    append_lines,
    cells,
    curves_file,
    keep_pictures,
    read_curves,
    read_rows,
    write_lines,
)


def cross(
    *,
    victims: Sequence[str],
    attacks: Sequence[str] = tuple(ATTACKS),
    models: Sequence[str] = ("prenorm",),
    positions: Sequence[str] = ("learned",),
    dtypes: Sequence[str] = ("float32",),
    weights: Sequence[str] = ("init",),
    seeds: Sequence[int] = (0,),
    batch_sizes: Sequence[int] = (1,),
    **common: Any,
) -> list[Case]:
    """Every combination, seed by seed, so that a run which is broken off has whole seeds.

    Parameters
    ----------
    victims : names
        Cut into batches in this order; what is left over at the end is left out.
    attacks, models, positions, dtypes, weights, seeds
        Values of :class:`Case`'s fields.
    batch_sizes : ints
    **common
        Other fields of :class:`Case`, the same in all.

    Raises
    ------
    CompareError
        If a name is unknown, or a batch larger than the list of victims.
    """
    if too_large := [size for size in batch_sizes if not 1 <= size <= len(victims)]:
        raise CompareError(f"a batch of {too_large[0]} cannot be made of {len(victims)} victims")
    return [
        Case(
            attack=attack, victims=tuple(victims[i : i + size]), model=model, position=position, dtype=dtype,  # type: ignore[arg-type]
            weights=file, seed=seed, **common,
        )
        for seed in seeds
        for size in batch_sizes
        for model in models
        for file in weights
        for dtype in dtypes
        for position in positions
        for i in range(0, len(victims) - size + 1, size)
        for attack in attacks
    ]  # fmt: skip


def run(
    cases: Iterable[Case],
    *,
    path: str | Path,
    resume: bool = True,
    max_evaluations: int = 2000,
    max_seconds: float | None = None,
    curve_every: int = 10,
    pictures: bool = True,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[Row]:
    """Play all cases, each update once for all attacks on it, and append a row to the CSV as each attack ends.

    Parameters
    ----------
    cases : Case
    path : of the CSV; its folder is there
    resume : bool
        Skip what the CSV has; False begins it anew.
    max_evaluations, max_seconds : budget of each search, over all its restarts
        With ``max_seconds`` the result depends on the machine's speed. Another attack may have another budget, in
        another call with the same ``path``.
    curve_every : int
        Score a search at every so many of its evaluations.
    pictures : bool
        Keep what the attacks return, as 8-bit pixels, one safetensors file an update.
    device : where client and attacks compute
    progress : bool, show a progress bar

    Returns
    -------
    list of Row
        In the order of ``cases``, as they stand in the CSV.

    Raises
    ------
    CompareError
        If the CSV cannot be gone on with: other columns, the same search with another budget; or a victim cannot
        be had.
    ModelError
        If a model cannot be built. All are built once before the first attack.
    KeyboardInterrupt
        As it comes; the search under way is dropped, all rows before it are kept.
    """
    path, cases = Path(path), list(dict.fromkeys(cases))
    if unknown := [case.attack for case in cases if case.attack not in ATTACKS]:
        raise CompareError(f"there is no attack {unknown[0]!r}; there are {', '.join(ATTACKS)}")
    least = max(recipe.restarts for recipe in RECIPES.values())
    if max_evaluations < least or curve_every < 1:
        raise CompareError(f"max_evaluations={max_evaluations} must be {least} or more, and curve_every positive")
    rows = read_rows(path) if resume else []
    _check_rows(path, rows, set(cases), max_evaluations, max_seconds)
    done = {row.case for row in rows}
    groups: dict[str, list[Case]] = {}
    for case in cases:
        if case not in done:
            groups.setdefault(case.update, []).append(case)
    _check_models([group[0] for group in groups.values()])
    _begin(path, rows)
    if any(ATTACKS[case.attack].searches for group in groups.values() for case in group):
        _warm_up()
    bar = tqdm(
        total=len(cases), initial=len(cases) - sum(map(len, groups.values())), disable=not progress, unit=" case"
    )
    with bar:
        for group in groups.values():
            client = _play_client(group[0], torch.device(device))
            for case in group:
                bar.set_description(f"{case.attack} {case.position} {case.dtype} {'+'.join(case.victims)}")
                row, found, points = _play_attack(case, client, max_evaluations, max_seconds, curve_every)
                if pictures and found is not None:
                    keep_pictures(path, case, client.pixels, *found)
                append_lines(curves_file(path), [cells(point) for point in points])
                append_lines(path, [cells(row)])  # last: without its row, the rest does not count
                bar.update()
    known = {row.case: row for row in read_rows(path)}
    return [known[case] for case in cases]


# --- One round: the client, the attacks, the scores ---------------------------------------------------------------


@dataclass(frozen=True)
class _Client:
    """The private pictures (B, C, H, W), pixels in float64 on the CPU, and what is shared of them."""

    pixels: Tensor
    labels: Tensor
    model: nn.Module
    preprocessing: Preprocessing
    update: ClientUpdate
    weights_sha256: str


def _private(case: Case) -> tuple[Tensor, Tensor]:
    """Pixels (B, C, H, W) and labels (B,): a digit's own, a photograph's drawn from those that are left."""
    pixels: list[Tensor] = []
    labels: list[int | None] = []
    for name in case.victims:
        if not name.startswith("mnist:"):
            pixels.append(load_victim(name, case.image_size, channels=case.channels, dtype=torch.float64))
            labels.append(None)
            continue
        try:
            images, known = mnist5k("test", dtype=torch.float64)
        except ImportError as error:
            raise CompareError(f"victim {name!r}: {error}") from error
        number = int(name.removeprefix("mnist:"))
        if number >= len(images):
            raise CompareError(f"victim {name!r}: there are {len(images)} test digits, from mnist:0")
        pixels.append(images[number])
        labels.append(int(known[number]))
    drawn = torch.randperm(case.classes, generator=torch.Generator().manual_seed(case.seed)).tolist()
    free = iter([label for label in drawn if label not in labels])
    return torch.stack(pixels), torch.tensor([next(free) if label is None else label for label in labels])


def _build(case: Case) -> nn.Module:
    return build_model(
        case.model, image_size=case.image_size, patch_size=case.patch_size, width=case.width, depth=case.depth,
        heads=case.heads, mlp_ratio=case.mlp_ratio, channels=case.channels, classes=case.classes,
        position=case.position, weights=case.weights_file, dtype=DTYPES[case.dtype], seed=case.seed,
    )  # fmt: skip


def _check_models(cases: Sequence[Case]) -> None:
    """Build each kind of model once, and load the victims, before hours are spent on what comes first."""
    seen = set()
    for case in cases:
        _private(case)
        like = replace(case, attack="", victims=("astronaut",), dtype="float32", seed=0)
        if (like, case.weights_file) not in seen:
            seen.add((like, case.weights_file))
            _build(case)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _warm_up() -> None:
    """The first search of a process spends seconds on imports, which belong to no attack."""
    model = VisionTransformer(image_size=4, patch_size=2, width=4, depth=1, heads=1, classes=2)
    update = client_update(model, torch.ones(1, 3, 4, 4), torch.tensor([0]))
    match_gradients(model, update, recipe=Recipe(), max_evaluations=2, progress=False)


def _play_client(case: Case, device: torch.device) -> _Client:
    pixels, labels = _private(case)
    model = _build(case).to(device)
    preprocessing = dissect(model).preprocessing
    images = preprocessing.to_input(pixels.to(device, DTYPES[case.dtype]))  # (B, C, H, W)
    logits_of(model, images)  # the first pass pays for set-up
    update = client_update(model, images, labels.to(device))
    digest = _digest(case.weights_file) if case.weights_file else ""
    return _Client(pixels, labels, model, preprocessing, update, digest)


def _play_attack(
    case: Case, client: _Client, max_evaluations: int, max_seconds: float | None, every: int
) -> tuple[Row, tuple[Tensor, Tensor] | None, list[Point]]:
    """The row, the pictures (B, C, H, W) in the victims' order with their PSNR (B,), and the search's points."""
    watch = _Watch(case, client, every)
    labels = client.labels.to(next(client.model.parameters()).device)
    start = time.perf_counter()
    pictures: tuple[Tensor, Tensor] | None = None
    scores: dict[str, float] = {}
    numbers: dict[str, Any] = {}
    attack = ATTACKS[case.attack]
    options: dict[str, Any] = {"labels": labels if case.labels == "given" else None}
    if attack.searches:  # a closed form has no use for a seed, a budget or a callback
        options |= {"seed": case.seed, "max_evaluations": max_evaluations, "max_seconds": max_seconds}
        options |= {"callback": watch, "progress": False}
    try:
        found = attack.function(client.model, client.update, **options)
    except (AttackNotApplicable, UpdateError) as refusal:
        exact, outcome = None, f"refused: {getattr(refusal, 'reason', refusal)}"
        seconds = time.perf_counter() - start
    else:
        numbers, exact, seconds = dict(found.diagnostics), found.exact, found.seconds - watch.seconds
        if numbers.get("stopped") == "interrupted":  # match_gradients returns its best then
            raise KeyboardInterrupt
        outcome = f"{'exact' if exact else 'not exact'}: {found.reason}"
        pictures = pixels, decibels = _assigned(found.pixels, client.pixels)
        scores = {
            "psnr": float(decibels.mean()),
            "psnr_min": float(decibels.min()),
            "ssim": float(torch.as_tensor(ssim(pixels, client.pixels)).mean()),
        }
    if watch.points and scores:
        last = (numbers["evaluations"], seconds, numbers["loss"], scores["psnr"])
        watch.points.append(Point(case.update, case.attack, case.labels, *last))
    row = Row(
        case=case,
        psnr=scores.get("psnr"),
        psnr_min=scores.get("psnr_min"),
        ssim=scores.get("ssim"),
        exact=exact,
        predicted_psnr=None if exact is None else found.predicted_psnr,
        loss=numbers.get("loss"),
        residual=numbers.get("residual"),
        evaluations=numbers.get("evaluations"),
        seconds=seconds,
        gradient_seconds=client.update.seconds or 0.0,
        stopped=numbers.get("stopped", ""),
        outcome=" ".join(outcome.split()),
        max_evaluations=max_evaluations,
        max_seconds=max_seconds,
        weights_sha256=client.weights_sha256,
        **_provenance(labels.device),
    )
    return row, pictures, watch.points


@dataclass
class _Watch:
    """A callback that scores a search on its way, and keeps apart the seconds that this takes."""

    case: Case
    client: _Client
    every: int
    calls: int = 0
    restart: int = 0
    loss: float = math.inf
    seconds: float = 0.0
    points: list[Point] = field(default_factory=list)

    def __call__(self, entry: dict[str, Any], images: Tensor) -> None:
        start = time.perf_counter()
        # The pictures are the best of the restart that runs, so the loss is too.
        self.loss = entry["loss"] if entry["restart"] != self.restart else min(self.loss, entry["loss"])
        self.restart = entry["restart"]
        if self.calls % self.every == 0:
            decibels = _assigned(self.client.preprocessing.to_pixels(images), self.client.pixels)[1].mean()
            now = (entry["evaluation"], entry["seconds"] - self.seconds, self.loss, float(decibels))
            self.points.append(Point(self.case.update, self.case.attack, self.case.labels, *now))
        self.calls += 1
        self.seconds += time.perf_counter() - start


def _assigned(pixels: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstructions in the order of the originals, (B, C, H, W) float64 on the CPU, and their PSNR in dB, (B,)."""
    pixels = pixels.detach().to(originals)
    pixels = pixels.expand_as(originals) if len(pixels) == 1 else pixels[match_batch(pixels, originals)]
    return pixels, torch.as_tensor(psnr(pixels, originals))


def _provenance(device: torch.device) -> dict[str, Any]:
    return {
        "aprillab": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
    }


def _check_rows(
    path: Path, rows: Sequence[Row], asked: set[Case], max_evaluations: int, max_seconds: float | None
) -> None:
    """Refuse to go on with rows that new ones could not stand beside."""
    searches = {case.attack for case in asked if ATTACKS[case.attack].searches}
    for row in rows:
        if row.case.attack in searches and (row.max_evaluations, row.max_seconds) != (max_evaluations, max_seconds):
            raise CompareError(
                f"{path} holds rows of {row.case.attack} with max_evaluations={row.max_evaluations}, "
                f"max_seconds={row.max_seconds}, not {max_evaluations} and {max_seconds}: name another file, or "
                "begin this one again"
            )
    for file, digest in {(row.case.weights_file, row.weights_sha256) for row in rows if row.case in asked}:
        if file and file.is_file() and _digest(file) != digest:
            raise CompareError(f"{file} has changed since the rows in {path} were made: begin them again")


def _begin(path: Path, rows: Sequence[Row]) -> None:
    """Leave in the files nothing but what belongs to these rows."""
    done = {(row.case.update, row.case.attack, row.case.labels) for row in rows}
    curves = read_curves(path) if rows else {}
    write_lines(path, [cells(row) for row in rows], ROW_COLUMNS)
    kept = [cells(point) for key, points in curves.items() if key in done for point in points]
    write_lines(curves_file(path), kept, POINT_COLUMNS)
    for file in path.with_name(f"{path.stem}_pictures").glob("*.safetensors"):
        if file.stem not in {update for update, _, _ in done}:
            file.unlink()


# --- The summary ----------------------------------------------------------------------------------------------------

BY = ("model", "image_size", "weights", "dtype", "batch_size", "labels", "position", "attack")


def table(rows: Sequence[Row], *, by: Sequence[str] = BY) -> str:
    """A Markdown table: one line for each combination of the columns ``by``, then why attacks were refused.

    Columns with one value in all rows are left out, except the attack. PSNR in dB (a run's is the mean over its
    batch), seconds of the attack; medians over the runs that were not refused.
    """
    texts = [cells(row) for row in rows]
    by = [name for name in by if name == "attack" or len({text[name] for text in texts}) > 1]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for line, row in zip(texts, rows, strict=True):
        groups.setdefault(tuple(line[name] for name in by), []).append(row)
    head = [name.replace("_", " ") for name in by]
    head += ["runs", "median dB", "least dB", "exact", "refused", "median s"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    reasons: dict[str, list[str]] = {}
    for key, group in groups.items():
        scored = [row for row in group if row.psnr is not None]
        values = sorted(-math.inf if math.isnan(row.psnr) else row.psnr for row in scored if row.psnr is not None)
        numbers = ["–"] * 3
        if scored:
            seconds = statistics.median(row.seconds for row in scored)
            numbers = [f"{statistics.median(values):.1f}", f"{values[0]:.1f}", f"{seconds:.3g}"]
        exact, refused = sum(bool(row.exact) for row in group), len(group) - len(scored)
        counts = [f"{exact} of {len(scored)}" if scored else "–", str(refused)]
        lines.append(f"| {' | '.join([*key, str(len(group)), *numbers[:2], *counts, numbers[2]])} |")
        for row in group:
            if row.psnr is None:
                reasons.setdefault(row.case.attack, []).append(row.outcome.removeprefix("refused: "))
    if reasons:
        lines += ["", "Refused, and why:", ""]
        lines += [
            f"- {attack} ({said.count(reason)}): {reason}"
            for attack, said in reasons.items()
            for reason in dict.fromkeys(said)
        ]
    return "\n".join(lines)


def report(rows: Sequence[Row], command: str, figures: dict[str, str] | None = None) -> str:
    """The summary as a Markdown page with the command that makes it; ``figures`` maps files to alternative texts."""
    lines = [cells(row) for row in rows]
    # Every value of a column, in the order of the rows; "" where there is none.
    values = {name: " / ".join(filter(None, dict.fromkeys(line[name] for line in lines))) for name in ROW_COLUMNS}
    setting = ", ".join(f"{name.replace('_', ' ')} {values[name]}" for name in _SETTING if values[name])
    limit = f"{values['max_evaluations']} evaluations" + (f" or {s} s" if (s := values["max_seconds"]) else "")
    pictures = "".join(f"![{alt}]({name})\n\n" for name, alt in (figures or {}).items())
    versions = ", ".join(f"{name} {values[name]}" for name in ("aprillab", "torch", "python"))
    return (
        f"# Attacks compared\n\n{setting}; victims {values['victims']}. A search ends after {limit}. PSNR of pixels "
        "in [0, 1], mean over a batch after the best assignment. Exact is what the attack itself could verify.\n\n"
        f"{table(rows)}\n\n{pictures}"
        f"{versions}, {values['machine']}, {values['threads']} thread(s), {values['device']}. Made by `{command}`. "
        "Seconds, and what a limit in seconds cut short, depend on the machine.\n"
    )


_SETTING = (
    "model", "image_size", "patch_size", "width", "depth", "heads", "mlp_ratio", "channels", "classes", "position",
    "weights", "dtype", "labels", "batch_size", "seed",
)  # fmt: skip
