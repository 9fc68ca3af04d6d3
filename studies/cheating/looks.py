"""What a client sees: scores of honest models and of sent ones, and the attacker who knows the
check.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torchvision
from torch import Tensor, nn

import aprillab as al
from aprillab.dishonest.features import difference
from aprillab.training import train
from aprillab.zoo import build_model

from .._rows import fill, made
from .._rows import read as rows_of
from .._runner import Description, between
from .._tables import grouped, markdown
from .clients import SMALL, batch_of, best_psnr, crops, digits, loaded, model_of, read, trained_digits, update_of

FILE = "cheating_looks.csv"
SCORES = ("head rows", "head directions", "class offset", "class gradients", "layer directions", "adapters", "jump",
          "still body", "isolation")  # fmt: skip
OFFSET = 2.9  # nats, below the limit of the look at offsets
EPOCH = 0.1  # by how much of itself an epoch at a rate of 1e-3 moves a layer
TIMM = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "beit_base_patch16_224")


class Case(NamedTuple):
    kind: str  # honest, sent, race, two rounds
    model: str
    change: str
    strength: float
    seed: int


@dataclass(frozen=True)
class Row:
    """Scores of one inspection; ``seen`` names the suspicious ones. ``psnr`` of the wanted
    picture in a race.
    """

    kind: str
    model: str
    change: str
    strength: float
    seed: int
    seen: str
    by_weights: bool
    head_rows: float | None = None
    head_directions: float | None = None
    class_offset: float | None = None
    class_gradients: float | None = None
    layer_directions: float | None = None
    adapters: float | None = None
    jump: float | None = None
    still_body: float | None = None
    isolation: float | None = None
    psnr: float | None = None


def cases(quick: bool) -> Iterator[Case]:
    seeds = range(1 if quick else 5)
    for model in ("random", "ten classes", "two classes", "april", "no bias", "zero head", "LoRA"):
        yield from (Case("honest", model, "initialization", 0.0, seed) for seed in seeds)
    yield from () if quick else (Case("honest", f"timm:{name}", "initialization", 0.0, 0) for name in TIMM)
    for change in ("1 epoch",) if quick else ("1 epoch", "4 epochs", "10 epochs", "fine-tuned head", "small rate"):
        yield from (Case("honest", "digits", change, 0.0, seed) for seed in range(1 if quick else 20))
    for model in ("random", "digits") if quick else ("random", "ten classes", "two classes", "no bias", "digits"):
        strengths = (20.0,) if quick else (0.1, 1.0, 3.0, 5.0, 10.0, 20.0)
        yield from (Case("sent", model, "class fishing", s, seed) for s in strengths for seed in seeds)
        yield from (Case("sent", model, "feature fishing", s, seed) for s in (1e2, 1e4) for seed in seeds)
        yield from (Case("sent", model, "silenced", 0.0, seed) for seed in seeds)
        yield from (Case("sent", model, "imprint", 0.0, seed) for seed in seeds)
    yield from (Case("sent", "LoRA", "spanning", s, seed) for s in (1.0, 1e-3) for seed in seeds)
    for change in ("bias", "scaled by 3, bias", "scaled by 10, bias"):
        offsets = (2.9,) if quick else (0.0, 1.0, 2.0, 2.9, 5.0, 10.0)
        yield from (Case("race", "digits", change, s, seed) for s in offsets for seed in range(1 if quick else 10))
    for change in ("scaled by 1, bias", "scaled by 1.6, bias"):
        moves = (0.0, EPOCH) if quick else (0.0, 1e-4, 1e-3, 1e-2, EPOCH)
        yield from (Case("two rounds", "digits", change, m, seed) for m in moves for seed in range(1 if quick else 8))


# --- Models -------------------------------------------------------------------------------------------------------


def _small(**changes: Any) -> Callable[[int], nn.Module]:
    return lambda seed: al.VisionTransformer(**{**SMALL, "classes": 100, **changes}, seed=seed).eval()


def _zero_head(seed: int) -> nn.Module:
    """torchvision's own initialization."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torchvision.models.VisionTransformer(32, 8, 2, 4, 192, 768, num_classes=100).eval()


def _adapted(seed: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["head"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(_small()(seed), config).eval()


BUILT: dict[str, Callable[[int], nn.Module]] = {
    "random": _small(), "ten classes": _small(classes=10), "two classes": _small(classes=2),
    "april": _small(block="april"), "no bias": _small(bias=False), "zero head": _zero_head, "LoRA": _adapted,
    "digits": lambda seed: trained_digits(),
}  # fmt: skip


def built(case: Case) -> nn.Module:
    if case.model in BUILT:
        return BUILT[case.model](case.seed)
    return build_model(case.model, classes=100, seed=case.seed)


def honest(case: Case) -> tuple[nn.Module, nn.Module | None]:
    """The model, and the one of the round before."""
    if case.model != "digits":
        return built(case), None
    if case.change.endswith(("epoch", "epochs")):
        epochs = int(case.change.split()[0])
        before = {1: al.VisionTransformer(**SMALL, channels=1, classes=10, seed=0).eval(), 4: trained_digits(1)}
        return trained_digits(epochs), before.get(epochs, trained_digits(4))
    before = loaded(trained_digits(1), trained_digits(1).state_dict())
    rate = 1e-5 if case.change == "small rate" else 1e-3
    if case.change == "fine-tuned head":
        with torch.no_grad():
            before.head.weight.zero_(), before.head.bias.zero_()  # type: ignore[union-attr,operator]
        for name, parameter in before.named_parameters():
            parameter.requires_grad_(name.startswith("head"))
    after, (images, labels) = loaded(before, before.state_dict()), digits("train")
    train(after, images[:1000], labels[:1000], epochs=1, lr=rate, seed=case.seed, progress=False)
    return after, before


def sent(case: Case, model: nn.Module) -> nn.Module:
    al_d, s = al.dishonest, case.strength
    if case.change == "class fishing":
        return loaded(model, al_d.class_fishing(model, 1, strength=s))
    if case.change == "feature fishing":
        return loaded(model, al_d.feature_fishing(model, 1, threshold=0.0, strength=s))
    if case.change == "imprint":
        return loaded(model, al_d.imprint(model))
    if case.change == "spanning":
        return loaded(model, al_d.lora_spanning(model, seed=case.seed, size=s))
    return loaded(model, al_d.silenced(model))


def planted(model: nn.Module, label: int, change: str, offset: float) -> nn.Module:
    """A head that looks trained, since it is: all rows by one factor, and one class less
    probable than it was.

    What other images pass is 1 − p of classes that the model is sure of, the surer by the factor.
    """
    found = loaded(model, model.state_dict())
    factor = float(change.split()[2].rstrip(",")) if change.startswith("scaled") else 1.0
    with torch.no_grad():
        found.head.weight.mul_(factor)  # type: ignore[union-attr,operator]
        found.head.bias.mul_(factor)  # type: ignore[union-attr,operator]
        found.head.bias[label] -= offset  # type: ignore[index,operator]
    return found


# --- Measuring ----------------------------------------------------------------------------------------------------


def measured(case: Case) -> Iterator[Row]:
    if case.kind in ("race", "two rounds"):
        yield raced(case) if case.kind == "race" else asked_twice(case)
        return
    model, previous = honest(case) if case.kind == "honest" else (built(case), built(case))
    if case.kind == "sent":
        model = sent(case, model)
    images, labels = batch_for(model, case)
    yield _row(case, al.inspect_model(model, previous, images=images, labels=labels))


def batch_for(model: nn.Module, case: Case) -> tuple[Tensor, Tensor]:
    """Eight pictures of the client's."""
    if case.model == "digits":
        images, labels = digits("test")
        rows = slice(8 * case.seed, 8 * case.seed + 8)
        return images[rows], labels[rows]
    anatomy = al.dissect(model)
    images = anatomy.preprocessing.to_input(crops(8, anatomy.image_size[0], case.seed))
    return images, torch.arange(8) % (2 if case.model == "two classes" else 8)


def raced(case: Case) -> Row:
    """The wanted digit among eight test digits; scores and what comes back."""
    model = model_of("digits")
    images, labels, c = batch_of("digits", 8, case.seed, "repeated", case.seed % 8)
    found = planted(model, c, case.change, case.strength)
    seen = al.inspect_model(found, images=images, labels=labels)
    result = read(found, update_of(found, images, labels), preprocessing=al.HALF)
    pixels = al.HALF.to_pixels(images).to(result.pixels)
    # The attacker gets whichever image stands out.
    psnr = max(float(al.psnr(result.pixels[0], p)) for p in pixels)
    return _row(case, seen, psnr=psnr)


def asked_twice(case: Case) -> Row:
    """The best that a difference of two rounds gives, of those rounds that every other look lets
    pass.

    The first round's head is the trained one by a factor, an honest epoch after the trained one.
    The second's has one class less or more probable by ``OFFSET`` nats, and each layer of its body
    moved by a relative ``strength``, at random. The server tries each class both ways.
    """
    model = model_of("digits")
    images, labels = batch_for(model, case)
    first, before = planted(model, 0, case.change, 0.0), _moved(model, EPOCH, seed=10)
    seen = al.inspect_model(first, before, images=images, labels=labels)
    answer, best = update_of(first, images, labels), _row(case, seen)
    if seen.suspicious:
        return best
    pixels = al.HALF.to_pixels(images)
    for c, offset in itertools.product(range(10), (OFFSET, -OFFSET)):
        second = _moved(planted(first, c, "bias", offset), case.strength, seed=c)
        seen = al.inspect_model(second, first, images=images, labels=labels)
        found = read(first, difference(update_of(second, images, labels), answer), preprocessing=al.HALF)
        psnr = float(best_psnr([found.pixels[0]], pixels).max())
        others = {f.name for f in seen.findings if f.suspicious} - {"still body"}
        if not others and psnr > (best.psnr or 0.0):
            best = _row(case, seen, psnr=psnr)
    return best


@torch.no_grad()
def _moved(model: nn.Module, size: float, seed: int) -> nn.Module:
    """A copy with everything below the head moved by so much of its r.m.s."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith("head"):
            rms = parameter.square().mean().sqrt()
            parameter.add_(size * rms * torch.randn(parameter.shape, generator=generator))
    return model


def _row(case: Case, seen: al.Inspection, **more: Any) -> Row:
    scores = {finding.name.replace(" ", "_"): finding.score for finding in seen.findings}
    names = [finding.name for finding in seen.findings if finding.suspicious]
    by_weights = any(name not in ("jump", "still body", "isolation") for name in names)
    return Row(*case, seen=", ".join(names), by_weights=by_weights, **scores, **more)


def measure(folder: Path, options: argparse.Namespace) -> None:
    fill(folder / FILE, Row, cases(options.quick), measured, key=Case._fields, workers=options.workers)


# --- Its share of the page ----------------------------------------------------------------------------------------


def _columns() -> list[str]:
    return [name.replace(" ", "_") for name in SCORES]


def _largest(group: pd.DataFrame) -> dict[str, str | None]:
    """The largest score of each look, and how many models were suspicious."""
    seen = {"suspicious": f"{group.seen.fillna('').ne('').sum()} of {len(group)}"}
    return seen | {name: _number(group[name.replace(" ", "_")].max()) for name in SCORES}


def _detected(group: pd.DataFrame) -> dict[str, str]:
    of = len(group)
    return {
        "by the weights alone": f"{group.by_weights.eq(True).sum()} of {of}",
        "by a still body": f"{group.seen.fillna('').str.contains('still body').sum()} of {of}",
        "by the jump": f"{group.seen.fillna('').str.contains('jump').sum()} of {of}",
        "by its own batch": f"{group.seen.fillna('').str.contains('isolation').sum()} of {of}",
    }


def _number(value: float) -> str | None:
    return None if pd.isna(value) else f"{value:.2g}"


def _raced(group: pd.DataFrame) -> dict[str, str]:
    of = len(group)
    return {
        "by the weights alone": f"{group.by_weights.eq(True).sum()} of {of}",
        "by its own batch": f"{group.seen.fillna('').str.contains('isolation').sum()} of {of}",
        "median dB": f"{group.psnr.median():.1f}", "most dB": f"{group.psnr.max():.1f}",
        "median isolation": f"{group.isolation.median():.2g}",
    }  # fmt: skip


def _twice(group: pd.DataFrame) -> dict[str, str]:
    played = group[group.psnr.notna()]
    seen = played.seen.fillna("").str.contains("still body").sum()
    return {
        "batches": f"{len(played)} of {len(group)}", "median dB": f"{played.psnr.median():.1f}",
        "most dB": f"{played.psnr.max():.1f}", "at 30 dB": f"{(played.psnr >= 30).sum()}",
        "seen by a still body": f"{seen} of {len(played)}", "its score": f"{played.still_body.median():.3g}",
    }  # fmt: skip


def describe(folder: Path, options: argparse.Namespace) -> Description:
    rows = rows_of(folder / FILE, Row)
    kinds = dict(iter(rows.groupby("kind", sort=False)))
    honest_ones, sent_ones, race = kinds["honest"], kinds["sent"], kinds["race"]
    quiet = race[~race.seen.fillna("").str.contains("isolation")]
    loud = race[race.seen.fillna("").str.contains("isolation")]
    twice = kinds["two rounds"]
    still = twice[twice.strength == 0]
    plain = race[(race.change == "bias") & (race.strength == race.strength.min())]
    fished = sent_ones[sent_ones.change.isin(["class fishing", "feature fishing", "imprint"])]
    bare = honest_ones[honest_ones.by_weights.eq(True)]
    fields = {
        "looks_made": made(folder / FILE),
        "honest": markdown(grouped(honest_ones, ("model", "change"), _largest)),
        "sent": markdown(grouped(sent_ones, ("change", "strength"), _detected)),
        "twice": markdown(grouped(twice, ("change", "strength"), _twice)),
        "race": markdown(grouped(race, ("change", "strength"), _raced)),
        "honest_count": len(honest_ones), "false_alarms": honest_ones.seen.fillna("").ne("").sum(),
        "quiet_median": quiet.psnr.median(), "quiet_most": quiet.psnr.max(),
        "loud_median": loud.psnr.median(), "loud_most": loud.psnr.max(), "honest_most": plain.psnr.max(),
        "honest_loud": plain.seen.fillna("").str.contains("isolation").sum(), "honest_races": len(plain),
    }  # fmt: skip
    return fields, [
        between("No honest model's weights were suspicious", len(bare), most=0.5),
        between("every fished or imprinted model was", fished.by_weights.eq(True).mean(), 0.999),
        between("the difference can be one digit's", still.psnr.max(), 40),
        between("a body that moves spoils the difference", twice[twice.strength >= 1e-2].psnr.max(), most=30),
    ]
