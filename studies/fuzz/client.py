"""Models, private pictures and updates of worlds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

import aprillab as al

from .worlds import Model, Tampering, World

Tensors = dict[str, Tensor]
STORED = 64  # pixels: side of the photographs that pictures are cut from
# Streams of one seed: what is drawn for one purpose is the same whatever else a world has.
WEIGHTS, PICTURES, LABELS, FACTORS, NOISE, SOME, ENTRY = range(7)


@dataclass(frozen=True)
class Shared:
    """What the server has, and what it should not: the private pixels (B, C, H, W), float64."""

    model: nn.Module
    update: al.ClientUpdate
    pixels: Tensor


def play(world: World) -> Shared:
    """The world's client, in one round.

    Raises
    ------
    UpdateError
        If the client has nothing to share: its loss is not finite, or everything is withheld.
    """
    model = build(world)
    anatomy = al.dissect(model)
    hidden = _hidden(model, world)
    if world.frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in hidden)
    pixels, labels = pictures(world), _labels(world)
    images = anatomy.preprocessing.to_input(pixels).to(getattr(torch, world.dtype))
    update = tampered(world, model, images, labels)
    if world.withheld and not world.frozen:
        update = al.defenses.withhold(update, hidden & set(update.gradients))
    return Shared(model, replace(update, batch_size=world.batch if world.says_batch else None), pixels)


def stream(world: World, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * world.seed + purpose)


# --- Models -------------------------------------------------------------------------------------------------------


def build(world: World) -> nn.Module:
    """The server's model."""
    shape, generator = world.model, stream(world, WEIGHTS)
    seed = int(torch.randint(2**31, (), generator=generator))
    model = {"aprillab": _ours, "timm": _timm, "torchvision": _torchvision}[shape.library](shape, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if shape.jitter or not parameter.any():  # no head of zeros, no bias of zeros but where it is asked for
                parameter += (shape.jitter or 0.02) * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters():
            if shape.scaled and shape.scaled[0] in ("all", group(name)):
                parameter *= shape.scaled[1]
            if shape.zero_head and group(name) == "head":
                parameter.zero_()
    return model.to(getattr(torch, world.dtype)).train(shape.dropout > 0)


def _ours(shape: Model, seed: int) -> nn.Module:
    grid, table = shape.image_size // shape.patch_size, None
    if shape.position == "sinusoidal-2d":
        table = al.sinusoidal_2d((grid, grid), shape.width, prefix=int(shape.class_token))
    return al.VisionTransformer(
        image_size=shape.image_size, patch_size=shape.patch_size, channels=shape.channels, width=shape.width,
        depth=shape.depth, heads=shape.heads, classes=shape.classes, mlp_ratio=2, block=shape.block,
        position=shape.position.removesuffix("-2d"), position_values=table, class_token=shape.class_token,
        bias=shape.bias, seed=seed,
    )  # fmt: skip


def _timm(shape: Model, seed: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer  # as slow to import as a hundred worlds

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(
            img_size=shape.image_size, patch_size=shape.patch_size, in_chans=shape.channels,
            num_classes=shape.classes, embed_dim=shape.width, depth=shape.depth, num_heads=shape.heads, mlp_ratio=2,
            qkv_bias=shape.bias, class_token=shape.class_token, reg_tokens=shape.registers,
            global_pool="token" if shape.class_token else "avg", pos_drop_rate=shape.dropout,
            pos_embed="none" if shape.position == "none" else "learn",
        )  # fmt: skip
    if shape.position == "frozen":
        model.pos_embed.requires_grad_(False)
    return model


def _torchvision(shape: Model, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TorchvisionViT(
            image_size=shape.image_size, patch_size=shape.patch_size, num_layers=shape.depth, num_heads=shape.heads,
            hidden_dim=shape.width, mlp_dim=2 * shape.width, num_classes=shape.classes, dropout=shape.dropout,
        )  # fmt: skip
    model.encoder.pos_embedding.requires_grad_(shape.position != "frozen")
    return model


def group(name: str) -> str:
    """Which of the groups a parameter belongs to, by its name in one of the three libraries."""
    parts = {
        "patch_embed": "patch_embedding", "conv_proj": "patch_embedding", "pos": "position",
        "encoder.pos": "position", "cl": "class_token", "reg_token": "class_token", "blocks": "blocks",
        "encoder.layers": "blocks", "head": "head",
    }  # fmt: skip
    return next((found for start, found in parts.items() if name.startswith(start)), "norm")


# --- Pictures -----------------------------------------------------------------------------------------------------


def pictures(world: World) -> Tensor:
    """The private pixels (B, C, H, W), in the world's precision as the client has
    them, then float64.
    """
    generator = stream(world, PICTURES)
    one = partial(_picture, world.model, generator)
    batch = [one(kind) for kind in (world.pictures[:1] if world.same_pictures else world.pictures)]
    pixels = torch.stack(batch * (world.batch if world.same_pictures else 1))
    return pixels.float().double()


def _picture(shape: Model, generator: torch.Generator, kind: str) -> Tensor:
    size, channels = shape.image_size, shape.channels
    draw: Callable[..., Tensor] = partial(torch.rand, generator=generator, dtype=torch.float64)
    if kind == "victim":
        photographs = _photographs(channels)
        which, top, left = (
            int(torch.randint(most, (), generator=generator))
            for most in (len(photographs), STORED - size + 1, STORED - size + 1)
        )
        return photographs[which, :, top : top + size, left : left + size]
    if kind == "noise":
        return draw(channels, size, size)
    if kind == "tiles":
        patch = draw(channels, shape.patch_size, shape.patch_size)
        return patch.repeat(1, size // shape.patch_size, size // shape.patch_size)
    flat = torch.full((channels, size, size), 0.5, dtype=torch.float64)
    if kind == "flat":
        flat = draw(channels, 1, 1).expand(channels, size, size).clone()
    if kind == "pixel":
        flat[:, size // 2, size // 3] = draw(channels)
    return flat


@functools.cache
def _photographs(channels: int) -> Tensor:
    return al.load_victims(size=STORED, channels=channels, dtype=torch.float64)[0]


def _labels(world: World) -> Tensor:
    labels = torch.randint(world.model.classes, (world.batch,), generator=stream(world, LABELS))
    return labels[:1].expand(world.batch) if world.same_labels else labels


# --- Updates ------------------------------------------------------------------------------------------------------


def tampered(world: World, model: nn.Module, images: Tensor, labels: Tensor) -> al.ClientUpdate:
    """The client's update, after everything that happens to it."""
    done, loss = world.tampering, _loss(world)
    if world.model.dropout:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(world.seed)
            update = al.client_update(model, images, labels, loss=loss)
    elif done.steps:
        update = _local_steps(done, model, images, labels, loss)
    else:
        update = al.client_update(model, images, labels, loss=loss)
    weights = {name: p.detach() for name, p in model.named_parameters() if name in update.gradients}
    if done.weights:
        return replace(update, gradients={name: w - 1e-3 * update.gradients[name] for name, w in weights.items()})
    factors = _factors(world, weights)
    update = replace(
        update,
        gradients={
            name: done.factor * factors.get(name, 1.0) * (g + done.decay * weights[name])
            for name, g in update.gradients.items()
        },
    )
    return _degraded(world, update)


def _loss(world: World) -> Callable[[Tensor, Tensor], Tensor]:
    """Of logits and labels: cross-entropy, or another that a client may have."""
    kind = world.tampering.loss
    if kind == "smoothing":
        return partial(nn.functional.cross_entropy, label_smoothing=0.1)
    if not kind:
        return nn.functional.cross_entropy
    draws = torch.rand(world.batch, world.model.classes, generator=stream(world, LABELS), dtype=torch.float64)
    if kind == "soft":
        soft = (4 * draws).softmax(1)
        return lambda logits, labels: nn.functional.cross_entropy(logits, soft.to(logits))
    findings = (draws < 0.3).double()
    return lambda logits, labels: nn.functional.binary_cross_entropy_with_logits(logits, findings.to(logits))


def _local_steps(
    done: Tampering, model: nn.Module, images: Tensor, labels: Tensor, loss: Callable[..., Tensor]
) -> al.ClientUpdate:
    """Some steps on the same images, as a difference of the two states."""
    local = copy.deepcopy(model)
    trained = [p for p in local.parameters() if p.requires_grad]
    rate: Any = done.learning_rate
    optimizer = torch.optim.Adam(trained, rate) if done.adam else torch.optim.SGD(trained, rate, done.momentum)
    for _ in range(done.steps):
        gradients = al.client_update(local, images, labels, loss=loss).gradients
        for name, parameter in local.named_parameters():
            parameter.grad = gradients.get(name)
        optimizer.step()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    before, after = (dict(m.state_dict()) for m in (model, local))
    return al.update_from_states(
        before, after, learning_rate=done.learning_rate, local_steps=done.steps, trained=names
    )


def _factors(world: World, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """One factor for each tensor, from 0.1 to 10, where there are any."""
    generator, mode = stream(world, FACTORS), world.tampering.factors
    draw = lambda: 10 ** (2 * float(torch.rand((), generator=generator)) - 1)  # noqa: E731
    if mode == "each":
        return {name: draw() for name in weights}
    if mode == "layers":  # a decay of the learning rate from the head down
        rate = 0.5 + 0.45 * draw() / 10
        return {name: rate**depth for depth, name in enumerate(reversed(list(weights)))}
    chosen, factor = {"position": "position", "patch": "patch_embedding"}.get(mode, ""), draw()
    return {name: factor for name in weights if group(name) == chosen}


def _degraded(world: World, update: al.ClientUpdate) -> al.ClientUpdate:
    """Noise, pruning, quantization, a cast, a tensor of zeros, an entry that is not
    finite, in this order.
    """
    done, generator = world.tampering, stream(world, NOISE)

    def noisy(g: Tensor) -> Tensor:
        deviation = done.noise * g.double().square().mean().sqrt()
        return (g.double() + deviation * torch.randn(g.shape, generator=generator, dtype=torch.float64)).to(g.dtype)

    if done.noise:
        update = replace(update, gradients={name: noisy(g) for name, g in update.gradients.items()})
    if done.kept < 1:
        update = al.defenses.prune(update, done.kept)
    if done.bits:
        update = al.defenses.quantize(update, done.bits)
    if done.cast:
        update = update.to(dtype=getattr(torch, done.cast))
    return _spoiled(world, update) if done.zeroed or done.poisoned else update


def _spoiled(world: World, update: al.ClientUpdate) -> al.ClientUpdate:
    """One tensor with zeros alone, or with an entry that is not finite."""
    generator, gradients = stream(world, ENTRY), dict(update.gradients)
    names = list(gradients)
    if world.tampering.zeroed:
        name = names[int(torch.randint(len(names), (), generator=generator))]
        gradients[name] = torch.zeros_like(gradients[name])
    if world.tampering.poisoned:
        name = names[int(torch.randint(len(names), (), generator=generator))]
        gradients[name] = gradients[name].clone()
        entry = int(torch.randint(gradients[name].numel(), (), generator=generator))
        gradients[name].view(-1)[entry] = float(("nan", "inf", "-inf")[entry % 3])
    return replace(update, gradients=gradients)


def _hidden(model: nn.Module, world: World) -> set[str]:
    """Names of the parameters that the client does not share."""
    anatomy: Any = al.dissect(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    generator, hidden = stream(world, SOME), set()
    for part in world.withheld:
        if part == "some":
            hidden |= {name for name in trained if float(torch.rand((), generator=generator)) < 0.3}
        elif part == "attention":
            hidden |= {rows.name for rows in (anatomy.query, anatomy.key, anatomy.value) if rows}
        else:
            fields = {
                "position": ("position",), "head": ("head_weight", "head_bias"), "patch": ("patch_weight",),
                "head_weight": ("head_weight",), "head_bias": ("head_bias",),
            }[part]  # fmt: skip
            hidden |= {getattr(anatomy, field) for field in fields}
    return hidden & set(trained)
