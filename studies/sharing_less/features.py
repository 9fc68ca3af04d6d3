"""Head only, last block only: what leaks where no closed form applies.

The head's gradient is r fᵀ, its bias's is r: so f = ∂W_c / r_c, the features that the head reads,
exactly. Whoever has candidates, sixteen photographs here, and the model computes theirs and takes
the nearest. The last block's attention says more: its ∂W_Q, ∂W_K, ∂W_V span what it reads of the
tokens. A candidate's tokens are held against that span, for none of them is affine in the pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

import aprillab as al

from .._rows import fill
from .models import Standard, build, given_to

LINES = (
    Standard("ViT-B/16", 224, 16, 768, 12),
    Standard("DeiT-S/16, distilled", 224, 0, 0, 0, "deit_small_distilled_patch16_224"),
    Standard("SigLIP B/16", 224, 0, 0, 0, "vit_base_patch16_siglip_224"),
    Standard("DINOv2 S/14", 224, 14, 384, 6, "transformers"),
)
QUICK = (Standard("tiny/4", 32, 4, 192, 3),)
LABEL = 3
_BLUR, _SIGMA = 5, 1.0  # of the candidate that is only like the victim


@dataclass(frozen=True)
class Found:
    """One victim's update; what its head and its last block give away.

    ``relative`` and ``cosine`` compare the features read off the head with the true ones;
    ``nearest`` and ``of_span`` say whether the right one of the candidates was taken; ``margin`` is
    the distance of the second best over that of the best; ``inside`` and ``outside`` are the parts
    of the tokens' length outside the span, of the victim and of the best other candidate;
    ``directions`` of ``tokens`` is the span's rank.
    """

    model: str
    victim: str
    dtype: str
    relative: float
    cosine: float
    nearest: bool
    margin: float
    nearest_changed: bool
    directions: int
    tokens: int
    of_span: bool
    inside: float
    outside: float


class Candidates(NamedTuple):
    """Pictures that the attacker holds against an update, and what the model makes of each."""

    names: tuple[str, ...]
    images: Tensor  # (N, C, H, W), model input
    features: Tensor  # (N, d), float64
    tokens: Tensor  # (N, t, d) that the last attention reads, float64


# --- What is read off an update -----------------------------------------------------------------------------------


def features_from_head(update: al.ClientUpdate, anatomy: al.Anatomy) -> Tensor:
    """f (d,), float64: ∂W = r fᵀ and ∂b = r, solved by least squares over the classes.

    >>> r, f = torch.tensor([0.25, -0.5, 0.25]), torch.tensor([1.0, 2.0])
    >>> anatomy = al.Anatomy("mine", (1, 1), "w", head_weight="h", head_bias="b")
    >>> features_from_head(al.ClientUpdate({"h": torch.outer(r, f), "b": r}), anatomy).tolist()
    [1.0, 2.0]
    """
    r = update.gradients[anatomy.head_bias or ""].double()
    return update.gradients[anatomy.head_weight or ""].double().T @ r / r.square().sum()


def span_of_last(update: al.ClientUpdate, names: tuple[str, ...]) -> Tensor:
    """Orthonormal columns (d, k) of the span of the rows of the last attention's gradients."""
    rows = torch.cat([update.gradients[name].double() for name in names])
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    s, Vt = torch.linalg.svd(rows, full_matrices=False)[1:]
    eps = torch.finfo(update.dtype).eps
    return Vt[s > 10 * eps * s[0] * len(rows) ** 0.5].T


def outside_of(tokens: Tensor, span: Tensor) -> Tensor:
    """How much of the span (d, k) lies outside the tokens (N, t, d) of each candidate, (N,)
    relative.

    The span's directions are sums of the tokens: those of the right picture contain them.
    """
    parts = []
    for own in tokens:
        Q = torch.linalg.qr(own.T).Q
        parts.append((span - Q @ (Q.T @ span)).norm() / span.norm())
    return torch.stack(parts)


# --- The client and its candidates --------------------------------------------------------------------------------


def last_attention(model: nn.Module, anatomy: al.Anatomy) -> tuple[tuple[str, ...], str]:
    """Names of the last block's W_Q, W_K and W_V, and the path of the module that reads its tokens.

    They are called as the first block's are, with another number.
    """
    first = [rows.name for rows in (anatomy.query, anatomy.key, anatomy.value) if rows is not None]
    lists = [
        path for path, module in model.named_modules()
        if path and isinstance(module, nn.ModuleList | nn.Sequential) and first[0].startswith(f"{path}.")
    ]  # fmt: skip
    blocks = max(lists, key=len)
    last = f"{blocks}.{len(model.get_submodule(blocks)) - 1}"  # type: ignore[arg-type]
    names = tuple(dict.fromkeys(last + name.removeprefix(f"{blocks}.0") for name in first))
    return names, names[0].rpartition(".")[0]


def candidates_of(model: nn.Module, anatomy: al.Anatomy, pixels: Tensor, names: tuple[str, ...]) -> Candidates:
    """The model's view of every candidate."""
    images, head = anatomy.preprocessing.to_input(pixels), (anatomy.head_weight or "").rpartition(".")[0]
    each = [given_to(model, (head, last_attention(model, anatomy)[1]), image[None]) for image in images]
    found, tokens = (torch.cat(parts).double() for parts in zip(*each, strict=True))
    return Candidates(names, images, found.reshape(len(images), -1), tokens)


def experiment(line: Standard, dtype: torch.dtype = torch.float32) -> Iterator[Found]:
    """Every photograph once as the victim, all of them as candidates."""
    model, anatomy = build(line)
    model = model.to(dtype)
    yield from of_model(line.label, model, anatomy, dtype)


def of_model(label: str, model: nn.Module, anatomy: al.Anatomy, dtype: torch.dtype) -> Iterator[Found]:
    """The same for any model, with trained weights too."""
    pixels, names = al.load_victims(size=anatomy.image_size[0], channels=anatomy.channels or 3, dtype=dtype)
    known = candidates_of(model, anatomy, pixels, tuple(names))
    blurred = candidates_of(model, anatomy, gaussian_blur(pixels, _BLUR, _SIGMA), tuple(names))
    attention = last_attention(model, anatomy)[0]
    for i, name in enumerate(names):
        update = al.client_update(model, known.images[i : i + 1], torch.tensor([LABEL]))
        f, true = features_from_head(update, anatomy), known.features[i]
        distances = (known.features - f).norm(dim=1)
        best, second = distances.topk(2, largest=False).values.tolist()
        span = span_of_last(update, attention)
        parts = outside_of(known.tokens, span)
        yield Found(
            model=label, victim=name, dtype=str(dtype).removeprefix("torch."),
            relative=float((f - true).norm() / true.norm()),
            cosine=float(torch.nn.functional.cosine_similarity(f, true, dim=0)),
            nearest=int(distances.argmin()) == i, margin=second / max(best, 1e-300),
            nearest_changed=int((blurred.features - f).norm(dim=1).argmin()) == i,
            directions=span.shape[1], tokens=known.tokens.shape[1],
            of_span=int(parts.argmin()) == i, inside=float(parts[i]),
            outside=float(parts[[j for j in range(len(names)) if j != i]].min()),
        )  # fmt: skip


# --- The study's part ---------------------------------------------------------------------------------------------


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Fill features.csv, a model after the other."""
    lines = {line.label: line for line in (QUICK if options.quick else LINES)}
    fill(
        folder / "features.csv", Found, [(label,) for label in lines],
        lambda case: list(experiment(lines[case[0]])), key=("model",), workers=options.workers,
    )  # fmt: skip


__all__ = ["Found", "experiment", "features_from_head", "measure", "of_model", "outside_of"]
