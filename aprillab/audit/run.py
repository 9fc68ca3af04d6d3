"""What does this update give away? An audit by whoever owns a federated system: no labels, no
originals needed.

:func:`audit` runs every closed form on one update and says in plain words what leaked and how far
to trust each picture; :func:`aprillab.audit.report.write_audit` puts the pictures, a JSON report
and the words into a folder.
"""

from __future__ import annotations

import torch
from torch import nn
from tqdm.auto import tqdm

from ..anatomy import Anatomy, Rows, dissect
from ..attacks.catalogue import CLOSED_FORMS, Attack
from ..attacks.evidence import one_image
from ..attacks.labels import Labels, recover_labels
from ..attacks.replay import gradient_residual
from ..attacks.result import AttackNotApplicable, Condition, Reconstruction
from ..preprocessing import Preprocessing
from ..update import ClientUpdate, check_update
from .findings import Audit, Finding, Part
from .words import Trust

# Replays measured at 32×32: below 1e-5 of the gradient at 90 dB, below 1e-3 at 36 to 57 dB, 0.03 to
# 0.08 at 18 to 31 dB, above 0.15 below 16 dB. An unrelated picture misses by about the whole norm.
_GOOD_REPLAY, _BAD_REPLAY = 0.01, 0.1


def audit(
    model: nn.Module,
    update: ClientUpdate,
    *,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
) -> Audit:
    """Try every closed form on an update and say how much of what it shows is to be believed.

    Parameters
    ----------
    model : nn.Module
        With the weights the client was given, in the mode (train or eval) the client used; left as
        it is.
    update : ClientUpdate
    anatomy : Anatomy, optional
        Default is ``dissect(model)``.
    preprocessing : Preprocessing, optional
        Pixels to model input; default is the model family's own. A wrong one changes contrast and
        colour of the pictures, nothing else.

    Returns
    -------
    Audit

    Raises
    ------
    UpdateError
        If the update does not belong to the model, is not finite, or is all zero.
    UnknownModelError
        If ``dissect`` does not know the model.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> from aprillab.audit import audit
    >>> model = al.VisionTransformer(image_size=16, patch_size=4, width=64, depth=1, heads=2, classes=10)
    >>> images = al.HALF.to_input(al.load_victim("coffee", 16)[None])
    >>> audit(model, al.client_update(model, images, torch.tensor([3]))).verdict
    'This update gives the private picture away, exactly: patch-embedding system.'
    """
    anatomy = anatomy or dissect(model)
    preprocessing = preprocessing or anatomy.preprocessing
    check_update(model, update)
    one = one_image(anatomy, update)
    labels, labels_reason = _labels(model, update, anatomy, one)
    notes = _notes(model, update, anatomy)
    findings = []
    progress = tqdm(CLOSED_FORMS.values(), desc="attacks", disable=None, leave=False)
    for attack in progress:
        progress.set_postfix_str(attack.name)
        result, reason = _attempt(attack, model, update, anatomy, preprocessing)
        if result is None:
            findings.append(Finding(attack, None, reason, None, "none"))
            continue
        replay, failed = _replay(model, update, result)
        notes += failed
        findings.append(Finding(attack, result, reason, replay, _trust(result, replay, one)))
    return Audit(
        model=f"{type(model).__module__}.{type(model).__qualname__}",
        anatomy=anatomy,
        update=update,
        preprocessing=preprocessing,
        parts=_parts(model, update, anatomy),
        labels=labels,
        labels_reason=labels_reason,
        one_image=one,
        findings=tuple(findings),
        notes=tuple(dict.fromkeys(notes)),
    )


def _attempt(
    attack: Attack, model: nn.Module, update: ClientUpdate, anatomy: Anatomy, preprocessing: Preprocessing
) -> tuple[Reconstruction | None, str]:
    """What the attack returns, and its reason; None, and why, where it does not apply."""
    try:
        result = attack.function(model, update, anatomy=anatomy, preprocessing=preprocessing)
    except AttackNotApplicable as refusal:
        return None, refusal.reason
    except torch.linalg.LinAlgError as error:
        return None, f"its linear algebra broke down on these numbers ({str(error).splitlines()[0]})"
    return result, result.reason


def _replay(model: nn.Module, update: ClientUpdate, result: Reconstruction) -> tuple[float | None, list[str]]:
    """The gradient residual of a reconstruction; None, and a note, where the client cannot be
    played.
    """
    try:
        return gradient_residual(model, update, result), []
    # The model is the user's, and so is whatever its forward pass raises.
    except Exception as error:
        return None, [f"Playing the client failed ({type(error).__name__}: {error}): no replay."]


def _trust(result: Reconstruction, replay: float | None, one: Condition) -> Trust:
    """From the attack's verdict and predicted PSNR; a replay lowers them, or raises what no
    condition vouches for.
    """
    predicted = result.predicted_psnr or 0.0
    misses = replay is not None and not replay < _BAD_REPLAY  # NaN misses
    if not one.holds and (replay is None or misses):
        return "mixture"
    if result.exact or (result.conditions_hold and predicted >= 40):
        return "contradicted" if misses else "exact" if result.exact else "close"
    if misses:
        return "poor"
    if not result.conditions_hold:
        return "likely" if replay is not None and replay < _GOOD_REPLAY else "unverified"
    return "coarse" if predicted >= 20 else "poor"


def _labels(model: nn.Module, update: ClientUpdate, anatomy: Anatomy, one: Condition) -> tuple[Labels | None, str]:
    """Recovered labels, as many as the client says, or at least as many as have a negative entry."""
    bias = update.gradients.get(anatomy.head_bias or "")
    at_least = 1 if bias is None or one.holds else max(int((bias < 0).sum()), 2)
    try:
        found = recover_labels(model, update, batch_size=update.batch_size or at_least, anatomy=anatomy)
    except AttackNotApplicable as refusal:
        return None, refusal.reason
    return found, found.reason


def _parts(model: nn.Module, update: ClientUpdate, anatomy: Anatomy) -> tuple[Part, ...]:
    """The gradients that the attacks read, and which of them are there."""
    names: list[tuple[str, str | Rows | None, str]] = [
        ("position embedding", anatomy.position, "with the patch embedding's gradient, every pixel"),
        ("patch embedding", anatomy.patch_weight, "the space all patches lie in"),
        ("first attention, queries", anatomy.query, "the span of all tokens"),
        ("first attention, keys", anatomy.key, "the same"),
        ("first attention, values", anatomy.value, "the same"),
        ("head, weight", anatomy.head_weight, "whether there was one image; its label"),
        ("head, bias", anatomy.head_bias, "the labels"),
    ]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = []
    for part, where, gives in names:
        name = where.name if isinstance(where, Rows) else where
        rows = where if isinstance(where, Rows) else Rows(name or "")
        gradient = rows.of(update.gradients)
        norm = None if gradient is None else float(gradient.double().norm())
        if name is None:
            state = "no such part"
        elif norm is not None:
            state = "shared" if norm > 0 else "zero"
        else:
            state = "withheld" if name in trained else "fixed"
        parts.append(Part(part, None if where is None else str(where), state, norm, gives))
    return tuple(parts)


def _notes(model: nn.Module, update: ClientUpdate, anatomy: Anatomy) -> list[str]:
    notes = []
    if update.dtype in (torch.float16, torch.bfloat16):
        notes.append(
            f"The gradients came in {str(update.dtype).removeprefix('torch.')}, some three decimal digits: rounding "
            "alone limits what a closed form can show. A client that shares more digits shares more of its picture."
        )
    if update.source == "fedavg":
        notes.append(
            "The update is a difference of weights: after more than one local step it is a mean of gradients at "
            "different weights, which no closed form here models."
        )
    if anatomy.head_weight not in update.gradients and anatomy.head_bias not in update.gradients:
        notes.append("The head's gradient is not shared: whether there was one image or a batch was not checked.")
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
    if dropouts:
        notes.append("The model is in training mode with dropout: the replay draws other masks than the client did.")
    return notes
