"""What does this update give away? An audit by whoever owns a federated system: no labels, no
originals needed.

:func:`audit` runs every closed form on one update and says in plain words what leaked and how far
to trust each picture; :func:`aprillab.audit.report.write_audit` puts the pictures, a JSON report
and the words into a folder.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Rows, dissect
from ..attacks.catalogue import CLOSED_FORMS, Attack
from ..attacks.evidence import clear_signs, head_unnamed, one_image
from ..attacks.labels import Labels, check_told, recover_labels
from ..attacks.pixels import normalization
from ..attacks.reading import fit_update, measured_noise
from ..attacks.replay import Loss
from ..attacks.result import MARGIN, REPLAY, AttackNotApplicable, Condition, Reconstruction
from ..attacks.rounds import SENT_WEIGHTS
from ..attacks.verify import EMBEDDING
from ..preprocessing import Preprocessing
from ..sharing import leak_map
from ..update import ClientUpdate, Round, Updates, listed
from .choices import choices_of
from .findings import Audit, Finding, Part, noise_of
from .progress import Progress, steps
from .sent_model import of_sent_model
from .words import HEAD_UNNAMED, HEAD_UNSHARED, Trust

# What a replay misses, of the gradient. Of the pictures in data/results/fuzz.csv that are one image's,
# those below the first have 38 dB and more but for one in twenty, those below the second 22 dB and
# more; half of those above it have less than 18. An unrelated picture misses by about the whole norm.
_GOOD_REPLAY, _BAD_REPLAY = 0.01, 0.1
_FORESEEN = ("rank(G) = n", MARGIN, REPLAY)  # conditions whose failure the predicted error allows for
_LEVELS_SEEN = 70.0  # dB, from where whole levels of 8 bits can be told
_CLOSE, _COARSE = 40.0, 20.0  # dB, predicted: too good for the eye; recognizable
_GREY = 10.8  # dB, of plain grey for pixels that are anywhere in [0, 1]: 10 log₁₀ 12


def audit(
    model: nn.Module,
    update: Updates,
    *,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    strict: bool = False,
    loss: Loss | None = None,
    verify: bool = True,
    labels: Tensor | None = None,
    progress: Progress = None,
) -> Audit:
    """Try every closed form on an update and say how much of what it shows is to be believed.

    Parameters
    ----------
    model : nn.Module
        With the weights the client was given, in the mode (train or eval) the client used; left as
        it is.
    update : ClientUpdate, Round, or a sequence of these
        Of one client. Several rounds are read together; what the report says of tensors and
        labels is of the first.
    anatomy : Anatomy, optional
        Default is ``dissect(model)``.
    preprocessing : Preprocessing, optional
        Pixels to model input; default is the model family's own. A wrong one changes contrast and
        colour of the pictures, nothing else, and ``Audit.pixels`` may notice it.
    strict : bool
        Refuse where an attack's count fails; by default its best picture is shown, with what is
        missing.
    loss : callable, optional
        (logits, targets) to a scalar, the client's; see :func:`aprillab.invert`.
    verify : bool
        Play the client with each picture, at the cost of a gradient each. Without it no picture is
        exact.
    labels : int64 Tensor of shape (1,), optional
        Where they are known and the head's gradient is not shared.
    progress : bool, callable or None
        True shows a bar with the step at hand, False shows nothing, None the bar on a terminal
        alone. A function is given each step in words, as it begins.

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
    >>> found = audit(model, al.client_update(model, images, torch.tensor([3])))
    >>> found.verdict
    'This update gives the private picture away, exactly: patch-embedding system.'
    >>> found.findings[0].result.predicted_psnr > 90
    True
    """
    check_told(anatomy, preprocessing, loss)
    with steps(progress, 2 + len(CLOSED_FORMS)) as step:
        step("reading the update")
        anatomy = anatomy or dissect(model)
        preprocessing = preprocessing or anatomy.preprocessing
        rounds = listed(update)
        first = rounds[0].update if isinstance(rounds[0], Round) else rounds[0]
        read = fit_update(model, first, anatomy)
        options = {"preprocessing": preprocessing, "strict": strict, "loss": loss, "verify": verify, "labels": labels}
        findings = []
        for attack in CLOSED_FORMS.values():
            step(attack.title + (", and a replay of the client with its picture" if verify else ""))
            result, reason = _attempt(attack, model, update if len(rounds) > 1 else read, anatomy, options)
            trust = "none" if result is None else _trust(result, preprocessing)
            findings.append(Finding(attack, result, reason, _replayed(result), trust))
        step("labels, and what other tensors would give away")
        return _concluded(model, read, anatomy, preprocessing, findings, len(rounds))


def _concluded(
    model: nn.Module, update: ClientUpdate, anatomy: Anatomy, preprocessing: Preprocessing,
    findings: Sequence[Finding], rounds: int,
) -> Audit:  # fmt: skip
    """The audit, once every attack was tried."""
    best = Audit.best_of(findings)
    one = one_image(anatomy, update)
    if best is not None and best.result is not None:
        one = next(condition for condition in best.result.conditions if condition.name == one.name)
    found, labels_reason = _labels(model, update, anatomy, one)
    return Audit(
        model=f"{type(model).__module__}.{type(model).__qualname__}",
        anatomy=anatomy,
        update=update,
        preprocessing=preprocessing,
        parts=_parts(model, update, anatomy),
        labels=found,
        labels_reason=labels_reason,
        one_image=one,
        findings=tuple(findings),
        notes=tuple(dict.fromkeys([*_of_rounds(rounds, findings), *_notes(model, update, anatomy, findings)])),
        pixels=_pixels(best, preprocessing),
        sharing=leak_map(model, anatomy=anatomy, shared=choices_of(model, anatomy, update)),
        rounds=rounds,
    )


def _pixels(best: Finding | None, preprocessing: Preprocessing) -> Condition | None:
    """How the best picture fits the normalization that was assumed."""
    if best is None or best.result is None:
        return None
    return normalization(best.result.images, preprocessing, best.result.predicted_psnr or 0.0)


def _attempt(
    attack: Attack, model: nn.Module, update: Updates, anatomy: Anatomy, options: Mapping[str, Any]
) -> tuple[Reconstruction | None, str]:
    """What the attack returns, and its reason; None, and why, where it does not apply."""
    try:
        result = attack.function(model, update, anatomy=anatomy, **options)
    except AttackNotApplicable as refusal:
        return None, refusal.reason
    except torch.linalg.LinAlgError as error:
        return None, f"its linear algebra broke down on these numbers ({str(error).splitlines()[0]})"
    return result, result.reason


def _replayed(result: Reconstruction | None) -> float | None:
    """What the replay missed; None where none was played."""
    return None if result is None or result.replay is None else result.replay.residual


def _trust(result: Reconstruction, preprocessing: Preprocessing) -> Trust:
    """From the attack's conditions and predicted PSNR; a replay lowers them, or raises what no
    condition vouches for.
    """
    played = result.replay is not None and result.replay.state != "not checked"
    predicted, miss = result.predicted_psnr or 0.0, _replayed(result) if played else None
    misses, fits = miss is not None and not miss < _BAD_REPLAY, miss is not None and miss < _GOOD_REPLAY
    states = {condition.name: condition.state for condition in result.conditions}
    one = states.pop("one image")
    # A rank that is missing is in the predicted error; what else is contradicted is not.
    unforeseen = [name for name, state in states.items() if state == "contradicted" and name not in _FORESEEN]
    if result.exact:
        return "exact"
    if one == "contradicted" and not fits:
        # A second image that leaves little is in the predicted error, as noise is.
        return "mixture" if misses or predicted < _COARSE else "unverified"
    if result.determined and misses:
        # The patch-embedding system needs no weights: what it fixes is right with others than
        # the client's, too.
        by_system = result.attack == EMBEDDING and result.diagnostics["predicted_by_system"] >= _CLOSE
        return "contradicted" if by_system else "poor"
    if result.determined:
        if predicted < _CLOSE:
            return "coarse" if predicted >= _COARSE else _poor(predicted)
        if miss is not None:
            return "close" if fits else "coarse"
        # Without a replay only whole levels of grey tell that the brightness is right.
        levels = normalization(result.images, preprocessing, predicted).state == "shown"
        return "close" if levels or predicted < _LEVELS_SEEN else "likely"
    if fits and predicted >= _COARSE:
        return "likely"
    if misses or predicted < _COARSE:
        return _poor(predicted)
    # Nor does the prediction know how far the weights moved between a client's steps.
    moved = states.get(SENT_WEIGHTS, "shown") != "shown"
    return "coarse" if one == "shown" and not unforeseen and not moved else "unverified"


def _poor(predicted: float) -> Trust:
    return "poor" if predicted > _GREY else "noise"


def _labels(model: nn.Module, update: ClientUpdate, anatomy: Anatomy, one: Condition) -> tuple[Labels | None, str]:
    """Recovered labels, as many as the client says, or at least as many as have a negative entry."""
    bias = update.gradients.get(anatomy.head_bias or "")
    at_least = 1
    if bias is not None and one.state == "contradicted":
        at_least = max(clear_signs(bias, measured_noise(anatomy, update.gradients) or 0.0)[0], 2)
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
    return (*parts, *_adapter_parts(update, anatomy, trained))


def _adapter_parts(update: ClientUpdate, anatomy: Anatomy, trained: Collection[str]) -> list[Part]:
    """LoRA's factors that read the first attention's input; zero as long as their B is."""
    found = []
    for name in anatomy.adapters:
        gradient = update.gradients.get(name)
        norm = None if gradient is None else float(gradient.double().norm())
        state = ("shared" if norm else "zero") if norm is not None else "withheld" if name in trained else "fixed"
        found.append(Part("first attention, adapter", name, state, norm, "rows in the tokens' span, round by round"))
    return found


def _of_rounds(count: int, findings: Sequence[Finding]) -> list[str]:
    """A note on several rounds: that they were read together, and which were left out."""
    if count == 1:
        return []
    notes = [f"{count} rounds of one client were read together; tensors and labels are those of the first."]
    for finding in findings:
        used = () if finding.result is None else finding.result.diagnostics.get("rounds", ())
        if out := [str(entry["number"]) for entry in used if not entry["used"]]:
            notes.append(f"The {finding.attack.title} left out round {', '.join(out)}, of another picture.")
    return notes


def _notes(model: nn.Module, update: ClientUpdate, anatomy: Anatomy, findings: Sequence[Finding]) -> list[str]:
    """What limits the audit, and what was noticed on the way."""
    notes = [f"{anatomy.remark[0].upper()}{anatomy.remark[1:]}."] if anatomy.remark else []
    if update.dtype in (torch.float16, torch.bfloat16):
        notes.append(
            f"The gradients came in {str(update.dtype).removeprefix('torch.')}, some three decimal digits: rounding "
            "alone limits what a closed form can show. A client that shares more digits shares more of its picture."
        )
    if noise := noise_of(update, findings):
        notes.append(
            f"The update carries noise: sums that must vanish miss by {noise:.0e} of what is summed, as if it had "
            f"{max(-math.log2(noise), 0):.0f} bits. That, and not the file's precision, limits the pictures."
        )
    if any(f.result is not None and f.result.diagnostics.get("decay") for f in findings):
        notes.append("A multiple of the weights was in the update, as weight decay leaves; it was taken off.")
    if any(f.trust == "exact" for f in findings) and (update.batch_size or 1) > 1:
        notes.append(
            f"The client says batch_size={update.batch_size}; the equations show one image, or the same each time."
        )
    if update.source == "fedavg":
        notes.append(
            "The update is a difference of weights. After several local steps it is a sum of gradients at different "
            "weights, which the patch-embedding system reads as well as one, if they are of one image."
        )
    if update.rounding is not None:
        notes.append(
            f"Rounding of the weights leaves about {update.rounding:.0e} of the update, in which no more can be read."
        )
    notes += of_sent_model(model, update, anatomy, findings)
    notes += _of_the_model(model, update, anatomy)
    replays = [f.result.replay for f in findings if f.result is not None and f.result.replay is not None]
    notes += [f"{replay.words[0].upper()}{replay.words[1:]}." for replay in replays if replay.failed]
    return notes


def _of_the_model(model: nn.Module, update: ClientUpdate, anatomy: Anatomy) -> list[str]:
    """Notes on the head and on dropout."""
    notes = []
    if anatomy.head_weight not in update.gradients and anatomy.head_bias not in update.gradients:
        notes.append(HEAD_UNNAMED if head_unnamed(anatomy) else HEAD_UNSHARED)
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
    if dropouts:
        notes.append(
            "The model is in training mode with dropout: a replay would draw other masks than the client did."
        )
    return notes
