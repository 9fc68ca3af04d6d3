"""DP-SGD: each step is clipped, noisy and counted as it says, it learns, and models
are left or refused.
"""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import Tensor, nn

from aprillab import VisionTransformer
from aprillab.privacy import ModelRefused, OpacusMissing, clipped_gradients, epsilon, train_privately

try:
    import opacus  # noqa: F401
except ImportError:
    HAS_OPACUS = False
else:
    HAS_OPACUS = True
needs_opacus = pytest.mark.skipif(not HAS_OPACUS, reason="needs opacus: pip install -e .[privacy]")
QUIET = {"progress": False, "seed": 0}


def tiny(**options) -> VisionTransformer:  # type: ignore[no-untyped-def]
    shape = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 16, "depth": 1, "heads": 2, "classes": 2}
    return VisionTransformer(**{**shape, **options})


def blobs(count: int, seed: int = 0, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Noise whose class is which half, left or right, is brighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.randn(count, channels, 8, 8, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[..., 4 * int(label) : 4 * int(label) + 4] += 1
    return images, labels


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@needs_opacus
def test_a_step_is_the_sum_of_clipped_gradients_and_noise_of_the_promised_size() -> None:
    """All of 12 images take part; plain SGD with rate 1 then moves by −(Σ clipped + σC ξ)/12."""
    images, labels = blobs(12)
    model, before = tiny(), flat(tiny())
    step = {"epochs": 1, "batch_size": 12, "optimizer": "sgd", "lr": 1.0, "clip": 0.4, **QUIET}
    total = clipped_gradients(model, images, labels, 0.4).sum(0)
    train_privately(model, images, labels, epsilon=math.inf, **step, at_once=5)
    assert torch.allclose(12 * (before - flat(model)), total, atol=1e-4)
    noisy = tiny()
    (entry,) = train_privately(noisy, images, labels, epsilon=0.5, **step)
    noise = 12 * (flat(model) - flat(noisy)) / (entry["noise_multiplier"] * 0.4)
    assert float(noise.std()) == pytest.approx(1.0, abs=4 / math.sqrt(2 * len(noise)))
    assert float(noise.mean()) == pytest.approx(0.0, abs=4 / math.sqrt(len(noise)))
    assert entry["accountant"] == "exact"
    assert entry["epsilon"] == epsilon(entry["noise_multiplier"]) <= 0.5


@needs_opacus
def test_it_learns_within_its_epsilon() -> None:
    model, (images, labels) = tiny().eval(), blobs(400)
    options = {"epochs": 5, "batch_size": 40, "lr": 5e-3, **QUIET}
    history = train_privately(model, images, labels, epsilon=8, test=blobs(100, seed=1), **options)
    assert history[-1]["test_accuracy"] >= 0.9
    spent = [entry["epsilon"] for entry in history]
    assert spent == sorted(spent)
    assert 7.9 < spent[-1] <= 8
    # Nothing of Opacus stays: modes, hooks, fields of parameters, and the class.
    assert not model.training
    assert all(vars(p) == {} for p in model.parameters())
    assert type(model) is VisionTransformer
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())
    copy.deepcopy(model)(images[:1])


@needs_opacus
def test_a_seed_repeats_and_without_one_no_two_trainings_are_alike() -> None:
    images, labels = blobs(8)
    models = [tiny() for _ in range(4)]
    for model, seed in zip(models, (3, 3, None, None), strict=True):
        options = {"epochs": 2, "batch_size": 8, "progress": False, "seed": seed}
        train_privately(model, images, labels, epsilon=1.0, **options)
    first, second, third, fourth = map(flat, models)
    assert torch.equal(first, second)
    assert not torch.equal(third, fourth)
    assert not torch.equal(first, third)


@needs_opacus
def test_a_step_that_draws_nobody_is_noise_alone() -> None:
    from aprillab.privacy import dp_sgd

    model, (images, labels) = tiny(), blobs(8)
    with dp_sgd._private(model, 3.0, 0.5, 1, "sgd", 1.0, seed=0) as run:
        before = flat(model)
        assert dp_sgd._epoch(run, images, labels, rate=0.0, steps=4, at_once=2) == 0.0
        # Momentum 0.9: the i-th noise is added up (1 − 0.9^k)/0.1 times, k the steps that are left.
        weights = [sum(0.9**j for j in range(k)) for k in (4, 3, 2, 1)]
        expected = 1.5 * math.sqrt(sum(w * w for w in weights))
        assert float((flat(model) - before).std()) == pytest.approx(expected, rel=0.06)


@needs_opacus
def test_timm_is_read_as_it_is() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=2
    )
    images, labels = blobs(12)
    before = flat(model)
    total = clipped_gradients(model, images, labels, 0.1).sum(0)
    step = {"epochs": 1, "batch_size": 12, "optimizer": "sgd", "lr": 1.0, "clip": 0.1, **QUIET}
    train_privately(model, images, labels, epsilon=math.inf, **step)
    assert torch.allclose(12 * (before - flat(model)), total, atol=1e-4)


@needs_opacus
def test_torchvision_is_refused_with_the_remedy_and_the_remedy_works() -> None:
    from opacus.validators import ModuleValidator
    from torchvision.models import VisionTransformer as Torchvision

    shape = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    model, (images, labels) = Torchvision(**shape, num_classes=2).eval(), blobs(12, channels=3)
    options = {"epsilon": 8.0, "epochs": 1, "batch_size": 12, **QUIET}
    with pytest.raises(ModelRefused, match=r"MultiheadAttention.*ModuleValidator\.fix\(model\)"):
        train_privately(model, images, labels, **options)
    assert not model.training
    fixed = ModuleValidator.fix(model)
    (entry,) = train_privately(fixed, images, labels, **options)
    assert math.isfinite(entry["loss"])


@needs_opacus
def test_a_parameter_without_a_gradient_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(64, 2), nn.Linear(3, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.used(images.flatten(1))

    model, (images, labels) = Idle(), blobs(8)
    with pytest.raises(ModelRefused, match=r"idle\.weight, idle\.bias \(2 of 4 trained parameters\)"):
        train_privately(model, images, labels, epsilon=1.0, epochs=1, batch_size=8, **QUIET)
    model.idle.requires_grad_(False)
    assert len(train_privately(model, images, labels, epsilon=1.0, epochs=1, batch_size=8, **QUIET)) == 1
    with pytest.raises(ValueError, match="nothing to train"):
        train_privately(model.requires_grad_(False), images, labels, epsilon=1.0, epochs=1, batch_size=8, **QUIET)


@needs_opacus
def test_ctrl_c_keeps_the_last_whole_epoch() -> None:
    class Interrupted(nn.Module):
        def __init__(self, call: int) -> None:
            super().__init__()
            self.layer, self.left = nn.Linear(64, 2), call

        def forward(self, images: Tensor) -> Tensor:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return self.layer(images.flatten(1))

    images, labels = blobs(8)
    options = {"epsilon": math.inf, "batch_size": 8, "optimizer": "sgd", **QUIET}
    torch.manual_seed(0)
    broken = Interrupted(3)
    whole = copy.deepcopy(broken)
    assert len(train_privately(broken, images, labels, epochs=5, **options)) == 2
    train_privately(whole, images, labels, epochs=2, **options)
    assert torch.equal(flat(broken), flat(whole))


def test_without_opacus_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(OpacusMissing, match=r"pip install 'aprillab\[privacy\]'"):
        train_privately(tiny(), *blobs(4), epsilon=1.0, epochs=1, batch_size=4, **QUIET)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"epsilon": math.nan}, "epsilon=nan must be positive"),
        ({"delta": 0.5}, "no guarantee for 8 images"),
        ({"delta": 0.0}, "between 0 and 1"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"at_once": 0}, "at_once=0"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"lr": math.inf}, "lr=inf"),
        ({"optimizer": "lion"}, "'adam' or 'sgd'"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "8 images and 3 labels"),
        ({"images": torch.zeros(4, 2, 1, 8, 8)}, "each row is 2 images"),
    ],
)
def test_arguments_without_sense_are_refused(options: dict, words: str) -> None:
    images, labels = blobs(8)
    call = {"images": images, "labels": labels, "epsilon": 1.0, "epochs": 1, "batch_size": 8, **QUIET, **options}
    with pytest.raises(ValueError, match=words):
        train_privately(tiny(), **call)


@needs_opacus
def test_a_loss_that_is_not_finite_gives_the_weights_back() -> None:
    images, labels = blobs(8)
    model = tiny()
    with pytest.raises(ValueError, match="the loss is nan"):
        train_privately(model, images * math.nan, labels, epsilon=1.0, epochs=1, batch_size=8, **QUIET)
    assert torch.equal(flat(model), flat(tiny()))
