"""What an attack returns, and what it raises when it cannot work."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..metrics import EXACT_TO_8_BITS_DB
from ..preprocessing import Preprocessing


class AttackNotApplicable(ValueError):
    """The attack's conditions do not hold.

    Attributes
    ----------
    attack : str
        The function that refused.
    reason : str
        Which condition failed, with its numbers.
    numbers : dict
        The numbers alone.

    Examples
    --------
    >>> refusal = AttackNotApplicable("mine", "197 tokens, but d = 192", tokens=197, width=192)
    >>> str(refusal), refusal.count_fails
    ('mine does not apply: 197 tokens, but d = 192', True)
    """

    def __init__(self, attack: str, reason: str, **numbers: float | str) -> None:
        super().__init__(f"{attack} does not apply: {reason}")
        self.attack, self.reason, self.numbers = attack, reason, numbers

    @property
    def count_fails(self) -> bool:
        """Whether a system is there and too small, so that ``strict=False`` returns what it leaves."""
        return "width" in self.numbers


State = Literal["shown", "contradicted", "not checked"]


def shown_if(holds: bool) -> State:
    """``"shown"`` or ``"contradicted"``, of something that was checked."""
    return "shown" if holds else "contradicted"


@dataclass(frozen=True)
class Condition:
    """One thing that a result rests on, and what this very update says of it.

    Attributes
    ----------
    name : str
        What must hold, such as ``"rank(G) = n"``.
    state : {"shown", "contradicted", "not checked"}
        Not checked is not shown: nothing was there to check it by, or too coarse a precision.
    numbers : dict
        What was measured, by name.
    words : str
        A format string that puts the numbers into a clause.
    measured : bool
        False where the words say why nothing was there to measure, instead of what came out.

    Examples
    --------
    >>> rank = Condition("rank(G) = n", "contradicted", {"rank": 15, "n": 16}, "rank {rank} of {n}")
    >>> rank.text, rank.holds
    ('rank 15 of 16', False)
    >>> nothing = Condition("one image", "not checked", {}, "the head is not shared", measured=False)
    >>> nothing.text, nothing.clause
    ('not checked: the head is not shared', 'the head is not shared')
    """

    name: str
    state: State
    numbers: Mapping[str, float | str]
    words: str
    measured: bool = True

    @property
    def holds(self) -> bool:
        """Whether it was shown."""
        return self.state == "shown"

    @property
    def clause(self) -> str:
        """The numbers in words, for where the state is said beside them."""
        return self.words.format(**self.numbers)

    @property
    def text(self) -> str:
        """The numbers in words, which say by themselves where nothing was measured."""
        return self.clause if self.measured else f"not checked: {self.clause}"


#: Names of the conditions that do not bear on whether the system fixes the picture: the replay, and
#: how near the predicted error is to the verdict.
REPLAY, MARGIN = "replay", "margin"


@dataclass(frozen=True)
class Replay:
    """The client played with a reconstruction: does its gradient give the update?

    Attributes
    ----------
    state : {"shown", "contradicted", "not checked"}
        Shown: the update is a multiple of the picture's gradient, up to ``limit``.
    words : str
        How it was played and what came out, or why it was not played.
    residual : float or None
        ‖s g' − g‖ / ‖g‖, the larger of that of the whole update and those of the tensors that the
        attack read; None where it was not played.
    limit : float or None
        What the update's own noise and the picture's predicted error explain.
    factor : float or None
        s, the factor that all tensors have in common: 1 for a gradient of the mean loss.
    seconds : float
        Wall-clock time, besides the solve's.
    failed : bool
        Whether it was not played because the model raised; the words have the error.
    """

    state: State
    words: str
    residual: float | None = None
    limit: float | None = None
    factor: float | None = None
    seconds: float = 0.0
    failed: bool = False

    @property
    def condition(self) -> Condition:
        """The same as a condition."""
        numbers = {
            name: value for name in ("residual", "limit", "factor") if (value := getattr(self, name)) is not None
        }
        return Condition(REPLAY, self.state, numbers, self.words.replace("{", "{{").replace("}", "}}"))


@dataclass(frozen=True)
class Reconstruction:
    """The pictures an attack brought back, and how far to trust them with no original seen.

    Attributes
    ----------
    attack : str
        Name of the function that made it.
    images : Tensor of shape (B, C, H, W)
        In model-input space, float64.
    pixels : Tensor of shape (B, C, H, W)
        In [0, 1], clamped.
    labels : Tensor of shape (B,) or None
        Recovered or handed over; ``diagnostics["labels"]`` says which.
    exact : bool
        True only when the attack's conditions are shown by this very update, the error predicted
        from its residuals stays below half a grey level of an 8-bit picture, *and* the picture's
        gradient, replayed, is the update.
    reason : str
        Why it is exact, or which condition failed, with the numbers.
    diagnostics : dict
        Ranks, condition numbers, residuals, precision.
    seconds : float
        Wall-clock time of the attack, without the replay.
    history : list of dict
        One entry for each recorded step; empty for the closed forms.
    conditions : tuple of Condition
        What the attack checked on this update; empty for gradient matching, which can verify
        nothing.
    predicted_psnr : float or None
        In dB, seen without the original; None where the attack cannot predict it. Where a condition
        fails it means little.
    replay : Replay or None
        The client played with the picture; None for attacks that do that in a way of their own.
    """

    attack: str
    images: Tensor
    pixels: Tensor
    labels: Tensor | None
    exact: bool
    reason: str
    diagnostics: Mapping[str, Any]
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)
    conditions: tuple[Condition, ...] = ()
    predicted_psnr: float | None = None
    replay: Replay | None = None

    @property
    def determined(self) -> bool:
        """Whether the attack's system fixes the picture: all its conditions are shown, the replay
        apart.

        Precision may still limit what is seen of it, and with a factor for each tensor, such as
        learning rates of layers, its brightness is not known without a replay.
        """
        checked = [condition for condition in self.conditions if condition.name not in (REPLAY, MARGIN)]
        return bool(checked) and all(condition.holds for condition in checked)

    @property
    def conditions_hold(self) -> bool:
        """The same as :attr:`determined`."""
        return self.determined


def report(
    attack: str,
    images: Tensor,
    *,
    conditions: Sequence[Condition],
    predicted_psnr: float,
    labels: tuple[Tensor | None, str],
    numbers: Mapping[str, Any],
    dtype: torch.dtype,
    preprocessing: Preprocessing,
    start: float,
) -> Reconstruction:
    """A closed form's result before its replay: not exact yet, whatever its conditions.

    Parameters
    ----------
    attack : str
    images : Tensor of shape (B, C, H, W), in model-input space
    conditions : Condition
    predicted_psnr : float, in dB
    labels : the labels, and a word on where they come from
    numbers : for ``diagnostics``
    dtype : the update's precision
    preprocessing : Preprocessing
    start : float
        ``time.perf_counter()`` when the attack began.

    Examples
    --------
    >>> from aprillab.preprocessing import UNIT
    >>> found = report(
    ...     "mine", torch.full((1, 1, 2, 2), 0.5), conditions=[], predicted_psnr=40.0, labels=(None, "not asked"),
    ...     numbers={"rank": 4}, dtype=torch.float32, preprocessing=UNIT, start=time.perf_counter(),
    ... )
    >>> found.exact, found.diagnostics["rank"], found.diagnostics["precision"]
    (False, 4, 'float32')
    """
    found, found_how = labels
    return Reconstruction(
        attack=attack,
        images=images,
        pixels=preprocessing.to_pixels(images),
        labels=found,
        exact=False,
        reason=verdict(conditions, predicted_psnr)[1],
        diagnostics={**numbers, "precision": str(dtype).removeprefix("torch."), "labels": found_how},
        seconds=time.perf_counter() - start,
        conditions=tuple(conditions),
        predicted_psnr=predicted_psnr,
    )


def margin(predicted_psnr: float, decibels: float) -> Condition:
    """That the predicted error is not so near the verdict that an optimistic
    prediction would decide.

    Parameters
    ----------
    predicted_psnr : float, in dB
    decibels : float
        By how much such predictions were found too optimistic.
    """
    return Condition(
        MARGIN, shown_if(not 0 <= predicted_psnr - EXACT_TO_8_BITS_DB < decibels),
        {"predicted": predicted_psnr, "margin": decibels},
        "predicted {predicted:.1f} dB, which can be too optimistic by up to {margin:.0f} dB",
    )  # fmt: skip


_NOT = {"contradicted": "fails", "not checked": "was not checked"}


def conditions_words(conditions: Sequence[Condition]) -> str:
    """Which of them are not shown; if all are, what each says.

    >>> conditions_words([Condition("rank(G) = n", "contradicted", {"rank": 15, "n": 16}, "rank {rank} of {n}")])
    'rank(G) = n fails (rank 15 of 16)'
    """
    failed = [f"{c.name} {_NOT[c.state]} ({c.text})" for c in conditions if not c.holds]
    return "; ".join(failed or [f"{c.name}: {c.text}" for c in conditions])


def verdict(conditions: Sequence[Condition], predicted_psnr: float) -> tuple[bool, str]:
    """``exact`` and ``reason`` from conditions and the predicted PSNR in dB.

    >>> rank = Condition("rank(G) = n", "shown", {"n": 16}, "rank {n}")
    >>> verdict([rank], 80.0)
    (True, 'rank(G) = n: rank 16; predicted PSNR 80.0 dB')
    >>> verdict([rank], 40.0)[0]
    False
    """
    words, trust = conditions_words(conditions), f"predicted PSNR {predicted_psnr:.1f} dB"
    if not all(condition.holds for condition in conditions):
        return False, f"{words}; {trust}"
    if not predicted_psnr >= EXACT_TO_8_BITS_DB:  # nor where it is not a number
        return False, (
            f"all conditions hold, but the gradient's precision limits the picture: {trust}, "
            f"below the {EXACT_TO_8_BITS_DB:.1f} dB of an 8-bit rounding"
        )
    return True, f"{words}; {trust}" if words else trust


def decibels(mean_square: float) -> float:
    """Peak signal-to-noise ratio in dB for a mean squared error of pixels in [0, 1].

    >>> decibels(0.01)
    20.0
    """
    return math.inf if mean_square <= 0 else -10 * math.log10(mean_square)


def predicted_psnr(mean_square: float, preprocessing: Preprocessing) -> float:
    """PSNR in dB of pixels in [0, 1] whose mean squared error in model-input space is
    ``mean_square``.

    >>> predicted_psnr(0.04, Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3))
    20.0
    """
    return decibels(mean_square * sum(std**2 for std in preprocessing.std) / len(preprocessing.std))
