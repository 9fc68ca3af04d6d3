"""What a client shares in a round of federated learning, and how to write, read and check it.

FedSGD: the gradient of the mean loss over the client's batch (:func:`client_update`). FedAvg: the
difference of two states divided by the learning rate (:func:`update_from_states`), which is the
same thing after one local step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "aprillab-update-1"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_BATCH = 1_000_000


class UpdateError(ValueError):
    """An update that cannot be used: unreadable, incomplete, misshapen, not finite or of another
    model.
    """


@dataclass(frozen=True)
class ClientUpdate:
    """What the server receives from one client.

    Attributes
    ----------
    gradients : mapping of str to Tensor
        By parameter name; what is frozen or withheld is absent.
    withheld : tuple of str
        Parameters the client trains but does not share the gradient of.
    batch_size : int or None
        Images behind the update, if the client says so. Attacks treat it as a claim, not as a fact.
    source : {"fedsgd", "fedavg"}
    seconds : float or None
        Wall-clock time of the client's forward and backward pass, where it was measured here.
    """

    gradients: Mapping[str, Tensor]
    withheld: tuple[str, ...] = ()
    batch_size: int | None = None
    source: str = "fedsgd"
    learning_rate: float | None = None
    local_steps: int = 1
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float | None = None
    rounding: float | None = None
    seconds: float | None = field(default=None, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """The lowest precision among the gradients: it limits every attack."""
        dtypes = {g.dtype for g in self.gradients.values()}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def without(self, names: Collection[str]) -> ClientUpdate:
        """The same update with the gradients called ``names`` withheld.

        Raises
        ------
        UpdateError
            If one of them is not in the update.

        Examples
        --------
        >>> import torch, aprillab as al
        >>> update = al.ClientUpdate({"weight": torch.ones(2), "bias": torch.ones(1)})
        >>> list(update.without("bias").gradients), update.without("bias").withheld
        (['weight'], ('bias',))
        """
        names = _as_set(names)
        if missing := sorted(names - set(self.gradients)):
            raise UpdateError(f"cannot withhold {', '.join(missing)}: not in the update")
        kept = {name: g for name, g in self.gradients.items() if name not in names}
        return replace(self, gradients=kept, withheld=(*self.withheld, *(n for n in self.gradients if n in names)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ClientUpdate:
        """The same update on another device or in another precision.

        Examples
        --------
        >>> import torch, aprillab as al
        >>> al.ClientUpdate({"weight": torch.ones(2)}).to(dtype=torch.float64).dtype
        torch.float64
        """
        moved = {name: g.to(device=device, dtype=dtype) for name, g in self.gradients.items()}
        return replace(self, gradients=moved)


def _as_set(names: Collection[str]) -> set[str]:
    """Names as a set; a lone string is one name, not its letters."""
    return {names} if isinstance(names, str) else set(names)


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
        Returns logits (B, classes), or an object with a field ``logits`` as in transformers.
    images : Tensor of shape (B, C, H, W), in model-input space, in the model's dtype and on its device
    labels : integer Tensor of shape (B,)
    withhold : names of parameters whose gradient the client keeps to itself
    loss : (logits, labels) to a scalar, the mean over the batch

    Returns
    -------
    ClientUpdate
        Gradients of all parameters with ``requires_grad`` that are not withheld, in the model's
        dtype.

    Raises
    ------
    UpdateError
        If a withheld name is not a trained parameter, if the loss is not finite, or if nothing
        would be shared.

    Examples
    --------
    The head's bias has one negative entry, the label:

    >>> import torch, aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> update = al.client_update(model, torch.zeros(1, 3, 8, 8), torch.tensor([3]))
    >>> int(update.gradients["head.bias"].argmin()), update.batch_size
    (3, 1)
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    withhold = _as_set(withhold)
    if missing := sorted(withhold - set(trained)):
        raise UpdateError(f"withhold: {', '.join(missing)} is no trained parameter of {type(model).__name__}")
    shared = {name: p for name, p in trained.items() if name not in withhold}
    if not shared:
        raise UpdateError("nothing to share: every parameter is frozen or withheld")
    start = time.perf_counter()
    with torch.enable_grad():
        value = loss(logits_of(model, images), labels)
    if not torch.isfinite(value):
        raise UpdateError(f"the client's loss is {value.item()}: no usable gradient (dtype {value.dtype})")
    gradients = torch.autograd.grad(value, list(shared.values()), allow_unused=True)
    seconds = time.perf_counter() - start
    filled = {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(shared.items(), gradients, strict=True)
    }
    order = tuple(name for name in trained if name in withhold)
    return ClientUpdate(filled, withheld=order, batch_size=len(images), seconds=seconds)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits, (B, classes), whether it returns a tensor or an object that has them.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> logits_of(nn.Flatten(), torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 48])
    """
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


def update_from_states(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    learning_rate: float,
    local_steps: int = 1,
    trained: Collection[str] | None = None,
    batch_size: int | None = None,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> ClientUpdate:
    """The update behind a FedAvg step: (before − after) / (learning_rate · local_steps).

    With one local step of plain SGD this is the client's gradient, rounded to the precision of the
    *weights*: the difference of two float32 numbers near w carries an error of about 1e-7·|w| /
    learning_rate. With more steps it is their mean, and the closed forms see a mixture.

    Parameters
    ----------
    before, after : state dicts, the model sent out and the model that came back
    learning_rate : float, the client's
    local_steps : int
    trained : names of the trained parameters; by default every floating-point tensor that changed
    batch_size : int, optional

    Raises
    ------
    UpdateError
        If the two states have different tensors or shapes, nothing changed, a trained name is not
        in them, or ``learning_rate`` or ``local_steps`` is not positive.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> before, after = {"weight": torch.tensor([1.0])}, {"weight": torch.tensor([0.75])}
    >>> al.update_from_states(before, after, learning_rate=0.5).gradients["weight"]
    tensor([0.5000])
    """
    if not 0 < learning_rate < math.inf or local_steps < 1:
        raise UpdateError(f"learning_rate={learning_rate} and local_steps={local_steps} must be positive and finite")
    if set(before) != set(after):
        raise UpdateError(f"the two states differ in {', '.join(sorted(set(before) ^ set(after))[:5])}")
    if missing := sorted(_as_set(trained or ()) - set(before)):
        raise UpdateError(f"trained: {', '.join(missing)} is not in the states")
    gradients = {}
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape:
            raise UpdateError(f"{name}: shape {tuple(old.shape)} before, {tuple(new.shape)} after")
        chosen = old.is_floating_point() and (name in trained if trained is not None else not torch.equal(old, new))
        if chosen:
            gradients[name] = (old - new.to(old.device)) / (learning_rate * local_steps)
    if not gradients:
        raise UpdateError("the two states are the same: nothing was shared")
    return ClientUpdate(
        gradients, batch_size=batch_size, source="fedavg", learning_rate=learning_rate, local_steps=local_steps
    )


def save_update(update: ClientUpdate, path: str | Path) -> None:
    """Write an update as safetensors: tensors and a few strings, nothing that could be executed.

    Raises
    ------
    UpdateError
        If the file cannot be written.
    """
    facts = {"withheld": list(update.withheld), "batch_size": update.batch_size, "source": update.source}
    # For one image some gradients are views of one another (class token, position embedding): write
    # copies.
    tensors = {
        name: g.detach().cpu().clone(memory_format=torch.contiguous_format) for name, g in update.gradients.items()
    }
    try:
        save_file(tensors, str(path), metadata={"format": FORMAT, "update": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise UpdateError(f"{path}: cannot be written ({error})") from error


def load_update(path: str | Path) -> ClientUpdate:
    """Read an update written by :func:`save_update`, or any safetensors file of gradients by
    parameter name.

    Nothing is unpickled: a file made by ``torch.save`` is refused. Pass the result to
    :func:`check_update` with the model before using it; the attacks do.

    Raises
    ------
    UpdateError
        If the file is missing, a pickle, truncated, foreign, or says something that makes no sense.

    Examples
    --------
    >>> import tempfile
    >>> import torch, aprillab as al
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     al.save_update(al.ClientUpdate({"weight": torch.tensor([0.5])}), f"{folder}/update.safetensors")
    ...     al.load_update(f"{folder}/update.safetensors").gradients["weight"]
    tensor([0.5000])
    """
    path = Path(path)
    if not path.is_file():
        raise UpdateError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            gradients = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        if _looks_like_pickle(path):
            raise UpdateError(
                f"{path}: a pickle (torch.save), which could run code when read. "
                "Write updates with aprillab.save_update or safetensors.torch.save_file."
            ) from error
        raise UpdateError(f"{path}: not a readable safetensors file, or cut off ({error})") from error
    if not gradients:
        raise UpdateError(f"{path}: holds no tensor")
    if wrong := [name for name, g in gradients.items() if g.dtype not in DTYPES]:
        raise UpdateError(
            f"{path}: {wrong[0]!r} is {gradients[wrong[0]].dtype}; gradients are {', '.join(map(str, DTYPES))}"
        )
    return ClientUpdate(gradients, **_read_facts(path, metadata))


def _looks_like_pickle(path: Path) -> bool:
    """Whether a file that is no safetensors begins like torch.save's, old or new: for the message
    only.

    Not asked first: a safetensors file begins with a length, which may look like anything.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError:
        return False
    return magic == b"PK\x03\x04" or magic[:1] == b"\x80"


def _read_facts(path: Path, metadata: Mapping[str, str]) -> dict:
    """The update's strings, checked one by one: they come from the client too."""
    try:
        facts = json.loads(metadata.get("update", "{}"))
        withheld, batch_size = facts.get("withheld", []), facts.get("batch_size")
        source = facts.get("source", "fedsgd")
    except (ValueError, AttributeError, RecursionError) as error:  # not JSON, no object, nested without end
        raise UpdateError(f"{path}: its metadata is not an aprillab update's ({error})") from error
    if not (isinstance(withheld, list) and all(isinstance(name, str) for name in withheld)):
        raise UpdateError(f"{path}: metadata 'withheld' must be a list of names, not {withheld!r}")
    if not (batch_size is None or (type(batch_size) is int and 0 < batch_size <= MAX_BATCH)):
        raise UpdateError(
            f"{path}: metadata 'batch_size' must be an integer from 1 to {MAX_BATCH}, not {batch_size!r}"
        )
    if source not in ("fedsgd", "fedavg"):
        raise UpdateError(f"{path}: metadata 'source' must be 'fedsgd' or 'fedavg', not {source!r}")
    return {"withheld": tuple(withheld), "batch_size": batch_size, "source": source}


def check_update(model: nn.Module, update: ClientUpdate, *, finite: Collection[str] | None = None) -> None:
    """Refuse an update that cannot come from ``model``.

    Every attack calls this first. Absent gradients are fine where the parameter is frozen or
    declared withheld.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate
    finite : names of tensors, optional
        Look for NaN and infinities in these alone, as an attack does that reads nothing else;
        default is all.

    Raises
    ------
    UpdateError
        Naming the first tensor that is extra, missing, misshapen or not finite, or if all gradients
        are zero.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> from torch import nn
    >>> al.check_update(nn.Linear(2, 1), al.ClientUpdate({"weight": torch.ones(1, 2), "bias": torch.ones(3)}))
    Traceback (most recent call last):
    aprillab.update.UpdateError: bias: the update has shape (3,), Linear (1,)
    """
    parameters = dict(model.named_parameters())
    name_of = type(model).__name__
    if extra := sorted(set(update.gradients) - set(parameters)):
        raise UpdateError(
            f"the update and {name_of} do not belong together: the update has {len(extra)} tensor(s) the model "
            f"does not have, the first is {extra[0]!r}; the model has {', '.join(list(parameters)[:4])}, …"
        )
    absent = {name for name, p in parameters.items() if p.requires_grad} - set(update.gradients)
    if missing := sorted(absent - set(update.withheld)):
        raise UpdateError(
            f"the update lacks the gradient of {missing[0]!r} ({len(missing)} missing in all). If the client "
            "withholds it, say so: ClientUpdate(…, withheld=(…,)); if it is frozen, set requires_grad=False in the "
            "model"
        )
    for name, gradient in update.gradients.items():
        if gradient.shape != parameters[name].shape:
            raise UpdateError(
                f"{name}: the update has shape {tuple(gradient.shape)}, {name_of} {tuple(parameters[name].shape)}"
            )
        if finite is not None and name not in finite:
            continue
        # A sum is ten times cheaper than a look at every entry, but a sum of finite numbers may
        # overflow.
        if not torch.isfinite(gradient.sum()) and not torch.isfinite(gradient).all():
            bad = int((~torch.isfinite(gradient)).sum())
            raise UpdateError(f"{name}: {bad} of {gradient.numel()} gradient entries are NaN or infinite")
    if not any(bool(g.any()) for g in update.gradients.values()):
        raise UpdateError("all gradients are zero: this update carries nothing (did the client train at all?)")
