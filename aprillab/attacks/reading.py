"""What an update is, before anything is solved: gradients, how precise, with weight decay or not.

Three sums tell, whatever the batch and the loss's scale. Every token has the patch embedding's
bias b_e in it once, so ∂l/∂b_e = Σ_i G_i. Cross-entropy's residual r sums to zero over the
classes, and so does each column of the head's gradient. LayerNorms ignore a token's mean, so in
architecture B every row of G sums to zero. What the sums miss is noise, or a multiple of the
weights: weight decay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, tensors_of
from ..update import ClientUpdate, UpdateError, fitted, logits_of
from .result import AttackNotApplicable

# Mean over r.m.s. of |entries|: 1 for signs, 0.80 Gaussian. Measured at 32×32, the mean over patch
# embedding, queries and head: gradients 0.57 to 0.74, one to twenty steps of Adam 0.83 to 1.00
# (batches of one and eight).
_ONE_SIZE, _EACH = 0.83, 0.79
_MANY = 50_000  # entries that tell as well as all
_ENOUGH = 256  # entries a tensor, to say so
_CLEAR = 30.0  # a sum that misses by this many times the format's ε is no rounding
_OTHER_LOSS = 0.1  # cross-entropy leaves the head's sum rounding or noise
_KNOWN, _MORE = 0.01, 3.0  # of a column's size: its told errors at most; times these, its sum misses more
_EXPLAINED = 0.1  # of a sum may be left when weight decay has been taken off


@dataclass(frozen=True)
class Reading:
    """An update as the attacks read it.

    Attributes
    ----------
    update : ClientUpdate
        Under the model's names, weight decay taken off.
    noise : float
        Of an entry, relative to the r.m.s. of its tensor: as measured, and at least the format's ε,
        which stands alone where no sum was there to measure it by. Where entries have errors of
        their own, the median of these, relative to the entries.
    noise_of_position : float
        Of an entry of the position embedding's gradient, as it stands.
    decay : float
        What multiple of the weights was in the update and was taken off.
    sigma : float
        Noise of every entry, as it stands, where the attacker was told; else 0.
    """

    update: ClientUpdate
    noise: float
    noise_of_position: float
    decay: float = 0.0
    sigma: float = 0.0


def read_update(
    model: nn.Module,
    update: ClientUpdate,
    anatomy: Anatomy,
    *,
    finite: Collection[str] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Reading:
    """Check an update, and say what it is.

    Parameters
    ----------
    model : nn.Module
    update : ClientUpdate
    anatomy : Anatomy
    finite : names of tensors that must be finite; default is those that the attacks read
    weights : tensors of the model that the client had, by name; default is the model's

    Raises
    ------
    UpdateError
        If the update does not belong to the model, or a tensor that is read is not finite.
    AttackNotApplicable
        If all entries have one size, as Adam's steps have and signs, and nobody undid the step.
    """
    update = fit_update(model, update, anatomy, finite=anatomy.tensor_names() if finite is None else finite)
    if update.errors is not None:
        return _with_errors(update, anatomy)
    _refuse_one_size(update, anatomy)
    misses = _misses(anatomy, update.gradients)
    noise = _least(*misses)
    if max((miss or 0.0 for miss in misses), default=0.0) < _CLEAR * torch.finfo(update.dtype).eps:
        return _reading(update, anatomy, noise)
    return _without_decay(update, anatomy, tensors_of(model) if weights is None else weights, noise)


def _reading(update: ClientUpdate, anatomy: Anatomy, noise: float | None, decay: float = 0.0) -> Reading:
    """The noise, at least that of the format, of all and of the position's rows."""
    eps = torch.finfo(update.dtype).eps
    # Libraries interpolate position embeddings in float32, whatever the model's precision.
    least = eps if anatomy.resampling is None else max(eps, torch.finfo(torch.float32).eps)
    known = min(max(noise or 0.0, least), 1.0)
    of_position = _noise_of_position(anatomy, update.gradients, known, eps)
    return Reading(update, known, of_position, decay)


def _with_errors(update: ClientUpdate, anatomy: Anatomy) -> Reading:
    """An update whose entries have errors of their own: its decay was told, and its noise. Of
    several steps the errors are a guess, and the sums tell by how much their mean is no gradient.
    """
    errors: Mapping[str, Tensor] = update.errors or {}
    if update.local_steps > 1 and (more := _beyond_the_told(anatomy, update.gradients, errors)):
        errors = {name: torch.hypot(e, more * update.gradients[name].abs().to(e)) for name, e in errors.items()}
        update = replace(update, errors=errors)
    names = [name for name in (anatomy.patch_weight, anatomy.position or "") if name in update.gradients]
    entries = {
        name: _sample(update.gradients[name]).abs().clamp_min(torch.finfo(torch.float64).tiny) for name in names
    }
    relative = [float((_sample(errors[name]) / g).median()) for name, g in entries.items()]
    of_position = errors[anatomy.position].double().median() if anatomy.position in names else 0.0
    noise = min(max([torch.finfo(update.dtype).eps, *relative]), 1.0)
    return Reading(update, noise, float(of_position))


def _beyond_the_told(anatomy: Anatomy, gradients: Mapping[str, Tensor], errors: Mapping[str, Tensor]) -> float:
    """Noise relative to each entry that the sums show and the errors do not; 0 where
    they explain the sums.

    The least of two sums, as in :func:`measured_noise`, over the columns that are known well.
    """
    bias, position, head = (name or "" for name in (anatomy.patch_bias, anatomy.position, anatomy.head_weight))
    sums: list[list[Tensor]] = []  # the terms of one, and their errors
    if bias in gradients and position in gradients:
        rows = [t[position].double().flatten(0, -2)[anatomy.position_prefix :] for t in (gradients, errors)]
        sums.append([torch.cat([t[bias].double()[None], -r]) for t, r in zip((gradients, errors), rows, strict=True)])
    if head in gradients:
        sums.append([gradients[head].double(), errors[head].double()])
    shares = []
    for terms, told in sums:
        explained, size = told.square().sum(0), terms.square().sum(0)
        known = explained < _KNOWN**2 * size
        if bool(known.any()):
            missed = terms.sum(0)[known].square().sum()
            more = missed > _MORE**2 * explained[known].sum()
            shares.append(float(missed / size[known].sum()) ** 0.5 if more else 0.0)
    return min(shares, default=0.0)


def _noise_of_position(anatomy: Anatomy, gradients: Mapping[str, Tensor], noise: float, eps: float) -> float:
    """Of an entry of the patches' rows: the least that the tensor's size and two sums allow.

    Noise in the bias's gradient can only add to what its sum over n rows misses, and in
    architecture B each row of d entries must sum to zero by itself.
    """
    position = gradients.get(anatomy.position or "")
    if position is None:
        return 0.0
    entries = position.double().flatten(0, -2)
    rows = entries[anatomy.position_prefix :]
    found = [noise * float(entries.square().mean().sqrt())]
    miss, size = _bias_sum(anatomy, gradients)
    if size:
        found.append(float(miss.norm()) / rows.numel() ** 0.5)
    if anatomy.ignores_mean:
        found.append(float(rows.sum(1).norm()) / rows.numel() ** 0.5)
    return max(min(found), eps * float(rows.square().mean().sqrt()))


def fit_update(
    model: nn.Module, update: ClientUpdate, anatomy: Anatomy, *, finite: Collection[str] | None = None
) -> ClientUpdate:
    """The update under the model's names, as :func:`aprillab.update.fitted` has it; parameters that
    the forward pass never uses may be missing.

    Raises
    ------
    UpdateError
        If the update does not belong to the model, or a tensor in ``finite`` (default: any) is not.
    """
    try:
        return fitted(model, update, finite=finite)
    except UpdateError:
        unused = never_used(model, anatomy)
        if not unused:
            raise
        return fitted(model, update, finite=finite, unused=unused)


def never_used(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """Trained parameters that the logits do not depend on, by one forward pass; none where it
    fails.
    """
    kernel = tensors_of(model)[anatomy.patch_weight]
    patches = torch.zeros(1, anatomy.tiling.count, kernel.flatten(1).shape[1]).to(kernel)
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[kernel.device] if kernel.is_cuda else []):
            logits = logits_of(model.get_submodule(anatomy.root), anatomy.tiling.images(patches))
    # The model is the user's, and so is whatever its forward pass raises.
    except Exception:
        return set()
    used, nodes, seen = set(), [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        used.add(id(getattr(node, "variable", None)))
        nodes += [following for following, _ in node.next_functions]
    return {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in used}


def measured_noise(anatomy: Anatomy, gradients: Mapping[str, Tensor]) -> float | None:
    """What the sums miss, relative to what is summed: the least of two; None where neither is
    there.

    The head's miss by much with another loss than cross-entropy. Then the rows decide, if they can.

    >>> import aprillab as al
    >>> model = al.VisionTransformer(image_size=8, patch_size=4, width=24, depth=1, heads=2, classes=5)
    >>> update = al.client_update(model, torch.zeros(1, 3, 8, 8), torch.tensor([3]))
    >>> measured_noise(al.dissect(model), update.gradients) < 1e-6
    True
    """
    return _least(*_misses(anatomy, gradients))


def _misses(anatomy: Anatomy, gradients: Mapping[str, Tensor]) -> list[float | None]:
    """What the sums of the bias, of the head and of the rows miss, relative to what is summed."""
    return [_relative(kind(anatomy, gradients)) for kind in (_bias_sum, _head_sum, _row_sums)]


def _least(bias: float | None, head: float | None, rows: float | None) -> float | None:
    """The noise that these misses show, as :func:`measured_noise` says it."""
    if bias is None and head is not None and head > _OTHER_LOSS:
        return rows
    found = [miss for miss in (bias, head) if miss is not None]
    return min(found) if found else None


def _relative(sums: tuple[Tensor, float]) -> float | None:
    """What a sum misses over what is summed; None where nothing is."""
    miss, size = sums
    return float(miss.norm() / size) if size else None


def _bias_sum(anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """∂l/∂b_e − Σ_i G_i, and the size of what is summed; zero where a part is missing."""
    bias, position = tensors.get(anatomy.patch_bias or ""), tensors.get(anatomy.position or "")
    if bias is None or position is None:
        return torch.zeros(1), 0.0
    rows = position.double().flatten(0, -2)[anatomy.position_prefix :]
    return bias.double() - rows.sum(0), float((bias.double().square().sum() + rows.square().sum()).sqrt())


def _head_sum(anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """The sum over classes of the head's weight gradient."""
    head = tensors.get(anatomy.head_weight or "")
    if head is None or len(head) < 2:
        return torch.zeros(1), 0.0
    entries = head.double()
    return entries.sum(0), float(entries.norm())


def _row_sums(anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """The sum of each row of G, in architecture B."""
    position = tensors.get(anatomy.position or "")
    if position is None or not anatomy.ignores_mean:
        return torch.zeros(1), 0.0
    rows = position.double().flatten(0, -2)
    return rows.sum(1), float(rows.norm())


def _without_decay(
    update: ClientUpdate, anatomy: Anatomy, weights: Mapping[str, Tensor], noise: float | None
) -> Reading:
    """The update less the multiple of the weights that the sums show, if they show one.

    Matrices, the tokens' embeddings, and biases and norms have each a multiple of their own: many
    clients spare some of these.
    """
    gradients = update.gradients
    at = {name: weights[name].to(gradients[name].device) for name in gradients}
    of_matrices = _multiple(_head_sum(anatomy, gradients), _head_sum(anatomy, at))
    of_tokens = _multiple(_row_sums(anatomy, gradients), _row_sums(anatomy, at))
    if of_tokens is None:
        of_tokens = _multiple(_bias_sum(anatomy, gradients), _bias_sum(anatomy, at))
    if of_matrices is None:  # of another loss, or no head: what holds for the tokens holds for all
        of_matrices = of_tokens
    tokens = {anatomy.position, *anatomy.prefix}
    multiples = {n: of_tokens if n in tokens else of_matrices if g.ndim > 1 else 0.0 for n, g in gradients.items()}
    cleaned = {n: _less(g, multiples[n] or 0.0, at[n]) for n, g in gradients.items()}
    of_rest = _of_biases_and_norms(anatomy, cleaned, at)
    of_rest = of_tokens if of_rest is None else of_rest  # nothing tells: then they are as the tokens
    cleaned |= {n: _less(g, of_rest, at[n]) for n, g in gradients.items() if g.ndim < 2 and of_rest}
    if not any((of_matrices, of_tokens, of_rest)):
        return _reading(update, anatomy, noise)
    left = measured_noise(anatomy, cleaned)
    if left is None or noise is None or left > max(noise, _CLEAR * torch.finfo(update.dtype).eps):
        return _reading(update, anatomy, noise)
    return _reading(replace(update, gradients=cleaned), anatomy, left, of_matrices or of_tokens or of_rest or 0.0)


def _of_biases_and_norms(
    anatomy: Anatomy, gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> float | None:
    """Their multiple, from the patch embedding's bias or, where that is zero, from the norm before
    the first attention; None where neither tells.

    The norm gives γ ẑ + β to the projections W alone, so γ ∂l/∂γ + β ∂l/∂β = Σ W ∂l/∂W over W's
    rows.
    """
    bias = weights.get(anatomy.patch_bias or "")
    if bias is not None and bias.any():
        return _multiple(_bias_sum(anatomy, gradients), (bias.double(), float(bias.double().norm()))) or 0.0
    names = [name for name in (anatomy.norm_weight, anatomy.norm_bias) if name is not None and name in gradients]
    rows = [part for part in (anatomy.query, anatomy.key, anatomy.value) if part is not None]
    shared = [(part.of(weights), part.of(gradients)) for part in rows]
    if not anatomy.ignores_mean or anatomy.norm_weight not in names or any(g is None for _, g in shared):
        return None
    squares = torch.stack([weights[name].double().square() for name in names]).sum(0)
    before = torch.stack([weights[name].double() * gradients[name].double() for name in names]).sum(0)
    through = torch.stack([(w.double() * g.double()).sum(0) for w, g in shared if w is not None and g is not None])
    miss = before - through.sum(0)
    return _multiple((miss, float(miss.norm())), (squares, float(squares.norm()))) or 0.0


def _less(g: Tensor, multiple: float, weight: Tensor) -> Tensor:
    return (
        (g.double() - multiple * weight.double()).to(torch.promote_types(g.dtype, torch.float32)) if multiple else g
    )


def _multiple(shared: tuple[Tensor, float], weights: tuple[Tensor, float]) -> float | None:
    """How often the weights' sum is in the update's, if that explains it; None where it does not."""
    (miss, size), (of_weights, scale) = shared, weights
    if not size or not scale or not of_weights.any():
        return None
    multiple = float((miss * of_weights).sum() / of_weights.square().sum())
    left = float((miss - multiple * of_weights).norm())
    return multiple if left < _EXPLAINED * float(miss.norm()) else None


def _sample(tensor: Tensor) -> Tensor:
    """Some of the entries, evenly from the whole: enough to know their sizes by."""
    flat = tensor.flatten()
    return flat[:: max(1, len(flat) // _MANY)].double()


def _refuse_one_size(update: ClientUpdate, anatomy: Anatomy) -> None:
    """Adam divides every entry by its own size, which leaves signs, unless its first step was
    undone.
    """
    names = [anatomy.patch_weight, anatomy.query.name if anatomy.query else "", anatomy.head_weight or ""]
    read = [_sample(update.gradients[name]) for name in names if name in update.gradients]
    sizes = [float(g.abs().mean() / g.square().mean().sqrt()) for g in read if g.numel() >= _ENOUGH and g.any()]
    if len(sizes) > 1 and min(sizes) > _EACH and (mean := sum(sizes) / len(sizes)) > _ONE_SIZE:
        raise AttackNotApplicable(
            "read_update",
            f"the entries are nearly of one size (mean over r.m.s. {mean:.2f}, 1 for signs; a gradient's is below "
            "0.8): these are steps of Adam, or signs, and the linear systems do not apply to them. Adam's first step "
            "is one-to-one: al.update_from_states(before, after, learning_rate=…, optimizer='adamw', weight_decay=…, "
            "eps=…) undoes it",
            one_size=mean,
        )
