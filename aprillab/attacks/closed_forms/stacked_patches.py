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
        """What the round is divided by: its noise, in G where it is noise, in dW where it is rounding."""
        if self.noise >= ROUNDING:
            return max(self.entry, _TINY)
        return max(self.noise * float(self.dW.square().mean().sqrt()), _TINY)

    def gain(self, prior: tuple[Tensor, float]) -> float:
        """By how much relative noise is larger in the relative residual: the pixels carry G's there."""
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
    added : float
        What noise in G adds to every eigenvalue of GGᵀ: Σ d ρ².
    spread : float
        How uncertain that is: noise's own eigenvalues differ by so much.
    """

    dW: Tensor
    G: Tensor
    entry: float
    added: float
    spread: float


def stacked(rounds: Sequence[Equations]) -> Stack:
    """One system of several rounds."""
    rho2 = [(r.entry / r.scale) ** 2 if r.noise >= ROUNDING else 0.0 for r in rounds]
    widths = [r.G.shape[1] for r in rounds]
    n = len(rounds[0].G)
    return Stack(
        torch.cat([r.dW / r.scale for r in rounds]),
        torch.cat([r.G / r.scale for r in rounds], 1),
        max(r.entry / r.scale for r in rounds),
        sum(d * rho for d, rho in zip(widths, rho2, strict=True)),
        (n * sum(d * rho**2 for d, rho in zip(widths, rho2, strict=True))) ** 0.5,
    )


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
    of an equation, a direction b/c is known to σ²λ/c², and weighs against the prior accordingly.

    Examples
    --------
    >>> G, X = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double(), torch.tensor([[3.0], [4.0]]).double()
    >>> halves = [Equations(G[:, i : i + 1].T @ X, G[:, i : i + 1], 1e-12, 1e-12) for i in (0, 1)]
    >>> most_probable_of(stacked(halves), (torch.zeros(1).double(), 1.0)).X.flatten().round(decimals=6).tolist()
    [3.0, 4.0]
    """
    x0, variance = prior
    n, equations = stack.G.shape
    U, s, Vt = thin_svd(stack.G.T)
    B = stack.dW - torch.outer(stack.G.sum(0), x0)  # of deviations from grey
    b = U.T @ B
    residual = B - U @ b
    # An equation's variance: that of its own noise at least, and of G's noise times the pixels.
    sigma2 = max(1.0, float(residual.square().sum()) / max((equations - n) * B.shape[1], 1))
    lam = s.clamp_min(_TINY) ** 2
    c = (lam - stack.added).clamp_min(_TINY)
    # The share of a direction that is believed: its own variance, the prior's, and what the spread bends.
    share = variance * c**2 / (variance * c**2 + sigma2 * lam + variance * stack.spread**2)
    X = x0 + Vt.T @ (b * (s / c * share)[:, None])
    unseen = variance * (n - len(s))
    return StackedPatches(X, residual, s, (float((variance * (1 - share)).sum()) + unseen) / n)


def residuals_of(rounds: Sequence[Equations], X: Tensor) -> tuple[float, ...]:
    """‖dW − Gᵀ X‖ / ‖dW‖ of each round, for the patches X (n, p)."""
    return tuple(
        float((r.dW - r.G.T @ X).norm() / r.dW.norm().clamp_min(_TINY)) if r.dW.any() else 0.0 for r in rounds
    )
