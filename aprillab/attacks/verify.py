"""Exact means verified: the client is played with the picture, and its gradient must be the update.

At the logits every loss is a vector r, and for one image the head's bias gradient is r itself. So
the gradient of ⟨r, logits⟩ at the reconstruction must be the update, whatever the loss and the
label were, up to one factor that all tensors have in common. A client of several local steps is
played step by step, which needs its loss and its label.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from ..anatomy import Anatomy, playable
from ..preprocessing import Preprocessing
from ..update import ClientUpdate
from .client import Player, after_local_steps, draws, inner_client, name_within, ways_to_play
from .compare import compare, own_factors
from .evidence import ONE_IMAGE, no_head_words, one_image
from .known_entries import noise_explains, replay_of_known
from .pixels import normalization
from .reading import Reading
from .replay import Loss
from .result import REPLAY, Reconstruction, Replay, State, verdict
from .rounds import RoundRead, shown_by_replay

EMBEDDING = "embedding_closed_form"
# How far a picture with this predicted error may miss its update: data/results/fuzz.md.
_OF_NOISE, _OF_ERROR = 300.0, 10.0
# A picture whose replay misses has about −20 log₁₀ of the miss, and so much more: half of
# those in data/results/fuzz.csv 8 to 12 dB, one in twenty above 35. Others' weights or a wrong
# label tell less.
_TYPICAL_FOR_MISS = 10.0  # dB
_ROUNDING = 1e3  # ε: a direction this much smaller than others is rounding
_MOST_LIMIT = 0.1  # however noisy the update: what misses by more is not called the client's
_HALF_LEVEL = 0.002  # of the range from black to white: half a grey level of 8 bits
_BRIGHTNESSES = 15  # tried where tensors have factors of their own, in steps of √2 down from the brightest possible
_ROUNDS_PLAYED = 4  # of several, evenly from all
_MOMENTA = (0.0, 0.9)  # tried in this order where the client's is not known


def verified(
    found: Reconstruction,
    model: nn.Module,
    rounds: Sequence[RoundRead],
    anatomy: Anatomy,
    *,
    preprocessing: Preprocessing,
    loss: Loss | None = None,
    verify: bool = True,
) -> Reconstruction:
    """The reconstruction with its replay, and with the verdict that follows.

    Parameters
    ----------
    found : Reconstruction of one image, not verified yet
    model : nn.Module
    rounds : sequence of RoundRead
        The update, or those of several rounds: then a few of them are played, each with its own
        weights, and one of these must give its update.
    anatomy : Anatomy
    preprocessing : Preprocessing
        For a picture whose brightness only the replay can tell.
    loss : callable, optional
        (logits, targets) to a scalar, the client's; needed where the head's gradient is not shared,
        or after several local steps (default there: cross-entropy).
    verify : bool
        False plays nothing: then nothing is exact.
    """
    start = time.perf_counter()
    if not verify:
        replay = Replay("not checked", "the client was not played: verify=False")
        return _with_replay(found, replay, preprocessing)
    if len(rounds) == 1:
        found, replay = _one_round(found, model, rounds[0], anatomy, preprocessing, loss)
        found = shown_by_replay(found, [replay])
    else:
        found, replay = _several(found, model, rounds, anatomy, preprocessing, loss)
    return _with_replay(found, replace(replay, seconds=time.perf_counter() - start), preprocessing)


def _one_round(
    found: Reconstruction, model: nn.Module, read: RoundRead, anatomy: Anatomy, preprocessing: Preprocessing,
    loss: Loss | None,
) -> tuple[Reconstruction, Replay]:  # fmt: skip
    """The replay in one round, and the picture, whose brightness it may correct."""
    try:
        devices = [found.images.device] if found.images.is_cuda else []
        client = read.model(model)
        with torch.random.fork_rng(devices=devices), playable(client, anatomy):
            return _played(found, client, read.reading, anatomy, preprocessing, loss)
    # The model is the user's, and so is whatever its forward pass raises.
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        words = f"playing the client failed ({type(error).__name__}: {text})"
        return found, Replay("not checked", words, failed=True)


def _several(
    found: Reconstruction, model: nn.Module, rounds: Sequence[RoundRead], anatomy: Anatomy,
    preprocessing: Preprocessing, loss: Loss | None,
) -> tuple[Reconstruction, Replay]:  # fmt: skip
    """The replays in a few of the rounds, as one.

    Where the rounds' weights were not given, the model as it stands may be that of one of them.
    """
    with_weights = [read for read in rounds if not read.unknown]
    if not with_weights:
        for read in (rounds[-1], rounds[0]):
            _, replay = _one_round(found, model, read, anatomy, preprocessing, loss)
            if replay.state == "shown":
                return found, replace(replay, words=f"in round {read.number}, {replay.words}")
        words = "not played back: the weights of the rounds were not given, and the model's are of none of the ends. "
        return found, Replay("not checked", words + "al.Round(state, update) gives them")
    step = max(1, -(-len(with_weights) // _ROUNDS_PLAYED))
    played: dict[int, Replay] = {}
    for read in with_weights[::step]:
        found, played[read.number] = _one_round(found, model, read, anatomy, preprocessing, loss)
    if len(played) == len(rounds):
        found = shown_by_replay(found, played.values())
    return found, _of_all(played)


def _of_all(played: Mapping[int, Replay]) -> Replay:
    """One replay of several: shown where one of them is, for no other picture gives that
    update. Others may miss: once the model has nearly fitted the picture, its gradient is a
    difference of like numbers.
    """
    shown = [number for number, replay in played.items() if replay.state == "shown"]
    others = [number for number in played if number not in shown]
    group = shown or others
    number = max(group, key=lambda number: (played[number].state == "contradicted", played[number].residual or 0.0))
    words = f"in round {number}"
    if len(group) > 1:
        words = f"in rounds {', '.join(map(str, group))}, of which {number} fits least"
    if shown and others:
        words += f" (but not in {', '.join(map(str, others))})"
    return replace(played[number], words=f"{words}: {played[number].words}")


def _with_replay(found: Reconstruction, replay: Replay, preprocessing: Preprocessing) -> Reconstruction:
    """The verdict, drawn from conditions, prediction and replay; and how its pixels fit what
    was assumed of them.
    """
    conditions = (*(c for c in found.conditions if c.name != REPLAY), replay.condition)
    predicted = found.predicted_psnr if found.predicted_psnr is not None else float("nan")
    by_system = predicted  # of several images it foresees nothing, so that a miss counts if the protocol was guessed
    several = any((c.name, c.state) == (ONE_IMAGE, "contradicted") for c in conditions)
    if replay.residual and replay.state in ("contradicted", *(("not checked",) if several else ())):
        predicted = min(predicted, _TYPICAL_FOR_MISS - 20 * math.log10(min(replay.residual, 1.0)))
    exact, reason = verdict(conditions, predicted)
    fit = normalization(found.images, preprocessing, predicted)
    if fit.state == "contradicted":
        reason += f"; the model's input, that is: its pixels are {fit.text}"
    return replace(
        found, replay=replay, conditions=conditions, exact=exact, reason=reason, predicted_psnr=predicted,
        diagnostics={**found.diagnostics, "normalization": fit.text, "predicted_psnr": predicted,
                     "predicted_by_system": by_system},
    )  # fmt: skip


def _played(
    found: Reconstruction,
    model: nn.Module,
    reading: Reading,
    anatomy: Anatomy,
    preprocessing: Preprocessing,
    loss: Loss | None,
) -> tuple[Reconstruction, Replay]:
    """The replay, and the picture, whose brightness it may correct."""
    client, update = inner_client(model, reading.update, anatomy)
    images = found.images.to(next(client.parameters()))
    limit = _limit(reading.noise, found.predicted_psnr)
    if draws(client, images):
        return found, Replay(
            "not checked", "the model draws at random (dropout, in training mode): no replay is the client's"
        )
    if update.errors is None and update.local_steps > 1:
        return found, _by_steps(client, update, images, found.labels, loss, limit)
    ways = ways_to_play(client, update, anatomy, found.labels, loss)
    reads = [name_within(name, anatomy) for name in (anatomy.patch_weight, anatomy.position)]
    if update.errors is not None:
        return found, replay_of_known(ways, images, update, anatomy, reads, found.predicted_psnr)
    if not ways:
        why = f"not played back: {no_head_words(anatomy)}, and no label is known"
        return found, Replay("not checked", why)
    residual, factor, how, play = _best_way(ways, images, update, reads, limit)
    if residual <= limit:
        words = f"played back {how}, the picture gives this update"
        words += " up to {residual:.1e} (limit {limit:.1e}), factor {factor:.3g}"
        return found, _replay("shown", words, residual, limit, factor)
    if noise_explains(residual, update, reading.sigma, reads, found.predicted_psnr):
        words = "played back, the picture misses this update by {residual:.1e}: no more than its noise alone may"
        return found, _replay("not checked", words, residual, limit, factor)
    if not found.determined:
        words = (
            "played back, the picture misses this update by {residual:.1e} (limit {limit:.1e}), factor {factor:.3g}"
        )
        return found, _replay("contradicted", words, residual, limit, factor)
    found, replay = _with_factors(found, images, play, update, residual, limit, factor, preprocessing)
    if replay.state == "contradicted" and one_image(anatomy, reading.update).state == "contradicted":
        return _no_single_gradient(found, replay, play(images), reading.update, anatomy)
    return found, replay


def _best_way(
    ways: Mapping[str, Player], images: Tensor, update: ClientUpdate, reads: list[str], limit: float
) -> tuple[float, float, str, Player]:
    """The first way to play the client that gives the update, else the one that misses it least:
    the residual, the factor, and the way.
    """
    tried, failed = [], None
    for how, play in ways.items():
        try:
            tried.append((*compare(play(images), update.gradients, reads), how, play))
        except Exception as error:  # of a loss, say, that does not take the labels: the other ways need none
            failed = error
            continue
        if tried[-1][0] <= limit:
            return tried[-1]
    if not tried and failed is not None:
        raise failed
    return min(tried, key=lambda one: one[0])


def _replay(state: State, words: str, residual: float, limit: float, factor: float) -> Replay:
    numbers = {"residual": residual, "limit": limit, "factor": factor}
    return Replay(state, words.format(**numbers), residual, limit, factor)


def _limit(noise: float, predicted_psnr: float | None) -> float:
    """How far the right picture may miss: by the update's noise, and by the error predicted for it."""
    error = 10 ** (-(predicted_psnr or 0.0) / 20)
    return min(_OF_NOISE * noise + _OF_ERROR * error, _MOST_LIMIT)


# --- Judgement ----------------------------------------------------------------------------------------------------


def _with_factors(
    found: Reconstruction, images: Tensor, play: Player, update: ClientUpdate, residual: float, limit: float,
    factor: float, preprocessing: Preprocessing,
) -> tuple[Reconstruction, Replay]:  # fmt: skip
    """The replay with a factor for each tensor, as layers' learning rates leave: it shows
    the brightness too.

    With them ∂W_e and G have two factors, so that the patch-embedding system returns the picture's
    model input times their ratio, with no residual.
    """

    def gap(brightness: float) -> float:
        return own_factors(play(brightness * images), update.gradients)[0]

    best, left = 1.0, gap(1.0)
    # Only the patch-embedding system takes a ratio of factors for brightness.
    if found.attack == EMBEDDING:
        brightness, there = _brightness(found.images, gap, preprocessing)
        best, left = (brightness, there) if there < left else (best, left)
    if not left <= limit:
        words = (
            "played back, the picture misses this update by {residual:.1e} (limit {limit:.1e}): other weights, "
            "another mode or another protocol than the client's, or factors that differ within a tensor"
        )
        return found, _replay("contradicted", words, residual, limit, factor)
    blurred = [gap(best * (1 + sign * _HALF_LEVEL)) for sign in (-1, 1)] if found.attack == EMBEDDING else [math.inf]
    spread = own_factors(play(best * images), update.gradients)[1]
    if best != 1.0:
        # The errors grow with the brightness, which itself is as sure as the replay fits.
        predicted = (found.predicted_psnr or 0.0) - 20 * math.log10(max(best, 1.0))
        predicted = min(predicted, _TYPICAL_FOR_MISS - 20 * math.log10(max(left, 1e-300)))
        found = replace(
            found, images=best * found.images, pixels=preprocessing.to_pixels(best * found.images),
            predicted_psnr=predicted,
        )  # fmt: skip
    if min(blurred) < 2 * left:
        words = "with a factor for each tensor the replay cannot tell the brightness (it leaves {residual:.1e})"
        return found, _replay("not checked", words, left, limit, factor)
    words = f"played back with a factor for each tensor (largest over least {spread:.3g}), the picture"
    words += f", its model input times {best:.4g}," if best != 1.0 else ""
    words += " gives this update up to {residual:.1e} (limit {limit:.1e})"
    return found, _replay("shown", words, left, limit, factor)


def _no_single_gradient(
    found: Reconstruction, replay: Replay, mine: Mapping[str, Tensor], update: ClientUpdate, anatomy: Anatomy
) -> tuple[Reconstruction, Replay]:
    """What the replay says where the head's gradient is not of rank one, though the
    system shows one image.

    Several local steps leave that; then one gradient of the picture need not be the update.
    But through one block, attention sends back so few directions that several images'
    equations can have a common solution: equations to spare prove nothing where the picture's
    own G has not rank n.
    """
    G = mine.get(name_within(anatomy.position, anatomy))
    if G is not None:
        s = torch.linalg.svdvals(G.double().flatten(0, -2)[anatomy.position_prefix :])
        if bool((s > _ROUNDING * torch.finfo(G.dtype).eps * s.max()).all()):
            words = (
                f"{replay.words}; the head's gradient is no single image's at one step, as after several local steps"
            )
            return found, replace(replay, state="not checked", words=words)
    head = one_image(anatomy, update)
    conditions = tuple(head if condition.name == head.name else condition for condition in found.conditions)
    return replace(found, conditions=conditions), replay


def _brightness(images: Tensor, gap: Callable[[float], float], preprocessing: Preprocessing) -> tuple[float, float]:
    """The factor of the model input with which the replay fits best, and what it leaves."""
    black_white = torch.stack([torch.zeros(images.shape[1:]), torch.ones(images.shape[1:])]).double()
    brightest = float(preprocessing.to_input(black_white).abs().max()) / max(float(images.abs().max()), 1e-300)
    tried = [1.05 * brightest * 2 ** (-k / 2) for k in range(_BRIGHTNESSES)]
    gaps = [gap(c) for c in tried]
    k = min(range(len(tried)), key=gaps.__getitem__)
    ends = tried[min(k + 1, len(tried) - 1)], tried[max(k - 1, 0)]
    fit = minimize_scalar(gap, bounds=ends, method="bounded", options={"xatol": 1e-6 * ends[1], "maxiter": 60})
    best = float(fit.x) if fit.fun < gaps[k] else tried[k]
    # The square of the gap is a parabola near its least value: its top takes the last digits.
    for step in (1e-4, 1e-7):
        below, at, above = (gap(best * (1 + sign * step)) ** 2 for sign in (-1, 0, 1))
        if (bend := below - 2 * at + above) > 0:
            best *= 1 + step * (below - above) / 2 / bend
    return best, gap(best)


# --- Several local steps ------------------------------------------------------------------------------------------


def _by_steps(
    client: nn.Module, update: ClientUpdate, images: Tensor, labels: Tensor | None, loss: Loss | None, limit: float
) -> Replay:
    """The client's local steps, one after another, on the picture."""
    if update.learning_rate is None:
        return Replay("not checked", "not played back: several local steps, and no learning rate is known")
    if labels is None:
        return Replay("not checked", "not played back: several local steps, and no label is known")
    momenta = _MOMENTA if update.momentum is None else (update.momentum,)
    tried, criterion = {}, loss or nn.functional.cross_entropy
    for momentum in momenta:
        mine = after_local_steps(client, replace(update, momentum=momentum), images, labels, criterion)
        tried[momentum] = compare(mine, update.gradients)
        if tried[momentum][0] <= limit:
            break
    momentum = min(tried, key=lambda m: tried[m][0])
    residual, factor = tried[momentum]
    words = f"played back over {update.local_steps} local steps, momentum {momentum:g}, the picture "
    if residual <= limit:
        return _replay(
            "shown", words + "gives this update up to {residual:.1e} (limit {limit:.1e})", residual, limit, factor
        )
    words += "misses this update by {residual:.1e} (limit {limit:.1e}): another loss, optimizer or picture"
    # What was guessed contradicts nothing.
    guessed = loss is None or update.momentum is None
    return _replay("not checked" if guessed else "contradicted", words, residual, limit, factor)
