"""The closed forms on other libraries' models."""

import pytest
import torch
from attacked import db

import aprillab as al


def torchvision_vit(**changes):
    import torchvision

    shape = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 96, "mlp_dim": 96}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(**{**shape, "num_classes": 10, **changes})
        torch.nn.init.normal_(model.heads.head.weight, std=0.02)
    return model.double().eval()


@pytest.mark.parametrize("name", ["embedding", "span"])
def test_torchvision(name):
    model = torchvision_vit()
    if name == "span":
        model.encoder.pos_embedding.requires_grad_(False)
    pixels = al.load_victim("astronaut", 32, dtype=torch.float64)[None]
    update = al.client_update(model, al.IMAGENET.to_input(pixels), torch.tensor([3]))
    assert db(al.invert(model, update, attack=name), pixels) > 100


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {"embed_dim": 192, "num_heads": 3}),
        ("vit_small_patch14_reg4_dinov2", {"embed_dim": 192, "num_heads": 3, "num_classes": 10, "patch_size": 16}),
    ],
)
def test_timm(architecture, options):
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(architecture, img_size=48, depth=2, **options).double().eval()
        for head in (model.head, getattr(model, "head_dist", None)):
            if head is not None:
                torch.nn.init.normal_(head.weight, std=0.02)
    pixels = al.load_victim("astronaut", 48, dtype=torch.float64)[None]
    anatomy = al.dissect(model)
    x = anatomy.preprocessing.to_input(pixels)
    update = al.client_update(model, x, torch.tensor([3]))
    assert db(al.invert(model, update, attack="embedding"), pixels) > 100
    assert db(al.invert(model, update, attack="span"), pixels) > 60
    assert al.recover_labels(model, update).labels.tolist() == [3]


def test_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config).double().eval()
    pixels = al.load_victim("astronaut", 32, dtype=torch.float64)[None]
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    assert db(al.invert(model, update, attack="embedding"), pixels) > 60
    assert db(al.invert(model, update, attack="span"), pixels) > 40
