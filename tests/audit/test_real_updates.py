"""Updates as people really have them: what the audit's first sentence says of each, and
whether it is true.

One photograph, one small model, and what lies between a client's gradient and the file
that its server keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from audited import LABEL, POSITION, photograph, update_of, vit
from torch import Tensor, nn

from aprillab.audit import Audit, audit
from aprillab.audit.words import VERDICTS
from aprillab.data import load_victim
from aprillab.metrics import psnr
from aprillab.models import VisionTransformer
from aprillab.preprocessing import HALF
from aprillab.update import ClientUpdate, client_update, update_from_states

Make = Callable[[VisionTransformer], ClientUpdate]


def times(update: ClientUpdate, factor: float) -> ClientUpdate:
    return replace(update, gradients={name: factor * g for name, g in update.gradients.items()})


def with_noise(update: ClientUpdate, level: float) -> ClientUpdate:
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: g + level * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator)
        for name, g in update.gradients.items()
    }
    return replace(update, gradients=noisy)


def trained(model: nn.Module, steps: int, optimizer: type = torch.optim.SGD, **options: float) -> nn.Module:
    """The client's model after some local steps on its photograph."""
    client = copy.deepcopy(model)
    run = optimizer(client.parameters(), **options)
    for _ in range(steps):
        run.zero_grad()
        images = HALF.to_input(photograph()[None])
        nn.functional.cross_entropy(client(images), torch.tensor([LABEL])).backward()
        run.step()
    return client


def rounds(model: nn.Module, steps: int, **options: float) -> ClientUpdate:
    client = trained(model, steps, **options)
    return update_from_states(model.state_dict(), client.state_dict(), learning_rate=options["lr"], local_steps=steps)


def difference(model: nn.Module, steps: int) -> ClientUpdate:
    """after − before, of which the file says nothing."""
    client = trained(model, steps, lr=0.05).state_dict()
    return ClientUpdate({name: client[name] - p.detach() for name, p in model.named_parameters()})


def two_findings(model: VisionTransformer) -> ClientUpdate:
    targets = torch.zeros(1, 10).index_fill_(1, torch.tensor([1, 5]), 1.0)
    loss = nn.functional.binary_cross_entropy_with_logits
    return client_update(model, HALF.to_input(photograph()[None]), targets, loss=loss)


GIVEN_AWAY: dict[str, Make] = {
    "a gradient": update_of,
    "a scaled loss": lambda model: times(update_of(model), 128.0),
    "after − before": lambda model: difference(model, 1),
    "five local steps": lambda model: rounds(model, 5, lr=0.05),
    "momentum": lambda model: rounds(model, 5, lr=0.05, momentum=0.9),
    "weight decay": lambda model: rounds(model, 1, lr=0.05, weight_decay=0.01),
    "two findings": two_findings,
    "no position": lambda model: update_of(model, withhold=[POSITION]),
    "a wrapper's names": lambda model: replace(
        update_of(model), gradients={f"module.{name}": g for name, g in update_of(model).gradients.items()}
    ),
    "ndarrays": lambda model: ClientUpdate({name: g.numpy() for name, g in update_of(model).gradients.items()}),
}


@pytest.mark.parametrize("make", GIVEN_AWAY.values(), ids=GIVEN_AWAY)
def test_what_is_given_away_is_called_so(make: Make) -> None:
    model = vit()
    found = audit(model, make(model))
    assert found.leak == "exact", found.best and found.best.reason
    assert found.verdict.startswith("This update gives the private picture away, exactly")
    assert psnr(found.best.result.pixels[0], photograph(torch.float64)) > 58.9
    assert found.labels is None or LABEL in found.labels.labels or "findings" in str(make)


def test_several_steps_of_which_nothing_is_known_are_no_mixture() -> None:
    model = vit()
    found = audit(model, difference(model, 5))
    assert psnr(found.best.result.pixels[0], photograph(torch.float64)) > 58.9
    assert found.one_image.holds
    assert found.leak in ("close", "coarse", "likely", "unclear")
    assert "mixture" not in found.verdict


@pytest.mark.parametrize("level", [1e-5, 1e-4, 1e-3, 1e-2])
def test_the_headline_follows_the_noise(level: float) -> None:
    model = vit(width=96, heads=3)
    found = audit(model, with_noise(update_of(model), level))
    best = found.best.result
    true = float(psnr(best.pixels[0], photograph(torch.float64)))
    assert abs(best.predicted_psnr - true) < 8
    assert found.labels.labels.tolist() == [LABEL]
    if true > 25:
        assert found.leak in ("exact", "close", "likely", "coarse")
        assert "no photograph" not in found.verdict
        assert "mixture" not in found.verdict


def test_noise_that_leaves_nothing_is_not_promised_away() -> None:
    model = vit()
    found = audit(model, with_noise(update_of(model), 3.0))
    assert found.leak == "unclear"
    for finding in found.applied:
        assert finding.result.predicted_psnr < 20
        assert psnr(finding.result.pixels[0], photograph(torch.float64)) < 20


def test_a_head_that_stays_with_the_client_proves_no_single_image() -> None:
    """Where no equation is to spare either, nothing was checked."""
    model = vit(width=17, heads=1, block="april", class_token=False)
    pictures = torch.stack([photograph(), load_victim("chelsea", 16)])
    update = update_of(model, pictures, withhold=["head.weight", "head.bias"])
    found = audit(model, replace(update, batch_size=None))
    assert found.leak in ("unclear", "none")
    assert not any(finding.result.determined for finding in found.applied)


def test_adam_is_named() -> None:
    model = vit()
    client = trained(model, 1, torch.optim.AdamW, lr=1e-3)
    found = audit(model, update_from_states(model.state_dict(), client.state_dict(), learning_rate=1e-3))
    assert found.leak == "none"
    assert "Adam" in found.verdict


def test_autocast_leaves_a_picture_and_one_label() -> None:
    model = vit(width=96, heads=3)
    images = HALF.to_input(photograph()[None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    gradients = torch.autograd.grad(
        nn.functional.cross_entropy(logits.float(), torch.tensor([LABEL])), list(model.parameters())
    )
    names = [name for name, _ in model.named_parameters()]
    found = audit(model, ClientUpdate(dict(zip(names, gradients, strict=True))))
    best = found.best.result
    assert found.labels.labels.tolist() == [LABEL]
    assert found.one_image.holds
    assert abs(best.predicted_psnr - float(psnr(best.pixels[0], photograph(torch.float64)))) < 12
    assert any("noise" in note for note in found.notes)


def test_the_other_normalization_is_noticed() -> None:
    model = vit()
    found = audit(model, client_update(model, photograph()[None], torch.tensor([LABEL])))  # ToTensor() alone
    assert found.leak == "exact"
    assert found.pixels.state == "contradicted"
    assert "[0, 1] would fit better" in found.pixels.text


def test_every_trust_has_its_sentence_and_no_sentence_denies_the_picture() -> None:
    model: Tensor | nn.Module = vit()
    assert isinstance(audit(model, update_of(model)), Audit)
    for words in VERDICTS.values():
        assert "no photograph." not in words
