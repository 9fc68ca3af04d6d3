"""What pictures are like before anything is read: a normal prior whose variance falls with
frequency.

Natural pictures look alike at every scale, so the variance of a picture's coefficient falls as a
power of its frequency f, in cycles a picture (Field, J. Opt. Soc. Am. A 4, 1987). In the cosine
transform of a picture of H × W pixels in [0, 1], grey taken off, a coefficient has the variance

    S(f) = H W s / (f² + f₀²)^γ                                                       (11.11)

and that of the mean has a spread of its own; colours go together with a correlation ρ. The numbers
are the most likely ones of four photographs that are none of the course's victims: china and flower
of scikit-learn, motorcycle and moon of scikit-image (``tools/fit_natural_pictures.py``). Pictures
differ from each other more than that: ten times in an octave of frequencies is common. So each
octave has two factors, of what colours share and of their differences, found from the update itself
once a first estimate is there (:meth:`NaturalPictures.of_this_one`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...models import patchify, unpatchify

_SCALE, _CORNER, _POWER = 0.00195, 0.15, 1.18  # s, f₀ and γ
_OF_MEAN = 0.017  # variance of a picture's mean around grey
_TOGETHER = 0.85  # ρ
_AS_BEFORE, _BY_CHANCE = 20.0, 3.0  # coefficients that speak for a factor of 1; and deviations of a draw's sum
_TELLING = 3.0  # times the share of an octave that is seen: 1 is enough
_LOW = 3  # modes of a patch with i + j below this: what neighbours share


def cosines(n: int) -> Tensor:
    """The orthonormal cosine transform (n, n), float64: row k has k/2 cycles.

    >>> C = cosines(4)
    >>> torch.allclose(C @ C.T, torch.eye(4, dtype=torch.float64))
    True
    """
    k = torch.arange(n, dtype=torch.float64)
    C = torch.cos(math.pi / n * k[:, None] * (k + 0.5)) * (2 / n) ** 0.5
    C[0] /= 2**0.5
    return C


@dataclass(frozen=True)
class NaturalPictures:
    """The prior (11.11), for patches given by their own cosine modes, (n, p), p = C·h·w, in pixels
    less ½; the colours turned, the first being what they share.

    Attributes
    ----------
    patch : (int, int), h and w
    rows, columns : Tensor (H, H) and (W, W)
        From the modes of the patches in a line to the frequencies of the picture.
    spectrum : Tensor (C, H, W), S
        Of each turned colour.
    turn : Tensor (C, C)
        From colours to turned ones, orthonormal.
    """

    patch: tuple[int, int]
    rows: Tensor
    columns: Tensor
    spectrum: Tensor
    turn: Tensor

    @classmethod
    def of(
        cls, channels: int, size: tuple[int, int], patch: tuple[int, int], device: torch.device
    ) -> NaturalPictures:
        """For pictures (C, H, W) cut into patches (h, w)."""
        side = (size[0] * size[1]) ** 0.5
        f_y, f_x = (torch.arange(n, dtype=torch.float64) / 2 * side / n for n in size)
        f2 = f_y[:, None] ** 2 + f_x**2
        spectrum = side**2 * _SCALE / (f2 + _CORNER**2) ** _POWER
        spectrum[0, 0] = side**2 * _OF_MEAN
        together, turn = torch.linalg.eigh(
            torch.full((channels, channels), _TOGETHER, dtype=torch.float64).fill_diagonal_(1.0)
        )
        together, turn = together.flip(0), turn.T.flip(0)
        rows, columns = (
            cosines(n) @ torch.kron(torch.eye(n // m, dtype=torch.float64), cosines(m).T.contiguous())
            for n, m in zip(size, patch, strict=True)
        )
        return cls(patch, *(t.to(device) for t in (rows, columns, together[:, None, None] * spectrum, turn)))

    @cached_property
    def _within(self) -> tuple[Tensor, ...]:
        """The transforms of a patch's columns (h, h) and rows (w, w)."""
        return tuple(cosines(m).to(self.rows.device) for m in self.patch)

    def modes(self, patches: Tensor) -> Tensor:
        """Cosine modes of patches (m, p) in the order (channel, y, x); :meth:`pixels` turns them
        back.
        """
        y, x = (C.to(patches) for C in self._within)
        return torch.einsum("ac,mcij->maij", self.turn, y @ patches.unflatten(1, (-1, *self.patch)) @ x.T).flatten(1)

    def pixels(self, modes: Tensor) -> Tensor:
        """Patches (m, p) of their modes."""
        y, x = (C.to(modes) for C in self._within)
        return (y.T @ torch.einsum("ac,maij->mcij", self.turn, modes.unflatten(1, (-1, *self.patch))) @ x).flatten(1)

    def of_modes(self, channels: Tensor) -> Tensor:
        """Mean squares of the modes (p,), where pixels have ``channels`` (p,), one number a
        channel.
        """
        squares = channels.square().unflatten(0, (-1, *self.patch))
        return torch.einsum("ac,cij->aij", self.turn.square(), squares).flatten()

    def frequencies(self, modes: Tensor) -> Tensor:
        """The picture's transform (C, H, W) of the patches' modes (n, p)."""
        return self.rows @ unpatchify(modes[None], self.patch, self._size)[0] @ self.columns.T

    def of_frequencies(self, transform: Tensor) -> Tensor:
        """The patches' modes (n, p) of a transform (C, H, W)."""
        return patchify((self.rows.T @ transform @ self.columns)[None], self.patch)[0]

    def covariance(self, modes: Tensor) -> Tensor:
        """K times modes (n, p)."""
        return self.of_frequencies(self.frequencies(modes) * self.spectrum)

    def precision(self, modes: Tensor) -> Tensor:
        """K⁻¹ times modes (n, p)."""
        return self.of_frequencies(self.frequencies(modes) / self.spectrum)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Modes (n, p) of a picture."""
        e = torch.randn(self.spectrum.shape, generator=generator, dtype=torch.float64).to(self.spectrum)
        return self.of_frequencies(e * self.spectrum.sqrt())

    def of_this_one(self, modes: Tensor, error: Tensor) -> NaturalPictures:
        """The prior with a factor for each octave, such that this estimate is as likely as can be.

        Of N coefficients whose energy over their variance is Q in the estimate, and E in a draw of
        its error, N − E are seen, and the factor is Q / (N − E) (MacKay, Neural Computation 4,
        1992), the nearer to 1 the fewer these are.

        Parameters
        ----------
        modes : Tensor (n, p)
            Of the estimate.
        error : Tensor (n, p)
            One draw of what is expected of its error.
        """
        octave, (found, left, count) = self._octaves(), self._by_octave(modes, error)
        doubt = _AS_BEFORE + _BY_CHANCE * (2 * count).sqrt()
        factors = (found + doubt) / ((count - left).clamp_min(0.0) + doubt)
        factors[:2] = 1.0  # those of the mean: one number tells nothing
        return replace(self, spectrum=self.spectrum * factors[octave])

    def expected_error(self, modes: Tensor, error: Tensor) -> float:
        """Mean square of a pixel's error, for an estimate and one draw of its error under this
        prior.

        A draw has as much in the directions that no gradient shows as in others. Pictures have less
        there: where they are flat, gradients are weak. So in each octave of which enough is seen,
        what is not counts by the energy that the estimate has.
        """
        found, left, count = self._by_octave(modes, error)
        little = 1 - _TELLING * (count - left).clamp_min(0.0) / (count + _AS_BEFORE)
        share = torch.maximum((found + _AS_BEFORE) / (count + _AS_BEFORE), little).clamp_max(1.0)
        squares = self.frequencies(error).square() * share[self._octaves()]
        return float(squares.sum()) / modes.numel()

    def _by_octave(self, *pictures: Tensor) -> tuple[Tensor, ...]:
        """Energy over variance of some pictures' modes, and how many coefficients, by octave."""
        octave = self._octaves()
        energies = (*(self.frequencies(modes).square() / self.spectrum for modes in pictures), self.spectrum**0)
        zero = self.spectrum.new_zeros(int(octave.max()) + 1)
        return tuple(zero.index_add(0, octave.flatten(), energy.flatten()) for energy in energies)

    def _octaves(self) -> Tensor:
        """Of each coefficient (C, H, W), twice: 0 of the mean, 1 below a cycle a picture, 2 below
        two, …; and one more where it is of a difference of colours.
        """
        (H, W), side = self._size, math.prod(self._size) ** 0.5
        f_y, f_x = (torch.arange(n, device=self.spectrum.device) / 2 * side / n for n in (H, W))
        octave = torch.hypot(f_y[:, None], f_x).clamp_min(0.5).log2().floor().long() + 2
        octave[0, 0] = 0
        return torch.stack([2 * octave + (colour > 0) for colour in range(len(self.turn))])

    def of_a_patch(self) -> Tensor:
        """Variance (C, h, w) of a patch's modes, mean over the patches."""
        A, B = self._by_patch()
        return torch.einsum("kyi,ckl,lxj->cij", A**2, self.spectrum, B**2) / (A.shape[1] * B.shape[1])

    def shared_modes(self) -> dict[tuple[int, int], Tensor]:
        """Covariance (C, n, n) between the patches, for each of the lowest modes (i, j) of a patch."""
        A, B = self._by_patch()
        (_, gy, h), (_, gx, w) = A.shape, B.shape
        found = {}
        for i, j in ((a, b) for a in range(min(_LOW, h)) for b in range(min(_LOW - a, w))):
            pairs = [(M[:, :, None] * M[:, None, :]).flatten(1) for M in (A[:, :, i], B[:, :, j])]
            K = (pairs[0].T @ self.spectrum @ pairs[1]).reshape(-1, gy, gy, gx, gx)
            found[i, j] = K.permute(0, 1, 3, 2, 4).reshape(-1, gy * gx, gy * gx)
        return found

    def _by_patch(self) -> tuple[Tensor, Tensor]:
        """Rows' and columns' transforms as (frequency, patch, mode)."""
        return self.rows.unflatten(1, (-1, self.patch[0])), self.columns.unflatten(1, (-1, self.patch[1]))

    @property
    def _size(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)
