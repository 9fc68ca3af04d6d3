"""Evaluations on CUDA, recorded once: a graph of some thousand kernels that are launched together.

An evaluation of gradient matching is thousands of small kernels, which the card runs sooner than
the processor can launch them. A CUDA graph launches them at once: the same kernels on the same
memory, of other pictures (data/results/real_vits.md has what it is worth).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

Leaves = tuple[Tensor, ...]
_ROUNDINGS = 1e6  # times ε: sums of another order differ by less, a recording of something else by more


@dataclass
class EvaluationGraph:
    """One restart's evaluation, recorded at its first call and replayed from then on.

    What cannot be recorded, such as a loss that asks for a number on its way, is evaluated as
    before, and so is what a replay does not give back.

    Attributes
    ----------
    evaluate : callable
        From the leaves (pictures, and logits if labels are unknown) to an evaluation.
    given_up : str
        Why nothing is recorded; empty while it is, or is yet to be.
    """

    evaluate: Callable[..., Any]
    given_up: str = ""
    _graph: torch.cuda.CUDAGraph | None = field(default=None, repr=False)
    _leaves: Leaves = field(default=(), repr=False)
    _found: Any = field(default=None, repr=False)

    @property
    def words(self) -> str:
        """Whether evaluations are replayed."""
        return f"no: {self.given_up}" if self.given_up else "no" if self._graph is None else "yes"

    def __call__(self, *leaves: Tensor) -> Any:
        """The evaluation at these leaves, all of the shapes of the first call."""
        if self._graph is None:
            found = self.evaluate(*leaves)
            if not self.given_up:
                self._record(leaves, found)
            return found
        return self._replay(leaves)

    def _replay(self, leaves: Leaves) -> Any:
        assert self._graph is not None
        for own, given in zip(self._leaves, leaves, strict=True):
            own.copy_(given.detach())
        self._graph.replay()
        return _copied(self._found)  # the next replay writes over it

    def _record(self, leaves: Leaves, found: Any) -> None:
        """Record, and keep the recording if it gives what was found."""
        self._leaves = tuple(leaf.detach().clone() for leaf in leaves)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device=leaves[0].device)
        try:
            # What libraries set up at their first call in a stream cannot be recorded.
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.evaluate(*self._leaves)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, stream=side):
                self._found = self.evaluate(*self._leaves)
            self._graph = graph
            replayed = self._replay(leaves)
        # Whatever the model or the loss does that cannot be recorded, or no memory for it.
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            self._graph, self._found, self.given_up = None, None, f"{type(error).__name__}: {text}"
            return
        if not _agree(replayed.slopes, found.slopes):
            self._graph, self._found, self.given_up = None, None, "a replay gives other slopes"


def _copied(found: Any) -> Any:
    """The same record with tensors of its own."""
    values = {one.name: getattr(found, one.name) for one in fields(found)}
    return replace(found, **{name: _copy(value) for name, value in values.items()})


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_copy, value)) if isinstance(value, tuple) else value


def _agree(mine: Leaves, others: Leaves) -> bool:
    """Whether slopes are the same but for rounding; what is not finite agrees with nothing."""
    eps = torch.finfo(mine[0].dtype).eps
    return all(float((a - b).norm()) <= _ROUNDINGS * eps * float(b.norm()) for a, b in zip(mine, others, strict=True))
