"""What an update proves of the number of its images."""

from dataclasses import replace
from statistics import median

import pytest
import torch
from attacked import make, private

import aprillab as al
from aprillab.attacks.evidence import System, is_batch, one_image, one_image_residual


def test_one_image_residual_tells_one_from_two():
    model = make("prenorm")
    for labels in ([3], [3, 3], [3, 5]):
        update = al.client_update(model, al.HALF.to_input(private(model, len(labels))), torch.tensor(labels))
        residual = one_image_residual(update.gradients["head.weight"])
        assert (residual < 1e-12) == (len(labels) == 1)


def gradient_of(rows, features):
    """A head's weight gradient for a batch with these r (B, classes) and features (B, d)."""
    return rows.T @ features / len(rows)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_rounded_outer_product_misses_rank_one_by_its_rounding(dtype):
    gradient = gradient_of(normal(1, 7), normal(1, 20, seed=1)).to(dtype)
    assert one_image_residual(gradient) < torch.finfo(dtype).eps
    assert one_image_residual(gradient_of(normal(2, 7), normal(2, 20, seed=1)).to(dtype)) > 0.1


def test_no_gradient_misses_nothing():
    assert one_image_residual(torch.zeros(7, 20)) == 0.0


def test_the_evidence_says_what_it_rests_on():
    """Each way to know of a batch, in the order in which they are looked for, and one
    that knows nothing.
    """
    model = make("prenorm")
    anatomy = al.dissect(model)
    images = al.HALF.to_input(private(model, 2))
    two = al.client_update(model, images, torch.tensor([3, 5]))
    alike = al.client_update(model, images, torch.tensor([3, 3]))
    said = one_image(anatomy, two)
    assert not said.holds
    assert said.numbers == {"batch_size": 2}
    signs = one_image(anatomy, al.ClientUpdate(two.gradients))
    assert not signs.holds
    assert signs.numbers == {"several": 2}
    rank = one_image(anatomy, al.ClientUpdate(alike.gradients))
    assert not rank.holds
    assert rank.numbers["residual"] > rank.numbers["limit"]
    headless = al.ClientUpdate({k: g for k, g in two.gradients.items() if not k.startswith("head")})
    nothing = one_image(anatomy, headless)
    assert nothing.state == "not checked"
    assert not nothing.measured
    assert "not shared" in nothing.text
    named_nothing = replace(anatomy, family="described by the caller", head_weight=None, head_bias=None)
    assert "the head is not named" in one_image(named_nothing, headless).text
    for update, condition in ((two, said), (alike, one_image(anatomy, alike))):
        assert is_batch(anatomy, update) == (True, condition.text)
    assert is_batch(anatomy, headless) == (False, nothing.text)


@pytest.mark.parametrize("labels", [[3], [3, 3]])
def test_what_the_weights_rounding_leaves_in_the_head_is_no_second_image(labels):
    model = make("prenorm").float()
    images = al.HALF.to_input(private(model, len(labels))).float()
    gradients = al.client_update(model, images, torch.tensor(labels)).gradients
    before = {name: p.detach() for name, p in model.named_parameters()}
    after = {name: p - 1e-3 * gradients[name] for name, p in before.items()}
    update = al.update_from_states(before, after, learning_rate=1e-3)
    said = one_image(al.dissect(model), update, noise=torch.finfo(torch.float32).eps)
    assert said.numbers["residual"] > 30 * torch.finfo(torch.float32).eps  # by the format alone it were a batch
    assert said.state == ("shown" if len(labels) == 1 else "contradicted")


def test_two_classes_prove_nothing():
    """With two classes r is always a multiple of (1, −1): the head's gradient has rank
    one for any batch.
    """
    model = make("prenorm", classes=2)
    update = al.client_update(model, al.HALF.to_input(private(model, 3)), torch.tensor([0, 1, 1]))
    said = one_image(al.dissect(model), al.ClientUpdate(update.gradients))
    assert said.state == "not checked"
    assert "2 classes" in said.text


@pytest.mark.parametrize(
    ("residual", "noise", "spare", "state"),
    [
        (1e-7, 1e-7, 50, "shown"),
        (5e-3, 1e-7, 50, "contradicted"),
        (5e-3, 1e-3, 50, "shown"),
        (0.3, 1e-3, 50, "contradicted"),
        (5e-3, 3e-2, 50, "not checked"),  # noise of which as much as a second image leaves is no news
        (1e-7, 1e-7, 0, "shown"),  # by the head then
    ],
)
def test_a_system_shows_one_image_as_far_as_its_noise_allows(residual, noise, spare, state):
    model = make("prenorm")
    update = al.client_update(model, al.HALF.to_input(private(model)), torch.tensor([3]))
    system = System("Ax = b", residual, spare, 100)
    said = one_image(al.dissect(model), update, system=system, noise=noise)
    assert said.state == state
    assert ("Ax = b" in said.text) == (spare > 0)


def test_the_system_is_believed_before_the_client():
    model = make("prenorm")
    update = al.client_update(model, al.HALF.to_input(private(model)), torch.tensor([3]))
    said = replace(update, batch_size=2)
    assert one_image(al.dissect(model), said, system=System("Ax = b", 1e-15, 5, 100)).holds
    assert not one_image(al.dissect(model), said).holds


def test_the_same_picture_twice_cannot_be_told_from_one():
    model = make("prenorm")
    images = al.HALF.to_input(private(model)).expand(2, -1, -1, -1)
    update = al.client_update(model, images, torch.tensor([3, 3]))
    assert one_image(al.dissect(model), al.ClientUpdate(update.gradients)).holds


# --- What a second image leaves -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "options", "typical"),
    [
        ("embedding", {"width": 192, "patch_size": 8}, (0.2, 0.6)),
        ("embedding", {"width": 384, "patch_size": 4, "block": "april"}, (0.01, 0.05)),
        ("april", {"width": 384, "patch_size": 4, "block": "april"}, (0.01, 0.05)),
    ],
    ids=["embedding", "embedding, april", "april"],
)
def test_what_a_second_image_leaves(attack, options, typical):
    """The range from which ``_SECOND`` was chosen, on eight batches of two photographs."""
    model = al.VisionTransformer(image_size=32, depth=2, heads=4, classes=10, **options).double()
    pictures = al.HALF.to_input(al.load_victims(al.victims()[:9], 32, dtype=torch.float64)[0])
    left = []
    for k in range(8):
        update = al.client_update(model, pictures[[k, k + 1]], torch.tensor([3, 7]))
        said = al.invert(
            model, al.ClientUpdate(update.gradients), attack=attack, strict=False, verify=False
        ).conditions
        numbers = next(condition.numbers for condition in said if condition.name == "one image")
        left.append(numbers["residual"] / (numbers["spare"] / numbers["of"]) ** 0.5)
    assert 0.001 < min(left) < max(left) < 0.7
    assert typical[0] < median(left) < typical[1]
