"""What can be chosen in the playground: the controls with their words, and a state of them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..data import victim_info, victims

OWN = "own"
"""The choice of a picture that the user brings along."""

#: The client's learning rate where it takes several local steps; the server knows it.
LEARNING_RATE = 0.1
#: More take longer than the three seconds in which the playground answers.
MOST_PATCHES = 64
#: All attentions have as many heads, and all models as many blocks and classes.
HEADS, DEPTH, CLASSES = 4, 2, 10


@dataclass(frozen=True)
class Control:
    """One thing to choose.

    Attributes
    ----------
    field : str
        Of :class:`State`.
    group : str
        Of controls that are shown together.
    label : str
        In a few words.
    help : str
        In a sentence.
    choices : mapping from words to values
    """

    field: str
    group: str
    label: str
    help: str
    choices: Mapping[str, Any]

    def words(self, value: Any) -> str:
        """How a value is called."""
        return next(words for words, choice in self.choices.items() if choice == value)


PICTURE, MODEL, UPDATE = "The picture", "The model", "What the client shares"

_ROWS = (
    Control(
        "picture", PICTURE, "Private picture", "Which picture the client keeps to itself.",
        {**{victim_info(name).title: name for name in victims()}, "your own picture": OWN},
    ),
    Control("size", PICTURE, "Image size", "Height and width of the picture in pixels.", {"32×32": 32, "64×64": 64}),
    Control(
        "batch", PICTURE, "Batch size", "Pictures behind one update; beside yours, the course's next ones.",
        {"1": 1, "2": 2, "4": 4},
    ),
    Control(
        "block", MODEL, "Architecture", "Whether a LayerNorm stands before the first attention.",
        {"ordinary ViT (pre-norm)": "prenorm", "architecture A (attention first)": "april"},
    ),
    Control(
        "position", MODEL, "Positions", "The position embedding: how the model tells its patches apart.",
        {"learned": "learned", "frozen at its first values": "frozen", "sinusoids, 1-D": "sinusoidal",
         "sinusoids, 2-D": "sinusoidal 2-D", "none": "none"},
    ),
    Control(
        "patch", MODEL, "Patch size", "Side of a patch in pixels; at 64×64, 4 would take longer than this page may.",
        {"4": 4, "8": 8, "16": 16},
    ),
    Control(
        "width", MODEL, "Width d", "Length of a token: more width, more equations.",
        {str(d): d for d in (96, 128, 192, 256, 384)},
    ),
    Control(
        "shared", UPDATE, "Shared", "Of which tensors the server gets the gradient.",
        {"all": "all", "all but the position embedding": "no position", "all but the patch embedding": "no patch",
         "all but both embeddings": "no embeddings", "all but the first attention": "no attention",
         "all but the position embedding and the first attention": "no position or attention",
         "last block and head": "last block", "head only": "head"},
    ),
    Control(
        "precision", UPDATE, "Precision", "In how many digits the client computes, or sends.",
        {"float64": "float64", "float32": "float32", "float32, sent as bfloat16": "bfloat16",
         "bfloat16 autocast": "autocast"},
    ),
    Control(
        "steps", UPDATE, "Local steps",
        f"Steps of SGD before the client shares; the server knows the learning rate, {LEARNING_RATE:g}.",
        {"1": 1, "2": 2, "5": 5},
    ),
    Control(
        "noise", UPDATE, "Noise", "Standard deviation of the noise in each tensor, relative to its root mean square.",
        {"none": 0.0, **{f"{10.0**k:g}": 10.0**k for k in range(-6, 1)}},
    ),
)  # fmt: skip

CONTROLS: dict[str, Control] = {control.field: control for control in _ROWS}
"""All controls by field, in the order in which they are shown."""


def patch_sizes(size: int) -> tuple[int, ...]:
    """The patch sizes offered for an image size: those with at most 64 patches, which is a
    matter of time alone.

    >>> patch_sizes(32), patch_sizes(64)
    ((4, 8, 16), (8, 16))
    """
    return tuple(patch for patch in CONTROLS["patch"].choices.values() if (size // patch) ** 2 <= MOST_PATCHES)


@dataclass(frozen=True)
class State:
    """One setting of all controls.

    Attributes
    ----------
    picture, size, batch, block, position, patch, width, shared, precision, steps, noise
        Each one of the values of :data:`CONTROLS`.

    Raises
    ------
    ValueError
        If a value is not among the choices; the message has them.

    Examples
    --------
    >>> State(width=384).in_words()["Width d"]
    '384'
    >>> State(width=100)
    Traceback (most recent call last):
    ValueError: width=100 is not offered here: choose one of 96, 128, 192, 256, 384
    """

    picture: str = "astronaut"
    size: int = 32
    batch: int = 1
    block: str = "prenorm"
    position: str = "learned"
    patch: int = 8
    width: int = 256
    shared: str = "all"
    precision: str = "float32"
    steps: int = 1
    noise: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, choices = getattr(self, field.name), CONTROLS[field.name].choices.values()
            if value not in choices:
                raise ValueError(
                    f"{field.name}={value!r} is not offered here: choose one of {', '.join(map(str, choices))}"
                )
        if self.patch not in patch_sizes(self.size):
            offered = ", ".join(map(str, patch_sizes(self.size)))
            raise ValueError(
                f"patch={self.patch} makes {(self.size // self.patch) ** 2} patches of a picture of {self.size}×"
                f"{self.size}, whose attacks take longer than three seconds: choose {offered}"
            )

    def in_words(self) -> dict[str, str]:
        """What is chosen, by the controls' labels."""
        return {control.label: control.words(getattr(self, field)) for field, control in CONTROLS.items()}
