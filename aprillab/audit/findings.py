"""What an audit found: the gradients that are there, what each attack makes of them, and the
verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..anatomy import Anatomy
from ..attacks.catalogue import Attack
from ..attacks.labels import Labels
from ..attacks.result import Condition, Reconstruction
from ..preprocessing import Preprocessing
from ..sharing import LeakMap
from ..update import ClientUpdate
from .words import HEADLINES, NOT_SAFE, NOTHING_APPLIES, VERDICTS, Leak, Trust

_WORTH_A_WORD = 1e-5  # of noise


@dataclass(frozen=True)
class Part:
    """One of the gradients an attack reads.

    Attributes
    ----------
    part : str
        In words.
    parameter : str or None
        Its name in the model; None where the model has no such part.
    state : {"shared", "zero", "withheld", "fixed", "no such part"}
        ``"fixed"``: not trained, hence no gradient.
    norm : float or None
        Of the gradient, where it is shared.
    gives : str
        What an attacker takes from it.
    """

    part: str
    parameter: str | None
    state: str
    norm: float | None
    gives: str


@dataclass(frozen=True)
class Finding:
    """What one attack makes of the update.

    Attributes
    ----------
    attack : Attack
        A row of :data:`aprillab.attacks.CLOSED_FORMS`.
    result : Reconstruction or None
        None where the attack does not apply.
    reason : str
        Why it is exact, why not, or why it does not apply.
    replay : float or None
        ``gradient_residual`` of the reconstruction; None where it could not be computed.
    trust : Trust
    """

    attack: Attack
    result: Reconstruction | None
    reason: str
    replay: float | None
    trust: Trust


def noise_of(update: ClientUpdate, findings: Sequence[Finding]) -> float:
    """By how much of what is summed those sums miss that must vanish; 0 where no attack measured
    it, or where it is no more than the file's precision leaves.
    """
    noise = next((f.result.diagnostics["noise"] for f in findings if f.result is not None), 0.0)
    return noise if noise > max(_WORTH_A_WORD, torch.finfo(update.dtype).eps) else 0.0


@dataclass(frozen=True)
class Audit:
    """Everything an audit found.

    Attributes
    ----------
    model : str
        Class of the model.
    anatomy : Anatomy
    update : ClientUpdate
    preprocessing : Preprocessing
    parts : tuple of Part
    labels : Labels or None
    labels_reason : str
    one_image : Condition
        Whether one image is behind the update: as the attack with the best trust has it, else as
        the head's gradient or the client says.
    pixels : Condition or None
        Whether the best picture fits the normalization that was assumed; None without a picture.
    sharing : LeakMap or None
        What the model would give away if other tensors were shared, by counting; what could be left
        out of this very update is asked of it too (``kind`` "asked").
    findings : tuple of Finding
    notes : tuple of str
        What limits the audit itself: half precision, several local steps, dropout.
    rounds : int
        Of this client, as far as the server is known to have them: those read together, or all of a
        recording's.
    recording : bool
        Whether it is of what a federation's server recorded.
    """

    model: str
    anatomy: Anatomy
    update: ClientUpdate
    preprocessing: Preprocessing
    parts: tuple[Part, ...]
    labels: Labels | None
    labels_reason: str
    one_image: Condition
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = field(default=())
    pixels: Condition | None = None
    sharing: LeakMap | None = None
    rounds: int = 1
    recording: bool = False

    @property
    def applied(self) -> tuple[Finding, ...]:
        """The findings of attacks that returned a picture."""
        return tuple(found for found in self.findings if found.result is not None)

    @staticmethod
    def best_of(findings: Sequence[Finding]) -> Finding | None:
        """The first of the findings with the best trust; None where no attack applies."""
        for trust in VERDICTS:
            for found in findings:
                if found.trust == trust:
                    return found
        return None

    @property
    def best(self) -> Finding | None:
        """That of this audit."""
        return self.best_of(self.findings)

    @property
    def noise(self) -> float:
        """That of the update, as :func:`noise_of` has it."""
        return noise_of(self.update, self.findings)

    @property
    def batch_evidence(self) -> str:
        """What says how many images are behind the update, in words."""
        return self.one_image.text

    @property
    def headline(self) -> str:
        """The verdict's first sentence."""
        best = self.best
        return NOTHING_APPLIES if best is None else HEADLINES[best.trust].format(attack=best.attack.title)

    @property
    def verdict(self) -> str:
        """The audit in one paragraph of plain words: those of the first attack with the best trust."""
        if (best := self.best) is not None:
            return VERDICTS[best.trust].format(attack=best.attack.title)
        reasons = {found.reason for found in self.findings}
        # One reason for all of them says more than that none applies.
        if len(reasons) != 1:
            return f"{NOTHING_APPLIES} {NOT_SAFE}"
        reason = reasons.pop()
        return f"{NOTHING_APPLIES} {NOT_SAFE} {reason[:1].upper()}{reason[1:]}."

    @property
    def leak(self) -> Leak:
        """The same for machines."""
        best = self.best
        if best is None:
            return "none"
        return best.trust if best.trust in ("exact", "close", "likely", "coarse") else "unclear"
