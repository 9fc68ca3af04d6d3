"""One photograph out of a batch by its class: what a server has to send for it, and what
silences all others.

With logits z_c = w·f − L and z_k = 0 for every other class,
p_c = e^(w·f − L) / (K − 1 + e^(w·f − L)), and what an image of class y passes below the head is
(p_c − [y = c]) w. So an image of class c passes −(1 − p_c) w, nearly all of w, and every other p_c
w, which is e^−L of it, (12.2) and (12.3). Their sum is the gradient of one image, up to e^−L, and
the patch-embedding system (4.3) reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from .constant import constant_feature, last_norm
from .sent import CannotCheat, Head, check_label, check_strength, head_of, sent_state


def class_fishing(
    model: nn.Module, label: int | Tensor, *, strength: float = 20.0, anatomy: Anatomy | None = None
) -> dict[str, Tensor]:
    """The model with a head that lets the gradient of one class alone pass.

    *What it changes*: the head's weight is zero but for the row of ``label``, which stays as it is;
    its bias is zero but for −L there. Where the head has no bias, the last LayerNorm's bias is set
    to one: a fixed combination of its output is then the same for all images, and stands in for it.
    Nothing else changes.

    *What it does*: of a batch, or of a sum over clients, the image of this class comes back by
    :func:`~aprillab.embedding_closed_form` as if it had been alone, up to e^−L of the others. Two
    images of the class come back as a mixture. What classes the others have does not matter. Secure
    aggregation hides who sent the picture, and not the picture. Measured in
    data/results/cheating.md. It takes clients of one local step: in further ones the other rows
    learn, and pictures of their classes pass those (chapter 12).

    *What it costs the federation*: a round. The head is lost and the loss of that class is
    L + log(K − 1) nats.

    *How it can be seen*: all rows but one are zero and one bias stands out, and of the client's own
    batch one image passes all of the gradient (:func:`~aprillab.dishonest.inspect_model`).

    *Whose idea*: class fishing is Wen et al.'s ("Fishing for User Data", ICML 2022), who also
    combined it with a closed form, on a ViT modified for it, in the notebooks of their library
    breaching. That an unmodified ViT's patch-embedding system takes it, of sums of many clients
    too, we have not seen elsewhere.

    Parameters
    ----------
    model : nn.Module
        Any that :func:`~aprillab.dissect` knows, with a linear head; left unchanged.
    label : int
        The class whose image is wanted.
    strength : float, L, in nats
        The others pass e^−L. With random weights nothing is gained beyond 15 to 20, where float32
        rounds more away. A row that other images agree with adds w·f to −L: they then pass
        e^(w·f − L), and trained models gain up to 40.
    anatomy : Anatomy, optional
        Default is ``dissect(model)``.

    Returns
    -------
    dict of str to Tensor
        A copy: the same names, shapes, dtypes and devices as ``model.state_dict()``.

    Raises
    ------
    CannotCheat
        If the head is no linear map or has one class, there is no such class, ``strength`` is
        not positive or so large that e^−L underflows, or there is neither a bias nor a
        LayerNorm to make one of.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> shape = {"image_size": 16, "patch_size": 4, "width": 96, "depth": 1, "heads": 2, "classes": 10}
    >>> model = al.VisionTransformer(**shape).eval()
    >>> model.load_state_dict(class_fishing(model, 3))
    <All keys matched successfully>
    >>> pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([1, 3, 4, 7]))
    >>> al.psnr(al.embedding_closed_form(model, update, preprocessing=al.HALF).pixels[0], pixels[1]) > 60
    True
    """
    head = head_of(model, anatomy)
    label = check_label(label, head.classes)
    strength = check_strength(strength, head.weight.dtype)
    return head_sent(model, head, label, row_or_direction(head, label), -strength)


def silenced(model: nn.Module, *, for_good: bool = False, anatomy: Anatomy | None = None) -> dict[str, Tensor]:
    """The model with a head of zeros, for every client but one: nothing below the head moves.

    *What it changes*: the head's weight and bias are zero, so that ∂l/∂f = Wᵀ(p − e_y) is zero for
    any image, (12.7). In the client's first step the head moves, r fᵀ, and in the second what is
    below it: where clients take several, the last LayerNorm has to be zero as well (``for_good``).
    Then f = 0, and the head's bias alone ever moves.

    *What it does*: sent to all clients of a secure sum but one, it leaves of the sum that one's
    gradient below the head, exactly. The head's gradient stays a sum: r fᵀ needs no W. Its bias,
    p − y with p = 1/K, gives the number of images of each class among all of them.

    *What it costs the federation*: the silenced clients' round.

    *How it can be seen*: a silenced client sees a head of zeros, as some libraries initialize it,
    and an update that is zero below it. *The one who is read sees an honest model*: no check of its
    own model can help. Clients that compare what they were sent
    (:func:`~aprillab.dishonest.fingerprint`) see it.

    *Whose idea*: different models to different clients, against secure aggregation: Pasquini,
    Francati and Ateniese ("Eluding Secure Aggregation", CCS 2022). The head of zeros is the
    simplest of their kind in a ViT.

    Parameters
    ----------
    model : nn.Module
        Any that :func:`~aprillab.dissect` knows, with a linear head; left unchanged.
    for_good : bool
        For any number of local steps, and not for the first alone.
    anatomy : Anatomy, optional
        Default is ``dissect(model)``.

    Returns
    -------
    dict of str to Tensor
        A copy: the same names, shapes, dtypes and devices as ``model.state_dict()``.

    Raises
    ------
    CannotCheat
        If there is no linear head; with ``for_good``, if no LayerNorm stands right before it.

    Examples
    --------
    >>> import aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> float(silenced(model)["head.weight"].abs().max()), bool(model.head.weight.any())
    (0.0, True)
    """
    head = head_of(model, anatomy)
    names = set(head.names)
    if for_good:
        path, norm = last_norm(model, head)
        if norm is None:
            raise CannotCheat(
                f"no LayerNorm with a weight stands right before the head {head.weight_name}: the features cannot be "
                "set to zero, and a head of zeros alone (for_good=False) is silent for one local step"
            )
        names |= {f"{path}.weight"} | ({f"{path}.bias"} if norm.bias is not None else set())
    state = model.state_dict()
    return sent_state(model, {name: torch.zeros_like(state[name]) for name in names})


# --- Heads of one row ---------------------------------------------------------------------------------------------


def row_or_direction(head: Head, label: int) -> Tensor:
    """The head's row of a class, (d,) float64; where it is zero, a fixed random
    direction of length one.
    """
    row = head.weight[label].double()
    if row.norm() > 0:
        return row
    row = torch.randn(len(row), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(row.device)
    return row / row.norm()


def head_sent(model: nn.Module, head: Head, label: int, row: Tensor, constant: float) -> dict[str, Tensor]:
    """The state with logits row·f + constant for one class, and zero for all others: (12.2),
    with constant = −L.
    """
    weight = torch.zeros_like(head.weight, dtype=torch.float64)
    changes: dict[str, Any] = {}
    if head.bias_name is not None and head.bias is not None:
        changes[head.bias_name] = torch.zeros_like(head.bias, dtype=torch.float64)
        changes[head.bias_name][label] = constant
    else:
        feature = constant_feature(model, head)
        changes[feature.bias_name] = feature.bias
        row = row - feature.direction * float(row @ feature.bias.to(row)) + constant * feature.direction
    weight[label] = row
    return sent_state(model, changes | {head.weight_name: weight})
