"""What comes back: class fishing of batches and sums, under noise; features, imprint,
LoRA, silenced clients.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import aprillab as al

from .._rows import fill, made
from .._rows import read as rows_of
from .._runner import Description, between
from .._tables import grouped, markdown
from . import large, one_picture
from .clients import (
    SMALL,
    batch_of,
    best_psnr,
    changed,
    crops,
    digits,
    loaded,
    model_of,
    of_one,
    of_two,
    read,
    summed,
    update_of,
)  # fmt: skip
from .records import CHANGES, CLIENTS, FILE, OF_EACH, SUM, TWO, Case, Row

SMALL_ONES = ("random", "digits", "pieces")
SHARP, THERE = 90.0, 30.0  # dB
ADAPTERS = ((8, 256, 4, "query value"), (8, 256, 8, "query value"), (4, 384, 32, "query key value"))


def cases(quick: bool, with_large: bool) -> Iterator[Case]:
    victims = range(1 if quick else 8)
    batches, strengths = ((8,), (20.0,)) if quick else ((8, 32, 64), (2.0, 5.0, 10.0, 15.0, 20.0, 40.0))
    for model in SMALL_ONES[: 2 if quick else 3]:
        kinds = ("distinct", "repeated") if model == "random" else ("repeated",)
        yield from (
            Case("class", model, kind, strength, batch, victim)
            for kind in kinds for batch in batches for strength in strengths for victim in victims
        )  # fmt: skip
        yield from (Case("alone", model, "alone", 20.0, 1, v) for v in victims)
        yield from (Case("two", model, TWO, 20.0, 8, v) for v in victims)
        if not quick:
            yield from (Case("sum", model, SUM, s, CLIENTS * OF_EACH, v) for s in (10.0, 20.0, 40.0) for v in victims)
        if model == "pieces":
            continue
        yield from (Case("changes", model, change, 20.0, 8, v) for change in CHANGES for v in victims)
        yield from (Case("silenced", model, "2 of 3", 0.0, 17, v) for v in list(victims)[:4])
    for seed in list(victims)[:3]:
        yield from (Case("features", "random", "one class", 1e4, b, seed) for b in batches)
        yield from (
            Case("imprint", "random", f"width {w}", 0.0, 64, seed) for w in ((256,) if quick else (192, 256, 384))
        )
        yield from (Case("LoRA", "random", _lora(a), 1.0, 1, seed) for a in (ADAPTERS[1:2] if quick else ADAPTERS))
    if with_large:
        yield from large.cases()


def _lora(adapters: tuple[int, int, int, str]) -> str:
    patch, width, rank, targets = adapters
    return f"patch {patch}, width {width}, rank {rank} on {targets}"


# --- Measuring ----------------------------------------------------------------------------------------------------


def measured(case: Case) -> Iterator[Row]:
    if case.model == large.MODEL:
        yield from large.measured(case)
    elif case.part == "two":
        yield from of_pair(case)
    else:
        yield Row(*case, **MEASURES[case.part](case))


def fished(case: Case, batch: int) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """The sent model, and a batch in which the wanted picture is in place ``victim``."""
    model = model_of(case.model)
    images, labels, c = batch_of(case.model, batch, case.victim, kind_of(case), case.victim)
    return loaded(model, al.dishonest.class_fishing(model, c, strength=case.strength)), images, labels


def kind_of(case: Case) -> str:
    return "distinct" if case.setting == "distinct" else "repeated"


def of_class(case: Case) -> dict[str, Any]:
    sent, images, labels = fished(case, case.batch)
    return of_one(sent, update_of(sent, images, labels), images[case.victim])


def of_itself(case: Case) -> dict[str, Any]:
    """The picture of a batch of eight in a batch of one."""
    sent, images, labels = fished(case, OF_EACH)
    own = slice(case.victim, case.victim + 1)
    return of_one(sent, update_of(sent, images[own], labels[own]), images[case.victim])


def of_changes(case: Case) -> dict[str, Any]:
    sent, images, labels = fished(case, case.batch)
    update, known = changed(update_of(sent, images, labels), case.setting, case.victim)
    return of_one(sent, update, images[case.victim], **known)


def of_pair(case: Case) -> Iterator[Row]:
    """Another picture of the batch has the wanted class, too."""
    sent, images, labels = fished(case, case.batch)
    second = (case.victim + 1) % case.batch
    labels[second] = labels[case.victim]
    if case.model == "digits":
        own, given = digits("test")
        images[second] = own[given == labels[second]][case.victim + 10]
    yield from of_two(case, sent, update_of(sent, images, labels), images[[case.victim, second]])


def of_sum(case: Case) -> dict[str, Any]:
    return of_one(*sum_of(case, CLIENTS))


def sum_of(case: Case, clients: int) -> tuple[torch.nn.Module, al.ClientUpdate, Tensor]:
    """Sent model, sum and wanted picture, which is the first client's; the class is nobody else's."""
    sent, images, labels = fished(case, OF_EACH)
    c = int(labels[case.victim])

    def updates() -> Iterator[al.ClientUpdate]:
        for client in range(clients):
            x, y, _ = batch_of(case.model, OF_EACH, case.victim, "repeated", case.victim, client)
            yield update_of(sent, *((x, y) if client == 0 else _without(x, y, c)))

    return sent, summed(updates()), images[case.victim]


def _without(images: Tensor, labels: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """The same number of images, none of the class."""
    kept = (labels != c).nonzero().flatten()
    kept = torch.cat([kept, kept[: len(labels) - len(kept)]])
    return images[kept], labels[kept]


def of_silenced(case: Case) -> dict[str, Any]:
    """Three clients: one with one picture and the honest model, two with eight and a silenced one."""
    model = model_of(case.model)
    images, labels, _ = batch_of(case.model, case.batch, case.victim, "repeated", case.victim)
    quiet = loaded(model, al.dishonest.silenced(model))
    parts = [(model, slice(0, 1)), (quiet, slice(1, 9)), (quiet, slice(9, 17))]
    total = summed(update_of(sent, images[rows], labels[rows]) for sent, rows in parts)
    return of_one(model, total, images[0])


def of_features(case: Case) -> dict[str, Any]:
    model = model_of(case.model)
    pixels = crops(case.batch, 32, case.victim)
    images, labels, asked = al.HALF.to_input(pixels), torch.full((case.batch,), 3), []
    sent = loaded(model, model.state_dict())

    def ask(state: Mapping[str, Tensor]) -> al.ClientUpdate:
        asked.append(1)
        sent.load_state_dict(state)
        return update_of(sent, images, labels)

    bins = al.dishonest.bisect_features(model, ask, case.batch, rounds=6 * case.batch, strength=case.strength)
    alone = [read(model, found.update, preprocessing=al.HALF).pixels[0] for found in bins if found.count == 1]
    return _of_batch(alone, pixels, told=len(alone)) | {"rounds": len(asked)}


def of_imprint(case: Case) -> dict[str, Any]:
    width = int(case.setting.split()[1])
    model = al.VisionTransformer(**SMALL | {"width": width}, classes=100, seed=0).eval()
    pixels = crops(case.batch, 32, case.victim)
    known = al.HALF.to_input(crops(400, 32, 99, public=True)).mean((1, 2, 3))
    sent = loaded(model, al.dishonest.imprint(model, brightness=known))
    update = update_of(sent, al.HALF.to_input(pixels), torch.arange(case.batch))
    found = al.dishonest.read_imprint(model, update, preprocessing=al.HALF)
    return _of_batch([one.pixels for one in found], pixels, told=sum(one.alone for one in found))


def of_lora(case: Case) -> dict[str, Any]:
    import peft

    patch, width, rank, targets = next(a for a in ADAPTERS if _lora(a) == case.setting)
    base = al.VisionTransformer(**SMALL | {"patch_size": patch, "width": width}, classes=100, seed=0)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets.split(), modules_to_save=["head"])
    model = peft.get_peft_model(base, config).eval()
    pixels = crops(1, 32, case.victim)
    needed = math.ceil((32 // patch) ** 2 / (rank * len(targets.split())))
    rounds = []
    for number in range(needed):
        state = al.dishonest.lora_spanning(model, seed=number)
        model.load_state_dict(state)
        rounds.append(al.Round(state, al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))))
    result = al.span_closed_form(model, rounds, preprocessing=al.HALF, verify=False)
    return {"psnr": float(al.psnr(result.pixels[0], pixels[0])), "predicted": result.predicted_psnr, "rounds": needed}


def _of_batch(found: list[Tensor], pixels: Tensor, told: int) -> dict[str, Any]:
    best = best_psnr(found, pixels)
    there = best[best >= THERE]
    median = float(there.median()) if len(there) else None
    return {"psnr": median, "there": len(there), "sharp": int((best >= SHARP).sum()), "told": told}


MEASURES = {
    "class": of_class, "alone": of_itself, "changes": of_changes, "sum": of_sum, "silenced": of_silenced,
    "features": of_features, "imprint": of_imprint, "LoRA": of_lora,
}  # fmt: skip


def measure(folder: Path, options: argparse.Namespace) -> None:
    found = cases(options.quick, options.large)
    fill(
        folder / FILE, Row, found, measured, key=Case._fields, workers=options.workers, together=large.sharing_others
    )  # fmt: skip


# --- Its share of the page ----------------------------------------------------------------------------------------


def _of_batches(group: pd.DataFrame) -> dict[str, str]:
    def span(values: pd.Series) -> str:
        return " to ".join(dict.fromkeys(f"{v:.0f}" for v in (values.min(), values.max())))

    return {
        "batches": str(len(group)), "rounds": span(group.rounds), "at 30 dB": span(group.there),
        "at 90 dB": span(group.sharp), "told alone": span(group.told), "median dB": f"{group.psnr.median():.1f}",
    }  # fmt: skip


def _of_lora(group: pd.DataFrame) -> dict[str, str]:
    return {
        "rounds": f"{group.rounds.max()}", "median dB": f"{group.psnr.median():.1f}",
        "least": f"{group.psnr.min():.1f}", "most": f"{group.psnr.max():.1f}",
    }  # fmt: skip


def describe(folder: Path, options: argparse.Namespace) -> Description:
    rows = rows_of(folder / FILE, Row)
    parts = dict(iter(rows.groupby("part", sort=False)))
    fields, claims = one_picture.describe(rows)
    fields = {
        **fields, "pictures_made": made(folder / FILE),
        "features": markdown(grouped(parts["features"], ("setting", "batch"), _of_batches)),
        "imprint": markdown(grouped(parts["imprint"], ("setting", "batch"), _of_batches)),
        "lora": markdown(grouped(parts["LoRA"], ("setting",), _of_lora)),
        "silenced": markdown(grouped(parts["silenced"], ("model", "setting"), one_picture.of_pictures)),
    }  # fmt: skip
    imprinted = parts["imprint"]
    wide = imprinted[imprinted.setting == "width 384"] if (imprinted.setting == "width 384").any() else imprinted
    return fields, [
        *claims,
        between("nearly all of a batch", (parts["features"].there / parts["features"].batch).min(), 0.9),
        between("at least 15 of 64 at width 384", wide.there.min(), 14.5),
        between("one round is enough", parts["LoRA"][parts["LoRA"].rounds == 1].psnr.min(), 60),
        between("at least 60 dB, exactly", parts["silenced"].psnr.min(), 60),
    ]
