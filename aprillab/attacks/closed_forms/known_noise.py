"""The patch-embedding system for an attacker who knows the noise: σ of every entry, as a protocol tells it.

    G̃ = G + N₁,   ∂W̃ = GᵀX + N₂,   b̃ = Gᵀ1 + N₃,      entries of N of deviation σ          (11.9)

Least squares of G̃ draw the picture to grey and let noise in where G is weak. Three things help.

**Errors in G.** Turned by the left singular vectors of ∂W̃, noise stays what it is, while the signal
gathers in few columns: a column g of G then has an energy of its own, nγ = ‖g̃‖² − nσ², and what is
expected of it, given g̃ and b̃, is

    ĝ = ((1 + σ²/γ) I + 1 1ᵀ)⁻¹ (g̃ + 1 b̃),                                                (11.10)

which is unbiased where g̃ is not (regression calibration; Carroll et al., Measurement Error in
Nonlinear Models, 2006).

**Errors that the pixels carry.** With r = 1 + σ²/γ, what is left of ∂W̃ − ĜᵀX has, in a row with this r
and mode m of the pixels, the variance σ²(1 + Σ_i x_im²/r − (Σ_i x_im)²/(r(r + n))): much in strong rows
and in the low frequencies of a patch, little in others. It is computed for the picture as it becomes known.

**A prior on pictures**, (11.11), in which neighbouring patches go together. The most probable picture is
a linear system of n·p unknowns, solved by conjugate gradients; a second right side, of noise and a
picture drawn from the prior, gives one of its errors: the predicted one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...anatomy import Anatomy
from ...models import unpatchify
from ...preprocessing import Preprocessing
from ..result import AttackNotApplicable, Condition, shown_if
from .inputs import grey_patches
from .linear_algebra import conjugate_gradients, thin_svd
from .natural_pictures import NaturalPictures
from .stacked_patches import Equations, noise_of_entries

_LEAST = 1e-3  # of σ²: γ where noise is all there is
_BY_CHANCE = 3.0  # deviations of the energy of G's entries, all together
_CHANCE = 0.5  # deviations of a column's energy that noise may have by chance
_BY_LUCK = 4.0  # deviations by which the mean square of noise may be more
_AS_TOLD = 3.0  # times σ², that what is left may have
_PASSES = 3  # of noise in G and patches in turn
_STEPS, _SETTLED = 60, 1e-4  # of conjugate gradients; where they end, of the length of what is left


@dataclass(frozen=True)
class Calibrated:
    """One round's system, turned and divided by σ.

    Attributes
    ----------
    G : Tensor (n, k)
        What is expected of G.
    dW : Tensor (k, p)
        With noise of deviation 1.
    ridge : Tensor (k,)
        1 + σ²/γ: over it, what is left of an entry's noise in what is expected of it.
    by_bias : bool
        Whether b̃ was known.
    """

    G: Tensor
    dW: Tensor
    ridge: Tensor
    by_bias: bool

    def variance(self, X: Tensor, error: Tensor) -> Tensor:
        """Of what is left of each equation (k, p), in units of σ², for a picture X up to ``error`` (n, p)."""
        ridge = self.ridge[:, None]
        carried = (X.square() + error.square()).sum(0) / ridge
        if not self.by_bias:
            return 1 + carried
        return 1 + carried - (X.sum(0).square() + error.sum(0).square()) / (ridge * (ridge + len(X)))


def calibrated(dW: Tensor, G: Tensor, bias: Tensor | None, sigma: float, *, centred: bool) -> Calibrated:
    """What is expected of G (n, d), (11.10), beside dW (d, p), for entries with noise of deviation ``sigma``.

    Parameters
    ----------
    dW, G : Tensor (d, p) and (n, d), float64
    bias : Tensor (d,) or None
        ∂l/∂b_e.
    sigma : float
    centred : bool
        Whether G's rows sum to zero without noise, as in architecture B: their means are noise.

    Examples
    --------
    >>> G, X = torch.eye(2, 3).double(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    >>> found = calibrated(G.T @ X, G, G.sum(0), 1e-6, centred=False)
    >>> torch.allclose(found.G.T @ X, found.dW)
    True
    """
    b = dW.new_zeros(len(dW)) if bias is None else bias
    if centred:
        dW, G, b = dW - dW.mean(0), G - G.mean(1, keepdim=True), b - b.mean()
    U = thin_svd(dW)[0]
    dW, G, b, n = U.T @ dW / sigma, G @ U / sigma, b @ U / sigma, len(G)
    ridge = 1 + 1 / (G.square().mean(0) - 1 - _CHANCE * (2 / n) ** 0.5).clamp_min(_LEAST)
    if bias is None:
        return Calibrated(G / ridge, dW, ridge, False)
    seen = G + b
    return Calibrated((seen - seen.sum(0) / (ridge + n)) / ridge, dW, ridge, True)


@dataclass(frozen=True)
class MostNatural:
    """The most probable picture of the update and the prior.

    Attributes
    ----------
    patches : Tensor (n, p)
        Pixels less ½, in the order (channel, y, x).
    mse : float
        Expected, of a pixel.
    steps : int
        Of conjugate gradients, all together.
    """

    patches: Tensor
    mse: float
    steps: int


def most_natural(
    rounds: Sequence[Calibrated], prior: NaturalPictures, grey: Tensor, scale: Tensor, *, seed: int = 0
) -> MostNatural:
    """The picture that the rounds and the prior make most probable.

    Parameters
    ----------
    rounds : sequence of Calibrated, of one picture
    prior : NaturalPictures
    grey, scale : Tensor (p,)
        Model input of a patch is grey + scale · (pixels − ½); ``scale`` is one number a channel.
    seed : int
        Of the draws that the prediction is made of.
    """
    G = torch.cat([r.G for r in rounds], 1)
    generator = torch.Generator().manual_seed(seed)
    B = prior.modes((torch.cat([r.dW for r in rounds]) - torch.outer(G.sum(0), grey)) / scale)
    per_mode = prior.of_modes(1 / scale).sqrt()
    error, steps = prior.draw(generator), 0
    Y = torch.zeros_like(error)
    for another in range(_PASSES):
        X, doubt = prior.modes(grey + scale * prior.pixels(Y)), prior.modes(scale * prior.pixels(error))
        variance = torch.cat([r.variance(X, doubt) for r in rounds])
        of_row, of_mode = _by_rows_and_modes(variance, G.square().sum(0))
        U, s, Vt = thin_svd((G / of_row).T)
        right = U.T @ (B / of_row[:, None])
        system = _Seen(s, Vt, of_mode * per_mode, prior)
        Y, of_it = system.most_probable(right)
        error, of_another = system.error_of_another(generator)
        steps += of_it + of_another
        if another < _PASSES - 1:
            prior = prior.of_this_one(Y, error)
    return MostNatural(prior.pixels(Y), prior.expected_error(Y, error), steps)


# --- For the attack --------------------------------------------------------------------------------


def natural_patches(
    rounds: Sequence[Equations],
    biases: Sequence[Tensor | None],
    sigma: float,
    anatomy: Anatomy,
    preprocessing: Preprocessing,
) -> tuple[Tensor, float]:
    """The patches (n, p) in model-input space, and their expected mean square error there.

    Parameters
    ----------
    rounds : sequence of Equations, of one picture
    biases : sequence of Tensor or None
        ∂l/∂b_e of each round, if shared.
    sigma : float
        Deviation of the noise in every entry of each round.
    anatomy, preprocessing
    """
    tiling, (n, _), p = anatomy.tiling, rounds[0].G.shape, rounds[0].dW.shape[1]
    channels = tiling.boxes(rounds[0].dW[None, :1]).shape[2]
    prior = NaturalPictures.of(channels, tiling.image_size, tiling.patch_size, rounds[0].G.device)

    def ordered(patches: Tensor) -> Tensor:
        return tiling.boxes(patches[None]).flatten(2)[0].to(rounds[0].G)

    dark, grey, light = (grey_patches(tiling, preprocessing, (n, p), level)[0, None] for level in (0.0, 0.5, 1.0))
    systems = [
        calibrated(ordered(dW), G, b, sigma / several**0.5, centred=anatomy.ignores_mean)
        for dW, G, b, several in unmoved(rounds, biases, sigma)
    ]
    found = most_natural(systems, prior, ordered(grey)[0], ordered(light - dark)[0])
    pixels = unpatchify(found.patches[None] + 0.5, tiling.patch_size, tiling.image_size)
    of_pixels = sum(std**2 for std in preprocessing.std) / len(preprocessing.std)
    return tiling.patches(preprocessing.to_input(pixels))[0], found.mse / of_pixels


def unmoved(
    rounds: Sequence[Equations], biases: Sequence[Tensor | None], sigma: float
) -> list[tuple[Tensor, Tensor, Tensor | None, int]]:
    """dW, G and ∂l/∂b_e, averaged over rounds that differ by no more than noise, and over how many: where the
    model did not move, these are one gradient with less noise, and (11.10) does more for it than for each.

    Examples
    --------
    >>> noise = [torch.randn(4, 50, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]
    >>> same = [Equations(5 + e.T, 5 + e, 0.1, 1.0) for e in noise]
    >>> [several for *_, several in unmoved([*same, Equations(same[0].dW, 9 + noise[1], 0.1, 1.0)], [None] * 4, 1.0)]
    [3, 1]
    """
    found: list[tuple[Tensor, Tensor, Tensor | None, int]] = []
    for r, b in zip(rounds, biases, strict=True):
        bias = None if b is None else b.to(r.G)
        for i, (dW, G, mean, k) in enumerate(found):
            variance = sigma**2 * (1 + 1 / k)
            pairs = (r.dW, dW), (r.G, G)
            if all((x - y).square().mean() < variance * (1 + _BY_LUCK * (2 / x.numel()) ** 0.5) for x, y in pairs):
                joined = None if bias is None or mean is None else mean + (bias - mean) / (k + 1)
                found[i] = (dW + (r.dW - dW) / (k + 1), G + (r.G - G) / (k + 1), joined, k + 1)
                break
        else:
            found.append((r.dW, r.G, bias, 1))
    return found


def noise_as_told(
    rounds: Sequence[Equations],
    biases: Sequence[Tensor | None],
    sigma: float,
    X: Tensor,
    mse: float,
    *,
    centred: bool,
) -> Condition:
    """That σ is no less than what is left: of equations to spare, where noise in G is carried by the patches X
    (n, p), known up to ``mse``; and of sums that vanish without noise. Told too little, or with another defence
    besides, predictions are far too high.

    Examples
    --------
    >>> G, X = (torch.randn(4, k, generator=torch.Generator().manual_seed(k)).double() for k in (50, 9))
    >>> e = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).double()
    >>> one = Equations(G.T @ X + 0.1 * e.T, G, 0.1, 0.1)
    >>> [noise_as_told([one], [None], sigma, X, 0.0, centred=False).state for sigma in (0.1, 0.01)]
    ['shown', 'contradicted']
    """
    carried, left, told = 1 + float(X.square().sum(0).mean()) + len(X) * mse, 0.0, 0
    for r, bias in zip(rounds, biases, strict=True):
        if (rows := len(r.dW) - centred - len(r.G)) > 0:
            U = thin_svd(r.G.T)[0]
            left += float((r.dW - U @ (U.T @ r.dW)).square().sum()) / carried
            told += rows * r.dW.shape[1]
        if (entry := noise_of_entries(r.G, None if bias is None else bias.to(r.G), centred=centred)) is not None:
            sums = centred * len(r.G) + (bias is not None) * len(r.dW)
            left, told = left + sums * entry**2, told + sums
    if not told:
        return Condition("noise is as told", "not checked", {}, "no equation and no sum is there to tell noise by")
    misfit = left / told / sigma**2
    words = "what is left is {misfit:.2g} times the variance that noise={sigma:.3g} explains"
    if misfit > _AS_TOLD:
        words += ": it is more, or something else was done besides. al.told_errors takes several defences together"
    return Condition("noise is as told", shown_if(misfit <= _AS_TOLD), {"misfit": misfit, "sigma": sigma}, words)


def is_noise(G: Tensor, sigma: float) -> bool:
    """Whether G has no more energy than noise of deviation ``sigma``, as under a head that is zero.

    >>> noise = torch.randn(8, 30, generator=torch.Generator().manual_seed(0)).double()
    >>> is_noise(noise, 1.0), is_noise(2 * noise, 1.0)
    (True, False)
    """
    return float(G.square().mean()) <= sigma**2 * (1 + _BY_CHANCE * (2 / G.numel()) ** 0.5)


def check_noise(noise: float | None) -> None:
    """Refuse a deviation that is none.

    Raises
    ------
    ValueError
        If it is not positive and finite.
    """
    if noise is not None and not (not isinstance(noise, bool) and 0 < noise < float("inf")):
        raise ValueError(
            f"noise={noise!r} is the standard deviation of the noise in each entry of the update, positive and "
            "finite: sigma of al.defenses.gaussian_noise, or noise multiplier times clipping norm. None: not known"
        )


def refuse_noise(attack: str, noise: float | None, why: str) -> None:
    """Refuse known noise where the entries that are read do not have it.

    Raises
    ------
    AttackNotApplicable
        Unless ``noise`` is None.
    """
    if noise is not None:
        raise AttackNotApplicable(attack, f"{why}: noise={noise:g} is not what its tokens' rows have. Leave it out")


def _by_rows_and_modes(variance: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """Deviations of equations (k, p), as the product of one of each row and one of each mode that is nearest
    to them, rows counting by their ``energy`` (k,).
    """
    log = variance.log() / 2
    share = energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
    rows = log.mean(1)
    return rows.exp(), (share @ (log - rows[:, None]) + (1 - share.sum()) * log.mean(0)).exp()


class _Seen:
    """s Vᵀ Y + noise, for a picture Y of the prior: with L = s Vᵀ/noise, the most probable Y solves
    either of two systems.

        (I + L K Lᵀ) T = seen/noise,  Y = K Lᵀ T           near the identity where little is seen
        (LᵀL + K⁻¹) Y = Lᵀ seen/noise                      nearly diagonal where much is seen

    Conjugate gradients solve the first for a start, and the second from there. The approximate inverses
    are those of a prior whose modes do not mix, and of which patches share the lowest.
    """

    def __init__(self, s: Tensor, Vt: Tensor, noise: Tensor, prior: NaturalPictures) -> None:
        self.s, self.V, self.noise, self.prior = s[:, None], Vt.T, noise, prior
        variance = prior.of_a_patch()
        self.shape, variance = variance.shape, variance.flatten()
        self.known = 1 + self.s**2 * variance / noise**2
        self.variance = variance
        one, weight = torch.eye(len(s)).to(s), (1 / noise**2).reshape(self.shape)
        self.first, self.second = {}, {}
        for mode, K in prior.shared_modes().items():
            turned, w = Vt @ K @ Vt.T, weight[(slice(None), *mode)][:, None, None]
            inverse = torch.linalg.inv(one + w * s[:, None] * turned * s)
            self.first[mode] = inverse
            # (Λ + K⁻¹)⁻¹ = K − K L (I + L K L)⁻¹ L K, with Λ = L² of these modes
            along = turned * s
            self.second[mode] = turned - w * (along @ inverse @ along.mT)

    def most_probable(self, seen: Tensor) -> tuple[Tensor, int]:
        """Y (n, p) of ``seen`` (n, p), and the steps that it took."""
        s, V, prior, noise = self.s, self.V, self.prior, self.noise

        def covered(T: Tensor) -> Tensor:
            return prior.covariance(V @ (s * T / noise))

        solved = partial(conjugate_gradients, steps=_STEPS, settled=_SETTLED)
        T, steps = solved(
            lambda T: T + s * (V.T @ covered(T)) / noise,
            lambda T: self._approximate(1 / self.known, self.first, T),
            seen / noise,
        )
        Y, more = solved(
            lambda Y: V @ (s**2 * (V.T @ Y)) / noise**2 + prior.precision(Y),
            lambda Y: V @ self._approximate(self.variance / self.known, self.second, V.T @ Y),
            V @ (s * seen / noise**2),
            start=covered(T),
        )
        return Y, steps + more

    def error_of_another(self, generator: torch.Generator) -> tuple[Tensor, int]:
        """How far another picture, seen as this one is, is from its estimate; and the steps."""
        drawn = self.prior.draw(generator)
        e = torch.randn(drawn.shape, generator=generator, dtype=torch.float64).to(drawn)[: len(self.s)]
        estimate, steps = self.most_probable(self.s * (self.V.T @ drawn) + self.noise * e)
        return drawn - estimate, steps

    def _approximate(self, each: Tensor, shared: Mapping[tuple[int, int], Tensor], T: Tensor) -> Tensor:
        out, T = (each * T).unflatten(1, self.shape), T.unflatten(1, self.shape)
        for (i, j), inverse in shared.items():
            out[:, :, i, j] = torch.einsum("cnm,mc->nc", inverse, T[:, :, i, j])
        return out.flatten(1)
