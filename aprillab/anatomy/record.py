"""The names of a Vision Transformer's parts, and the tensors they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor, nn

from ..preprocessing import UNIT, Preprocessing


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
        Patch embedding: weight of shape (d, C, P, P), bias of shape (d,).
    head_weight, head_bias : str or None
        The classifier: (classes, d) and (classes,).
    position : str or None
        Position embedding, parameter or buffer, of shape (…, rows, d).
    position_prefix : int
        Its rows before the first patch (class token, registers); 0 where only patches are embedded.
    prefix : tuple of str
        Parameters of the tokens before the patches: class token, distillation token, registers.
    query, key, value, query_bias, key_bias, value_bias : Rows or None
        The first attention's projections, (d, d) and (d,).
    norm_weight, norm_bias : str or None
        LayerNorm before the first attention, (d,) each; None in architecture A.
    first_block : {"april", "prenorm", "unknown"}
        What stands between the tokens and the first attention: nothing, one LayerNorm, something
        else.
    heads : int or None
    preprocessing : Preprocessing
        Pixels to model input, as the library's own recipe for this model has it (public knowledge).
    """

    family: str
    image_size: tuple[int, int]
    patch_weight: str
    patch_bias: str | None = None
    head_weight: str | None = None
    head_bias: str | None = None
    position: str | None = None
    position_prefix: int = 0
    prefix: tuple[str, ...] = ()
    query: Rows | None = None
    key: Rows | None = None
    value: Rows | None = None
    query_bias: Rows | None = None
    key_bias: Rows | None = None
    value_bias: Rows | None = None
    norm_weight: str | None = None
    norm_bias: str | None = None
    first_block: str = "unknown"
    heads: int | None = None
    preprocessing: Preprocessing = UNIT
    root: str = ""

    def tensor_names(self) -> set[str]:
        """Names of all tensors of the model that an attack may read."""
        found = {name for field in NAME_FIELDS if (name := getattr(self, field)) is not None}
        found |= {rows.name for field in ROW_FIELDS if (rows := getattr(self, field)) is not None}
        return found | set(self.prefix)

    def names(self) -> dict[str, str]:
        """Part to tensor name, for every part the model has: what a report or an error prints.

        Examples
        --------
        >>> Anatomy("mine", (32, 32), "stem.weight", query=Rows("qkv.weight", 0, 64)).names()
        {'patch_weight': 'stem.weight', 'query': 'qkv.weight[0:64]'}
        """
        found = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Rows):
                found[field.name] = str(value)
            elif field.name == "prefix" and value:
                found[field.name] = ", ".join(value)
            elif field.name in NAME_FIELDS and value is not None:
                found[field.name] = value
        return found


#: Fields of :class:`Anatomy` that name one tensor, and those that name rows of one.
NAME_FIELDS = ("patch_weight", "patch_bias", "head_weight", "head_bias", "position", "norm_weight", "norm_bias")
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
