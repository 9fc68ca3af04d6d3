"""Training whose weights keep ε: DP-SGD, with Opacus' gradients of each image, clipping and noise.

A step draws each image with probability q (Poisson sampling), clips the gradient of each
drawn image to C, adds them up, adds normal noise of deviation σC, and divides by the batch
size one expects. What leaves the training, the weights after all steps, keeps (ε, δ) for one
image more or less.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from ..training import evaluate
from ..update import logits_of
from .accounting import Guarantee, check_single_images, guarantee, noise_multiplier, opacus


class ModelRefused(ValueError):
    """A model whose images' gradients Opacus cannot tell apart; the message has the remedy."""


def train_privately(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    epochs: int,
    delta: float = 1e-5,
    clip: float = 1.0,
    batch_size: int = 256,
    optimizer: str = "adam",
    lr: float = 1e-3,
    seed: int | None = None,
    test: tuple[Tensor, Tensor] | None = None,
    at_once: int = 64,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train ``model`` in place on the cross-entropy of its logits, so that its weights keep ε.

    *What is protected* is what leaves the client at the end: the weights, and all weights between
    steps. Not the returned losses, which are computed on the private images without noise. Whoever
    computes this training sees the images. Settings that were tried out on the same images have
    cost privacy, too, and are not counted.

    Parameters
    ----------
    model : nn.Module
        Only parameters with ``requires_grad`` are trained. It is left in the mode it came in,
        without traces of Opacus. Our models and timm's are read as they are. torchvision's
        attention is refused: Opacus' own replacement, ``model = ModuleValidator.fix(model)`` from
        ``opacus.validators``, makes a copy of the model that can be trained.
    images : Tensor of shape (N, C, H, W), in model-input space, in the model's dtype
    labels : int64 Tensor of shape (N,)
    epsilon : float
        What all epochs may cost. ``math.inf`` clips as before and adds no noise: what clipping
        alone costs in accuracy.
    epochs : int
        Of ⌈N / batch_size⌉ steps.
    delta : float
    clip : float, C
        Of each image's gradient, over all parameters together.
    batch_size : int
        Images a step on the average; each takes part with probability q = batch_size / N.
    optimizer : "adam" or "sgd"
        SGD with momentum 0.9. Both only see gradients with noise.
    lr : float
    seed : int, optional
        Of noise and sampling, for experiments: whoever knows it can take the noise away. By default
        it comes from the operating system. Neither that generator nor floating-point noise is what
        cryptographers would take.
    test : (images, labels), optional
        Scored after every epoch; never used for a decision.
    at_once : int
        Images whose gradients are held at a time: as many times the model in memory.
    progress : bool, show a progress bar

    Returns
    -------
    list of dict
        One entry for each epoch done: ``epoch`` (from 1), ``loss`` (mean over the images drawn),
        ``epsilon`` (spent so far, at ``delta``), ``accountant`` (that counted it),
        ``noise_multiplier``, ``seconds``, and ``test_accuracy`` where ``test`` was given. Shorter
        than ``epochs`` if Ctrl-C ended the run; the model then has the weights of the last entry,
        or its first ones.

    Raises
    ------
    ValueError
        If an argument makes no sense, a row of ``images`` is several of them, or the loss
        stops being finite.
    ModelRefused
        If Opacus cannot compute the gradient of each image for this model.
    OpacusMissing
        If Opacus is not installed.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> shape = {"image_size": 8, "patch_size": 4, "width": 24, "depth": 1, "heads": 2, "classes": 5}
    >>> model, images = al.VisionTransformer(**shape), torch.rand(64, 3, 8, 8)
    >>> settings = {"epsilon": 8.0, "epochs": 2, "batch_size": 16, "progress": False}
    >>> epochs = train_privately(model, images, torch.arange(64) % 5, **settings)
    >>> [epoch["epoch"] for epoch in epochs], 7 < epochs[-1]["epsilon"] <= 8
    ([1, 2], True)

    References
    ----------
    Abadi et al., CCS 2016, arXiv:1607.00133.
    """
    _check(images, labels, epsilon, delta, {"epochs": epochs, "batch_size": batch_size, "at_once": at_once}, clip, lr)
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f"optimizer={optimizer!r}: 'adam' or 'sgd'")
    rate, steps = min(1.0, batch_size / len(images)), math.ceil(len(images) / batch_size)
    sigma = 0.0
    if epsilon < math.inf:
        sigma = noise_multiplier(epsilon, sample_rate=rate, rounds=steps * epochs, delta=delta)
    history: list[dict[str, Any]] = []
    bar = tqdm(total=epochs, desc="training privately", unit=" epoch", disable=not progress)
    with bar, _private(model, sigma, clip, batch_size, optimizer, lr, seed) as run:
        kept = _copied(model)
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            try:
                loss = _epoch(run, images, labels, rate, steps, at_once)
            except BaseException as broken_off:
                model.load_state_dict(kept)
                if isinstance(broken_off, KeyboardInterrupt):
                    break
                raise
            spent = Guarantee(math.inf, "none")
            if sigma:
                spent = guarantee(sigma, sample_rate=rate, rounds=steps * epoch, delta=delta)
            entry: dict[str, Any] = {"epoch": epoch, "loss": loss, "noise_multiplier": sigma}
            entry |= {"epsilon": spent.epsilon, "accountant": spent.accountant}
            entry["seconds"] = time.perf_counter() - start
            if test is not None:
                entry["test_accuracy"] = evaluate(model, *test)
            history.append(entry)
            kept = _copied(model)
            bar.update()
            bar.set_postfix({k: f"{entry[k]:.3f}" for k in ("loss", "epsilon", "test_accuracy") if k in entry})
    return history


@dataclass(frozen=True)
class _Run:
    """The model with Opacus' hooks, the optimizer that clips and adds noise, and the
    sampling's generator.
    """

    hooked: Any
    optimizer: Any
    sampling: torch.Generator

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.hooked._module.named_parameters() if p.requires_grad}


@contextmanager
def _private(
    model: nn.Module, sigma: float, clip: float, batch_size: int, optimizer: str, lr: float, seed: int | None
) -> Iterator[_Run]:
    """Opacus around the model for as long as it trains; afterwards the model is as it was,
    but for its weights.
    """
    samples, optimizers = opacus("grad_sample"), opacus("optimizers")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("nothing to train: every parameter of the model is frozen")
    was_training = model.training
    model.train()
    try:
        _check_model(model)
        hooked = samples.GradSampleModule(model, loss_reduction="mean")
        try:
            adam = optimizer == "adam"
            inner = torch.optim.Adam(trained, lr=lr) if adam else torch.optim.SGD(trained, lr=lr, momentum=0.9)
            sampling = torch.Generator()
            sampling.seed() if seed is None else sampling.manual_seed(seed)
            noise = torch.Generator(device=trained[0].device)
            noise.seed() if seed is None else noise.manual_seed(seed + 2**32)
            yield _Run(
                hooked,
                optimizers.DPOptimizer(
                    inner,
                    noise_multiplier=sigma,
                    max_grad_norm=clip,
                    expected_batch_size=batch_size,
                    generator=noise,
                ),
                sampling,
            )
        finally:
            hooked.to_standard_module()
            model.zero_grad(set_to_none=True)
            for p in trained:
                vars(p).pop("summed_grad", None)  # the optimizer's, which nobody else clears
    finally:
        model.train(was_training)


def _epoch(run: _Run, images: Tensor, labels: Tensor, rate: float, steps: int, at_once: int) -> float:
    """As many steps as an epoch has: the mean loss of the images that were drawn."""
    device = next(iter(run.trained.values())).device
    total, drawn = 0.0, 0
    for _ in range(steps):
        mask = torch.rand(len(images), generator=run.sampling, dtype=torch.float64) < rate
        chosen = mask.nonzero().squeeze(1)
        parts = chosen.split(at_once)
        for i, part in enumerate(parts):
            run.optimizer.signal_skip_step(do_skip=i + 1 < len(parts))
            loss = 0.0
            if len(part):
                loss = _backward(
                    run, images[part.to(images.device)].to(device), labels[part.to(labels.device)].to(device)
                )
            else:  # nobody was drawn: the step is noise alone, and has to be taken
                for p in run.trained.values():
                    p.grad_sample = p.new_zeros(0, *p.shape)  # type: ignore[attr-defined]
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss}: too large a learning rate, or images that are not finite")
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            total, drawn = total + loss * len(part), drawn + len(part)
    return total / max(1, drawn)


def _backward(run: _Run, images: Tensor, labels: Tensor) -> float:
    """Each image's gradient into ``grad_sample`` of the parameters; the mean loss."""
    # Fused attention has no rule for one gradient an image. The hooks warn that pictures
    # need no gradient.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        loss = nn.functional.cross_entropy(logits_of(run.hooked, images), labels)
        try:
            loss.backward()
        except (NotImplementedError, RuntimeError) as failed:
            raise ModelRefused(
                f"Opacus cannot compute this model's gradient of each image ({failed}). Our models and timm's it can"
            ) from failed
    lacking = [name for name, p in run.trained.items() if getattr(p, "grad_sample", None) is None]
    if lacking:
        raise ModelRefused(
            f"Opacus found no gradient of each image for {', '.join(lacking[:3])} ({len(lacking)} of "
            f"{len(run.trained)} trained parameters): the loss does not depend on them, or their layer hides them. "
            "Freeze them with requires_grad_(False), or train another model"
        )
    return float(loss.detach())


def _check_model(model: nn.Module) -> None:
    """What Opacus refuses, with what it says helps."""
    validator = opacus("validators").ModuleValidator
    errors = validator.validate(model, strict=False)
    if errors:
        refused = sorted({type(m).__name__ for m in model.modules() if type(m) in validator.VALIDATORS})
        raise ModelRefused(
            f"Opacus refuses this model: {', '.join(refused) or 'a layer'} ({len(errors)} of them). Its own remedy "
            "is a copy of the model with other layers: `from opacus.validators import ModuleValidator` and "
            f"`model = ModuleValidator.fix(model)`, then train that. Opacus says: {errors[0]}"
        )


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def _check(
    images: Tensor, labels: Tensor, epsilon: float, delta: float, counts: dict[str, int], clip: float, lr: float
) -> None:
    check_single_images(images)
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: as many of one as of the other, and some")
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be positive; math.inf for clipping without noise")
    if delta * len(images) >= 1:
        raise ValueError(
            f"delta={delta} is no guarantee for {len(images)} images: to publish one of them by lot would keep it. "
            f"It has to be well below {1 / len(images):.1g}"
        )
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    for name, number in (("clip", clip), ("lr", lr)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name}={number} must be positive and finite")
