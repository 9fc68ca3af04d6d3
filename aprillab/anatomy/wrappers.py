"""Which Vision Transformer of a larger module is meant, and what stands around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .adapters import Bare
from .readers.known import READERS, Reader
from .readers.parts import last_linear
from .readers.timm import looks_like_timm, read_timm
from .record import Anatomy, UnknownModelError

_NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Found:
    """A Vision Transformer at ``path`` in the bare model, who reads it, and whether anything in it is trained."""

    path: str
    module: nn.Module
    reader: Reader
    trained: bool


def vits_in(model: nn.Module, bare: Bare) -> list[Found]:
    """The outermost Vision Transformers among the modules of the bare model, in their order.

    Those of known classes; where there is none, those that look like timm's.
    """
    return _outermost(model, bare, _by_class) or _outermost(model, bare, _by_looks)


def _outermost(model: nn.Module, bare: Bare, reader_of: Callable[[nn.Module], Reader | None]) -> list[Found]:
    found: list[Found] = []
    for path, module in bare.model.named_modules():
        if any(is_in(path, other.path) for other in found):
            continue
        reader = reader_of(module)
        if reader is not None:  # whether it is trained, its adapters tell
            parameters = model.get_submodule(bare.real(path)).parameters()
            found.append(Found(path, module, reader, any(parameter.requires_grad for parameter in parameters)))
    return found


def _by_class(module: nn.Module) -> Reader | None:
    names = (f"{base.__module__}.{base.__name__}" for base in type(module).__mro__)
    return next((READERS[name] for name in names if name in READERS), None)


def _by_looks(module: nn.Module) -> Reader | None:
    return read_timm if looks_like_timm(module) else None


def choose(vits: list[Found], wanted: str | None) -> tuple[Found, str]:
    """The Vision Transformer to read, and a remark where there are several.

    Parameters
    ----------
    vits : list of Found, at least one
    wanted : str or None
        Path of a module, or of a tensor, that belongs to the one that is meant.

    Raises
    ------
    UnknownModelError
        If none has that path, or several are trained and none is named.
    """
    names = ", ".join(repr(found.path) for found in vits)
    if wanted is not None:
        fitting = [f for f in vits if is_in(f.path, wanted) or is_in(wanted, f.path)]
        if len(fitting) != 1:
            raise UnknownModelError(f"vit={wanted!r} is not one of them: the Vision Transformers are at {names}")
    elif len(vits) == 1:
        return vits[0], ""
    else:
        fitting = [found for found in vits if found.trained] or vits[:1]
        if len(fitting) > 1:
            trained = ", ".join(repr(found.path) for found in fitting)
            raise UnknownModelError(
                f"{len(fitting)} Vision Transformers of this model are trained, {trained}: say which one the update "
                f"is of, as in dissect(model, vit={fitting[-1].path!r})"
            )
    if len(vits) == 1:
        return fitting[0], ""
    listed = [f"{found.path!r}{'' if found.trained else ' (frozen)'}" for found in vits]
    remark = (
        f"{_NUMBERS.get(len(vits), len(vits))} ViTs in this model: {', '.join(listed[:-1])} and {listed[-1]}; "
        f"read is {fitting[0].path!r}"
    )
    return fitting[0], remark


def seen_from_outside(model: nn.Module, anatomy: Anatomy, path: str, vits: list[Found]) -> Anatomy:
    """The anatomy of a ViT at ``path`` under the names of the whole model, a head outside included."""
    found = _with_path(anatomy, path)
    if not path or found.head_weight is not None:
        return replace(found, root=path, vit=path)
    head = _head_outside(model, path, vits)
    if not head:
        return replace(found, root=path, vit=path)
    common = [a for a, b in zip(path.split("."), (head["head_weight"] or "").split("."), strict=False) if a == b]
    start = path.split(".")[: len(common)]
    return replace(found, **head, vit=path, root=".".join(start) if common == start else "")


def last_head(model: nn.Module, width: int) -> dict[str, Any]:
    """The model's last layer, if it is linear and is no layer of width d: what gives the logits."""
    layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    if not layers or not isinstance(layers[-1], nn.Linear) or layers[-1].out_features == width:
        return {}
    return last_linear(model, "")


def is_in(path: str, module: str) -> bool:
    """Whether ``path`` is the module itself or lies in it.

    >>> is_in("student.vit", "student"), is_in("students", "student"), is_in("a", "")
    (True, False, True)
    """
    return not module or path == module or path.startswith(f"{module}.")


def _head_outside(model: nn.Module, path: str, vits: list[Found]) -> dict[str, Any]:
    """The last linear layer of the one module beside a headless ViT that has any.

    Looked for from the inside out: the wrapper of a student comes before its teacher's.
    """
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        outer = ".".join(parts[:depth])
        wrapper = model.get_submodule(outer)
        beside = {
            name: head
            for name, child in wrapper.named_children()
            if (full := f"{outer}.{name}" if outer else name)
            and not is_in(path, full)
            and not any(is_in(other.path, full) for other in vits)
            and (head := last_linear(child, full))
        }
        if len(beside) == 1:
            return next(iter(beside.values()))
        if beside:
            return {}
    return {}


def _with_path(anatomy: Anatomy, path: str) -> Anatomy:
    """The same anatomy seen from a model that holds the ViT as a submodule."""
    return anatomy.renamed(f"{path}.{{}}".format) if path else anatomy
