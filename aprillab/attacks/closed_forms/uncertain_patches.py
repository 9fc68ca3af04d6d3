"""The patch-embedding system where a defence left an error in each entry, for a natural picture.

    Gᵀ X = ∂W_e       with errors as :func:`~aprillab.attacks.told_errors.told_errors` tells them

**G is expected, not taken.** Columns of G are alike: patches that see the same of the class token
have gradients that go together. So column j is normal with covariance c_j Γ, both found from all
columns (expectation maximization), and what is expected of it, m_j, with covariance C_j, follows
from its entries, its sum ∂l/∂b_e among them. An entry that was set to zero lies between ±√3 times
its error: it enters by what the others leave of it (expectation propagation; Minka, UAI 2001).

**Equations of a row go together.** What is left of row j of ∂W_e − GᵀX has the covariance

    S_j = D_j + Xᵀ C_j X,     D_j = σ²_jk + tr(C_j) (what X's own error carries),           (11.12)

so that GᵀX is compared in S_j⁻¹. An entry of ∂W_e that was set to zero is an interval, too.

**A prior on pictures**, (11.11). The most probable picture is found by conjugate gradients, three
times with S_j as X becomes known; a draw from noise and prior foresees the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...anatomy import Anatomy
from ...models import unpatchify
from ...preprocessing import Preprocessing
from ...update import ClientUpdate
from ..rounds import RoundRead
from .inputs import grey_patches
from .linear_algebra import conjugate_gradients
from .natural_pictures import NaturalPictures

_PASSES = 3  # over the covariances of rows, which the patches of the pass before give
_STEPS, _SETTLED = 100, 1e-3  # of conjugate gradients; where they end, of the length of what is left
_ROUNDS_OF_EM, _SURE, _ALIKE = 8, 1e-3, 8.0  # the least error, of the r.m.s.; entries that speak for c_j = 1
_DAMPED = 0.7  # of a new message's part, so that messages settle
_FAR = 1e-6  # of a normal's mass: an interval that has no more counts as a point far out
_LEAST = 1e-9  # of an interval's square: a variance that is called zero
_MANY = 64  # columns at once
_OPTIMISTIC_DB = 3.0  # what a draw foresees is better than what comes out: medians over defences are 0 to 6


@dataclass(frozen=True)
class Columns:
    """What is known of G (n, d), column by column.

    Attributes
    ----------
    precision, covariance : Tensor (d, n, n)
    mean : Tensor (d, n)
    """

    precision: Tensor
    covariance: Tensor
    mean: Tensor


def columns_of(G: Tensor, error: Tensor, bias: Tensor | None, bias_error: Tensor | None) -> Columns:
    """What is expected of G's columns, given its entries (n, d) and their sums ``bias``
    (d,), with errors.

    Examples
    --------
    >>> G = torch.tensor([[1.0, -2.0], [3.0, 1.0]]).double()
    >>> torch.allclose(columns_of(G, 1e-6 * G.abs(), None, None).mean.T, G, rtol=1e-3)
    True
    """
    n, d = G.shape
    size = float(G.square().mean()) ** 0.5 or (float((G if bias is None else bias).square().mean()) / n**1.5) ** 0.5
    floor = (_SURE * max(size, torch.finfo(G.dtype).tiny ** 0.5)) ** 2
    variance, zero = error.square().clamp_min(floor), (G == 0) & (error > 0)
    weight = torch.where(zero, 0.0, 1 / variance)
    shift, within = G * weight, math.sqrt(3) * error
    of_sum = (
        torch.zeros_like(G[0]) if bias is None or bias_error is None else 1 / bias_error.square().clamp_min(floor)
    )
    pull = torch.zeros_like(of_sum) if bias is None else bias * of_sum
    spread, scale = torch.diag(_variances(G, variance, within, zero, bias)), torch.ones_like(of_sum)
    for step in range(_ROUNDS_OF_EM):
        inverse = torch.linalg.inv(spread)
        P = inverse / scale[:, None, None] + torch.diag_embed(weight.T) + of_sum[:, None, None]
        C = torch.linalg.inv(P)
        m = (C @ (shift.T + pull[:, None])[:, :, None])[:, :, 0]
        if step == _ROUNDS_OF_EM - 1:
            break
        second = torch.einsum("ja,jb,j->ab", m, m, 1 / scale) + torch.einsum("jab,j->ab", C, 1 / scale)
        spread = (second + 2 * torch.diag(spread.diagonal())) / (d + 2)
        inverse = torch.linalg.inv(spread)
        energy = torch.einsum("ja,ab,jb->j", m, inverse, m) + torch.einsum("jab,ab->j", C, inverse)
        scale = (energy + _ALIKE) / (n + _ALIKE)
        scale = scale / scale.mean()
        if bool(zero.any()):
            V = C.diagonal(dim1=1, dim2=2).T
            others = (1 / V - torch.where(zero, weight, 0.0)).clamp_min(_SURE / V)
            there = (m.T / V - torch.where(zero, shift, 0.0)) / others
            found_weight, found_mean = interval(there, 1 / others, within)
            weight = torch.where(zero, _DAMPED * found_weight + (1 - _DAMPED) * weight, weight)
            shift = torch.where(zero, _DAMPED * found_weight * found_mean + (1 - _DAMPED) * shift, shift)
    return Columns(P, C, m)


def _variances(G: Tensor, variance: Tensor, within: Tensor, zero: Tensor, bias: Tensor | None) -> Tensor:
    """Of each patch's entries (n,), for a start: from their squares, or from how many were set to
    zero.
    """
    least = 0.05 * float(G.square().mean())
    if not bool(zero.any()):
        return (G.square().mean(1) - variance.mean(1)).clamp_min(max(least, float(variance.min())))
    if bias is not None and bool(zero.all()):
        return (bias.square().mean() * 2 / len(G)).expand(len(G))
    kept = ((~zero).sum(1) + 0.5) / (G.shape[1] + 1.0)
    deviations = torch.special.ndtri(1 - kept.to(G).clamp(1e-4, 1 - 1e-3) / 2)
    return (within[zero].median() / deviations).square()


def interval(mean: Tensor, variance: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """What it adds to know that a normal number lies between ±``within``: as one more observation
    of it, its weight (one over variance) and its value.

    >>> weight, value = interval(torch.zeros(2), torch.tensor([100.0, 0.01]), torch.ones(2))
    >>> round(float(weight[0]), 1), round(float(weight[1]), 1), value.tolist()
    (3.0, 0.0, [0.0, 0.0])
    """
    variance = variance.clamp_min(_LEAST * float(within.square().max()))
    s = variance.sqrt()
    low, high = (-within - mean) / s, (within - mean) / s
    density_low, density_high = ((-z * z / 2).exp() / math.sqrt(2 * math.pi) for z in (low, high))
    mass = (torch.special.ndtr(high) - torch.special.ndtr(low)).clamp_min(1e-12)
    step = (density_low - density_high) / mass
    share = (1 + (low * density_low - high * density_high) / mass - step.square()).clamp(_FAR, 1 - 1e-4)
    weight = (1 / share - 1) / variance
    value = ((mean + s * step) / share - mean) / variance / weight
    far = mass < _FAR
    return torch.where(far, 3 / within.square(), weight), torch.where(far, 0.0, value)


@dataclass(frozen=True)
class _Rows:
    """The equations of a picture near X: with S_j of (11.12)."""

    columns: Columns
    X: Tensor
    weight: Tensor
    joint: Tensor

    @classmethod
    def near(cls, X: Tensor, columns: Columns, weight: Tensor) -> _Rows:
        """``weight`` (d, p) is one over D."""
        parts = zip(columns.precision.split(_MANY), weight.split(_MANY), strict=True)
        return cls(columns, X, weight, torch.cat([torch.linalg.inv(P + (X * w[:, None]) @ X.T) for P, w in parts]))

    def whitened(self, u: Tensor) -> Tensor:
        """S_j⁻¹ u_j, (d, p)."""
        u = self.weight * u
        return u - self.weight * ((self.joint @ (u @ self.X.T)[:, :, None])[:, :, 0] @ self.X)

    def squares(self) -> Tensor:
        """Σ_j m_j m_jᵀ (n, n), each by the mean of S_j⁻¹'s diagonal."""
        parts = zip(self.weight.split(_MANY), self.joint.split(_MANY), strict=True)
        seen = torch.cat([(w.square() * ((C @ self.X) * self.X).sum(1)).mean(1) for w, C in parts])
        m = self.columns.mean
        return m.T @ ((self.weight.mean(1) - seen).clamp_min(0.0)[:, None] * m)

    def noise(self, generator: torch.Generator) -> Tensor:
        """A draw of covariance S_j, (d, p)."""
        d, n, p = *self.columns.mean.shape, self.X.shape[1]
        shapes = (d, p), (d, n, 1)
        e, f = (torch.randn(s, generator=generator, dtype=torch.float64).to(self.X) for s in shapes)
        parts = zip(self.columns.precision.split(_MANY), f.split(_MANY), strict=True)
        in_G = [torch.linalg.solve_triangular(torch.linalg.cholesky(P).mT, one, upper=True) for P, one in parts]
        return e / self.weight.sqrt() + torch.cat(in_G)[:, :, 0] @ self.X

    def spread(self) -> Tensor:
        """Diagonals of Xᵀ C_j X, (d, p)."""
        return torch.cat([((C @ self.X) * self.X).sum(1) for C in self.columns.covariance.split(_MANY)])


@dataclass(frozen=True)
class _Space:
    """The prior for patches in model input, around grey."""

    prior: NaturalPictures
    scale: Tensor

    def precision(self, V: Tensor) -> Tensor:
        return self.prior.pixels(self.prior.precision(self.prior.modes(V / self.scale))) / self.scale

    def draw(self, generator: torch.Generator) -> Tensor:
        return self.prior.pixels(self.prior.draw(generator)) * self.scale

    def inverse(self, squares: Tensor) -> Callable[[Tensor], Tensor]:
        """Roughly (squares ⊗ 1 + K⁻¹)⁻¹: patches share the lowest modes, and none of the others."""
        A = squares * float(self.scale.square().mean())
        s, Q = torch.linalg.eigh(A)
        variance = self.prior.of_a_patch()
        each = 1 / (s.clamp_min(0.0)[:, None] + 1 / variance.flatten())
        low = {mode: torch.linalg.inv(A + torch.linalg.inv(K)) for mode, K in self.prior.shared_modes().items()}

        def near(V: Tensor) -> Tensor:
            T = self.prior.modes(V * self.scale)
            out, T = (Q @ (each * (Q.T @ T))).unflatten(1, variance.shape), T.unflatten(1, variance.shape)
            for (i, j), inverse in low.items():
                out[:, :, i, j] = torch.einsum("cnm,mc->nc", inverse, T[:, :, i, j])
            return self.prior.pixels(out.flatten(1)) * self.scale

        return near


def most_natural_of(
    dW: Tensor, dW_error: Tensor, columns: Columns, prior: NaturalPictures, grey: Tensor, scale: Tensor
) -> tuple[Tensor, float]:
    """The most probable patches (n, p) in model input, and their expected mean square error in
    pixels.

    Parameters
    ----------
    dW, dW_error : Tensor (d, p), patches' pixels in the order (channel, y, x)
    columns : Columns, of G
    prior : NaturalPictures
    grey, scale : Tensor (p,)
        As for :func:`~aprillab.attacks.closed_forms.known_noise.most_natural`.
    """
    generator, space = torch.Generator().manual_seed(0), _Space(prior, scale)
    own = 1 / dW_error.square().clamp_min((0.1 * _SURE) ** 2 * float(dW.square().mean()))
    zero, within = (dW == 0) & (dW_error > 0), math.sqrt(3) * dW_error
    X, seen, m = grey.expand(columns.mean.shape[1], -1), dW, columns.mean
    trace = columns.covariance.diagonal(dim1=1, dim2=2).sum(1)[:, None]
    doubt, error = float(space.draw(generator).square().mean()), X * 0
    for _ in range(_PASSES):
        rows = _Rows.near(X, columns, 1 / (1 / own + trace * doubt))
        near = space.inverse(rows.squares())

        def system(V: Tensor, rows: _Rows = rows) -> Tensor:
            return m.T @ rows.whitened(m @ V) + space.precision(V)

        solved = partial(conjugate_gradients, system, near, steps=_STEPS, settled=_SETTLED)
        X = X + solved(m.T @ rows.whitened(seen - m @ X) - space.precision(X - grey))[0]
        another = m.T @ rows.whitened(rows.noise(generator)) - space.precision(space.draw(generator))
        error = solved(another)[0]
        doubt = float(error.square().mean())
        if bool(zero.any()):
            spread = _Rows(columns, X, own, rows.joint).spread() + (m @ error).square().mean(1, keepdim=True)
            weight, value = interval(m @ X, spread, within.clamp_min(torch.finfo(dW.dtype).tiny))
            own, seen = torch.where(zero, weight, own), torch.where(zero, value, seen)
    return X, float((error / scale).square().mean()) * 10 ** (_OPTIMISTIC_DB / 10)


def natural_patches_of(
    updates: Sequence[ClientUpdate], anatomy: Anatomy, preprocessing: Preprocessing, like: Tensor
) -> tuple[Tensor, float]:
    """The patches (n, p) in model-input space, and their expected mean square error there.

    Parameters
    ----------
    updates : sequence of ClientUpdate, with ``errors``, of one picture
    anatomy, preprocessing
    like : Tensor (n, p)
        Patches, on the device where to solve.
    """
    tiling, (n, p) = anatomy.tiling, like.shape

    def ordered(patches: Tensor) -> Tensor:
        return tiling.boxes(patches.to(like)[None]).flatten(2)[0]

    dark, grey, light = (
        ordered(grey_patches(tiling, preprocessing, (n, p), level)[0, None])[0] for level in (0.0, 0.5, 1.0)
    )
    channels = tiling.boxes(like[None, :1]).shape[2]
    prior = NaturalPictures.of(channels, tiling.image_size, tiling.patch_size, like.device)
    equations, columns = [], []
    for update in updates:
        told, position, bias = update.errors or {}, anatomy.position or "", anatomy.patch_bias or ""
        equations.append([ordered(t[anatomy.patch_weight].flatten(1)) for t in (update.gradients, told)])
        G, error = (t[position].to(like).flatten(0, -2)[anatomy.position_prefix :] for t in (update.gradients, told))
        b, b_error = (t[bias].to(like) if bias in t else None for t in (update.gradients, told))
        columns.append(columns_of(G, error, b, b_error))
    dW, dW_error = (torch.cat(parts) for parts in zip(*equations, strict=True))
    parts = zip(*((c.precision, c.covariance, c.mean) for c in columns), strict=True)
    X, mse = most_natural_of(dW, dW_error, Columns(*map(torch.cat, parts)), prior, grey, light - dark)
    pixels = unpatchify(((X - grey) / (light - dark) + 0.5)[None], tiling.patch_size, tiling.image_size)
    of_pixels = sum(std**2 for std in preprocessing.std) / len(preprocessing.std)
    return tiling.patches(preprocessing.to_input(pixels))[0], mse / of_pixels


def with_errors(read: RoundRead, anatomy: Anatomy) -> ClientUpdate:
    """The round's update; where it has no errors, as one among others that do, with
    those of its noise.
    """
    update, noise = read.reading.update, read.reading.noise
    if update.errors is not None:
        return update
    sizes = {name: noise * float(g.double().square().mean().sqrt()) for name, g in update.gradients.items()}
    if anatomy.position in sizes:
        sizes[anatomy.position] = read.reading.noise_of_position
    return replace(update, errors={name: torch.full_like(g, sizes[name]) for name, g in update.gradients.items()})
