"""The command line as tests call it."""

from __future__ import annotations

import signal
from collections.abc import Callable

#: ``run(*arguments)`` to exit code, stdout, stderr.
Run = Callable[..., tuple[int, str, str]]

#: A model that is attacked in a tenth of a second.
SMALL = ["--model", "prenorm", "--image-size", "32"]


def mind_interruption() -> None:
    """A ``preexec_fn``: where the tests run in a shell's background, their children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_one_error(err: str, *fragments: str) -> None:
    """stderr ends in one message in the command's form that holds every fragment."""
    last = err.splitlines()[-1]
    assert last.startswith("aprillab: error: "), err
    assert err.count("aprillab: error:") == 1
    for fragment in fragments:
        assert fragment in last, last
