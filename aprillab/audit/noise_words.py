"""What clipping and noise with a guarantee would take of the client that was audited, in
words and numbers.
"""

from __future__ import annotations

import math

import torch

from ..privacy import noise_multiplier, success_bound
from .findings import Audit

# Two guarantees that trained models are often published with; none of the two is a
# limit of anything.
EPSILONS, DELTA = (8.0, 3.0), 1e-5
_CANDIDATES = 256  # pictures that an attacker chooses from: eight bits are hidden


def noise_words(found: Audit) -> list[str]:
    """A point each: the mechanism and its σ, rounds, this update's norm, what it buys and assumes."""
    sigmas = _sigmas()
    bounds = " and ".join(f"{100 * success_bound(1 / _CANDIDATES, sigma):.0f} %" for sigma in sigmas)
    return [
        "Differential privacy: each client scales every image's own gradient down to a norm of at most C, adds them "
        "up, and gives each entry normal noise of deviation σC, before anything leaves it. For one image more or "
        f"less, δ = {DELTA:.0e} and one round: {_for_each(sigmas)}.",
        *_over_rounds(found, sigmas),
        *_of_norm(found, sigmas),
        *_of_noise(found),
        f"What it buys, in one round: whoever must tell which of {_CANDIDATES} pictures it was is right with a "
        f"probability of at most {bounds}, whatever else they know. By guessing it is {100 / _CANDIDATES:.1f} %.",
        "What it assumes: each image is clipped by itself (where only the mean over B images is, the same ε takes 2B "
        "times the noise); the noise is fresh in each round, from a generator whose seed nobody else has; all rounds "
        "are counted.",
        "Clipping alone hides nothing, and noise that the server adds hides nothing from the server.",
    ]


def short_noise() -> str:
    """The noise multipliers of one round in a few words.

    >>> short_noise()
    'σ = 0.60 for ε = 8 and σ = 1.39 for ε = 3'
    """
    return _for_each(_sigmas())


def _sigmas(rounds: int = 1) -> list[float]:
    return [noise_multiplier(epsilon, rounds=rounds, delta=DELTA) for epsilon in EPSILONS]


def _for_each(values: list[float]) -> str:
    return " and ".join(f"σ = {value:.2f} for ε = {e:g}" for e, value in zip(EPSILONS, values, strict=True))


def _over_rounds(found: Audit, sigmas: list[float]) -> list[str]:
    """Rounds, and steps that each draw noise, count together: √T times the noise multiplier."""
    words = []
    if (count := found.rounds * found.update.local_steps) > 1:
        rounds = f"{found.rounds} round{'s' * (found.rounds > 1)}"
        rounds += f" of {found.update.local_steps} local steps" if found.update.local_steps > 1 else ""
        words.append(f"For the {rounds} of this client together: {_for_each(_sigmas(count))}.")
    hundred = _for_each([10 * sigma for sigma in sigmas])
    words.append(
        "A hundred rounds with the same image, or as many local steps with noise in each, take √100 times as much "
        f"for the same ε of all together: {hundred}."
    )
    return words


def _of_norm(found: Audit, sigmas: list[float]) -> list[str]:
    """What σ times the clipping norm would be here; nothing where the norm is no finite number."""
    gradients = found.update.gradients.values()
    norm = math.hypot(*(float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in gradients))
    entries = sum(g.numel() for g in gradients)
    if not 0 < norm < math.inf:
        return []
    own = "This update's own norm" if found.update.source == "fedsgd" else "The norm of this update as a gradient"
    own += ", with its noise," if found.noise else ""
    deviations = " and ".join(f"{sigma * norm:.3g}" for sigma in sigmas)
    times = " and ".join(f"{sigma * math.sqrt(entries):,.0f}" for sigma in sigmas)
    return [
        f"{own} is {norm:.3g}. With C as large, the deviation is {deviations} in each of {entries:,} entries: all in "
        f"all noise {times} times as long as the update. So one learns from sums over many images and clients."
    ]


def _of_noise(found: Audit) -> list[str]:
    """Of an update that has noise in it already."""
    if not found.noise:
        return []
    return [
        f"This update has noise in it: sums that must vanish miss by {found.noise:.1g} of what is summed. No ε can "
        "be read off that; whoever adds it knows deviation and C, and asks `al.privacy.epsilon(deviation / C)`. Far "
        "weaker noise than an ε asks for stops these attacks on one update, and rounds average it (chapter 10)."
    ]
