"""How far whole grey levels go: `python -m studies.rounding`.

Writes data/results/rounding.csv, rounding_curves.csv, rounding_limits.csv, rounding.md and rounding.png. Random
weights, no gradient of the position embedding, labels recovered by the attack, photographs of 8-bit pixels. Every
search has the same budget; nothing is tuned to a victim, and a run that is broken off goes on from its CSV.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from aprillab import (
    HALF,
    ClientUpdate,
    VisionTransformer,
    client_update,
    defenses,
    load_victim,
    psnr,
    span_closed_form,
    span_then_round,
    viz,
)
from aprillab.comparison.cases import Case, cross
from aprillab.comparison.figures import picture_pages
from aprillab.comparison.records import Row
from aprillab.comparison.run import run
from studies.hybrid import RESULTS, VICTIMS

EVALUATIONS, SECONDS = 4000, 170.0
ATTACKS = ("span", "span_then_round")


def parts(quick: bool = False) -> dict[str, list[Case]]:
    """The study's cases by the question they answer."""
    if quick:
        tiny = {"image_size": 16, "patch_size": 4, "width": 64, "depth": 2, "heads": 2}
        return {"16 patches": cross(victims=VICTIMS[:1], attacks=ATTACKS, positions=("sinusoidal",), **tiny)}
    found: dict[str, list[Case]] = {}
    for width, heads in ((192, 3), (384, 6)):
        shape = {"width": width, "depth": 4, "heads": heads}
        dtypes = ("float32", "float64") if width == 192 else ("float32",)
        found[f"32×32, 16 patches, d = {width}"] = cross(
            victims=VICTIMS, attacks=ATTACKS, positions=("sinusoidal", "sinusoidal-2d"), dtypes=dtypes,
            image_size=32, patch_size=8, **shape,
        )  # fmt: skip
    large = {"width": 384, "depth": 4, "heads": 6}
    found["64×64, 64 patches, d = 384"] = cross(
        victims=VICTIMS, attacks=ATTACKS, positions=("sinusoidal",), image_size=64, patch_size=8, **large
    )
    for width, heads in ((192, 3), (384, 6)):
        found[f"32×32, 64 patches, d = {width}"] = cross(
            victims=VICTIMS, attacks=ATTACKS, positions=("sinusoidal",), image_size=32, patch_size=4, width=width,
            depth=4, heads=heads,
        )  # fmt: skip
    for size in (2, 4):
        found[f"batch of {size}, 32×32, 16 patches, d = 384"] = cross(
            victims=VICTIMS, attacks=ATTACKS, positions=("frozen",), batch_sizes=(size,), image_size=32,
            patch_size=8, **large,
        )  # fmt: skip
    return found


def table(found: dict[str, list[Row]]) -> str:
    """By part, embedding, precision and attack: PSNR, and how many are exact."""
    lines = [
        "| setting | embedding | precision | attack | updates | median dB | least | most | exact | evaluations "
        "| seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        kinds = dict.fromkeys((row.case.position, row.case.dtype, row.case.attack) for row in rows)
        for kind in kinds:
            group = [row for row in rows if (row.case.position, row.case.dtype, row.case.attack) == kind]
            scores = [row.psnr_min for row in group if row.psnr_min is not None]
            counts = [row.evaluations for row in group if row.evaluations is not None]
            cells = [name, *kind, str(len(group))]
            cells += (
                [decibels(f(scores)) for f in (statistics.median_low, min, max)] if scores else ["refused", "–", "–"]
            )
            cells += [str(sum(bool(row.exact) for row in group))]
            cells += [f"{statistics.median(counts):.0f}" if counts else "–"]
            cells += [f"{statistics.median(row.seconds for row in group):.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def decibels(value: float) -> str:
    """Equal to the last bit of float64 is not a number of dB that means anything."""
    return "every level" if value > 200 else f"{value:.1f}"


# --- Where it ends: other precisions, noise, pixels that are not whole --------------------------------------------


@dataclass(frozen=True)
class Limit:
    """One photograph under one change; without any search."""

    change: str
    victim: str
    span: float  # dB
    rounded: float  # dB
    settled: int
    patches: int
    exact: bool


def _dithered(pixels: Tensor) -> Tensor:
    """Uniform noise of one level from end to end: the least that leaves no whole level."""
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=pixels.dtype)
    return pixels + (noise - 0.5) / 255


def _resized(pixels: Tensor) -> Tensor:
    """To 8/9 of the side by a float filter, as augmentations on tensors do."""
    side = pixels.shape[-1] * 8 // 9
    return torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)


CHANGES: dict[str, tuple[Callable[[ClientUpdate], ClientUpdate] | None, Callable[[Tensor], Tensor] | None]] = {
    "none": (None, None),
    "shared in float16": (lambda update: defenses.to_precision(update, torch.float16), None),
    "shared in bfloat16": (lambda update: defenses.to_precision(update, torch.bfloat16), None),
    "noise of 1e-6 of the update's r.m.s.": (
        lambda update: defenses.gaussian_noise(update, 1e-6, relative=True, seed=0),
        None,
    ),
    "noise of 1e-5 of the update's r.m.s.": (
        lambda update: defenses.gaussian_noise(update, 1e-5, relative=True, seed=0),
        None,
    ),
    "noise of 1e-4 of the update's r.m.s.": (
        lambda update: defenses.gaussian_noise(update, 1e-4, relative=True, seed=0),
        None,
    ),
    "pixels dithered by one level": (None, _dithered),
    "pixels resized in floating point": (None, _resized),
}


def limits(victims: Sequence[str] = VICTIMS, *, width: int = 384, size: int = 32) -> list[Limit]:
    """1-D sinusoids in float32, 16 patches: what it takes to stop the rounding, and what is left of the picture."""
    model = VisionTransformer(
        image_size=size, patch_size=size // 4, width=width, depth=4, heads=6, classes=10, position="sinusoidal"
    )
    found = []
    for change, (of_update, of_pixels) in CHANGES.items():
        for number, victim in enumerate(victims):
            resized = size + size // 8 if of_pixels is _resized else size
            pixels = load_victim(victim, resized, dtype=torch.float64)[None]
            pixels = pixels if of_pixels is None else of_pixels(pixels)
            update = client_update(model, HALF.to_input(pixels).float(), torch.tensor([number]))
            update = update if of_update is None else of_update(update)
            span = span_closed_form(model, update, strict=False)
            result = span_then_round(model, update, max_evaluations=0, progress=False)
            settled = result.diagnostics["settled"]
            scores = float(psnr(span.pixels, pixels)), float(psnr(result.pixels, pixels))
            found.append(Limit(change, victim, *scores, int(settled.sum()), settled.numel(), result.exact))
    return found


def limits_table(found: Sequence[Limit]) -> str:
    """Medians by change."""
    lines = [
        "| change | span alone, median dB | rounded, median dB | patches settled | exact |",
        "|---|---|---|---|---|",
    ]
    for change in dict.fromkeys(limit.change for limit in found):
        group = [limit for limit in found if limit.change == change]
        settled, patches = (sum(getattr(limit, name) for limit in group) for name in ("settled", "patches"))
        cells = [change, f"{statistics.median(limit.span for limit in group):.1f}"]
        cells += [decibels(statistics.median(limit.rounded for limit in group)), f"{settled} of {patches}"]
        cells += [f"{sum(limit.exact for limit in group)} of {len(group)}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_limits(found: Sequence[Limit], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Limit.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(limit) for limit in found)


# --- The page -----------------------------------------------------------------------------------------------------


def report(found: dict[str, list[Row]], at_the_limits: Sequence[Limit]) -> str:
    row = next(row for rows in found.values() for row in rows)
    rounded = [row for rows in found.values() for row in rows if row.case.attack == "span_then_round"]
    false = sum(bool(row.exact) and (row.psnr or 0) < 100 for row in rounded)
    return f"""# Whole grey levels: how far they go

{__doc__.split(chr(10), 2)[2].strip()}

aprillab {row.aprillab}, torch {row.torch}, Python {row.python}, {row.machine}, {row.threads} thread(s). At
most {EVALUATIONS} evaluations and {SECONDS:.0f} s an attack, on a shared machine: the seconds are an upper bound.
PSNR is that of an update's worst image, after assignment; a median of an even number is the lower of the middle two.
"Every level": each pixel of the picture has the client's level, and
"exact" counts the attacks that say so themselves, having replayed the gradient; {false} of {len(rounded)} said so
wrongly. 0 evaluations: the span and the lattice sufficed. rounding.csv has a row for each attack.

{table(found)}

![Rows of three small pictures: the private image, the span attack's, spoilt in many patches, and the one of whole
levels, the same as the first in most rows.](rounding.png)

The first two photographs at 32×32, float32, by rows in the order of the table; in bold, PSNR above that of an 8-bit
rounding.

## Where it ends

1-D sinusoids, 32×32, 16 patches, d = 384, float32, {len({limit.victim for limit in at_the_limits})} photographs, no
search: what is settled from the span alone. A defence that stops the rounding still leaves the picture that the span
attack and the search of hybrid.md make.

{limits_table(at_the_limits)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one tiny model, written nowhere")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as nowhere:
        path = (Path(nowhere) if arguments.quick else RESULTS) / "rounding.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        edge = limits(VICTIMS[:1], width=192, size=16) if arguments.quick else limits()
        write_limits(edge, path.with_name("rounding_limits.csv"))
        print(limits_table(edge))
        found = {
            name: run(cases, path=path, max_evaluations=EVALUATIONS, max_seconds=SECONDS)
            for name, cases in parts(arguments.quick).items()
        }
        print(table(found))
        path.with_suffix(".md").write_text(report(found, edge), encoding="utf-8")
        rows = [row for part in found.values() for row in part]
        small = [row for row in rows if row.case.image_size <= 32 and row.case.victims[0] in VICTIMS[:2]]
        shown = [row for row in small if len(row.case.victims) == 1 and row.case.dtype == "float32"]
        path.with_suffix(".png").write_bytes(viz.to_png(picture_pages(shown, path, lines=12)[0], dpi=110))


if __name__ == "__main__":
    main()
