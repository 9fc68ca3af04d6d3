"""The leak map of a model: every group of tensors, and the usual combinations, each with its
counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn

from ..anatomy import Anatomy, dissect
from ..attacks.catalogue import ATTACKS
from ..attacks.labels import check_told
from .counts import Count, counts_of
from .facts import Facts, facts_of
from .groups import ADAPTERS, ATTENTION, HEAD, PATCH, POSITION, Shares, groups_of, last_block, shares_of
from .table import NOTHING, LeakMap, LeakRow
from .words import also_leaks, evidence, missing_parts, notes_of


def leak_map(
    model: nn.Module,
    *,
    anatomy: Anatomy | None = None,
    rank: int = 8,
    shared: Mapping[str, Collection[str]] | None = None,
) -> LeakMap:
    """If these tensors and only these are shared: which closed form applies, by which count.

    No update is needed, and nothing is attacked: equations and unknowns are counted, for one image.
    A count that holds says that the picture is determined, not to how many digits; and where no
    closed form applies the map says "no closed form", which is no promise of anything.

    Parameters
    ----------
    model : nn.Module
        With the weights that clients are given: the count reads the position embedding's values,
        the first norms' and whether the head is zero.
    anatomy : Anatomy, optional; default is ``dissect(model)``
    rank : int
        Of LoRA's adapters on the first attention's queries and values (on all three where they are
        one tensor), for a model that has none.
    shared : mapping from a name to names of parameters, optional
        Combinations to ask besides the usual ones.

    Returns
    -------
    LeakMap

    Raises
    ------
    UnknownModelError
        If ``dissect`` does not know the model.
    ValueError
        If ``rank`` is not positive, or a name in ``shared`` is no parameter of the model.

    Examples
    --------
    >>> import aprillab as al
    >>> model = al.VisionTransformer(image_size=32, patch_size=8, width=256, depth=2, heads=4, classes=10)
    >>> print(al.leak_map(model)["both embeddings frozen"].why)
    p + tokens + 1 = 210 ≤ 256 = d
    >>> al.leak_map(model)["head only"].title
    'no closed form'
    """
    check_told(anatomy, None, None)
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number from 1 up, not {rank!r}: 8 is common")
    anatomy = anatomy or dissect(model)
    facts = facts_of(model, anatomy)
    if shared is not None and not isinstance(shared, Mapping):
        raise ValueError(
            f'shared maps a name to names of parameters, {{"mine": [...]}}, and is no {type(shared).__name__}'
        )
    asked = {name: (names,) if isinstance(names, str) else tuple(names) for name, names in (shared or {}).items()}
    chosen = [
        *(("asked", name, names) for name, names in asked.items()),
        *(("combination", name, names) for name, names in _combinations(model, anatomy).items()),
        *(("group", f"{name} alone", names) for name, names in groups_of(model, anatomy).items()),
    ]
    rows = [_row(facts, kind, name, names, shares_of(model, anatomy, names)) for kind, name, names in chosen]
    if not any(row.shared.startswith(ADAPTERS) for row in rows):
        head = shares_of(model, anatomy, groups_of(model, anatomy).get(HEAD, ()))
        fused = anatomy.query is not None and anatomy.value is not None and anatomy.query.name == anatomy.value.name
        supposed = replace(head, adapter_rows=rank if fused else 2 * rank)  # one factor A, or one for each
        name = f"LoRA of rank {rank} on {'qkv' if fused else 'q, v'}"
        at = sum(row.kind != "group" for row in rows)
        rows.insert(at, _row(facts, "combination", name, (), supposed))
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return LeakMap(kind, anatomy.family, facts, tuple(rows), notes_of(model, anatomy, facts))


def _combinations(model: nn.Module, anatomy: Anatomy) -> dict[str, tuple[str, ...]]:
    """What is usually shared together. Adapters come with everything else frozen but the head."""
    groups = groups_of(model, anatomy)
    base = {group: names for group, names in groups.items() if group != ADAPTERS}

    def without(*kept: str) -> tuple[str, ...]:
        return tuple(name for group, names in base.items() if group not in kept for name in names)

    parameters = {name: p.requires_grad for name, p in model.named_parameters()}
    found = {}
    if ADAPTERS in groups:
        found["adapters and head"] = (*groups[ADAPTERS], *groups.get(HEAD, ()))
    trained = tuple(name for name, trains in parameters.items() if trains)
    if 0 < len(trained) < len(parameters):
        found["what the model trains now"] = trained
    found["all"] = without()
    if anatomy.position in parameters:
        found["position embedding withheld"] = tuple(name for name in without() if name != anatomy.position)
    found["both embeddings frozen"] = without(PATCH, POSITION)
    if ATTENTION in base:
        found["first attention withheld"] = without(ATTENTION)
    if last := last_block(model, anatomy):
        found["last block and head"] = last
    if HEAD in base:
        found["head only"] = base[HEAD]
    return found


def _row(facts: Facts, kind: str, name: str, names: tuple[str, ...], shares: Shares) -> LeakRow:
    counts = () if facts.zero_head else counts_of(facts, shares)
    best = min((c for c in counts if c.applies), key=lambda count: (count.rounds or 0, count.silent), default=None)
    return LeakRow(
        shared=name, kind=kind, tensors=names, attack=best.attack if best else None,
        title=ATTACKS[best.attack].title if best else NOTHING, why=_why(facts, shares, counts, best),
        rounds=best.rounds if best else None, silent_rounds=best.silent if best else 0,
        evidence=evidence(facts, shares, best), also=also_leaks(facts, shares, counts, best), counts=counts,
    )  # fmt: skip


def _why(facts: Facts, shares: Shares, counts: tuple[Count, ...], best: Count | None) -> str:
    """The count that decides; where none holds, all of them, or what no closed form can do without."""
    if facts.zero_head:
        return "the head is zero: it passes nothing down in this round"
    if best is not None:
        return best.inequality
    if counts:
        return "; ".join(
            f"{count.inequality}{', and ' + count.obstacle if count.obstacle else ''}" for count in counts
        )
    return missing_parts(shares)
