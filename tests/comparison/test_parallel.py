"""Cases in several processes: one process's CSV, whatever dies or is interrupted on the way."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import in_workers
import pytest
from command_line import mind_interruption
from compared import QUICK, TINY

from aprillab.comparison import parallel
from aprillab.comparison import run as module
from aprillab.comparison.cases import CompareError, cross
from aprillab.comparison.parallel import Workers, WorkersError, connected
from aprillab.comparison.play import files_of, play_group
from aprillab.comparison.records import curves_file, read_pictures, read_rows
from aprillab.comparison.run import run

TWO = Workers(jobs=2)
CASES = cross(victims=["coffee", "clock"], attacks=["span", "match:april"], positions=["learned", "frozen"], **TINY)
TIMES = ("seconds", "gradient_seconds", "threads")  # the columns in which one process's CSV differs


def lines_of(path: Path, *but: str) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [{name: text for name, text in line.items() if name not in (*TIMES, *but)} for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV of one process."""
    path = tmp_path_factory.mktemp("alone") / "compare.csv"
    run(CASES, path=path, **QUICK)
    return path


def is_the_same(path: Path, alone: Path) -> None:
    assert lines_of(path) == lines_of(alone)
    assert lines_of(curves_file(path)) == lines_of(curves_file(alone))
    for case in CASES:
        ours, theirs = read_pictures(path, case), read_pictures(alone, case)
        assert ours is not None
        assert theirs is not None
        assert all(one.equal(other) for one, other in zip(ours, theirs, strict=True))


def wait_for(condition: Callable[[], Any], seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


# --- Jobs on this machine -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_jobs_write_one_process_s_files_and_go_on_with_a_half(path: Path, alone: Path) -> None:
    run(CASES, path=path, workers=TWO, **QUICK)
    is_the_same(path, alone)
    # What a broken run may leave: later cases before earlier ones, another comparison's
    # row, half a line.
    half = path.with_name("half.csv")
    (other,) = cross(victims=["rocket"], attacks=["span"], **TINY)
    for cases in (CASES[5:6], [other], CASES[2:3]):
        run(cases, path=half, **QUICK)
    with half.open("a") as file:
        file.write("span,cof")
    assert [row.case for row in run(CASES, path=half, workers=TWO, **QUICK)] == CASES
    assert [row.case for row in read_rows(half)] == [CASES[0], other, *CASES[1:]]
    assert [line for line in lines_of(half) if line["victims"] != "rocket"] == lines_of(alone)


@pytest.mark.slow
def test_what_fails_in_a_job_is_named_and_the_others_have_their_rows(
    path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "play_group", in_workers.fails_at_clock)
    with pytest.raises(WorkersError, match="6 failed, the rows of all others are kept: ") as caught:
        run(CASES, path=path, workers=TWO, **QUICK)
    assert "span learned float32 clock: ZeroDivisionError: no clock (on " in str(caught.value)
    assert "and 3 more" in str(caught.value)
    assert any("fails_at_clock" in note for note in caught.value.__notes__)
    shown = capsys.readouterr().err
    assert shown.count("clock failed: ZeroDivisionError") == 4
    assert shown.count("match:april learned float32 coffee failed: TypeError") == 1
    assert [row.case for row in read_rows(path)] == [CASES[0], CASES[4]]
    monkeypatch.undo()
    run(CASES, path=path, workers=TWO, **QUICK)
    is_the_same(path, alone)


@pytest.mark.slow
def test_what_a_job_was_at_when_it_died_is_taken_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with connected(TWO) as spread:
        assert dict(spread(partial(in_workers.dies_once_at_zero, tmp_path / "died"), range(4))) == {
            i: i for i in range(4)
        }
    assert (tmp_path / "died").is_file()
    assert capsys.readouterr().err == "a job died: what it was at is taken again\n"


@pytest.mark.slow
def test_a_case_that_kills_its_job_alone_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "DEATHS", 0)
    with connected(TWO) as spread:
        ((number, failure),) = spread(in_workers.dies_at_zero, [0])
    assert number == 0
    assert "its worker died again and again" in failure.words


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_leaves_no_process(path: Path, alone: Path) -> None:
    """A real one, to the whole group of processes, while the second job is at a search without an
    end.
    """
    spans = [case for case in CASES if case.attack == "span"]
    endless = replace(CASES[1], image_size=64, width=192, depth=4)
    script = (
        "from aprillab.comparison.cases import Case\nfrom aprillab.comparison.parallel import Workers\n"
        "from aprillab.comparison.run import run\n"
        f"run({[endless, *spans]!r}, path={str(path)!r}, max_evaluations=10**9, workers=Workers(jobs=2))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{script}"]
    running = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, text=True, preexec_fn=mind_interruption
    )
    try:
        wait_for(lambda: path.is_file() and len(read_rows(path)) == len(spans))
        os.killpg(running.pid, signal.SIGINT)
        assert "KeyboardInterrupt" in running.communicate(timeout=60)[1]
        assert running.returncode == -signal.SIGINT
        wait_for(lambda: not processes_of(running.pid), 20)
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(running.pid, signal.SIGKILL)
    assert [row.case for row in read_rows(path)] == spans
    run(CASES, path=path, **QUICK)
    here, there = (lines_of(file, "max_evaluations") for file in (path, alone))
    assert sorted(map(str, here)) == sorted(map(str, there))


def test_a_job_ends_with_the_process_that_asks() -> None:
    job = (
        f"import os, sys, time\nsys.path[:0] = {sys.path!r}\nfrom aprillab.comparison.parallel import _end_with\n"
        "_end_with(os.getppid())\nprint('watching', flush=True)\ntime.sleep(100)"
    )
    asks = [sys.executable, "-c", f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {job!r}])"]
    running = subprocess.Popen(asks, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "watching\n"
        running.kill()
        assert running.communicate(timeout=60)[0] == ""  # until the job has closed it, too
        wait_for(lambda: not processes_of(running.pid), 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)


def processes_of(session: int) -> list[int]:
    """Those of a session that still run."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = place.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(own) == session and state != "Z":
            found.append(int(place.parent.name))
    return found


# --- Dask -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two workers of one thread each on this machine."""
    distributed = pytest.importorskip("distributed")
    options = {"dashboard_address": ":0", "silence_logs": 50}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **options) as started:
        yield started


@pytest.mark.slow
def test_dask_takes_the_case_of_a_killed_worker_again(
    path: Path, alone: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = path.with_name("worker.txt")
    monkeypatch.setattr(module, "play_group", partial(in_workers.waits_once_at_clock, file))

    def kill() -> None:
        wait_for(file.exists)
        os.kill(int(file.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    run(CASES, path=path, workers=Workers(dask=cluster.scheduler_address), **QUICK)
    killer.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
    is_the_same(path, alone)


@pytest.mark.slow
def test_dask_names_a_case_that_it_gives_up(cluster: Any) -> None:
    cluster.scheduler.allowed_failures = 0
    with connected(Workers(dask=cluster.scheduler_address)) as spread:
        found = dict(spread(in_workers.dies_at_zero, range(2)))
    assert found[1] == 1
    assert "died again and again, for want of memory perhaps (KilledWorker" in found[0].words


def test_dask_s_workers_that_will_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(parallel, "ANSWERS", 0.2)
    monkeypatch.setattr(parallel, "STARTS", 0.2)
    for address in ("tcp://127.0.0.1:1", "abacus://here"):
        cannot(Workers(dask=address), f"no Dask scheduler answers at {address} .*; start `dask scheduler`")
    options: dict[str, Any] = {"processes": False, "dashboard_address": ":0", "silence_logs": 50}
    with distributed.LocalCluster(n_workers=0, **options) as started:
        cannot(Workers(dask=started.scheduler_address), "has no worker; start `dask scheduler`")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, **options) as started:
        cannot(Workers(dask=started.scheduler_address), "must have one thread each, .* and .* has 2; start `dask")


def cannot(workers: Workers, words: str) -> None:
    with pytest.raises(WorkersError, match=words), connected(workers):
        pass


# --- What is said where it cannot be ------------------------------------------------------------------------------


def test_one_process_needs_neither_package_and_several_say_which(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("joblib", "distributed"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert len(run(CASES[:1], path=path, **QUICK)) == 1
    before = path.read_text()
    remedy = r'pip install "aprillab\[cluster\]"'
    with pytest.raises(WorkersError, match=f"several jobs need joblib: {remedy}"):
        run(CASES, path=path, workers=TWO, **QUICK)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(WorkersError, match=f"Dask is not installed here: {remedy}"):
        run(CASES, path=path, workers=Workers(dask="tcp://127.0.0.1:1"), **QUICK)
    monkeypatch.setattr("joblib.__version__", "1.4.2")
    with pytest.raises(WorkersError, match=f"joblib 1.4.2 is too old .*: {remedy}"):
        run(CASES, path=path, workers=TWO, **QUICK)
    assert path.read_text() == before
    # With nothing to do nobody is needed.
    assert len(run(CASES[:1], path=path, workers=TWO, **QUICK)) == 1


def test_workers_that_cannot_be() -> None:
    with pytest.raises(WorkersError, match="jobs=0 must be 1 or more"):
        Workers(jobs=0)
    with pytest.raises(WorkersError, match="2 jobs and Dask: give one"):
        Workers(jobs=2, dask="tcp://127.0.0.1:8786")


def test_a_worker_without_the_user_s_files_says_so(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"some weights")
    case = replace(CASES[0], weights=str(file))
    files = files_of(case)
    assert files.keys() == {str(file)}
    for change, state in ((partial(file.write_bytes, b"other"), "another file"), (file.unlink, "not there")):
        change()
        with pytest.raises(
            CompareError, match=rf"weights.safetensors is {state} on a worker, .* the same paths on all"
        ):
            play_group(([case], files), device="cpu", max_evaluations=12, max_seconds=None, curve_every=5)
