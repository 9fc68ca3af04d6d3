"""What the leak map says besides its counts: evidence, what else leaks, and what limits the map."""

from __future__ import annotations

from torch import nn

from ..anatomy import Anatomy
from .counts import Count
from .facts import Facts
from .groups import Shares

LABEL, FEATURES = "the label", "the features"


def evidence(facts: Facts, shares: Shares, best: Count | None) -> tuple[str, ...]:
    """What can show that a closed form's picture is the private one, on such an update."""
    if best is None:
        return ()
    found = []
    if best.spare > 0:
        found.append(f"one image: {best.spare} of {best.of} equations to spare")
    if shares.head_weight and facts.classes > 2:
        found.append("one image: the head's rank")
    if not found:
        found.append("one image: nothing shows it, for no equation is to spare")
    if (best.rounds or 1) > 1:
        found.append("one picture in all rounds: the stack's residual against each one's")
    labelled = (shares.head_bias or shares.head_weight) and facts.classes > 2
    return (*found, "replay" if labelled else "replay, where the label is known")


def also_leaks(facts: Facts, shares: Shares, counts: tuple[Count, ...], best: Count | None) -> tuple[str, ...]:
    """What is known to leak besides a closed form's picture, or without one;
    :func:`notes_of` explains.
    """
    found = []
    if shares.head_bias or (shares.head_weight and facts.classes > 2):
        found.append(LABEL)
    if shares.head_weight:
        found.append(FEATURES + ("" if shares.head_bias else " up to a factor"))
    if best is None and not facts.zero_head:
        found += _without_a_picture(facts, shares)
    if best is not None and (best.rounds or 1) > 1:
        several = [c for c in counts if c.attack == "embedding"]
        found += [f"from one round {c.usable} of the patches' {c.needed} directions" for c in several]
    return tuple(found)


def _without_a_picture(facts: Facts, shares: Shares) -> list[str]:
    """Spans and spaces that candidates can be held against, where no closed form reads a picture."""
    found = []
    if shares.patch:
        found.append(f"a space of {min(facts.patches, facts.pixels)} dimensions that all patches are in")
    if (shares.attention or shares.adapter_rows) and facts.tokens + facts.norms < facts.usable:
        found.append("the span of the tokens, for candidates")
    if shares.deeper:
        found.append("spans of what deeper layers read, for candidates")
    return found


def missing_parts(shares: Shares) -> str:
    """Why no count could be made."""
    if shares.patch:
        return "∂W_e = GᵀX, and neither G nor the first attention's gradient is shared"
    if shares.position:
        return "G alone says nothing of the pixels"
    return "nothing shared is affine in the pixels"


def notes_of(model: nn.Module, anatomy: Anatomy, facts: Facts) -> tuple[str, ...]:
    """What the reader should know of this map."""
    notes = [
        "Counts are of one image in exact arithmetic: precision, noise, batches and dropout decide how much is seen. "
        "Rounds are of the same picture, with weights that change in between. Tensors that clients keep are taken to "
        "have the values that the server sent.",
        "The head's gradient is r fᵀ and r: the label is r's one negative entry, f the features that the head reads. "
        "Candidates are pictures that an attacker guesses: the one whose tokens lie in a span is told from the rest.",
        "“No closed form” is no promise. Gradient matching needs no count (from a part of the tensors, on text: Li, "
        "Xu and Dras, arXiv 2406.00999); the gradients of attentions and MLPs further up are channels of their own "
        "(AEGIS, arXiv 2608.19534); a server that prepares the model reads pictures from a head (Maui, arXiv "
        "2509.11451) or from adapters (PEFTLeak, arXiv 2506.04453).",
    ]
    if facts.zero_head:
        word = (
            "The head is zero, as some libraries initialize it: such a round shares the label and, of one "
            "picture, the features that the head reads: enough to recognize it, no pixel. The next one shares "
            "what the map of its weights says."
        )
        notes.insert(0, word)
    if any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in model.modules()):
        notes.append("The model is in training mode with dropout: on the tokens it stops the span attack.")
    if anatomy.remark:
        notes.append(f"{anatomy.remark[0].upper()}{anatomy.remark[1:]}.")
    return tuple(notes)
