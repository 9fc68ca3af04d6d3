"""Gradient matching: the objectives against direct formulas, the search's promises, and what it recovers."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from aprillab.attacks.result import AttackNotApplicable
from aprillab.attacks.searches import objectives
from aprillab.attacks.searches.coordinates import Coordinates
from aprillab.attacks.searches.match import match_gradients
from aprillab.attacks.searches.recipes import APRIL, GRADINVERSION, RECIPES, Adam, PositionTerm, Priors, Recipe
from aprillab.metrics import match_batch, psnr
from aprillab.models import VisionTransformer, patchify
from aprillab.preprocessing import HALF, UNIT
from aprillab.update import ClientUpdate, UpdateError, client_update


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def small_vit(**options: object) -> VisionTransformer:
    """Four patches of four pixels: an evaluation takes milliseconds."""
    sizes = {"image_size": 4, "patch_size": 2, "channels": 1, "width": 16, "depth": 1, "heads": 2, "classes": 4}
    return VisionTransformer(**{**sizes, **options}, seed=1).double()  # type: ignore[arg-type]


def victim(batch: int = 1, size: int = 4, channels: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.rand(batch, channels, size, size, generator=generator(seed), dtype=torch.float64)
    return pixels, torch.arange(batch) + 1


def attacked(model: nn.Module, batch: int = 1, **options: object) -> tuple[torch.Tensor, ClientUpdate]:
    """Pixels and their update, from a client whose model input is HALF's."""
    pixels, labels = victim(batch, **options)  # type: ignore[arg-type]
    return pixels, client_update(model, HALF.to_input(pixels), labels)


def quietly(*arguments: object, **options: object) -> object:
    return match_gradients(*arguments, progress=False, **options)  # type: ignore[arg-type]


# --- Objectives -------------------------------------------------------------------------------------------------

SHAPES = ((3, 4), (5,), (2, 3, 2, 2))
GRADIENTS = [randn(*shape, seed=i) for i, shape in enumerate(SHAPES)]
TARGETS = [randn(*shape, seed=10 + i) for i, shape in enumerate(SHAPES)]


def flat(tensors: list[torch.Tensor]) -> list[float]:
    return [value for tensor in tensors for value in tensor.flatten().tolist()]


def test_distances_by_their_formulas() -> None:
    g, t = flat(GRADIENTS), flat(TARGETS)
    squared = sum((a - b) ** 2 for a, b in zip(g, t, strict=True))
    absolute = sum(abs(a - b) for a, b in zip(g, t, strict=True))
    dot = sum(a * b for a, b in zip(g, t, strict=True))
    norms = math.sqrt(sum(a * a for a in g) * sum(b * b for b in t))
    relative = 0.0
    for one, other in zip(GRADIENTS, TARGETS, strict=True):
        difference = sum((a - b) ** 2 for a, b in zip(flat([one]), flat([other]), strict=True))
        relative += difference / sum(b * b for b in flat([other])) / len(TARGETS)
    assert objectives.l2(GRADIENTS, TARGETS).item() == pytest.approx(squared)
    assert objectives.l2_l1(GRADIENTS, TARGETS, l1_weight=0.3).item() == pytest.approx(squared + 0.3 * absolute)
    assert objectives.cosine(GRADIENTS, TARGETS).item() == pytest.approx(1 - dot / norms)
    assert objectives.relative_l2(GRADIENTS, TARGETS).item() == pytest.approx(relative)


def test_a_tensor_of_rounding_noise_does_not_drown_the_others() -> None:
    noise, other_noise = 1e-17 * randn(6, seed=1), 1e-17 * randn(6, seed=2)
    with_noise = objectives.relative_l2([*TARGETS, other_noise], [*TARGETS, noise])
    assert with_noise.item() < 1e-9


@pytest.mark.parametrize("eps", [None, torch.finfo(torch.float32).eps, 1e-2])
def test_tensors_below_the_rounding_of_what_was_shared_are_left_out(eps: float | None) -> None:
    """Below ε^¾ of the largest norm; ε is the update's, and that of the dtype where none is given."""
    floor = 5.0 * (eps or torch.finfo(torch.float64).eps) ** 0.75
    directions = [g / g.norm() for g in GRADIENTS]
    for factor, others in ((0.99, 0.0), (1.01, 4.0)):
        targets = [5.0 * directions[0], factor * floor * directions[1], 2.0 * directions[2]]
        # Off by the target's own norm, by twice, and by nothing: relative squares of 1, 4 and 0.
        gradients = [2 * targets[0], 3 * targets[1], targets[2]]
        found = objectives.relative_l2(gradients, targets, eps=eps).item()
        assert found == pytest.approx((1 + others) / 3)  # a mean over all tensors, those left out included
    inputs = [g.clone().requires_grad_() for g in gradients]
    targets[1] = 0.5 * targets[1]
    (slope,) = torch.autograd.grad(objectives.relative_l2(inputs, targets, eps=eps), inputs[1])
    assert not slope.any()


def test_matching_knows_in_which_precision_the_update_was_shared() -> None:
    """A key bias has no gradient but rounding; in float64 that of a float32 client would seem to be something."""
    model = small_vit().float()
    pixels, labels = victim()
    update = client_update(model, HALF.to_input(pixels).float(), labels)
    trial = HALF.to_input(victim(seed=9)[0])
    mine = client_update(copy.deepcopy(model).double(), trial, labels)
    pairs = [list(mine.gradients.values()), [g.double() for g in update.gradients.values()]]
    expected = objectives.relative_l2(*pairs, eps=torch.finfo(torch.float32).eps).item()
    assert abs(expected / objectives.relative_l2(*pairs).item() - 1) > 0.01
    result = quietly(model, update, start=trial, max_evaluations=1)
    assert result.diagnostics["terms"]["distance"] == pytest.approx(expected, rel=1e-6)


def test_position_cosine_per_token_and_whole() -> None:
    g, t = randn(1, 3, 5, seed=3), randn(1, 3, 5, seed=4)
    t[0, 0] *= 100
    rows = [1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(g[0], t[0], strict=True)]
    assert objectives.position_cosine(g, t).item() == pytest.approx(sum(rows) / 3)
    assert objectives.position_cosine(g, t, per_token=False).item() == pytest.approx(
        1 - float((g * t).sum() / (g.norm() * t.norm()))
    )
    swapped = t[:, [0, 2, 1]]
    # Where the class token's row outweighs the others, only the first of the two sees that two tokens are swapped.
    assert objectives.position_cosine(swapped, t).item() > 0.1
    assert objectives.position_cosine(swapped, t, per_token=False).item() < 1e-3


def test_position_cosine_of_a_zero_row_is_finite() -> None:
    g = randn(1, 3, 5, seed=3)
    g[0, 1] = 0
    g.requires_grad_()
    value = objectives.position_cosine(g, randn(1, 3, 5, seed=4))
    (gradient,) = torch.autograd.grad(value, g)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_priors_by_their_formulas() -> None:
    x = randn(2, 3, 4, 5, seed=5)
    vertical = [abs(float(x[b, c, i + 1, j] - x[b, c, i, j])) for b in range(2) for c in range(3) for i in range(3) for j in range(5)]  # fmt: skip  # noqa: E501
    horizontal = [abs(float(x[b, c, i, j + 1] - x[b, c, i, j])) for b in range(2) for c in range(3) for i in range(4) for j in range(4)]  # fmt: skip  # noqa: E501
    expected = sum(vertical) / len(vertical) + sum(horizontal) / len(horizontal)
    assert objectives.total_variation(x).item() == pytest.approx(expected)
    assert objectives.image_norm(x).item() == pytest.approx(sum(v * v for v in flat([x])) / x.numel())
    pixels = torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.0], dtype=torch.float64).reshape(1, 1, 1, 5)
    assert objectives.outside_box(HALF.to_input(pixels), HALF).item() == pytest.approx((0.25 + 1) / 5)
    group = torch.stack([torch.zeros(1, 1, 2, 2), 2 * torch.ones(1, 1, 2, 2)])
    assert objectives.group_spread(group).item() == pytest.approx(1)


@pytest.mark.parametrize("name", objectives.DISTANCES)
def test_gradients_of_distances(name: str) -> None:
    inputs = tuple(g.clone().requires_grad_() for g in GRADIENTS)
    assert torch.autograd.gradcheck(lambda *g: objectives.DISTANCES[name](g, TARGETS), inputs)


def test_gradients_of_priors() -> None:
    x = randn(2, 1, 3, 3, seed=6).requires_grad_()
    for prior in (objectives.total_variation, objectives.image_norm, lambda v: objectives.outside_box(v, UNIT)):
        assert torch.autograd.gradcheck(prior, (x,))
    g, t = randn(1, 3, 4, seed=7).requires_grad_(), randn(1, 3, 4, seed=8)
    for per_token in (True, False):
        check = lambda v, per=per_token: objectives.position_cosine(v, t, per_token=per)  # noqa: E731
        assert torch.autograd.gradcheck(check, (g,))
    assert torch.autograd.gradcheck(objectives.group_spread, (randn(3, 1, 1, 2, 2).requires_grad_(),))


def test_the_whole_loss_and_its_gradient() -> None:
    """The objective as the search sees it, against client_update and finite differences, all terms on."""
    model = small_vit()
    _, update = attacked(model)
    trial = HALF.to_input(victim(seed=9)[0])
    mine = client_update(model, trial, torch.tensor([1]))
    seen: list[dict] = []

    def distance(gradients: tuple, targets: list) -> torch.Tensor:
        for a, b in zip(gradients, mine.gradients.values(), strict=True):
            torch.testing.assert_close(a, b)
        return objectives.l2(gradients, targets)

    weights = {"position": 0.7, "total_variation": 0.3, "image_norm": 0.2, "box": 5.0}
    recipe = Recipe(
        distance=distance,
        position_term=PositionTerm(weight=0.7),
        priors=Priors(total_variation=0.3, image_norm=0.2, box=5.0),
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


# --- What it recovers -------------------------------------------------------------------------------------------


def smooth_victim(size: int = 6) -> torch.Tensor:
    ramp = torch.linspace(0, 1, size, dtype=torch.float64)
    return (0.2 + 0.3 * ramp[:, None] + 0.4 * ramp[None, :].square())[None, None]


# dB: the lowest of three seeds as measured (in the comment) less about a third, for another machine's rounding.
BARS = {
    "dlg": 40,  # 58.5
    "idlg": 150,  # 256.5
    "inverting_gradients": 15,  # 21.1: total variation costs it the rest
    "tag": 65,  # 103.2
    "gradinversion": 30,  # 46.9: 100 evaluations for each of its three runs
    "april": 150,  # 263.3
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_reach_their_bar_on_a_cnn(recipe: str) -> None:
    model = SmallCNN().double()
    pixels, label = smooth_victim(), torch.tensor([1])
    update = client_update(model, pixels, label)
    result = quietly(
        model, update, recipe=recipe, image_shape=(1, 6, 6), preprocessing=UNIT, max_evaluations=300, seed=1
    )
    assert psnr(result.pixels, pixels).item() >= BARS[recipe]
    assert result.labels.tolist() == [1]
    assert result.attack == f"match_gradients({recipe})"
    assert result.exact is False
    assert "twin" in result.reason


def test_april_on_a_vit() -> None:
    model = small_vit(image_size=8, patch_size=4)
    pixels, update = attacked(model, size=8)
    # So narrow a model has bad minima near most noise: start from a noisy guess.
    start = HALF.to_input(pixels) + 0.5 * randn(*pixels.shape, seed=5)
    result = quietly(model, update, start=start, max_evaluations=300, tolerance=1e-6)
    assert psnr(result.pixels, pixels).item() > 60
    assert result.images.dtype == torch.float64
    torch.testing.assert_close(HALF.to_pixels(result.images), result.pixels)
    # Four patches of 16 pixels: the search went through 4 coefficients a patch, and the truth lies there.
    assert result.diagnostics["directions"] == 4
    rows = update.gradients["patch_embedding.weight"].flatten(1)
    for images in (result.images, HALF.to_input(pixels)):
        patches = patchify(images, 4)[0]
        outside = patches - patches @ torch.linalg.pinv(rows, rtol=1e-10) @ rows
        assert outside.norm() < 1e-8 * patches.norm()


def test_row_space_is_idle_where_it_restricts_nothing() -> None:
    model = small_vit()  # four patches of four pixels
    _, update = attacked(model)
    one, other = (
        quietly(model, update, recipe=replace(APRIL, row_space=on), max_evaluations=5) for on in (True, False)
    )
    assert one.diagnostics["directions"] is None
    assert torch.equal(one.images, other.images)


def test_a_batch_with_known_labels() -> None:
    model = SmallCNN().double()
    pixels, labels = victim(batch=2, size=6)
    update = client_update(model, pixels, labels)
    result = quietly(model, update, labels=labels, image_shape=(1, 6, 6), preprocessing=UNIT, max_evaluations=150)
    order = match_batch(result.pixels, pixels)
    assert psnr(result.pixels[order], pixels).min().item() > 25
    assert result.diagnostics["labels"] == "known to the attacker"
    assert result.diagnostics["batch_size"] == 2


def test_dlg_takes_a_batch_in_colour() -> None:
    """In colour, the pictures' gradient has its channels last in memory, and L-BFGS takes views of it."""
    model = small_vit(channels=3)
    _, update = attacked(model, batch=2, channels=3)
    result = quietly(model, update, recipe="dlg", max_evaluations=8)
    assert result.images.shape == (2, 3, 4, 4)
    assert result.labels.shape == (2,)
    assert result.diagnostics["loss"] < result.history[0]["loss"]


def test_withheld_tensors_are_not_matched_and_alpha_is_said_to_be_idle() -> None:
    model = small_vit()
    _, update = attacked(model)
    less = update.without(["position_embedding", "blocks.0.mlp.0.weight"])
    result = quietly(model, less, max_evaluations=150)
    assert result.diagnostics["matched"] == len(update.gradients) - 2
    assert "position" not in result.diagnostics["terms"]
    assert "α has no effect" in result.reason
    # What is matched is what is there: the distance is the mean over the shared tensors, and it falls.
    trial = client_update(model, result.images, torch.tensor([1]))
    shared = [trial.gradients[name] for name in less.gradients]
    expected = objectives.relative_l2(shared, list(less.gradients.values())).item()
    assert result.diagnostics["terms"]["distance"] == pytest.approx(expected)
    assert expected < result.history[0]["loss"] / 20


def test_only_the_head_shared_matches_the_head() -> None:
    model = small_vit()
    _, update = attacked(model)
    kept = update.without([name for name in update.gradients if not name.startswith("head")])
    result = quietly(model, kept, max_evaluations=100)
    assert result.diagnostics["matched"] == 2
    assert result.diagnostics["loss"] < result.history[0]["loss"] / 100


class SmallCNN(nn.Module):
    """Sigmoids, as in DLG's LeNet: a second derivative that is not zero almost everywhere."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = nn.Sequential(
                nn.Conv2d(1, 6, 3, padding=1), nn.Sigmoid(), nn.Conv2d(6, 6, 3, padding=1), nn.Sigmoid()
            )
            self.classifier = nn.Linear(6 * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


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
    """Their kernels have no second derivative; the search must take the plain path, in eval mode too."""
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


# --- Labels -----------------------------------------------------------------------------------------------------


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


# --- The search -------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others() -> None:
    model = small_vit()
    _, update = attacked(model)
    one, two, other = (quietly(model, update, max_evaluations=30, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.images, two.images)
    assert [e["loss"] for e in one.history] == [e["loss"] for e in two.history]
    assert not torch.equal(one.images, other.images)


def test_the_callers_model_and_generator_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 4))
    model = model.train()
    model[4].weight.grad = torch.ones_like(model[4].weight)
    pixels, labels = victim(batch=2)
    update = client_update(model, pixels.float(), labels)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    trained = [p.requires_grad for p in model.parameters()]
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    # With unknown labels the model is also asked how many classes it has.
    options = {"recipe": "gradinversion", "labels": "optimize", "image_shape": (1, 4, 4), "preprocessing": UNIT}
    one = quietly(model, update, max_evaluations=9, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert (threads, default) == (torch.get_num_threads(), torch.get_default_dtype())
    assert model.training
    assert trained == [p.requires_grad for p in model.parameters()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))
    assert model[0].weight.grad is None
    torch.rand(3)  # dropout's mask comes from the seed, not from the caller's generator
    two = quietly(model, update, max_evaluations=9, **options)
    assert torch.equal(one.images, two.images)


def test_frozen_parameters_of_the_model_stay_unmatched() -> None:
    model = small_vit(position="frozen")
    _, update = attacked(model)
    result = quietly(model, update, max_evaluations=3)
    assert result.diagnostics["matched"] == sum(p.requires_grad for p in model.parameters())
    assert model.position_embedding.requires_grad is False


@pytest.mark.parametrize("recipe", [APRIL, replace(APRIL, optimizer=Adam(), restarts=3), GRADINVERSION])
def test_the_evaluation_budget_is_kept(recipe: Recipe) -> None:
    model = small_vit()
    _, update = attacked(model)
    calls = []
    distance = lambda g, t: (calls.append(1), objectives.l2(g, t))[1]  # noqa: E731
    result = quietly(model, update, recipe=replace(recipe, distance=distance), max_evaluations=20)
    assert 18 <= len(calls) <= 20
    assert result.diagnostics["evaluations"] == len(calls)
    assert result.diagnostics["stopped"] == "evaluations"
    assert result.history[-1]["evaluation"] == len(calls)


def test_the_time_budget_is_kept() -> None:
    model = small_vit()
    _, update = attacked(model)
    result = quietly(model, update, max_evaluations=None, max_seconds=0.5)
    assert result.diagnostics["stopped"] == "seconds"
    assert 0.4 < result.seconds < 3
    assert result.diagnostics["evaluations"] > 3
    with pytest.raises(ValueError, match="max_evaluations"):
        quietly(model, update, max_evaluations=None)


def test_restarts_share_the_budget_and_the_best_is_kept() -> None:
    model = small_vit()
    _, update = attacked(model)
    result = quietly(model, update, recipe=Recipe(restarts=3), max_evaluations=90)
    runs = result.diagnostics["restarts"]
    assert [run["evaluations"] for run in runs] == [30, 30, 30]
    assert {entry["restart"] for entry in result.history} == {0, 1, 2}
    assert len({entry["loss"] for entry in result.history if entry["evaluation"] in (1, 31, 61)}) == 3
    best = min(range(3), key=lambda k: runs[k]["loss"])
    assert result.diagnostics["best_restart"] == best
    assert result.diagnostics["loss"] == runs[best]["loss"] == min(e["loss"] for e in result.history)
    again = quietly(model, update, recipe=Recipe(), start=result.images, max_evaluations=1)
    assert again.diagnostics["loss"] == pytest.approx(result.diagnostics["loss"])


def test_group_consistency_draws_restarts_together() -> None:
    model = small_vit()
    _, update = attacked(model)
    spreads = {}
    for weight in (1e-9, 10.0):
        recipe = Recipe(priors=Priors(group_consistency=weight), optimizer=Adam(learning_rate=0.05), restarts=3)
        result = quietly(model, update, recipe=recipe, max_evaluations=90)
        spreads[weight] = result.history[-1]["terms"]["group_consistency"]
    assert spreads[10.0] < spreads[1e-9] / 10


def test_ctrl_c_returns_the_best_so_far() -> None:
    model = small_vit()
    _, update = attacked(model)

    def press(entry: dict, images: torch.Tensor) -> None:
        if entry["evaluation"] == 12:
            raise KeyboardInterrupt

    result = quietly(model, update, recipe=replace(APRIL, restarts=4), max_evaluations=500, callback=press)
    assert result.diagnostics["stopped"] == "interrupted"
    assert "interrupted" in result.reason
    assert result.diagnostics["evaluations"] == len(result.history) == 12
    assert result.diagnostics["loss"] == min(entry["loss"] for entry in result.history)


def test_ctrl_c_before_the_first_evaluation_ends_is_not_swallowed_into_nonsense() -> None:
    model = small_vit()
    _, update = attacked(model)

    def distance(g: tuple, t: list) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(AttackNotApplicable, match="interrupted"):
        quietly(model, update, recipe=Recipe(distance=distance))


def test_a_nan_on_the_way_is_survived() -> None:
    model = small_vit()
    _, update = attacked(model)
    calls = []

    def distance(g: tuple, t: list) -> torch.Tensor:
        calls.append(1)
        value = objectives.relative_l2(g, t)
        return value * math.nan if len(calls) in (1, 20) else value

    result = quietly(model, update, recipe=replace(APRIL, distance=distance), max_evaluations=120)
    assert result.diagnostics["divergences"] == 2
    assert result.diagnostics["evaluations"] == 120
    assert len(result.history) == 118
    assert all(math.isfinite(entry["loss"]) for entry in result.history)
    losses = [entry["loss"] for entry in result.history]
    assert result.diagnostics["loss"] == min(losses) < losses[18]
    # It went on from the best before the NaN, not from anew.
    assert losses[18] == pytest.approx(min(losses[:18]))


def test_nothing_but_nan_is_an_error() -> None:
    model = small_vit()
    _, update = attacked(model)
    with pytest.raises(AttackNotApplicable, match="no picture with a finite loss"):
        quietly(model, update, recipe=Recipe(distance=lambda g, t: objectives.l2(g, t) * math.nan))


def test_a_warm_start_at_the_original_ends_at_once() -> None:
    model = small_vit()
    pixels, update = attacked(model)
    result = quietly(model, update, start=HALF.to_input(pixels))
    assert result.diagnostics["evaluations"] == 1
    assert result.diagnostics["stopped"] == "tolerance"
    assert result.diagnostics["residual"] < 1e-14
    assert result.exact is False


def test_a_float32_update_is_matched_in_float64() -> None:
    model = small_vit().float()
    pixels, labels = victim()
    update = client_update(model, HALF.to_input(pixels).float(), labels)
    result = quietly(model, update, start=HALF.to_input(pixels) + 0.01, max_evaluations=100)
    assert result.images.dtype == torch.float64
    assert result.diagnostics["precision"] == "float32"
    assert result.diagnostics["dtype"] == "float64"
    # The client's rounding is a floor; dead tensors, which are rounding alone, do not keep the search from it.
    eps = torch.finfo(torch.float32).eps
    assert eps / 10 < result.diagnostics["residual"] < 100 * eps
    assert psnr(result.pixels, pixels).item() > 70
    assert next(model.parameters()).dtype == torch.float32


# --- Patience ---------------------------------------------------------------------------------------------------


def scripted(*restarts: list[float], rest: float = 9.0) -> objectives.Distance:
    """A distance whose values are read out one by one, whatever the pictures; its gradient is zero."""
    values = iter([value for losses in restarts for value in losses])

    def distance(gradients: tuple, targets: list) -> torch.Tensor:
        return next(values, rest) + 0.0 * gradients[0].sum()

    return distance


def played(
    update: ClientUpdate, model: nn.Module, script: objectives.Distance, parts: dict, **options: object
) -> object:
    """Adam, which stays where it is when the slope is zero; a position term would have one of its own."""
    return quietly(model, update, recipe=Recipe(distance=script, optimizer=Adam(), **parts), **options)


def test_patience_gives_up_what_does_not_halve_and_spends_the_rest_on_the_best() -> None:
    model = small_vit()
    _, update = attacked(model)
    flat = [8.0, 7.0, 6.0, 5.9, 5.8, 5.7]  # not halved in five evaluations after the first
    # Halved at its 6th evaluation, five after the first, and at its 9th; from there on it creeps.
    slow = [6.0, 5.5, 5.0, 4.5, 4.0, 2.9, 2.8, 2.7, 1.4, 1.3, 1.2, 1.1, 1.05, 1.0]
    rising = [7.0] * 6
    script = scripted(flat, slow, rising, [0.9 - 0.01 * i for i in range(50)])
    pictures: list[torch.Tensor] = []
    result = played(
        update, model, script, {"restarts": 3, "patience": 5}, max_evaluations=40,
        callback=lambda _, images: pictures.append(images.clone()),
    )  # fmt: skip
    runs = result.diagnostics["restarts"]
    assert [run["evaluations"] for run in runs] == [6, 14, 6, 14]
    assert [run["ended"] for run in runs] == ["patience", "patience", "patience", "evaluations"]
    assert [run["loss"] for run in runs] == pytest.approx([5.7, 1.0, 7.0, 0.77])
    assert [entry["restart"] for entry in result.history] == [0] * 6 + [1] * 14 + [2] * 6 + [1] * 14
    assert result.diagnostics["best_restart"] == 1
    assert result.diagnostics["evaluations"] == 40
    # The last run began where the best one ended.
    torch.testing.assert_close(pictures[26], pictures[19])
    assert not torch.allclose(pictures[26], pictures[25])
    assert torch.equal(result.images, pictures[-1])


def test_what_keeps_halving_has_the_whole_budget() -> None:
    model = small_vit()
    _, update = attacked(model)
    halving = [2.0 ** -(i / 3) for i in range(60)]  # every fourth evaluation below half of a milestone
    result = played(update, model, scripted(halving), {"restarts": 3, "patience": 4}, max_evaluations=60)
    assert [run["evaluations"] for run in result.diagnostics["restarts"]] == [60]
    assert result.diagnostics["stopped"] == "evaluations"


def test_no_restart_is_begun_after_one_that_matches() -> None:
    model = small_vit()
    pixels, update = attacked(model)
    start = HALF.to_input(pixels) + 1e-5 * randn(*pixels.shape, seed=5)
    result = played(
        update, model, scripted(rest=1.0), {"restarts": 3, "patience": 4}, start=start, max_evaluations=20
    )
    assert result.diagnostics["residual"] < 1e-3
    assert [run["ended"] for run in result.diagnostics["restarts"]] == ["patience", "evaluations"]
    assert {entry["restart"] for entry in result.history} == {0}


def test_a_budget_smaller_than_the_number_of_restarts_is_for_the_first() -> None:
    model = small_vit()
    _, update = attacked(model)
    result = played(update, model, scripted(rest=1.0), {"restarts": 5, "patience": 80}, max_evaluations=2)
    assert [run["evaluations"] for run in result.diagnostics["restarts"]] == [2]
    for parts in ({}, {"priors": Priors(group_consistency=1e-9), "patience": 80}):  # here each needs a share
        with pytest.raises(ValueError, match="each of 5 restarts"):
            quietly(model, update, recipe=Recipe(restarts=5, **parts), max_evaluations=2)


@pytest.mark.parametrize("parts", [{"restarts": 1}, {"restarts": 2, "priors": Priors(group_consistency=1e-9)}])
def test_patience_is_idle_where_no_other_restart_waits(parts: dict) -> None:
    model = small_vit()
    _, update = attacked(model)
    result = played(update, model, scripted(rest=1.0), {"patience": 2, **parts}, max_evaluations=12)
    assert [run["evaluations"] for run in result.diagnostics["restarts"]] == [12]
    assert result.diagnostics["stopped"] == "evaluations"


def test_ctrl_c_under_patience_keeps_the_best_of_all_restarts() -> None:
    model = small_vit()
    _, update = attacked(model)

    def press(entry: dict, images: torch.Tensor) -> None:
        if entry["evaluation"] == 9:
            raise KeyboardInterrupt

    script = scripted([2.0] * 4, [3.0] * 6)
    result = played(update, model, script, {"restarts": 3, "patience": 3}, max_evaluations=60, callback=press)
    assert result.diagnostics["stopped"] == "interrupted"
    assert [run["ended"] for run in result.diagnostics["restarts"]] == ["patience", "patience", "interrupted"]
    assert (result.diagnostics["loss"], result.diagnostics["best_restart"]) == (2.0, 0)


# --- Resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        (APRIL, {}),
        (replace(APRIL, optimizer=Adam(learning_rate=0.02)), {}),
        (APRIL, {"image_size": 16, "patch_size": 8}),  # the row space's case
    ],
)
def test_a_search_goes_on_where_the_earlier_one_ended(recipe: Recipe, sizes: dict) -> None:
    model = small_vit(**sizes)
    _, update = attacked(model, size=sizes.get("image_size", 4))
    one = quietly(model, update, recipe=recipe, max_evaluations=30)
    assert (one.diagnostics["directions"] == 4) == bool(sizes)
    calls: list[int] = []
    two = quietly(
        model, update, recipe=recipe, max_evaluations=50, start=one,
        callback=lambda entry, _: calls.append(entry["evaluation"]),
    )  # fmt: skip
    assert calls == list(range(31, 51))
    assert [entry["evaluation"] for entry in two.history] == list(range(1, 51))
    assert two.history[:30] == one.history
    assert len(one.history) == 30
    assert two.history[30]["loss"] == pytest.approx(one.diagnostics["loss"], rel=1e-6)
    assert two.diagnostics["loss"] < one.diagnostics["loss"]
    assert two.diagnostics["evaluations"] == 50
    assert two.diagnostics["stopped"] == "evaluations"
    runs = two.diagnostics["restarts"]
    assert [run["evaluations"] for run in runs] == [30, 20]
    assert runs[:1] == one.diagnostics["restarts"]
    assert len(one.diagnostics["restarts"]) == 1
    seconds = [entry["seconds"] for entry in two.history]
    assert seconds == sorted(seconds)
    assert two.seconds >= seconds[-1] > seconds[30] >= one.seconds
    rate = two.diagnostics["evaluations_per_second"]
    assert rate == pytest.approx(50 / two.seconds, rel=1e-6)


def test_what_goes_on_is_the_best_restart() -> None:
    model = small_vit()
    _, update = attacked(model)
    one = quietly(model, update, recipe=Recipe(restarts=3), max_evaluations=60)
    two = quietly(model, update, recipe=Recipe(restarts=3), max_evaluations=70, start=one)
    assert {entry["restart"] for entry in two.history[60:]} == {one.diagnostics["best_restart"]}
    assert two.diagnostics["best_restart"] == one.diagnostics["best_restart"]
    assert [run["evaluations"] for run in two.diagnostics["restarts"]] == [20, 20, 20, 10]
    assert two.history[60]["loss"] == pytest.approx(one.diagnostics["loss"], rel=1e-6)


def test_what_goes_on_after_ctrl_c_remembers_labels_and_divergences() -> None:
    model = small_vit()
    _, update = attacked(model)
    headless = update.without(["head.weight", "head.bias"])
    calls = []

    def distance(g: tuple, t: list) -> torch.Tensor:
        calls.append(1)
        return objectives.relative_l2(g, t) * (math.nan if len(calls) == 5 else 1)

    def press(entry: dict, images: torch.Tensor) -> None:
        if entry["evaluation"] == 60:
            raise KeyboardInterrupt

    recipe = replace(APRIL, distance=distance)
    one = quietly(model, headless, recipe=recipe, callback=press)
    assert (one.diagnostics["stopped"], one.diagnostics["divergences"]) == ("interrupted", 1)
    two = quietly(model, headless, recipe=recipe, max_evaluations=80, start=one)
    assert two.diagnostics["divergences"] == 1
    assert two.labels.tolist() == one.labels.tolist()
    # The logits are not in the result, but its label is: far nearer than a new beginning.
    assert two.history[59]["loss"] < one.history[0]["loss"] / 4
    assert two.history[-1]["evaluation"] == 80


def test_budgets_are_those_of_both_searches_together() -> None:
    model = small_vit()
    _, update = attacked(model)
    one = quietly(model, update, max_evaluations=20)
    with pytest.raises(ValueError, match="max_evaluations=20 is the budget of both"):
        quietly(model, update, max_evaluations=20, start=one)
    with pytest.raises(ValueError, match=r"max_seconds=.* is the budget of both"):
        quietly(model, update, max_seconds=one.seconds / 2, start=one)
    limit = one.seconds + 0.2
    two = quietly(model, update, max_evaluations=None, max_seconds=limit, start=one)
    assert two.diagnostics["stopped"] == "seconds"
    assert limit <= two.seconds < limit + 2
    assert two.diagnostics["evaluations"] > 20


def test_a_closed_forms_result_is_where_to_begin_and_its_images_are_no_search() -> None:
    """Three ways to start: pictures, a result without a search behind it, a search to go on from."""
    model = small_vit()
    _, update = attacked(model)
    one = quietly(model, update, max_evaluations=9)
    closed_form = replace(one, attack="embedding_closed_form", diagnostics={}, history=[])
    begun = [quietly(model, update, start=start, max_evaluations=12) for start in (one.images, closed_form)]
    assert torch.equal(begun[0].images, begun[1].images)
    assert [entry["evaluation"] for entry in begun[0].history] == list(range(1, 13))
    assert begun[0].history[0]["loss"] == pytest.approx(one.diagnostics["loss"])
    gone_on = quietly(model, update, start=one, max_evaluations=12)
    assert gone_on.history[:9] == one.history
    assert len(gone_on.diagnostics["restarts"]) == 2


def test_a_start_with_other_pictures_is_refused() -> None:
    model = small_vit()
    _, update = attacked(model)
    one = quietly(model, update, max_evaluations=2)
    two_pictures = torch.zeros(2, 1, 4, 4)
    for start in (two_pictures, replace(one, images=two_pictures), replace(one, images=two_pictures, diagnostics={})):
        with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\)"):
            quietly(model, update, max_evaluations=9, start=start)


def test_snapshots() -> None:
    model = small_vit()
    _, update = attacked(model)
    result = quietly(model, update, snapshots=4, max_evaluations=10)
    assert ["images" in entry for entry in result.history] == [i % 4 == 0 for i in range(10)]
    assert result.history[4]["images"].shape == (1, 1, 4, 4)
    assert {"evaluation", "restart", "loss", "terms", "seconds"} <= set(result.history[0])


def test_grey_is_flatter_than_noise() -> None:
    model = small_vit()
    _, update = attacked(model)
    spread = {
        start: quietly(model, update, start=start, max_evaluations=1, snapshots=1).history[0]["images"].std().item()
        for start in ("noise", "grey")
    }
    assert spread["noise"] == pytest.approx(0.5, rel=0.4)  # 1/4 of the pixels' range is 1/2 of HALF's
    assert 0 < spread["grey"] < 1e-3


def test_noise_keeps_its_energy_in_the_row_space() -> None:
    model = small_vit(image_size=16, patch_size=8)  # four patches of 64 pixels
    _, update = attacked(model, size=16)
    result = quietly(model, update, max_evaluations=1)
    assert result.diagnostics["directions"] == 4
    assert result.images.std().item() == pytest.approx(0.5, rel=0.4)


def test_clamp_keeps_pixels_in_range() -> None:
    model = small_vit()
    _, update = attacked(model)
    outside: list[float] = []
    for clamp in (True, False):
        outside.append(0.0)
        quietly(
            model, update, recipe=Recipe(optimizer=Adam(learning_rate=0.5, clamp=clamp)), max_evaluations=20,
            callback=lambda _, images: outside.append(max(outside.pop(), images.abs().max().item())),
        )  # fmt: skip
    assert outside[0] <= 1 + 1e-12 < outside[1]


def test_the_schedule_cuts_the_step_to_a_tenth_three_times() -> None:
    """Adam's first steps are as long as its learning rate: with a constant slope all of them are."""
    model = small_vit()
    _, update = attacked(model)
    pictures: list[torch.Tensor] = []
    constant = lambda g, t: 0.0 * g[0].sum()  # noqa: E731
    slope = Priors(image_norm=1.0)
    quietly(
        model, update, recipe=Recipe(distance=constant, priors=slope, optimizer=Adam(signed=True, schedule=True)),
        start=torch.full((1, 1, 4, 4), 9.0, dtype=torch.float64), max_evaluations=16,
        callback=lambda _, images: pictures.append(images.clone()),
    )  # fmt: skip
    steps = [(a - b).mean().item() for a, b in pairwise(pictures)]
    # After evaluations 1 to 5, from 6 = 3/8 · 16, from 10 = 5/8 · 16, and from 14 = 7/8 · 16 on.
    assert steps == pytest.approx([0.1] * 5 + [0.01] * 4 + [0.001] * 4 + [0.0001] * 2, rel=1e-6)


# --- What makes no sense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "aprill"}, "recipe='aprill' is neither a Recipe nor one of dlg, "),
        ({"start": "zeros"}, "start='zeros'"),
        ({"start": torch.zeros(1, 1, 5, 5)}, "start has pictures of shape"),
        ({"labels": torch.tensor([1, 2]), "batch_size": 1}, "labels must be 1 integers"),
        ({"labels": torch.tensor([1.0])}, "labels must be"),
        ({"labels": "guess"}, "labels='guess'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_evaluations": 0}, "max_evaluations=0"),
        ({"max_evaluations": None}, "max_evaluations: a limit is needed"),
        ({"recipe": "tag", "max_evaluations": None, "max_seconds": 1.0}, "by the schedule"),
        ({"dtype": torch.float16}, "dtype"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    model = small_vit()
    _, update = attacked(model)
    with pytest.raises(ValueError, match=message):
        quietly(model, update, **options)


def test_coordinates_and_clamped_pixels_exclude_each_other() -> None:
    model = small_vit()
    _, update = attacked(model)
    known = Coordinates(torch.zeros(1, 4), torch.eye(4), 2, (4, 4))
    with pytest.raises(ValueError, match="clamp=True works on pixels"):
        quietly(model, update, recipe="inverting_gradients", coordinates=known)


def test_another_models_update_is_refused() -> None:
    _, update = attacked(small_vit())
    with pytest.raises(UpdateError, match="shape"):
        quietly(small_vit(width=24), update)
