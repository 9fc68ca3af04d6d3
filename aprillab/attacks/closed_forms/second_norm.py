"""A second look at the same patches: the norm before the MLP reads them too.

What that norm is given is y_i = z_i + a_i, the token and what the attention adds to it, and its
readers' gradient spans the normed y_i as the first attention's does the z_i:

    C (W_e x_i + b_e + E_i + a_i) = (D₂/γ₂)ᵀ c_i (+ t β₂/γ₂)        for some coefficients c_i.

The a_i depend on all patches, but little on each: they are taken from the picture that the span
attack found. D₂ shows the weakest token more clearly than the attention's rows do: over its own
noise five to twelve times as much, at the width of ViT-L/16 and 224, for four photographs and two
seeds. What a_i gets wrong goes into all patches alike, and there D₂ says less than D. So the
picture moves towards what D₂ says for as long as D does not mind: until its costs have doubled, as
the truth's may have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, playable, tensors_of
from ...preprocessing import Preprocessing
from ..reading import Reading
from .inputs import grey_patches
from .noisy_span import noisy_span
from .probe import places_of
from .span_solution import SpanSolution
from .token_equations import token_equations

# Of D's costs, which may grow by so much: the truth's are 0.3 to 2.8 above the least, which is no
# truth but their minimum; 1 and 3 give the same pictures.
_MAY_GROW = 1.0
# The second look is taken where all that D₂ says is within D's budget; that has been right wherever
# it was seen, by up to 20 dB. Else an error of the first look, on its way through the attention and
# D₂ alone, may come out so much larger at most (5 dB), for D brakes what grows, and D₂ must count
# for something beside D. Below that the second look lost up to 20 dB, and gained 4 at most.
_LEAST_GAIN, _LEAST_WEIGHT = 10 ** (-5 / 20), 0.4
_FREELY = 1e3  # a weight of D₂ at which D says nothing any more
_DISTURBED, _SEED = 1e-2, 11  # the error that is tried, in model input
_STEPS = 60  # of a bisection over forty powers of ten


@dataclass
class _Second:
    """The norm before the MLP, as a forward pass meets it: its name, what it is given, and who
    reads it.
    """

    norm: str = ""
    given: Tensor | None = None
    normed: Tensor | None = None
    readers: list[str] = field(default_factory=list)

    def tokens(self, count: int) -> Tensor:
        """Of the patches, in columns (d, n), float64."""
        if self.given is None:
            raise ValueError("no norm was met")
        return self.given.double().reshape(-1, self.given.shape[-1])[-count:].T


class _Seen(Exception):
    """Ends the forward pass."""


def second_look(
    model: nn.Module, reading: Reading, solution: SpanSolution, anatomy: Anatomy, preprocessing: Preprocessing
) -> SpanSolution:
    """The span attack's patches, brought nearer to what the MLP's gradient says of them.

    Where there is no such norm, its readers' gradient is not shared, or the two do not go together,
    the solution comes back as it was. ``numbers["second_look"]`` is the size of an error before it
    over that after, and 0 where it is not taken. The root and the variance stay those of D alone,
    and with them the error predicted: that of a_i is not known.

    Parameters
    ----------
    model : nn.Module, in the client's mode
    reading : Reading, of one gradient
    solution : SpanSolution
        Found without the patch embedding's gradient, so that root and variance are the tokens' own.
    anatomy : Anatomy, of a model with first_block "prenorm"
    preprocessing : Preprocessing
        Pixels outside [0, 1] are moved into it before the attention reads them.
    """
    as_it_was = replace(solution, numbers={**solution.numbers, "second_look": 0.0})
    if anatomy.first_block != "prenorm":
        return as_it_was
    p, n = solution.patches.shape
    patches, errors = _within(solution.patches, anatomy, preprocessing), _errors(solution)
    try:
        seen = [_look(model, anatomy, tried) for tried in (patches, patches + errors)]
    except Exception:  # of the user's model, whatever it is: the first look stands
        return as_it_was
    shared = [reading.update.gradients[name] for name in seen[0].readers if name in reading.update.gradients]
    if not any(g.any() for g in shared):
        return as_it_was
    rows = torch.cat([g.to(patches).flatten(1) for g in shared])
    T, t, more = _second_equations(model, reading, solution, anatomy, rows, seen, (patches, errors))
    gain = float(errors.norm() / torch.linalg.lstsq(T, more).solution.norm().clamp_min(1e-300))
    least = solution.variance * max(int(solution.numbers["width_of_rows"]) - p, 1) * n
    found, weight = moved(solution.patches, solution.root, T, t, _MAY_GROW * least)
    if weight < _FREELY and (gain < _LEAST_GAIN or weight < _LEAST_WEIGHT):
        return as_it_was
    return replace(solution, patches=found, numbers={**solution.numbers, "second_look": gain})


def _second_equations(
    model: nn.Module, reading: Reading, solution: SpanSolution, anatomy: Anatomy, rows: Tensor, seen: list[_Second],
    tried: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """T and t of what x costs as a combination of D₂'s ``rows``, ‖T x + t‖², and what errors add to
    t.

    ``seen`` is what patches and patches with errors lead to, ``tried`` the two, (p, n) each.
    """
    (patches, errors), n = tried, tried[0].shape[1]
    weights = {name: tensor.to(patches.device) for name, tensor in tensors_of(model).items()}
    W_e, places = weights[anatomy.patch_weight].double().flatten(1), places_of(anatomy, weights).T
    added = seen[0].tokens(n) - (W_e @ patches + places)  # (d, n), a
    more = seen[1].tokens(n) - (W_e @ (patches + errors) + places) - added
    gamma, beta = (weights.get(f"{seen[0].norm}.{part}") for part in ("weight", "bias"))
    gamma = torch.ones_like(places[:, 0]) if gamma is None else gamma.double()
    columns = torch.cat([places + added, more], 1)
    equations = token_equations(rows, W_e, columns.T, gamma, None if beta is None else beta.double())
    span = noisy_span(equations.D, int(solution.numbers["tokens"]), reading.noise)
    t = span.coefficients(equations.e)
    return span.coefficients(equations.A), t[:, :n], t[:, n:]


def _within(patches: Tensor, anatomy: Anatomy, preprocessing: Preprocessing) -> Tensor:
    """The patches (p, n) with pixels in [0, 1]."""
    shape = patches.shape[1], patches.shape[0]
    black, white = (grey_patches(anatomy.tiling, preprocessing, shape, grey).T.to(patches) for grey in (0.0, 1.0))
    return patches.clamp(black, white)


def _errors(solution: SpanSolution) -> Tensor:
    """An error (p, n) as the first look may have it, but of a size at which all is linear."""
    normal = torch.randn(solution.patches.shape, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    errors = torch.linalg.solve_triangular(solution.root, normal.to(solution.root), upper=True)
    return errors * (_DISTURBED / errors.square().mean().sqrt())


def moved(patches: Tensor, root: Tensor, T: Tensor, t: Tensor, most: float) -> tuple[Tensor, float]:
    """The x of least ‖H (x − x₀)‖² + w² ‖T x + t‖² for the largest w that keeps the first sum, over
    all columns, below ``most``; and w.

    Parameters
    ----------
    patches : Tensor (p, n), x₀
    root : Tensor (p, p), H, upper triangular
    T, t : Tensor (m, p), (m, n)
    most : float

    Examples
    --------
    >>> unit = torch.eye(1).double()
    >>> found, weight = moved(0 * unit, unit, unit, -unit, 0.25)
    >>> round(float(found), 6), round(weight, 6)
    (0.5, 1.0)
    """
    # With H x = H x₀ + U y and UᵀH⁻ᵀTᵀT H⁻¹U = diag(μ), each coordinate stands alone.
    steep = torch.linalg.solve_triangular(root.T, T.T, upper=False)  # (p, m)
    mu, U = torch.linalg.eigh(steep @ steep.T)
    pull, mu = -(U.T @ (steep @ (T @ patches + t))), mu.clamp_min(0)

    def step(square: float) -> Tensor:
        return square * pull / (1 + square * mu)[:, None]

    low, high = -20.0, 20.0  # powers of ten of w²
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if float(step(10**middle).square().sum()) > most else (middle, high)
    return patches + torch.linalg.solve_triangular(root, U @ step(10**low), upper=True), 10 ** (low / 2)


# --- Where it is --------------------------------------------------------------------------------------------------


def _look(model: nn.Module, anatomy: Anatomy, patches: Tensor) -> _Second:
    """The first norm after the attention's own that reads whole tokens, and the layers that read
    it.
    """
    second = _Second()
    picture = anatomy.tiling.images(patches.T[None]).to(next(model.parameters()))
    alone = torch.random.fork_rng(devices=[picture.device] if picture.is_cuda else [])
    with alone, torch.no_grad(), playable(model, anatomy), _watched(model, anatomy, second), suppress(_Seen):
        model.get_submodule(anatomy.root)(picture)
    return second


@contextmanager
def _watched(model: nn.Module, anatomy: Anatomy, second: _Second) -> Iterator[None]:
    """While this lasts, a forward pass fills in ``second``, and ends once it is past it."""
    first, width = (anatomy.norm_weight or "").rpartition(".")[0], tensors_of(model)[anatomy.patch_weight].shape[0]
    passed = [False]

    def norm(name: str) -> Any:
        def look(module: nn.LayerNorm, given: tuple[Any, ...], normed: Tensor) -> None:
            if name == first:
                passed[0] = True
            elif passed[0] and second.given is not None:
                raise _Seen
            elif passed[0] and tuple(module.normalized_shape) == (width,):
                second.norm, second.given, second.normed = name, given[0].detach(), normed

        return look

    def layer(name: str) -> Any:
        def look(_: nn.Module, given: tuple[Any, ...]) -> None:
            if second.normed is not None and given and given[0] is second.normed:
                second.readers.append(f"{name}.weight")

        return look

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            handles.append(module.register_forward_hook(norm(name)))
        elif isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(layer(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
