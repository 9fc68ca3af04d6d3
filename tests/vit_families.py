"""Tiny models of every family that dissect() reads, with random weights, and a client of each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import randomize
from torch import Tensor, nn

import aprillab as al
from aprillab.update import logits_of

SIZE, PATCH, WIDTH, CLASSES = 12, 4, 96, 5


def of_transformers(name: str, **options: Any) -> nn.Module:
    """``ViTForImageClassification`` and alike; classifiers of CLIP and SigLIP have a
    vision configuration.
    """
    transformers = pytest.importorskip("transformers")
    family = name.partition("For")[0].removesuffix("Model").removesuffix("Vision")
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    shape = {
        "image_size": SIZE, "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 3, "intermediate_size": 64, **options,
    }  # fmt: skip
    if family in ("CLIP", "Siglip"):
        vision = getattr(transformers, f"{family}VisionConfig")(**shape)
        if "For" not in name:
            return getattr(transformers, name)(vision)
        config = getattr(transformers, f"{family}Config")(vision_config=vision.to_dict())
        config.num_labels = CLASSES
        return getattr(transformers, name)(config)
    shape = {"num_labels": CLASSES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **shape}
    return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**shape))


def of_timm(kind: str, **options: Any) -> nn.Module:
    """``vision_transformer.VisionTransformer`` and alike."""
    pytest.importorskip("timm")
    module, _, name = kind.rpartition(".")
    shape = {
        "img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 3, "num_classes": CLASSES,
        **options,
    }  # fmt: skip
    return getattr(importlib.import_module(f"timm.models.{module}"), name)(**shape)


def of_naflex(**options: Any) -> nn.Module:
    naflexvit = pytest.importorskip("timm.models.naflexvit")
    shape = {
        "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 3, "pos_embed_grid_size": (3, 3), **options,
    }  # fmt: skip
    return naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(**shape), num_classes=CLASSES)


def of_torchvision(**options: Any) -> nn.Module:
    import torchvision

    shape = {
        "image_size": SIZE, "patch_size": PATCH, "num_layers": 2, "num_heads": 3, "hidden_dim": WIDTH, "mlp_dim": 64,
        "num_classes": CLASSES, **options,
    }  # fmt: skip
    return torchvision.models.VisionTransformer(**shape)


def of_monai(**options: Any) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    shape = {
        "in_channels": 1, "img_size": (SIZE, SIZE), "patch_size": (PATCH, PATCH), "hidden_size": WIDTH, "mlp_dim": 64,
        "num_layers": 2, "num_heads": 3, "classification": True, "num_classes": CLASSES, "spatial_dims": 2,
        "post_activation": "none", **options,
    }  # fmt: skip
    return nets.ViT(**shape)


def made(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with no zero anywhere, for a test that sees every bias and every token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(build().to(dtype), std=0.05).eval()


def picture(model: nn.Module, anatomy: al.Anatomy, seed: int = 0) -> Tensor:
    """Pixels (1, C, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, anatomy.channels, *anatomy.image_size)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(next(model.parameters()))


def shared(model: nn.Module, images: Tensor, label: int = 3, **options: Any) -> al.ClientUpdate:
    """A client's update in plain PyTorch; what the forward pass does not use is said to be
    withheld.
    """
    output = model(images, **options)
    output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    loss = nn.functional.cross_entropy(output, torch.tensor([label]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    pairs = dict(zip(trained, found, strict=True))
    return al.ClientUpdate(
        {name: g for name, g in pairs.items() if g is not None},
        withheld=tuple(name for name, g in pairs.items() if g is None),
    )


def db(found: al.Reconstruction, anatomy: al.Anatomy, images: Tensor) -> float:
    """PSNR in pixels, of model inputs."""
    true = anatomy.preprocessing.to_pixels(images.double(), clamp=False)
    mine = anatomy.preprocessing.to_pixels(found.images.double(), clamp=False)
    return float(al.psnr(mine[0].clamp(0, 1), true[0].clamp(0, 1)))


__all__ = ["db", "logits_of", "made", "of_timm", "of_torchvision", "of_transformers", "picture", "shared"]
