"""A training loop small enough to read, for one question: what does a defence cost in accuracy?

AdamW, a linear warm-up and a cosine down to zero, no augmentation. Nothing here knows Vision
Transformers, gradients that leak, or defences: a model whose position embedding is frozen is
trained like any other.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .update import logits_of

FORMAT = "aprillab-training-1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: unreadable, foreign, or of another training run."""


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int = 0,
    batch_size: int = 50,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    test: tuple[Tensor, Tensor] | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train ``model`` in place on the cross-entropy of its logits.

    Parameters
    ----------
    model : nn.Module
        Only parameters with ``requires_grad`` are trained. It trains where it lies, in its own
        dtype, and is left in the mode (train or eval) it came in.
    images : Tensor of shape (N, C, H, W), in model-input space
        In the model's dtype; may lie on another device, batches are moved.
    labels : int64 Tensor of shape (N,)
    epochs : int
        Passes over the images; also what the learning rate's cosine is stretched over.
    seed : int
        Of the batches' order, and of dropout where the model has any. The global generator is left
        alone. The same seed gives the same weights on one machine with one number of threads.
    batch_size : int
        A last, smaller batch of an epoch is used too.
    lr : float, the largest learning rate
    weight_decay : float, AdamW's, on weights with two dimensions or more
    warmup : float, the share of all steps in which the learning rate rises
    test : (images, labels), optional
        Scored after every epoch; never used for a decision.
    checkpoint : path, optional
        Written after every epoch (safetensors: weights, optimizer, history).
    resume : bool
        Go on from ``checkpoint`` if that file exists; the end is then the same as without the
        break.
    progress : bool, show a progress bar

    Returns
    -------
    list of dict
        One entry for each epoch done: ``epoch`` (from 1), ``loss`` (mean over the epoch), ``lr``
        (its last), ``seconds``, and ``test_accuracy`` where ``test`` was given. Shorter than
        ``epochs`` if Ctrl-C ended the run; the model then has the weights of the last entry, or its
        first ones.

    Raises
    ------
    ValueError
        If an argument makes no sense, or the loss stops being finite (the message says in which
        epoch).
    CheckpointError
        If the checkpoint to resume from is unreadable, or comes from another model or other
        settings.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=2)
    >>> images, labels = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), torch.tensor([0, 1])
    >>> history = al.training.train(model, images, labels, epochs=10, progress=False)
    >>> len(history), al.training.evaluate(model, images, labels)
    (10, 1.0)
    """
    settings = {
        "epochs": epochs, "seed": seed, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay,
        "warmup": warmup, "images": len(images),
    }  # fmt: skip
    _check(images, labels, settings)
    if resume and checkpoint is None:
        raise ValueError("resume=True needs the checkpoint's path")
    steps = math.ceil(len(images) / batch_size)
    run = _prepare(model, lr, weight_decay, rising=max(1, round(warmup * steps * epochs)), steps=steps * epochs)
    history: list[dict[str, Any]] = []
    if resume and Path(checkpoint or "").is_file():
        history = _load(Path(checkpoint or ""), run, settings)
        _fast_forward(run.schedule, steps * len(history))
    order = torch.Generator().manual_seed(seed)
    bar = tqdm(total=epochs, initial=len(history), desc="training", unit=" epoch", disable=not progress)
    with bar, _mode_kept(model):
        for epoch in range(epochs):
            permutation = torch.randperm(len(images), generator=order)
            if epoch < len(history):
                continue  # done before the break; its draw keeps the order of the later ones
            try:
                with _undone_if_broken_off(model):
                    entry: dict[str, Any] = {"epoch": epoch + 1}
                    entry |= _epoch(run, images, labels, permutation.split(batch_size), seed + epoch)
                    _check_finite(entry, lr, next(model.parameters()))
                    if test is not None:
                        entry["test_accuracy"] = evaluate(model, *test)
            except KeyboardInterrupt:
                break
            history.append(entry)
            if checkpoint is not None:
                _save(Path(checkpoint), run, settings, history)
            bar.update()
            bar.set_postfix({k: f"{entry[k]:.3f}" for k in ("loss", "test_accuracy") if k in entry})
    return history


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 500) -> float:
    """Share of the images whose largest logit is the label's, in evaluation mode.

    Parameters
    ----------
    model : nn.Module, left in the mode it came in
    images : Tensor of shape (N, C, H, W), in model-input space
    labels : int64 Tensor of shape (N,)
    batch_size : int, for memory only

    Returns
    -------
    float in [0, 1]

    Examples
    --------
    A model that calls every image of class 0:

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> _ = model[1].weight.data.zero_(), model[1].bias.data.copy_(torch.tensor([1.0, 0.0]))
    >>> evaluate(model, torch.zeros(4, 1, 2, 2), torch.tensor([0, 0, 0, 1]))
    0.75
    """
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: as many of one as of the other, and some")
    device = next(model.parameters()).device
    with _mode_kept(model), torch.no_grad():
        model.eval()
        right = sum(
            int((logits_of(model, x.to(device)).argmax(-1) == y.to(device)).sum())
            for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
        )
    return right / len(images)


@dataclass(frozen=True)
class _Run:
    """What a training changes: the model, its trained parameters by name, the optimizer and the
    learning rate.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device


def _prepare(model: nn.Module, lr: float, weight_decay: float, *, rising: int, steps: int) -> _Run:
    """AdamW on what is trained, with decay on matrices alone; its rate rises for ``rising`` of the
    ``steps``.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("nothing to train: every parameter of the model is frozen")
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, rising, steps))
    return _Run(model, parameters, optimizer, schedule)


def _epoch(run: _Run, images: Tensor, labels: Tensor, batches: Sequence[Tensor], seed: int) -> dict[str, Any]:
    """One pass over the images, in batches of their numbers: the mean loss, the last rate, the
    seconds.
    """
    start, device = time.perf_counter(), run.device
    run.model.train()
    total = torch.zeros((), dtype=torch.float64)
    # Dropout draws from the global generators: give them this epoch's seed and put them back.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        for chosen in batches:
            x, y = images[chosen.to(images.device)].to(device), labels[chosen.to(labels.device)].to(device)
            loss = nn.functional.cross_entropy(logits_of(run.model, x), y)
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            run.optimizer.step()
            run.schedule.step()
            total += loss.detach().cpu().double() * len(chosen)
    run.optimizer.zero_grad(set_to_none=True)
    return {
        "loss": float(total) / len(images),
        "lr": run.schedule.get_last_lr()[0],
        "seconds": time.perf_counter() - start,
    }


@contextmanager
def _mode_kept(model: nn.Module) -> Iterator[None]:
    """Leave the model in the mode (train or eval) it came in."""
    was_training = model.training
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _undone_if_broken_off(model: nn.Module) -> Iterator[None]:
    """Give the model its weights back if anything is raised, so that history and weights stay
    together.
    """
    kept = {name: t.detach().clone() for name, t in model.state_dict().items()}
    try:
        yield
    except BaseException:
        model.load_state_dict(kept)
        raise


def _check_finite(entry: dict[str, Any], lr: float, parameter: Tensor) -> None:
    if not math.isfinite(entry["loss"]):
        raise ValueError(
            f"the loss is {entry['loss']} in epoch {entry['epoch']}: lr={lr} is too large for this model in "
            f"{parameter.dtype} on {parameter.device}. The model has the weights of the epoch before"
        )


def _rate(step: int, rising: int, total: int) -> float:
    """Share of the largest learning rate: up in a straight line, then down along a half cosine to
    zero.
    """
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))


def _fast_forward(schedule: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Put the schedule where ``step`` calls would have brought it."""
    schedule.last_epoch = step
    for group, base, rate in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * rate(step)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def _check(images: Tensor, labels: Tensor, settings: dict[str, Any]) -> None:
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: as many of one as of the other, and some")
    for name in ("epochs", "batch_size"):
        if settings[name] < 1:
            raise ValueError(f"{name}={settings[name]} must be at least 1")
    if not 0 < settings["lr"] < math.inf:
        raise ValueError(f"lr={settings['lr']} must be positive and finite")
    if not 0 <= settings["warmup"] < 1:
        raise ValueError(f"warmup={settings['warmup']} is a share of the steps, from 0 to below 1")


# --- Checkpoints ----------------------------------------------------------------------------------------------


def _save(path: Path, run: _Run, settings: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Weights, optimizer state and history; written beside the old file first, so that a crash
    leaves one whole.
    """
    tensors = {f"model.{name}": t for name, t in run.model.state_dict().items()}
    for name, p in run.parameters.items():
        tensors |= {f"optimizer.{key}.{name}": t for key, t in run.optimizer.state[p].items()}
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    facts = {"format": FORMAT, "settings": json.dumps(settings), "history": json.dumps(history)}
    beside = path.with_name(path.name + ".part")
    try:
        save_file(tensors, str(beside), metadata=facts)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def _load(path: Path, run: _Run, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The history; weights and optimizer get the state they had."""
    tensors, facts = _read(path)
    try:
        saved, history = json.loads(facts["settings"]), json.loads(facts["history"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata is not that of a training run") from error
    if saved != settings:
        different = [f"{k}={saved.get(k)} there, {v} here" for k, v in settings.items() if saved.get(k) != v]
        raise CheckpointError(f"{path} was written with other settings: {'; '.join(different)}")
    keys = ("step", "exp_avg", "exp_avg_sq")
    wanted = {f"model.{name}": t.shape for name, t in run.model.state_dict().items()}
    wanted |= {f"optimizer.{key}.{name}": p.shape for name, p in run.parameters.items() for key in keys[1:]}
    wanted |= {f"optimizer.step.{name}": torch.Size() for name in run.parameters}
    if wanted != (found := {name: t.shape for name, t in tensors.items()}):
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise CheckpointError(f"{path} is of another model or defence: {odd[0]} and {len(odd) - 1} more differ")
    run.model.load_state_dict({name: tensors[f"model.{name}"] for name in run.model.state_dict()})
    for name, p in run.parameters.items():
        run.optimizer.state[p] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        for key in keys[1:]:
            run.optimizer.state[p][key] = run.optimizer.state[p][key].to(p)
    return history


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Give ``model`` the weights of a checkpoint of :func:`train`; nothing is unpickled.

    Raises
    ------
    CheckpointError
        If the file is unreadable, no such checkpoint, or of another model.

    Examples
    --------
    >>> import tempfile
    >>> import torch, aprillab as al
    >>> shape = {"image_size": 4, "patch_size": 2, "width": 4, "depth": 1, "heads": 1}
    >>> model, other = (al.VisionTransformer(**shape, seed=seed) for seed in (0, 1))
    >>> images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = f"{folder}/one.safetensors"
    ...     _ = al.training.train(model, images, labels, epochs=1, checkpoint=file, progress=False)
    ...     torch.equal(al.training.load_weights(other, file).head.weight, model.head.weight)
    True
    """
    tensors, _ = _read(Path(path))
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from error
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file, or cut off ({error})") from error
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of aprillab.train (format {facts.get('format')!r})")
    return tensors, facts
