"""What to do about what an audit found: changes in order of their cost, which of them
end it, and by what.

Nothing here is a promise. *A guarantee* holds for every attacker, under its assumptions
and with its number. *No closed form* says that no attack of this course has equations
left; others need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from ..sharing import LeakRow
from ..update import ClientUpdate
from .choices import (
    HEAD_ALONE,
    THIS,
    WITHOUT_ALL_THREE,
    WITHOUT_ATTENTION,
    WITHOUT_EMBEDDINGS,
    WITHOUT_POSITION,
    WITHOUT_POSITION_AND_ATTENTION,
)
from .findings import Audit
from .noise_words import noise_words

Ends = Literal["yes", "in part", "not known", "no"]
#: What says so: a theorem; the leak map's count, which knows the closed forms alone; a measurement.
By = Literal["guarantee", "count", "measurement"]
Situation = Literal["picture", "mixture", "noise", "unclear", "nothing"]

BROKEN, OPEN = "07_breaking_the_defence", "08_what_the_span_leaves_open"
FEDERATION, LESS = "09_a_real_federation", "10_sharing_less"
HOLDS = "11_defences_that_hold"


@dataclass(frozen=True)
class Advice:
    """One change, and what becomes of the finding.

    Attributes
    ----------
    change : str
        In a few words.
    ends : {"yes", "in part", "not known", "no"}
        Whether it ends what the audit found.
    cost : str
        In words; the advices come in its order.
    chapter : str
        Of the course: the notebook's name without its ending.
    words : str
        Why, with the numbers of this update and model; a line a point.
    by : {"guarantee", "count", "measurement"}
        What says so.
    tensors : tuple of str
        Parameters that would not be shared any more.
    """

    change: str
    ends: Ends
    cost: str
    chapter: str
    words: str
    by: By = "measurement"
    tensors: tuple[str, ...] = ()


def situation(found: Audit) -> Situation:
    """What came out, as far as advice depends on it.

    "noise" and "mixture" say what kept a picture from coming out, "unclear" that a picture came out
    which cannot be relied on, and "nothing" that no closed form applies.
    """
    if found.leak in ("exact", "close", "likely", "coarse"):
        return "picture"
    if found.best is None:
        return "nothing"
    if found.noise:
        return "noise"
    return "mixture" if found.best.trust == "mixture" else "unclear"


def advice(found: Audit) -> tuple[Advice, ...]:
    """The changes worth a word after this audit, the cheapest first.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> from aprillab.audit import audit
    >>> model = al.VisionTransformer(image_size=16, patch_size=4, width=64, depth=1, heads=2, classes=10)
    >>> images = al.HALF.to_input(al.load_victim("coffee", 16)[None])
    >>> for one in advice(audit(model, al.client_update(model, images, torch.tensor([3])))):
    ...     print(f"{one.ends:<8} {one.change}")
    in part  half precision, quantization, pruning
    no       more local steps, momentum, weight decay
    in part  more images in each step
    no       freeze or withhold the position embedding alone
    yes      freeze or withhold both embeddings
    in part  secure aggregation, under an honest server
    yes      freeze all but the head and LoRA of rank 8 on q, v
    yes      share the head alone
    yes      clip each image's gradient and add noise
    """
    makers: tuple[Callable[[Audit], Iterator[Advice]], ...] = (
        _zero_head, _bits, _steps, _adam, _images, _keeping, _withholding, _aggregation, _adapters, _head, _noise,
    )  # fmt: skip
    return tuple(one for make in makers for one in make(found))


def introduction(found: Audit) -> str:
    """What the advice is about, in a sentence or two: what "it" is that a change ends."""
    kind, best, this = situation(found), found.best, _rows(found).get(THIS)
    if kind == "picture" and best is not None:
        return f"A picture came out by the {best.attack.title} ({best.trust}): this is what a change has to end."
    if kind == "mixture":
        return "A mixture came out, of several images as far as can be told: this is what a change has to end."
    if kind == "noise":
        return (
            "The update carries noise, which is what these attacks met with. Whether it holds against others, too, "
            "is said by its ε, and by no attack that failed."
        )
    if best is not None and best.trust == "noise":
        return "What came out is no better than plain grey. Below is what keeps it so, and what does not."
    if kind == "unclear":
        return "A picture came out that cannot be relied on, and a better one may: this is what a change has to end."
    if this is not None and this.attack is not None:
        return f"No closed form read this update. By the count the {this.title} needs {this.when}, of the same image."
    return "No closed form read this update. Below is what keeps it so, and what to do about attacks that need none."


def reading(found: Audit) -> tuple[str, ...]:
    """Files of the repository that derive and measure this, those for this audit first."""
    chapters = [FEDERATION] if found.recording or found.update.source == "fedavg" else []
    measured = ["a_round", "protections"] * bool(chapters)
    if found.anatomy.adapters or found.rounds > 1:
        chapters, measured = [*chapters, LESS], [*measured, "sharing_less"]
    if found.anatomy.position not in found.update.gradients:
        measured = [*measured, "effect", "rounding"]
    chapters += sorted({one.chapter for one in advice(found)} - set(chapters))
    return (*(f"notebooks/{name}.ipynb" for name in chapters), *(f"data/results/{name}.md" for name in measured))


# --- Changes that cost nothing ------------------------------------------------------------------------------------


def _zero_head(found: Audit) -> Iterator[Advice]:
    if found.sharing is not None and found.sharing.facts.zero_head:
        yield Advice(
            "count on the head's zeros", "no", "none", FEDERATION,
            "The model's head is zero, and passes no gradient down: this says nothing of other rounds. After the "
            "first step the head is zero no more. Audit that round; what to keep back can be counted then, too.",
        )  # fmt: skip


def _bits(found: Audit) -> Iterator[Advice]:
    kind, half = situation(found), found.update.dtype in (torch.float16, torch.bfloat16)
    if kind not in ("picture", "unclear") and not (half and kind != "nothing"):
        return
    words = (
        "Coarser numbers make a coarser picture. In half precision and in 8 bits it stays. In chapter 11, little "
        "or nothing of a small picture is left of 2 bits, or of a hundredth of the entries, to attacks that know how "
        "they were made; which of some candidates it was can still be told. No number bounds what is left."
    )
    if half:
        dtype = str(found.update.dtype).removeprefix("torch.")
        came = "and a picture came out all the same" if kind == "picture" else "which limits what came out"
        words = f"This update came in {dtype}, {came}. {words}"
    yield Advice("half precision, quantization, pruning", "in part", "none", HOLDS, words)


def _steps(found: Audit) -> Iterator[Advice]:
    if situation(found) not in ("picture", "unclear") or found.one_image.state == "contradicted":
        return
    update = found.update
    words = (
        "Each step adds a multiple of a gradient of the same picture, and the sums stand on both sides of the "
        "system. Pictures were exact after twenty steps, with momentum or decay."
    )
    if found.anatomy.position not in update.gradients:
        words += " The span attack's picture stays too; what is lost is the proof that it is the right one."
    if update.local_steps > 1:
        words = f"This update has {update.local_steps} of them in it. {words}"
    yield Advice("more local steps, momentum, weight decay", "no", "none", FEDERATION, words)


def _adam(found: Audit) -> Iterator[Advice]:
    adam = (found.update.optimizer or "").startswith("adam")
    if not adam and (found.update.source != "fedavg" or situation(found) not in ("picture", "unclear")):
        return
    first = "This update is of Adam's, and its" if adam else "The"
    yield Advice(
        "Adam, of two local steps or more in a round", "not known", "none", FEDERATION,
        f"{first} first step of a new optimizer is undone entry by entry. After two and more 13 to 14 dB were left "
        "in the median, at PyTorch's ε of 1e-8. Nothing proves that no attack does better, and at an ε of 1e-2 there "
        "were 42 dB after two steps.",
    )  # fmt: skip


def _images(found: Audit) -> Iterator[Advice]:
    kind = situation(found)
    if kind == "nothing":
        return
    now, claimed = "", found.update.batch_size or 1
    if kind == "mixture":
        now = (
            f"This update is of {claimed if claimed > 1 else 'several'} images, and what came out is their mixture. "
        )
    yield Advice(
        f"{'still ' * bool(now)}more images in each step", "in part", "none, where a client has them", FEDERATION,
        f"{now}From two images on a closed form returns a mixture, in which parts of one may be seen: no number says "
        "what is left. The head goes on to name labels, a search took two small pictures apart again (chapter 08), "
        "and a server that changes the model can fish one image out of a batch (chapter 12). A client's last "
        "batch may be of one image.",
    )  # fmt: skip


# --- Sharing less, by the leak map's counts -----------------------------------------------------------------------


_CHOICES = {
    WITHOUT_POSITION: ("freeze or withhold the position embedding alone", BROKEN),
    WITHOUT_ATTENTION: ("freeze or withhold the first attention", LESS),
    WITHOUT_EMBEDDINGS: ("freeze or withhold both embeddings", LESS),
    WITHOUT_POSITION_AND_ATTENTION: ("freeze or withhold the position embedding and the first attention", LESS),
    WITHOUT_ALL_THREE: ("freeze or withhold both embeddings and the first attention", LESS),
}


def _rows(found: Audit) -> dict[str, LeakRow]:
    """What could be left out of this update; nothing where a head of zeros makes every count say
    so.
    """
    if found.sharing is None or found.sharing.facts.zero_head:
        return {}
    return {row.shared: row for row in found.sharing.rows if row.kind == "asked"}


def _by_count(found: Audit) -> bool:
    """Whether no closed form is left of what is shared now, and none read it; rounding
    alone does not count.
    """
    this = _rows(found).get(THIS)
    return this is not None and this.attack is None and situation(found) != "picture" and not _by_rounding(this)


def _by_rounding(row: LeakRow) -> bool:
    """Whether there are equations enough, and only float32 has too few digits for them."""
    return any("in float32" in count.obstacle and count.rounds is not None for count in row.counts)


def _keeping(found: Audit) -> Iterator[Advice]:
    """Where the counts leave nothing of what is shared now: leave it at that."""
    this = _rows(found).get(THIS)
    if this is None or this.attack is not None or situation(found) == "picture" or found.sharing is None:
        return
    opened = [row for row in found.sharing.rows if row.kind == "combination" and row.attack is not None]
    more = "; ".join(f"{row.shared} ({row.title}, {row.when})" for row in opened[:2])
    words = f"What this update shares leaves no closed form: {this.why}."
    words += f" There would be one if more were shared: {more}." if more else ""
    ends: Ends = "in part" if _by_rounding(this) else "yes"
    chapter = OPEN if _by_rounding(this) else LESS
    words += _what_is_left(this)
    yield Advice("go on sharing no more than this", ends, "none", chapter, words, by="count")


def _withholding(found: Audit) -> Iterator[Advice]:
    """The position embedding alone, and what else it takes until no closed form is left."""
    rows = _rows(found)
    gone = next((part.state for part in found.parts if part.part == "position embedding"), "")
    if gone in ("withheld", "fixed") and situation(found) == "picture":
        how = "keeps its position embedding back" if gone == "withheld" else "has a fixed position embedding"
        yield Advice(
            _CHOICES[WITHOUT_POSITION][0], "no", "paid already", BROKEN,
            f"This update {how}, and a picture came out: the server knows the embedding's values.",
        )  # fmt: skip
    if THIS not in rows or _by_count(found):
        return
    kept_by = {choice: _kept(rows[THIS], rows[choice]) for choice in _CHOICES if choice in rows}
    for choice, kept in sorted(kept_by.items(), key=lambda one: _share_of(found.update, one[1])):
        change, chapter = _CHOICES[choice]
        row = rows[choice]
        ends = _ends(found, row, rows[THIS])
        cost = f"{_share_of(found.update, kept):.2g} % of the numbers are not trained together; accuracy not measured"
        if choice == WITHOUT_POSITION:
            cost = "accuracy: −6.4 to +4.6 points on MNIST-5k, by the scale of the frozen values (chapter 06)"
        elif choice == WITHOUT_ATTENTION and found.anatomy.adapters:
            change = f"{change}'s adapters"
        yield Advice(change, ends, cost, chapter, _of_row(row, ends, kept), by="count", tensors=kept)
        if ends == "yes":
            return


def _ends(found: Audit, row: LeakRow, this: LeakRow) -> Ends:
    """By the count: "in part" where it asks for more rounds than there are."""
    if row.rounds is None:
        # A picture came out where the counts see none, as from sinusoids in float64: this count
        # is worth nothing.
        rounded = _by_rounding(row)
        if this.attack is None and situation(found) == "picture" and (rounded or row.why == this.why):
            return "no"
        return "in part" if rounded else "yes"
    return "no" if row.rounds + row.silent_rounds <= found.rounds else "in part"


def _of_row(row: LeakRow, ends: Ends, kept: tuple[str, ...]) -> str:
    """The tensors, and the count that decides."""
    names = ", ".join(f"`{name}`" for name in kept[:6]) + (f", … ({len(kept)} in all)" if len(kept) > 6 else "")
    tensors = f"Tensors: {names}. " if names else ""
    if row.attack is None:
        end = " And yet a picture came out." if ends == "no" else _what_is_left(row)
        return f"{tensors}The count: {row.why}.{end}"
    title = row.title if row.attack == "april" else f"The {row.title}"
    rounds = "" if row.when == "one round" else f", and takes {row.when} with the same picture"
    return f"{tensors}{title} is left{rounds}: {row.why}."


_ROUNDING = (
    " It is rounding that stops the span attack here, and no lack of equations: from float64, and by a search "
    "from its picture on, small pictures came out (chapter 08)."
)


def _what_is_left(row: LeakRow) -> str:
    left = f" An attacker is still given: {'; '.join(row.also)}." if row.also else ""
    return _ROUNDING * _by_rounding(row) + left


def _kept(this: LeakRow, row: LeakRow) -> tuple[str, ...]:
    """The tensors that one choice leaves out of another."""
    return tuple(name for name in this.tensors if name not in row.tensors)


def _share_of(update: ClientUpdate, names: tuple[str, ...]) -> float:
    """What is not trained together any more, in percent of the numbers in the update."""
    every = sum(g.numel() for g in update.gradients.values())
    return 100 * sum(update.gradients[name].numel() for name in names) / every


def _adapters(found: Audit) -> Iterator[Advice]:
    """LoRA, for a model that has none; what the map supposes of it."""
    rows = _rows(found)
    if found.sharing is None or THIS not in rows or found.anatomy.adapters or _by_count(found):
        return
    row = next((row for row in found.sharing.rows if row.shared.startswith("LoRA")), None)
    if row is not None:
        ends = _ends(found, row, rows[THIS])
        change = f"freeze all but the head and {row.shared}"
        yield Advice(change, ends, "the base is not trained", LESS, _of_row(row, ends, ()), by="count")


def _head(found: Audit) -> Iterator[Advice]:
    rows = _rows(found)
    if (row := rows.get(HEAD_ALONE)) is None or row.attack is not None:
        return
    yield Advice(
        "share the head alone", "yes", "nothing below the head is trained", LESS,
        f"{row.why[0].upper()}{row.why[1:]}.{_what_is_left(row)} By the features of one image whoever had candidates "
        "told the right one of sixteen photographs, each time. A server that prepares the layers below has pictures "
        "from them, too (chapter 10).",
        by="count", tensors=_kept(rows[THIS], row),
    )  # fmt: skip


# --- What does not hang on the model ------------------------------------------------------------------------------


def _aggregation(found: Audit) -> Iterator[Advice]:
    yield Advice(
        "secure aggregation, under an honest server", "in part",
        "4 times the messages and 2 times the bytes back (Flower's SecAgg+)", FEDERATION,
        "The server gets the sum over clients, a larger batch, and all that is said of batches holds. It takes the "
        "server at its word: that it sends every client the same model, and that the other clients are not its own. "
        "One that knew the others' updates had 16 dB at Flower's default and 72 dB at max_weight = 1. A client alone "
        "in a round gains nothing, and a server that lies gets round it (chapter 12).",
    )  # fmt: skip


def _noise(found: Audit) -> Iterator[Advice]:
    """The one with a theorem."""
    yield Advice(
        "clip each image's gradient and add noise", "yes", "accuracy, the more the fewer images take part", HOLDS,
        "\n".join(noise_words(found)), by="guarantee",
    )  # fmt: skip
