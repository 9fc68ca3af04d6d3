"""Images told apart by a feature and not by their class: a threshold in the head, and its
bisection over rounds.

With logits z_c = s(u·f − t) + log(K − 1) and zero for all others, p_c = 1/(1 + e^(−s(u·f − t))): a
step at the threshold t of the feature u·f. An image of class y passes (p_c − [y = c]) s u to its
features, so with H_i the rest of the way down

    ∂l(t) = (1/B) (Σ_{u·f_i > t} H_i − Σ_{i of class c} H_i).                             (12.8)

Of a batch of class c alone, those below t remain. What is more: nothing below the head changed, so
the second sum is the same in each round, and the difference of two rounds is that of the images
*between* two thresholds, of whatever class. The head's own gradient counts them: B Σ
(p_c − [y = c]) is the number above t less that of class c.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..update import ClientUpdate
from .constant import constant_feature, last_norm
from .fishing import head_sent, row_or_direction
from .sent import CannotCheat, Head, check_label, head_of

_SHARP = 20.0  # nats on either side of a threshold, from where a step is a step in float32

Ask = Callable[[Mapping[str, Tensor]], ClientUpdate]


def feature_fishing(
    model: nn.Module,
    label: int | Tensor,
    *,
    threshold: float,
    direction: Tensor | None = None,
    strength: float = 1e4,
    anatomy: Anatomy | None = None,
) -> dict[str, Tensor]:
    """The model with a head that tells images apart by a feature: the step of one
    class's probability.

    *What it changes*: the head's weight is zero but for one row, s u; its bias is −s t + log(K − 1)
    there. Where the head has no bias, the last LayerNorm's bias stands in, as in
    :func:`~aprillab.dishonest.class_fishing`.

    *What it does*: of images of this class, those with u·f < t pass their gradient, and the others
    none. Of images of other classes it is the other way round, so where the batch is mixed, they
    are in the way: two rounds and their difference are not (:func:`bisect_features`).

    *What it costs the federation*: a round, and one more for each threshold.

    *How it can be seen*: as class fishing, and better: the row is thousands of times longer than an
    honest one, and a client that is sent the same body with another head, round after round, is
    being asked questions ("still body").

    *Whose idea*: Wen et al. (ICML 2022): feature fishing, by bisection or in one shot.
    Differences of neighbouring bins are from Fowl et al. ("Robbing the Fed", ICLR 2022), within
    one layer; that rounds with one body and several heads give them without an added layer we
    have not seen elsewhere.

    Parameters
    ----------
    model : nn.Module
        Any that :func:`~aprillab.dissect` knows, with a linear head; left unchanged.
    label : int
    threshold : float, t, in units of u·f
    direction : Tensor of shape (d,), optional
        u, brought to length one; default is the row of ``label``.
    strength : float, s, in nats per unit of u·f
        Images nearer to t than 20/s pass a part.
    anatomy : Anatomy, optional
        Default is ``dissect(model)``.

    Returns
    -------
    dict of str to Tensor
        A copy: the same names, shapes, dtypes and devices as ``model.state_dict()``.

    Raises
    ------
    CannotCheat
        As in ``class_fishing``; if the direction is none; or if s t is too large for
        the model's dtype.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> sent = feature_fishing(model, 3, threshold=0.5, strength=100.0)
    >>> sent["head.bias"][3], sent["head.weight"].norm()
    (tensor(-48.6137), tensor(100.))
    """
    head = head_of(model, anatomy)
    label = check_label(label, head.classes)
    u = _unit(head, label, direction)
    if not 0 < strength < float("inf"):
        raise CannotCheat(f"strength={strength} must be positive and finite")
    constant = -strength * threshold + float(torch.tensor(head.classes - 1.0, dtype=torch.float64).log())
    return head_sent(model, head, label, strength * u, constant)


def feature_range(model: nn.Module, label: int = 0, direction: Tensor | None = None) -> tuple[float, float]:
    """Between which two numbers the feature u·f of any image lies.

    Behind a LayerNorm f = γ ⊙ x̂ + β with ‖x̂‖ ≤ √d, so |u·f − u·β| ≤ √d ‖γ ⊙ u‖.

    Raises
    ------
    CannotCheat
        If no LayerNorm stands before the head.

    Examples
    --------
    >>> import aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> feature_range(model)
    (-4.898979485566356, 4.898979485566356)
    """
    head = head_of(model)
    u, norm = _unit(head, label, direction), last_norm(model, head)[1]
    if norm is None:
        raise CannotCheat("no LayerNorm stands before the head: the feature has no known range, name one")
    gamma = torch.ones_like(u) if norm.weight is None else norm.weight.detach().double()
    # A head without bias is given its constant by the LayerNorm's bias.
    beta: Tensor | None = constant_feature(model, head).bias if head.bias is None else norm.bias
    middle = 0.0 if beta is None else float(beta.detach().double() @ u)
    width = len(u) ** 0.5 * float((gamma * u).norm())
    return middle - width, middle + width


@dataclass(frozen=True)
class Bin:
    """The images of a batch whose feature lies between two thresholds.

    Attributes
    ----------
    low, high : float
    count : int
        How many; by the head's gradient.
    update : ClientUpdate
        The difference of two rounds: with count = 1 one image's gradient below the head, up to a
        factor, for :func:`~aprillab.embedding_closed_form`.
    """

    low: float
    high: float
    count: int
    update: ClientUpdate


def bisect_features(
    model: nn.Module,
    ask: Ask,
    batch_size: int,
    *,
    rounds: int,
    label: int = 0,
    direction: Tensor | None = None,
    strength: float = 1e4,
    limits: tuple[float, float] | None = None,
) -> list[Bin]:
    """Ask a client round after round, with thresholds where most images are still together.

    The client must answer with the same images each time, as one that trains on all it has
    does; of fresh batches a difference is of two batches, and the system's own check says so
    (*one image* fails).

    Parameters
    ----------
    model : nn.Module
    ask : callable
        Is given a state dict, as the client would be, and returns the client's update: a
        mean over its batch.
    batch_size : int, B
    rounds : int
        At least 2; to take B images apart needs B + 1 or more, by halves about twice that.
    label, direction, strength
        As in :func:`feature_fishing`.
    limits : (float, float), optional
        Between which all features lie; default is :func:`feature_range`.

    Returns
    -------
    list of Bin
        Those that are not empty, from the largest feature to the least.

    Raises
    ------
    CannotCheat
        As ``feature_fishing``.
    ValueError
        If there are fewer than two rounds, or the update has no gradient of the head to count by.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> shape = {"image_size": 16, "patch_size": 4, "width": 96, "depth": 1, "heads": 2, "classes": 10}
    >>> model = al.VisionTransformer(**shape).eval()
    >>> pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> def ask(state):
    ...     model.load_state_dict(state)
    ...     return al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3, 3, 3]))
    >>> [found.count for found in bisect_features(model, ask, 3, rounds=14)]
    [1, 1, 1]
    """
    if rounds < 2:
        raise ValueError(f"rounds={rounds}: a difference needs two")
    head = head_of(model)
    u = _unit(head, label, direction)
    low, high = limits or feature_range(model, label, u)
    answers: dict[float, ClientUpdate] = {}
    for t in (high + 2 * _SHARP / strength, low - 2 * _SHARP / strength):
        answers[t] = ask(feature_fishing(model, label, threshold=t, direction=u, strength=strength))
    constant = None if head.bias is not None else constant_feature(model, head).direction

    def passed(update: ClientUpdate) -> float:
        return batch_size * _passed(update, head, label, constant)

    while len(answers) < rounds:
        middle = next_threshold(_above(answers, passed), 2 * _SHARP / strength)
        if middle is None:
            break
        answers[middle] = ask(feature_fishing(model, label, threshold=middle, direction=u, strength=strength))
    # What passes one of two neighbouring thresholds and not the other, (12.8), wherever an
    # image lies between.
    above = _above(answers, passed)
    order = sorted(above, reverse=True)
    return [
        Bin(under, over, count, difference(answers[over], answers[under]))
        for over, under in itertools.pairwise(order)
        if (count := round(above[under] - above[over])) > 0
    ]


def next_threshold(above: Mapping[float, float], least: float) -> float | None:
    """The middle of the bin with most images, the widest of those; None if nothing is left to
    halve.

    Parameters
    ----------
    above : mapping of float to float
        From thresholds to how many images lie above them.
    least : float
        Bins narrower than this stay as they are.

    Examples
    --------
    >>> next_threshold({0.0: 3, 1.0: 2, 5.0: 0}, 0.1)
    3.0
    """
    order = sorted(above)
    bins = [(round(above[a] - above[b]), b - a, a) for a, b in itertools.pairwise(order) if b - a > least]
    count, width, low = max(bins, default=(0, 0.0, 0.0))
    return low + width / 2 if count > 1 else None


def difference(first: ClientUpdate, second: ClientUpdate) -> ClientUpdate:
    """The first update less the second: what passes one of two thresholds and not the other.

    >>> one, two = (ClientUpdate({"w": torch.full((1,), float(i))}) for i in (1, 2))
    >>> difference(two, one).gradients["w"]
    tensor([1.])
    """
    return ClientUpdate({name: g - second.gradients[name] for name, g in first.gradients.items()})


# --- What the head says -------------------------------------------------------------------------------------------


def _unit(head: Head, label: int | Tensor, direction: Tensor | None) -> Tensor:
    u = row_or_direction(head, check_label(label, head.classes)) if direction is None else direction.double()
    if u.shape != head.weight.shape[1:] or not 0 < float(u.norm()) < float("inf"):
        raise CannotCheat(f"direction must be {head.weight.shape[1]} finite numbers, not all zero: {tuple(u.shape)}")
    return u.to(head.weight.device) / u.norm().to(head.weight.device)


def _passed(update: ClientUpdate, head: Head, label: int, constant: Tensor | None) -> float:
    """The mean of p_c − [y = c] over the batch, from the head's gradient."""
    name = head.bias_name if constant is None else head.weight_name
    if name is None or name not in update.gradients:
        raise ValueError(f"the update has no gradient of {name}: nothing says how many images passed")
    row = update.gradients[name][label].double()
    return float(row if constant is None else row @ constant)


def _above(answers: Mapping[float, ClientUpdate], passed: Callable[[ClientUpdate], float]) -> dict[float, float]:
    """How many images lie above each threshold: none above the largest."""
    least = passed(answers[max(answers)])
    return {t: passed(update) - least for t, update in answers.items()}
