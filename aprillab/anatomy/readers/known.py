"""Which reader knows which class, and which classes have nothing to read."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..record import Anatomy
from .monai import read_monai
from .naflex import read_naflex
from .own import read_aprillab, read_torchvision
from .timm import read_timm
from .transformers import read_transformers

#: A reader takes the ViT and, where the caller names one, the size of the pictures.
Reader = Callable[[nn.Module, tuple[int, int] | None], Anatomy]

_TRANSFORMERS = {
    "vit": ("ViTForImageClassification", "ViTModel"),
    "deit": ("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher", "DeiTModel"),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersModel"),
    "vit_msn": ("ViTMSNForImageClassification", "ViTMSNModel"),
    "beit": ("BeitForImageClassification", "BeitModel"),
    "clip": ("CLIPForImageClassification", "CLIPVisionModel", "CLIPVisionTransformer"),
    "siglip": ("SiglipForImageClassification", "SiglipVisionModel", "SiglipVisionTransformer"),
}
_TIMM = ("vision_transformer.VisionTransformer", "eva.Eva", "beit.Beit", "cait.Cait")

#: By the full name of the model's class, or of one it is derived from.
READERS: dict[str, Reader] = {
    "aprillab.models.VisionTransformer": read_aprillab,
    "torchvision.models.vision_transformer.VisionTransformer": read_torchvision,
    "timm.models.naflexvit.NaFlexVit": read_naflex,
    "monai.networks.nets.vit.ViT": read_monai,
    **{f"timm.models.{name}": read_timm for name in _TIMM},
    **{
        f"transformers.models.{folder}.modeling_{folder}.{name}": read_transformers
        for folder, classes in _TRANSFORMERS.items()
        for name in classes
    },
}

_WINDOWS = "its tokens have no absolute position embedding, and its windows merge patches"
#: Transformers of pictures that the attacks cannot read, by how a full name of their class begins.
NO_POSITIONS: dict[str, str] = {
    "torchvision.models.swin_transformer.SwinTransformer": _WINDOWS,
    "timm.models.swin_transformer": _WINDOWS,
    "transformers.models.swin": _WINDOWS,
    "timm.models.vision_transformer_relpos": "its positions are relative: it has no absolute position embedding",
    "transformers.models.dinov3_vit": "its positions are rotary: it has no absolute position embedding",
    "transformers.models.siglip2": "it takes patches that were cut before, and no pictures: name its parts yourself",
}
