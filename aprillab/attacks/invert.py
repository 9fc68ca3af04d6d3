"""The strongest attack that applies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, dissect
from ..preprocessing import Preprocessing
from ..update import Updates, only_one
from .catalogue import ATTACKS, CLOSED_FORMS
from .labels import check_told
from .replay import Loss, gradient_residual
from .result import AttackNotApplicable, Reconstruction


def invert(
    model: nn.Module,
    update: Updates,
    *,
    attack: str = "auto",
    verify: bool = True,
    strict: bool = True,
    loss: Loss | None = None,
    anatomy: Anatomy | None = None,
    preprocessing: Preprocessing | None = None,
    labels: Tensor | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Reconstruction:
    """Attack an update with the strongest closed form that applies, and say why the others do not.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate, Round, or a sequence of these
        Several rounds of one client say more than one, if they are of one picture: the closed forms
        stack them, and leave out those of another. Give ``al.Round(state, update)`` where trained
        tensors moved in between, so that each round can be read and played with its own weights.
    attack : "auto" or a key of :data:`~aprillab.attacks.ATTACKS`
        ``"auto"`` tries the closed forms in their order and stops at the first that is exact; if
        none is, the one with the highest predicted PSNR is returned, marked as not exact. The
        others can search for minutes, so they are never run unasked; ``diagnostics["attacks"]``
        says where they would go on.
    verify : bool
        Play the client with each picture, at the cost of a gradient: ``Reconstruction.replay``.
        Without it no closed form is exact. ``diagnostics["gradient_residual"]`` has what the replay
        missed, None where it was not played.
    strict : bool
        Refuse where a closed form's count fails; False returns its best picture, marked.
    loss : callable, optional
        (logits, targets) to a scalar, where the client's is not cross-entropy. The verdict on a
        closed form's picture hangs on it only where the head's gradient is not shared.
    anatomy, preprocessing, labels, device
        As in :func:`~aprillab.attacks.closed_forms.patch_embedding.embedding_closed_form`.
    **options
        Passed to the attack; only with a named one.

    Returns
    -------
    Reconstruction
        ``diagnostics["chosen"]`` names the attack that made it, ``["attacks"]`` maps each to what
        became of it, in words, and ``["tried"]`` has those that were run.

    Raises
    ------
    AttackNotApplicable
        If none applies; the message has all the reasons, and ``numbers`` those of each. Gradient
        matching may still work then, unless nothing but zeros arrives below the head.
    UpdateError
        If the update does not belong to the model, or a named attack reads one and
        several are given.
    ValueError
        If ``attack`` is unknown, or options are given with ``"auto"``.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> shape = {"image_size": 16, "patch_size": 4, "width": 64, "depth": 1, "heads": 2, "classes": 10}
    >>> model = al.VisionTransformer(**shape)
    >>> pixels = al.load_victim("coffee", 16)[None]
    >>> update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    >>> result = al.invert(model, update)
    >>> result.diagnostics["chosen"], result.exact, al.psnr(result.pixels[0], pixels[0]) > 90
    ('embedding', True, True)
    """
    if attack != "auto" and attack not in ATTACKS:
        raise ValueError(f"attack={attack!r} is neither 'auto' nor one of {', '.join(ATTACKS)}")
    if attack == "auto" and options:
        raise ValueError(f"options {', '.join(options)} need a named attack, not 'auto'")
    check_told(anatomy, preprocessing, loss)
    anatomy = anatomy or dissect(model)
    common: dict[str, Any] = {
        "anatomy": anatomy, "preprocessing": preprocessing, "labels": labels, "device": device,
    }  # fmt: skip
    closed: dict[str, Any] = {"strict": strict, "loss": loss, "verify": verify}
    outcome: dict[str, str] = {}
    found: dict[str, Reconstruction] = {}
    refused: dict[str, AttackNotApplicable] = {}
    for name in CLOSED_FORMS if attack == "auto" else [attack]:
        if exact := [result.attack for result in found.values() if result.exact]:
            outcome[name] = f"not needed: {exact[0]} is exact"
            continue
        more = closed if name in CLOSED_FORMS else ({} if loss is None else {"loss": loss})
        try:
            found[name] = result = ATTACKS[name].function(model, update, **common, **more, **options)
            outcome[name] = f"{'exact' if result.exact else 'not exact'}: {result.reason}"
        except AttackNotApplicable as refusal:
            refused[name], outcome[name] = refusal, f"refused: {refusal.reason}"
    if not found:
        reasons = "; ".join(f"{name} {text}" for name, text in outcome.items())
        numbers = {key: number for refusal in refused.values() for key, number in refusal.numbers.items()}
        raise AttackNotApplicable("invert", f"no closed form fits: {reasons}", **numbers | outcome)
    if attack == "auto" and "span" in found and not found["span"].exact:
        outcome["span_then_round"] = "not tried: name it to look for whole grey levels, seconds to minutes"
        outcome["span_then_match"] = "not tried, a search of minutes: name it to go on from the span's picture"
    chosen = max(found, key=lambda name: _worth(found[name]))
    best = found[chosen]
    diagnostics = {**best.diagnostics, "attacks": outcome, "chosen": chosen, "tried": (*found, *refused)}
    if verify and best.replay is None:  # of an attack that reads one update
        diagnostics["gradient_residual"] = gradient_residual(
            model, only_one(attack, update), best, **({} if loss is None else {"loss": loss})
        )
    elif best.replay is not None and verify:
        diagnostics["gradient_residual"] = best.replay.residual
    return replace(best, diagnostics=diagnostics)


def _worth(found: Reconstruction) -> tuple[bool, bool, float]:
    """What makes one picture better than another, seen without the original."""
    return found.exact, found.determined, found.predicted_psnr or 0.0
