"""Every attack once on CUDA, against the same attack on the CPU: ``pytest -m gpu`` where a GPU is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import tiny_vit

from aprillab.attacks.catalogue import ATTACKS, CLOSED_FORMS, Attack
from aprillab.attacks.result import Reconstruction
from aprillab.attacks.searches import pose
from aprillab.attacks.searches.match import match_gradients
from aprillab.attacks.searches.recipes import RECIPES
from aprillab.preprocessing import HALF
from aprillab.update import ClientUpdate, client_update

pytestmark = pytest.mark.gpu

MODELS: dict[str, dict[str, Any]] = {"april": {"block": "april"}}
#: Evaluations of a search. Rounding that differs grows with each; after so few it has not grown
#: far.
BUDGET = 6
#: Largest difference of a pixel in [0, 1], and relative difference of a loss. Both devices solve in
#: float64 from the same update, and order their sums differently, 1e-16 at a time; the most that
#: this model amplifies is 1e8.
TOLERANCE = 1e-6
#: Below this a loss is rounding: the span's picture, where span_then_match begins, is exact here.
NO_LOSS = 1e-12
#: Difference of a gradient made on the GPU, relative to the largest tensor: some hundred roundings.
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-4}


def client(name: str, dtype: torch.dtype, device: torch.device) -> tuple[torch.nn.Module, ClientUpdate]:
    """A client with one picture of whole grey levels, its model and its gradients on ``device``."""
    model = tiny_vit(dtype, **MODELS.get(name, {})).to(device)
    levels = torch.randint(256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = HALF.to_input(levels.double() / 255).to(device, dtype)
    return model, client_update(model, images, torch.tensor([3], device=device))


def run(attack: Attack, model: torch.nn.Module, update: ClientUpdate) -> Reconstruction:
    budget = {"max_evaluations": BUDGET, "progress": False} if attack.searches else {}
    return attack.function(model, update, **budget)


def compare(attack: Attack, dtype: torch.dtype, device: torch.device) -> None:
    """The attack on ``device`` and on the CPU, of one update, to the same end."""
    model, update = client(attack.name, dtype, device)
    there = run(attack, model, update)
    here = run(attack, copy.deepcopy(model).cpu(), update.to("cpu"))
    assert there.images.device.type == device.type
    assert here.images.device.type == "cpu"
    assert (there.pixels.cpu() - here.pixels).abs().max() < TOLERANCE
    assert there.exact == here.exact
    assert there.labels is not None
    assert here.labels is not None
    assert there.labels.tolist() == here.labels.tolist()
    assert [c.holds for c in there.conditions] == [c.holds for c in here.conditions]
    assert bool(there.history) == bool(here.history)
    for mine, other in zip(there.history, here.history, strict=False):  # one may end at its tolerance before
        assert mine["loss"] == pytest.approx(other["loss"], rel=TOLERANCE, abs=NO_LOSS)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # a convolution's float32 would have ten bits
    return torch.device("cuda")


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
def test_the_client_shares_the_same_gradient(cuda: torch.device, dtype: torch.dtype) -> None:
    there, here = (client("embedding", dtype, device)[1].gradients for device in (cuda, torch.device("cpu")))
    largest = max(float(gradient.norm()) for gradient in here.values())
    for key, gradient in here.items():
        assert float((there[key].cpu() - gradient).norm()) <= GRADIENT_TOLERANCE[dtype] * largest, key


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_the_gpu_ends_as_on_the_cpu(cuda: torch.device, name: str) -> None:
    compare(ATTACKS[name], torch.float64, cuda)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluations_that_are_recorded_give_what_others_give(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch, recipe: str, dtype: torch.dtype
) -> None:
    model, update = client("embedding", torch.float64, cuda)
    options: dict[str, Any] = {"recipe": recipe, "dtype": dtype, "max_evaluations": 3 * BUDGET, "progress": False}
    recorded = match_gradients(model, update, **options)
    monkeypatch.setattr(pose, "recordable", lambda problem: False)
    plain = match_gradients(model, update, **options)
    assert recorded.diagnostics["recorded"] == "yes"
    assert plain.diagnostics["recorded"] == "no"
    before_rounding_grows = slice(BUDGET)
    for mine, other in zip(recorded.history[before_rounding_grows], plain.history, strict=False):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4 if dtype == torch.float32 else TOLERANCE)


def test_a_loss_that_cannot_be_recorded_is_evaluated_as_before(cuda: torch.device) -> None:
    def asking(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = torch.nn.functional.cross_entropy(logits, labels)
        return value * value.item() / value.item()

    model, update = client("embedding", torch.float64, cuda)
    options: dict[str, Any] = {"max_evaluations": BUDGET, "progress": False}
    found = match_gradients(model, update, loss=asking, **options)
    assert found.diagnostics["recorded"].startswith("no: ")
    again = match_gradients(model, update, **options)  # the card is as it was
    assert again.diagnostics["recorded"] == "yes"
    for mine, other in zip(found.history, again.history, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_closed_form_solves_in_float64_what_was_shared_in_float32(cuda: torch.device, name: str) -> None:
    compare(ATTACKS[name], torch.float32, cuda)
