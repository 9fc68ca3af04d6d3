"""Which closed form some shared tensors allow, by counting equations and unknowns.

All counts are of one image. With n patches of p pixels, width d, t tokens and c directions that the
norms before the first attention take:

    patch-embedding system     n ≤ d, d − 1 where only LayerNorms read the tokens          (4.3)
    APRIL's closed form        t ≤ d and, without the patch embedding's gradient, p ≤ d     (3.3)
    span attack                min(p, n) + t + c ≤ d                                        (7.6)
    the same without ∂W_e      p + t + c ≤ d                                                (7.6)

Rounds add equations. To (4.3) each brings d more for the same patches. To the span each brings
d − t − c more, if what is below the first attention is trained and so changes; else its inputs are
the same in every round. With adapters of rank r the rows of A add up instead, until there are n:
the tokens before the patches are public.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ..attacks.closed_forms.span_rounds import READABLE
from ..attacks.closed_forms.span_width import width_needed
from .facts import Facts
from .groups import Shares


@dataclass(frozen=True)
class Count:
    """One closed form's count.

    Attributes
    ----------
    attack : str
        A key of :data:`~aprillab.attacks.ATTACKS`.
    inequality : str
        With the model's numbers.
    needed, usable : int
        Holds where ``needed`` ≤ ``usable``.
    rounds : int or None
        In how many rounds of the same picture the equations suffice; None where they never do.
    silent : int
        Rounds before that in which nothing is seen: adapters whose B is still zero.
    spare, of : int
        Equations beyond the unknowns after those rounds, and all.
    obstacle : str
        What stands in the way besides the count; empty where nothing does.
    """

    attack: str
    inequality: str
    needed: int
    usable: int
    rounds: int | None
    silent: int = 0
    spare: int = 0
    of: int = 0
    obstacle: str = ""

    @property
    def applies(self) -> bool:
        """Whether the closed form has what it needs, in so many rounds."""
        return self.rounds is not None and not self.obstacle


def counts_of(facts: Facts, shares: Shares) -> tuple[Count, ...]:
    """The counts of all closed forms whose tensors are shared, whether they hold or not."""
    counts = []
    if shares.patch and shares.position:
        counts.append(of_embedding(facts))
    if shares.projections and shares.position and facts.first_block == "april":
        counts.append(of_april(facts, by_rows=shares.patch))
    if shares.attention:
        counts.append(of_span(facts, by_rows=shares.patch, moves=shares.below))
    elif shares.adapter_rows:
        counts.append(of_adapters(facts, shares.adapter_rows, by_rows=shares.patch, moves=shares.below))
    return tuple(counts)


def of_embedding(facts: Facts) -> Count:
    """The patch-embedding system's.

    >>> from dataclasses import replace
    >>> count = of_embedding(_TINY)
    >>> count.inequality, count.rounds, count.spare
    ('n = 196 > 191 = d − 1', 2, 186)
    """
    n, usable = facts.patches, facts.width - facts.ignores_mean
    rounds = ceil(n / usable)
    obstacle = ""
    if facts.prefix + n > facts.stored:
        rows = facts.prefix + n
        obstacle = f"the position embedding's {facts.stored} rows are interpolated to {rows}, which loses some"
    name = "d − 1" if facts.ignores_mean else "d"
    return Count(
        "embedding", _compared("n", n, usable, name), n, usable, rounds,
        spare=rounds * usable - n, of=rounds * usable, obstacle=obstacle,
    )  # fmt: skip


def of_april(facts: Facts, *, by_rows: bool) -> Count:
    """APRIL's; ``by_rows`` where the patch embedding's gradient is shared too."""
    d, t = facts.width, facts.tokens
    count = _compared("tokens", t, d, "d")
    if by_rows:
        return Count("april", count, t, d, 1 if t <= d else None, spare=max(d - t, 0), of=d)
    needed = max(t, facts.pixels)
    words = f"{count}, {_compared('p', facts.pixels, d, 'd')}"
    return Count("april", words, needed, d, 1 if needed <= d else None, spare=max(d - t, 0), of=d)


def of_span(facts: Facts, *, by_rows: bool, moves: bool) -> Count:
    """The span attack's; ``moves`` where the embeddings are trained, and rounds differ.

    >>> count = of_span(_TINY, by_rows=False, moves=False)
    >>> count.inequality, count.rounds
    ('p + tokens + 1 = 966 > 192 = d', None)
    """
    needed = _span_width(facts, by_rows)
    inequality = _span_inequality(facts, needed, by_rows)
    each = facts.usable - facts.tokens - facts.norms  # equations for a patch, a round
    unknowns = min(facts.pixels, facts.patches) if by_rows else facts.pixels
    rounds = 1 if needed <= facts.usable else ceil(unknowns / each) if moves and each > 0 else None
    return Count(
        "span", inequality, needed, facts.usable, rounds, spare=max(each, 0), of=max(facts.usable - facts.norms, 0),
        obstacle=_obstacle(facts),
    )  # fmt: skip


def of_adapters(facts: Facts, rows: int, *, by_rows: bool = False, moves: bool = False) -> Count:
    """The span attack's from the rows of adapters, ``rows`` a round.

    >>> from dataclasses import replace
    >>> count = of_adapters(replace(_TINY, width=1024, usable=1024), 16)
    >>> count.inequality, count.rounds, count.silent
    ('p + tokens + 1 = 966 ≤ 1024 = d', 13, 1)
    """
    needed = _span_width(facts, by_rows)
    obstacle = _obstacle(facts)
    if moves:
        obstacle = "the embeddings are trained too, so the rows of different rounds span different tokens"
    each = facts.usable - facts.tokens - facts.norms
    return Count(
        "span", _span_inequality(facts, needed, by_rows), needed, facts.usable,
        ceil(facts.patches / rows) if needed <= facts.usable else None, silent=1,  # other tokens are public
        spare=max(each, 0), of=max(facts.usable - facts.norms, 0), obstacle=obstacle,
    )  # fmt: skip


def _span_width(facts: Facts, by_rows: bool) -> int:
    return width_needed(facts.patches, facts.pixels, facts.tokens - facts.patches, facts.norms, by_rows=by_rows)


def _span_inequality(facts: Facts, needed: int, by_rows: bool) -> str:
    norms = f" + {facts.norms}" if facts.norms else ""
    name = "d" if facts.usable == facts.width else "the features with γ ≠ 0"
    return _compared(f"{'min(p, n)' if by_rows else 'p'} + tokens{norms}", needed, facts.usable, name)


def _obstacle(facts: Facts) -> str:
    """What the span attack cannot do without."""
    if facts.first_block not in READABLE:
        return f'what stands before the first attention is not read: first_block="{facts.first_block}"'
    if not facts.stored:
        return "the model has no position embedding that is added to the tokens: nothing tells the patches apart"
    if facts.same_places:
        return "the position embedding is the same at every patch: nothing tells the patches apart"
    if facts.places < facts.patches:
        return f"the positions of {facts.patches} patches span only {facts.places} directions in float32"
    return ""


def _compared(left: str, value: int, limit: int, right: str) -> str:
    """An inequality as it stands, with its numbers.

    >>> _compared("n", 196, 192, "d")
    'n = 196 > 192 = d'
    """
    return f"{left} = {value} {'≤' if value <= limit else '>'} {limit} = {right}"


#: A ViT-Ti/16 at 224, for the examples.
_TINY = Facts((224, 224), 196, 768, 192, 197, 192, 1, True, "prenorm", 197, 1, 196, False, 1000, False)
