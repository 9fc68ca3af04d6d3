"""Labels from the head's gradient, and what tells one image from several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import private_batch, randomize, tiny_vit
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

from aprillab.anatomy import dissect
from aprillab.attacks.evidence import is_batch, one_image_residual
from aprillab.attacks.labels import labels_or_none, recover_labels
from aprillab.attacks.result import AttackNotApplicable
from aprillab.update import ClientUpdate, UpdateError, client_update

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def zero_head() -> nn.Module:
    """torchvision's ViT as it comes: the head is zero."""
    model = TorchvisionViT(
        image_size=8, patch_size=4, num_layers=1, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=5
    )
    assert not model.heads.head.weight.any()
    return model


def hugging() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, num_labels=5
    )
    return randomize(transformers.ViTForImageClassification(config), std=0.05)


def distilled() -> nn.Module:
    return timm.create_model("deit_tiny_distilled_patch16_224", depth=1, img_size=32, num_classes=5).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "own": tiny_vit,
    "own april": lambda: tiny_vit(block="april"),
    "own mean of tokens": lambda: tiny_vit(class_token=False),
    "own no bias": lambda: tiny_vit(bias=False),
    "own no bias, float32": lambda: tiny_vit(torch.float32, bias=False),
    "own, float32": lambda: tiny_vit(torch.float32),
    "torchvision, zero head": zero_head,
    "timm": lambda: timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5),
    "timm distilled": distilled,
    "transformers": hugging,
}


def anonymous(update: ClientUpdate) -> ClientUpdate:
    """The same gradients from a client that doesn't say how many images there were."""
    return replace(update, batch_size=None)


def update_for(model: nn.Module, labels: list[int], seed: int = 0) -> ClientUpdate:
    images, _ = private_batch(model, len(labels), seed)
    return anonymous(client_update(model, images, torch.tensor(labels)))


# --- One image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", MODELS)
def test_the_label_of_one_image_is_exact(which: str) -> None:
    model = MODELS[which]()
    for label in range(5):
        update = update_for(model, [label], seed=label)
        found = recover_labels(model, update)
        assert found.labels.tolist() == [label]
        assert found.labels.dtype == torch.int64
        assert found.exact, found.reason
        assert found.diagnostics["negative_entries"] == 1
        assert "1 negative entry" in found.reason
        assert ("weight" in found.diagnostics["source"]) == ("no bias" in which)
        assert is_batch(dissect(model), update)[0] is False


def test_the_weight_alone_gives_the_same_label_whatever_the_features_sign() -> None:
    for seed in range(6):
        model = tiny_vit(seed=seed)
        for label in range(5):
            update = update_for(model, [label], seed=seed).without(["head.bias"])
            found = recover_labels(model, update)
            assert found.labels.tolist() == [label]
            assert found.exact
            mirrored = {**update.gradients, "head.weight": update.gradients["head.weight"].flip(1)}
            assert recover_labels(model, replace(update, gradients=mirrored)).labels.tolist() == [label]


def test_row_sums_of_the_weight_are_no_rule_on_a_vit() -> None:
    """Much code named after iDLG takes the row with the lowest sum. That needs features that are not negative, as
    after a ReLU; here a LayerNorm makes them sum to zero, and the rule reads rounding."""
    wrong = 0
    for seed in range(20):
        model = tiny_vit(torch.float32, seed=seed, classes=10)
        label = seed % 10
        update = update_for(model, [label], seed=seed)
        weight = update.gradients["head.weight"]
        assert weight.sum(1).abs().max() < 1e-5 * weight.abs().sum(1).max(), "features do not sum to zero"
        wrong += int(weight.sum(1).argmin()) != label
        assert recover_labels(model, update.without(["head.bias"])).labels.tolist() == [label]
    assert wrong >= 5


def test_smoothed_labels_make_more_entries_negative_and_the_least_is_the_label() -> None:
    def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)

    several = 0
    for seed in range(6):
        model = tiny_vit(seed=seed)
        for label in range(5):
            images, _ = private_batch(model, 1, seed)
            found = recover_labels(model, client_update(model, images, torch.tensor([label]), loss=smoothed))
            assert found.labels.tolist() == [label]
            several += found.diagnostics["negative_entries"] > 1
            assert found.exact == (found.diagnostics["negative_entries"] == 1)
    assert several > 3


def test_two_classes_need_the_bias() -> None:
    model = tiny_vit(classes=2)
    for label in (0, 1):
        update = update_for(model, [label])
        assert recover_labels(model, update).labels.tolist() == [label]
        with pytest.raises(AttackNotApplicable, match=r"either may be the label \(2 classes\)"):
            recover_labels(model, update.without(["head.bias"]))


# --- One image or more ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("labels", [[2, 2], [1, 3], [4, 4, 4, 4]])
@pytest.mark.parametrize("which", ["own", "own no bias", "own april", "timm", "transformers"])
def test_a_batch_is_detected(which: str, labels: list[int], dtype: torch.dtype) -> None:
    model = MODELS[which]().to(dtype)
    update = update_for(model, labels)
    batch, why = is_batch(dissect(model), update)
    assert batch, why
    assert ("misses rank one by" in why) or ("labels" in why)
    assert not recover_labels(model, update).exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_pictures_that_are_almost_the_same_are_still_two(dtype: torch.dtype) -> None:
    model = tiny_vit(dtype)
    images, _ = private_batch(model)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    near = torch.cat([images, images + 1e-2 * noise])
    update = anonymous(client_update(model, near, torch.tensor([2, 2])))
    assert is_batch(dissect(model), update)[0]


def test_batches_that_nothing_in_the_heads_gradient_can_tell() -> None:
    """Where all r are the same, Σ r fᵀ = r (Σ f)ᵀ is rank one: the limit that ``is_batch`` states."""
    model = zero_head()
    assert not is_batch(dissect(model), update_for(model, [2, 2]))[0]
    assert is_batch(dissect(model), update_for(model, [2, 3]))[0]
    model = tiny_vit()
    images, _ = private_batch(model)
    twice = anonymous(client_update(model, torch.cat([images, images]), torch.tensor([2, 2])))
    assert not is_batch(dissect(model), twice)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_image_in_any_precision_is_no_batch(dtype: torch.dtype) -> None:
    for seed in range(5):
        model = tiny_vit(torch.promote_types(dtype, torch.float32), classes=10, seed=seed)
        update = update_for(model, [seed], seed=seed).to(dtype=dtype)
        batch, why = is_batch(dissect(model), update)
        assert not batch, why
        assert recover_labels(model, update).labels.tolist() == [seed]


def test_a_difference_of_states_may_be_rounded_further_than_a_gradient() -> None:
    model = tiny_vit(torch.float32)
    update, lr = update_for(model, [2]), 1e-3
    weights = dict(model.named_parameters())
    rounded = {n: ((weights[n] - (weights[n] - lr * g)) / lr).detach() for n, g in update.gradients.items()}
    residual = one_image_residual(rounded["head.weight"])
    eps = torch.finfo(torch.float32).eps
    assert 30 * eps < residual < 1e3 * eps, "not what this test is about any more"
    assert not is_batch(dissect(model), ClientUpdate(rounded, source="fedavg"))[0]
    assert recover_labels(model, ClientUpdate(rounded, source="fedavg")).exact


def test_the_client_is_believed_when_it_says_batch_but_not_when_it_says_one() -> None:
    model = tiny_vit()
    one = update_for(model, [2])
    assert is_batch(dissect(model), replace(one, batch_size=2)) == (True, "the client says batch_size=2")
    two = replace(update_for(model, [2, 2]), batch_size=1)
    assert is_batch(dissect(model), two)[0]
    assert not recover_labels(model, two).exact


def test_without_the_heads_weight_nothing_is_checked_and_that_is_said() -> None:
    model = tiny_vit()
    update = update_for(model, [2]).without(["head.weight"])
    batch, why = is_batch(dissect(model), update)
    assert not batch
    assert "not checked" in why
    assert "not checked" in recover_labels(model, update).reason


def test_the_residual_is_the_distance_to_the_nearest_outer_product_through_the_largest_row() -> None:
    generator = torch.Generator().manual_seed(0)
    r, f, g = (torch.randn(k, dtype=torch.float64, generator=generator) for k in (5, 7, 7))
    assert one_image_residual(torch.outer(r, f)) < 1e-15
    g -= (g @ f) / (f @ f) * f
    g /= g.norm()
    big = torch.zeros(5, dtype=torch.float64)
    big[3] = 10.0
    small = torch.zeros(5, dtype=torch.float64)
    small[1] = 0.3
    mixture = torch.outer(big, f / f.norm()) + torch.outer(small, g)
    assert one_image_residual(mixture) == pytest.approx(0.3 / (100 + 0.09) ** 0.5)
    assert one_image_residual(torch.zeros(5, 7)) == 0


# --- Batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [1, 1, 4, 4], [2, 2, 2, 2], [0, 3, 3, 3], [7, 2, 7, 9]])
@pytest.mark.parametrize("which", ["own", "torchvision"])
def test_labels_of_a_batch_are_counted_on_an_untrained_model(which: str, labels: list[int]) -> None:
    if which == "own":
        model: nn.Module = tiny_vit(classes=10)
        with torch.no_grad():  # logits near zero, as a fresh classifier's are
            model.head.weight.mul_(0.1)
    else:
        model = TorchvisionViT(
            image_size=8, patch_size=4, num_layers=1, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=10
        )
    update = update_for(model, labels)
    found = recover_labels(model, update, batch_size=4)
    assert found.labels.tolist() == sorted(labels)
    assert not found.exact
    claimed = recover_labels(model, replace(update, batch_size=4))
    assert claimed.labels.tolist() == sorted(labels)
    assert found.diagnostics["negative_entries"] == len(set(labels))


def test_a_zero_head_shares_the_label_counts_and_nothing_below() -> None:
    model = zero_head()
    update = update_for(model, [1, 1, 3])
    expected = torch.full((5,), 0.2)
    expected[1] -= 2 / 3
    expected[3] -= 1 / 3
    torch.testing.assert_close(update.gradients["heads.head.bias"], expected)
    assert not any(g.any() for name, g in update.gradients.items() if not name.startswith("heads"))


# --- Refusals ---------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model = tiny_vit()
    update = update_for(model, [2])
    with pytest.raises(AttackNotApplicable, match="head's bias gradient is not in the update"):
        recover_labels(model, update.without(["head.bias", "head.weight"]))
    with pytest.raises(AttackNotApplicable, match="head's bias gradient is not in the update"):
        recover_labels(model, update_for(model, [1, 2]).without(["head.bias"]), batch_size=2)
    zero = {**update.gradients, "head.bias": torch.zeros(5), "head.weight": torch.zeros(5, 24)}
    with pytest.raises(AttackNotApplicable, match="head's gradient is zero"):
        recover_labels(model, replace(update, gradients=zero))
    with pytest.raises(AttackNotApplicable, match="head's gradient is zero"):
        recover_labels(model, replace(update, gradients=zero).without(["head.bias"]))
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size={size} must be positive"):
            recover_labels(model, update, batch_size=size)
    with pytest.raises(UpdateError, match="do not belong together"):
        recover_labels(tiny_vit(depth=1), update)
    poisoned = {**update.gradients, "head.bias": torch.full((5,), float("nan"))}
    with pytest.raises(UpdateError, match="NaN or infinite"):
        recover_labels(model, replace(update, gradients=poisoned))


def test_labels_for_a_reconstruction() -> None:
    model = tiny_vit()
    update = update_for(model, [3])
    anatomy = dissect(model)
    given: Tensor = torch.tensor([1])
    said = "known to the attacker; but the head's gradient says 3"
    assert labels_or_none(model, update, anatomy, given) == (given, said)
    right: Tensor = torch.tensor([3])
    assert labels_or_none(model, update, anatomy, right) == (right, "known to the attacker")
    labels, how = labels_or_none(model, update, anatomy, None)
    assert labels is not None
    assert labels.tolist() == [3]
    assert how.startswith("recovered, exact: head bias gradient: 1 negative entry")
    assert "not certain" in labels_or_none(model, update_for(model, [1, 1]), anatomy, None)[1]
    nothing = update.without(["head.bias", "head.weight"])
    assert labels_or_none(model, nothing, anatomy, None) == (None, "the head's bias gradient is not in the update")
