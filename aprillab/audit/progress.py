"""What an audit is doing, while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

Step = Callable[[str], None]
#: True: a bar; False: nothing; None: a bar on a terminal alone; a function: it is given each step.
Progress = bool | Step | None


@contextmanager
def steps(progress: Progress, total: int) -> Iterator[Step]:
    """A function to be called as each of ``total`` steps begins, with what it is, in words.

    >>> said = []
    >>> with steps(said.append, 2) as step:
    ...     step("first")
    ...     step("then")
    >>> said
    ['first', 'then']
    """
    if callable(progress):
        yield progress
        return
    disable = None if progress is None else not progress
    with tqdm(total=total, desc="audit", disable=disable, leave=False, unit=" step") as bar:
        begun = False

        def step(words: str) -> None:
            nonlocal begun
            if begun:
                bar.update()
            begun = True
            bar.set_postfix_str(words)

        yield step
