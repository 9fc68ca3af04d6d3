"""A Vision Transformer's parameters in groups that a client shares or keeps, and what
attacks find in them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from ..anatomy import Anatomy, tensors_of
from ..attacks.closed_forms.span_rounds import of_the_keys

PATCH, POSITION, ATTENTION = "patch embedding", "position embedding", "first attention"
OTHERS, HEAD, ADAPTERS = "other blocks", "head", "adapters"


@dataclass(frozen=True)
class Shares:
    """What of a model's parts is among the tensors that a client shares.

    Attributes
    ----------
    patch, position, attention, head_weight, head_bias : bool
        Of the attention W_Q or W_V; W_K alone shows differences of tokens, and needs a public one.
    projections : bool
        W_Q, W_K and W_V, all three.
    adapter_rows : int
        Rows that the adapters on the first attention's projections add in a round: the sum of the
        ranks of the factors A that read its input.
    below : bool
        Whether W_e or E changes from round to round: then so do the first attention's inputs, each
        token's in its own way.
    deeper : bool
        Tensors between the first attention and the head.
    """

    patch: bool = False
    position: bool = False
    attention: bool = False
    projections: bool = False
    head_weight: bool = False
    head_bias: bool = False
    adapter_rows: int = 0
    below: bool = False
    deeper: bool = False


def groups_of(model: nn.Module, anatomy: Anatomy) -> dict[str, tuple[str, ...]]:
    """Names of the parameters in each group; groups that the model has nothing of are left out.

    >>> import aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> groups_of(model, al.dissect(model))["position embedding"]
    ('class_token', 'position_embedding')
    """
    found: dict[str, list[str]] = {name: [] for name in (PATCH, POSITION, ATTENTION, OTHERS, HEAD, ADAPTERS)}
    places = _places(anatomy)
    for name, _ in model.named_parameters():
        found[ADAPTERS if is_adapter(name) else places.get(name, OTHERS)].append(name)
    return {group: tuple(names) for group, names in found.items() if names}


def _places(anatomy: Anatomy) -> dict[str, str]:
    """Group of each tensor that the anatomy names, its norms apart."""
    places = {name: POSITION for name in (anatomy.position, *anatomy.prefix) if name}
    places |= {name: PATCH for name in (anatomy.patch_weight, anatomy.patch_bias) if name}
    places |= {name: HEAD for name in (anatomy.head_weight, anatomy.head_bias) if name}
    rows = (anatomy.query, anatomy.key, anatomy.value, anatomy.query_bias, anatomy.key_bias, anatomy.value_bias)
    return places | {part.name: ATTENTION for part in rows if part is not None}


def is_adapter(name: str) -> bool:
    """Whether a parameter is a factor of LoRA's, by peft's names."""
    return "lora_" in name


def last_block(model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    """Parameters of the last block and of what stands behind it, the head among them; none where
    the blocks are not in a list of PyTorch's.

    >>> import aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=3, heads=2, classes=5)
    >>> sorted({name.partition(".")[0] for name in last_block(model, al.dissect(model))})
    ['blocks', 'head', 'norm']
    """
    if anatomy.query is None:
        return ()
    lists = [
        path for path, module in model.named_modules()
        if path and isinstance(module, nn.ModuleList | nn.Sequential) and anatomy.query.name.startswith(f"{path}.")
    ]  # fmt: skip
    if not lists:
        return ()
    blocks = max(lists, key=len)
    last = f"{blocks}.{list(dict(model.get_submodule(blocks).named_children()))[-1]}."
    before = {PATCH, POSITION, ADAPTERS} | ({ATTENTION} if not anatomy.query.name.startswith(last) else set())
    groups = groups_of(model, anatomy)
    kept = [name for group, names in groups.items() if group not in before for name in names]
    in_front = {anatomy.embedding_norm_weight, anatomy.embedding_norm_bias}
    return tuple(
        name for name in kept
        if name.startswith(last) or not (name.startswith(f"{blocks}.") or name in in_front)
    )  # fmt: skip


def shares_of(model: nn.Module, anatomy: Anatomy, names: Collection[str]) -> Shares:
    """Which parts are among the tensors of these names.

    Raises
    ------
    ValueError
        If a name is no parameter of the model.
    """
    names, known = set(names), {name for name, _ in model.named_parameters()}
    if missing := sorted(names - known):
        raise ValueError(
            f"{', '.join(missing[:3])}: no parameter of {type(model).__name__} has that name; it has "
            f"{', '.join(sorted(known)[:5])}, … ({len(known)} in all)"
        )
    parts = {"query": anatomy.query, "key": anatomy.key, "value": anatomy.value}
    shared = {part for part, rows in parts.items() if rows is not None and rows.name in names}
    adapters, tensors = getattr(anatomy, "adapters", ()), tensors_of(model)
    groups = groups_of(model, anatomy)
    read = [name for name in adapters if name in names]
    only_keys = not anatomy.prefix and all(of_the_keys(name, anatomy) for name in read)
    return Shares(
        patch=anatomy.patch_weight in names,
        position=anatomy.position in names,
        attention=bool(shared & {"query", "value"} or (shared and anatomy.prefix)),
        projections=len(shared) == 3,
        head_weight=anatomy.head_weight in names,
        head_bias=anatomy.head_bias in names,
        adapter_rows=0 if only_keys else sum(len(tensors[name]) for name in adapters if name in names),
        below=bool(names & {anatomy.patch_weight, anatomy.position}),
        deeper=bool(names & {*groups.get(OTHERS, ())}),
    )
