"""A seed makes a world: a small model, what its client does, and what happens to the update.

Counts decide what a closed form can do, so widths are drawn around every count: patches n, pixels a
patch p, tokens, and min(p, n) + tokens. Everything is drawn from one generator, in one order: a new
choice goes to the end of :func:`draw`, so that the worlds before it stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

T = TypeVar("T")

GROUPS = ("patch_embedding", "position", "class_token", "blocks", "norm", "head")  # tensors that go together
MOST_PATCHES, MOST_WIDTH = 64, 144  # of all but one world in fifty, and of all


KINDS = {
    "adam": "Adam", "loss": "another loss", "decay": "weight decay", "factors": "factor per tensor",
    "factor": "factor in common",
    "noise": "noise", "kept": "pruned", "bits": "quantized", "cast": "cast", "zeroed": "a tensor of zeros",
    "poisoned": "not finite", "weights": "weights sent",
}  # fmt: skip
VANISHED = "a gradient rounds to zero"
#: After these an update may hold too little of the picture, so that a refusal can be right.
LOSSY = (VANISHED, "noise", "pruned", "quantized", "cast", "a tensor of zeros", "not finite", "weights sent", "Adam")


@dataclass(frozen=True)
class Model:
    """A Vision Transformer: ours, torchvision's or timm's."""

    library: str
    image_size: int
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    classes: int
    block: str
    position: str  # learned, frozen, sinusoidal, sinusoidal-2d, none
    class_token: bool
    bias: bool
    registers: int = 0  # timm's
    dropout: float = 0.0  # torchvision's and timm's, in training mode
    jitter: float = 0.0  # standard deviation of what is added to every weight
    scaled: tuple[str, float] | None = None  # a group of tensors, or "all", and its factor
    zero_head: bool = False

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def pixels_per_patch(self) -> int:
        return self.channels * self.patch_size**2


@dataclass(frozen=True)
class Tampering:
    """What happens to an update besides one gradient of the mean cross-entropy; nothing by default."""

    loss: str = ""  # in place of cross-entropy: "smoothing", "binary" (several findings), "soft" (targets)
    steps: int = 0  # local steps, sent as a difference of states; 0: the gradient itself
    adam: bool = False  # in place of SGD
    momentum: float = 0.0
    learning_rate: float = 1e-2
    decay: float = 0.0  # of the weights, added to the gradient
    factors: str = ""  # one per tensor: "each", "layers", "position", "patch"
    factor: float = 1.0  # in common
    noise: float = 0.0  # standard deviation, in units of each tensor's root mean square
    kept: float = 1.0  # share of the entries that are not set to zero
    bits: int = 0  # of a quantization
    cast: str = ""  # to this dtype
    zeroed: bool = False  # one tensor
    poisoned: bool = False  # one entry is not a number, or infinite
    weights: bool = False  # the weights are sent in place of the update

    def kinds(self) -> str:
        """What is not as by default, in words."""
        plain = Tampering()
        found = [word for name, word in KINDS.items() if getattr(self, name) != getattr(plain, name)]
        if self.steps and not self.adam:
            found.insert(0, "states" if self.steps == 1 else "local steps")
        return ", ".join(found)


@dataclass(frozen=True)
class World:
    """A model, its client's private pictures, what is withheld, and what happens to the update."""

    seed: int
    model: Model
    dtype: str
    pictures: tuple[str, ...]  # one for each image: a victim's name, flat, noise, pixel or tiles
    same_pictures: bool
    same_labels: bool
    says_batch: bool
    withheld: tuple[str, ...]  # position, head, head_weight, head_bias, patch, attention, some
    frozen: bool  # the withheld tensors are not trained at all
    tampering: Tampering

    @property
    def batch(self) -> int:
        return len(self.pictures)

    def kinds(self) -> str:
        """What happens to the update, in words: "" for a plain gradient."""
        dropout = "dropout" if self.model.dropout else ""
        return ", ".join(filter(None, (dropout, self.tampering.kinds())))

    def ideal(self) -> World:
        """The same client with the same tensors shared, in float64, and nothing else
        done to the update.
        """
        model = replace(self.model, dropout=0.0)
        return replace(self, model=model, dtype="float64", says_batch=False, tampering=Tampering())


class Dice:
    """Draws from one generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def integer(self, low: int, high: int) -> int:
        """From low to high, both among them."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def power(self, low: float, high: float) -> float:
        """Ten to the power of a uniform number."""
        return 10 ** self.uniform(low, high)

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.integer(0, len(choices) - 1)]


def draw(seed: int) -> World:
    """The world of a seed."""
    dice = Dice(seed)
    model = _model(dice)
    dtype = "float64" if dice.chance(0.4) else "float32"
    batch = dice.pick((1, 1, 1, 1, 1, 2, 2, 3))
    same_pictures = batch > 1 and dice.chance(0.3)
    pictures = tuple(_picture(dice) for _ in range(batch))
    same_labels, says_batch = dice.chance(0.5), dice.chance(0.5)
    withheld = _withheld(dice) if dice.chance(0.25) else ()
    frozen = bool(withheld) and dice.chance(0.3)
    tampering = _tampering(dice) if dice.chance(0.65) else Tampering()
    return World(
        seed, model, dtype, pictures[:1] * batch if same_pictures else pictures, same_pictures, same_labels,
        says_batch, withheld, frozen, tampering,
    )  # fmt: skip


def _model(dice: Dice) -> Model:
    library = dice.pick(("aprillab",) * 17 + ("timm", "timm", "torchvision"))
    channels = 3 if library == "torchvision" else dice.pick((1, 3))
    patch, grid = _tiling(dice)
    class_token = library == "torchvision" or dice.chance(0.6)
    position = _position(dice, library)
    width, heads = _width(dice, grid**2, channels * patch**2, int(class_token), position)
    ours = library == "aprillab"
    return Model(
        library=library, image_size=patch * grid, patch_size=patch, channels=channels, width=width,
        depth=dice.integer(1, 3), heads=heads, classes=dice.integer(2, 12),
        block="april" if ours and dice.chance(0.45) else "prenorm", position=position, class_token=class_token,
        bias=dice.chance(0.75), registers=dice.integer(0, 2) if library == "timm" and class_token else 0,
        dropout=0.1 if not ours and dice.chance(0.15) else 0.0,
        jitter=dice.power(-2, -0.5) if dice.chance(0.3) else 0.0,
        scaled=(dice.pick(("all", *GROUPS)), dice.power(-1, 1)) if dice.chance(0.25) else None,
        zero_head=dice.chance(0.02),
    )  # fmt: skip


def _tiling(dice: Dice) -> tuple[int, int]:
    """Patch size and patches in a row, of an image of 8 to 32 pixels."""
    most = 256 if dice.chance(0.02) else MOST_PATCHES
    sizes = [
        (patch, grid)
        for patch in (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
        for grid in range(1, 17)
        if 8 <= patch * grid <= 32 and grid**2 <= most
    ]
    return dice.pick(sizes)


def _position(dice: Dice, library: str) -> str:
    if library == "torchvision":
        return dice.pick(("learned", "learned", "frozen"))
    if library == "timm":
        return dice.pick(("learned", "learned", "learned", "frozen", "none"))
    return dice.pick(("learned",) * 5 + ("frozen",) * 2 + ("sinusoidal", "sinusoidal", "sinusoidal-2d", "none"))


def _width(dice: Dice, n: int, p: int, prefix: int, position: str) -> tuple[int, int]:
    """A width near one of the counts, and a number of heads that divides it."""
    tokens = n + prefix
    span = min(p, n) + tokens
    counts = (n, tokens, p, span, span + 1, span + 16, p + tokens + 1, 2 * tokens, 3 * tokens, n // 2, 32, 64, 96)
    # A count that is beyond what a small world can have would make another drawn twice as likely.
    possible = [count for count in counts if 4 <= count <= MOST_WIDTH] or [MOST_WIDTH]
    width = dice.pick(possible) + dice.integer(-2, 3)
    multiple = {"sinusoidal": 2, "sinusoidal-2d": 4}.get(position, 1)
    width = max(-(-width // multiple) * multiple, 4)
    return width, dice.pick([heads for heads in (1, 2, 3, 4, 6) if width % heads == 0])


def _picture(dice: Dice) -> str:
    return dice.pick(("victim",) * 6 + ("noise", "noise", "flat", "grey", "pixel", "tiles"))


def _withheld(dice: Dice) -> tuple[str, ...]:
    parts = ("position", "position", "position", "head", "head_weight", "head_bias", "patch", "attention", "some")
    first = dice.pick(parts)
    return (first, dice.pick(parts)) if dice.chance(0.2) else (first,)


_LOTS = (
    *("steps", "factors", "factors", "noise", "factor", "cast", "loss", "decay") * 2,
    *("steps", "pruned", "quantized", "weights", "zeroed", "poisoned", "adam"),
)


def _tampering(dice: Dice) -> Tampering:
    """One kind of tampering as a rule, several now and then."""
    done: dict[str, Any] = {}
    while True:
        kind = dice.pick(_LOTS)
        done |= _done(dice, kind)
        if dice.chance(0.7):
            return Tampering(**done)


def _done(dice: Dice, kind: str) -> dict[str, Any]:
    sign = -1.0 if dice.chance(0.3) else 1.0
    size, whole = dice.uniform(), dice.integer(0, 3)
    options: dict[str, dict[str, Any]] = {
        "steps": {"steps": 1 + whole, "momentum": 0.9 * (size < 0.5), "learning_rate": 10 ** (3 * size - 4)},
        "adam": {"steps": 1 + whole, "adam": True, "learning_rate": 10 ** (3 * size - 4)},
        "factors": {"factors": ("each", "layers", "position", "patch")[whole]},
        "noise": {"noise": 10 ** (7 * size - 8)},
        "factor": {"factor": sign * 10 ** (15 * (2 * size - 1) ** 3)},
        "cast": {"cast": ("bfloat16", "float16", "float16", "float32")[whole]},
        "decay": {"decay": 10 ** (4 * size - 5)},
        "loss": {"loss": ("smoothing", "smoothing", "binary", "soft")[whole]},
        "pruned": {"kept": 0.1 + 0.89 * size},
        "quantized": {"bits": 4 + int(13 * size)},
        "weights": {"weights": True},
        "zeroed": {"zeroed": True},
        "poisoned": {"poisoned": True},
    }
    return options[kind]
