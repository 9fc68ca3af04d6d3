"""The cases of a comparison: which attack meets which client, and the private pictures behind them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..attacks.catalogue import ATTACKS
from ..data import load_victim, mnist5k, read_picture, victims
from ..zoo import Position

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class CompareError(ValueError):
    """A comparison that cannot be made: an unknown name, or a file that holds another one."""


@dataclass(frozen=True)
class Case:
    """One attack on one client's update.

    Attributes
    ----------
    attack : key of :data:`aprillab.attacks.catalogue.ATTACKS`
    victims : tuple of str
        The batch: names of :func:`aprillab.victims`; picture files, which have a dot or a slash in
        their names; or ``"mnist:K"`` for the K-th test digit of :func:`aprillab.mnist5k` (the split
        of seed 0; one channel, 28 × 28 pixels, its own label).
    model, image_size, patch_size, width, depth, heads, mlp_ratio, channels, classes, position
        As in :func:`~aprillab.zoo.build_model`; None for what the model's name implies.
    weights : "init" or a path
        Random weights, or a file of them, in whose name ``{model}``, ``{position}`` and ``{seed}``
        are filled in.
    dtype : {"float32", "float64"}, of the client's model and gradient
    labels : {"recover", "given"}
        Whether the attacker has to find the labels, if it needs them, or is told.
    seed : int
        Of random weights, the photographs' labels (drawn, all different in a batch) and the
        search's first guess.
    """

    attack: str
    victims: tuple[str, ...]
    model: str = "prenorm"
    image_size: int = 32
    patch_size: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    channels: int = 3
    classes: int = 10
    position: Position = "learned"
    weights: str = "init"
    dtype: str = "float32"
    labels: Literal["recover", "given"] = "recover"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("position", self.position, get_args(Position)),
            ("precision", self.dtype, list(DTYPES)),
            ("labels", self.labels, ["recover", "given"]),
        ):
            if value not in known:
                raise CompareError(f"{name} {value!r} is none of {', '.join(known)}")
        for name in self.victims:
            _check_victim(self, name)
        if not 1 <= len(self.victims) <= self.classes:
            raise CompareError(f"{len(self.victims)} victims in a batch: from 1 to the {self.classes} classes")

    @property
    def batch_size(self) -> int:
        return len(self.victims)

    @property
    def weights_file(self) -> Path | None:
        """The file of this case's weights; None for random ones."""
        if self.weights == "init":
            return None
        name = self.weights
        for part in ("model", "position", "seed"):
            name = name.replace(f"{{{part}}}", str(getattr(self, part)))
        return Path(name)

    @functools.cached_property
    def update(self) -> str:
        """Twelve hexadecimal digits that all attacks on the same update share."""
        facts = {name: cell(value) for name, value in asdict(self).items() if name not in ("attack", "labels")}
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _check_victim(case: Case, name: str) -> None:
    source, colon, number = name.partition(":")
    if source == "mnist" and colon:
        if not number.isdecimal() or (case.channels, case.image_size) != (1, 28) or case.classes < 10:
            raise CompareError(
                f"victim {name!r}: mnist:K is a test digit by its number, for models of one channel, 28 pixels and "
                f"10 classes or more, not of {case.channels}, {case.image_size} and {case.classes}"
            )
    elif is_file(name):
        if "+" in name:
            raise CompareError(f"victim {name!r}: a plus parts the pictures of a batch; give the file another name")
    elif name not in victims():
        raise CompareError(
            f"there is no victim {name!r}; there are {', '.join(victims())}, mnist:K, and picture files, with a dot "
            "or a slash in their names"
        )


def is_file(victim: str) -> bool:
    """Whether a victim is a picture file of the user's, by its name.

    Examples
    --------
    >>> is_file("holiday.jpg"), is_file("./coffee"), is_file("coffee")
    (True, True, False)
    """
    return any(mark in victim for mark in "./\\")


def cell(value: Any) -> str:
    """A value as the text of a CSV's cell: numbers to six digits, tuples with a plus between.

    Examples
    --------
    >>> cell(2 / 3), cell(("coffee", "rocket")), cell(None)
    ('0.666667', 'coffee+rocket', '')
    """
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "+".join(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def cross(
    *,
    victims: Sequence[str],
    attacks: Sequence[str] = tuple(ATTACKS),
    models: Sequence[str] = ("prenorm",),
    positions: Sequence[str] = ("learned",),
    dtypes: Sequence[str] = ("float32",),
    weights: Sequence[str] = ("init",),
    seeds: Sequence[int] = (0,),
    batch_sizes: Sequence[int] = (1,),
    **common: Any,
) -> list[Case]:
    """Every combination, seed by seed, so that a run which is broken off has whole seeds.

    Parameters
    ----------
    victims : names
        Cut into batches in this order; what is left over at the end is left out.
    attacks, models, positions, dtypes, weights, seeds
        Values of :class:`Case`'s fields.
    batch_sizes : ints
    **common
        Other fields of :class:`Case`, the same in all.

    Raises
    ------
    CompareError
        If a name is unknown, or a batch larger than the list of victims.

    Examples
    --------
    >>> both = ["coffee", "rocket"]
    >>> cases = cross(victims=both, attacks=["span"], positions=["learned", "frozen"], batch_sizes=[1, 2])
    >>> len(cases), cases[-1].victims
    (6, ('coffee', 'rocket'))
    """
    if too_large := [size for size in batch_sizes if not 1 <= size <= len(victims)]:
        raise CompareError(f"a batch of {too_large[0]} cannot be made of {len(victims)} victims")
    return [
        Case(
            attack=attack, victims=tuple(victims[i : i + size]), model=model, position=position, dtype=dtype,  # type: ignore[arg-type]
            weights=file, seed=seed, **common,
        )
        for seed in seeds
        for size in batch_sizes
        for model in models
        for file in weights
        for dtype in dtypes
        for position in positions
        for i in range(0, len(victims) - size + 1, size)
        for attack in attacks
    ]  # fmt: skip


def private_pictures(case: Case) -> tuple[Tensor, Tensor]:
    """Pixels (B, C, H, W) and labels (B,): a digit's own, a photograph's drawn from those that are
    left. A file that is no picture raises :class:`~aprillab.data.PictureError`.

    Examples
    --------
    >>> pixels, labels = private_pictures(Case("span", ("coffee", "rocket"), seed=1))
    >>> pixels.shape, len(set(labels.tolist()))
    (torch.Size([2, 3, 32, 32]), 2)
    """
    pixels: list[Tensor] = []
    labels: list[int | None] = []
    for name in case.victims:
        if is_file(name):
            pixels.append(read_picture(name, case.image_size, channels=case.channels, dtype=torch.float64))
            labels.append(None)
            continue
        if not name.startswith("mnist:"):
            pixels.append(load_victim(name, case.image_size, channels=case.channels, dtype=torch.float64))
            labels.append(None)
            continue
        try:
            images, known = mnist5k("test", dtype=torch.float64)
        except ImportError as error:
            raise CompareError(f"victim {name!r}: {error}") from error
        number = int(name.removeprefix("mnist:"))
        if number >= len(images):
            raise CompareError(f"victim {name!r}: there are {len(images)} test digits, from mnist:0")
        pixels.append(images[number])
        labels.append(int(known[number]))
    drawn = torch.randperm(case.classes, generator=torch.Generator().manual_seed(case.seed)).tolist()
    free = iter([label for label in drawn if label not in labels])
    return torch.stack(pixels), torch.tensor([next(free) if label is None else label for label in labels])
