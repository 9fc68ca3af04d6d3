"""The study's clients: which training, whose pictures, and what becomes of their updates."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import aprillab as al
from aprillab.attacks.closed_forms.patch_embedding import most_probable
from aprillab.audit import audit
from aprillab.federation import LocalTraining, train_locally, update_of

LABEL, CLASSES = 3, 10
OTHERS = 4  # clients besides the victim's in several rounds, each with another photograph
SMALL, LARGE = "32×32, d = 192", "ViT-B/16 at 224"
DECAYED, MOMENTUM = 0.01, 0.9
KEPT = "AdamW, state kept"
#: Optimizers by the table's names, as fields of LocalTraining.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {},
    "momentum 0.9": {"momentum": MOMENTUM},
    "Nesterov": {"momentum": MOMENTUM, "nesterov": True},
    "weight decay 0.01": {"weight_decay": DECAYED},
    "Adam": {"optimizer": "adam"},
    "AdamW": {"optimizer": "adamw", "weight_decay": DECAYED},
    KEPT: {"optimizer": "adamw", "weight_decay": DECAYED},
}


class Case(NamedTuple):
    """A row's values in the columns that tell rows apart."""

    part: str
    model: str
    optimizer: str
    learning_rate: float
    eps: float  # 0 of SGD
    clip: float  # 0 is none
    steps: int
    rounds: int
    images: int
    batch_size: int  # of a step
    autocast: str
    victim: str
    seed: int

    @property
    def how(self) -> LocalTraining:
        """What the client is told to do."""
        return LocalTraining(
            learning_rate=self.learning_rate, steps=self.steps, batch_size=self.batch_size, eps=self.eps or None,
            clip_norm=self.clip or None, autocast=self.autocast or None, **OPTIMIZERS[self.optimizer],
        )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What one attack made of it. PSNR in dB, of a batch that of the picture which comes nearest.

    ``linear`` is the PSNR of the patch-embedding system as it stands, where a step of Adam was
    undone for the other; ``trust`` the audit's word, measured for the first victim and seed of
    each cell. The losses are the client's, before and after its last round; ``grey`` the PSNR
    of a grey picture.
    """

    part: str
    model: str
    optimizer: str
    learning_rate: float
    eps: float
    clip: float
    steps: int
    rounds: int
    images: int
    batch_size: int
    autocast: str
    victim: str
    seed: int
    attack: str = ""
    psnr: float | None = None
    predicted_psnr: float | None = None
    exact: bool | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    linear: float | None = None
    grey: float | None = None
    trust: str = ""
    used: int | None = None
    seconds: float | None = None
    note: str = ""


# --- Models and pictures ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def ready(name: str, seed: int) -> nn.Module:
    """A model with random weights and a head that is not zero."""
    if name == SMALL:
        return al.VisionTransformer(
            image_size=32, patch_size=8, width=192, depth=4, heads=3, classes=CLASSES, seed=seed
        )
    from torchvision.models import vit_b_16

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = vit_b_16(weights=None)
        nn.init.normal_(model.heads.head.weight, std=0.02)
    return model.eval()


def pictures(first: str, count: int, size: int) -> Tensor:
    """``count`` photographs, (count, C, H, W): the victims from ``first`` on, then a quarter of
    each.
    """
    names = al.victims()
    names = [*names[names.index(first) :], *names[: names.index(first)]]
    whole = [al.load_victim(name, size) for name in names[:count]]
    quarters = [al.load_victim(name, 2 * size)[:, :size, :size] for name in names[: count - len(whole)]]
    return torch.stack([*whole, *quarters])


def private(case: Case, anatomy: al.Anatomy) -> tuple[Tensor, Tensor]:
    """The client's pictures, as the model reads them, and their labels."""
    images = anatomy.preprocessing.to_input(pictures(case.victim, case.images, anatomy.image_size[0]))
    return images, (LABEL + torch.arange(case.images)) % CLASSES


# --- One round, or several ----------------------------------------------------------------------------------------


def received(case: Case, model: nn.Module, anatomy: al.Anatomy) -> tuple[list[al.Round], dict[str, Tensor]]:
    """The rounds of the victim's client, as a server keeps them, and the last state that came back.

    Between two rounds the server sends the mean of all clients' states.
    """
    how, (mine, labels) = case.how, private(case, anatomy)
    theirs = anatomy.preprocessing.to_input(pictures(case.victim, 1 + OTHERS, anatomy.image_size[0])[1:])
    train = Keeping(how) if case.optimizer == KEPT else functools.partial(train_locally, how=how)
    sent, after, found = model.state_dict(), dict[str, Tensor](), list[al.Round]()
    for number in range(case.rounds):
        server = copy.deepcopy(model)
        server.load_state_dict(sent)
        after = train(server, mine, labels)
        found.append(al.Round(sent, update_of(sent, after, how, batch_size=case.images)))
        if number + 1 < case.rounds:
            others = [
                train_locally(server, picture[None], torch.tensor([(LABEL + k) % CLASSES]), how)
                for k, picture in enumerate(theirs, 1)
            ]
            sent = {name: torch.stack([after[name], *(state[name] for state in others)]).mean(0) for name in sent}
    return found, after


class Keeping:
    """A client that keeps its optimizer's moments from round to round, in torch's own state dict."""

    def __init__(self, how: LocalTraining) -> None:
        self.how = how
        self.moments: dict[str, Any] | None = None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        client = copy.deepcopy(model)
        parameters = [p for p in client.parameters() if p.requires_grad]
        optimizer = self.how.optimizer_of(parameters)
        if self.moments is not None:
            optimizer.load_state_dict(self.moments)
        for _ in range(self.how.steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(client(images), labels).backward()
            if self.how.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, self.how.clip_norm)
            optimizer.step()
        self.moments = copy.deepcopy(optimizer.state_dict())
        return {name: tensor.detach().clone() for name, tensor in client.state_dict().items()}


# --- The attack ---------------------------------------------------------------------------------------------------


def attacked(case: Case, audited: Collection[tuple[str, int]] = ()) -> list[Row]:
    """The case's row; with the audit's word where its victim and seed are ``audited``."""
    model = ready(case.model, case.seed)
    anatomy = al.dissect(model)
    truth = pictures(case.victim, case.images, anatomy.image_size[0]).double()
    row = Row(*case, grey=grey(truth))
    try:
        rounds, after = received(case, model, anatomy)
    except al.UpdateError as error:
        return [replace(row, note=f"no update: {error}")]
    losses = (_loss(model, state, case, anatomy) for state in (rounds[-1].state, after))
    row = replace(row, **dict(zip(("loss_before", "loss_after"), losses, strict=True)))
    if "Adam" in case.optimizer and case.rounds == 1:
        pixels = as_it_stands(rounds[0].state, after, case, anatomy)
        row = replace(row, linear=_nearest(pixels, truth))
    if case.optimizer == KEPT:
        rounds = rounds[1:]  # the first is as any
    updates = rounds if case.rounds > 1 else rounds[0].update
    try:
        found = al.invert(model, updates, anatomy=anatomy, strict=False)
        best = audit(model, updates, anatomy=anatomy).best if (case.victim, case.seed) in audited else None
    except (al.AttackNotApplicable, al.UpdateError) as refusal:
        return [replace(row, note=f"refused: {refusal}")]
    used = sum(bool(note["used"]) for note in found.diagnostics.get("rounds", ()))
    return [
        replace(
            row, attack=found.diagnostics["chosen"], psnr=_nearest(found.pixels[0], truth),
            predicted_psnr=found.predicted_psnr, exact=found.exact, used=used or None, seconds=found.seconds,
            trust="" if best is None else best.trust, note="" if found.exact else found.reason,
        )
    ]  # fmt: skip


def _loss(model: nn.Module, state: Any, case: Case, anatomy: al.Anatomy) -> float:
    """Of the client's own pictures, with the weights of ``state``."""
    images, labels = private(case, anatomy)
    with torch.no_grad():
        logits = torch.func.functional_call(model, dict(state), (images,))
    return float(nn.functional.cross_entropy(logits, labels))


def grey(truth: Tensor) -> float:
    """What a picture that shows nothing has, against the nearest of ``truth``."""
    return _nearest(torch.full_like(truth[0], 0.5), truth)


def _nearest(picture: Tensor, truth: Tensor) -> float:
    return max(float(al.psnr(picture, one)) for one in truth)


def as_it_stands(before: Any, after: Any, case: Case, anatomy: al.Anatomy) -> Tensor:
    """The picture, (C, H, W), of the patch-embedding system where a step of Adam is
    taken for a gradient.
    """
    plain = al.update_from_states(before, after, learning_rate=case.learning_rate, local_steps=case.steps)
    dW = plain.gradients[anatomy.patch_weight].double().flatten(1)
    G = plain.gradients[anatomy.position or ""].double().flatten(0, -2)[anatomy.position_prefix :]
    eps = torch.finfo(torch.float32).eps
    found = most_probable(dW, G, eps, eps * float(G.square().mean().sqrt()), (dW.new_zeros(dW.shape[1]), 1.0))
    return anatomy.preprocessing.to_pixels(anatomy.tiling.images(found.X[None]))[0].clamp(0, 1)
