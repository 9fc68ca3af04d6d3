"""How a client of FedAvg trains: a few steps of a torch optimizer on its own pictures.

Nothing here is Flower's. A server that knows what it asked for (:class:`LocalTraining`, as a
round's configuration carries it) reads the state that came back by :func:`update_of`.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..update import ClientUpdate, UpdateError, update_from_states
from ..update.client import check_round, loss_of
from ..update.record import checked_facts
from ..update.states import State

#: The key of each field in a round's configuration; ``betas`` are two.
KEYS = {
    "optimizer": "optimizer",
    "learning_rate": "learning-rate",
    "steps": "local-steps",
    "batch_size": "batch-size",
    "momentum": "momentum",
    "nesterov": "nesterov",
    "weight_decay": "weight-decay",
    "eps": "eps",
    "clip_norm": "clip-norm",
    "autocast": "autocast",
    "seed": "seed",
}
_BETAS = ("beta1", "beta2")
_OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LocalTraining:
    """What a client does in one round, all of it by torch.

    Attributes
    ----------
    optimizer : {"sgd", "adam", "adamw", "adagrad", "rmsprop"}
        As ``torch.optim`` has them, a new one in each round.
    learning_rate : float
    steps : int
        Optimizer steps.
    batch_size : int or None
        Pictures a step; None is all of them. The last step of an epoch takes those that are left.
    momentum, nesterov : of SGD
    weight_decay : float
        Zero by default for AdamW too, where torch has 0.01.
    betas : (float, float) or None
        None is torch's default. RMSprop's α stands in the place of β₂.
    eps : float or None
    clip_norm : float or None
        Each step's gradient is clipped to this norm, over all tensors.
    autocast : {"bfloat16", "float16"} or None
        Of the forward pass. The loss is not scaled.
    seed : int
        Of the batches' order, and of dropout where the model has any and is in training mode.

    Raises
    ------
    UpdateError
        Naming the field that is no such thing, or that the optimizer does not have.

    Examples
    --------
    >>> LocalTraining.from_config({"learning-rate": 1, "local-steps": 5, "server-round": 2})
    LocalTraining(learning_rate=1.0, steps=5)
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.1
    steps: int = 1
    batch_size: int | None = None
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None
    eps: float | None = None
    clip_norm: float | None = None
    autocast: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("optimizer", "learning_rate", "momentum", "weight_decay"):
            if getattr(self, name) is None:
                raise UpdateError(f"{name!r} must be given, not None")
        # Each by itself, then together, as an update has them.
        facts = ClientUpdate({}, **checked_facts(self._facts(), called={"local_steps": "steps"}))
        for name in ("learning_rate", "batch_size", "momentum", "weight_decay", "betas", "eps"):
            object.__setattr__(self, name, getattr(facts, name))
        object.__setattr__(self, "steps", facts.local_steps)
        if self.optimizer == "adagrad" and self.betas is not None:
            raise UpdateError("'betas' are of Adam and RMSprop, and the optimizer is 'adagrad': leave them out")
        if self.autocast is not None and self.autocast not in tuple(_AUTOCAST):  # it may be a list
            raise UpdateError(f"'autocast' must be one of {', '.join(_AUTOCAST)}, not {self.autocast!r}")
        object.__setattr__(self, "clip_norm", _norm(self.clip_norm))
        object.__setattr__(self, "seed", _seed(self.seed))

    def __repr__(self) -> str:
        changed = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"LocalTraining({', '.join(changed)})"

    def _facts(self) -> dict[str, Any]:
        """What an update says of the steps behind it."""
        return {
            "optimizer": self.optimizer, "learning_rate": self.learning_rate, "local_steps": self.steps,
            "momentum": self.momentum, "nesterov": self.nesterov, "weight_decay": self.weight_decay,
            "betas": self.betas, "eps": self.eps, "batch_size": self.batch_size,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LocalTraining:
        """From a round's configuration: the keys of :meth:`to_config`, and ``lr``, as many apps
        call the learning rate. Other keys are passed over, and what is not there has its default.

        Raises
        ------
        UpdateError
            As the class, and if one of two betas is missing.
        """
        found = {name: config[key] for name, key in KEYS.items() if key in config}
        if "learning_rate" not in found and "lr" in config:
            found["learning_rate"] = config["lr"]
        if betas := [config[key] for key in _BETAS if key in config]:
            found["betas"] = tuple(betas)
        return cls(**found)

    def to_config(self) -> dict[str, bool | int | float | str]:
        """Flat, for a Flower ConfigRecord or a run's configuration; what is None is left out.

        Examples
        --------
        >>> LocalTraining("adam", 1e-3, betas=(0.9, 0.99)).to_config()["beta2"]
        0.99
        """
        said = {key: value for name, key in KEYS.items() if (value := getattr(self, name)) is not None}
        return said | dict(zip(_BETAS, self.betas or (), strict=False))

    def optimizer_of(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """A new optimizer for these parameters."""
        options: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.eps is not None:
            options["eps"] = self.eps
        if self.optimizer == "sgd":
            options |= {"momentum": self.momentum, "nesterov": self.nesterov}
        elif self.betas is not None:
            options |= {"alpha": self.betas[1]} if self.optimizer == "rmsprop" else {"betas": self.betas}
        return _OPTIMIZERS[self.optimizer](parameters, **options)


def _norm(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bool) or not (isinstance(value, int | float) and 0 < value < math.inf):
        raise UpdateError(f"'clip_norm' must be positive and finite, not {value!r}")
    return float(value)


def _seed(value: Any) -> int:
    try:
        seed = operator.index(value)
    except TypeError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise UpdateError(f"'seed' must be an integer from 0 to 2⁶³ − 1, not {value!r}")
    return seed


# --- The client's side, and the server's ------------------------------------------------------------------------


def train_locally(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    how: LocalTraining,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> dict[str, Tensor]:
    """Play a client of FedAvg: the state of a copy of the model after its local steps.

    The model is left as it is. Its mode, train or eval, is the client's too.

    Parameters
    ----------
    model : nn.Module
        Returns logits, in one of the forms that :func:`~aprillab.update.logits_of` reads.
        Parameters with ``requires_grad`` are trained.
    images : Tensor of shape (N, C, H, W), in model-input space, in the model's dtype and on its device
    labels : Tensor of N targets, as for :func:`~aprillab.client_update`
    how : LocalTraining
    loss : (logits, labels) to a scalar, the mean over the batch

    Returns
    -------
    dict of str to Tensor
        ``state_dict()`` afterwards, buffers included.

    Raises
    ------
    UpdateError
        As :func:`~aprillab.client_update`: the pictures or labels do not fit, the loss is not
        finite (at some step, if the learning rate is too large), or nothing is trained.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> how = LocalTraining(steps=2, learning_rate=0.5)
    >>> after = train_locally(model, torch.zeros(1, 3, 8, 8), torch.tensor([3]), how)
    >>> update_of(model.state_dict(), after, how).local_steps
    2
    """
    check_round(model, images)
    if isinstance(labels, Tensor) and labels.ndim and len(labels) != len(images):
        raise UpdateError(f"{len(labels)} label(s) for {len(images)} image(s): pass one for each image")
    client = copy.deepcopy(model)
    trained = [p for p in client.parameters() if p.requires_grad]
    if not trained:
        raise UpdateError("nothing to train: every parameter is frozen")
    optimizer = how.optimizer_of(trained)
    batches = batches_of(len(images), how)
    # Dropout draws from the global generators: give them the client's seed, and put them back.
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(how.seed)
        for _ in range(how.steps):
            chosen = next(batches).to(images.device)
            some = labels[chosen.to(labels.device)] if isinstance(labels, Tensor) and labels.ndim else labels
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(images.device.type, _AUTOCAST.get(how.autocast or ""), bool(how.autocast)):
                value = loss_of(client, images[chosen], some, loss)
            value.backward()
            if how.clip_norm is not None:
                nn.utils.clip_grad_norm_(trained, how.clip_norm)
            optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in client.state_dict().items()}


def batches_of(images: int, how: LocalTraining) -> Iterator[Tensor]:
    """Which pictures each step takes: epochs of shuffled numbers, one after another, without end;
    all in their own order, where a step takes all.

    >>> batches = batches_of(3, LocalTraining(batch_size=2, seed=1))
    >>> sorted(torch.cat([next(batches), next(batches)]).tolist())
    [0, 1, 2]
    """
    order = torch.Generator().manual_seed(how.seed)
    size = images if how.batch_size is None else how.batch_size
    while True:
        yield from torch.randperm(images, generator=order).split(size) if size < images else [torch.arange(images)]


def update_of(before: State, after: State, how: LocalTraining, *, batch_size: int | None = None) -> ClientUpdate:
    """What a server reads of a state that came back: :func:`~aprillab.update_from_states` with
    what it had asked for.

    Parameters
    ----------
    before, after : states, as :func:`~aprillab.update_from_states` takes them
    how : LocalTraining
    batch_size : int, optional
        Pictures behind the whole update, if the client says so; a step's number is another.

    Raises
    ------
    UpdateError
        As :func:`~aprillab.update_from_states`.

    Examples
    --------
    >>> import torch
    >>> before, after = {"weight": torch.tensor([1.0])}, {"weight": torch.tensor([0.5])}
    >>> update_of(before, after, LocalTraining(learning_rate=0.25)).gradients["weight"]
    tensor([2.])
    """
    return update_from_states(
        before, after, learning_rate=how.learning_rate, local_steps=how.steps, momentum=how.momentum,
        nesterov=how.nesterov, weight_decay=how.weight_decay, optimizer=how.optimizer, betas=how.betas, eps=how.eps,
        batch_size=batch_size,
    )  # fmt: skip
