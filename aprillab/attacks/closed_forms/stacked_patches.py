"""The patch-embedding system of several rounds: the picture stays while the weights move, (10.1).

    [G₁ᵀ; G₂ᵀ; …] X = [∂l/∂W₁; ∂l/∂W₂; …]

Each round is divided by its noise. Where noise is more than rounding it is in G, too, and least
squares then draw the picture towards grey, however many rounds there are: noise of variance ρ² in k
rows of Gᵀ adds kρ² to every eigenvalue of GGᵀ. It is known, so it is taken off again (errors in
variables; Fuller, Measurement Error Models, 1987).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_algebra import thin_svd

_TINY = torch.finfo(torch.float64).tiny
_CALIBRATIONS = 4  # of the noise, by what the patches found with it leave
_LEAST_WEIGHT = 1e-6  # of a round
ROUNDING = 1e-6  # noise below this is a format's rounding, relative to each number and not to all


@dataclass(frozen=True)
class Equations:
    """One round's Gᵀ X = dW, and the noise in it.

    Attributes
    ----------
    dW : Tensor (d, p)
    G : Tensor (n, d)
    noise : float
        Of an entry of dW, relative to their r.m.s.
    entry : float
        Of an entry of G, as it stands.
    """

    dW: Tensor
    G: Tensor
    noise: float
    entry: float

    @property
    def scale(self) -> float:
        """What the round is divided by: its noise, in G where it is noise, in dW where it is
        rounding.
        """
        if self.noise >= ROUNDING:
            return max(self.entry, _TINY)
        return max(self.noise * float(self.dW.square().mean().sqrt()), _TINY)

    def gain(self, prior: tuple[Tensor, float]) -> float:
        """By how much relative noise is larger in the relative residual: the pixels carry G's
        there.
        """
        carried = len(self.G) * self.entry**2 * (float(prior[0].square().mean()) + prior[1])
        size = self.noise * float(self.dW.square().mean().sqrt())
        return (1 + carried / size**2) ** 0.5 if size else 1.0


@dataclass(frozen=True)
class Stack:
    """The rounds' equations, one below the other, each divided by its noise.

    Attributes
    ----------
    dW : Tensor (Σd, p)
    G : Tensor (n, Σd)
    entry : float
        Noise of an entry of G, the largest of the rounds.
    equations : float
        How many there are for each pixel, those of noisy rounds for less.
    added : float
        What noise in G adds to every eigenvalue of GGᵀ: Σ d ρ².
    spread : float
        By how much noise's own eigenvalues differ from that.
    kappas : (float, float)
        Noise in dW over noise in G, both divided: if it is of one size in all tensors, as a
        defence's is, and if it is in proportion to each tensor, as that of a format is.
    """

    dW: Tensor
    G: Tensor
    entry: float
    equations: float
    added: float
    spread: float
    kappas: tuple[float, float]


def noise_of_entries(G: Tensor, bias: Tensor | None, *, centred: bool) -> float | None:
    """The most probable noise of an entry of G (n, d), from sums that vanish without it; None
    where there are none. Each row does where LayerNorms read the tokens (``centred``), and
    ∂l/∂b_e − Σ_i G_i does.
    """
    (n, d), squares, sums = G.shape, 0.0, 0
    if centred:
        squares, sums = squares + float(G.sum(1).square().sum()) / d, sums + n
    if bias is not None:
        squares, sums = squares + float((bias - G.sum(0)).square().sum()) / (n + 1), sums + d
    return (squares / sums) ** 0.5 if sums else None


def stacked(rounds: Sequence[Equations]) -> Stack:
    """One system of several rounds.

    A round in which G is mostly noise has little to say, and its noise bends the rest: it counts by
    the energy of its signal, over that and what noise's eigenvalues differ by.
    """
    rho2 = [(r.entry / r.scale) ** 2 if r.noise >= ROUNDING else 0.0 for r in rounds]
    widths = [r.G.shape[1] for r in rounds]
    n = len(rounds[0].G)
    counts = [_weight(r.G / r.scale, rho) for r, rho in zip(rounds, rho2, strict=True)]
    counts = [w / max(counts) for w in counts]  # only among themselves: an equation's own noise stays 1
    noisy = list(zip(counts, widths, rho2, strict=True))
    return Stack(
        torch.cat([r.dW * (w**0.5 / r.scale) for r, w in zip(rounds, counts, strict=True)]),
        torch.cat([r.G * (w**0.5 / r.scale) for r, w in zip(rounds, counts, strict=True)], 1),
        max(r.entry / r.scale for r in rounds),
        sum(w * d for w, d, _ in noisy),
        sum(w * d * rho for w, d, rho in noisy),
        (n * sum(w**2 * d * rho**2 for w, d, rho in noisy)) ** 0.5,
        (
            (sum((r.entry / r.scale) ** 2 for r in rounds) / len(rounds)) ** 0.5,
            (sum((r.noise * float(r.dW.square().mean().sqrt()) / r.scale) ** 2 for r in rounds) / len(rounds)) ** 0.5,
        ),
    )


def _weight(G: Tensor, rho2: float) -> float:
    """What a round's G (n, d) with noise of variance ``rho2`` counts, from 0 to 1."""
    n, d = G.shape
    if not rho2:
        return 1.0
    signal = max(float(G.square().sum()) / n - d * rho2, 0.0)  # in a direction
    return max(signal / (signal + (n * d) ** 0.5 * rho2), _LEAST_WEIGHT)


@dataclass(frozen=True)
class StackedPatches:
    """The most probable patches X (n, p) of several rounds, and what is known of their error.

    Attributes
    ----------
    X : Tensor (n, p), in model-input space
    residual : Tensor (Σd, p)
        What no X explains, of deviations from grey, each round divided by its noise.
    s : Tensor (n,)
        Singular values of the stacked G.
    mse : float
        Expected, in model-input space.
    """

    X: Tensor
    residual: Tensor
    s: Tensor
    mse: float


def most_probable_of(stack: Stack, prior: tuple[Tensor, float]) -> StackedPatches:
    """Least squares where the rounds say more than noise, grey where they do not.

    Patches have the mean ``prior[0]`` (p,) and the variance ``prior[1]`` before anything is read.
    With λ an eigenvalue of GGᵀ, c what is left of it without the noise's share, and σ² the variance
    of an equation, a direction is known to σ²λ/c², and weighs against the prior accordingly; where
    nothing is damped this is (10.4).

    Examples
    --------
    >>> G, X = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double(), torch.tensor([[3.0], [4.0]]).double()
    >>> halves = [Equations(G[:, i : i + 1].T @ X, G[:, i : i + 1], 1e-12, 1e-12) for i in (0, 1)]
    >>> most_probable_of(stacked(halves), (torch.zeros(1).double(), 1.0)).X.flatten().round(decimals=6).tolist()
    [3.0, 4.0]
    """
    U, s, Vt = thin_svd(stack.G.T)
    B = stack.dW - torch.outer(stack.G.sum(0), prior[0])  # of deviations from grey
    b = U.T @ B
    outside = float((B - U @ b).square().sum())
    # The sums that measured each round's noise are few. All equations together tell it to a per
    # cent.
    noise = 1.0
    for _ in range(_CALIBRATIONS if stack.added else 1):
        found = _believed(stack, s, b, outside, noise, prior[1])
        X = prior[0] + Vt.T @ found.b
        noise = _calibrated(stack, found.variance, float(X.square().sum(0).mean()))
    return StackedPatches(X, B - stack.G.T @ (X - prior[0]), s, found.mse)


@dataclass(frozen=True)
class _Believed:
    """Deviations b (n, p) in the directions of Vᵀ; an equation's variance; the
    expected square error.
    """

    b: Tensor
    variance: float
    mse: float


def _believed(stack: Stack, s: Tensor, b: Tensor, outside: float, noise: float, variance: float) -> _Believed:
    """Each direction by its own share: b s/c, believed as far as c stands out."""
    n, p = len(stack.G), b.shape[1]
    spare = max(stack.equations - n, 1.0) * p
    lam = s.clamp_min(_TINY) ** 2
    c = (lam - noise * stack.added).clamp_min(0.0)
    of_equation = max(1.0, outside / spare)
    doubt = of_equation * lam + variance * (noise * stack.spread) ** 2  # of b s, with what the spread bends
    either = variance * c**2 + doubt
    believed = variance * c / either
    deviations = b * (s * believed)[:, None]
    left = outside + float((b - s[:, None] * deviations).square().sum())
    mse = variance * (float((doubt / either).sum()) + (n - len(s))) / n
    return _Believed(deviations, left / spare, mse)


def _calibrated(stack: Stack, variance: float, carried: float) -> float:
    """Noise's variance in G over what the rounds' sums said: an equation has that of dW, and G's
    times the pixels. Of the two ways in which noise comes, the one that is nearer to the sums.
    """
    either = [variance / (kappa**2 + carried) for kappa in stack.kappas]
    return min(either, key=lambda factor: abs(torch.tensor(factor).log().item()))


def residuals_of(rounds: Sequence[Equations], X: Tensor) -> tuple[float, ...]:
    """‖dW − Gᵀ X‖ / ‖dW‖ of each round, for the patches X (n, p)."""
    return tuple(
        float((r.dW - r.G.T @ X).norm() / r.dW.norm().clamp_min(_TINY)) if r.dW.any() else 0.0 for r in rounds
    )
