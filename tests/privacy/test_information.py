"""Fisher's information about pixels: against finite differences, and its bounds against attackers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from aprillab import UpdateError, VisionTransformer
from aprillab.privacy import clipped_gradients, cramer_rao_mse, mean_pixel_information, pixel_information

TINY = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 16, "depth": 1, "heads": 2, "classes": 3}
LABEL = torch.tensor([1])


def picture() -> Tensor:
    return torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def of_model(clip: float) -> tuple[nn.Module, Tensor]:
    model = VisionTransformer(**TINY).double()
    return model, pixel_information(model, picture(), LABEL, clip=clip, noise_multiplier=0.1, rounds=3)


@pytest.mark.parametrize("clip", [100.0, 0.5])
def test_the_jacobian_is_that_of_finite_differences(clip: float) -> None:
    """Of the clipped gradient, as clients share it: 0.5 clips this picture's, 100 does not."""
    model, information = of_model(clip)
    steps = 1e-5 * torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    rows = [clipped_gradients(model, picture() + s * steps, LABEL.expand(64), clip) for s in (1, -1)]
    jacobian = (rows[0] - rows[1]) / 2e-5
    assert torch.allclose(information, 3 * jacobian @ jacobian.mT / (0.1 * clip) ** 2, rtol=1e-5, atol=1e-6)
    assert (float(clipped_gradients(model, picture(), LABEL, 1e9).norm()) > clip) == (clip < 1)


def test_probing_finds_the_mean_of_the_diagonal() -> None:
    model, information = of_model(0.5)
    options = {"clip": 0.5, "noise_multiplier": 0.1, "rounds": 3}
    probed = mean_pixel_information(model, picture(), LABEL, **options, probes=50)
    assert probed == pytest.approx(float(information.diagonal().mean()), rel=0.2)
    # The looser of the two bounds.
    assert 1 / probed < 1.2 * cramer_rao_mse(information)


def test_clipping_hides_the_length_of_a_gradient_that_is_the_picture() -> None:
    """C x/‖x‖ says nothing along x, so that no unbiased attacker exists; a prior gives what it has."""
    layer = nn.Sequential(nn.Flatten(), nn.Linear(64, 1, bias=False, dtype=torch.float64))

    def summed(logits: Tensor, _: Tensor) -> Tensor:
        return logits.sum()

    options = {"noise_multiplier": 0.1, "loss": summed}
    assert cramer_rao_mse(pixel_information(layer, picture(), LABEL, clip=100.0, **options)) == pytest.approx(100.0)
    clipped = pixel_information(layer, picture(), LABEL, clip=1.0, **options)
    assert cramer_rao_mse(clipped) == math.inf
    values = torch.linalg.eigvalsh(clipped)
    assert float(values[0].abs()) < 1e-9 < float(values[1])
    error = (0.1 * float(picture().norm())) ** 2  # of the 63 directions across
    assert cramer_rao_mse(clipped, prior=4.0) == pytest.approx((63 / (1 / error + 4) + 1 / 4) / 64)


def test_van_trees_is_reached_by_the_best_attacker_on_normal_pictures() -> None:
    """x ~ N(0, s²), y = A x + ξ: the mean of x given y has exactly this error."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    information, s = a.mT @ a, 0.5
    x = s * torch.randn(4, 100_000, generator=generator, dtype=torch.float64)
    y = a @ x + torch.randn(6, 100_000, generator=generator, dtype=torch.float64)
    best = torch.linalg.solve(information + torch.eye(4) / s**2, a.mT @ y)
    assert float((best - x).square().mean()) == pytest.approx(cramer_rao_mse(information, prior=1 / s**2), rel=0.01)
    unbiased = torch.linalg.solve(information, a.mT @ y)
    assert float((unbiased - x).square().mean()) == pytest.approx(cramer_rao_mse(information), rel=0.02)
    assert cramer_rao_mse(information, prior=torch.eye(4) / s**2) == cramer_rao_mse(information, prior=1 / s**2)


def test_timm_with_fused_attention_can_be_probed() -> None:
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=3
    ).eval()
    options = {"clip": 1.0, "noise_multiplier": 1.0}
    probed = mean_pixel_information(model, picture().float(), LABEL, **options, probes=32)
    whole = pixel_information(model, picture().float(), LABEL, **options)
    assert probed == pytest.approx(float(whole.diagonal().mean()), rel=0.4)


def test_what_makes_no_sense_is_refused() -> None:
    model, x = VisionTransformer(**TINY).double(), picture()
    options = {"clip": 1.0, "noise_multiplier": 1.0}
    for wrong, words in (
        ({"clip": 0.0}, "clip=0.0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"rounds": 0}, "rounds=0"),
    ):
        with pytest.raises(ValueError, match=words):
            pixel_information(model, x, LABEL, **{**options, **wrong})
    with pytest.raises(ValueError, match="one of each"):
        pixel_information(model, torch.cat([x, x]), LABEL, **options)
    with pytest.raises(ValueError, match="probes=0"):
        mean_pixel_information(model, x, LABEL, **options, probes=0)
    with pytest.raises(UpdateError, match="not finite"):
        pixel_information(model, x * math.nan, LABEL, **options)
    with pytest.raises(UpdateError, match="no parameter"):
        pixel_information(model.requires_grad_(False), x, LABEL, **options)
    with pytest.raises(ValueError, match="a square"):
        cramer_rao_mse(torch.ones(3))
