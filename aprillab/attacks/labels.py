"""The labels of a client's batch, read off the classifier's gradient.

With cross-entropy the gradient that reaches the logits of one image is r = softmax(logits) −
onehot(y): its only negative entry is the label, where labels are not smoothed. The head's bias
gradient is the mean of the r of the batch; the head's weight gradient is the mean of r fᵀ, with f
the features the head reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, dissect, tensors_of
from ..preprocessing import Preprocessing
from ..update import ClientUpdate, UpdateError
from .evidence import one_image
from .reading import fit_update
from .result import AttackNotApplicable, Condition


@dataclass(frozen=True)
class Labels:
    """Recovered labels.

    Attributes
    ----------
    labels : int64 Tensor of shape (B,), sorted
        As a multiset: nothing here says which image has which label.
    exact : bool
        True when the label follows from the signs alone (one image) and nothing contradicts it.
    reason : str
    diagnostics : dict
    """

    labels: Tensor
    exact: bool
    reason: str
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


def recover_labels(
    model: nn.Module, update: ClientUpdate, *, batch_size: int | None = None, anatomy: Anatomy | None = None
) -> Labels:
    """The labels behind an update, from the head's bias gradient, or else from its weight gradient.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate
    batch_size : int, optional
        What the attacker knows or assumes; default is what the client says, else 1.
    anatomy : Anatomy, optional
        Default is ``dissect(model)``.

    Returns
    -------
    Labels
        For one image exact by the sign rule: the label is the one entry whose sign is not that of
        the others, which holds for after − before, too. That takes a client whose labels are single
        classes: smoothing by α makes others negative too (then nothing is exact), and the least
        entry is the label's only while the model is less sure of it than 1 − α. For a batch a
        greedy count: each label lowers its entry of the bias gradient by 1/B, so labels are taken
        off one at a time where the entry is lowest; right as long as the model is not yet
        confident, and never marked exact.

    Raises
    ------
    AttackNotApplicable
        If the head's gradients are withheld or zero, if a batch is asked for and only the weight is
        shared, or if the weight alone cannot tell two labels apart (two classes).
    ValueError
        If ``batch_size`` is not positive.
    UpdateError
        If the update does not belong to the model.
    """
    anatomy = anatomy or dissect(model)
    update = fit_update(model, update, anatomy, finite={anatomy.head_weight or "", anatomy.head_bias or ""})
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be positive")
    return _labels_of_head(update, anatomy, batch_size or update.batch_size or 1, one_image(anatomy, update))


def _labels_of_head(update: ClientUpdate, anatomy: Anatomy, batch_size: int, one: Condition) -> Labels:
    """As :func:`recover_labels`, of an update that was checked and for which ``one`` image is shown
    or not.
    """
    bias = update.gradients.get(anatomy.head_bias or "")
    weight = update.gradients.get(anatomy.head_weight or "")
    if bias is not None:
        residual, source = bias.double(), "head bias gradient"
    elif weight is not None and batch_size == 1:
        residual, source = _residual_from_weight(weight), "head weight gradient (rank one)"
    else:
        raise AttackNotApplicable("recover_labels", "the head's bias gradient is not in the update")
    if not residual.any():
        raise AttackNotApplicable("recover_labels", "the head's gradient is zero")
    turned = _is_turned(residual)
    left = -residual if turned else residual.clone()
    negative = int((left < 0).sum())
    found = []
    for _ in range(batch_size):
        found.append(int(left.argmin()))
        left[found[-1]] += 1 / batch_size
    labels = torch.tensor(sorted(found))
    exact = batch_size == 1 and negative == 1 and one.state != "contradicted"
    entries = f"{negative} negative entr{'y' if negative == 1 else 'ies'}"
    reason = f"{source}: {entries}{' after its sign is reversed' if turned else ''}; {one.text}"
    numbers = {"source": source, "negative_entries": negative, "batch_size": batch_size, "turned": turned}
    return Labels(labels, exact, reason, numbers)


def _is_turned(residual: Tensor) -> bool:
    """Whether the update is after − before: then one entry is positive and all others negative.

    With two classes either sign would do; then it is taken as it stands.
    """
    return len(residual) > 2 and int((residual > 0).sum()) == 1 and int((residual < 0).sum()) > 1


def _residual_from_weight(weight: Tensor) -> Tensor:
    """softmax − onehot of one image, up to a positive factor, from r fᵀ: all rows but the label's
    point one way.
    """
    w = weight.double()
    f = w[w.norm(dim=1).argmax()]
    r = w @ f / f.norm().clamp_min(torch.finfo(torch.float64).tiny)
    # The label's entry is minus the sum of all others, so it is the largest; it must come out
    # negative.
    first, second = r.abs().topk(2).values.tolist() if len(r) > 1 else (1.0, 0.0)
    if 0 < first <= second * (1 + 1e3 * torch.finfo(weight.dtype).eps):
        raise AttackNotApplicable(
            "recover_labels",
            "only the head's weight gradient r fᵀ is shared, and the two largest entries of r have the same size: "
            f"since r fᵀ = (−r)(−f)ᵀ, either may be the label ({len(r)} classes)",
            classes=len(r),
        )
    return -r * torch.sign(r[r.abs().argmax()])


def labels_or_none(
    model: nn.Module,
    update: ClientUpdate,
    anatomy: Anatomy,
    given: Tensor | None,
    *,
    one: Condition | None = None,
) -> tuple[Tensor | None, str]:
    """Labels for a Reconstruction of one image, and a word on where they come from.

    With ``one``, what :func:`~aprillab.attacks.evidence.one_image` says of it, the update counts as
    checked.
    """
    if given is not None:
        bias = update.gradients.get(anatomy.head_bias or "")
        if bias is not None and given.ndim == 1 and len(given) == 1 and update.local_steps == 1:
            said = int(bias.argmax() if _is_turned(bias.double()) else bias.argmin())
            if said != int(given[0]) and min(int((bias < 0).sum()), int((bias > 0).sum())) == 1:
                return given, f"known to the attacker; but the head's gradient says {said}"
        return given, "known to the attacker"
    try:
        if one is None:
            found = recover_labels(model, update, batch_size=1, anatomy=anatomy)
        else:
            found = _labels_of_head(update, anatomy, 1, one)
    except AttackNotApplicable as refusal:
        return None, refusal.reason
    return found.labels, f"recovered, {'exact' if found.exact else 'not certain'}: {found.reason}"


def check_known(labels: Any, update: ClientUpdate, anatomy: Anatomy, model: nn.Module) -> None:
    """Refuse what cannot be the label of one image of this model: the closed forms return one.

    Raises
    ------
    ValueError
        If it is no int64 tensor of shape (1,) with a class of the model, nor targets of shape
        (1, classes).
    UpdateError
        If the client says that its batch is larger.
    """
    if labels is None:
        return
    wanted = "labels must be an int64 tensor of shape (1,), or targets of shape (1, classes)"
    if not isinstance(labels, Tensor):
        raise ValueError(f"{wanted}, not {type(labels).__name__}: torch.tensor([3])")
    if len(labels.shape) == 2 and len(labels) == 1 and labels.is_floating_point():
        return
    if labels.shape != (1,) or labels.is_floating_point():
        raise ValueError(
            f"{wanted}, not {labels.dtype} of shape {tuple(labels.shape)}: a closed form is of one image"
        )
    head = tensors_of(model).get(anatomy.head_weight or anatomy.head_bias or "")
    if head is not None and not 0 <= int(labels[0]) < len(head):
        raise ValueError(f"labels={labels.tolist()}: the model has classes 0 to {len(head) - 1}")
    if update.batch_size is not None and update.batch_size > 1:
        raise UpdateError(f"one label is given, but the client says batch_size={update.batch_size}")


def check_told(anatomy: Any, preprocessing: Any, loss: Any) -> None:
    """Refuse what an attack is told in a form that it cannot be.

    Raises
    ------
    ValueError
        With the form that it should have.
    """
    if anatomy is not None and not isinstance(anatomy, Anatomy):
        raise ValueError(f"anatomy must be what al.dissect(model) returns, not {anatomy!r:.40}")
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise ValueError(
            "preprocessing must be an al.Preprocessing such as al.IMAGENET, al.HALF or "
            f"al.Preprocessing(mean=(0.5,), std=(0.25,)), not {preprocessing!r:.40}"
        )
    if loss is not None and not callable(loss):
        raise ValueError(f"loss must be a function of (logits, targets), such as F.cross_entropy, not {loss!r:.40}")


def assumed_batch_size(update: ClientUpdate, labels: object, batch_size: int | None) -> int:
    """B as an attack takes it: as told, else as many as it knows labels, else as the client says,
    else 1.
    """
    return batch_size or (len(labels) if isinstance(labels, Tensor) else 0) or update.batch_size or 1
