"""The tensors of an ordinary pre-norm ViT's first block, by name: what an imprint is written into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..anatomy import Anatomy, Rows
from ..anatomy.tiling import CONVOLUTION
from .sent import CannotCheat


@dataclass(frozen=True)
class FirstBlock:
    """Names in ``model.state_dict()``; a bias that the model does not have is None.

    Attributes
    ----------
    query, key, value : Rows
        Of the attention's projections, (d, d) each.
    biases : tuple of Rows
        Theirs, as many as there are.
    norms : tuple of (str, str or None)
        Weight and bias of the LayerNorms before attention and MLP.
    out, out_bias : str, str or None
        The attention's output, (d, d).
    first, first_bias, second, second_bias : str, str or None
        The MLP's layers, (h, d) and (d, h).
    """

    query: Rows
    key: Rows
    value: Rows
    biases: tuple[Rows, ...]
    norms: tuple[tuple[str, str | None], ...]
    out: str
    out_bias: str | None
    first: str
    first_bias: str | None
    second: str
    second_bias: str | None

    def names(self) -> set[str]:
        """Of all its tensors."""
        names = {self.query.name, self.key.name, self.value.name, *(rows.name for rows in self.biases)}
        names |= {name for norm in self.norms for name in norm if name is not None}
        layers = self.out, self.out_bias, self.first, self.first_bias, self.second, self.second_bias
        return names | {name for name in layers if name is not None}


def first_block(model: nn.Module, anatomy: Anatomy) -> FirstBlock:
    """The first block of a model whose tokens enter it as z_i = W_e x_i + b_e + E_i.

    Raises
    ------
    CannotCheat
        If the model is another: no pre-norm block, no position embedding, or tensors in the block
        beside two norms, an attention and an MLP of two layers.

    Examples
    --------
    >>> import aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> first_block(model, al.dissect(model)).first
    'blocks.0.mlp.0.weight'
    """
    _refuse_other_tokens(anatomy)
    query, key, value, norm = anatomy.query, anatomy.key, anatomy.value, anatomy.norm_weight
    if query is None or key is None or value is None or norm is None:
        raise CannotCheat("the first attention's queries, keys, values and norm are not all known: no imprint")
    start, state = _common(query.name, norm), model.state_dict()
    inside = {name: t for name, t in state.items() if name.startswith(f"{start}.")}
    norms = sorted(_named(inside, lambda t: t.ndim == 1), key=lambda name: name != norm)
    layers = _layers(inside, {query.name, key.name, value.name}, len(state[anatomy.patch_weight]))
    if len(layers) != 3 or len(norms) != 2:
        raise CannotCheat(
            f"{start} is no block of two norms, an attention and an MLP of two layers: it has {', '.join(inside)}"
        )
    biases = tuple(r for r in (anatomy.query_bias, anatomy.key_bias, anatomy.value_bias) if r is not None)
    pairs = [(name, _bias(name, inside)) for name in (*norms, *layers)]
    found = FirstBlock(query, key, value, biases, tuple(pairs[:2]), *pairs[2], *pairs[3], *pairs[4])
    if others := sorted(set(inside) - found.names()):
        raise CannotCheat(f"{start} has tensors that an imprint does not know: {', '.join(others)}")
    return found


def _layers(inside: Mapping[str, Tensor], projections: set[str], d: int) -> list[str]:
    """Weights of the attention's output (d, d) and of the MLP's (h, d) and (d, h), in this
    order, if one is each.
    """
    others = {name: t for name, t in inside.items() if name not in projections and t.ndim == 2}
    return [
        *_named(others, lambda t: t.shape == (d, d)),
        *_named(others, lambda t: t.shape[1] == d != len(t)),
        *_named(others, lambda t: len(t) == d != t.shape[1]),
    ]


def _named(tensors: Mapping[str, Tensor], fits: Callable[[Tensor], bool]) -> list[str]:
    return [name for name, t in tensors.items() if name.endswith("weight") and fits(t)]


def _refuse_other_tokens(anatomy: Anatomy) -> None:
    if anatomy.first_block != "prenorm" or anatomy.embedding_norm_weight is not None:
        raise CannotCheat(
            f"an imprint is written into a pre-norm block that reads W_e x + b_e + E; this model's is "
            f"{anatomy.first_block!r}{', behind a norm' if anatomy.embedding_norm_weight else ''}"
        )
    if (
        anatomy.position is None
        or anatomy.pixel_order != CONVOLUTION
        or len(anatomy.prefix) > anatomy.position_prefix
    ):
        raise CannotCheat(
            "an imprint needs a position embedding for each token, whose values the server sets, and a patch "
            "embedding that reads a patch as a convolution does"
        )


def _common(first: str, second: str) -> str:
    """The path that two names start with."""
    parts = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    return ".".join(parts)


def _bias(weight: str, inside: Mapping[str, Tensor]) -> str | None:
    name = weight.removesuffix("weight") + "bias"
    return name if name in inside else None
