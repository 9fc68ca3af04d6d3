"""EvaluationGraph evaluations, with a stand-in for the card; tests/attacks/test_gpu.py has the card
itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import private_batch, tiny_vit
from torch import Tensor

import aprillab as al
from aprillab.attacks.searches import recorded
from aprillab.attacks.searches.pose import recordable
from aprillab.attacks.searches.recorded import EvaluationGraph


@dataclass(frozen=True)
class Found:
    distance: Tensor
    rows: Tensor | None
    slopes: tuple[Tensor, ...]


def evaluate(images: Tensor) -> Found:
    pixels = images.detach()
    return Found(pixels.square().sum(), None, (2 * pixels,))


class Card:
    """Streams that do nothing, and graphs that, replayed, evaluate anew into the tensors
    of their recording.
    """

    def __init__(self, evaluate: Callable[[Tensor], Found], *, wrong: float = 0.0) -> None:
        self.evaluate, self.wrong, self.replays = evaluate, wrong, 0
        self.recording: EvaluationGraph | None = None

    def graph(self) -> Any:
        card = self

        class Graph:
            def replay(self) -> None:
                assert card.recording is not None
                leaves, kept = card.recording._leaves, card.recording._found
                again = card.evaluate(*leaves)
                kept.distance.copy_(again.distance)
                kept.slopes[0].copy_(again.slopes[0] + card.wrong)
                card.replays += 1

        return Graph()


@contextlib.contextmanager
def nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None: ...


def recording_on(card: Card, monkeypatch: pytest.MonkeyPatch, evaluate: Callable[..., Found]) -> EvaluationGraph:
    cuda = recorded.torch.cuda
    for name, stand_in in {
        "CUDAGraph": card.graph, "Stream": Stream, "current_stream": Stream, "stream": nothing, "graph": nothing,
    }.items():  # fmt: skip
        monkeypatch.setattr(cuda, name, stand_in)
    card.recording = EvaluationGraph(evaluate)
    return card.recording


def test_what_is_replayed_is_of_the_leaves_that_are_given_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(evaluate)
    recording = recording_on(card, monkeypatch, evaluate)
    pictures = [torch.full((2, 2), float(k), requires_grad=True) for k in (1, 2, 3)]
    found = [recording(picture) for picture in pictures]
    assert recording.words == "yes"
    assert card.replays == 3  # to compare with the first, and for the second and third
    for k, one in enumerate(found, 1):  # a later replay has not written over an earlier one
        assert one.distance == 4 * k**2
        assert (one.slopes[0] == 2 * k).all()
        assert one.rows is None
    assert not any(leaf.requires_grad for leaf in recording._leaves)


def test_a_replay_that_gives_something_else_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(evaluate, wrong=1.0)
    recording = recording_on(card, monkeypatch, evaluate)
    for k in (1, 2):
        assert (recording(torch.full((2, 2), float(k))).slopes[0] == 2 * k).all()
    assert recording.words == "no: a replay gives other slopes"
    assert card.replays == 1


def test_what_cannot_be_recorded_is_evaluated_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def asking(images: Tensor) -> Found:
        calls.append(images)
        if len(calls) > 1 and images is not pictures:  # while it is recorded
            raise RuntimeError("operation not permitted when stream is capturing\nmore words")
        return evaluate(images)

    recording = recording_on(Card(evaluate), monkeypatch, asking)
    pictures = torch.ones(2, 2)
    for _ in range(3):
        assert recording(pictures).distance == 4
    assert recording.words == "no: RuntimeError: operation not permitted when stream is capturing"
    assert len(calls) == 4  # three that were asked for, and the one that failed


def test_on_the_processor_nothing_is_recorded() -> None:
    model = tiny_vit()
    images, labels = private_batch(model)
    found = al.match_gradients(model, al.client_update(model, images, labels), max_evaluations=5, progress=False)
    assert found.diagnostics["recorded"] == "no"


def test_evaluations_may_be_recorded_on_cuda_where_nothing_draws_at_random() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert recordable(_Problem(cuda, draws=False))  # type: ignore[arg-type]
    assert not recordable(_Problem(cuda, draws=True))  # type: ignore[arg-type]
    assert not recordable(_Problem(cpu, draws=False))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Problem:
    device: torch.device
    draws: bool
