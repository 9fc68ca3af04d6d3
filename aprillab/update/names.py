"""Names of the same tensors under different wrappers.

DataParallel and DistributedDataParallel put ``module.`` in front of every name, torch.compile
``_orig_mod.``, Opacus ``_module.``, Lightning and many a class of one's own ``model.``; compiled or
sharded parts carry theirs in the middle of a name. In peft's models the names of an adapter's
tensors have the adapter's own name in them, and in its files they have not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

_WRAPPERS = frozenset({"module", "_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Dots up to which a first part may end: names are a client's, and work must not grow
# with their length.
DEEPEST = 8
_SAVED = re.compile(r"(?<=\.)modules_to_save\.[^.]+\.")  # a trained copy: its file has the layer's own name
_FACTOR = re.compile(r"(?<=\.)(lora_A|lora_B|lora_magnitude_vector)\.[^.]+\.weight$")


def bare(name: str) -> str:
    """A name without what wrappers put into it.

    Examples
    --------
    >>> bare("_orig_mod.module.model.blocks.0._orig_mod.attn.qkv.weight")
    'blocks.0.attn.qkv.weight'
    >>> bare("vit.attn.q_proj.lora_A.default.weight"), bare("vit.attn.q_proj.lora_A.weight")
    ('vit.attn.q_proj.lora_A.weight', 'vit.attn.q_proj.lora_A.weight')
    """
    if "lora_" in name or "modules_to_save" in name:
        name = _SAVED.sub("", _FACTOR.sub(r"\1.weight", name))
        # Of DoRA's vector the file says no more than that.
        name = name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    first = next((i for i, part in enumerate(parts) if part != "model"), len(parts) - 1)
    return ".".join(parts[first:]) or name


def matched(given: Iterable[str], known: Collection[str], preferred: Collection[str] = ()) -> dict[str, str]:
    """Which of the names ``known`` each of the names ``given`` stands for.

    A name stands for itself, or for the one that is the same without wrappers, or for the one that
    is the same once a first part which all share is put in front or taken off (``1.`` of
    ``Sequential(Normalize, vit)``). One rule serves all names.

    Parameters
    ----------
    given, known : names of two sides
    preferred : names of either side; they decide where two rules match equally many

    Returns
    -------
    dict
        From given to known names, as many as match; a name that could stand for several is absent,
        and no two stand for the same.

    Examples
    --------
    >>> matched(["module.weight", "module.bias"], ["weight", "bias"])
    {'module.weight': 'weight', 'module.bias': 'bias'}
    >>> matched(["weight"], ["1.weight", "1.bias"])
    {'weight': '1.weight'}
    """
    given = list(given)
    as_is = {name: name for name in given if name in known}
    if len(as_is) == len(given):
        return as_is
    mine, theirs = _by_bare(given), _by_bare(known)
    liked = {bare(name) for name in preferred}

    def score(pairs: Mapping[str, str]) -> tuple[int, int]:
        return len(pairs), sum((one in liked) + (other in liked) for one, other in pairs.items())

    found = _shifts(mine, theirs)
    top = max(map(score, found))
    best = [pairs for pairs in found if score(pairs) == top]
    if top[0] <= len(as_is) or len(best) > 1:
        return as_is
    return {mine[one]: theirs[other] for one, other in best[0].items()}


def _by_bare(names: Collection[str]) -> dict[str, str]:
    """Bare name to name, where no two names have the same bare one."""
    counts = Counter(map(bare, names))
    return {bare(name): name for name in names if counts[bare(name)] == 1}


def _shifts(mine: Collection[str], theirs: Collection[str]) -> list[dict[str, str]]:
    """Every way to make names the same by one first part put in front or taken off, and what then
    matches.

    Names come from a client, in any number: the work grows with that number alone.
    """
    taken: dict[str, dict[str, str]] = {}
    put: dict[str, dict[str, str]] = {}
    for name in mine:
        for first, rest in _cut(name):
            if rest in theirs:
                taken.setdefault(first, {})[name] = rest
    for name in theirs:
        for first, rest in _cut(name):
            if rest in mine:
                put.setdefault(first, {})[rest] = name
    return [{name: name for name in mine if name in theirs}, *taken.values(), *put.values()]


def _cut(name: str) -> list[tuple[str, str]]:
    """First and second part of a name, cut at each of its first dots."""
    parts = name.split(".", DEEPEST)
    return [(".".join(parts[:i]), ".".join(parts[i:])) for i in range(1, len(parts))]
