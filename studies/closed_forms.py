"""Measure the closed forms: `python -m studies.closed_forms` writes closed_forms.csv, .md and growth.csv.

Random weights, a head that is not zero, one image, label 3; float32 gradients unless a row says so, float64 solves.
PSNR on pixels clamped to [0, 1]. Attack and gradient are timed on the same machine in the same run, after one warm-up
gradient; a ratio of the two means more than either.
"""

from __future__ import annotations

import argparse
import csv
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

import aprillab as al

RESULTS = Path(__file__).parent.parent / "data" / "results"


@dataclass(frozen=True)
class Row:
    section: str
    model: str
    attack: str
    precision: str
    seed: int
    victim: str
    psnr: float | None
    predicted_psnr: float | None
    ssim: float | None
    exact: bool | None
    attack_seconds: float | None
    gradient_seconds: float
    note: str = ""


def with_random_head(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model from another library in eval mode, its weights from ``seed``, its head normal with deviation 0.02."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        weight = dict(model.named_parameters())[al.dissect(model).head_weight or ""]
        nn.init.normal_(weight, std=0.02)
    return model


def torchvision_model(name: str, seed: int = 0) -> nn.Module:
    import torchvision

    return with_random_head(lambda: torchvision.models.get_model(name), seed)


def timm_model(name: str) -> nn.Module:
    import timm

    return with_random_head(lambda: timm.create_model(name))


def transformers_model() -> nn.Module:
    import transformers

    return with_random_head(lambda: transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)))


def measure(
    section: str, name: str, model: nn.Module, attack: str, seed: int = 0, names: list[str] | None = None,
    variants: dict[str, dict[str, object]] | None = None,
) -> Iterator[Row]:  # fmt: skip
    """One row for each victim and each variant (label to options) of the attack; variants share the update."""
    anatomy = al.dissect(model)
    dtype = next(model.parameters()).dtype
    precision = str(dtype).removeprefix("torch.")
    size, target = anatomy.image_size[0], torch.tensor([3])
    al.client_update(model, torch.zeros(1, 3, size, size, dtype=dtype), target)  # warm-up
    for victim in tqdm(names or al.victims(), desc=f"{name}, {attack}", leave=False):
        pixels = al.load_victim(victim, size, dtype=dtype)[None]
        update = al.client_update(model, anatomy.preprocessing.to_input(pixels), target)
        gradient_seconds = update.seconds or 0.0
        for label, options in (variants or {attack: {}}).items():
            common = (section, name, label, precision, seed, victim)
            try:
                result = al.invert(model, update, attack=attack, **options)
            except al.AttackNotApplicable as refusal:
                yield Row(*common, None, None, None, None, None, gradient_seconds, f"refused: {refusal.reason}")
                return  # a condition on shapes: the same for every victim
            truth = pixels[0].double()
            yield Row(
                *common, al.psnr(result.pixels[0], truth), result.predicted_psnr,
                al.ssim(result.pixels[0], truth), result.exact, result.seconds, gradient_seconds,
                "" if result.exact else result.reason,
            )  # fmt: skip


def frozen(model: nn.Module) -> nn.Module:
    """Freeze the position embedding: its gradient is not shared any more."""
    position = al.dissect(model).position
    dict(model.named_parameters())[position or ""].requires_grad_(False)
    return model


def sections(quick: bool) -> Iterator[Row]:
    """All measurements in the order of the table."""
    names = al.victims()[:2] if quick else None
    vit = torchvision_model("vit_b_16")
    yield from measure("ViT-B/16, learned", "torchvision vit_b_16", vit, "embedding", names=names)
    yield from measure("ViT-B/16, frozen", "torchvision vit_b_16", frozen(vit), "span", names=names)
    del vit
    builders: dict[str, Callable[[], nn.Module]] = {
        f"timm {name}": (lambda name=name: timm_model(name))  # type: ignore[misc]
        for name in ("vit_small_patch16_224", "vit_base_patch16_224", "deit_tiny_patch16_224")
    }
    builders["transformers ViT (base)"] = transformers_model
    for name, build in builders.items():
        model = build()
        yield from measure("other libraries", name, model, "embedding", names=names)
        yield from measure("other libraries", name, frozen(model), "span", names=names)
        del model
    small = {"image_size": 32, "patch_size": 4, "width": 384, "depth": 4, "heads": 6, "classes": 10, "block": "april"}
    for dtype in (torch.float64, torch.float32):
        for seed in range(1 if quick else 3):
            model = al.VisionTransformer(**small, seed=seed).to(dtype)  # type: ignore[arg-type]
            yield from measure("A, 32×32", "A 32/4 d=384", model, "april", seed, names, APRIL)
    for seed in range(1 if quick else 3):
        model = al.VisionTransformer(block="april", seed=seed)
        yield from measure("A, 224×224", "A 224/16 d=768", model, "april", seed, names, APRIL)


APRIL: dict[str, dict[str, object]] = {
    "april, plain": {"regularization": "none"},
    "april, damped": {},
    "april, damped, both systems": {"systems": "both"},
}


def growth(name: str) -> None:
    """One line for one torchvision model: parameters, seconds, peak memory; runs in a process of its own."""
    model = torchvision_model(name)
    rows = list(measure("growth", name, model, "embedding", names=["astronaut", "chelsea", "coffee"]))
    count = sum(p.numel() for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    attack = statistics.median(row.attack_seconds or 0.0 for row in rows)
    gradient = statistics.median(row.gradient_seconds for row in rows)
    worst = min(row.psnr or 0.0 for row in rows)
    print(f"{name},{count},{gradient:.3f},{attack:.3f},{attack / gradient:.3f},{worst:.1f},{peak:.2f}")


def summary(rows: list[Row]) -> str:
    """The Markdown table: one line for each section, model, attack and precision."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.section, row.model, row.attack, row.precision), []).append(row)
    lines = [
        "| setting | model | attack | precision | runs | median dB | least dB | exact | attack s | gradient s | "
        "ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    refused = []
    for key, group in groups.items():
        done = [row for row in group if row.psnr is not None]
        if not done:
            refused.append(f"- {key[1]}, {key[2]}: {group[0].note}")
            lines.append(f"| {' | '.join(key)} | 0 | refused | – | – | – | {group[0].gradient_seconds:.2f} | – |")
            continue
        psnr = [row.psnr for row in done if row.psnr is not None]
        attack = statistics.median(row.attack_seconds or 0.0 for row in done)
        gradient = statistics.median(row.gradient_seconds for row in done)
        ratio = statistics.median((row.attack_seconds or 0.0) / row.gradient_seconds for row in done)
        lines.append(
            f"| {' | '.join(key)} | {len(done)} | {statistics.median(psnr):.1f} | {min(psnr):.1f} | "
            f"{sum(bool(row.exact) for row in done)} of {len(done)} | {attack:.3f} | {gradient:.2f} | {ratio:.3f} |"
        )
    if refused:
        lines += ["", "Refused, and why:", "", *refused]
    return "\n".join(lines)


def provenance() -> str:
    import torchvision

    return (
        f"aprillab {al.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} thread(s). Victims: all "
        f"{len(al.victims())} photographs of data/victims, label 3, weights random. Made by "
        "`python -m studies.closed_forms`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two victims and one seed, written nowhere")
    parser.add_argument("--growth", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.growth:
        growth(arguments.growth)
        return
    rows = list(tqdm(sections(arguments.quick), desc="rows"))
    table = summary(rows)
    print(table)
    if arguments.quick:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "closed_forms.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in asdict(row).items()}
            for row in rows
        )
    head = "model,parameters,gradient_seconds,attack_seconds,ratio,least_psnr,peak_memory_gib"
    lines = [head]
    for name in ("vit_b_16", "vit_l_16", "vit_h_14"):
        command = [sys.executable, "-m", "studies.closed_forms", "--growth", name]
        lines.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    (RESULTS / "growth.csv").write_text("\n".join(lines) + "\n")
    grown = "\n".join("| " + " | ".join(line.split(",")) + " |" for line in lines[1:])
    (RESULTS / "closed_forms.md").write_text(
        f"# The closed forms, measured\n\n{provenance()}\n\n{table}\n\n"
        f"## Growth of the patch-embedding attack\n\n| {' | '.join(head.split(','))} |\n|{'---|' * 7}\n{grown}\n"
    )


if __name__ == "__main__":
    main()
