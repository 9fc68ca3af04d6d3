"""The strongest attack that applies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, dissect
from ..preprocessing import Preprocessing
from ..update import ClientUpdate
from .catalogue import ATTACKS, CLOSED_FORMS
from .evidence import one_image
from .replay import gradient_residual
from .result import AttackNotApplicable, Reconstruction


def invert(
    model: nn.Module,
    update: ClientUpdate,
    *,
    attack: str = "auto",
    verify: bool = False,
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
    update : ClientUpdate
    attack : "auto" or a key of :data:`~aprillab.attacks.ATTACKS`
        ``"auto"`` tries the closed forms in their order and stops at the first that is exact; if
        none is, the one with the highest predicted PSNR is returned, marked as not exact. The
        others can search for minutes, so they are never run unasked; ``diagnostics["attacks"]``
        says where they would go on.
    verify : bool
        Also replay the client with the reconstruction (one more gradient):
        ``diagnostics["gradient_residual"]``.
    anatomy, preprocessing, labels, device
        As in :func:`~aprillab.attacks.closed_forms.patch_embedding.embedding_closed_form`.
    **options
        Passed to the attack; only with a named one.

    Returns
    -------
    Reconstruction
        ``diagnostics["chosen"]`` names the attack that made it, ``["attacks"]`` maps each to what
        became of it, in words.

    Raises
    ------
    AttackNotApplicable
        If none applies; the message has all the reasons. Gradient matching may still work then,
        unless nothing but zeros arrives below the head.
    UpdateError
        If the update does not belong to the model.
    ValueError
        If ``attack`` is unknown, or options are given with ``"auto"``.
    """
    if attack != "auto" and attack not in ATTACKS:
        raise ValueError(f"attack={attack!r} is neither 'auto' nor one of {', '.join(ATTACKS)}")
    if attack == "auto" and options:
        raise ValueError(f"options {', '.join(options)} need a named attack, not 'auto'")
    anatomy = anatomy or dissect(model)
    common: dict[str, Any] = {
        "anatomy": anatomy, "preprocessing": preprocessing, "labels": labels, "device": device,
    }  # fmt: skip
    one = one_image(anatomy, update)
    outcome: dict[str, str] = {}
    found: dict[str, Reconstruction] = {}
    for name in CLOSED_FORMS if attack == "auto" else [attack]:
        if exact := [result.attack for result in found.values() if result.exact]:
            outcome[name] = f"not needed: {exact[0]} is exact"
            continue
        if found and not one.holds:
            outcome[name] = f"not tried: every closed form needs one image, and {one.text}"
            continue
        try:
            found[name] = result = ATTACKS[name].function(model, update, **common, **options)
            outcome[name] = f"{'exact' if result.exact else 'not exact'}: {result.reason}"
        except AttackNotApplicable as refusal:
            outcome[name] = f"refused: {refusal.reason}"
    if not found:
        reasons = "; ".join(f"{name} {text}" for name, text in outcome.items())
        raise AttackNotApplicable("invert", f"no closed form fits: {reasons}", **outcome)
    if attack == "auto" and "span" in found and not found["span"].exact:
        outcome["span_then_round"] = "not tried: name it to look for whole grey levels, seconds to minutes"
        outcome["span_then_match"] = "not tried, a search of minutes: name it to go on from the span's picture"
    chosen = max(found, key=lambda name: (found[name].exact, found[name].predicted_psnr or 0.0))
    best = found[chosen]
    diagnostics = {**best.diagnostics, "attacks": outcome, "chosen": chosen}
    if verify:
        diagnostics["gradient_residual"] = gradient_residual(model, update, best)
    return replace(best, diagnostics=diagnostics)
