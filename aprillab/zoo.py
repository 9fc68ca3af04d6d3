"""Vision Transformers by name: what a server hands out, with random weights or with those of a
file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from . import training
from .anatomy import UnknownModelError, dissect, tensors_of
from .defenses import freeze_position, no_position, use_sinusoidal
from .models import VisionTransformer

Position = Literal["learned", "frozen", "sinusoidal", "sinusoidal-2d", "none"]

_OURS = ("april", "prenorm")
_OF_TORCHVISION = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
MODEL_NAMES = ", ".join((*_OURS, *_OF_TORCHVISION, "timm:NAME", "transformers:vit"))


class ModelError(ValueError):
    """A model that cannot be built: unknown name, missing library, impossible size, weights that do
    not fit.
    """


def build_model(
    name: str,
    *,
    image_size: int | tuple[int, int] = 224,
    patch_size: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    mlp_ratio: float | None = None,
    channels: int = 3,
    position: Position = "learned",
    weights: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    classes: int = 1000,
) -> nn.Module:
    """A Vision Transformer in evaluation mode, its weights from a file, or random with a gradient
    that is not zero.

    Parameters
    ----------
    name : str
        ``"april"`` or ``"prenorm"``: architecture A or B of this package. At image sizes from 112
        up that are multiples of 16, it is ViT-B/16's shape (patch 16, width 768, 12 blocks, 12
        heads); at others, 64 patches of image_size/8 pixels, width 384, 4 blocks, 6 heads.
        ``"vit_b_16"``, ``"vit_b_32"``, ``"vit_l_16"``, ``"vit_l_32"``, ``"vit_h_14"``:
        torchvision's. ``"timm:NAME"``: a ViT of timm. ``"transformers:vit"``:
        ViTForImageClassification in its default configuration.
    image_size : int, or (height, width), in pixels
        Only timm's and transformers' models take pictures that are not square.
    patch_size, width, depth, heads, mlp_ratio : optional
        In place of the shape above, each by itself: :class:`~aprillab.models.VisionTransformer`'s
        parameters of these names. Only for ``"april"`` and ``"prenorm"``, as are other
        ``channels``.
    channels : {3, 1}, RGB or grey
    position : {"learned", "frozen", "sinusoidal", "sinusoidal-2d", "none"}
        ``"frozen"``: :func:`~aprillab.defenses.freeze_position`; ``"sinusoidal"`` and
        ``"sinusoidal-2d"``: :func:`~aprillab.defenses.use_sinusoidal`; ``"none"``: this package's
        models have no position embedding then, those of libraries are given one of zeros
        (:func:`~aprillab.defenses.no_position`).
    weights : path, optional
        A safetensors file: a checkpoint of :func:`aprillab.training.train`, or a state dict. All of
        the model's weights, the position embedding among them; nothing is unpickled.
    dtype : torch.dtype
    seed : int, for random weights; the global generator is left as it was
    classes : int

    Returns
    -------
    nn.Module
        A head that its library initializes to zero (torchvision's) is drawn from a normal
        distribution with standard deviation 0.02 instead: a zero head passes no gradient down. One
        that comes with ``weights`` is left alone.

    Raises
    ------
    ModelError
        If there is no such model, its library is not installed, it cannot have this shape or
        position embedding, or the weights are unreadable, of another model, or of one with another
        position embedding.
    UnknownModelError
        If it is built but is no Vision Transformer that ``dissect`` knows.

    Examples
    --------
    >>> model = build_model("prenorm", image_size=32, width=96, depth=2, position="frozen", classes=10)
    >>> model.patch_embedding.weight.shape, model.position_embedding.requires_grad
    (torch.Size([96, 3, 4, 4]), False)
    """
    if isinstance(image_size, tuple) and image_size[0] == image_size[1]:
        image_size = image_size[0]
    given = {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio}
    shape: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    _check_options(name, position, channels, shape)
    model = _built(name, image_size, shape, position=position, channels=channels, classes=classes, seed=seed)
    try:
        _wake_head(model, seed)
    except UnknownModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{name} cannot be attacked at image size {_sides(image_size)}: {error}") from error
    try:
        _set_position(model, position)
    except ValueError as error:
        raise ModelError(f"{name} with position={position!r}: {error}") from error
    if weights is not None:
        _load_weights(model, Path(weights), position)
    return model.to(dtype).eval()


def _built(
    name: str,
    image_size: int | tuple[int, int],
    shape: dict[str, Any],
    *,
    position: str,
    channels: int,
    classes: int,
    seed: int,
) -> nn.Module:
    """The model with random weights, as its library makes it."""
    library = name.partition(":")[0]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            if library == "timm":
                return _build_timm(name.removeprefix("timm:"), image_size, classes)
            if library == "transformers":
                return _build_transformers(image_size, classes)
            if isinstance(image_size, tuple):
                raise ValueError("it takes square pictures only; timm:NAME and transformers:vit take others")
            if name in _OURS:
                given = "none" if position == "none" else "learned"  # _set_position does the rest
                own = {"channels": channels, "classes": classes, "seed": seed, "position": given}
                return _build_aprillab(name, image_size, shape | own)
            return _build_torchvision(name, image_size, classes)
    except ImportError as error:
        raise ModelError(
            f"{name} needs {library}, which is not installed: pip install 'aprillab[{library}]'"
        ) from error
    # Each library refuses a size or a name with an exception of its own kind.
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise ModelError(f"{name} cannot be built at image size {_sides(image_size)}: {error}") from error


def _sides(image_size: int | tuple[int, int]) -> str:
    return "×".join(map(str, image_size)) if isinstance(image_size, tuple) else str(image_size)


def _check_options(name: str, position: str, channels: int, shape: dict[str, Any]) -> None:
    """Refuse an unknown model, and options that no model, or not this one, can have."""
    if position not in get_args(Position):
        raise ModelError(f"position={position!r} is none of {', '.join(get_args(Position))}")
    if channels not in (1, 3):
        raise ModelError(f"channels={channels} must be 3 (RGB) or 1 (grey)")
    if wrong := [option for option, value in shape.items() if value <= 0]:
        raise ModelError(f"{wrong[0]}={shape[wrong[0]]} must be positive")
    of_timm = name.startswith("timm:") and name != "timm:"
    if not of_timm and name not in (*_OURS, *_OF_TORCHVISION, "transformers:vit"):
        raise ModelError(f"there is no model {name!r}; there are {MODEL_NAMES}")
    if name not in _OURS and (shape or channels != 3):
        wrong = [*shape, *(["channels"] if channels != 3 else [])]
        raise ModelError(f"{', '.join(wrong)}: only april and prenorm come in other shapes; {name} has its library's")


def _build_aprillab(block: str, image_size: int, options: dict[str, Any]) -> nn.Module:
    # From 112 up ViT-B/16's shape; below, 8 × 8 patches and room for every count: min(p,
    # 64) + 64 + 2 ≤ 384.
    if image_size >= 112 and image_size % 16 == 0:
        rule = {"patch_size": 16, "width": 768, "depth": 12, "heads": 12}
    elif image_size % 8 == 0 or "patch_size" in options:
        rule = {"patch_size": image_size // 8, "width": 384, "depth": 4, "heads": 6}
    else:
        raise ValueError("it must be a multiple of 8 (8 × 8 patches), or from 112 up of 16 (patches of 16 pixels)")
    return VisionTransformer(image_size=image_size, block=block, **{**rule, **options})  # type: ignore[arg-type]


def _build_torchvision(name: str, image_size: int, classes: int) -> nn.Module:
    from torchvision.models import get_model

    patch = int(name.rpartition("_")[2])
    if image_size % patch:
        raise ValueError(f"it must be a multiple of the patch size, {patch}")
    return get_model(name, weights=None, image_size=image_size, num_classes=classes)


def _build_timm(name: str, image_size: int | tuple[int, int], classes: int) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, img_size=image_size, num_classes=classes)


def _build_transformers(image_size: int | tuple[int, int], classes: int) -> nn.Module:
    import transformers

    if any(side % 16 for side in (image_size if isinstance(image_size, tuple) else [image_size])):
        raise ValueError("it must be a multiple of the patch size, 16")
    config: Any = transformers.ViTConfig
    return transformers.ViTForImageClassification(config(image_size=image_size, num_labels=classes))


@torch.no_grad()
def _wake_head(model: nn.Module, seed: int) -> None:
    head = tensors_of(model)[dissect(model).head_weight or ""]
    if not head.any():
        head.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))


def _set_position(model: nn.Module, position: Position) -> None:
    if position == "frozen":
        freeze_position(model)
    elif position in ("sinusoidal", "sinusoidal-2d"):
        use_sinusoidal(model, "2d" if position == "sinusoidal-2d" else "1d")
    elif position == "none" and dissect(model).position is not None:
        no_position(model)


def _load_weights(model: nn.Module, path: Path, position: Position) -> None:
    """Weights of a file into a model that has its position embedding already, which the file's must
    agree with.
    """
    where = dissect(model).position or ""
    known = tensors_of(model)[where].clone() if where and position not in ("learned", "frozen") else None
    try:
        with safe_open(path, framework="pt") as file:
            checkpoint, names = (file.metadata() or {}).get("format") == training.FORMAT, set(file.keys())
        if checkpoint:
            training.load_weights(model, path)
        else:
            model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
    except (training.CheckpointError, RuntimeError) as error:
        raise ModelError(f"{path}: these weights do not fit a model with position={position!r}: {error}") from error
    # The tolerance lets half precision pass.
    if known is not None and not torch.allclose(tensors_of(model)[where], known, atol=1e-2):
        raise ModelError(f"{path}: its position embedding is not the one of position={position!r}")
    if where and position == "learned" and checkpoint and f"optimizer.exp_avg.{where}" not in names:
        raise ModelError(f"{path}: its position embedding was not trained, so the model is not position='learned'")
