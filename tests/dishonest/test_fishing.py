"""Fished and silenced models: what comes back of a batch, a sum, a model without a
bias; what is refused.
"""

import copy

import pytest
import torch
import torchvision
from torch import nn

import aprillab as al
from aprillab.dishonest import CannotCheat, class_fishing, silenced

SHAPE = {"image_size": 16, "patch_size": 4, "width": 96, "depth": 2, "heads": 3, "classes": 10}


def vit(dtype=torch.float32, **changes):
    return al.VisionTransformer(**{**SHAPE, **changes}).to(dtype).eval()


def pictures(count, seed=0, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def loaded(model, state):
    sent = copy.deepcopy(model)
    sent.load_state_dict(state)
    return sent


def fished(model, pixels, labels, label, strength=20.0):
    """What the server reads of a batch's update."""
    sent = loaded(model, class_fishing(model, label, strength=strength))
    update = al.client_update(sent, al.HALF.to_input(pixels.to(next(model.parameters()))), torch.tensor(labels))
    return al.embedding_closed_form(sent, update, preprocessing=al.HALF, verify=False).pixels[0]


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"class_token": False}, {"classes": 2}], ids=str)
def test_the_image_of_the_class_comes_back_alone(changes):
    pixels, labels = pictures(4), [0, 1, 0, 0]
    assert al.psnr(fished(vit(**changes), pixels, labels, 1), pixels[1]) > 100
    update = al.client_update(vit(**changes), al.HALF.to_input(pixels), torch.tensor(labels))
    honest = al.embedding_closed_form(vit(**changes), update, preprocessing=al.HALF, verify=False)
    assert al.psnr(honest.pixels[0], pixels[1]) < 20


def test_others_pass_e_to_the_minus_L():
    """The passed gradient over the honest-looking one is what the softmax leaves: e^−L
    in each step of L.
    """
    pixels = pictures(2)
    miss = [
        -al.psnr(fished(vit(torch.float64), pixels, [3, 5], 3, strength), pixels[0]) / 20 for strength in (6.0, 8.0)
    ]
    assert miss[0] - miss[1] == pytest.approx(2 / torch.tensor(10.0).log().item(), rel=0.02)


def test_below_the_head_nothing_changes_but_by_the_last_norms_bias():
    for model, names in ((vit(), {"head.weight", "head.bias"}), (vit(bias=False), {"head.weight", "norm.bias"})):
        own = model.state_dict()
        sent = class_fishing(model, 3)
        assert list(sent) == list(own)
        assert {name for name in own if not torch.equal(own[name], sent[name])} == names
        assert all(sent[n].dtype == own[n].dtype and sent[n].data_ptr() != own[n].data_ptr() for n in own)


def test_the_head_is_as_the_text_has_it():
    model = vit()
    sent = class_fishing(model, 3, strength=7.0)
    weight, bias = torch.zeros_like(model.head.weight), torch.zeros(10)
    weight[3], bias[3] = model.head.weight[3].detach(), -7.0
    assert torch.equal(sent["head.weight"], weight)
    assert torch.equal(sent["head.bias"], bias)


def test_it_survives_a_sum_over_clients():
    """Eight clients of four images each, one of class 3 among them: the sum gives it back."""
    model = vit()
    sent = loaded(model, class_fishing(model, 3))
    total: dict[str, torch.Tensor] = {}
    for client in range(8):
        labels = torch.tensor([0, 1, 2, 3 if client == 5 else 4])
        update = al.client_update(sent, al.HALF.to_input(pictures(4, seed=client)), labels)
        for name, g in update.gradients.items():
            total[name] = total.get(name, 0) + g
    found = al.embedding_closed_form(sent, al.ClientUpdate(total), preprocessing=al.HALF, verify=False)
    assert al.psnr(found.pixels[0], pictures(4, seed=5)[3]) > 90


def test_two_images_of_the_class_are_a_mixture():
    pixels = pictures(3)
    found = fished(vit(), pixels, [3, 3, 1], 3)
    assert max(al.psnr(found, pixels[0]), al.psnr(found, pixels[1])) < 30


def test_a_head_of_zeros_is_given_a_direction():
    model = torchvision.models.VisionTransformer(16, 4, 2, 3, 96, 96, num_classes=10).eval()
    assert not model.heads.head.weight.any()
    pixels = pictures(4)
    assert al.psnr(fished(model, pixels, [0, 1, 2, 3], 2), pixels[2]) > 90


def test_a_wrapped_model_is_sent_under_its_own_names():
    model = nn.Sequential(nn.Identity(), vit())
    assert {n for n in class_fishing(model, 3) if n.endswith("head.bias")} == {"1.head.bias"}
    pixels = pictures(3)
    assert al.psnr(fished(model, pixels, [1, 3, 4], 3), pixels[1]) > 90


def test_the_model_is_left_as_it_was():
    model = vit().train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    random = torch.get_rng_state()
    class_fishing(model, 3), silenced(model)
    assert model.training
    assert model.blocks[0].training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_silenced_client_leaves_its_head_alone():
    model = vit()
    others = loaded(model, silenced(model))
    update = al.client_update(others, al.HALF.to_input(pictures(4)), torch.tensor([1, 1, 2, 3]))
    assert {name for name, g in update.gradients.items() if g.any()} == {"head.weight", "head.bias"}
    # p − y with p = 1/K: the number of images of each class.
    counts = (0.1 - update.gradients["head.bias"]) * 4
    assert torch.allclose(counts, torch.tensor([0.0, 2, 1, 1, 0, 0, 0, 0, 0, 0]), atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"head_bias": False}])
def test_for_good_is_silent_for_more_than_one_step(changes):
    model = vit()
    if changes:
        model.head = nn.Linear(96, 10, bias=False)
    x, y = al.HALF.to_input(pictures(4)), torch.tensor([1, 1, 2, 3])

    def moved(state):
        local = loaded(model, state)
        optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(local(x), y).backward()
            optimizer.step()
        return {name for name, value in local.state_dict().items() if not torch.equal(value, state[name])}

    assert moved(silenced(model, for_good=True)) == (set() if changes else {"head.bias"})
    assert "patch_embedding.weight" in moved(silenced(model))


def test_a_sum_with_silenced_clients_is_one_clients():
    model = vit()
    pixels, others = pictures(1, seed=9), loaded(model, silenced(model))
    updates = [al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))]
    updates += [
        al.client_update(others, al.HALF.to_input(pictures(4, seed=s)), torch.tensor([1, 1, 2, 3])) for s in (0, 1)
    ]
    total = {name: sum(u.gradients[name] for u in updates) for name in updates[0].gradients}
    found = al.embedding_closed_form(model, al.ClientUpdate(total), preprocessing=al.HALF, verify=False)
    assert al.psnr(found.pixels[0], pixels[0]) > 90


# --- What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "words"),
    [(10, "no class 10: the head has 10, 0 to 9"), (-1, "no class -1"), (1.5, "whole"), (True, "whole")],
)
def test_a_class_that_does_not_exist(label, words):
    with pytest.raises(CannotCheat, match=words):
        class_fishing(vit(), label)


@pytest.mark.parametrize("strength", [0, -1.0, 88.0, float("inf"), float("nan"), True])
def test_a_strength_that_leaves_no_number(strength):
    with pytest.raises(CannotCheat, match="e\\^−L underflows float32"):
        class_fishing(vit(), 3, strength=strength)


def test_double_precision_has_more_room():
    assert class_fishing(vit(torch.float64), 3, strength=700.0)["head.bias"][3] == -700


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight), self.bias)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = vit()

    def forward(self, images):
        return self.vit(images).softmax(-1)


def test_a_head_that_is_no_linear_map():
    model = vit()
    model.head = Cosine(96, 10)
    with pytest.raises(CannotCheat, match="twice the weight misses"):
        class_fishing(model, 3)
    with pytest.raises(CannotCheat, match=r"no linear map of the features by vit\.head\.weight"):
        silenced(Scaled())


def test_a_head_that_is_missing_or_of_one_class():
    backbone = vit()
    backbone.head = nn.Identity()
    with pytest.raises(CannotCheat, match="no head that dissect knows"):
        class_fishing(backbone, 0)
    with pytest.raises(CannotCheat, match="one class"):
        class_fishing(vit(classes=1), 0)


def test_neither_a_bias_nor_a_norm():
    model = vit(bias=False)
    model.norm = nn.LayerNorm(96, bias=False)
    with pytest.raises(CannotCheat, match="no bias, and no LayerNorm with weight and bias"):
        class_fishing(model, 3)


def test_for_good_needs_a_norm_before_the_head():
    model = vit()
    model.norm = nn.Identity()
    with pytest.raises(CannotCheat, match="silent for one local step"):
        silenced(model, for_good=True)
    assert not silenced(model)["head.weight"].any()
