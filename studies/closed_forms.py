"""Measure the closed forms: `python -m studies.closed_forms` writes closed_forms.csv, .md, growth.csv
and closed_forms_memory.csv.

Random weights, a head that is not zero, one image, label 3; float32 gradients unless a row says so,
float64 solves. PSNR on pixels clamped to [0, 1]. Attack and gradient are timed on the same machine
in the same run, after one warm-up gradient; a ratio of the two means more than either.

A new column is a field of :class:`Row` (or :class:`Growth`), its value in :func:`attacked` (or
:func:`grown`), and, if the page shows it, an entry in :func:`summary`. The CSV has other columns
then and is to be removed before the next run.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.attacks.closed_forms import span

from ._rows import fill, made, read
from ._runner import Claim, Description, between, run_study, study_parser
from ._tables import formatted, grouped, markdown

LABEL = 3
# The position embedding's gradient is not needed by the span attack, so its models have the
# embedding frozen.
FROZEN = ("span",)
TIMM = ("vit_small_patch16_224", "vit_base_patch16_224", "deit_tiny_patch16_224")
OTHERS = (*(f"timm {name}" for name in TIMM), "transformers ViT (base)")
OURS: dict[str, dict[str, Any]] = {
    "A 32/4 d=384": {"image_size": 32, "patch_size": 4, "width": 384, "depth": 4, "heads": 6, "classes": 10},
    "A 224/16 d=768": {},
}


@dataclass(frozen=True)
class Row:
    section: str
    model: str
    attack: str
    precision: str
    seed: int
    victim: str
    psnr: float | None = None
    predicted_psnr: float | None = None
    ssim: float | None = None
    exact: bool | None = None
    attack_seconds: float | None = None
    replay_seconds: float | None = None  # of the check, which the attack's leave out
    gradient_seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Growth:
    """One of torchvision's models: median seconds of three photographs, least PSNR in dB."""

    model: str
    parameters: int
    gradient_seconds: float
    attack_seconds: float
    ratio: float
    least_psnr: float
    peak_memory_gib: float


@dataclass(frozen=True)
class Memory:
    """What one attack on ViT-B/16 takes at its peak beside the model and the update, in MiB: by itself, and with
    the check, which plays the client.
    """

    attack: str
    model_mib: float
    update_mib: float
    beyond_mib: float
    checked_mib: float


# --- Models -------------------------------------------------------------------------------------------------------


def build(name: str, seed: int) -> nn.Module:
    """A model by its name; a library's has the weights of seed 0 and a head of deviation 0.02."""
    if name in OURS:
        return al.VisionTransformer(**OURS[name], block="april", seed=seed)
    library, _, kind = name.partition(" ")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if library == "torchvision":
            import torchvision

            model = torchvision.models.get_model(kind)
        elif library == "timm":
            import timm

            model = timm.create_model(kind)
        else:
            import transformers

            model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))
        model = model.eval()
        nn.init.normal_(dict(model.named_parameters())[al.dissect(model).head_weight or ""], std=0.02)
    return model


@functools.lru_cache(maxsize=1)
def ready(name: str, precision: str, seed: int, frozen: bool) -> nn.Module:
    """A model after a warm-up gradient, and whether its position embedding's is withheld."""
    model = build(name, seed).to(getattr(torch, precision))
    anatomy = al.dissect(model)
    images = torch.zeros(1, 3, *anatomy.image_size, dtype=getattr(torch, precision))
    al.client_update(model, images, torch.tensor([LABEL]))
    return al.defenses.freeze_position(model) if frozen else model


# --- Measurement --------------------------------------------------------------------------------------------------


# What :func:`aprillab.invert` is given besides the attack's name, by the name in the table.
VARIANTS: dict[str, dict[str, Any]] = {
    "april, plain": {"regularization": "none"},
    "april, damped": {},
    "april, damped, both systems": {"systems": "both"},
}


class Case(NamedTuple):
    """A row's values in the columns that tell rows apart."""

    section: str
    model: str
    attack: str
    precision: str
    seed: int
    victim: str


def cases(quick: bool) -> Iterator[Case]:
    """All cases in the order of the table; those of one update follow each other."""
    victims, seeds = (al.victims()[:2], range(1)) if quick else (al.victims(), range(3))
    for section, attack in (("ViT-B/16, learned", "embedding"), ("ViT-B/16, frozen", "span")):
        yield from (Case(section, "torchvision vit_b_16", attack, "float32", 0, victim) for victim in victims)
    for name, attack, victim in itertools.product(OTHERS, ("embedding", "span"), victims):
        yield Case("other libraries", name, attack, "float32", 0, victim)
    small, large = OURS
    for precision, seed, victim, attack in itertools.product(("float64", "float32"), seeds, victims, VARIANTS):
        yield Case("A, 32×32", small, attack, precision, seed, victim)
    for seed, victim, attack in itertools.product(seeds, victims, VARIANTS):
        yield Case("A, 224×224", large, attack, "float32", seed, victim)


Shared = tuple[nn.Module, al.ClientUpdate, Tensor]


@functools.lru_cache(maxsize=1)
def shared(name: str, precision: str, seed: int, frozen: bool, victim: str) -> Shared:
    """A model, a client's update, and its private pixels (1, C, H, W)."""
    model = ready(name, precision, seed, frozen)
    anatomy = al.dissect(model)
    pixels = al.load_victim(victim, anatomy.image_size[0], dtype=getattr(torch, precision))[None]
    update = al.client_update(model, anatomy.preprocessing.to_input(pixels), torch.tensor([LABEL]))
    return model, update, pixels.double()


def attacked(case: Case) -> Iterator[Row]:
    frozen = case.attack in FROZEN
    model, update, pixels = shared(case.model, case.precision, case.seed, frozen, case.victim)
    gradient_seconds = update.seconds or 0.0
    try:
        found = al.invert(model, update, attack=case.attack.partition(",")[0], **VARIANTS.get(case.attack, {}))
    except al.AttackNotApplicable as refusal:
        yield Row(*case, gradient_seconds=gradient_seconds, note=f"refused: {refusal.reason}")
        return
    yield Row(
        *case, gradient_seconds=gradient_seconds, psnr=float(al.psnr(found.pixels[0], pixels[0])),
        predicted_psnr=found.predicted_psnr, ssim=float(al.ssim(found.pixels[0], pixels[0])), exact=found.exact,
        attack_seconds=found.seconds, replay_seconds=found.replay.seconds if found.replay else None,
        note="" if found.exact else found.reason,
    )  # fmt: skip


def grown(name: str) -> Growth:
    """The patch-embedding attack; for a process of its own, whose peak memory it takes."""
    cases = [Case("growth", f"torchvision {name}", "embedding", "float32", 0, victim) for victim in al.victims()[:3]]
    rows = [row for case in cases for row in attacked(case)]
    model = ready(cases[0].model, "float32", 0, False)
    attack = statistics.median(row.attack_seconds or 0.0 for row in rows)
    gradient = statistics.median(row.gradient_seconds for row in rows)
    return Growth(
        model=name, parameters=sum(p.numel() for p in model.parameters()),
        gradient_seconds=gradient, attack_seconds=attack, ratio=attack / gradient,
        least_psnr=min(row.psnr or 0.0 for row in rows),
        peak_memory_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # KiB on Linux
    )  # fmt: skip


def resident(field: str) -> float:
    """VmRSS, the memory of this process now, or VmHWM, its most since it was reset; in MiB. Linux."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def remembered(attack: str) -> Memory:
    """The peak of one attack on ViT-B/16, for a process of its own.

    The attack runs once before, so that what the libraries keep for themselves is there already; its
    workspace is part of the peak.
    """
    model, update, _ = shared("torchvision vit_b_16", "float32", 0, attack in FROZEN, "astronaut")
    sizes = [sum(t.nbytes for t in tensors) / 2**20 for tensors in (model.parameters(), update.gradients.values())]
    beyond = [
        _peak(functools.partial(al.invert, model, update, attack=attack, verify=verify)) for verify in (False, True)
    ]
    return Memory(attack, *sizes, *beyond)


def _peak(attack_it: Callable[[], Any]) -> float:
    """By how much resident memory grows at most, in MiB, at a second call."""
    attack_it()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is freed goes back to the system, so that it counts when taken
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    attack_it()
    return resident("VmHWM") - before


def elsewhere(option: str, record: type) -> Callable[[tuple[str]], list[Any]]:
    """Measure a case in a process of its own, which prints the record."""

    def measured(case: tuple[str]) -> list[Any]:
        command = [sys.executable, "-m", "studies.closed_forms", option, *case]
        return [record(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))]

    return measured


def measure(folder: Path, options: argparse.Namespace) -> None:
    fill(folder / "closed_forms.csv", Row, cases(options.quick), attacked, key=Case._fields)
    models = [] if options.quick else [("vit_b_16",), ("vit_l_16",), ("vit_h_14",)]
    fill(folder / "growth.csv", Growth, models, elsewhere("--growth", Growth), key=("model",))
    attacks = [] if options.quick else [("embedding",), ("span",)]
    fill(folder / "closed_forms_memory.csv", Memory, attacks, elsewhere("--memory", Memory), key=("attack",))


# --- The page -----------------------------------------------------------------------------------------------------


GROWTH = {
    "gradient_seconds": ".3f", "attack_seconds": ".3f", "ratio": ".3f", "least_psnr": ".1f", "peak_memory_gib": ".2f",
}  # fmt: skip


MEMORY = {"model_mib": ".0f", "update_mib": ".0f", "beyond_mib": ".0f", "checked_mib": ".0f"}


def ratio(rows: pd.DataFrame) -> float:
    """The median of what attacks take of their gradients' seconds; it is not the ratio of the medians."""
    return (rows.attack_seconds / rows.gradient_seconds).median()


def summary(group: pd.DataFrame) -> dict[str, str]:
    """The table's cells for one setting."""
    done = group[group.psnr.notna()]
    gradient = f"{group.gradient_seconds.median():.2f}"
    if done.empty:
        return {"runs": "0", "median dB": "refused", "gradient s": gradient}
    return {
        "runs": str(len(done)),
        "median dB": f"{done.psnr.median():.1f}",
        "least dB": f"{done.psnr.min():.1f}",
        "exact": f"{done.exact.eq(True).sum()} of {len(done)}",
        "attack s": f"{done.attack_seconds.median():.3f}",
        "replay s": f"{done.replay_seconds.median():.3f}",
        "gradient s": gradient,
        "ratio": f"{ratio(done):.3f}",
    }


def describe(folder: Path, options: argparse.Namespace) -> Description:
    path = folder / "closed_forms.csv"
    rows, growth = read(path, Row), read(folder / "growth.csv", Growth)
    memory = read(folder / "closed_forms_memory.csv", Memory)
    table = grouped(rows, ("section", "model", "attack", "precision"), summary)
    refused = rows[rows.psnr.isna()].drop_duplicates(["model", "attack"])
    embedding, span_attack = (ratio(rows[rows.section == f"ViT-B/16, {how}"]) for how in ("learned", "frozen"))
    fields = {
        "made": made(path),
        "victims": rows.victim.nunique(),
        "table": markdown(table.rename(columns={"section": "setting"})),
        "refused": "\n".join(f"- {row.model}, {row.attack}: {row.note}" for row in refused.itertuples()),
        "growth": markdown(formatted(growth, **GROWTH)),
        "memory": markdown(formatted(memory, **MEMORY)),
        "embedding": embedding,
        "span": span_attack,
    }
    return fields, [
        Claim("seven decibels more than an 8-bit rounding", span._MARGIN_DB, span._MARGIN_DB == 7),
        between("Neither takes 200 MiB", memory.beyond_mib.max(), most=200),
        between("less than 600", memory.checked_mib.max(), most=600),
        between("the patch-embedding attack takes at most 5 % of the client's gradient", embedding, most=0.05),
        between("the span attack at most half", span_attack, most=0.5),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser("closed_forms", __doc__, alone="seconds and memory are what it measures")
    parser.add_argument("--growth", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--memory", metavar="ATTACK", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for asked, measured in ((options.growth, grown), (options.memory, remembered)):
        if asked:
            print(json.dumps(asdict(measured(asked))))
            return
    run_study("closed_forms", options, measure=measure, describe=describe)


if __name__ == "__main__":
    main()
