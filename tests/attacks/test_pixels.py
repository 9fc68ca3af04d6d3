"""Which normalization a picture's model input fits."""

import pytest
import torch

import aprillab as al
from aprillab.attacks.pixels import normalization

PICTURE = al.load_victim("astronaut", 32, dtype=torch.float64)[None]


@pytest.mark.parametrize("made", [al.UNIT, al.HALF, al.IMAGENET])
@pytest.mark.parametrize("assumed", [al.UNIT, al.HALF, al.IMAGENET])
def test_whole_levels_tell_which_constants_were_used(made, assumed):
    found = normalization(made.to_input(PICTURE), assumed, 90.0)
    assert found.state == ("shown" if made == assumed else "contradicted")
    if made != assumed:
        assert "would fit better" in found.text


def test_the_same_constants_for_each_channel_are_the_same():
    three = al.Preprocessing((0.5,) * 3, (0.5,) * 3)
    assert normalization(al.HALF.to_input(PICTURE), three, 90.0).state == "shown"


def test_without_whole_levels_the_range_decides():
    blurred = 0.98 * PICTURE + 0.01 * torch.rand(PICTURE.shape, generator=torch.Generator().manual_seed(0)).double()
    assert normalization(al.HALF.to_input(blurred), al.HALF, 60.0).state == "not checked"
    assert normalization(al.IMAGENET.to_input(blurred), al.HALF, 60.0).state == "contradicted"
    assert normalization(blurred, al.IMAGENET, 60.0).state == "contradicted"


def test_of_a_bad_picture_nothing_is_said():
    assert normalization(3 * torch.randn(1, 3, 8, 8), al.HALF, 12.0).state == "not checked"


def test_an_attack_says_that_other_constants_fit_better():
    model = al.VisionTransformer(image_size=32, patch_size=8, width=96, depth=2, heads=4, classes=10).double()
    update = al.client_update(model, PICTURE, torch.tensor([3]))  # ToTensor() alone
    result = al.invert(model, update)
    assert result.exact  # of the model's input
    assert torch.allclose(result.images, PICTURE)
    assert "would fit better" in result.reason
    named = al.invert(model, update, preprocessing=al.UNIT)
    assert "would fit better" not in named.reason
    assert al.psnr(named.pixels[0], PICTURE[0]) > 100
