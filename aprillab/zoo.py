"""Vision Transformers by name, with random weights: what a server hands out when training starts from scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn

from .anatomy import dissect, tensors_of
from .models import VisionTransformer, sinusoidal_1d

Position = Literal["learned", "frozen", "sinusoidal"]

MODEL_NAMES = "april, prenorm, vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14, timm:NAME, transformers:vit"


class ModelError(ValueError):
    """A model that cannot be built: unknown name, missing library, impossible size."""


def build_model(
    name: str,
    *,
    image_size: int = 224,
    position: Position = "learned",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    classes: int = 1000,
) -> nn.Module:
    """A Vision Transformer with random weights, in evaluation mode, whose gradient is not zero.

    Parameters
    ----------
    name : str
        ``"april"`` or ``"prenorm"``: architecture A or B of this package. At image sizes from 112 up that are
        multiples of 16, it is ViT-B/16's shape (patch 16, width 768, 12 blocks, 12 heads); at others, 64 patches of
        image_size/8 pixels, width 384, 4 blocks, 6 heads. ``"vit_b_16"``, ``"vit_b_32"``, ``"vit_l_16"``,
        ``"vit_l_32"``, ``"vit_h_14"``: torchvision's. ``"timm:NAME"``: a ViT of timm. ``"transformers:vit"``:
        ViTForImageClassification in its default configuration.
    image_size : int, in pixels
    position : {"learned", "frozen", "sinusoidal"}
        ``"frozen"`` sets ``requires_grad=False`` on the position embedding, ``"sinusoidal"`` also gives it the values
        of :func:`~aprillab.models.sinusoidal_1d`.
    dtype : torch.dtype
    seed : int, for the weights; the global generator is left as it was
    classes : int

    Returns
    -------
    nn.Module
        A head that its library initializes to zero (torchvision's) is drawn from a normal distribution with standard
        deviation 0.02 instead: a zero head passes no gradient down.

    Raises
    ------
    ModelError
        If there is no such model, its library is not installed, or it cannot have this image size.
    UnknownModelError
        If it is built but is no Vision Transformer that ``dissect`` knows.
    """
    if position not in get_args(Position):
        raise ModelError(f"position={position!r} is none of {', '.join(get_args(Position))}")
    library, _, rest = name.partition(":")
    if library == "timm" and rest:
        build: Callable[[], nn.Module] = lambda: _timm(rest, image_size, classes)  # noqa: E731
    elif name == "transformers:vit":
        build = lambda: _transformers(image_size, classes)  # noqa: E731
    elif name in ("april", "prenorm"):
        build = lambda: _own(name, image_size, seed, classes)  # noqa: E731
    elif name in MODEL_NAMES.split(", ") and name.startswith("vit_"):
        build = lambda: _torchvision(name, image_size, classes)  # noqa: E731
    else:
        raise ModelError(f"there is no model {name!r}; there are {MODEL_NAMES}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            model = build()
    except ImportError as error:
        raise ModelError(
            f"{name} needs {library}, which is not installed: pip install 'aprillab[{library}]'"
        ) from error
    # Each library refuses a size or a name with an exception of its own kind.
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise ModelError(f"{name} cannot be built at image size {image_size}: {error}") from error
    _wake_head(model, seed)
    _set_position(model, position, name)
    return model.to(dtype).eval()


def _own(block: str, image_size: int, seed: int, classes: int) -> nn.Module:
    if image_size >= 112 and image_size % 16 == 0:
        return VisionTransformer(image_size=image_size, block=block, seed=seed, classes=classes)  # type: ignore[arg-type]
    if image_size % 8:
        raise ValueError("it must be a multiple of 8 (8 × 8 patches), or from 112 up of 16 (patches of 16 pixels)")
    return VisionTransformer(
        image_size=image_size, patch_size=image_size // 8, width=384, depth=4, heads=6,
        block=block, seed=seed, classes=classes,  # type: ignore[arg-type]
    )  # fmt: skip


def _torchvision(name: str, image_size: int, classes: int) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None, image_size=image_size, num_classes=classes)


def _timm(name: str, image_size: int, classes: int) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, img_size=image_size, num_classes=classes)


def _transformers(image_size: int, classes: int) -> nn.Module:
    import transformers

    if image_size % 16:
        raise ValueError("it must be a multiple of the patch size, 16")
    config: Any = transformers.ViTConfig
    return transformers.ViTForImageClassification(config(image_size=image_size, num_labels=classes))


@torch.no_grad()
def _wake_head(model: nn.Module, seed: int) -> None:
    head = tensors_of(model)[dissect(model).head_weight or ""]
    if not head.any():
        head.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _set_position(model: nn.Module, position: Position, name: str) -> None:
    if position == "learned":
        return
    embedding = dict(model.named_parameters()).get(dissect(model).position or "")
    if embedding is None:
        raise ModelError(f"{name} has no trained position embedding that could be {position}")
    if position == "sinusoidal":
        embedding.copy_(sinusoidal_1d(embedding.shape[-2], embedding.shape[-1]).expand_as(embedding))
    embedding.requires_grad_(False)
