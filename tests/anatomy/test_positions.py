"""Pictures of another size than the model's: the library's interpolation, undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from vit_families import db, made, of_naflex, of_timm, of_torchvision, of_transformers, picture, shared

import aprillab as al
from aprillab.anatomy import dissect, likely_size, playable, position_gradient, position_values, tensors_of

VIT = "vision_transformer.VisionTransformer"
STORED, SMALLER = 16, 12  # 4×4 patches in the embedding, 3×3 in the picture

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "timm": (lambda: of_timm(VIT, img_size=STORED, dynamic_img_size=True), {}),
    "timm without class row": (
        lambda: of_timm(VIT, img_size=STORED, dynamic_img_size=True, no_embed_class=True, reg_tokens=2), {}
    ),
    "timm Eva": (lambda: of_timm("eva.Eva", img_size=STORED, dynamic_img_size=True), {}),
    "timm NaFlexVit": (lambda: of_naflex(pos_embed_grid_size=(4, 4)), {}),
    "transformers Dinov2": (
        lambda: of_transformers("Dinov2ForImageClassification", image_size=STORED, mlp_ratio=1), {}
    ),
    "transformers Dinov2, registers": (
        lambda: of_transformers("Dinov2WithRegistersForImageClassification", image_size=STORED, mlp_ratio=1), {}
    ),
    "transformers ViT": (
        lambda: of_transformers("ViTForImageClassification", image_size=STORED), {"interpolate_pos_encoding": True}
    ),
    "transformers DeiT": (
        lambda: of_transformers("DeiTForImageClassification", image_size=STORED), {"interpolate_pos_encoding": True}
    ),
    "transformers SigLIP": (
        lambda: of_transformers("SiglipForImageClassification", image_size=STORED), {"interpolate_pos_encoding": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("size", [SMALLER, (8, 12)])
def test_a_smaller_picture_comes_back(which: str, size: int | tuple[int, int]) -> None:
    build, options = MODELS[which]
    model = made(build)
    anatomy = dissect(model, image_size=size)
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    update = shared(model, images, **options)
    found = al.invert(model, update, anatomy=anatomy, attack="embedding")
    assert found.images.shape == images.shape
    assert db(found, anatomy, images) > 100
    frozen = {name: g for name, g in update.gradients.items() if name != anatomy.position}
    found = al.invert(
        model,
        al.ClientUpdate(frozen, withheld=(*update.withheld, anatomy.position or "")),
        anatomy=anatomy,
        attack="span",
    )
    assert db(found, anatomy, images) > 60


@pytest.mark.parametrize("which", MODELS)
def test_in_the_clients_precision_it_is_exact_and_played_back_playable(which: str) -> None:
    build, options = MODELS[which]
    model = made(build, torch.float32)
    anatomy = dissect(model, image_size=SMALLER)
    images = anatomy.preprocessing.to_input(picture(model, anatomy))
    found = al.invert(model, shared(model, images, **options), anatomy=anatomy, attack="embedding")
    assert found.exact, found.reason
    assert db(found, anatomy, images) > 80


def test_case_18() -> None:
    """A picture of 24 pixels to a model of 32, in float32: as it was, the size guessed
    from the rank, named.
    """
    model = made(lambda: of_timm(VIT, img_size=32, patch_size=8, embed_dim=192, dynamic_img_size=True), torch.float32)
    anatomy = dissect(model, image_size=24)
    images = anatomy.preprocessing.to_input(al.load_victim("astronaut", 24)[None])
    update = shared(model, images)
    assert db(al.invert(model, update, anatomy=anatomy, attack="embedding"), anatomy, images) > 100
    plain = dissect(model)
    G = position_gradient(plain, update.gradients)[plain.position_prefix :]
    rank = int((torch.linalg.svdvals(G) > 1e-5 * torch.linalg.svdvals(G)[0]).sum())
    assert likely_size(rank, plain) == (24, 24)
    assert likely_size(rank, anatomy) is None  # it was named


def test_a_model_interpolates_only_while_it_is_asked_to() -> None:
    model = made(lambda: of_transformers("ViTForImageClassification", image_size=STORED))
    images = torch.zeros(1, 3, SMALLER, SMALLER, dtype=torch.float64)
    anatomy = dissect(model, image_size=SMALLER)
    with playable(model, anatomy):
        assert torch.equal(model(images).logits, model(images, interpolate_pos_encoding=True).logits)
    with pytest.raises(ValueError, match="doesn't match model"):
        model(images)
    with playable(model, dissect(model)), pytest.raises(ValueError, match="doesn't match model"):
        model(images)
    # A search plays the client at every step.
    update = shared(model, anatomy.preprocessing.to_input(picture(model, anatomy)), interpolate_pos_encoding=True)
    found = al.match_gradients(model, update, anatomy=anatomy, recipe="april", max_evaluations=2)
    assert found.images.shape == images.shape


def test_a_larger_picture_leaves_its_tokens_gradient_open() -> None:
    model = made(lambda: of_timm(VIT, img_size=STORED, dynamic_img_size=True))
    anatomy = dissect(model, image_size=24)
    assert position_values(anatomy, tensors_of(model)).shape == (1 + 36, 96)
    update = shared(model, anatomy.preprocessing.to_input(picture(model, anatomy)))
    with pytest.raises(al.AttackNotApplicable, match="17 rows are interpolated to the picture's 37 tokens"):
        al.invert(model, update, anatomy=anatomy, attack="embedding")


def test_the_values_are_what_the_tokens_get() -> None:
    model = made(lambda: of_transformers("Dinov2ForImageClassification", image_size=STORED, mlp_ratio=1))
    anatomy = dissect(model, image_size=SMALLER)
    tensors = tensors_of(model)
    seen = []
    handle = model.dinov2.embeddings.register_forward_hook(lambda _, args, output: seen.append(output[0].detach()))
    model(torch.zeros(1, 3, SMALLER, SMALLER, dtype=torch.float64))
    handle.remove()
    E = position_values(anatomy, tensors)
    E[0] += tensors["dinov2.embeddings.cls_token"][0, 0]
    E[1:] += tensors[anatomy.patch_bias or ""]
    torch.testing.assert_close(E, seen[0], rtol=1e-6, atol=1e-6)


def test_sizes_that_a_model_cannot_take_are_refused() -> None:
    for build in (of_torchvision, lambda: al.VisionTransformer(image_size=8, patch_size=4, width=8, heads=2)):
        with pytest.raises(ValueError, match=r"image_size=24×24: this .* model takes pictures of .* only"):
            dissect(build(), image_size=24)
    dynamic = of_timm(VIT, dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"patches of 4 pixels do not tile an image of \(10, 10\)"):
        dissect(dynamic, image_size=10)
    assert dissect(dynamic, image_size=12) == dissect(dynamic)  # its own size
