"""Fit the prior on natural pictures, (11.1), by maximum likelihood on public pictures
that are no victims.

    python tools/fit_natural_pictures.py

Square crops of four photographs that scikit-learn and scikit-image carry, at 32×32 and at 224×224
pixels, as the victims are made: a crop, Lanczos. A coefficient of the cosine transform is taken as
normal with the variance of (11.1), all as independent (Whittle's likelihood), each crop of a
photograph for its share of it. Prints the numbers of
aprillab/attacks/closed_forms/natural_pictures.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
import torch
from PIL import Image
from scipy.optimize import minimize
from torch import Tensor

from aprillab.attacks.closed_forms.natural_pictures import cosines

SIZES = (32, 224)
SHARES = (1.0, 0.75, 0.5)  # of the shorter side
CROPS = 4  # of each share


def photographs() -> Iterator[Image.Image]:
    """china.jpg and flower.jpg of scikit-learn (CC BY 2.0); motorcycle_left.png (the
    Middlebury 2014 stereo benchmark) and moon.png of scikit-image, whose files name no licence
    of their own. They are read where the packages installed them; nothing of them is in this
    repository but five numbers.
    """
    for array in sklearn.datasets.load_sample_images().images:
        yield Image.fromarray(array)
    folder = Path(skimage.__file__).parent / "data"
    for name in ("motorcycle_left.png", "moon.png"):
        yield Image.open(folder / name).convert("RGB")


def crops(picture: Image.Image, size: int, seed: int) -> Iterator[Tensor]:
    """Pixels less ½ (3, size, size) of some squares."""
    draw = np.random.default_rng(seed)
    for share in SHARES:
        side = int(share * min(picture.size))
        if side < size:
            continue
        for _ in range(CROPS):
            x, y = (int(draw.integers(0, length - side + 1)) for length in picture.size)
            square = picture.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.LANCZOS)
            yield torch.tensor(np.asarray(square) / 255.0 - 0.5).permute(2, 0, 1)


def transforms(size: int) -> list[list[Tensor]]:
    """Of each photograph's crops."""
    C = cosines(size)
    return [[C @ pixels @ C.T for pixels in crops(picture, size, seed)] for seed, picture in enumerate(photographs())]


def together(groups: list[list[Tensor]]) -> float:
    """ρ: over all coefficients but the mean, each for its share, products of two colours
    over squares of one.
    """
    found = []
    for group in groups:
        white = torch.stack([t.flatten(1)[:, 1:] for t in group])
        white = white / white.square().mean((0, 1)).sqrt().clamp_min(1e-12)
        R = torch.einsum("gak,gbk->ab", white, white)
        found.append(float((R.sum() - R.trace()) / 2 / R.trace()))
    return sum(found) / len(found)


def energies(groups: list[list[Tensor]]) -> tuple[Tensor, Tensor, float]:
    """f², and energy over H·W of a coefficient, mean over colours, crops and
    photographs; of the mean, too.
    """
    each = torch.stack([torch.stack([t.square().mean(0) for t in group]).mean(0) for group in groups]).mean(0)
    n = len(each)
    f = torch.arange(n, dtype=torch.float64) / 2
    f2 = f[:, None] ** 2 + f**2
    return f2.flatten()[1:], each.flatten()[1:] / n**2, float(each[0, 0]) / n**2


def main() -> None:
    """Fit, and print."""
    groups = {size: transforms(size) for size in SIZES}
    told = {size: energies(groups[size]) for size in SIZES}

    def loss(x: np.ndarray) -> float:
        s, f0, power = np.exp(x)
        total = 0.0
        for f2, energy, _ in told.values():
            variance = s / (f2 + f0**2) ** power
            weight = 1 / f2  # an octave of frequencies counts as much as another
            total += float(((energy / variance + variance.log()) * weight).sum() / weight.sum())
        return total

    found = minimize(loss, np.log([0.001, 1.0, 1.2]), method="Nelder-Mead", options={"maxiter": 2000, "xatol": 1e-4})
    s, f0, power = np.exp(found.x)
    mean = sum(of_mean for _, _, of_mean in told.values()) / len(told)
    rho = sum(together(group) for group in groups.values()) / len(groups)
    print(f"s = {s:.3g}  f0 = {f0:.2f}  power = {power:.2f}  mean's variance = {mean:.3f}  rho = {rho:.2f}")
    for size, (f2, energy, _) in told.items():
        ratio = energy / (s / (f2 + f0**2) ** power)
        bands = [(low, 2 * low) for low in (0.5, 1, 2, 4, 8, 16, 32, 64) if low < size / 2]
        each = [float(ratio[(f2 >= low**2) & (f2 < high**2)].mean()) for low, high in bands]
        print(f"{size}×{size}: energy over that of the fit by octave", " ".join(f"{r:.2f}" for r in each))


if __name__ == "__main__":
    main()
