"""The results comparison: every attack on the same updates, and a CSV row for each.

    attacks, positions = ("span", "match:april"), ("learned", "frozen")
    cases = cross(victims=("astronaut", "chelsea"), attacks=attacks, positions=positions)
    rows = run(cases, path="compare.csv")
    print(table(rows))

Beside ``compare.csv`` lie ``compare_curves.csv``, how each search went, and ``compare_pictures/``,
what came of it (records.py has the columns). Attacks see model and update, and the labels where a
case says so.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attacks.catalogue import ATTACKS
from ..attacks.searches.recipes import RECIPES
from .cases import Case, CompareError, is_file, private_pictures
from .parallel import HERE, Failure, Spread, Workers, connected, failed
from .play import Played, build_for, digest_of, files_of, play_attack, play_client, play_group, warm_up
from .records import (
    POINT_COLUMNS,
    ROW_COLUMNS,
    Row,
    append_lines,
    cells,
    curves_file,
    keep_pictures,
    levels_of,
    private_levels,
    read_curves,
    read_rows,
    write_lines,
)


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
    workers: Workers = HERE,
) -> list[Row]:
    """Play all cases, each update once for all attacks on it, and append a row to the CSV as each
    attack ends.

    With several workers an update's rows come together, and at the end the cases' rows are brought
    into the order that one process gives them: but for what depends on time and machine, the CSV is
    the same.

    Parameters
    ----------
    cases : Case
    path : of the CSV; its folder is there
    resume : bool
        Skip what the CSV has; False begins it anew.
    max_evaluations, max_seconds : budget of each search, over all its restarts
        With ``max_seconds`` the result depends on the machine's speed. Another attack may have
        another budget, in another call with the same ``path``.
    curve_every : int
        Score a search at every so many of its evaluations.
    pictures : bool
        Keep what the attacks return, as 8-bit pixels, one safetensors file an update.
    device : where client and attacks compute; several workers share it
    progress : bool, show a progress bar
    workers : :class:`~aprillab.comparison.parallel.Workers`
        The processes that play the updates: this one, several here, or a Dask cluster. Each job has
        its share of this process's threads.

    Returns
    -------
    list of Row
        In the order of ``cases``, as they stand in the CSV.

    Raises
    ------
    CompareError
        If the CSV cannot be gone on with: other columns, the same search with another budget; or a
        victim cannot be had.
    ModelError
        If a model cannot be built. All are built once before the first attack.
    WorkersError
        If there are no such workers, or if cases failed in them; then all others have their rows.
    KeyboardInterrupt
        As it comes; the search under way is dropped, all rows before it are kept.

    Examples
    --------
    >>> import tempfile
    >>> from aprillab.comparison.cases import cross
    >>> shape = {"image_size": 8, "patch_size": 4, "width": 32, "depth": 1, "heads": 2}
    >>> cases = cross(victims=["coffee"], attacks=["embedding", "april"], **shape)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = run(cases, path=f"{folder}/compare.csv", progress=False)
    >>> [(row.case.attack, row.exact) for row in rows]
    [('embedding', True), ('april', None)]
    """
    path, cases = Path(path), list(dict.fromkeys(cases))
    _check_arguments(cases, max_evaluations, curve_every)
    budget: dict[str, Any] = {"max_evaluations": max_evaluations, "max_seconds": max_seconds}
    rows = read_rows(path) if resume else []
    _check_rows(path, rows, set(cases), **budget)
    groups = _by_update(set(cases) - {row.case for row in rows}, cases)
    _check_models([group[0] for group in groups])
    budget["curve_every"] = curve_every
    with connected(workers if groups else HERE) as spread:
        _drop_unfinished_rows(path, rows)
        bar = tqdm(total=len(cases), initial=len(cases) - sum(map(len, groups)), disable=not progress, unit=" case")
        with bar:
            keep = partial(_keep, path, bar, pictures)
            if workers.here:
                _play_here(groups, torch.device(device), budget, bar, keep)
            else:
                bar.set_description(str(workers))
                play = partial(play_group, device=str(device), **budget)
                try:
                    _play_elsewhere(groups, spread, play, workers.dask is not None, keep)
                finally:
                    _bring_into_order(path, cases)
    known = {row.case: row for row in read_rows(path)}
    return [known[case] for case in cases]


Keep = Callable[[Case, Tensor, Played], None]


def _keep(path: Path, bar: tqdm, pictures: bool, case: Case, private: Tensor, played: Played) -> None:
    """Write what became of a case."""
    if pictures and played.pictures is not None:
        keep_pictures(path, case, private, *played.pictures)
    append_lines(curves_file(path), [cells(point) for point in played.points])
    append_lines(path, [cells(played.row)])  # last: without its row, the rest does not count
    bar.update()


def _name(case: Case) -> str:
    return f"{case.attack} {case.position} {case.dtype} {'+'.join(case.victims)}"


def _play_here(
    groups: Sequence[Sequence[Case]], device: torch.device, budget: dict[str, Any], bar: tqdm, keep: Keep
) -> None:
    if any(ATTACKS[case.attack].searches for group in groups for case in group):
        warm_up()
    for group in groups:
        client = play_client(group[0], device)
        for case in group:
            bar.set_description(_name(case))
            keep(case, client.pixels, play_attack(case, client, **budget))


def _play_elsewhere(
    groups: Sequence[Sequence[Case]], spread: Spread, play: Callable[..., Any], files: bool, keep: Keep
) -> None:
    """``files``: the workers may have others than we, and are told which they are."""
    failures: list[tuple[str, Failure]] = []

    def fails(case: Case, failure: Failure) -> None:
        failures.append((_name(case), failure))
        tqdm.write(f"{_name(case)} failed: {failure.words}", file=sys.stderr)

    tasks = [(group, files_of(group[0]) if files else {}) for group in groups]
    with contextlib.closing(spread(play, tasks)) as results:
        for number, result in results:
            if isinstance(result, Failure):
                private, outcomes = None, [result] * len(groups[number])
            else:
                private, outcomes = result
            for case, played in zip(groups[number], outcomes, strict=True):
                if isinstance(played, Failure):
                    fails(case, played)
                else:
                    keep(case, private, played)
    if failures:
        raise failed(failures)


def _bring_into_order(path: Path, cases: Sequence[Case]) -> None:
    """Put the cases' rows into the order in which one process plays them, in the places they have."""
    rows = read_rows(path)
    order = {case: i for i, case in enumerate(case for group in _by_update(set(cases), cases) for case in group)}
    ours = iter(sorted((row for row in rows if row.case in order), key=lambda row: order[row.case]))
    _drop_unfinished_rows(path, [next(ours) if row.case in order else row for row in rows])


def _by_update(missing: set[Case], cases: Sequence[Case]) -> list[list[Case]]:
    """The missing cases in their order, those on one update together."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        if case in missing:
            groups.setdefault(case.update, []).append(case)
    return list(groups.values())


def _check_arguments(cases: Sequence[Case], max_evaluations: int, curve_every: int) -> None:
    if unknown := [case.attack for case in cases if case.attack not in ATTACKS]:
        raise CompareError(f"there is no attack {unknown[0]!r}; there are {', '.join(ATTACKS)}")
    least = max(recipe.restarts for recipe in RECIPES.values())
    if max_evaluations < least or curve_every < 1:
        raise CompareError(f"max_evaluations={max_evaluations} must be {least} or more, and curve_every positive")


def _check_models(cases: Sequence[Case]) -> None:
    """Build each kind of model once, and load the victims, before hours are spent on what comes
    first.
    """
    seen = set()
    for case in cases:
        private_pictures(case)
        like = replace(case, attack="", victims=("astronaut",), dtype="float32", seed=0)
        if (like, case.weights_file) not in seen:
            seen.add((like, case.weights_file))
            build_for(case)


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
        if file and file.is_file() and digest_of(file) != digest:
            raise CompareError(f"{file} has changed since the rows in {path} were made: begin them again")
    _check_picture_files(path, [row.case for row in rows if row.case in asked])


def _check_picture_files(path: Path, cases: Sequence[Case]) -> None:
    """Refuse to go on where a user's picture is no longer the one that is kept with its rows."""
    for case in {case.update: case for case in cases if any(map(is_file, case.victims))}.values():
        kept = private_levels(path, case)
        if kept is not None and not torch.equal(kept, levels_of(private_pictures(case)[0])):
            files = ", ".join(filter(is_file, case.victims))
            raise CompareError(f"{files} has changed since the rows in {path} were made: begin them again")


def _drop_unfinished_rows(path: Path, rows: Sequence[Row]) -> None:
    """Leave in the files nothing but what belongs to these rows."""
    done = dict.fromkeys((row.case.update, row.case.attack, row.case.labels) for row in rows)
    curves = read_curves(path) if rows else {}
    write_lines(path, [cells(row) for row in rows], ROW_COLUMNS)
    kept = [cells(point) for key in done for point in curves.get(key, [])]
    write_lines(curves_file(path), kept, POINT_COLUMNS)
    for file in path.with_name(f"{path.stem}_pictures").glob("*.safetensors"):
        if file.stem not in {update for update, _, _ in done}:
            file.unlink()
