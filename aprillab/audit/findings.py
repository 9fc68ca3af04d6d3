"""What an audit found: the gradients that are there, what each attack makes of them, and the
verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..anatomy import Anatomy
from ..attacks.catalogue import Attack
from ..attacks.labels import Labels
from ..attacks.result import Condition, Reconstruction
from ..preprocessing import Preprocessing
from ..update import ClientUpdate
from .words import NOTHING_APPLIES, UNRELIABLE, VERDICTS, Trust


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
        Fails where the client says, or the head's gradient suggests, that several images are behind
        the update.
    findings : tuple of Finding
    notes : tuple of str
        What limits the audit itself: half precision, several local steps, dropout.
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

    @property
    def applied(self) -> tuple[Finding, ...]:
        """The findings of attacks that returned a picture."""
        return tuple(found for found in self.findings if found.result is not None)

    @property
    def verdict(self) -> str:
        """The audit in one paragraph of plain words: those of the first attack with the best trust."""
        for trust, words in VERDICTS.items():
            for found in self.findings:
                if found.trust == trust:
                    return words.format(attack=found.attack.title)
        return UNRELIABLE if self.applied else NOTHING_APPLIES
