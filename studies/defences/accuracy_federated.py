"""Training in which every client defends its own gradient, and the defences for many clients at
once.

A round is one step of federated SGD: each client sends the defended gradient of its images, the
server averages what it is sent and takes a step of AdamW, with the rates of
:func:`aprillab.training.train`. Without a defence this *is* that training, up to rounding.

The clients' gradients are computed together, tensor by tensor with a row for each client. So are
the defences, and each client's result is what `aprillab.defenses` makes of its update alone, up to
float32's rounding. Noise is the one exception: what the server averages holds the mean of n
independent draws, which is distributed as one draw of 1/√n the deviation, and that is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from aprillab.training import evaluate

Gradients = dict[str, Tensor]  # by parameter, each of shape (clients, *parameter)
Defence = Callable[[Gradients], Gradients]  # what each client does to its own

RATE, DECAY, WARMUP = 2e-3, 0.05, 0.1  # of studies.accuracy


# --- Clients ------------------------------------------------------------------------------------------------------


def client_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Gradients:
    """The gradient of each of n clients with one image: images (n, C, H, W), labels (n,)."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: Mapping[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, dict(parameters), (image[None],)), label[None])

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no rule for vmap
        return vmap(grad(loss), (None, 0, 0))(trained, images, labels)


def norms(gradients: Gradients) -> Tensor:
    """L2 norm of each client's update, all tensors together: float64 of shape (clients,)."""
    lengths = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()]
    return torch.stack(lengths).double().square().sum(0).sqrt()


# --- Defences -----------------------------------------------------------------------------------------------------


def untouched(gradients: Gradients) -> Gradients:
    return gradients


def clipped(gradients: Gradients, clip: float) -> Gradients:
    """As :func:`aprillab.defenses.clip`, each client for itself."""
    factors = (clip / norms(gradients)).clamp(max=1)
    return {name: g * _column(factors, g) for name, g in gradients.items()}


def pruned(gradients: Gradients, keep: float) -> Gradients:
    """As :func:`aprillab.defenses.prune`; where several entries tie for the last place all of them
    stay.
    """
    magnitudes = torch.cat([g.abs().flatten(1) for g in gradients.values()], 1)
    place = magnitudes.shape[1] - max(1, round(keep * magnitudes.shape[1]))
    # NumPy's partition takes a fifth of the time of PyTorch's topk.
    least = torch.from_numpy(np.partition(magnitudes.numpy(), place, axis=1)[:, place].copy())
    return {name: g * (g.abs() >= _column(least, g)) for name, g in gradients.items()}


def quantized(gradients: Gradients, bits: int) -> Gradients:
    """As :func:`aprillab.defenses.quantize` to the nearest level."""
    levels = 2 ** (bits - 1) - 1

    def rounded(g: Tensor) -> Tensor:
        flat = g.flatten(1)
        step = torch.maximum(flat.amax(1), -flat.amin(1)) / levels
        step = _column(torch.where(step > 0, step, 1.0), g)
        return (g / step).round_().mul_(step)

    return {name: rounded(g) for name, g in gradients.items()}


def signs(gradients: Gradients) -> Gradients:
    """One bit an entry: whether it is positive, and nothing of its size (signSGD with averaged
    votes).
    """
    return {name: g.sign() for name, g in gradients.items()}


def in_bfloat16(gradients: Gradients) -> Gradients:
    """As :func:`aprillab.defenses.to_precision`; the server computes on in the model's dtype."""
    return {name: g.bfloat16().to(g.dtype) for name, g in gradients.items()}


def _column(values: Tensor, like: Tensor) -> Tensor:
    """A value for each client, in a shape and dtype that multiply its gradient."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


# --- Server -------------------------------------------------------------------------------------------------------


def train_federated(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    defend: Defence,
    *,
    epochs: int,
    seed: int,
    clients: int = 50,
    deviation: float = 0.0,
    test: tuple[Tensor, Tensor],
) -> float:
    """Train in place on clients of one image each; the accuracy on the test images
    after the last epoch.

    Parameters
    ----------
    model : nn.Module without dropout, on the CPU
    images, labels : (N, C, H, W) in model-input space, and (N,)
    defend : what every client does to its gradient
    epochs, seed : the order of the images is that of :func:`aprillab.training.train` for the same seed
    clients : that take part in a round; in an epoch each takes part once
    deviation : of the noise that each client adds to each entry after ``defend``
    test : images and labels
    """
    steps = math.ceil(len(images) / clients)
    optimizer, schedule = _adamw(model, rising=max(1, round(WARMUP * steps * epochs)), steps=steps * epochs)
    order, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(2**32 + seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order).split(clients):
            sent = defend(client_gradients(model, images[chosen], labels[chosen]))
            for name, p in model.named_parameters():
                if name in sent:
                    p.grad = sent[name].mean(0)
                    if deviation:  # the mean of the clients' draws
                        draw = torch.randn(p.shape, generator=noise, dtype=p.dtype)
                        p.grad += deviation / len(chosen) ** 0.5 * draw
            optimizer.step()
            schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return evaluate(model, *test)


def _adamw(
    model: nn.Module, rising: int, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with decay on matrices alone; its rate rises in a line, then falls along
    half a cosine to zero.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed: Sequence[nn.Parameter] = [p for p in trained if p.ndim >= 2]
    rest = [p for p in trained if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
