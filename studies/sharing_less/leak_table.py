"""The leak map of standard models, each cell decided by the counts and confirmed by running it.

One photograph, FedSGD, random weights, a head that is not zero. Depth is in no count, so the models
have two blocks. Where the counts say one round, the attack runs on the tensors of that cell alone;
where they say several, the rounds are played and their systems stacked; where they say "no closed
form", all closed forms must refuse, and the span attack is asked for its best picture all the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.attacks.catalogue import ATTACKS
from aprillab.defenses import withhold
from aprillab.sharing.facts import Facts

from .._rows import fill
from .clients import play
from .models import BLOCKS, CLASSES, Standard, build, standard_models

RANK, VICTIM, LABEL = 8, "astronaut", 3
OTHERS = (("coffee", 17), ("chelsea", 42))  # the other clients, where rounds are played
#: Two factors A, as transformers' models have them. timm's qkv takes one of twice the
#: rank: as many rows.
LORA = f"LoRA of rank {RANK} on q, v"
#: Rows of the leak map that the table has, under the short names of its columns.
SHARED = {
    "all": "all", "position embedding withheld": "no position", "both embeddings frozen": "no embeddings",
    LORA: "LoRA", "last block and head": "last block", "head only": "head",
}  # fmt: skip
MOST_ROUNDS = 4  # played at the real geometry; more than that at a tiny one with the same rounds
SHOWN = 40.0  # dB: below it float64 tells whether precision or the count is to blame
#: dB: what is at least reached for a count to be confirmed, in one round and by the round that was
#: missing; and what is not, where none holds.
_THERE = {"float32": 15.0, "float64": 60.0}
_THERE_IN_ROUNDS, _GAIN = 40.0, 10.0
_NOT_THERE = 22.0
MOST_ROUNDS_REFUSED = 20
QUICK = (Standard("tiny/4", 32, 4, 192, 3), Standard("narrow/4", 32, 4, 96, 3), Standard("narrower/4", 32, 4, 60, 3))


@dataclass(frozen=True)
class Cell:
    """One cell of the table, and one run for it; PSNR in dB.

    ``attack`` to ``silent`` are the counts' verdict, before anything ran. ``psnr_less`` is that
    with a round less than the count asks for. ``agrees`` is empty where nothing could be run yet.
    """

    model: str
    size: int
    shared: str
    patches: int
    pixels: int
    width: int
    tokens: int
    attack: str
    inequality: str
    rounds: int | None
    silent: int
    geometry: str
    dtype: str
    ran: str
    psnr: float | None
    psnr_less: float | None
    determined: bool | None
    exact: bool | None
    agrees: bool | None
    seconds: float
    words: str


# --- A line of the table ------------------------------------------------------------------------------------------


def line_of(line: Standard) -> Iterator[Cell]:
    """All cells of one model."""
    model, anatomy = build(line)
    found = al.leak_map(model, anatomy=anatomy, rank=rank_of(anatomy)[0])
    runs = Runs(line, model, anatomy)
    for shared in SHARED:
        row = lora_row(found) if shared == LORA else found[shared]
        yield from confirmed(decided_by(row, found.facts, line), row, runs)


def rank_of(anatomy: al.Anatomy) -> tuple[int, list[str]]:
    """The adapters' rank, and the layers that peft puts them into: q and v, or a qkv
    with twice the rank.
    """
    layers = sorted({rows.name.split(".")[-2] for rows in (anatomy.query, anatomy.value) if rows is not None})
    return RANK * (3 - len(layers)), layers


def lora_row(found: al.LeakMap) -> al.LeakRow:
    """The row of the adapters that the model is supposed to have, under the table's name."""
    return replace(next(row for row in found.rows if row.shared.startswith("LoRA")), shared=LORA)


def decided_by(row: al.LeakRow, facts: Facts, line: Standard) -> Cell:
    """What the counts say, before anything ran."""
    return Cell(
        model=line.name, size=line.size, shared=row.shared, patches=facts.patches, pixels=facts.pixels,
        width=facts.width, tokens=facts.tokens, attack=row.attack or "", inequality=row.why, rounds=row.rounds,
        silent=row.silent_rounds, geometry="", dtype="", ran="", psnr=None, psnr_less=None, determined=None,
        exact=None, agrees=None, seconds=0.0, words="",
    )  # fmt: skip


def confirmed(decided: Cell, row: al.LeakRow, runs: Runs) -> Iterator[Cell]:
    """The cell's runs: float32, and float64 where that leaves the reason open."""
    if decided.shared == LORA:
        yield from adapters_confirmed(decided, runs.line)
        return
    if not decided.rounds:
        yield runs.refused(decided, row.tensors)
        return
    for dtype in (torch.float32, torch.float64):
        run = runs.attacked if decided.rounds == 1 else runs.stacked
        cell = run(decided, row.tensors, dtype)
        yield cell
        if cell.psnr is not None and cell.psnr >= SHOWN and cell.agrees:
            return
    if decided.attack == "span" and not cell.agrees and not cell.geometry.startswith("tiny"):
        yield runs.stacked(decided, row.tensors, torch.float64, tiny=True)  # does precision fail, or the count?


class Runs:
    """A model and its client; updates are made once."""

    def __init__(self, line: Standard, model: nn.Module, anatomy: al.Anatomy) -> None:
        self.line, self.model, self.anatomy = line, model, anatomy
        self.updates: dict[torch.dtype, al.ClientUpdate] = {}

    def pictures(self, names: Iterable[str], dtype: torch.dtype, size: int) -> Tensor:
        return al.load_victims(list(names), size, dtype=dtype)[0]

    def update(self, dtype: torch.dtype, kept: Iterable[str]) -> al.ClientUpdate:
        """The client's, of the tensors ``kept`` alone."""
        if dtype not in self.updates:
            pixels = self.pictures([VICTIM], dtype, self.line.size)
            images = self.anatomy.preprocessing.to_input(pixels)
            self.updates[dtype] = al.client_update(self.model.to(dtype), images, torch.tensor([LABEL]))
        update = self.updates[dtype]
        return withhold(update, set(update.gradients) - set(kept))

    def attacked(self, cell: Cell, kept: tuple[str, ...], dtype: torch.dtype) -> Cell:
        """The attack that the counts name, on these tensors alone."""
        update, start = self.update(dtype, kept), time.perf_counter()
        model = self.model.to(dtype)
        try:
            found = ATTACKS[cell.attack].function(model, update, anatomy=self.anatomy)
        except al.AttackNotApplicable as refusal:
            return self._with(cell, dtype, cell.attack, None, start, agrees=False, words=refusal.reason)
        psnr = self._psnr(found.images, self.line.size)
        failed = "; ".join(f"{c.name}: {c.text}" for c in found.conditions if c.state != "shown")
        ran = self._with(cell, dtype, cell.attack, psnr, start, agrees=psnr >= _THERE[_name(dtype)], words=failed)
        return replace(ran, determined=found.determined, exact=found.exact)

    def refused(self, cell: Cell, kept: tuple[str, ...]) -> Cell:
        """All closed forms must refuse; the span attack's best picture is kept as a number."""
        dtype, start = torch.float32, time.perf_counter()
        update, model = self.update(dtype, kept), self.model.to(dtype)
        try:
            found = al.invert(model, update, anatomy=self.anatomy)
        except al.AttackNotApplicable:
            psnr, refuses = None, True
        else:
            return self._with(
                cell, dtype, found.attack, self._psnr(found.images, self.line.size), start, agrees=False,
                words="not refused",
            )  # fmt: skip
        try:
            anyway = al.span_closed_form(model, update, anatomy=self.anatomy, strict=False, verify=False)
            psnr = self._psnr(anyway.images, self.line.size)
        except al.AttackNotApplicable:
            pass
        agrees = refuses and (psnr is None or psnr < _NOT_THERE)
        return self._with(cell, dtype, "all refuse", psnr, start, agrees=agrees, words="")

    def stacked(self, cell: Cell, kept: tuple[str, ...], dtype: torch.dtype, *, tiny: bool = False) -> Cell:
        """Rounds played, systems stacked: too few by one must not do, and so many must."""
        line, model, anatomy = self.line, self.model, self.anatomy
        if tiny or (cell.rounds or 0) > MOST_ROUNDS:
            line, model = tiny_like(cell)
            anatomy = al.dissect(model)
        start, model = time.perf_counter(), model.to(dtype)
        to_input = anatomy.preprocessing.to_input
        images = to_input(self.pictures([VICTIM], dtype, line.size))
        names, labels = zip(*OTHERS, strict=True)
        others = to_input(self.pictures(names, dtype, line.size)), torch.tensor(labels)
        rounds = play(model, images, torch.tensor([LABEL]), cell.rounds or 1, others)
        if line is not self.line:  # of other names: the tiny model's position embedding is withheld
            kept = al.leak_map(model)[cell.shared].tensors
        rounds = [replace(r, update=withhold(r.update, set(r.update.gradients) - set(kept))) for r in rounds]
        attack = ATTACKS[cell.attack].function
        less, result = (attack(model, some, anatomy=anatomy, strict=False) for some in (rounds[:-1], rounds))
        few, enough = (float(al.psnr(found.pixels[0].double(), self._private(line.size))) for found in (less, result))
        geometry = f"tiny, {line.width} wide" if line is not self.line else ""
        cell = replace(cell, geometry=geometry, psnr_less=few, determined=result.determined, exact=result.exact)
        agrees = enough >= _THERE_IN_ROUNDS and enough - few >= _GAIN
        return self._with(cell, dtype, f"{cell.rounds} rounds stacked", enough, start, agrees=agrees, words="")

    def _private(self, size: int) -> Tensor:
        return self.pictures([VICTIM], torch.float64, size)[0]

    def _psnr(self, images: Tensor, size: int) -> float:
        return float(al.psnr(self.anatomy.preprocessing.to_pixels(images.double())[0], self._private(size)))

    def _with(
        self, cell: Cell, dtype: torch.dtype, ran: str, psnr: float | None, start: float, *, agrees: bool, words: str
    ) -> Cell:
        return replace(
            cell, geometry=cell.geometry or "real", dtype=_name(dtype), ran=ran, psnr=psnr, agrees=agrees,
            seconds=time.perf_counter() - start, words=words,
        )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tiny_like(cell: Cell) -> tuple[Standard, nn.Module]:
    """A model for 32×32 pictures, 64 patches of 48 numbers, to which the span gives so many rounds."""
    tokens, unknowns = 65, 48
    width = tokens + 1 + -(-unknowns // (cell.rounds or 1))
    heads = next(heads for heads in (4, 3, 2, 1) if width % heads == 0)
    line = Standard("tiny", 32, 4, width, heads)
    return line, al.VisionTransformer(
        image_size=32, patch_size=4, width=width, depth=BLOCKS, heads=heads, classes=CLASSES
    )


# --- Adapters -----------------------------------------------------------------------------------------------------


def adapters_confirmed(decided: Cell, line: Standard) -> Iterator[Cell]:
    """The LoRA cell's runs: two rounds where the attack must refuse; else float32, and float64
    where that leaves the reason open.
    """
    if not decided.rounds:
        yield confirm_adapters(line, more=0, dtype=torch.float32)
        return
    for dtype in (torch.float32, torch.float64):
        cell = confirm_adapters(line, dtype=dtype)
        yield cell
        if cell.agrees:
            return
    # Does precision fail, or the count?
    tiny = confirm_adapters(QUICK[0])
    yield replace(
        decided, geometry=f"tiny, {tiny.width} wide", dtype=tiny.dtype, ran=tiny.ran, psnr=tiny.psnr,
        determined=tiny.determined, exact=tiny.exact, agrees=tiny.agrees, seconds=tiny.seconds,
    )  # fmt: skip


def confirm_adapters(line: Standard, more: int = 8, dtype: torch.dtype = torch.float64) -> Cell:
    """The LoRA cell of one line: peft's adapters on q and v, rounds played, the span
    attack on all of them.

    Runs so many rounds as the count says, the first that shows nothing, and ``more``: a span
    is seen where rows are more than tokens. Where no closed form applies, so many rounds that
    there is a row for each token, and that only the width is at fault; two where these are
    more than a few dozen.
    """
    import peft

    model, anatomy = build(line)
    rank, layers = rank_of(anatomy)
    found = al.leak_map(model, anatomy=anatomy, rank=rank)
    row = lora_row(found)
    head = (anatomy.head_weight or "").removesuffix(".weight")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, modules_to_save=[head])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model.to(dtype), config)
    anatomy = al.dissect(adapted, image_size=line.size)
    pixels = al.load_victim(VICTIM, line.size, dtype=dtype)[None]
    names, labels = zip(*OTHERS, strict=True)
    to_input = anatomy.preprocessing.to_input
    others = to_input(al.load_victims(list(names), line.size, dtype=dtype)[0]), torch.tensor(labels)
    needed = row.rounds or -(-found.facts.tokens // (RANK * 2))
    start, count = time.perf_counter(), 1 + (needed if row.rounds or needed <= MOST_ROUNDS_REFUSED else 1) + more
    rounds = play(adapted, to_input(pixels), torch.tensor([LABEL]), count, others)
    cell = replace(decided_by(row, found.facts, line), geometry="real", dtype=_name(dtype), ran=f"{count} rounds")
    try:
        result = al.span_closed_form(adapted, rounds, anatomy=anatomy)
    except al.AttackNotApplicable as refusal:
        anyway = al.span_closed_form(adapted, rounds, anatomy=anatomy, strict=False, verify=False)
        psnr = float(al.psnr(anyway.pixels[0].double(), pixels[0].double()))
        agrees = row.attack is None and "width_needed" in refusal.numbers and psnr < _NOT_THERE
        seconds = time.perf_counter() - start
        return replace(cell, psnr=psnr, agrees=agrees, words=refusal.reason, seconds=seconds)
    psnr = float(al.psnr(result.pixels[0].double(), pixels[0].double()))
    agrees = row.attack is not None and psnr >= _THERE_IN_ROUNDS
    return replace(
        cell, psnr=psnr, determined=result.determined, exact=result.exact, agrees=agrees,
        seconds=time.perf_counter() - start,
    )  # fmt: skip


# --- The study's part ---------------------------------------------------------------------------------------------


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Fill leak_map.csv, a line of the table after the other."""
    lines = {(line.name, line.size): line for line in (QUICK if options.quick else standard_models())}
    measured = partial(_measured, lines)
    fill(folder / "leak_map.csv", Cell, lines, measured, key=("model", "size"), workers=options.workers)


def _measured(lines: dict[tuple[str, int], Standard], case: tuple[str, int]) -> list[Cell]:
    return list(line_of(lines[case]))
