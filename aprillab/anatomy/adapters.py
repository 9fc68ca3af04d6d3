"""A model that peft put adapters into: seen without them, and which of them read what an attack reads.

LoRA (Hu et al., ICLR 2022) adds B A u to a frozen layer W u. The gradient of its factor A is
Bᵀ Σ_i δ_i u_iᵀ: its rows lie in the span of the layer's inputs, as those of W's own gradient do. DoRA scales
the sum of both by row, which changes the δ_i alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .record import Anatomy, Rows, tensors_of

_TUNER = "peft.tuners.tuners_utils.BaseTunerLayer"
_LORA = "peft.tuners.lora.layer.LoraLayer"
_SAVED = ("peft.utils.other.ModulesToSaveWrapper", "peft.utils.other.AuxiliaryTrainingWrapper")
#: LoRA's layers whose A does not read what the layer is given, token by token.
_OTHER_LORA = ("ParamWrapper", "Embedding")
#: Parts of tensors' names, and whose they are.
_KINDS = {
    "lora_E": "AdaLoRA", "lora_A": "LoRA", "lora_B": "LoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa",
    "lokr_": "LoKr", "ia3_": "IA3", "boft_": "BOFT", "oft_": "OFT", "vera_lambda": "VeRA", "randlora_": "RandLoRA",
    "fourierft_": "FourierFT", "hra_u": "HRA", "prompt_encoder": "prompt or prefix tuning", "prompt": "prompt tuning",
    "prefix": "prefix tuning", "adapter": "bottleneck adapters", "lora_": "a kind of LoRA",
}  # fmt: skip


@dataclass(frozen=True)
class Bare:
    """A model as it is without the wrappers that peft puts around its layers.

    Attributes
    ----------
    model : nn.Module
        The same modules with the same tensors; where a layer was wrapped, the layer that computes. It
        is there to be read, not to be run. The model itself where nothing is wrapped.
    paths : dict of str to str
        From a module's path there to its path in the model.
    tuned : dict of str to (str, nn.Module)
        Paths there of the layers that have adapters; the wrappers' paths in the model, and the wrappers.
    """

    model: nn.Module
    paths: dict[str, str] = field(default_factory=dict)
    tuned: dict[str, tuple[str, nn.Module]] = field(default_factory=dict)

    def real(self, name: str) -> str:
        """The path of a module, or the name of a tensor, in the model.

        >>> Bare(nn.Module(), {"": "", "head": "head.modules_to_save.default"}).real("head.weight")
        'head.modules_to_save.default.weight'
        """
        owner, _, leaf = name.rpartition(".")
        return self.paths[name] if name in self.paths else _join(self.paths.get(owner, owner), leaf)

    def seen(self, name: str) -> str:
        """The other way: what a name of the model is called here; itself where it is nothing here."""
        back = {path: seen for seen, path in self.paths.items()}
        owner, _, leaf = name.rpartition(".")
        return back[name] if name in back else _join(back[owner], leaf) if owner in back else name


def without_adapters(model: nn.Module) -> Bare:
    """The model without peft's wrappers, whatever the kind of adapter.

    Of a module that is saved with the adapters (``modules_to_save``, a tuned LayerNorm) the copy that the
    forward pass uses is taken.
    """
    if not any(_is_a(module, _TUNER, *_SAVED) for module in model.modules()):
        return Bare(model, {path: path for path, _ in model.named_modules(remove_duplicate=False)})
    paths, tuned = dict[str, str](), dict[str, tuple[str, nn.Module]]()
    return Bare(_bare(model, "", "", paths, tuned), paths, tuned)


def _bare(
    module: nn.Module, real: str, seen: str, paths: dict[str, str], tuned: dict[str, tuple[str, nn.Module]]
) -> nn.Module:
    """A module at ``real`` as the bare model has it at ``seen``; what was taken off is noted."""
    while (inside := _inside(module)) is not None:
        if _is_a(module, _TUNER) and _works(module) and "ln_tuning_layers" not in inside:
            tuned[seen] = real, module
        real, module = _join(real, inside), module.get_submodule(inside)
    paths[seen] = real
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    children = {
        name: child if child is None else _bare(child, _join(real, name), _join(seen, name), paths, tuned)
        for name, child in module.__dict__["_modules"].items()
    }
    view.__dict__["_modules"] = children
    return view


def _inside(module: nn.Module) -> str | None:
    """Path within a wrapper of the layer that computes; None where the module is no wrapper."""
    parts: Any = module.__dict__["_modules"]
    copies = next((name for name in ("modules_to_save", "ln_tuning_layers") if name in parts), None)
    wrapped = _is_a(module, _TUNER, *_SAVED)
    if wrapped and copies is not None and not _flag(module, "disable_adapters"):
        used = [name for name in _active(module) if name in parts[copies]]
        if used and not _flag(module, "merged"):
            return f"{copies}.{used[-1]}"
    return next((name for name in ("base_layer", "original_module") if wrapped and name in parts), None)


def _active(module: Any) -> list[str]:
    """The adapters in use, in a form that all versions have."""
    active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", [])
    return [active] if isinstance(active, str) else list(active)


def _works(module: nn.Module) -> bool:
    """Whether a wrapper adds to its layer: an adapter that is switched off, or merged into it, does not."""
    return not _flag(module, "disable_adapters") and not _flag(module, "merged")


def _flag(module: Any, name: str) -> bool:
    return bool(getattr(module, name, False))


def _is_a(module: nn.Module, *classes: str) -> bool:
    """By the full names of its classes: peft need not be installed."""
    return any(f"{base.__module__}.{base.__qualname__}" in classes for base in type(module).__mro__)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


# --- In an anatomy ------------------------------------------------------------------------------------------------


def with_adapters(model: nn.Module, anatomy: Anatomy, bare: Bare) -> Anatomy:
    """The anatomy of a bare model under the names of the model itself, its adapters named.

    Where an adapter sits on a tensor whose *values* an attack reads, such as the patch embedding, what stands
    before the first attention counts as unknown, and the remark says why: the labels can still be read.
    """
    found = replace(anatomy.renamed(bare.real), root=bare.real(anatomy.root), vit=bare.real(anatomy.vit))
    tensors = tensors_of(model)
    factors, others = dict[str, None](), dict[str, None]()  # ordered sets
    for part in ("query", "key", "value"):
        rows: Rows | None = getattr(anatomy, part)
        path = rows.name.rpartition(".")[0] if rows is not None else ""
        if rows is None or path not in bare.tuned:
            continue
        at, layer = bare.tuned[path]
        names = [f"{at}.lora_A.{name}.weight" for name in _active(layer) if _reads_inputs(layer, name)]
        width = tensors[bare.real(rows.name)].shape[-1]
        read = [name for name in names if name in tensors and tensors[name].shape[1:] == (width,)]
        factors |= dict.fromkeys(read)
        if not read:
            others[f"{_kind_of(layer)} at {at}"] = None
    found = _with_tuned_head(model, found, anatomy.head_weight, bare)
    remarks = [anatomy.remark, f"adapters that no attack reads: {', '.join(others)}" if others else ""]
    if on_values := _on_values(anatomy, bare):
        found, remarks = replace(found, first_block="unknown"), [*remarks, on_values]
    return replace(found, adapters=tuple(factors), remark="; ".join(filter(None, remarks)))


def _reads_inputs(layer: Any, adapter: str) -> bool:
    """Whether the rows of A's gradient lie in the span of the layer's inputs: plain LoRA's and DoRA's do."""
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    plain = variant is None or type(variant).__name__.startswith("Dora")
    return plain and _is_a(layer, _LORA) and type(layer).__name__ not in _OTHER_LORA and hasattr(layer, "lora_A")


def _on_values(anatomy: Anatomy, bare: Bare) -> str:
    """A sentence where an adapter makes the values of the embedding or of the norms others than the tensors have."""
    names = [
        anatomy.patch_weight, anatomy.patch_bias, anatomy.position, *anatomy.prefix, anatomy.norm_weight,
        anatomy.norm_bias, anatomy.embedding_norm_weight, anatomy.embedding_norm_bias,
    ]  # fmt: skip
    for name in names:
        owner = (name or "").rpartition(".")[0]
        if name is not None and owner in bare.tuned:
            path, layer = bare.tuned[owner]
            return (
                f"an adapter ({_kind_of(layer)}) sits on {path}, so the model does not compute with "
                f"{bare.real(name)} as it stands, whose values the attacks read: merge the adapters into the model "
                "(peft's merge_and_unload()), or leave that layer out of target_modules"
            )
    return ""


def _with_tuned_head(model: nn.Module, found: Anatomy, head: str | None, bare: Bare) -> Anatomy:
    """Where LoRA sits on a frozen head, ∂l/∂B = r (A f)ᵀ stands for the head's own r fᵀ."""
    owner = (head or "").rpartition(".")[0]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if head is None or owner not in bare.tuned or found.head_weight in trained:
        return found
    at, layer = bare.tuned[owner]
    names = [f"{at}.lora_B.{name}.weight" for name in _active(layer) if _reads_inputs(layer, name)]
    used = [name for name in names if name in trained]
    if not used:
        return found
    return replace(found, head_weight=used[0], head_bias=found.head_bias if found.head_bias in trained else None)


# --- In words -----------------------------------------------------------------------------------------------------


def _kind_of(layer: nn.Module) -> str:
    """The name of an adapter, from its class's module: ``peft.tuners.loha.layer`` is loha's."""
    variants = [type(variant).__name__ for variant in dict(getattr(layer, "lora_variant", None) or {}).values()]
    module = type(layer).__module__
    folder = module.split(".")[2] if module.count(".") > 2 else type(layer).__name__
    return " ".join([{"lora": "LoRA"}.get(folder, folder), *variants])


def kinds_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Which of these tensors are adapters', by their kind as their names tell it.

    >>> kinds_of(["blocks.0.attn.qkv.hada_w1_a.default", "head.weight"])
    {'LoHa': ['blocks.0.attn.qkv.hada_w1_a.default']}
    """
    found: dict[str, list[str]] = {}
    names = list(names)
    # AdaLoRA's factors are called as LoRA's are, but for a third one.
    ada = any("lora_E" in name for name in names)
    for name in names:
        kind = next((kind for part, kind in _KINDS.items() if part in name), None)
        if kind is not None:
            found.setdefault("AdaLoRA" if ada and kind == "LoRA" else kind, []).append(name)
    return found


def what_adapters(anatomy: Anatomy, shared: Mapping[str, Any]) -> str:
    """A sentence on the adapters among what is shared, for a refusal; empty where there are none.

    >>> what_adapters(Anatomy("mine", (8, 8), "stem.weight"), {"mlp.lora_A.weight": 0})[2:83]
    'The base is frozen, and adapters are trained: LoRA (mlp.lora_A.weight). None of t'
    """
    kinds = kinds_of(shared)
    if not kinds:
        return ""
    listed = [
        f"{kind} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
        for kind, names in kinds.items()
    ]
    words = f". The base is frozen, and adapters are trained: {', '.join(listed)}. "
    read = [name for name in anatomy.adapters if name in shared]
    if read:
        return words + f"The span attack reads {', '.join(read)}: attack='span'"
    if set(kinds) <= {"LoRA", "DoRA"}:
        return words + (
            "None of them is known to read the first attention's input, as a closed form needs (if one does: "
            "dissect(model, adapters=…))"
        )
    return words + "Of adapters a closed form reads LoRA's and DoRA's factors A of the first attention's projections"
