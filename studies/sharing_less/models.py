"""The standard models of the table: real geometry, random weights, two blocks, nothing downloaded.

Depth is in no count. A photograph of 384 does not fall into patches of 14; the libraries take 378.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.anatomy import hooked

BLOCKS, CLASSES, SEED = 2, 100, 0
_WIDTHS = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12), "L": (1024, 16), "H": (1280, 16)}
#: Name in the table, timm's name, image size.
_NAMED = (
    ("DeiT-Ti/16", "deit_tiny_patch16_224", 224),
    ("DeiT-S/16, distilled", "deit_small_distilled_patch16_224", 224),
    ("DeiT-B/16", "deit_base_patch16_384", 384),
    ("CLIP B/32", "vit_base_patch32_clip_224", 224),
    ("CLIP B/16", "vit_base_patch16_clip_224", 224),
    ("CLIP L/14", "vit_large_patch14_clip_224", 224),
    ("CLIP L/14", "vit_large_patch14_clip_336", 336),
    ("DINOv2 S/14", "vit_small_patch14_dinov2", 518),
    ("DINOv2 B/14", "vit_base_patch14_dinov2", 518),
    ("DINOv2 L/14", "vit_large_patch14_dinov2", 518),
    ("SigLIP B/16", "vit_base_patch16_siglip_224", 224),
    ("SigLIP L/16", "vit_large_patch16_siglip_384", 384),
    ("SigLIP So400m/14", "vit_so400m_patch14_siglip_224", 224),
    ("SigLIP So400m/14", "vit_so400m_patch14_siglip_378", 378),
)
#: DINOv2 as it is mostly used: trained at 518, given pictures of 224, positions
#: interpolated. transformers'.
_INTERPOLATED = {"DINOv2 S/14": (384, 6), "DINOv2 B/14": (768, 12), "DINOv2 L/14": (1024, 16)}


class Standard(NamedTuple):
    """A line of the table."""

    name: str
    size: int
    patch: int
    width: int
    heads: int
    timm: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} at {self.size}"


def plain() -> Iterator[Standard]:
    """Ti, S, B, L and H at patch 16 and 14, 224 and 384 (378)."""
    for patch, larger in ((16, 384), (14, 378)):
        for size in (224, larger):
            for letter, (width, heads) in _WIDTHS.items():
                yield Standard(f"ViT-{letter}/{patch}", size, patch, width, heads)


def named() -> Iterator[Standard]:
    """DeiT, CLIP, DINOv2 and SigLIP as timm and transformers build them."""
    for name, (width, heads) in _INTERPOLATED.items():
        yield Standard(name, 224, 14, width, heads, "transformers")
    for name, timm, size in _NAMED:
        yield Standard(name, size, 0, 0, 0, timm)


def standard_models() -> tuple[Standard, ...]:
    """All lines."""
    return (*plain(), *named())


def build(line: Standard) -> tuple[nn.Module, al.Anatomy]:
    """The model in evaluation mode, float32, and its anatomy at the line's size."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(SEED)
        model = _built(line)
        if line.timm:
            _wake_norms(model)
    anatomy = al.dissect(model, **({"image_size": line.size} if line.timm == "transformers" else {}))
    hooked(model, anatomy)
    return model.eval(), anatomy


def _built(line: Standard) -> nn.Module:
    if line.timm == "transformers":
        import transformers

        config = transformers.Dinov2Config(
            image_size=518, patch_size=14, hidden_size=line.width, num_attention_heads=line.heads,
            num_hidden_layers=BLOCKS, num_labels=CLASSES,
        )  # fmt: skip
        return transformers.Dinov2ForImageClassification(config)
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if line.timm:
        return timm.create_model(line.timm, pretrained=False, depth=BLOCKS, num_classes=CLASSES, img_size=line.size)
    return VisionTransformer(
        img_size=line.size, patch_size=line.patch, embed_dim=line.width, depth=BLOCKS, num_heads=line.heads,
        num_classes=CLASSES,
    )  # fmt: skip


@torch.no_grad()
def _wake_norms(model: nn.Module) -> None:
    """γ and β as trained models have them: neither one nor zero. A β between two norms counts
    (CLIP).
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            module.weight.normal_(1.0, 0.1)
            module.bias.normal_(0.0, 0.1)


def given_to(model: nn.Module, paths: Sequence[str], images: Tensor) -> list[Tensor]:
    """What the modules at these paths are given when the model reads the images."""
    seen: dict[str, Tensor] = {}

    def look(path: str, _: nn.Module, given: tuple[Any, ...]) -> None:
        seen[path] = given[0].detach()

    handles = [model.get_submodule(path).register_forward_pre_hook(partial(look, path)) for path in paths]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[path] for path in paths]
