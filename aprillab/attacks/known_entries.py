"""The replay of an update whose entries have errors of their own: those that are known are
compared.

Once Adam's first step is undone, some entries are known to six digits and others only to be large.
Those that say nothing of a gradient would decide ‖g' − g‖; so they are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..anatomy import Anatomy
from ..update import ClientUpdate
from .client import Player
from .evidence import no_head_words
from .result import Replay

_KNOWN = 0.01  # of itself, or of the r.m.s. of the tensor's entries that are: an entry's error
_FEWEST = 64  # such entries of a tensor that an attack read
_BY_CHANCE = 1.1  # of what known noise leaves: the norm of so many entries hardly varies
# Times what the entries' errors explain, and what the picture's own does: how much a replay may
# miss. The second and the last, beyond which no replay is the client's, are verify.py's; the first
# was chosen, and not measured.
_OF_ERRORS, _OF_PICTURE, _MOST = 5.0, 10.0, 0.1


@dataclass(frozen=True)
class Compared:
    """How far a picture's gradient is from the known entries of an update.

    Attributes
    ----------
    residual, noise : float
        ‖s g' − g‖ / ‖g‖ over them, the largest of all tensors' together and of each that an attack
        read; and what their errors explain of it.
    factor : float
        s, the best.
    share : float
        The r.m.s. of the picture's gradient over that of these entries of it: they are the small
        ones perhaps, and an error of the picture is as much larger in them.
    entries : int
        The fewest of a tensor that an attack read.
    """

    residual: float
    noise: float
    factor: float
    share: float
    entries: int


def known_entries(g: Tensor, error: Tensor) -> Tensor:
    """Which entries are known to a few per cent, of themselves or of what such entries are.

    >>> known_entries(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.01, torch.inf, 0.001])).tolist()
    [True, False, True]
    """
    surely = error <= _KNOWN * g.abs()
    if not surely.any():
        return surely
    size = g[surely].double().square().mean().sqrt()
    return surely | (error <= _KNOWN * size)


@dataclass(frozen=True)
class Known:
    """What one tensor of an update says where it says something, on one device.

    Attributes
    ----------
    places : Tensor (k,) of int64, or None
        Of the known entries in the flattened tensor; None: all of them.
    g : Tensor (k,), float64
    size, error : float
        Sums of squares of ``g`` and of its entries' errors.
    """

    places: Tensor | None
    g: Tensor
    size: float
    error: float

    @classmethod
    def of(cls, g: Tensor, error: Tensor) -> Known:
        """The known entries of a tensor of the update and of its errors, both float64."""
        known = (known_entries(g, error) & ~g.isnan()).flatten()
        places = None if known.all() else known.nonzero()[:, 0]
        kept, told = _at(places, g), _at(places, error)
        return cls(places, kept, float(kept.square().sum()), float(told.square().sum()))


def _at(places: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor.flatten() if places is None else torch.take(tensor, places)


def known_of(update: ClientUpdate, mine: Mapping[str, Tensor]) -> dict[str, Known]:
    """The known entries of each of an update's tensors that a picture's gradient ``mine`` has
    too, on its device.

    The same for every way to play the client: so it is looked up once.
    """
    found = {}
    for name, error in (update.errors or {}).items():
        if name in mine and name in update.gradients:
            device = mine[name].device
            found[name] = Known.of(update.gradients[name].to(device).double(), error.to(device).double())
    return found


def compare_known(mine: Mapping[str, Tensor], update: Mapping[str, Known], reads: list[str]) -> Compared:
    """A picture's gradients against the known entries of an update, from :func:`known_of`.

    Examples
    --------
    >>> update = ClientUpdate({"w": torch.tensor([2.0, 9.0])}, errors={"w": torch.tensor([0.01, torch.inf])})
    >>> mine = {"w": torch.tensor([1.0, 1.0])}
    >>> found = compare_known(mine, known_of(update, mine), ["w"])
    >>> found.residual, found.factor, found.entries
    (0.0, 2.0, 1)
    """
    shared = {name: known for name, known in update.items() if name in mine}
    products = [_product(mine[name], known) for name, known in shared.items()]
    squares = sum(square for _, square in products)
    factor = sum(product for product, _ in products) / squares if squares else 0.0
    each = {name: _Sums.of(mine[name], known, factor) for name, known in shared.items()}
    groups = [sum(each.values(), start=_Sums()), *(each[name] for name in reads if name in each)]
    told = [group for group in groups if group.size] or [_Sums(off=1.0, error=1.0, size=1.0)]
    return Compared(
        residual=max((group.off / group.size) ** 0.5 for group in told),
        noise=max((group.error / group.size) ** 0.5 for group in told),
        factor=factor,
        share=max(1.0, *(abs(factor) * group.share for group in told)),
        entries=min((each[name].entries for name in reads if name in each), default=0),
    )


def _product(mine: Tensor, known: Known) -> tuple[float, float]:
    """⟨g', g⟩ and ‖g'‖² over the known entries."""
    own = _at(known.places, mine).double()
    return float((own * known.g).sum()), float(own.square().sum())


def noise_explains(
    residual: float, update: ClientUpdate, sigma: float, reads: list[str], predicted_psnr: float | None
) -> bool:
    """Whether noise that the attacker was told, and the picture's own error, explain
    what a replay misses.
    """
    if not sigma:
        return False
    error = 10 ** (-(predicted_psnr or 0.0) / 20)
    return residual <= _BY_CHANCE * noise_leaves(update.gradients, sigma, reads) + _OF_PICTURE * error


def noise_leaves(shared: Mapping[str, Tensor], sigma: float, reads: list[str]) -> float:
    """What noise of deviation ``sigma`` in every entry leaves of the true gradient's replay,
    relative to the update: of all tensors together and of each in ``reads``, the largest.

    >>> round(noise_leaves({"weight": torch.tensor([3.0, 4.0])}, 0.5, []), 4)
    0.1414
    """
    sizes = {name: (g.numel(), float(g.double().square().sum())) for name, g in shared.items()}
    groups = [*sizes.values()], *([sizes[name]] for name in reads if name in sizes)
    return sigma * max((sum(n for n, _ in g) / max(sum(s for _, s in g), 1e-300)) ** 0.5 for g in groups)


@dataclass(frozen=True)
class _Sums:
    """Of squares, over the known entries of some tensors: of what s g' misses, of errors and of g;
    how many there are; and of all g', how many.
    """

    off: float = 0.0
    error: float = 0.0
    size: float = 0.0
    entries: int = 0
    whole: float = 0.0
    all_entries: int = 0

    @classmethod
    def of(cls, mine: Tensor, known: Known, factor: float) -> _Sums:
        off = (factor * _at(known.places, mine).double() - known.g).square().sum()
        whole = float(mine.double().square().sum())
        return cls(float(off), known.error, known.size, len(known.g), whole, mine.numel())

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def share(self) -> float:
        """The r.m.s. of all g' over that of the known entries of g."""
        return ((self.whole / max(self.all_entries, 1)) / (self.size / max(self.entries, 1))) ** 0.5


def replay_of_known(
    ways: Mapping[str, Player], images: Tensor, update: ClientUpdate, anatomy: Anatomy, reads: list[str],
    predicted_psnr: float | None,
) -> Replay:  # fmt: skip
    """The replay of an update with errors, by the first way to play that gives it, else the
    nearest.
    """
    if update.local_steps > 1:
        words = f"not played back: {update.local_steps} local steps of {update.optimizer or 'an optimizer'} are not"
        return Replay("not checked", f"{words} one gradient, and were undone as if they were")
    if not ways:
        why = f"not played back: {no_head_words(anatomy)}, and no label is known"
        return Replay("not checked", why)
    tried: dict[str, Compared] = {}
    known: dict[str, Known] | None = None
    for how, play in ways.items():
        mine = play(images)
        known = known_of(update, mine) if known is None else known
        tried[how] = compare_known(mine, known, reads)
    how = min(tried, key=lambda way: tried[way].residual)
    found = tried[how]
    if found.entries < _FEWEST:
        words = f"not played back: of the gradients that were read, only {found.entries} entries are known to 1 %"
        return Replay("not checked", words)
    error = 10 ** (-(predicted_psnr or 0.0) / 20)
    limit = _OF_ERRORS * found.noise + _OF_PICTURE * error * found.share
    if limit > _MOST and found.residual > _MOST:
        words = f"played back {how}, the picture misses the entries that are known to 1 % by {found.residual:.1e}: "
        words += f"they are the gradient's small ones, and its error explains {limit:.1e} of them"
        contradicted = found.residual > limit
        return Replay("contradicted" if contradicted else "not checked", words, found.residual, limit, found.factor)
    limit = min(limit, _MOST)
    holds = found.residual <= limit
    words = f"played back {how}, the picture {'gives' if holds else 'misses'} the entries that are known to 1 %"
    words += f" {'up to' if holds else 'by'} {found.residual:.1e} (limit {limit:.1e}), factor {found.factor:.3g}"
    return Replay("shown" if holds else "contradicted", words, found.residual, limit, found.factor)
