"""What a client sees of honest, fished and silenced models; and what it cannot see."""

import copy
import dataclasses
import math

import pytest
import torch
import torchvision
from torch import nn

import aprillab as al
from aprillab.dishonest import SuspiciousModel, class_fishing, inspection, silenced
from aprillab.dishonest.looks import lost_directions, passed_by_class, passed_by_image
from aprillab.zoo import build_model

SHAPE = {"image_size": 16, "patch_size": 4, "width": 96, "depth": 2, "heads": 3, "classes": 10}


def vit(**changes):
    return al.VisionTransformer(**{**SHAPE, **changes}).eval()


def batch(count=8, seed=0, classes=10):
    pixels = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return al.HALF.to_input(pixels), torch.arange(count) % classes


def suspects(inspection):
    return {finding.name for finding in inspection.findings if finding.suspicious}


def trained_a_little(model):
    """Some steps of SGD on a batch."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images, labels = batch(16)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


HONEST = {
    "prenorm": lambda: vit(),
    "april": lambda: vit(block="april"),
    "two classes": lambda: vit(classes=2),
    "a hundred classes": lambda: vit(classes=100),
    "no bias": lambda: vit(bias=False),
    "no class token": lambda: vit(class_token=False),
    "frozen position": lambda: vit(position="frozen"),
    "torchvision's zero head": lambda: torchvision.models.VisionTransformer(16, 4, 2, 3, 96, 96, num_classes=10),
    "timm": lambda: build_model("timm:vit_tiny_patch16_224", image_size=32, classes=10),
    "bfloat16": lambda: vit().to(torch.bfloat16),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_model_is_not_suspicious(name):
    torch.manual_seed(0)
    model = HONEST[name]()
    weight = next(model.parameters())
    images, labels = batch(classes=2)
    if name == "timm":
        images = nn.functional.interpolate(images, 32)
    seen = al.inspect_model(model, model, images=images.to(weight), labels=labels)
    assert not seen.suspicious, str(seen)
    seen.refuse()


@pytest.mark.parametrize("strength", [0.1, 5.0, 20.0])
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"classes": 100}], ids=str)
def test_a_fished_model_is(strength, changes):
    model = vit(**changes)
    sent = copy.deepcopy(model)
    sent.load_state_dict(class_fishing(model, 3, strength=strength))
    assert {"head rows", "head directions"} <= suspects(al.inspect_model(sent))
    seen = al.inspect_model(sent, model, images=batch()[0], labels=batch()[1])
    assert seen["class offset"].score == pytest.approx(strength, abs=0.3 if "bias" in changes else 1e-4)
    assert seen["jump"].suspicious
    if strength > 1:
        assert seen["class gradients"].suspicious
        assert seen["isolation"].suspicious
        assert int(seen.gradient_norms.argmax()) == 3
    with pytest.raises(SuspiciousModel, match=r"no answer to this model: head rows inf \(limit 4\)"):
        seen.refuse()


def test_with_two_classes_the_rows_tell():
    sent = vit(classes=2)
    sent.load_state_dict(class_fishing(sent, 1))
    assert suspects(al.inspect_model(sent)) == {"head rows", "class offset"}


def test_a_head_of_zeros_is_a_note_until_it_was_another():
    model = vit()
    sent = copy.deepcopy(model)
    sent.load_state_dict(silenced(model))
    images, labels = batch()
    first = al.inspect_model(sent, images=images, labels=labels)
    assert not first.suspicious
    assert "nothing below it moves" in first.notes[0]
    assert not first.gradient_norms.any()
    assert suspects(al.inspect_model(sent, model)) == {"jump", "still body"}


def test_a_head_that_moves_alone_is_a_question_asked_twice():
    """A bias that is 2.9 nats less passes every other look."""
    model = trained_a_little(vit())
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.head.bias[3] -= 2.9
    images, labels = batch()
    assert suspects(al.inspect_model(again, model, images=images, labels=labels)) == {"still body"}
    assert al.inspect_model(again, model)["still body"].score == math.inf
    assert al.inspect_model(model, model)["still body"].score == 0
    for name, parameter in again.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    assert not al.inspect_model(again, model).suspicious  # a frozen body is not asked for its gradient


def test_honest_training_is_no_jump():
    model = vit()
    seen = al.inspect_model(trained_a_little(model), model)
    assert 0 < seen["jump"].score < 0.3
    assert seen["still body"].score < 10
    zero = vit()
    with torch.no_grad():
        zero.head.weight.zero_()
    assert 0 < al.inspect_model(trained_a_little(zero), zero.state_dict())["jump"].score < 0.7


def test_one_image_that_drowns_the_others_of_an_honest_model():
    """Nobody cheats: the model is sure of all pictures, and of one it is wrong."""
    model = vit()
    images, labels = batch()
    labels = model(images).argmax(1)
    with torch.no_grad():
        model.head.weight *= 1000
        model.head.bias *= 1000
    labels[5] = (labels[5] + 1) % 10
    seen = al.inspect_model(model, images=images, labels=labels)
    assert seen["isolation"].suspicious
    assert "image 5" in seen["isolation"].words


def test_a_dead_patch_embedding_does_not_hide_who_is_alone():
    """No gradient comes back to the pixels, and the fished picture does."""
    model = vit()
    images, labels = batch()
    model.load_state_dict(class_fishing(model, 3))
    with torch.no_grad():
        model.patch_embedding.weight.zero_()
    seen = al.inspect_model(model, images=images, labels=labels)
    assert seen["isolation"].score > 1e6
    assert "image 3" in seen["isolation"].words
    update = al.client_update(model, images, labels)
    found = al.embedding_closed_form(model, update, preprocessing=al.HALF, verify=False)
    assert al.psnr(found.pixels[0], al.HALF.to_pixels(images)[3]) > 60


def test_a_patch_embedding_that_is_no_module_is_looked_at_from_the_pixels():
    class Bare(nn.Module):
        """Its kernel is a parameter of its own, used in a function."""

        def __init__(self):
            super().__init__()
            self.rest = vit()
            self.rest.load_state_dict(class_fishing(self.rest, 3))
            self.kernel = nn.Parameter(self.rest.patch_embedding.weight.detach().clone())

        def forward(self, images):
            return torch.func.functional_call(self.rest, {"patch_embedding.weight": self.kernel}, (images,))

    model = Bare().eval()
    anatomy = dataclasses.replace(al.dissect(model.rest), patch_weight="kernel")
    images, labels = batch()
    norms, (found,) = inspection._of_images(model, anatomy, images, labels)
    assert found.score > 1e6
    assert int(norms.argmax()) == 3


def test_what_isolation_does_not_see_is_said():
    model = vit()
    images, labels = batch()
    alone = al.inspect_model(model, images=images[:1], labels=labels[:1])
    assert "The batch is one image" in alone.notes[0]
    assert not any(finding.name == "isolation" for finding in alone.findings)
    model.load_state_dict(class_fishing(model, 3))
    twice = al.inspect_model(model, images=images[[3, 3, 4, 5]], labels=labels[[3, 3, 4, 5]])
    assert twice["isolation"].score < 1.1  # a copy is another image
    assert not al.inspect_model(model, images=images, labels=labels).notes


def test_adapters_that_start_elsewhere_than_at_zero():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["head"])
    model = peft.get_peft_model(vit(), config)
    assert al.inspect_model(model)["adapters"].score == 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.zeros_like(parameter) if "lora_A" in name else torch.ones_like(parameter))
    assert al.inspect_model(model)["adapters"].score == math.inf


# --- The looks themselves -----------------------------------------------------------------------------------------


def test_what_a_class_passes_is_the_features_gradient():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    features = torch.randn(1, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    passed = passed_by_class(weight, features @ weight.T)
    for k in range(5):
        loss = nn.functional.cross_entropy(features @ weight.T, torch.tensor([k]))
        assert passed[k].item() == pytest.approx(torch.autograd.grad(loss, features)[0].norm().item())


def test_each_images_gradient_in_one_pass():
    model = vit().double()
    images, labels = batch(4)
    images = images.double().requires_grad_()
    losses = nn.functional.cross_entropy(model(images), labels, reduction="none")
    each, others = passed_by_image(images, losses)
    own = []
    for i in range(4):
        one = images[i : i + 1].detach().requires_grad_()
        own.append(torch.autograd.grad(nn.functional.cross_entropy(model(one), labels[i : i + 1]), one)[0].flatten())
    assert torch.allclose(each, torch.stack(own).norm(dim=1))
    assert torch.allclose(others[1], (own[0] + own[2] + own[3]).norm())


def test_directions_are_counted_by_singular_values():
    s = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert lost_directions(torch.diag(s)) == pytest.approx(4 * 98 / 14**2)
    assert lost_directions(torch.ones(6, 4) + torch.eye(6, 4), centred=True) < 2


def test_the_model_is_left_as_it_was():
    model = vit().train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    random = torch.get_rng_state()
    images, labels = batch()
    one, two = (al.inspect_model(model, model, images=images, labels=labels) for _ in range(2))
    assert str(one) == str(two)
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not images.requires_grad


def test_what_is_refused_and_what_cannot_be_looked_at():
    images, labels = batch()
    with pytest.raises(ValueError, match="go together"):
        al.inspect_model(vit(), images=images)
    with pytest.raises(ValueError, match=r"not \(8, 3, 16, 16\) and \(7,\)"):
        al.inspect_model(vit(), images=images, labels=labels[:7])
    with pytest.raises(al.UnknownModelError):
        al.inspect_model(nn.Linear(3, 2))
    backbone = vit()
    backbone.head = nn.Identity()
    seen = al.inspect_model(backbone)
    assert seen.notes[0].startswith("The head was not looked at")
    with pytest.raises(KeyError, match="there are layer directions"):
        seen["head rows"]
