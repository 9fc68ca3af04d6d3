"""APRIL's closed form over several rounds: G_tᵀ (X − X₀) W_tᵀ = B_t for every round t, (10.2).

Where the patch embedding is frozen, W_t is the same in all rounds, and a model too narrow
for its tokens gets the equations it lacks. Where it is trained, each round sees other
directions of a patch, and p > d loses less. No singular vectors make all rounds diagonal at
once, so the system is solved by LSMR (Fong and Saunders, SIAM J. Sci. Comput. 2011), in the
basis that is right on average.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...preprocessing import Preprocessing
from ..evidence import System as Spare
from ..evidence import one_image
from ..labels import labels_or_none
from ..replay import Loss
from ..result import Condition, Reconstruction, margin, predicted_psnr, report, shown_if
from ..rounds import Left, RoundRead, agreeing, known
from ..verify import verified
from .april_system import GAIN, MARGIN_DB, System, read_system
from .inputs import grey_patches, pixel_variance
from .linear_algebra import numerical_rank, row_space_basis

_TINY = torch.finfo(torch.float64).tiny
_STEPS = 400  # of LSMR: the average basis makes a few dozen enough where rounds differ little
_DIGITS = 1e-14  # of LSMR's tolerances: near what float64 resolves


@dataclass(frozen=True)
class RoundEquations:
    """G (n, d), W (d, p) and B (d, d) of one round, (A1.1), and the noise of an entry of B."""

    G: Tensor
    W: Tensor
    B: Tensor
    noise: float


@dataclass(frozen=True)
class OverRounds:
    """Deviations Y (n, p) of the patches from X₀; by round the relative residual; the expected mean
    square error.
    """

    Y: Tensor
    residuals: tuple[float, ...]
    mse: float


@dataclass(frozen=True)
class _System:
    """All rounds' equations and the prior's, for the coordinates y (n·p,) of Y in the basis in
    which G Gᵀ and WᵀW are diagonal on average: Y = V (y/√w) Qᵀ.
    """

    rounds: Sequence[RoundEquations]
    V: Tensor
    Q: Tensor
    weight: Tensor
    variance: float

    @classmethod
    def of(cls, rounds: Sequence[RoundEquations], variance: float) -> _System:
        lam, V = torch.linalg.eigh(torch.stack([r.G @ r.G.T / r.noise**2 for r in rounds]).sum(0))
        mu, Q = torch.linalg.eigh(torch.stack([r.W.T @ r.W for r in rounds]).mean(0))
        weight = lam.clamp_min(0)[:, None] * mu.clamp_min(0)[None] + 1 / variance  # (n, p)
        return cls(rounds, V, Q, weight, variance)

    def patches(self, y: np.ndarray) -> Tensor:
        return self.V @ (torch.from_numpy(y).to(self.V).reshape(self.weight.shape) / self.weight.sqrt()) @ self.Q.T

    def forward(self, y: np.ndarray) -> np.ndarray:
        Y = self.patches(y)
        rows = [(r.G.T @ Y @ r.W.T / r.noise).flatten() for r in self.rounds]
        return torch.cat([*rows, Y.flatten() / self.variance**0.5]).cpu().numpy()

    def adjoint(self, values: np.ndarray) -> np.ndarray:
        *parts, last = torch.from_numpy(values).to(self.V).split([r.B.numel() for r in self.rounds] + [self.unknowns])
        Y = last.reshape(self.weight.shape) / self.variance**0.5
        for r, part in zip(self.rounds, parts, strict=True):
            Y = Y + r.G @ part.reshape(r.B.shape) @ r.W / r.noise
        return ((self.V.T @ Y @ self.Q) / self.weight.sqrt()).flatten().cpu().numpy()

    @property
    def unknowns(self) -> int:
        return self.weight.numel()


def solve_over_rounds(rounds: Sequence[RoundEquations], variance: float) -> OverRounds:
    """The most probable Y of G_tᵀ Y W_tᵀ = B_t in all rounds, for pixels of this variance.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> Y = torch.randn(3, 4, generator=g, dtype=torch.float64)
    >>> G, W = (torch.randn(2, *shape, generator=g, dtype=torch.float64) for shape in ((3, 5), (5, 4)))
    >>> rounds = [RoundEquations(G[t], W[t], G[t].T @ Y @ W[t].T, 1e-12) for t in (0, 1)]
    >>> torch.allclose(solve_over_rounds(rounds, 1.0).Y, Y, atol=1e-9)
    True
    """
    system = _System.of(rounds, variance)
    right = torch.cat([*((r.B / r.noise).flatten() for r in rounds), torch.zeros(system.unknowns).to(system.V)])
    operator = LinearOperator(
        (len(right), system.unknowns), matvec=system.forward, rmatvec=system.adjoint, dtype=np.float64
    )
    y = lsmr(operator, right.cpu().numpy(), atol=_DIGITS, btol=_DIGITS, conlim=0, maxiter=_STEPS)[0]
    Y = system.patches(y)
    missed = [float((r.B - r.G.T @ Y @ r.W.T).norm()) for r in rounds]
    relative = tuple(miss / max(float(r.B.norm()), _TINY) for miss, r in zip(missed, rounds, strict=True))
    # An equation's variance, at least that of its noise, and what the prior leaves of it in a
    # pixel.
    squares = sum((miss / r.noise) ** 2 for miss, r in zip(missed, rounds, strict=True))
    sigma2 = max(1.0, squares / max(len(right) - 2 * system.unknowns, 1))
    known = (system.weight - 1 / variance).clamp_min(0)
    return OverRounds(Y, relative, float((sigma2 / (known + sigma2 / variance)).mean()))


# --- The attack -----------------------------------------------------------------------------------


def april_over_rounds(
    model: nn.Module, rounds: Sequence[RoundRead], *, anatomy: Anatomy, preprocessing: Preprocessing,
    labels: Tensor | None, loss: Loss | None, verify: bool, device: torch.device | str | None,
) -> Reconstruction:  # fmt: skip
    """:func:`~aprillab.attacks.closed_forms.april.april_closed_form` of several rounds."""
    start, name = time.perf_counter(), "april_closed_form"
    systems = {r.number: _read(r, anatomy, device) for r in rounds}
    X0 = grey_patches(anatomy.tiling, preprocessing, _shape(next(iter(systems.values()))))
    basis = _row_space(systems, rounds, anatomy, X0)
    equations = {r.number: _equations(systems[r.number], X0, basis, r) for r in rounds}
    variance = pixel_variance(preprocessing)
    agreed = agreeing(name, rounds, partial(_left_by, equations, variance, anatomy.position_prefix))
    kept = [equations[r.number] for r in agreed.kept]
    found = solve_over_rounds(kept, variance)
    predicted, read = predicted_psnr(found.mse, preprocessing), agreed.kept[0].reading
    left = _left_by(equations, variance, anatomy.position_prefix, agreed.kept)
    system = Spare(f"GᵀZ = M over {len(kept)} rounds", max(left.residuals), max(left.spare, 0), _rows(kept), GAIN)
    one = one_image(anatomy, read.update, noise=max(r.reading.noise for r in agreed.kept), system=system)
    determined = _determined(kept, max(r.reading.noise for r in agreed.kept))
    result = report(
        name,
        anatomy.tiling.images((X0.to(found.Y) + found.Y @ basis.T)[None]),
        conditions=(determined, one, *agreed.conditions, margin(predicted, MARGIN_DB)),
        predicted_psnr=predicted,
        labels=labels_or_none(model, read.update, anatomy, labels, one=one),
        numbers={**determined.numbers, "noise": read.noise, "residual": max(left.residuals), **agreed.numbers},
        dtype=read.update.dtype,
        preprocessing=preprocessing,
        start=start,
    )
    return verified(result, model, agreed.kept, anatomy, preprocessing=preprocessing, loss=loss, verify=verify)


def _read(read: RoundRead, anatomy: Anatomy, device: torch.device | str | None) -> System:
    """The round's system; its weights must be known."""
    names = [anatomy.patch_weight, anatomy.patch_bias, anatomy.position, *anatomy.prefix]
    names += [rows.name for rows in (anatomy.query, anatomy.key, anatomy.value) if rows is not None]
    weights = known(read, names, "april_closed_form")
    return read_system(weights, read.reading.update, anatomy, strict=False, device=device)


def _shape(system: System) -> tuple[int, int]:
    return len(system.G_p), system.W_e.shape[1]


def _row_space(systems: Mapping[int, System], rounds: Sequence[RoundRead], anatomy: Anatomy, X0: Tensor) -> Tensor:
    """A basis (p, r) of what the patches' deviations from grey can be: all pixels or, where p > d
    loses some, the rows of ∂l/∂W_e − Gᵀ X₀ of all rounds, if they are shared.
    """
    first = systems[rounds[0].number]
    (d, p), n = first.W_e.shape, len(first.G_p)
    shared = [r.reading.update.gradients.get(anatomy.patch_weight) for r in rounds]
    rows = [
        dW.to(first.G).flatten(1) - systems[r.number].G_p.T @ X0.to(first.G)
        for dW, r in zip(shared, rounds, strict=True)
        if dW is not None and dW.any()
    ]
    if p <= d or len(rows) < len(rounds):
        return torch.eye(p).to(first.G)
    noise = max(r.reading.noise for r in rounds)
    # Rounds of other pictures have rows of their own: they must have room.
    return row_space_basis(torch.cat([A / A.norm() for A in rows]), n * len(rounds), noise)


def _equations(system: System, X0: Tensor, basis: Tensor, read: RoundRead) -> RoundEquations:
    noise = max(read.reading.noise * float(system.M.square().mean().sqrt()), _TINY)
    return RoundEquations(system.G_p, system.W_e @ basis, system.known(X0.to(system.G)), noise)


def _rows(rounds: Sequence[RoundEquations]) -> int:
    return sum(len(r.B) for r in rounds)


def _left_by(
    equations: Mapping[int, RoundEquations], variance: float, prefix: int, rounds: Sequence[RoundRead]
) -> Left:
    """What one picture leaves of some rounds; each column of B has as many equations as the width."""
    some = [equations[r.number] for r in rounds]
    found = solve_over_rounds(some, variance)
    return Left(found.residuals, (10.0,) * len(some), _rows(some) - len(some[0].G) - prefix)


def _determined(rounds: Sequence[RoundEquations], noise: float) -> Condition:
    """All G_t of rank n and the W_t together of rank p, or the other way about, fix every pixel."""
    n, p = len(rounds[0].G), rounds[0].W.shape[1]

    def rank(A: Tensor) -> int:
        return numerical_rank(torch.linalg.svdvals(A), noise)

    numbers: dict[str, Any] = {
        "rank": min(rank(r.G) for r in rounds), "rank_together": rank(torch.cat([r.G.T for r in rounds])), "n": n,
        "pixels": min(rank(r.W) for r in rounds), "pixels_together": rank(torch.cat([r.W for r in rounds])), "p": p,
    }  # fmt: skip
    holds = (numbers["rank"] == n and numbers["pixels_together"] == p) or (
        numbers["rank_together"] == n and numbers["pixels"] == p
    )
    return Condition(
        "pixels determined", shown_if(holds), numbers,
        "rank(G) {rank} in one round and {rank_together} in all, of n = {n}; rank(W_e) {pixels} and "
        "{pixels_together}, for {p} unknowns a patch",
    )  # fmt: skip
