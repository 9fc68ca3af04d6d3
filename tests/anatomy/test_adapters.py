"""peft's adapters: which factors read the first attention's input, and which copies the
forward pass uses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_vit
from torch import Tensor, nn
from vit_families import made, of_timm, of_torchvision, of_transformers, picture, shared

import aprillab as al
from aprillab.anatomy import dissect, tensors_of
from aprillab.anatomy.adapters import kinds_of, without_adapters

peft = pytest.importorskip("peft")

OWN = ["query", "key", "value"]


def of_own(**options: Any) -> nn.Module:
    return made(lambda: tiny_vit(**options))


def of_hugging_face(name: str = "ViTForImageClassification", **options: Any) -> nn.Module:
    return made(lambda: of_transformers(name, **options))


def projections(model: nn.Module) -> list[str]:
    """The names of q, k and v, which versions 4 and 5 of transformers spell differently."""
    leaves = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    return ["q_proj", "k_proj", "v_proj"] if "q_proj" in leaves else OWN


def with_lora(model: nn.Module, targets: list[str], *, b: bool = True, **options: Any) -> Any:
    """An adapted model in which no B is zero, as after the first step."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name and b:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
        elif "lora_A" in name:
            parameter.data = parameter.data.to(next(model.parameters()))
    return adapted


def inputs_of_attention(model: nn.Module, anatomy: al.Anatomy, images: Tensor) -> Tensor:
    """u (n + 1, d): what the norm before the first attention gives."""
    seen: list[Tensor] = []
    module = model.get_submodule((anatomy.norm_weight or "").rpartition(".")[0])
    handle = module.register_forward_hook(lambda _m, _given, out: seen.append(out.detach()))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[0].flatten(0, -2)


def outside(rows: Tensor, u: Tensor) -> float:
    """How much of the rows lies outside the span of u, relative."""
    Q = torch.linalg.qr(u.T.double()).Q
    rows = rows.double()
    return float((rows - rows @ Q @ Q.T).norm() / rows.norm())


FAMILIES = {
    "own": (of_own, OWN, 3),
    "own, q and v": (of_own, ["query", "value"], 2),
    "timm, fused": (lambda: made(lambda: of_timm("vision_transformer.VisionTransformer")), ["qkv"], 1),
    "transformers": (of_hugging_face, None, 3),
    "CLIP": (lambda: of_hugging_face("CLIPForImageClassification"), None, 3),
    "torchvision": (lambda: made(of_torchvision), ["self_attention"], 1),
}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_named_factors_lie_in_the_span_of_the_first_inputs(family: str, options: dict[str, Any]) -> None:
    build, targets, factors = FAMILIES[family]
    base = build()
    if family == "torchvision" and options.get("use_dora"):
        pytest.skip("peft has no DoRA for nn.MultiheadAttention")
    model = with_lora(base, targets or projections(base), **options)
    anatomy = dissect(model)
    assert len(anatomy.adapters) == factors
    assert all(name in tensors_of(model) for name in anatomy.tensor_names())
    assert anatomy.tensor_names() >= set(anatomy.adapters)
    assert "base_layer" in anatomy.query.name
    assert not dict(model.named_parameters())[anatomy.query.name].requires_grad
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    update = shared(model, images)
    u = inputs_of_attention(model, anatomy, images)
    for name in anatomy.adapters:
        assert update.gradients[name].any(), name
        assert outside(update.gradients[name], u) < 1e-11, name
    # The bare model has the same parts under the same paths, and is the anatomy of the model
    # without adapters.
    plain = dissect(build())
    assert (anatomy.heads, anatomy.first_block, anatomy.image_size) == (
        plain.heads, plain.first_block, plain.image_size,
    )  # fmt: skip
    assert anatomy.patch_weight == f"base_model.model.{plain.patch_weight}"
    assert str(anatomy.key).endswith(str(plain.key).rpartition(".")[2])


def test_factors_of_other_layers_are_not_named() -> None:
    model = with_lora(of_own(), ["mlp.0", "mlp.2", "output"])
    anatomy = dissect(model)
    assert any("blocks.0" in n and "lora_A" in n for n, p in model.named_parameters() if p.requires_grad)
    assert anatomy.adapters == ()
    assert anatomy.query.name == "base_model.model.blocks.0.attention.query.weight"
    update = al.client_update(model, torch.zeros(1, 3, *anatomy.image_size).double(), torch.tensor([3]))
    with pytest.raises(al.AttackNotApplicable, match=r"None of them is known to read the first attention's input"):
        al.invert(model, update, attack="span")


def test_the_trained_head_is_the_saved_one_and_gives_the_label() -> None:
    base = of_hugging_face()
    model = with_lora(base, projections(base)[::2], modules_to_save=["classifier"], b=False)
    anatomy = dissect(model)
    assert anatomy.head_weight == "base_model.model.classifier.modules_to_save.default.weight"
    assert anatomy.head_bias == "base_model.model.classifier.modules_to_save.default.bias"
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    found = al.recover_labels(model, shared(model, images, label=2))
    assert found.labels.tolist() == [2]
    assert found.exact


def test_of_lora_on_the_head_the_factor_b_gives_the_label() -> None:
    model = with_lora(of_own(), ["query", "head"])
    anatomy = dissect(model)
    assert anatomy.head_weight == "base_model.model.head.lora_B.default.weight"
    assert anatomy.head_bias is None
    update = shared(model, picture(model, anatomy), label=1)
    assert al.recover_labels(model, update).labels.tolist() == [1]


def test_an_adapters_file_is_an_update_though_it_lacks_the_adapters_name() -> None:
    """What peft's clients save and send: ``….lora_A.weight``, ``….head.weight``."""
    model = with_lora(of_own(), ["query", "value"], modules_to_save=["head"], use_dora=True)
    before = {name: t.clone() for name, t in peft.get_peft_model_state_dict(model).items()}
    update = shared(model, picture(model, dissect(model)), label=4)
    trained = dict(model.named_parameters())
    with torch.no_grad():
        for name, g in update.gradients.items():
            trained[name].sub_(0.1 * g)
    sent = al.update_from_states(before, peft.get_peft_model_state_dict(model), learning_rate=0.1)
    assert not set(sent.gradients) & set(trained)
    assert al.recover_labels(model, sent).labels.tolist() == [4]
    for name, g in al.update.fitted(model, sent).gradients.items():
        torch.testing.assert_close(g, update.gradients[name], rtol=1e-6, atol=1e-9)


def test_any_adapters_name_and_only_those_in_use() -> None:
    model = with_lora(of_own(), ["query"])
    model.add_adapter("second one", peft.LoraConfig(r=2, target_modules=["query", "value"]))
    at = "base_model.model.blocks.0.attention"
    assert dissect(model).adapters == (f"{at}.query.lora_A.default.weight",)
    model.set_adapter("second one")
    expected = (f"{at}.query.lora_A.second one.weight", f"{at}.value.lora_A.second one.weight")
    assert dissect(model).adapters == expected
    model.base_model.disable_adapter_layers()
    assert dissect(model).adapters == ()


class Wrapped(nn.Module):
    """Pixels to logits, whatever the model returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model

    def forward(self, images: Tensor) -> Tensor:
        return al.update.logits_of(self.backbone, images)


def test_within_wrappers_and_beside_a_frozen_teacher() -> None:
    student = with_lora(of_own(), ["query", "value"], modules_to_save=["head"])
    model = nn.ModuleDict({"teacher": of_own().requires_grad_(False), "student": Wrapped(student)})
    anatomy = dissect(model)
    assert anatomy.root == "student.backbone.base_model.model"
    assert anatomy.adapters[0].startswith("student.backbone.base_model.model.blocks.0.attention.query.lora_A")
    assert anatomy.head_bias == "student.backbone.base_model.model.head.modules_to_save.default.bias"


def test_a_head_beside_an_adapted_backbone() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = of_hugging_face("ViTModel")
            self.classifier = nn.Linear(96, 5)

    base = Both()
    model = with_lora(base, projections(base), modules_to_save=["classifier"])
    anatomy = dissect(model)
    assert anatomy.head_weight == "base_model.model.classifier.modules_to_save.default.weight"
    assert (anatomy.root, anatomy.vit) == ("base_model.model", "base_model.model.backbone")


@pytest.mark.parametrize("kind", ["modules_to_save", "LNTuning"])
def test_of_a_saved_norm_the_copy_in_use_is_read(kind: str) -> None:
    if kind == "LNTuning":
        model = peft.get_peft_model(of_own(), peft.LNTuningConfig(target_modules=["attention_norm"])).eval()
        copy = "base_model.model.blocks.0.attention_norm.ln_tuning_layers.default.weight"
    else:
        model = with_lora(of_own(), ["query"], modules_to_save=["attention_norm"])
        copy = "base_model.model.blocks.0.attention_norm.modules_to_save.default.weight"
    anatomy = dissect(model)
    assert anatomy.norm_weight == copy
    assert anatomy.first_block == "prenorm"
    # Indeed the one in use: what it is changed to changes what the attention is given.
    images = picture(model, anatomy)
    with torch.no_grad():
        before = model(images)
        tensors_of(model)[copy].mul_(2)
        assert not torch.equal(model(images), before)


def test_a_saved_embedding_is_read_and_an_adapted_one_is_unknown() -> None:
    base = of_hugging_face()
    model = with_lora(base, projections(base), modules_to_save=["embeddings"])
    anatomy = dissect(model)
    saved = "base_model.model.vit.embeddings.modules_to_save.default"
    assert anatomy.position == f"{saved}.position_embeddings"
    assert anatomy.patch_weight == f"{saved}.patch_embeddings.projection.weight"
    model = with_lora(of_own(), ["query", "patch_embedding"], modules_to_save=["head"])
    anatomy = dissect(model)
    assert anatomy.first_block == "unknown"
    update = shared(model, picture(model, anatomy), label=2)
    with pytest.raises(
        al.AttackNotApplicable, match=r"adapter \(LoRA\) sits on .*patch_embedding, .*merge_and_unload"
    ):
        al.invert(model, update, attack="span")
    assert al.recover_labels(model, update).labels.tolist() == [2]
    assert dissect(model.merge_and_unload()).adapters == ()
    model = with_lora(of_own(), ["query", "patch_embedding"])
    model.base_model.merge_adapter()  # then the tensor itself is what the forward pass uses
    anatomy = dissect(model)
    assert anatomy.patch_weight == "base_model.model.patch_embedding.base_layer.weight"
    assert anatomy.first_block == "prenorm"


OTHERS = {
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["query"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["query"]),
    "ia3": lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["query"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=["query"]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["query"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_another_kind_are_named_and_refused(kind: str) -> None:
    model = peft.get_peft_model(of_own().float(), OTHERS[kind]()).eval()
    anatomy = dissect(model)
    assert anatomy.adapters == ()
    assert anatomy.remark == f"adapters that no attack reads: {kind} at base_model.model.blocks.0.attention.query"
    gradients = {n: torch.ones_like(p) for n, p in model.named_parameters() if p.requires_grad}
    said = next(name.casefold() for name in kinds_of(gradients))
    assert said == kind
    with pytest.raises(al.AttackNotApplicable, match=r"Of adapters a closed form reads LoRA's and DoRA's factors A"):
        al.invert(model, al.ClientUpdate(gradients), attack="embedding")


def test_without_peft_a_model_is_its_own_bare_self() -> None:
    model = of_own()
    bare = without_adapters(model)
    assert bare.model is model
    assert bare.real("blocks.0.attention.query.weight") == "blocks.0.attention.query.weight"


def test_factors_of_another_library_can_be_named() -> None:
    model = of_own()
    model.blocks[0].attention.register_parameter("A", nn.Parameter(torch.zeros(4, 24).double()))
    assert dissect(model, adapters="blocks.0.attention.A").adapters == ("blocks.0.attention.A",)
    with pytest.raises(ValueError, match=r"adapter 'head.bias' must have shape \(r, 24\), not \(5,\)"):
        dissect(model, adapters=("head.bias",))
