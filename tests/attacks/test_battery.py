"""What every attack of the catalogue must do, whatever its mathematics: a new row is
tested by being there.

Searches get a budget of a few evaluations: enough to go wrong, not to succeed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import private_batch, tiny_vit
from torch import Tensor

from aprillab.anatomy import Anatomy, Rows, dissect
from aprillab.attacks.catalogue import ATTACKS, Attack
from aprillab.attacks.result import AttackNotApplicable, Condition, Reconstruction
from aprillab.metrics import EXACT_TO_8_BITS_DB, psnr
from aprillab.models import VisionTransformer
from aprillab.preprocessing import HALF
from aprillab.update import ClientUpdate, UpdateError, client_update

#: Where an attack needs another model than the tiny ViT of architecture B: here its options.
MODELS: dict[str, dict[str, Any]] = {"april": {"block": "april"}}
#: Evaluations: two rounds of GradInversion's three restarts, and some for the first line
#: search of L-BFGS.
BUDGET = 6
#: A client's labels for a batch of two: the same, so that no sign in the head's bias gives
#: the batch away.
ALIKE = torch.tensor([3, 3])


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> Attack:
    return ATTACKS[request.param]


def victim(attack: Attack, dtype: torch.dtype = torch.float64, **options: Any) -> VisionTransformer:
    """A model that the attack applies to."""
    return tiny_vit(dtype, **{**MODELS.get(attack.name, {}), **options})


def shared(model: VisionTransformer, batch: int = 1) -> ClientUpdate:
    images, labels = private_batch(model, batch)
    return client_update(model, images, ALIKE if batch == 2 else labels)


def run(attack: Attack, model: VisionTransformer, update: ClientUpdate, **options: Any) -> Reconstruction:
    """The attack through its row, as ``invert`` calls it; searches quietly and on a budget."""
    budget = {"max_evaluations": BUDGET, "progress": False} if attack.searches else {}
    return attack.function(model, update, **{**budget, **options})


def parameters_of(anatomy: Anatomy, part: str) -> list[str]:
    """The parameters in which a part of the anatomy lies."""
    where = getattr(anatomy, part)
    return [where.name if isinstance(where, Rows) else where]


# --- What comes back ------------------------------------------------------------------------------


def test_a_result_is_complete(attack: Attack) -> None:
    model = victim(attack)
    images, labels = private_batch(model)
    result = run(attack, model, client_update(model, images, labels))
    for pictures in (result.images, result.pixels):
        assert pictures.shape == images.shape
        assert pictures.dtype == torch.float64
        assert pictures.isfinite().all()
    assert 0 <= result.pixels.min() <= result.pixels.max() <= 1
    torch.testing.assert_close(dissect(model).preprocessing.to_pixels(result.images), result.pixels)
    assert result.labels is not None
    assert result.labels.shape == labels.shape
    assert result.labels.dtype == torch.int64
    assert result.seconds > 0
    assert result.reason.strip()
    assert result.diagnostics["precision"] == "float64"


def test_exact_means_that_conditions_were_checked_and_hold(attack: Attack) -> None:
    model = victim(attack)
    result = run(attack, model, shared(model))
    assert all(isinstance(condition, Condition) and condition.text for condition in result.conditions)
    if attack.searches:  # the private picture here has no whole levels, and no search verifies anything else
        assert not result.exact
    else:
        assert result.exact, result.reason
        assert result.conditions_hold
        assert "one image" in [condition.name for condition in result.conditions]
        assert result.predicted_psnr is not None


def test_history_is_the_searches(attack: Attack) -> None:
    model = victim(attack)
    result = run(attack, model, shared(model))
    if not attack.searches:
        assert result.history == []
        return
    evaluations = [entry["evaluation"] for entry in result.history]
    assert evaluations == sorted(evaluations)
    assert 0 < evaluations[-1] <= BUDGET
    assert evaluations[-1] == result.diagnostics["evaluations"]
    assert all(math.isfinite(entry["loss"]) for entry in result.history)


# --- Never more than the update proves ------------------------------------------------------------


@pytest.mark.parametrize("said", [True, False], ids=["size said", "size not said"])
def test_a_batch_of_two_is_never_called_exact(attack: Attack, said: bool) -> None:
    model = victim(attack)
    update = shared(model, batch=2)
    result = run(attack, model, update if said else ClientUpdate(update.gradients))
    assert not result.exact
    if not attack.searches:
        failed = [condition.name for condition in result.conditions if not condition.holds]
        assert "one image" in failed
        assert "one image fails" in result.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_called_exact_only_where_it_is(attack: Attack, dtype: torch.dtype) -> None:
    """Three digits can be enough: on so small a model a closed form divides by nothing small."""
    for seed in range(3):
        model = victim(attack, seed=seed)
        pixels = torch.randint(256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(seed)).double() / 255
        update = client_update(model, HALF.to_input(pixels), torch.tensor([seed])).to(dtype=dtype)
        result = run(attack, model, update)
        assert not result.exact or (not attack.searches and psnr(result.pixels, pixels).item() > EXACT_TO_8_BITS_DB)
        assert result.diagnostics["precision"] == str(dtype).removeprefix("torch.")
        assert result.images.dtype == torch.float64


# --- Updates are not to be trusted ----------------------------------------------------------------


def test_another_models_update_is_refused(attack: Attack) -> None:
    wider = shared(victim(attack, width=48))
    with pytest.raises(UpdateError, match="shape"):
        run(attack, victim(attack), wider)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(attack: Attack, poison: float) -> None:
    model = victim(attack)
    anatomy = dissect(model)
    for part in {"patch_weight", *attack.needs}:
        update = shared(model)
        update.gradients[parameters_of(anatomy, part)[0]].view(-1)[5] = poison
        with pytest.raises(UpdateError, match="NaN or infinite"):
            run(attack, model, update)


def test_what_it_needs_cannot_be_withheld(attack: Attack) -> None:
    model = victim(attack)
    update, anatomy = shared(model), dissect(model)
    # Of the first attention's projections the span attacks need one.
    groups = [attack.needs] if attack.name.startswith("span") else [(part,) for part in attack.needs]
    for group in groups:
        withheld = [name for part in group for name in parameters_of(anatomy, part)]
        with pytest.raises(AttackNotApplicable, match=r"not shared|is shared") as refusal:
            run(attack, model, update.without(withheld))
        assert refusal.value.attack
        assert refusal.value.reason


def test_what_it_does_not_need_can_be_withheld(attack: Attack) -> None:
    """Matching needs no gradient in particular: it goes on without what all the others read."""
    model = victim(attack)
    anatomy = dissect(model)
    parts = {part for other in ATTACKS.values() for part in other.needs} - set(attack.needs)
    if attack.name == "april":
        parts.discard("patch_weight")  # where p > d, as here, it has the row space of this gradient (chapter 03)
    if attack.name == "span":
        model = victim(attack, width=66)  # p + n + 2 ≤ d: the tokens alone fix the pixels
    withheld = [name for part in parts for name in parameters_of(anatomy, part)]
    result = run(attack, model, shared(model).without(withheld))
    assert result.images.isfinite().all()


# --- Good manners ---------------------------------------------------------------------------------


def test_deterministic_and_without_traces(attack: Attack) -> None:
    model = victim(attack, torch.float32)
    update = shared(model)
    sent = {key: g.clone() for key, g in update.gradients.items()}
    weights = {key: t.clone() for key, t in model.state_dict().items()}
    trained = [p.requires_grad for p in model.parameters()]
    state, training = torch.random.get_rng_state(), model.training
    settings = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    first = run(attack, model, update)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.rand(3)  # what the caller draws in between changes nothing
        second = run(attack, model, update)
    assert torch.equal(first.images, second.images)
    assert [entry["loss"] for entry in first.history] == [entry["loss"] for entry in second.history]
    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()) == settings
    assert all(torch.equal(update.gradients[key], g) for key, g in sent.items())
    assert all(torch.equal(model.state_dict()[key], t) for key, t in weights.items())
    assert trained == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert model.training == training


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.searches])
def test_ctrl_c_returns_the_best_so_far(name: str) -> None:
    attack = ATTACKS[name]
    model = victim(attack)
    losses: list[float] = []

    def press(entry: dict[str, Any], images: Tensor) -> None:
        losses.append(entry["loss"])
        if len(losses) == 2:
            raise KeyboardInterrupt

    result = run(attack, model, shared(model), callback=press, max_evaluations=50)
    assert len(losses) == len(result.history) == 2
    assert result.diagnostics["stopped"] == "interrupted"
    assert result.diagnostics["loss"] == min(losses)
    assert result.images.isfinite().all()
    assert not result.exact
