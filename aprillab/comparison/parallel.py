"""Cases spread over processes by joblib: jobs on this machine, or the workers of a Dask cluster.

    with connected(Workers(jobs=4)) as spread:
        for number, result in spread(function, items):  # as they end, not in their order
            ...

Whoever asks gets the results and writes files alone; workers only compute. A worker that dies loses
nothing but time: what it was at is taken again. Neither joblib nor Dask is imported before several
processes are asked for; the extra ``cluster`` brings both.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from .cases import CompareError

#: So often may jobs die with no result between; then their items are tried alone, to see
#: which one does it.
DEATHS = 2
ANSWERS, STARTS = 15.0, 60.0  # seconds for a scheduler to answer, and for a worker to be there
INSTALL = 'pip install "aprillab[cluster]"'

# PyTorch's generator and number of threads belong to a whole process, so that two cases in two of
# its threads would disturb each other.
_ONE_AT_A_TIME = threading.Lock()


class WorkersError(CompareError):
    """Cases that could not be computed elsewhere; what is done is kept."""


@dataclass(frozen=True)
class Workers:
    """Where cases are computed.

    Attributes
    ----------
    jobs : int
        Processes on this machine, each with its share of PyTorch's threads; 1: this very process.
    dask : str or None
        Address of a Dask scheduler, such as ``"tcp://10.0.0.5:8786"``, whose workers compute in
        place of this machine, with as many of PyTorch's threads each as they have (Dask gives them
        one). It runs what it is sent: let it listen to people you trust alone.

    Raises
    ------
    WorkersError
        If ``jobs`` is below 1, or both are given.
    """

    jobs: int = 1
    dask: str | None = None

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise WorkersError(f"jobs={self.jobs} must be 1 or more")
        if self.dask is not None and self.jobs > 1:
            raise WorkersError(f"{self.jobs} jobs and Dask: give one; a cluster computes on all workers that it has")

    @property
    def here(self) -> bool:
        """Whether all is computed in this process."""
        return self.jobs == 1 and self.dask is None

    def __str__(self) -> str:
        if self.dask is not None:
            return "Dask"
        return f"{self.jobs} jobs" if self.jobs > 1 else "one process"


HERE = Workers()


@dataclass(frozen=True)
class Failure:
    """An exception that a worker met: in words, as a traceback, and on which machine."""

    words: str
    trace: str
    host: str


Results = Generator[tuple[int, Any], None, None]


class Spread(Protocol):
    """Numbers of the items, and what the function made of each: as they end."""

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Results: ...


@contextlib.contextmanager
def connected(workers: Workers) -> Iterator[Spread]:
    """The workers, to spread items over them.

    In this process the items are computed one after another in their order, and exceptions come as
    they are. Elsewhere, results come as they end, an exception as a :class:`Failure` in place of
    its item's result, and the others go on. Functions and items must be such as pickle, or
    cloudpickle, takes; a function of a module that the worker can import goes by its name.

    Raises
    ------
    WorkersError
        If a package is missing, no scheduler answers, its workers have several threads each, or
        processes keep dying: the message has the remedy.
    KeyboardInterrupt
        As it comes, in a worker too. Jobs end at once, Dask's workers finish what they are at; no
        more results come.
    """
    if workers.here:
        yield lambda function, items: ((i, function(item)) for i, item in enumerate(items))
        return
    joblib = _joblib()
    if workers.dask is None:
        threads = max(1, torch.get_num_threads() // workers.jobs)

        def pool() -> Any:
            return joblib.parallel_config(
                "loky", n_jobs=workers.jobs, inner_max_num_threads=threads, idle_worker_timeout=60
            )

        yield lambda function, items: _spread(function, items, pool, threads)
        return
    with _client(workers.dask) as client:
        backend = _dask_backend()

        def cluster() -> Any:
            _wait(client, workers.dask)
            return joblib.parallel_config(backend(client=client), n_jobs=-1)

        yield lambda function, items: _spread(function, items, cluster, None)


def attempt(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the function returns, or the :class:`Failure` of an exception."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return Failure(words, traceback.format_exc(), socket.gethostname())


def failed(failures: Sequence[tuple[str, Failure]]) -> WorkersError:
    """One error for all that failed, by their names; their tracebacks are its notes."""
    shown = "; ".join(f"{name}: {failure.words} (on {failure.host})" for name, failure in failures[:3])
    more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
    error = WorkersError(f"{len(failures)} failed, the rows of all others are kept: {shown}{more}")
    for _, failure in failures[:3]:
        error.add_note(failure.trace)
    return error


# --- joblib -------------------------------------------------------------------------------------------------------


def _spread(
    function: Callable[[Any], Any], items: Sequence[Any], pool: Callable[[], Any], threads: int | None
) -> Results:
    """Spread the items, and once more those whose jobs died; who dies alone is given up."""
    left, deaths = dict(enumerate(items)), 0
    while left:
        alone = deaths == DEATHS
        now = dict(list(left.items())[:1] if alone else left)
        try:
            for number, result in _once(function, now, pool, threads):
                if isinstance(result, KeyboardInterrupt):
                    raise result
                del left[number]
                deaths = 0
                yield number, result
        except Exception as error:
            if type(error).__name__ != "TerminatedWorkerError":
                words = f"the workers failed; the same command goes on with what is left, {len(left)} of {len(items)}"
                raise WorkersError(f"{words}: {_in_words(error)}") from error
            deaths += 1
            if alone:
                deaths, (number,) = 0, now
                del left[number]
                yield number, _died(error)
            else:
                print("a job died: what it was at is taken again", file=sys.stderr)


def _died(error: BaseException) -> Failure:
    words = f"its worker died again and again, for want of memory perhaps ({_in_words(error)})"
    return Failure(words, "".join(traceback.format_exception(error)), socket.gethostname())


def _once(
    function: Callable[[Any], Any], items: dict[int, Any], pool: Callable[[], Any], threads: int | None
) -> Results:
    import joblib

    with pool():
        # Everything at once, so that workers that come later find something to do; one by one, so
        # that results come as they end.
        parallel = joblib.Parallel(batch_size=1, pre_dispatch="all", return_as="generator_unordered")
    # A tuple, since Dask's backend would leave a large function, or item, with one worker to keep.
    results = parallel(joblib.delayed(_done)(i, (function, item), threads) for i, item in items.items())
    try:
        for result in results:  # noqa: UP028  # "yield from" would close joblib's generator itself
            yield result
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that results were left: they were, on purpose
            results.close()


def _done(number: int, task: tuple[Callable[[Any], Any], Any], threads: int | None) -> tuple[int, Any]:
    """In a worker: what the function makes of the item."""
    function, item = task
    with _ONE_AT_A_TIME:
        if threads is not None:  # a process of ours
            _end_with(os.getppid())
            torch.set_num_threads(threads)
            tqdm.set_lock(threading.RLock())  # its own is a semaphore that a process killed leaves behind
        try:
            return number, attempt(function, item)
        except KeyboardInterrupt:
            return number, KeyboardInterrupt()


@functools.cache
def _end_with(parent: int) -> None:
    """End this process, too, when the one that asks is killed: nobody would take what it finds."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _joblib() -> Any:
    try:
        import joblib
    except ImportError as error:
        raise WorkersError(f"several jobs need joblib: {INSTALL}") from error
    if tuple(int(part) for part in joblib.__version__.split(".")[:2]) < (1, 5):
        raise WorkersError(f"joblib {joblib.__version__} is too old to hand over results as they come: {INSTALL}")
    return joblib


# --- Dask ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _client(address: str) -> Iterator[Any]:
    """Connected to a scheduler that has workers of one thread each."""
    try:
        from distributed import Client
    except ImportError as error:
        raise WorkersError(f"Dask is not installed here: {INSTALL}, and the same on the workers") from error
    try:
        client = Client(address, timeout=ANSWERS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise WorkersError(
            f"no Dask scheduler answers at {address} ({_in_words(error)}); {_start(address)}"
        ) from error
    with client:
        _wait(client, address)
        yield client


def _wait(client: Any, address: str | None) -> None:
    """Until there is a worker; and see that those there are have one thread each."""
    try:
        client.wait_for_workers(1, timeout=STARTS)
    except TimeoutError as error:
        raise WorkersError(f"the Dask scheduler at {address} has no worker; {_start(address)}") from error
    if several := [f"{worker} has {count}" for worker, count in client.nthreads().items() if count > 1]:
        raise WorkersError(
            "Dask's workers must have one thread each, or cases would disturb each other, and "
            f"{', '.join(several[:3])}; {_start(address)}"
        )


def _start(address: str | None) -> str:
    return f"start `dask scheduler`, and on each machine `dask worker {address} --nworkers 4 --nthreads 1`"


def _dask_backend() -> Any:
    """joblib's backend for Dask with two of its ways changed: it waits for ever for an item that
    Dask gives up, and computes in the asking process where a cluster has one worker.
    """
    from joblib._dask import DaskDistributedBackend

    class Backend(DaskDistributedBackend):
        def effective_n_jobs(self, n_jobs: int = -1) -> int:
            return max(2, sum(self.client.nthreads().values()))

        def submit(self, func: Any, callback: Any = None) -> Any:
            future = super().submit(func, callback)
            ((_, (number, *_), _),) = func.items  # of _done

            def told(ended: Any) -> None:
                if (error := ended.exception()) is not None and callback is not None:
                    callback(_GivenUp(number, error))

            future.add_done_callback(told)
            return future

        def retrieve_result_callback(self, out: Any) -> Any:
            if isinstance(out, _GivenUp):
                killed = type(out.error).__name__ == "KilledWorker"
                return [(out.number, _died(out.error) if killed else attempt(_raise, out.error))]
            return super().retrieve_result_callback(out)

    return Backend


@dataclass(frozen=True)
class _GivenUp:
    number: int
    error: BaseException


def _raise(error: BaseException) -> None:
    raise error
