"""What a client can see of a cheating server before it answers: :func:`inspect_model`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, dissect, playable
from ..update import logits_of
from .constant import last_norm
from .looks import (
    changes,
    largest_offset,
    lost_directions,
    out_of_proportion,
    passed_by_class,
    passed_by_image,
    standing_still,
)
from .sent import CannotCheat, Head, evaluated, head_of, played

#: Beyond these a finding is suspicious. Honest models, fished ones, and where they meet:
#: data/results/cheating.md.
LIMITS = {
    "head rows": 4.0, "head directions": 3.0, "class offset": 3.0, "class gradients": 4.0, "layer directions": 8.0,
    "adapters": 4.0, "jump": 0.7, "still body": 30.0, "isolation": 10.0,
}  # fmt: skip
_IMAGES = 8  # of noise, to ask the model's opinion of
_MATRIX = 8  # rows and columns that a matrix must have to be judged


class SuspiciousModel(RuntimeError):
    """The client does not answer; the message says what it saw."""


@dataclass(frozen=True)
class Finding:
    """One look at the model.

    Attributes
    ----------
    name : str
    score : float
        Larger is stranger; infinite where something is zero that never is.
    threshold : float
        Beyond it the finding is suspicious.
    suspicious : bool
    words : str
        What was looked at, and found.
    """

    name: str
    score: float
    threshold: float
    suspicious: bool
    words: str

    def __str__(self) -> str:
        mark = "!" if self.suspicious else " "
        return f"{mark} {self.name}: {self.score:.3g} (limit {self.threshold:g}). {self.words}"


@dataclass(frozen=True)
class Inspection:
    """What a client saw in a model before answering.

    Attributes
    ----------
    findings : tuple of Finding
    gradient_norms : Tensor of shape (B,), or None
        Of each of the client's images, at the patch embedding's output; None without images.
    notes : tuple of str
        What could not be looked at, and why.
    """

    findings: tuple[Finding, ...]
    gradient_norms: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def suspicious(self) -> bool:
        """Whether any finding is. False is no proof of honesty."""
        return any(finding.suspicious for finding in self.findings)

    def refuse(self) -> None:
        """Raise :class:`SuspiciousModel` if anything is suspicious: the client does not answer."""
        if self.suspicious:
            seen = "; ".join(f"{f.name} {f.score:.3g} (limit {f.threshold:g})" for f in self.findings if f.suspicious)
            raise SuspiciousModel(f"no answer to this model: {seen}. Ask the server's operator what it is for")

    def __getitem__(self, name: str) -> Finding:
        """A finding by its name."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"no finding is called {name!r}: there are {', '.join(f.name for f in self.findings)}")

    def __str__(self) -> str:
        return "\n".join([*map(str, self.findings), *(f"  {note}" for note in self.notes)])


def inspect_model(
    model: nn.Module,
    previous: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    anatomy: Anatomy | None = None,
) -> Inspection:
    """Look at a model that a server sent, before answering it.

    Of the head: whether one row or one class stands out, whether rows are of few directions, and
    which classes would pass a gradient. Of all layers: whether they have lost their directions.
    With the previous round's model: how far it jumped, and whether the head alone moved, for the
    difference of two answers to one body may be one image's where neither answer is. With the
    client's own batch: whether one image's gradient drowns all others', which is what leaks, be the
    server a cheat or not.

    One false alarm is known: the first step from a head of zeros leaves the body where it was.

    Scores are deterministic. It costs a forward pass of eight pictures of noise, products of the
    weights with themselves, and with ``images`` one forward and backward pass of the batch.

    *What it cannot see*: one image that is there in several copies; one that is alone in a row of
    one layer and drowns nothing in the whole (an imprint, known by its weights); that other clients
    were sent another model (:func:`~aprillab.dishonest.silenced`: the one who is read has an honest
    model); a head that looks trained because it is, while the client does not look at its own
    batch. data/results/cheating.md has the numbers.

    Parameters
    ----------
    model : nn.Module
        As it was sent; left unchanged.
    previous : nn.Module or state dict, optional
        What was sent the round before.
    images : Tensor of shape (B, C, H, W), optional
        The client's batch, in model-input space.
    labels : int64 Tensor of shape (B,), optional
        Needed with ``images``.
    anatomy : Anatomy, optional
        Default is ``dissect(model)``.

    Returns
    -------
    Inspection

    Raises
    ------
    UnknownModelError
        If ``dissect`` does not know the model.
    ValueError
        If only one of ``images`` and ``labels`` is given, or they do not go together.

    Examples
    --------
    >>> import aprillab as al
    >>> shape = {"image_size": 16, "patch_size": 4, "width": 96, "depth": 1, "heads": 2, "classes": 10}
    >>> model = al.VisionTransformer(**shape)
    >>> al.inspect_model(model).suspicious
    False
    >>> model.load_state_dict(al.dishonest.class_fishing(model, 3))
    <All keys matched successfully>
    >>> [finding.name for finding in al.inspect_model(model).findings if finding.suspicious]
    ['head rows', 'head directions', 'class offset', 'class gradients']
    """
    if (images is None) != (labels is None):
        raise ValueError("images and labels go together: give both, or neither")
    if images is not None and labels is not None and (labels.shape != images.shape[:1] or images.ndim != 4):
        raise ValueError(
            f"images must be (B, C, H, W) and labels (B,), not {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    anatomy = anatomy or dissect(model)
    findings, notes, head = [*_of_layers(model, anatomy), *_of_adapters(model)], [], None
    try:
        head = head_of(model, anatomy)
    except CannotCheat as refusal:
        notes.append(f"The head was not looked at: {refusal}.")
    if head is not None:
        zero = not bool(head.weight.any())
        findings = [*_of_head(model, head), *findings]
        if zero:
            notes.append(
                "The head is zero, so nothing below it moves: as some libraries initialize it for the first round, "
                "and as a server silences a client. Compare the model's hash with other clients'."
            )
    if previous is not None:
        findings += _of_rounds(previous, model, head)
    norms = None
    if images is not None and labels is not None:
        norms, found = _of_images(model, anatomy, images, labels)
        findings += found
        notes += _of_norms(norms)
    return Inspection(tuple(findings), norms, tuple(notes))


# --- One look after another ---------------------------------------------------------------------------------------


def _finding(name: str, score: float, words: str) -> Finding:
    return Finding(name, score, LIMITS[name], not score <= LIMITS[name], words)


def _of_head(model: nn.Module, head: Head) -> list[Finding]:
    """Its rows, its biases, and what each class would pass."""
    weight, norm = head.weight, last_norm(model, head)[1]
    passed = passed_by_class(weight, played(model, head, {}, images=_IMAGES))
    offset = largest_offset(weight, head.bias, None if norm is None or norm.bias is None else norm.bias.detach())
    return [
        _finding("head rows", out_of_proportion(weight), "The longest row over the median one."),
        _finding(
            "head directions", lost_directions(weight, centred=True),
            f"Its rows less their mean could have {min(head.classes - 1, weight.shape[1])}: so many times fewer.",
        ),
        _finding("class offset", offset, "Nats between the oddest class and the median, before any picture."),
        _finding(
            "class gradients", float(passed.max() / passed.quantile(0.5)) if passed.any() else 1.0,
            f"Class {int(passed.argmax())} passes the largest gradient below the head, over the median class.",
        ),
    ]  # fmt: skip


def _of_layers(model: nn.Module, anatomy: Anatomy) -> list[Finding]:
    """Linear layers that have lost their directions; the patch embedding has few by training, too."""
    skipped = {anatomy.patch_weight, anatomy.head_weight, anatomy.position}
    worst, where = 1.0, "none"
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and min(parameter.shape) >= _MATRIX and name not in skipped and "lora_" not in name:
            worst, where = max((worst, where), (lost_directions(parameter.detach()), name))
    words = f"So many times fewer directions than a matrix of that shape can have, in {where}."
    return [_finding("layer directions", worst, words)]


def _of_adapters(model: nn.Module) -> list[Finding]:
    """LoRA's B over its A: B starts at zero, and A does not."""
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in parameters if "lora_A" in name]
    pairs = [(a, b) for a, b in pairs if b in parameters]
    if not pairs:
        return []
    scores = {b: _ratio(parameters[b], parameters[a]) for a, b in pairs}
    worst = max(scores, key=lambda name: scores[name])
    words = f"The largest LoRA factor B over its A, r.m.s. of the entries: {worst}. B starts at zero."
    return [_finding("adapters", scores[worst], words)]


def _ratio(b: Tensor, a: Tensor) -> float:
    top, bottom = float(b.square().mean() ** 0.5), float(a.square().mean() ** 0.5)
    return top / bottom if bottom else math.inf if top else 0.0


def _of_rounds(previous: nn.Module | Mapping[str, Tensor], model: nn.Module, head: Head | None) -> list[Finding]:
    """How far the layers moved since the last round, and whether the head alone did."""
    before = previous.state_dict() if isinstance(previous, nn.Module) else previous
    now = model.state_dict()
    moved = changes(before, now)
    name = max(moved, key=lambda key: moved[key], default="none")
    words = f"The largest change of a layer since the last round, relative to it: {name}."
    findings = [_finding("jump", moved.get(name, 0.0), words)]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    body = [name for name in moved if name in trained and (head is None or name not in head.names)]
    if head is not None and head.weight_name in moved and body:
        furthest = moved[head.weight_name]
        if head.bias is not None and head.bias_name is not None and head.bias_name in before:
            old = before[head.bias_name].to(head.bias).double()
            furthest = max(furthest, float((head.bias.double() - old).abs().max()))
        words = "The head's change over that of the median layer below it: a body that stands still is asked twice."
        findings.append(_finding("still body", standing_still(moved, furthest, body), words))
    return findings


def _of_images(model: nn.Module, anatomy: Anatomy, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Finding]]:
    """The norm of each image's gradient at the tokens, and whether one drowns the others."""
    given, seen = images.detach().clone().requires_grad_(), [Tensor()]
    owner, _, _ = anatomy.patch_weight.rpartition(".")  # "" where no module of its own holds it: then at the images
    embedding = model.get_submodule(owner) if owner else nn.Identity()
    hook = embedding.register_forward_hook(lambda _, inputs, output: seen.append(output))
    try:
        with evaluated(model), playable(model, anatomy), torch.enable_grad():
            losses = nn.functional.cross_entropy(logits_of(model, given), labels, reduction="none")
            tokens = seen[-1] if len(seen[-1]) == len(given) else given  # (B, …)
            each, others = passed_by_image(tokens, losses)
    finally:
        hook.remove()
    if len(images) < 2:
        return each, []
    ratios = torch.where(each > 0, each / others, 0.0)  # (12.9); a zero sum of others leaves infinity
    worst = int(ratios.argmax())
    words = (
        f"The gradient of image {worst}, of class {int(labels[worst])}, over the {len(images) - 1} others' together."
    )
    return each, [_finding("isolation", float(ratios.max()), words)]


def _of_norms(norms: Tensor) -> list[str]:
    """What stands beside isolation: there is one image only, or none passes anything."""
    notes = []
    if len(norms) == 1:
        notes.append("The batch is one image: whatever the model is, there are no others for it to hide among.")
    if not bool(norms.any()):
        notes.append("No image passes any gradient to the patch embedding: below the head this update is empty.")
    return notes
