"""The client's side: the gradient of a loss over its private images."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .record import ClientUpdate, as_set
from .tensors import UpdateError


def client_update(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    withhold: Collection[str] = (),
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> ClientUpdate:
    """Play the client: the gradient of the mean loss over its private images.

    The model is used as it stands: its weights, its precision, train or eval mode. It is left
    unchanged, its ``.grad`` fields included.

    Parameters
    ----------
    model : nn.Module
        Returns logits (B, classes), in one of the forms that :func:`logits_of` reads.
    images : Tensor of shape (B, C, H, W), in model-input space, in the model's dtype and on its device
    labels : Tensor of B targets
        For cross-entropy integers of shape (B,), or probabilities of shape (B, classes); otherwise
        what ``loss`` takes: several findings per image, numbers to regress.
    withhold : names of parameters whose gradient the client keeps to itself
    loss : (logits, labels) to a scalar, the mean over the batch

    Returns
    -------
    ClientUpdate
        Gradients of all parameters with ``requires_grad`` that are not withheld, in the model's
        dtype; zeros where the loss does not depend on one.

    Raises
    ------
    UpdateError
        If the model cannot read the images, a withheld name is not a trained parameter, labels do
        not fit the images, the logits or the loss, the loss is not finite, or nothing would be
        shared.

    Examples
    --------
    The head's bias has one negative entry, the label:

    >>> import torch, aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> update = al.client_update(model, torch.zeros(1, 3, 8, 8), torch.tensor([3]))
    >>> int(update.gradients["head.bias"].argmin()), update.batch_size
    (3, 1)
    """
    check_round(model, images)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    withhold = as_set(withhold)
    if missing := sorted(withhold - set(trained)):
        raise UpdateError(f"withhold: {', '.join(missing)} is no trained parameter of {type(model).__name__}")
    shared = {name: p for name, p in trained.items() if name not in withhold}
    if not shared:
        raise UpdateError("nothing to share: every parameter is frozen or withheld")
    start = time.perf_counter()
    value = loss_of(model, images, labels, loss)
    gradients = torch.autograd.grad(value, list(shared.values()), allow_unused=True)
    seconds = time.perf_counter() - start
    filled = {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(shared.items(), gradients, strict=True)
    }
    order = tuple(name for name in trained if name in withhold)
    return ClientUpdate(filled, withheld=order, batch_size=len(images), seconds=seconds)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The client's loss, a finite scalar that gradients flow from.

    Raises
    ------
    UpdateError
        If the model cannot read the images, the labels do not fit, or the loss is no such scalar.
    """
    with torch.enable_grad():
        return _loss_value(loss, _read(model, images), labels, len(images))


def check_round(model: Any, images: Any) -> None:
    """A model, and pictures that it can be given.

    Raises
    ------
    UpdateError
        If they are something else.
    """
    if not isinstance(model, nn.Module):
        raise UpdateError(f"model must be a torch.nn.Module, not {type(model).__name__}: build it first")
    if not isinstance(images, Tensor):
        raise UpdateError(
            f"images must be a tensor (B, C, H, W), not {type(images).__name__}: torch.as_tensor(images)"
        )
    if images.ndim in (0, 3) or not len(images):
        raise UpdateError(
            f"images must have shape (B, C, H, W), not {tuple(images.shape)}: one picture is images[None]"
        )
    if not images.is_floating_point():
        raise UpdateError(
            f"images are {images.dtype}: make them the model's input, as in al.HALF.to_input(images / 255)"
        )


def _read(model: nn.Module, images: Tensor) -> Tensor:
    """The logits; what a model says of pictures that it cannot read, as one sentence."""
    try:
        return logits_of(model, images)
    except UpdateError:
        raise
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        if lacks_memory(error):  # which says nothing of the pictures
            raise
        weight = next(iter(model.parameters()))
        raise UpdateError(
            f"{type(model).__name__} cannot read images of shape {tuple(images.shape)}, {images.dtype} on "
            f"{images.device} (its weights: {weight.dtype} on {weight.device}): {_first_line(error)}"
        ) from error


def lacks_memory(error: BaseException) -> bool:
    """Whether that is what an error is about; torch has no type for it on the CPU.

    >>> lacks_memory(MemoryError()), lacks_memory(RuntimeError("can't allocate memory")), lacks_memory(ValueError())
    (True, True, False)
    """
    return isinstance(error, MemoryError) or "alloc" in str(error)


def _loss_value(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor, images: int) -> Tensor:
    """The loss, a finite scalar that gradients flow from."""
    _check_labels(loss, logits, labels, images)
    try:
        value = loss(logits, labels)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        given = f"labels {_words(labels)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__} of labels"
        raise UpdateError(
            f"the client's loss does not take logits {_words(logits)} with {given}: {_first_line(error)}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UpdateError(f"the client's loss is {found}: it must be a scalar, the mean over the batch")
    if not value.requires_grad:
        raise UpdateError("the client's loss depends on no parameter: is the model run under torch.no_grad()?")
    if not torch.isfinite(value):
        raise UpdateError(f"the client's loss is {value.item()}: no usable gradient (dtype {value.dtype})")
    return value


def _check_labels(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor, images: int) -> None:
    """What a loss would say in words of its own, or on a GPU not at all."""
    if not isinstance(labels, Tensor):
        if loss is nn.functional.cross_entropy:
            raise UpdateError(f"labels are a {type(labels).__name__}: pass a tensor, such as torch.tensor([3])")
        return
    if labels.ndim and len(labels) != images:
        raise UpdateError(f"{len(labels)} label(s) for {images} image(s): pass one for each image, shape ({images},)")
    if loss is not nn.functional.cross_entropy or logits.ndim != 2:
        return
    classes, whole = logits.shape[1], not (labels.is_floating_point() or labels.is_complex())
    if labels.shape != logits.shape[: 1 if whole else 2]:
        raise UpdateError(
            f"labels {_words(labels)} for logits {_words(logits)}: cross-entropy takes class numbers, int64 of shape "
            f"({images},), or probabilities, floats of shape ({images}, {classes})"
        )
    wrong = labels[(labels < 0) | (labels >= classes)] if whole else labels[:0]
    if len(wrong := wrong[wrong != -100]):  # cross-entropy passes over -100
        raise UpdateError(f"label {int(wrong[0])} is no class of the model's: it has {classes}, from 0")


def _words(tensor: Tensor) -> str:
    return f"of shape {tuple(tensor.shape)} and {tensor.dtype}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits, (B, classes), in whichever form it returns them.

    That is a tensor; an object with a field ``logits`` or a mapping with that key, as in
    transformers; or a tuple or list whose first element is a tensor, as in MONAI and in
    transformers with ``return_dict=False``. The first it is also where two of one shape follow each
    other: timm's distilled models return the class token's head first, and average the two
    themselves unless ``set_distilled_training(True)`` was called.

    Raises
    ------
    UpdateError
        If the output is something else.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> logits_of(nn.Flatten(), torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 48])
    """
    output = model(images)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple | list) and not hasattr(output, "logits"):
        found = output[0] if output else None
    else:
        found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise UpdateError(
        f"{type(model).__name__} returns {_described(output)}: wrap it in a module whose forward returns the logits, "
        "a tensor of shape (B, classes)"
    )


def _described(output: Any) -> str:
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {kind} without 'logits'; it has {', '.join(map(repr, output)) or 'nothing'}"
    if isinstance(output, tuple | list):
        return f"a {kind} whose first element is a {type(output[0]).__name__}" if output else f"an empty {kind}"
    return f"a {kind}, which has no logits"
