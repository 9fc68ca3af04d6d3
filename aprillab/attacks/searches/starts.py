"""Where a search begins: from noise, from grey, from pictures, or where an earlier search ended."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..result import Reconstruction
from .problem import Problem

Start = str | Tensor | Reconstruction

#: Unknowns (R, …) of R restarts, and their label logits (R, B, classes) where labels are unknown.
Variables = tuple[Tensor, Tensor | None]

#: Added to every seed: a victim drawn from the caller's seed must not resemble the first guess.
_STREAM = 20_220_307

_NOISE = 0.25  # its standard deviation, in pixels: most of [0, 1] around mid-grey
_GREY = 0.001  # of that noise, added to grey: patches that are equal would stay equal
_AROUND = 0.01  # of that noise, between the restarts of a warm start


def is_search(result: Reconstruction) -> bool:
    """Whether a result is one that :func:`~aprillab.match_gradients` can go on from."""
    return "best_restart" in result.diagnostics


def checked_start(start: Start, shape: tuple[int, ...]) -> str | Tensor:
    """How restarts begin: "noise", "grey", or pictures of the right shape.

    Raises
    ------
    ValueError
        If it is another word, or pictures of another shape.
    """
    if isinstance(start, Reconstruction):
        start = start.images
    if isinstance(start, Tensor):
        if start.shape != shape:
            raise ValueError(f"start has pictures of shape {tuple(start.shape)}, the update those of {shape}")
    elif start not in ("noise", "grey"):
        raise ValueError(f"start={start!r} is neither pictures, nor a result, nor one of 'noise', 'grey'")
    return start


def first_guess(problem: Problem, start: str | Tensor, first: int, count: int) -> Variables:
    """Unknowns and logits of restarts ``first`` to ``first + count − 1``, drawn from the seed."""
    drawn = [_draw(problem, start, number) for number in range(first, first + count)]
    logits = [row for _, row in drawn if row is not None]
    return torch.stack([unknowns for unknowns, _ in drawn]), torch.stack(logits) if logits else None


def _draw(problem: Problem, start: str | Tensor, number: int) -> Variables:
    """Unknowns and logits of one restart."""
    generator = torch.Generator().manual_seed(_STREAM + problem.seed + number)
    to_input, zeros = problem.preprocessing.to_input, torch.zeros(problem.shape, dtype=torch.float64)
    centre = start.cpu().double() if isinstance(start, Tensor) else to_input(zeros + 0.5)  # mid-grey
    # Noise in pixels, as a difference in model-input space
    noise = torch.randn(problem.shape, generator=generator, dtype=torch.float64) * _NOISE
    noise = to_input(noise) - to_input(zeros)
    if isinstance(start, Tensor):
        noise *= _AROUND if number else 0
    elif start == "grey":
        noise *= _GREY
    like = problem.targets[0]
    unknowns = problem.noisy(centre[None].to(like), noise[None].to(like))[0]
    if problem.classes is None:
        return unknowns, None
    logits = torch.randn(problem.shape[0], problem.classes, generator=generator, dtype=torch.float64)
    return unknowns, logits.to(like)


def last_guess(problem: Problem, earlier: Reconstruction) -> Variables:
    """Where an earlier search ended; of its logits, 10 for its labels and 0 for the others."""
    like, logits = problem.targets[0], None
    if problem.classes is not None and earlier.labels is not None:
        logits = 10 * nn.functional.one_hot(earlier.labels, problem.classes)[None].to(like)
    return problem.unknowns_of(earlier.images[None].to(like)), logits
