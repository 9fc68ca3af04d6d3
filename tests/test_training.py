"""The training loop: it learns, repeats, resumes, stops on Ctrl-C, refuses, and leaves
global state alone.
"""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from aprillab import VisionTransformer
from aprillab.training import CheckpointError, evaluate, load_weights, train


def tiny(seed: int = 0, **options) -> VisionTransformer:
    shape = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 16, "depth": 1, "heads": 2, "classes": 2}
    return VisionTransformer(**{**shape, **options}, seed=seed)


def blobs(count: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise whose class is which half, left or right, is brighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[..., 4 * int(label) : 4 * int(label) + 4] += 1
    return images, labels


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def without_seconds(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


class InterruptedAt(nn.Module):
    """A ViT during whose n-th forward pass the user presses Ctrl-C."""

    def __init__(self, model: nn.Module, call: int) -> None:
        super().__init__()
        self.model, self.left = model, call

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.model(images)


def test_it_learns_what_a_constant_cannot() -> None:
    model, (images, labels), held_out = tiny(), blobs(400), blobs(100, seed=1)
    history = train(model, images, labels, epochs=8, batch_size=20, lr=5e-3, test=held_out, progress=False)
    assert [entry["epoch"] for entry in history] == list(range(1, 9))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["test_accuracy"] == evaluate(model, *held_out) > 0.9
    assert history[-1]["lr"] < 1e-3 * max(entry["lr"] for entry in history)  # the cosine ends at zero


def test_the_same_seed_gives_the_same_weights_and_another_one_does_not() -> None:
    images, labels = blobs()
    runs = []
    for seed in (5, 5, 6):
        model = tiny()
        train(model, images, labels, epochs=2, batch_size=10, seed=seed, progress=False)
        runs.append(weights(model))
    assert_equal(runs[0], runs[1])
    assert not torch.equal(runs[0]["head.weight"], runs[2]["head.weight"])


def test_dropout_follows_the_seed_and_the_global_generator_stays() -> None:
    images, labels = blobs()
    runs = []
    for trash in (1, 2):
        torch.manual_seed(trash)
        before = torch.get_rng_state()
        model = nn.Sequential(tiny(), nn.Dropout(0.3))
        train(model, images, labels, epochs=2, batch_size=10, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(weights(model))
    assert_equal(runs[0], runs[1])


def test_frozen_parameters_stay_and_the_others_move() -> None:
    model, (images, labels) = tiny(position="frozen"), blobs()
    before = weights(model)
    train(model, images, labels, epochs=1, progress=False)
    still = {name for name, t in model.state_dict().items() if torch.equal(t, before[name])}
    assert still == {"position_embedding"}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(training: bool) -> None:
    model, (images, labels) = tiny().train(training), blobs()
    train(model, images, labels, epochs=1, test=(images, labels), progress=False)
    assert model.training is training
    evaluate(model, images, labels)
    assert model.training is training


def test_resume_ends_where_an_unbroken_run_ends(tmp_path) -> None:
    images, labels = blobs()
    options = {"epochs": 4, "batch_size": 16, "seed": 3, "test": blobs(20, seed=2), "progress": False}
    whole = tiny()
    history = train(whole, images, labels, **options)

    path = tmp_path / "run.safetensors"
    broken = tiny()
    breaking = InterruptedAt(broken, call=4 * 2 + 2 + 2)  # 4 batches and a test an epoch: in the third epoch
    first = train(breaking, images, labels, **options, checkpoint=path)
    assert len(first) == 2
    other = InterruptedAt(tiny(seed=9), call=10**9)  # its own weights are overwritten by the checkpoint's
    second = train(other, images, labels, **options, checkpoint=path, resume=True)
    assert without_seconds(second) == without_seconds(history)
    assert_equal(weights(other.model), weights(whole))
    assert not list(tmp_path.glob("*.part"))


def test_after_an_interruption_weights_and_history_agree() -> None:
    images, labels = blobs()
    # The same schedule, ended in the middle of the second epoch: the weights are those
    # after the first.
    states = []
    for call in (5, 6):
        model = InterruptedAt(tiny(), call)
        history = train(model, images, labels, epochs=3, batch_size=20, progress=False)
        assert len(history) == 1
        states.append(weights(model.model))
    assert_equal(*states)
    model = InterruptedAt(tiny(), 2)
    assert train(model, images, labels, epochs=3, batch_size=20, progress=False) == []
    assert_equal(weights(model.model), weights(tiny()))


def test_checkpoints_give_weights_and_refuse_what_does_not_fit(tmp_path) -> None:
    images, labels = blobs()
    path = tmp_path / "run.safetensors"
    options = {"epochs": 2, "batch_size": 20, "checkpoint": path, "progress": False}
    model = tiny()
    train(model, images, labels, **options)
    assert_equal(weights(load_weights(tiny(seed=4), path)), weights(model))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(tiny(width=24), path)
    with pytest.raises(CheckpointError, match=r"lr=0\.001 there, 0\.5 here"):
        train(tiny(), images, labels, **options, lr=0.5, resume=True)
    with pytest.raises(CheckpointError, match="another model or defence"):
        train(tiny(position="frozen"), images, labels, **options, resume=True)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_weights(tiny(), foreign)
    pickle = tmp_path / "pickle.pt"
    torch.save({"a": torch.zeros(1)}, pickle)
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load_weights(tiny(), pickle)
    assert load_file(path)["model.head.weight"].shape == (2, 16)


def test_evaluate_counts() -> None:
    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).double()

    said = torch.tensor([0, 1, 2, 2, 1, 0, 0]).reshape(-1, 1, 1, 1)
    labels = torch.tensor([0, 1, 2, 1, 1, 0, 2])
    for batch_size in (1, 3, 7, 100):
        assert evaluate(Says(), said, labels, batch_size=batch_size) == 5 / 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 1, "batch_size": 0}, "batch_size=0"),
        ({"epochs": 1, "lr": 0.0}, "lr=0"),
        ({"epochs": 1, "warmup": 1.0}, "warmup=1"),
        ({"epochs": 1, "resume": True}, "needs the checkpoint"),
        ({"epochs": 2, "lr": 1e30}, "loss is (nan|inf) in epoch"),
    ],
)
def test_senseless_arguments_are_refused(options: dict, message: str) -> None:
    images, labels = blobs()
    with pytest.raises(ValueError, match=message):
        train(tiny(), images, labels, progress=False, **{"batch_size": 10, **options})
    with pytest.raises(ValueError, match="60 images and 59 labels"):
        train(tiny(), images, labels[1:], epochs=1)
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        train(tiny().requires_grad_(False), images, labels, epochs=1)
