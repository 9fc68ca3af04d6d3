"""What the theorems say of the noise rows' models and pictures, in numbers that hold for every σ."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aprillab as al

from .._rows import fill
from .clients import NOISE, cells
from .grid import worlds
from .names import gradients_of
from .victims import DIGITS, EPOCHS, GALLERY, LARGE, World, scene

INFORMATION_FILE, MATCHING_FILE = "defences_information.csv", "defences_matching.csv"
_PROBES = 16
_WHOLE = 2  # digits, of which the whole of Fisher's information is computed, with the first seed


@dataclass(frozen=True)
class Information:
    """One victim's, with σ = 1 and C its gradient's norm; errors in pixels of [0, 1],
    squared, grow with σ².

    ``chosen`` is the error of the attacker without a prior who chose the model
    (``al.privacy.chosen_model_mse``), ``mean_bound`` Guo et al.'s for this model from the
    mean information of a pixel, ``cramer_rao`` that of the whole information matrix,
    where it was computed.
    """

    world: str
    when: str
    seed: int
    victim: str
    norm: float
    chosen: float
    mean_bound: float
    cramer_rao: float | None = None


@dataclass(frozen=True)
class Matching:
    """How often the best attacker names the right one of the gallery, all gradients
    clipped to one norm.

    ``rate`` is simulated, ``least`` and ``most`` of single pictures; ``bound`` is the
    theorem's, for any model.
    """

    world: str
    when: str
    seed: int
    sigma: float
    rate: float
    least: float
    most: float
    bound: float


def information(checkpoints: Path | None, epochs: int, victims: int, case: World) -> Iterator[Information]:
    """Rows of a world's victims."""
    world = World(*case)
    stage = scene(world, checkpoints, GALLERY, epochs)
    preprocessing = stage.anatomy.preprocessing
    of_pixels = sum(std**2 for std in preprocessing.std) / len(preprocessing.std)
    for k in range(min(victims, stage.victims)):
        image, label = stage.input_of(stage.pixels[k : k + 1]), stage.labels[k : k + 1]
        norm = al.defenses.update_norm(al.client_update(stage.model, image, label))
        mean = al.privacy.mean_pixel_information(
            stage.model, image, label, clip=norm, noise_multiplier=1.0, probes=_PROBES
        )
        chosen = al.privacy.chosen_model_mse(float(image.norm()), 1.0)
        whole = None
        if world.world == DIGITS and world.seed == 0 and k < _WHOLE and victims > _WHOLE:
            F = al.privacy.pixel_information(stage.model, image, label, clip=norm, noise_multiplier=1.0)
            whole = of_pixels * al.privacy.cramer_rao_mse(F)
        yield Information(*world, stage.names[k], norm, of_pixels * chosen, of_pixels / mean, whole)


def matching(checkpoints: Path | None, epochs: int, samples: int, case: World) -> Iterator[Matching]:
    """Rows of a world's noise multipliers."""
    world = World(*case)
    rows, _ = gradients_of(scene(world, checkpoints, GALLERY, epochs))
    distances = al.privacy.gradient_distances(rows / rows.norm(dim=1, keepdim=True))  # in units of C
    for sigma in (cell.strength for cell in cells(world) if cell.defence == NOISE):
        rates = al.privacy.identification_rates(distances, sigma, samples=samples)
        bound = al.privacy.success_bound(1 / len(rows), sigma)
        yield Matching(*world, sigma, float(rates.mean()), float(rates.min()), float(rates.max()), bound)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Both files."""
    epochs, victims, samples = (1, 2, 100) if options.quick else (EPOCHS, 8, 1000)
    small = [world for world in worlds(options) if world.world != LARGE]
    settings = {"gallery": GALLERY, "epochs": epochs}
    of_victims = functools.partial(information, options.checkpoints, epochs, victims)
    of_sigmas = functools.partial(matching, options.checkpoints, epochs, samples)
    common = {"key": World._fields, "workers": options.workers}
    fill(folder / INFORMATION_FILE, Information, small, of_victims, settings=settings | {"probes": _PROBES}, **common)
    fill(folder / MATCHING_FILE, Matching, small, of_sigmas, settings=settings | {"samples": samples}, **common)
