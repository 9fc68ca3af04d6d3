"""Every family that dissect() reads, attacked: the names are right if the true picture comes back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from torch import nn
from vit_families import db, made, of_monai, of_naflex, of_timm, of_torchvision, of_transformers, picture, shared

import aprillab as al

Build = Callable[[], nn.Module]
VIT = "vision_transformer.VisionTransformer"

# Model, what stands before its first attention, tokens before the patches.
FAMILIES: dict[str, tuple[Build, str, int]] = {
    "torchvision": (of_torchvision, "prenorm", 1),
    "transformers ViT": (partial(of_transformers, "ViTForImageClassification"), "prenorm", 1),
    "transformers DeiT": (partial(of_transformers, "DeiTForImageClassification"), "prenorm", 2),
    "transformers DeiT, teacher": (
        partial(of_transformers, "DeiTForImageClassificationWithTeacher"), "prenorm", 2,
    ),
    "transformers Dinov2": (
        partial(of_transformers, "Dinov2ForImageClassification", mlp_ratio=1), "prenorm", 1,
    ),
    "transformers Dinov2, registers": (
        partial(of_transformers, "Dinov2WithRegistersForImageClassification", mlp_ratio=1, num_register_tokens=2),
        "prenorm", 3,
    ),
    "transformers ViTMSN": (partial(of_transformers, "ViTMSNForImageClassification"), "prenorm", 1),
    "transformers BEiT": (
        partial(
            of_transformers, "BeitForImageClassification", use_absolute_position_embeddings=True,
            use_relative_position_bias=True,
        ),
        "prenorm", 1,
    ),
    "transformers BEiT, one relative bias": (
        partial(
            of_transformers, "BeitForImageClassification", use_absolute_position_embeddings=True,
            use_shared_relative_position_bias=True,
        ),
        "prenorm", 1,
    ),
    "transformers CLIP": (partial(of_transformers, "CLIPForImageClassification"), "two norms", 1),
    "transformers SigLIP": (partial(of_transformers, "SiglipForImageClassification"), "prenorm", 0),
    "timm ViT": (partial(of_timm, VIT), "prenorm", 1),
    "timm ViT, RMSNorm": (partial(of_timm, VIT, norm_layer="rmsnorm"), "rmsnorm", 1),
    "timm ViT, CLIP's": (partial(of_timm, VIT, pre_norm=True), "two norms", 1),
    "timm ViT, SigLIP's": (partial(of_timm, VIT, class_token=False, global_pool="map"), "prenorm", 0),
    "timm ViT, norm behind": (
        lambda: of_timm(VIT, block_fn=pytest.importorskip("timm").models.vision_transformer.ResPostBlock),
        "postnorm", 1,
    ),
    "timm DeiT": (partial(of_timm, "deit.VisionTransformerDistilled"), "prenorm", 2),
    "timm DeiT3": (partial(of_timm, VIT, no_embed_class=True, init_values=1e-1), "prenorm", 1),
    "timm Eva": (partial(of_timm, "eva.Eva", use_rot_pos_emb=True), "prenorm", 1),
    "timm Eva02": (
        partial(of_timm, "eva.Eva", use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True),
        "prenorm", 1,
    ),
    "timm Eva, norm behind": (partial(of_timm, "eva.Eva", use_post_norm=True), "postnorm", 1),
    "timm Eva, norm in front": (partial(of_timm, "eva.Eva", use_pre_transformer_norm=True), "two norms", 1),
    "timm BEiT": (partial(of_timm, "beit.Beit", use_rel_pos_bias=True, init_values=1e-1), "prenorm", 1),
    "timm CaiT": (partial(of_timm, "cait.Cait", init_values=1e-1), "prenorm", 0),
    "timm NaFlexVit": (of_naflex, "prenorm", 0),
    "timm NaFlexVit, a convolution": (
        partial(of_naflex, embed_proj_type="conv", class_token=True, reg_tokens=1, global_pool="avg"), "prenorm", 2,
    ),
    "MONAI": (of_monai, "prenorm", 1),
    "MONAI, patches flattened": (partial(of_monai, proj_type="perceptron", in_channels=3), "prenorm", 1),
    "MONAI, Tanh behind the head": (partial(of_monai, post_activation="Tanh"), "prenorm", 1),
    "four channels": (partial(of_timm, VIT, in_chans=4), "prenorm", 1),
    "patches that are no squares": (
        partial(of_timm, VIT, patch_size=(4, 6), img_size=(12, 18), in_chans=1), "prenorm", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("zero_bias", "needed"), [(False, 4 + 5 + 2), (True, 4 + 5 + 1)])
def test_two_norms_need_one_width_more_than_one(zero_bias: bool, needed: int) -> None:
    def attack(width: int, strict: bool) -> float:
        build = partial(of_timm, VIT, pre_norm=True, img_size=8, in_chans=1, embed_dim=width, num_heads=1)
        model = made(build)
        if zero_bias:
            nn.init.zeros_(model.norm_pre.bias)
        anatomy = al.dissect(model)
        images = anatomy.preprocessing.to_input(picture(model, anatomy))
        update = shared(model, images)
        found = al.span_closed_form(model, update, anatomy=anatomy, strict=strict)
        return db(found, anatomy, images)

    assert attack(needed, strict=True) > 60
    with pytest.raises(al.AttackNotApplicable, match=rf"= {needed} > {needed - 1} = d"):
        attack(needed - 1, strict=True)
    assert attack(needed - 1, strict=False) < 40


@pytest.mark.parametrize("which", FAMILIES)
def test_the_true_picture_comes_back(which: str) -> None:
    build, first_block, prefix = FAMILIES[which]
    model = made(build)
    anatomy = al.dissect(model)
    assert anatomy.first_block == first_block
    tensors = al.tensors_of(model)
    assert sum(tensors[name].numel() // tensors[name].shape[-1] for name in anatomy.prefix) == prefix
    assert len(tensors[anatomy.head_weight or ""]) == 5
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    update = shared(model, images)
    found = al.invert(model, update, anatomy=anatomy, attack="embedding")
    assert db(found, anatomy, images) > 150
    # The position embedding frozen: D and the values of the embeddings.
    frozen = al.ClientUpdate(
        {name: g for name, g in update.gradients.items() if name != anatomy.position},
        withheld=(*update.withheld, anatomy.position or ""),
    )
    found = al.invert(model, frozen, anatomy=anatomy, attack="span")
    assert db(found, anatomy, images) > 60
