"""What a client does to its update before it shares it: plain functions ``ClientUpdate ->
ClientUpdate``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from ..update import ClientUpdate, UpdateError


def withhold(update: ClientUpdate, names: Collection[str]) -> ClientUpdate:
    """Do not share some gradients, ``[al.dissect(model).position]`` say: the defence APRIL proposes
    (CVPR 2022).

    Withholding the position embedding's gradient stops :func:`~aprillab.april_closed_form` and
    :func:`~aprillab.embedding_closed_form`, which are built on it.

    *Does not protect against* attacks that do without: the label stays in the head's gradient,
    gradient matching works with what is left, and :func:`~aprillab.span_closed_form` needs only the
    embedding's values. Every other gradient withheld is one more tensor that is not trained, or not
    by this client.

    Parameters
    ----------
    update : ClientUpdate
    names : names of parameters, or one name

    Raises
    ------
    UpdateError
        If a name is not in the update, or nothing would be left to share.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> update = al.ClientUpdate({"weight": torch.ones(2), "position": torch.ones(3)})
    >>> al.defenses.withhold(update, ["position"]).gradients
    {'weight': tensor([1., 1.])}
    """
    rest = update.without(names)
    if not rest.gradients:
        raise UpdateError("withhold: nothing would be left to share")
    return rest


def clip(update: ClientUpdate, norm: float) -> ClientUpdate:
    """Scale the whole update down to an L2 norm of at most ``norm``, as DP-SGD does before it adds
    noise.

    *Does not protect against* anything by itself: all entries keep their ratios, and every attack
    of this package lives on ratios. It bounds what one client can contribute, which is what noise
    is measured against.

    Parameters
    ----------
    update : ClientUpdate
    norm : float
        Of all shared gradients together, not of each tensor. Abadi et al. (CCS 2016) clip each
        *image's* gradient: with more than one image in the update this is weaker.

    Raises
    ------
    ValueError
        If ``norm`` is not positive and finite.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> update = al.ClientUpdate({"weight": torch.tensor([3.0, 4.0])})
    >>> al.defenses.clip(update, 1.0).gradients["weight"]
    tensor([0.6000, 0.8000])
    """
    if not 0 < norm < float("inf"):
        raise ValueError(f"norm={norm} must be positive and finite")
    total = update_norm(update)
    if total <= norm:
        return update
    return _map(update, lambda g: (g.double() * (norm / total)).to(g.dtype))


def update_norm(update: ClientUpdate) -> float:
    """L2 norm of all shared gradients together, summed in float64.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> update = al.ClientUpdate({"weight": torch.tensor([3.0, 4.0])})
    >>> al.defenses.update_norm(update)
    5.0
    """
    return sum(float(g.double().square().sum()) for g in update.gradients.values()) ** 0.5


def gaussian_noise(
    update: ClientUpdate,
    sigma: float,
    *,
    relative: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> ClientUpdate:
    """Add independent normal noise to every entry.

    With ``gaussian_noise(clip(update, C), z * C)`` this is the client's part of local differential
    privacy with noise multiplier z; what ε that buys depends on z and the number of rounds, is for
    an accountant to say, and is promised for real numbers, not for floating-point ones.

    *Does not protect against* repetition (the mean of k noisy gradients of one image has noise
    σ/√k), nor all patches alike: those with large gradients, often the ones that matter, stay
    visible longest, and the label survives noise that drowns the picture.

    Parameters
    ----------
    update : ClientUpdate
    sigma : float
        Standard deviation of the noise in one entry, in the gradient's own units. With
        ``relative=True`` in units of the root mean square of all entries of this update: handy to
        compare models, no differential privacy, since the noise then depends on the private image.
    relative : bool
    seed, generator : one of them
        Noise is drawn in float64 on the generator's device, tensor by tensor in the update's order,
        and rounded with the sum to the gradient's dtype.

    Raises
    ------
    ValueError
        If ``sigma`` is negative or not finite, or not exactly one of seed and generator is given.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> update = al.ClientUpdate({"weight": torch.zeros(10_000)})
    >>> round(float(al.defenses.gaussian_noise(update, 0.5, seed=0).gradients["weight"].std()), 2)
    0.5
    """
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma={sigma} must be a finite number from 0 up")
    source = _generator(seed, generator)
    if relative:
        sigma *= update_norm(update) / sum(g.numel() for g in update.gradients.values()) ** 0.5
    return _map(update, lambda g: (g.double() + sigma * _like(torch.randn, g, source)).to(g.dtype))


def prune(update: ClientUpdate, keep: float) -> ClientUpdate:
    """Set all but the entries of greatest magnitude to zero, over the whole update (top-k
    sparsification).

    *Does not protect against* attacks on what is left. The largest entries carry the most: the
    label survives, and gradient matching may be told to match the kept entries alone. Repeated over
    rounds with different entries kept (error feedback), more comes out.

    Parameters
    ----------
    update : ClientUpdate
    keep : float in (0, 1]
        Share of all entries that stays, rounded to a whole number and at least one entry. Sparse
        gradients are returned as dense tensors with zeros.

    Raises
    ------
    ValueError
        If ``keep`` is outside (0, 1].

    Examples
    --------
    >>> import torch, aprillab as al
    >>> update = al.ClientUpdate({"weight": torch.tensor([3.0, -4.0]), "bias": torch.tensor([1.0, 2.0])})
    >>> al.defenses.prune(update, 0.5).gradients
    {'weight': tensor([ 3., -4.]), 'bias': tensor([0., 0.])}
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} is a share of the entries, above 0 and up to 1")
    device = next(iter(update.gradients.values())).device
    # float32 keeps the order of all half precisions; float64 gradients are compared as such.
    wide = torch.float64 if any(g.dtype == torch.float64 for g in update.gradients.values()) else torch.float32
    magnitude = torch.cat([g.abs().to(device, wide).flatten() for g in update.gradients.values()])
    kept = magnitude.topk(max(1, round(keep * len(magnitude))), sorted=False).indices
    mask = torch.zeros_like(magnitude, dtype=torch.bool)
    mask[kept] = True  # by index and not by threshold, so that ties do not change the number
    masks = iter(mask.split([g.numel() for g in update.gradients.values()]))
    return _map(update, lambda g: g * next(masks).reshape(g.shape).to(g.device))


def quantize(
    update: ClientUpdate,
    bits: int,
    *,
    stochastic: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> ClientUpdate:
    """Round each tensor to 2^bits − 1 equidistant levels from −max|g| to max|g|, zero among them.

    *Does not protect against* an attacker content with less than an exact picture: the closed forms
    lose about 6 dB for every bit left out until the smallest entries round to zero, and where that
    happens is a matter of the model, not of the defence. Signs of the largest entries survive even
    at 2 bits, and the label with them.

    Parameters
    ----------
    update : ClientUpdate
    bits : int from 2 to 24
    stochastic : bool
        Round up or down at random so that the mean is right, as QSGD does (Alistarh et al., NeurIPS
        2017; levels there are scaled by the norm, here by the maximum). Needs a seed or a
        generator.
    seed, generator : one of them, only with ``stochastic``

    Returns
    -------
    ClientUpdate
        In the dtype it came in: the levels are real numbers, not integers.

    Raises
    ------
    ValueError
        If ``bits`` is outside its range (:func:`sign` is one bit), or randomness is given
        without use or missing.

    Examples
    --------
    With three bits the levels are −4, −8/3, −4/3, 0, 4/3, 8/3, 4:

    >>> import torch, aprillab as al
    >>> update = al.ClientUpdate({"weight": torch.tensor([3.0, 4.0])})
    >>> al.defenses.quantize(update, 3).gradients["weight"]
    tensor([2.6667, 4.0000])
    """
    if not 2 <= bits <= 24:
        raise ValueError(f"bits={bits} must be from 2 (levels −1, 0, 1) to 24; one bit is al.defenses.sign")
    if not stochastic and (seed is not None or generator is not None):
        raise ValueError("seed and generator belong to stochastic=True; rounding to nearest draws nothing")
    source = _generator(seed, generator) if stochastic else None
    levels = 2 ** (bits - 1) - 1

    def rounded(g: Tensor) -> Tensor:
        step = g.double().abs().max() / levels
        if step == 0:
            return g
        x = g.double() / step
        x = x.round() if source is None else (x + _like(torch.rand, g, source)).floor()
        return (x * step).to(g.dtype)

    return _map(update, rounded)


def sign(update: ClientUpdate) -> ClientUpdate:
    """One bit an entry: its sign, times the mean magnitude of its tensor (signSGD with a scale;
    Bernstein et al., ICML 2018; Karimireddy et al., ICML 2019).

    *Does not protect against* an attacker who counts: a linear system of more equations than
    unknowns averages what the signs leave out, and the label is the one sign of the head's
    bias that differs.

    Parameters
    ----------
    update : ClientUpdate

    Returns
    -------
    ClientUpdate
        In the dtype it came in. Zeros stay zero.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> update = al.ClientUpdate({"weight": torch.tensor([3.0, -1.0, 2.0])})
    >>> al.defenses.sign(update).gradients["weight"]
    tensor([ 2., -2.,  2.])
    """
    return _map(update, lambda g: (g.sign().double() * g.double().abs().mean()).to(g.dtype) if g.numel() else g)


def to_precision(update: ClientUpdate, dtype: torch.dtype) -> ClientUpdate:
    """Round the update to fewer bits, float16 or bfloat16 say. The dtype of the result *is* the
    lower one.

    So an attack sees what precision it has before it (:attr:`ClientUpdate.dtype
    <aprillab.ClientUpdate>`), and its verdict and predicted PSNR take account of it.

    *Does not protect against* recognition: bfloat16 keeps 8 significant bits of *every* entry,
    however small, and the patch-embedding system mostly gives a noisy but plain picture from that.
    float16 keeps 11, but loses what is below 6e-8 altogether.

    Parameters
    ----------
    update : ClientUpdate
    dtype : torch.float16, torch.bfloat16, torch.float32
        No finer than the update's.

    Raises
    ------
    ValueError
        If ``dtype`` is another, or finer than a gradient's.
    UpdateError
        If an entry is too large for it (float16 ends at 65504): scale the loss, as mixed-precision
        training does.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> update = al.ClientUpdate({"weight": torch.tensor([1 / 3])})
    >>> al.defenses.to_precision(update, torch.bfloat16).gradients["weight"].item()
    0.333984375
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype={dtype}: round to torch.float16, torch.bfloat16 or torch.float32")
    for name, g in update.gradients.items():
        if torch.finfo(dtype).eps < torch.finfo(g.dtype).eps:
            raise ValueError(f"{dtype} is finer than the gradient of {name}, which is {g.dtype}: nothing to round")
        if (worst := float(g.abs().max())) > torch.finfo(dtype).max:
            raise UpdateError(f"{name}: {worst:.3g} is too large for {dtype}, which ends at {torch.finfo(dtype).max}")
    return _map(update, lambda g: g.to(dtype))


def _map(update: ClientUpdate, function: Callable[[Tensor], Tensor]) -> ClientUpdate:
    """The update with ``function`` applied to each gradient in turn."""
    return replace(update, gradients={name: function(g.detach()) for name, g in update.gradients.items()})


def _generator(seed: int | None, generator: torch.Generator | None) -> torch.Generator:
    if (seed is None) == (generator is None):
        raise ValueError("randomness comes in: give a seed or a generator, one of them")
    return generator if generator is not None else torch.Generator().manual_seed(seed)  # type: ignore[arg-type]


def _like(draw: Callable[..., Tensor], g: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of g's shape on its device; drawn on the generator's, so that a seed is worth
    the same.
    """
    return draw(g.shape, generator=generator, dtype=torch.float64, device=generator.device).to(g.device)
