"""Ways to one evaluation of gradient matching, the distance and its gradient to the picture.

The distance is D(x) = Σ ‖∇w l(x, w) − g‖² over all parameters; its gradient is ∇D = Jᵀ u, where
u = 2 (∇w l − g) and J = ∂(∇w l)/∂x. Every way below gives both:

- double backward: ∇w with its graph, and backward through that; what the package does;
- forward over reverse: second derivatives commute, so Jᵀ u = d/dε ∇x l(x, w + ε u) at ε = 0. The
  parameters carry u as the tangent of dual numbers through an ordinary ∇x;
- reverse over forward: Jᵀ u = ∇x (d/dε l(x, w + ε u)), the two the other way round, by torch.func;
- one-sided difference: the same derivative as (∇x l(x, w + h u) − ∇x l(x, w)) / h, whose second
  term falls out of the backward pass that yields ∇w: two plain backward passes, which any attention
  kernel allows;
- central difference: between w + h u and w − h u, three passes;
- torch.func: grad of grad;
- compiled: torch.func's grad of grad, and the one-sided difference, through torch.compile.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from aprillab.models import Attention


@dataclass(frozen=True)
class Task:
    """A model, what the client shared, and the label: all of an evaluation but the picture."""

    model: nn.Module
    labels: Tensor
    targets: tuple[Tensor, ...]  # in the order of the model's parameters

    @property
    def parameters(self) -> dict[str, Tensor]:
        """By name, detached."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def loss(self, images: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        logits = self.model(images) if parameters is None else functional_call(self.model, parameters, (images,))
        return cross_entropy(logits, self.labels)

    def gradients(self, images: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(images), list(self.model.parameters()), create_graph=create_graph)


Evaluation = tuple[Tensor, Tensor]  # D and ∇D
Way = Callable[[Task, Tensor], Evaluation]


def task_of(model: nn.Module, private: Tensor, labels: Tensor) -> Task:
    """What is left of a client's private images (B, C, H, W) once it has shared their gradient."""
    task = Task(model, labels, ())
    return Task(model, labels, task.gradients(private))


def _distance(gradients: tuple[Tensor, ...] | list[Tensor], targets: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(g - t).square().sum() for g, t in zip(gradients, targets, strict=True)]).sum()


def _direction(gradients: tuple[Tensor, ...] | list[Tensor], targets: tuple[Tensor, ...]) -> list[Tensor]:
    """u, the gradient of D with respect to the gradients."""
    return list(torch._foreach_mul(torch._foreach_sub(list(gradients), list(targets)), 2.0))


def double_backward(task: Task, images: Tensor) -> Evaluation:
    images = images.detach().requires_grad_()
    distance = _distance(task.gradients(images, create_graph=True), task.targets)
    return distance.detach(), torch.autograd.grad(distance, images)[0]


def forward_over_reverse(task: Task, images: Tensor) -> Evaluation:
    gradients = task.gradients(images)
    u = _direction(gradients, task.targets)
    images = images.detach().requires_grad_()
    with forward_ad.dual_level():
        dual = {
            name: forward_ad.make_dual(p, tangent)
            for (name, p), tangent in zip(task.parameters.items(), u, strict=True)
        }
        to_images = torch.autograd.grad(task.loss(images, dual), images)[0]
        return _distance(gradients, task.targets), forward_ad.unpack_dual(to_images).tangent


def reverse_over_forward(task: Task, images: Tensor) -> Evaluation:
    gradients = task.gradients(images)
    parameters = task.parameters
    u = dict(zip(parameters, _direction(gradients, task.targets), strict=True))

    def slope(images: Tensor) -> Tensor:
        return jvp(lambda w: task.loss(images, w), (parameters,), (u,))[1]

    return _distance(gradients, task.targets), grad(slope)(images)


def one_sided_difference(task: Task, images: Tensor) -> Evaluation:
    images = images.detach().requires_grad_()
    *gradients, here = torch.autograd.grad(task.loss(images), [*task.model.parameters(), images])
    u = _direction(gradients, task.targets)
    h = _step(u)
    return _distance(gradients, task.targets), (_to_images(task, images, u, h) - here) / h


def central_difference(task: Task, images: Tensor) -> Evaluation:
    images = images.detach().requires_grad_()
    gradients = task.gradients(images)
    u = _direction(gradients, task.targets)
    h = _step(u)
    ahead, behind = (_to_images(task, images, u, step) for step in (h, -h))
    return _distance(gradients, task.targets), (ahead - behind) / (2 * h)


def _step(u: list[Tensor]) -> float:
    """h, for a step h u of length √ε: rounding grows as 1/h, the neglected curvature as h."""
    length = float(torch.stack([t.norm() for t in u]).norm())
    return math.sqrt(torch.finfo(u[0].dtype).eps) / max(length, torch.finfo(u[0].dtype).tiny ** 0.5)


def _to_images(task: Task, images: Tensor, u: list[Tensor], h: float) -> Tensor:
    """∇x l(x, w + h u)."""
    parameters = task.parameters
    moved = torch._foreach_add(list(parameters.values()), u, alpha=h)
    return torch.autograd.grad(task.loss(images, dict(zip(parameters, moved, strict=True))), images)[0]


def grad_of_grad(task: Task, images: Tensor) -> Evaluation:
    return _grad_of_grad(task, images, task.parameters, task.targets)


def _grad_of_grad(
    task: Task, images: Tensor, parameters: dict[str, Tensor], targets: tuple[Tensor, ...]
) -> Evaluation:
    def distance(images: Tensor) -> Tensor:
        gradients = grad(lambda w: task.loss(images, w))(parameters)
        return _distance(list(gradients.values()), targets)

    gradient, value = grad_and_value(distance)(images)
    return value, gradient


WAYS: dict[str, Way] = {
    "double backward": double_backward,
    "forward over reverse": forward_over_reverse,
    "reverse over forward": reverse_over_forward,
    "one-sided difference": one_sided_difference,
    "central difference": central_difference,
    "torch.func, grad of grad": grad_of_grad,
}


# --- Compilation --------------------------------------------------------------------------------------------------


def compiled_grad_of_grad(task: Task) -> Way:
    compiled = torch.compile(partial(_grad_of_grad, task))
    return lambda task, images: compiled(images, task.parameters, task.targets)


def compiled_one_sided_difference(task: Task) -> Way:
    """Both backward passes compiled; the step between them is not."""
    both = torch.compile(grad(lambda w, images: task.loss(images, w), argnums=(0, 1)))
    to_images = torch.compile(grad(lambda w, images: task.loss(images, w), argnums=1))

    def evaluate(task: Task, images: Tensor) -> Evaluation:
        parameters = task.parameters
        gradients, here = both(parameters, images)
        u = _direction(list(gradients.values()), task.targets)
        h = _step(u)
        moved = torch._foreach_add(list(parameters.values()), u, alpha=h)
        there = to_images(dict(zip(parameters, moved, strict=True)), images)
        return _distance(list(gradients.values()), task.targets), (there - here) / h

    return evaluate


def compiled_model(task: Task) -> Way:
    """The model compiled, double backward as before."""
    compiled = Task(torch.compile(task.model), task.labels, task.targets)  # type: ignore[arg-type]
    return lambda _, images: double_backward(compiled, images)


COMPILED: dict[str, Callable[[Task], Way]] = {
    "compiled grad of grad": compiled_grad_of_grad,
    "compiled one-sided difference": compiled_one_sided_difference,
    "compiled model, double backward": compiled_model,
}


# --- Attention kernels --------------------------------------------------------------------------------------------


class KernelAttention(Attention):
    """The same attention, but PyTorch chooses among its kernels."""

    def forward(self, z: Tensor) -> Tensor:
        b, t, d = z.shape
        q, k, v = (
            linear(z).reshape(b, t, self.heads, d // self.heads).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


def with_kernels(model: nn.Module) -> nn.Module:
    """A copy whose attention goes through PyTorch's kernels; parameters in the same order."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = KernelAttention  # same parameters, same attributes, another forward
    return model


def torchvision_vit(image_size: int = 32, patch_size: int = 4, width: int = 192, depth: int = 4) -> nn.Module:
    """torchvision's ViT, small, with a head that is not zero."""
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(image_size, patch_size, depth, width // 64, width, 4 * width, num_classes=10)
        nn.init.normal_(model.heads.head.weight, std=0.02)
    return model.eval()


KERNELS = {"math": [SDPBackend.MATH], "fused": [SDPBackend.FLASH_ATTENTION]}


def under(kernel: str, way: Way) -> Way:
    def evaluate(task: Task, images: Tensor) -> Evaluation:
        with sdpa_kernel(KERNELS[kernel]):
            return way(task, images)

    return evaluate
