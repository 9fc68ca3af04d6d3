"""The names of a Vision Transformer's parts, and the tensors they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn

from ..preprocessing import UNIT, Preprocessing
from .tiling import CONVOLUTION, Tiling


class UnknownModelError(ValueError):
    """The model is not a Vision Transformer that :func:`dissect` knows; the message says what was
    looked for.
    """


@dataclass(frozen=True)
class Rows:
    """Some rows of a named tensor: fused projections keep queries, keys and values in one.

    Attributes
    ----------
    name : str
    start, stop : int or None
        ``tensor[start:stop]``; None for the whole.
    """

    name: str
    start: int | None = None
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Rows:
        """Read ``"block.qkv.weight"`` or ``"block.qkv.weight[0:384]"``.

        Examples
        --------
        >>> Rows.parse("block.qkv.weight[0:384]")
        Rows(name='block.qkv.weight', start=0, stop=384)
        """
        match = re.fullmatch(r"([^\[\]]+)(?:\[(\d*):(\d*)\])?", text.strip())
        if match is None:
            raise ValueError(f"{text!r} is neither 'name' nor 'name[start:stop]'")
        name, start, stop = match.groups()
        return cls(name, int(start) if start else None, int(stop) if stop else None)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """These rows in ``tensors``; None where the name is not among them.

        Examples
        --------
        >>> import torch
        >>> Rows("weight", 1, 2).of({"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
        tensor([[3., 4.]])
        """
        tensor = tensors.get(self.name)
        return None if tensor is None else tensor[self.start : self.stop]

    def __str__(self) -> str:
        if self.start is self.stop is None:
            return self.name
        start, stop = ("" if end is None else end for end in (self.start, self.stop))
        return f"{self.name}[{start}:{stop}]"


@dataclass(frozen=True)
class Anatomy:
    """Names of a ViT's parts, as in ``model.state_dict()``, and the sizes that go with them.

    Attributes
    ----------
    family : str
        Which library's model it is, for messages.
    image_size : (int, int)
        Height and width in pixels.
    patch_weight, patch_bias : str, str or None
        Patch embedding: weight of shape (d, C, P, P) or, of flattened patches, (d, p); bias (d,).
    patch_size : (int, int) or None
        Height and width in pixels; ``dissect`` reads it off a convolution.
    channels : int or None
        C, of the picture; ``dissect`` reads it off the weight.
    pixel_order : str
        In which order the weight reads a patch, the slowest first: ``"c h w"`` of a convolution.
    head_weight, head_bias : str or None
        The layer that gives the logits: (classes, d) and (classes,).
    position : str or None
        Position embedding, parameter or buffer, of shape (…, rows, d).
    position_prefix : int
        Its rows before the first patch (class token, registers); 0 where only patches are embedded.
    resizes : bool
        Whether the library can interpolate the position embedding for pictures of another size.
    resampling : Tensor (rows', rows) or None
        R, where it does: the tokens get E' = R E, the prefix's rows among them.
    prefix : tuple of str
        Parameters of the tokens before the patches: class token, distillation token, registers.
    query, key, value, query_bias, key_bias, value_bias : Rows or None
        The first attention's projections, (d, d) and (d,); of a layer that has an adapter, its frozen
        weight.
    adapters : tuple of str
        LoRA's factors A, (r, d) each, that read the first attention's input: those of its query, key and
        value, or of the three fused. The rows of their gradients lie in the span of that input's tokens.
    norm_weight, norm_bias : str or None
        The norm right before the first attention, (d,) each; None in architecture A.
    embedding_norm_weight, embedding_norm_bias : str or None
        LayerNorm between the embedding and the first block (CLIP), (d,) each.
    first_block : {"april", "postnorm", "prenorm", "two norms", "rmsnorm", "unknown"}
        What stands between the tokens and the first attention: nothing and no way around the
        attention; nothing, with a residual around it; one LayerNorm; one LayerNorm after another;
        one RMSNorm; something else.
    heads : int or None
    preprocessing : Preprocessing
        Pixels to model input, as the library's own recipe for this model has it (public knowledge).
    root : str
        Path of the module that turns model input into logits: ``""`` where it is the whole model,
        ``"1"`` in ``nn.Sequential(normalize, vit)``.
    vit : str
        Path of the ViT itself; it differs from ``root`` where its head stands beside it.
    remark : str
        What the reader should know: a second ViT in the model, positions that are rotary.
    """

    family: str
    image_size: tuple[int, int]
    patch_weight: str
    patch_bias: str | None = None
    patch_size: tuple[int, int] | None = None
    channels: int | None = None
    pixel_order: str = CONVOLUTION
    head_weight: str | None = None
    head_bias: str | None = None
    position: str | None = None
    position_prefix: int = 0
    resizes: bool = False
    resampling: Tensor | None = field(default=None, repr=False, compare=False)
    prefix: tuple[str, ...] = ()
    query: Rows | None = None
    key: Rows | None = None
    value: Rows | None = None
    query_bias: Rows | None = None
    key_bias: Rows | None = None
    value_bias: Rows | None = None
    adapters: tuple[str, ...] = ()
    norm_weight: str | None = None
    norm_bias: str | None = None
    embedding_norm_weight: str | None = None
    embedding_norm_bias: str | None = None
    first_block: str = "unknown"
    heads: int | None = None
    preprocessing: Preprocessing = UNIT
    root: str = ""
    vit: str = ""
    remark: str = ""

    @property
    def tiling(self) -> Tiling:
        """How the picture is cut into patches.

        Raises
        ------
        ValueError
            If the size of a patch is not known: this is no anatomy that ``dissect`` made.
        """
        if self.patch_size is None:
            raise ValueError("the anatomy has no patch_size: take it from dissect(model, …)")
        return Tiling(self.patch_size, self.image_size, self.pixel_order)

    @property
    def ignores_mean(self) -> bool:
        """Whether only LayerNorms read the tokens: then each row of ∂l/∂E sums to zero."""
        return self.first_block in ("prenorm", "two norms")

    def tensor_names(self) -> set[str]:
        """Names of all tensors of the model that an attack may read."""
        found = {name for part in NAME_FIELDS if (name := getattr(self, part)) is not None}
        found |= {rows.name for part in ROW_FIELDS if (rows := getattr(self, part)) is not None}
        return found | set(self.prefix) | set(self.adapters)

    def renamed(self, to: Callable[[str], str]) -> Anatomy:
        """The same with every tensor's name exchanged.

        >>> Anatomy("mine", (32, 32), "stem.weight", prefix=("cls",)).renamed("vit.{}".format).prefix
        ('vit.cls',)
        """
        changes: dict[str, Any] = {part: tuple(map(to, getattr(self, part))) for part in TUPLE_FIELDS}
        for part in NAME_FIELDS:
            if (name := getattr(self, part)) is not None:
                changes[part] = to(name)
        for part in ROW_FIELDS:
            if (rows := getattr(self, part)) is not None:
                changes[part] = replace(rows, name=to(rows.name))
        return replace(self, **changes)

    def names(self) -> dict[str, str]:
        """Part to tensor name, for every part the model has: what a report or an error prints.

        Examples
        --------
        >>> Anatomy("mine", (32, 32), "stem.weight", query=Rows("qkv.weight", 0, 64)).names()
        {'patch_weight': 'stem.weight', 'query': 'qkv.weight[0:64]'}
        """
        found = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Rows):
                found[part.name] = str(value)
            elif part.name in TUPLE_FIELDS and value:
                found[part.name] = ", ".join(value)
            elif part.name in NAME_FIELDS and value is not None:
                found[part.name] = value
        return found


#: Fields of :class:`Anatomy` that name one tensor, those that name several, and those that name rows of one.
NAME_FIELDS = (
    "patch_weight", "patch_bias", "head_weight", "head_bias", "position", "norm_weight", "norm_bias",
    "embedding_norm_weight", "embedding_norm_bias",
)  # fmt: skip
TUPLE_FIELDS = ("prefix", "adapters")
ROW_FIELDS = ("query", "key", "value", "query_bias", "key_bias", "value_bias")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of ``model`` by name, detached: what the server holds.

    Examples
    --------
    >>> from torch import nn
    >>> {name: tuple(t.shape) for name, t in tensors_of(nn.Linear(3, 2)).items()}
    {'weight': (2, 3), 'bias': (2,)}
    """
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
