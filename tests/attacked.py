"""A small victim of the closed forms, its private pictures, and how near an attack came."""

import torch

import aprillab as al

SHAPE = {"image_size": 16, "patch_size": 4, "width": 96, "depth": 2, "heads": 3, "classes": 7}
BLOCKS = {"embedding": "prenorm", "april": "april", "span": "prenorm"}


def make(block="prenorm", position="learned", dtype=torch.float64, **changes):
    model = al.VisionTransformer(**{**SHAPE, "block": block, "position": position, **changes}).to(dtype)
    return model.eval()


def private(model, batch=1, seed=0):
    """Random pictures in [0, 1] for ``model``: noise, the hardest picture for any prior."""
    parameter = model.head.weight
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.channels, model.image_size, model.image_size)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def attack(model, pixels, name, labels=(3,), withhold=(), **options):
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor(labels), withhold=withhold)
    return al.invert(model, update, attack=name, **options)


def db(reconstruction, pixels):
    return min(al.psnr(r, p) for r, p in zip(reconstruction.pixels, pixels.double(), strict=True))
