"""An imprint in a ViT as it is: what comes back of a batch, what is told alone, and what
cannot be imprinted.
"""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

import aprillab as al
from aprillab.dishonest import CannotCheat, imprint, read_imprint
from aprillab.dishonest.imprint import frequencies
from aprillab.zoo import build_model

SHAPE = {"image_size": 16, "patch_size": 8, "width": 208, "depth": 2, "heads": 2, "classes": 10}


def vit(**changes):
    return al.VisionTransformer(**{**SHAPE, **changes}).eval()


def pictures(count, size=16):
    """Noise of different brightness, each in a quantile of its own."""
    noise = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return 0.4 * noise + 0.6 * torch.linspace(0.1, 0.9, count)[:, None, None, None]


def imprinted(model, pixels, **options):
    """What is read of a batch's update, and the model as it was sent."""
    images = al.HALF.to_input(pixels)
    sent = copy.deepcopy(model)
    sent.load_state_dict(imprint(model, brightness=images.mean((1, 2, 3)), **options))
    update = al.client_update(sent, images, torch.arange(len(pixels)) % 10)
    return read_imprint(model, update, preprocessing=al.HALF), sent


MODELS = {
    "ours": lambda: vit(),
    "a mean over tokens": lambda: vit(class_token=False),
    "sinusoids": lambda: vit(position="sinusoidal"),
    "torchvision": lambda: torchvision_vit(),
    "timm": lambda: build_model("timm:vit_tiny_patch16_224", image_size=32, classes=10),
}


def torchvision_vit():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 8, 2, 4, 208, 416, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_pictures_alone_in_a_bin_come_back(name):
    model = MODELS[name]()
    pixels = pictures(6, size=32 if name == "timm" else 16)
    found, _ = imprinted(model, pixels)
    alone = [one for one in found if one.alone]
    assert len(alone) >= 5
    # Width 192 holds 187 of 768 numbers of timm's patches: noise of each patch is mostly lost,
    # its mean is not.
    least = 12 if name == "timm" else 45
    best = [max(al.psnr(one.pixels, p) for p in pixels) for one in alone]
    assert min(best) > least
    assert [one.bin for one in found] == sorted(one.bin for one in found)


def test_pictures_of_one_brightness_are_no_picture():
    pixels = pictures(6)
    pixels[1] += pixels[0].mean() - pixels[1].mean()
    found, _ = imprinted(vit(), pixels)
    mixed = [one for one in found if max(al.psnr(one.pixels, p) for p in pixels) < 30]
    assert len(mixed) == 1
    assert not mixed[0].alone
    assert mixed[0].miss > 1e-3


def test_bins_are_as_probable_as_each_other():
    """Of 104 bins of a normal law, 200 brightnesses drawn from it fill most."""
    model = vit()
    generator = torch.Generator().manual_seed(0)
    levels = 0.2 * torch.randn(200, generator=generator)
    images = levels[:, None, None, None] + 0.1 * torch.randn(200, 3, 16, 16, generator=generator)
    sent = copy.deepcopy(model)
    sent.load_state_dict(imprint(model, brightness=(0.0, 0.2)))
    update = al.client_update(sent, images, torch.arange(200) % 10)
    assert len(read_imprint(model, update)) > 0.6 * (208 * 4 // 4)


def test_a_client_sees_it_and_later_layers_are_left():
    model = vit()
    sent = imprinted(model, pictures(4))[1]
    seen = al.inspect_model(sent)
    assert seen["layer directions"].suspicious
    own, new = model.state_dict(), sent.state_dict()
    changed = {name.split(".")[0] for name in own if not torch.equal(own[name], new[name])}
    assert changed == {"patch_embedding", "position_embedding", "class_token", "blocks"}
    assert all(torch.equal(own[name], new[name]) for name in own if name.startswith(("blocks.1", "norm", "head")))


def test_the_lowest_frequencies_are_kept():
    basis = frequencies(3, (8, 8))
    assert torch.allclose(basis @ basis.T, torch.eye(192, dtype=torch.float64), atol=1e-12)
    flat = torch.full((192,), 0.3, dtype=torch.float64)
    assert (basis[:1].T @ (basis[:1] @ flat) - flat).abs().max() < 1e-12
    smooth = al.load_victim("astronaut", 8, dtype=torch.float64).flatten()
    kept = basis[:187].T @ (basis[:187] @ smooth)
    assert al.psnr(kept.reshape(3, 8, 8), smooth.reshape(3, 8, 8)) > 40


def test_what_is_refused():
    with pytest.raises(CannotCheat, match="this model's is 'april'"):
        imprint(vit(block="april"))
    with pytest.raises(CannotCheat, match="needs a position embedding"):
        imprint(vit(position="none"))
    with pytest.raises(CannotCheat, match="too few for two bins"):
        imprint(vit(image_size=64, patch_size=4, width=96, mlp_ratio=2))
    with pytest.raises(CannotCheat, match="two pictures or more"):
        imprint(vit(), brightness=torch.zeros(3))
    with pytest.raises(CannotCheat, match="positive standard deviation"):
        imprint(vit(), brightness=(0.0, 0.0))
    with pytest.raises(CannotCheat, match="not know: "):
        imprint(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, init_values=1e-5))
    with pytest.raises(CannotCheat, match=r"no gradient of blocks\.0\.mlp\.0\.weight"):
        read_imprint(vit(), al.ClientUpdate({"head.bias": torch.ones(10)}))
