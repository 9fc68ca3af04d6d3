"""Tiny models and updates for the tests of gradient matching: an evaluation takes milliseconds."""

from __future__ import annotations

import torch
from torch import nn

from aprillab.attacks.searches.match import match_gradients
from aprillab.models import VisionTransformer
from aprillab.preprocessing import HALF
from aprillab.update import ClientUpdate, client_update


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def small_vit(**options: object) -> VisionTransformer:
    """Four patches of four pixels: an evaluation takes milliseconds."""
    sizes = {"image_size": 4, "patch_size": 2, "channels": 1, "width": 16, "depth": 1, "heads": 2, "classes": 4}
    return VisionTransformer(**{**sizes, **options}, seed=1).double()  # type: ignore[arg-type]


def victim(batch: int = 1, size: int = 4, channels: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.rand(batch, channels, size, size, generator=generator(seed), dtype=torch.float64)
    return pixels, torch.arange(batch) + 1


def attacked(model: nn.Module, batch: int = 1, **options: object) -> tuple[torch.Tensor, ClientUpdate]:
    """Pixels and their update, from a client whose model input is HALF's."""
    pixels, labels = victim(batch, **options)  # type: ignore[arg-type]
    return pixels, client_update(model, HALF.to_input(pixels), labels)


def quietly(*arguments: object, **options: object) -> object:
    return match_gradients(*arguments, progress=False, **options)  # type: ignore[arg-type]


class SmallCNN(nn.Module):
    """Sigmoids, as in DLG's LeNet: a second derivative that is not zero almost everywhere."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = nn.Sequential(
                nn.Conv2d(1, 6, 3, padding=1), nn.Sigmoid(), nn.Conv2d(6, 6, 3, padding=1), nn.Sigmoid()
            )
            self.classifier = nn.Linear(6 * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))
