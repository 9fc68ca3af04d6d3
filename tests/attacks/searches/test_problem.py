"""The loss as the search sees it: which gradients, which labels, which models, and its slope."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from search_tools import SmallCNN, attacked, quietly, small_vit, victim
from torch import nn

from aprillab.anatomy import dissect
from aprillab.attacks.result import AttackNotApplicable
from aprillab.attacks.searches import objectives
from aprillab.attacks.searches.pose import pose, undisturbed
from aprillab.attacks.searches.problem import Problem
from aprillab.attacks.searches.recipes import APRIL, Adam, PositionTerm, Priors, Recipe
from aprillab.metrics import psnr
from aprillab.preprocessing import HALF, UNIT
from aprillab.update import ClientUpdate, client_update


def test_the_whole_loss_and_its_gradient() -> None:
    """The objective as the search sees it, against client_update and finite
    differences, all terms on.
    """
    model = small_vit()
    _, update = attacked(model)
    trial = HALF.to_input(victim(seed=9)[0])
    mine = client_update(model, trial, torch.tensor([1]))
    seen: list[dict] = []

    def distance(gradients: tuple, targets: list) -> torch.Tensor:
        for a, b in zip(gradients, mine.gradients.values(), strict=True):
            torch.testing.assert_close(a, b)
        return objectives.l2(gradients, targets)

    weights = {"position": 0.7, "total_variation": 0.3, "image_norm": 0.2, "box": 5.0, "seams": 0.4}
    recipe = Recipe(
        distance=distance,
        position_term=PositionTerm(weight=0.7),
        priors=Priors(total_variation=0.3, image_norm=0.2, box=5.0, seams=0.4),
    )
    quietly(
        model, update, recipe=recipe, start=trial, max_evaluations=1, callback=lambda entry, _: seen.append(entry)
    )  # fmt: skip
    (entry,) = seen
    name = "position_embedding"
    expected = {
        "distance": objectives.l2(list(mine.gradients.values()), list(update.gradients.values())),
        "position": objectives.position_cosine(mine.gradients[name], update.gradients[name]),
        "total_variation": objectives.total_variation(trial),
        "image_norm": objectives.image_norm(trial),
        "box": objectives.outside_box(trial, HALF),
        "seams": objectives.patch_seams(trial, dissect(model).tiling.patch_size),
    }
    assert entry["terms"] == pytest.approx({key: value.item() for key, value in expected.items()})
    assert entry["loss"] == pytest.approx(
        sum(weights.get(key, 1.0) * value.item() for key, value in expected.items())
    )


def test_the_search_descends_the_loss_it_reports() -> None:
    """One Adam step of size η moves every pixel by η against the sign of the loss's gradient."""
    model = small_vit()
    _, update = attacked(model)
    trial, pictures, losses = HALF.to_input(victim(seed=9)[0]), [], []

    def loss_at(images: torch.Tensor) -> float:
        result = quietly(model, update, start=images, max_evaluations=1)
        return result.history[0]["loss"]  # type: ignore[attr-defined]

    def keep(entry: dict, images: torch.Tensor) -> None:
        pictures.append(images.clone())
        losses.append(entry["loss"])

    recipe = replace(APRIL, optimizer=Adam(learning_rate=1e-4))
    quietly(model, update, recipe=recipe, start=trial, max_evaluations=2, callback=keep)
    assert losses[1] < losses[0]
    step = pictures[1] - trial
    for y, x in ((0, 0), (1, 2), (3, 3)):
        nudge = torch.zeros_like(trial)
        nudge[0, 0, y, x] = 1e-5
        slope = (loss_at(trial + nudge) - loss_at(trial - nudge)) / 2e-5
        assert step[0, 0, y, x].item() == pytest.approx(-1e-4 * math.copysign(1, slope), rel=1e-2)


def test_matching_knows_in_which_precision_the_update_was_shared() -> None:
    """A key bias has no gradient but rounding; in float64 that of a float32 client would
    seem to be something.
    """
    model = small_vit().float()
    pixels, labels = victim()
    update = client_update(model, HALF.to_input(pixels).float(), labels)
    trial = HALF.to_input(victim(seed=9)[0])
    mine = client_update(copy.deepcopy(model).double(), trial, labels)
    pairs = [list(mine.gradients.values()), [g.double() for g in update.gradients.values()]]
    expected = objectives.balanced_l2(*pairs, eps=torch.finfo(torch.float32).eps).item()
    assert abs(expected / objectives.balanced_l2(*pairs).item() - 1) > 0.01
    result = quietly(model, update, start=trial, max_evaluations=1)
    assert result.diagnostics["terms"]["distance"] == pytest.approx(expected, rel=1e-6)


def test_withheld_tensors_are_not_matched_and_alpha_is_said_to_be_idle() -> None:
    model = small_vit()
    _, update = attacked(model)
    less = update.without(["position_embedding", "blocks.0.mlp.0.weight"])
    result = quietly(model, less, max_evaluations=150)
    assert result.diagnostics["matched"] == len(update.gradients) - 2
    assert "position" not in result.diagnostics["terms"]
    assert "α has no effect" in result.reason
    # What is matched is what is there: the distance is the mean over the shared
    # tensors, and it falls.
    trial = client_update(model, result.images, torch.tensor([1]))
    shared = [trial.gradients[name] for name in less.gradients]
    expected = objectives.balanced_l2(shared, list(less.gradients.values())).item()
    assert result.diagnostics["terms"]["distance"] == pytest.approx(expected)
    assert expected < result.history[0]["loss"] / 20


def test_only_the_head_shared_matches_the_head() -> None:
    model = small_vit()
    _, update = attacked(model)
    kept = update.without([name for name in update.gradients if not name.startswith("head")])
    result = quietly(model, kept, max_evaluations=100)
    assert result.diagnostics["matched"] == 2
    assert result.diagnostics["loss"] < result.history[0]["loss"] / 100


def test_frozen_parameters_of_the_model_stay_unmatched() -> None:
    model = small_vit(position="frozen")
    _, update = attacked(model)
    result = quietly(model, update, max_evaluations=3)
    assert result.diagnostics["matched"] == sum(p.requires_grad for p in model.parameters())
    assert model.position_embedding.requires_grad is False


def test_a_cnn_is_attacked_given_the_image_shape() -> None:
    model = SmallCNN().double()
    pixels, labels = victim(size=6)
    update = client_update(model, pixels, labels)
    with pytest.raises(AttackNotApplicable, match="image_shape"):
        quietly(model, update)
    result = quietly(model, update, image_shape=(1, 6, 6), preprocessing=UNIT, max_evaluations=300)
    assert result.labels.tolist() == [1]
    assert "recovered, exact" in result.diagnostics["labels"]
    assert psnr(result.pixels, pixels).item() > 30


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_models_with_fused_attention(library: str) -> None:
    """Their kernels have no second derivative; the search must take the plain path, in eval mode
    too.
    """
    if library == "torchvision":
        from torchvision.models import VisionTransformer as Other

        with torch.random.fork_rng():
            torch.manual_seed(0)
            other = Other(
                image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4
            )
            nn.init.normal_(other.heads.head.weight, std=0.3)
    else:
        timm = pytest.importorskip("timm")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            other = timm.models.vision_transformer.VisionTransformer(
                img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=4, weight_init="jax"
            )
            nn.init.normal_(other.head.weight, std=0.3)
    model = other.double().eval()
    pixels, labels = victim(size=8, channels=3)
    update = client_update(model, HALF.to_input(pixels), labels)
    result = quietly(model, update, max_evaluations=30)
    losses = [entry["loss"] for entry in result.history]
    assert min(losses) < losses[0] / 3


def test_row_space_is_idle_where_it_restricts_nothing() -> None:
    model = small_vit()  # four patches of four pixels
    _, update = attacked(model)
    one, other = (
        quietly(model, update, recipe=replace(APRIL, row_space=on), max_evaluations=5) for on in (True, False)
    )
    assert one.diagnostics["directions"] is None
    assert torch.equal(one.images, other.images)


def test_labels_are_recovered_where_the_head_is_shared() -> None:
    model = small_vit()
    _, update = attacked(model)
    result = quietly(model, update, max_evaluations=3)
    assert result.labels.tolist() == [1]
    assert result.diagnostics["labels"].startswith("recovered, exact")


def test_labels_are_optimized_where_the_head_is_withheld() -> None:
    model = small_vit()
    _, update = attacked(model)
    headless = update.without(["head.weight", "head.bias"])
    result = quietly(model, headless, max_evaluations=100)
    assert "optimized along with the pictures, since they cannot be recovered" in result.diagnostics["labels"]
    assert result.labels.shape == (1,)
    assert result.labels.tolist() == [1]


def test_dlg_takes_labels_that_are_handed_over() -> None:
    model = small_vit()
    _, update = attacked(model)
    result = quietly(model, update, recipe="dlg", labels=torch.tensor([3]), max_evaluations=3)
    assert result.labels.tolist() == [3]
    assert result.diagnostics["labels"] == "known to the attacker"


# --- The copy that is searched on -------------------------------------------------------------------------------


def posed(model: nn.Module, update: ClientUpdate, **options: object) -> Problem:
    settings = {
        "labels": None, "batch_size": None, "image_shape": None, "coordinates": None, "device": None, "anatomy": None,
        "loss": nn.functional.cross_entropy, "dtype": torch.float64, "preprocessing": None, "seed": 0,
    }  # fmt: skip
    return pose(model, update, Recipe(), **{**settings, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_patch_embedding_is_a_linear_layer_with_the_convolutions_gradients(channels: int) -> None:
    model = small_vit(image_size=8, patch_size=4, channels=channels)
    pixels, update = attacked(model, size=8, channels=channels)
    problem = posed(model, update)
    assert type(problem.model.patch_embedding) is not type(model.patch_embedding) is nn.Conv2d
    gradients = problem.gradients(HALF.to_input(pixels), None)
    for mine, shared in zip(gradients, update.gradients.values(), strict=True):
        torch.testing.assert_close(mine.detach(), shared)
    odd = torch.zeros(1, channels, 9, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="images must be"):  # the model's own check still stands
        problem.model(odd)


def test_only_what_is_matched_requires_a_gradient() -> None:
    model = small_vit()
    _, update = attacked(model)
    problem = posed(model, update.without(["position_embedding"]))
    wanted = {name for name, p in problem.model.named_parameters() if p.requires_grad}
    assert wanted == set(update.gradients) - {"position_embedding"}
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_draws_the_same_mask_at_every_evaluation() -> None:
    model = nn.Sequential(small_vit(), nn.Dropout(0.5)).train()
    pixels, labels = victim()
    update = client_update(model, HALF.to_input(pixels), labels)
    problem = posed(model, update, labels=labels)
    state = torch.get_rng_state()
    with undisturbed(problem.device):
        one, two = (problem.evaluate(HALF.to_input(pixels)[None], None) for _ in range(2))
        other = replace(problem, seed=1).evaluate(HALF.to_input(pixels)[None], None)
    assert torch.equal(one.loss, two.loss)
    assert not torch.equal(one.loss, other.loss)
    assert torch.equal(state, torch.get_rng_state())
