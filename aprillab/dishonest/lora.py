"""LoRA's B chosen by the server, so that the first round already spans the tokens.

An adapter adds s B A u to a layer W u. The gradient of A is s Bᵀ Σ_i δ_i u_iᵀ: r combinations of
the layer's inputs u_i, which B chooses, and none while B is zero, as it is at the start of an
honest fine-tuning. The server chooses B, and A = 0: then B A = 0, and the model computes what the
base computes, in every bit. With m adapters of rank r on the first attention (queries, keys,
values) a round gives m r rows. With the class token's input, which is known, n of them span the
tokens, which is what the span attack without the patch gradient needs, if p + n + 2 ≤ d.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, dissect
from .sent import CannotCheat, sent_state


def lora_spanning(
    model: nn.Module, *, seed: int = 0, size: float = 1.0, anatomy: Anatomy | None = None
) -> dict[str, Tensor]:
    """The model with LoRA factors that make the first attention's adapters report its inputs.

    *What it changes*: of the adapters on the first attention's projections, B becomes r orthonormal
    columns times ``size``, and A becomes zero. The model computes exactly what it did without them.

    *What it does*: the gradient of each A has r rows in the span of the tokens, (10.5), from the
    first round on. As many rounds, with another ``seed`` each, as it takes for m r rows a round
    to reach n, the number of patches (:func:`~aprillab.span_closed_form` takes the rounds
    together): one, if m r ≥ n.

    *What it costs the federation*: next to nothing: B and A change places, A learns
    and B waits for it.

    *How it can be seen*: B is zero at the start of an honest fine-tuning and A is not
    (:func:`~aprillab.dishonest.inspect_model`, "adapters"). A client that multiplies W + s B
    A out sees nothing.

    *Whose idea*: that the span attack sums LoRA's gradients over rounds is this package's, as
    far as we found; that a server chooses a malicious base for adapters is PEFTLeak's (Sami
    et al., CVPR 2025).

    Parameters
    ----------
    model : nn.Module
        One that peft put LoRA or DoRA into, with adapters on the first attention's query, key or
        value; left unchanged.
    seed : int
        Of B; another in each round.
    size : float, the length of B's columns
    anatomy : Anatomy, optional
        Default is ``dissect(model)``.

    Returns
    -------
    dict of str to Tensor
        A copy: the same names, shapes, dtypes and devices as ``model.state_dict()``.

    Raises
    ------
    CannotCheat
        If no adapter reads the first attention's input, or ``size`` is not positive and finite.

    Examples
    --------
    >>> import peft, aprillab as al
    >>> shape = {"image_size": 8, "patch_size": 4, "width": 24, "depth": 1, "heads": 2, "classes": 5}
    >>> config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    >>> model = peft.get_peft_model(al.VisionTransformer(**shape), config)
    >>> sent = lora_spanning(model)
    >>> B = sent["base_model.model.blocks.0.attention.query.lora_B.default.weight"]
    >>> bool((B.T @ B - torch.eye(2)).abs().max() < 1e-6)
    True
    """
    anatomy = anatomy or dissect(model)
    if isinstance(size, bool) or not 0 < size < float("inf"):
        raise CannotCheat(f"size={size} must be positive and finite")
    state, generator = model.state_dict(), torch.Generator().manual_seed(seed)
    changes: dict[str, Tensor] = {}
    for name in anatomy.adapters:
        other = name.replace("lora_A", "lora_B")
        if other not in state:
            continue
        shape = state[other].shape
        columns = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
        changes |= {name: torch.zeros_like(state[name]), other: size * columns}
    if not changes:
        raise CannotCheat(
            f"no adapter of {type(model).__name__} reads the first attention's input: put LoRA on its query, key or "
            "value, or fish through the head (class_fishing)"
        )
    return sent_state(model, changes)
