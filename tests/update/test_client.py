"""The client's side: its gradient, and what it says of labels, losses and outputs that do not fit."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import private_batch, tiny_vit
from torch import Tensor, nn

from aprillab.update import UpdateError, check_update, client_update, logits_of


@pytest.mark.parametrize("size", [1, 3])
def test_it_is_the_gradient_of_the_mean_loss(model: nn.Module, size: int) -> None:
    images, labels = private_batch(model, size)
    update = client_update(model, images, labels)
    assert update.batch_size == size
    assert update.source == "fedsgd"
    assert update.withheld == ()
    assert update.dtype == torch.float64
    assert update.seconds is not None
    assert update.seconds > 0
    assert set(update.gradients) == {name for name, _ in model.named_parameters()}
    # The mean written out, image by image.
    total = sum(-torch.log_softmax(model(x[None]), dim=1)[0, y] for x, y in zip(images, labels, strict=True))
    (total / size).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(update.gradients[name], p.grad, rtol=1e-9, atol=1e-12)


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    model.train()
    model.blocks[0].mlp[0].weight.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    client_update(model, *private_batch(model))
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bool((model.head.weight.grad == 7).all())
    assert all(p.grad is None for name, p in model.named_parameters() if name != "head.weight")
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["blocks.0.mlp.0.weight"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval()
    with torch.no_grad():  # a caller's no_grad is no obstacle
        client_update(model, *private_batch(model))
    assert not model.training


def test_frozen_and_withheld_gradients_are_absent(model: nn.Module) -> None:
    model.class_token.requires_grad_(False)
    names = {name for name, _ in model.named_parameters()}
    update = client_update(model, *private_batch(model), withhold=["position_embedding", "head.bias"])
    assert set(update.gradients) == names - {"class_token", "position_embedding", "head.bias"}
    assert update.withheld == ("position_embedding", "head.bias")
    check_update(model, update)
    one = client_update(model, *private_batch(model), withhold="position_embedding")  # a name, not its letters
    assert one.withheld == ("position_embedding",)
    buffered = tiny_vit(position="sinusoidal")
    assert "position_embedding" not in client_update(buffered, *private_batch(buffered)).gradients


def test_a_parameter_without_influence_shares_zeros(model: nn.Module) -> None:
    model.unused = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    update = client_update(model, *private_batch(model))
    assert update.gradients["unused"].tolist() == [[0, 0, 0], [0, 0, 0]]
    check_update(model, update)


def test_another_loss_and_an_output_object(model: nn.Module) -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = model

        def forward(self, images: Tensor) -> Output:
            return Output(self.vit(images))

    images, labels = private_batch(model, 2)
    assert torch.equal(logits_of(Wrapped(), images), model(images))

    def doubled(logits: Tensor, y: Tensor) -> Tensor:
        return 2 * nn.functional.cross_entropy(logits, y)

    once = client_update(model, images, labels)
    twice = client_update(Wrapped(), images, labels, loss=doubled)
    for name, g in once.gradients.items():
        torch.testing.assert_close(twice.gradients[f"vit.{name}"], 2 * g)


def test_what_a_client_cannot_do(model: nn.Module) -> None:
    images, labels = private_batch(model)
    with pytest.raises(UpdateError, match=r"withhold: head\.bais is no trained parameter of VisionTransformer"):
        client_update(model, images, labels, withhold=["head.bais"])
    with pytest.raises(UpdateError, match="the client's loss is nan"):
        client_update(model, images * float("nan"), labels)
    with pytest.raises(UpdateError, match="nothing to share"):
        client_update(model, images, labels, withhold=[name for name, _ in model.named_parameters()])
    model.requires_grad_(False)
    with pytest.raises(UpdateError, match="nothing to share"):
        client_update(model, images, labels)


# --- Targets ------------------------------------------------------------------------------------------------------


def test_targets_may_be_soft_or_several(model: nn.Module) -> None:
    images, labels = private_batch(model, 2)
    hard = client_update(model, images, labels)
    one_hot = nn.functional.one_hot(labels, 5).double()
    soft = client_update(model, images, one_hot)
    for name, g in hard.gradients.items():
        torch.testing.assert_close(soft.gradients[name], g, rtol=0, atol=1e-13)
    findings = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]]).double()
    bce = client_update(model, images, findings, loss=nn.functional.binary_cross_entropy_with_logits)
    assert not torch.allclose(bce.gradients["head.bias"], hard.gradients["head.bias"])

    def mixed(logits: Tensor, targets: Any) -> Tensor:
        first, second, share = targets
        ce = nn.functional.cross_entropy
        return share * ce(logits, first) + (1 - share) * ce(logits, second)

    mixup = client_update(model, images, (labels, labels, 0.3), loss=mixed)  # type: ignore[arg-type]
    torch.testing.assert_close(mixup.gradients["head.bias"], hard.gradients["head.bias"])
    ignored = client_update(model, images, torch.tensor([0, -100]))
    torch.testing.assert_close(
        ignored.gradients["head.bias"], client_update(model, images[:1], torch.tensor([0])).gradients["head.bias"]
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "labels are a list: pass a tensor"),
        (3, "labels are a int: pass a tensor"),
        (torch.tensor([0]), r"1 label\(s\) for 2 image\(s\): pass one for each image, shape \(2,\)"),
        (torch.tensor([0, 1, 2]), r"3 label\(s\) for 2 image\(s\)"),
        (torch.tensor(0), r"labels of shape \(\) and torch.int64 for logits of shape \(2, 5\)"),
        (
            torch.tensor([0.0, 1.0]),
            r"labels of shape \(2,\) and torch.float32 .* int64 of shape \(2,\)",
        ),
        (torch.tensor([[0], [1]]), r"labels of shape \(2, 1\) and torch.int64"),
        (torch.ones(2, 4), r"labels of shape \(2, 4\) and torch.float32 .* floats of shape \(2, 5\)"),
        (torch.tensor([0, 5]), "label 5 is no class of the model's: it has 5, from 0"),
        (torch.tensor([-1, 0]), "label -1 is no class of the model's"),
    ],
)
def test_labels_that_do_not_fit_are_refused(model: nn.Module, labels: Any, message: str) -> None:
    images, _ = private_batch(model, 2)
    with pytest.raises(UpdateError, match=message):
        client_update(model, images, labels)


def test_losses_that_do_not_fit_are_refused(model: nn.Module) -> None:
    images, labels = private_batch(model, 2)
    with pytest.raises(UpdateError, match=r"does not take logits of shape \(2, 5\) and torch.float64 with labels of"):
        client_update(model, images, labels, loss=nn.functional.binary_cross_entropy_with_logits)
    with pytest.raises(UpdateError, match=r"does not take logits .* with a list of labels"):
        client_update(model, images, [0, 1], loss=nn.CrossEntropyLoss())  # type: ignore[arg-type]
    with pytest.raises(UpdateError, match=r"the client's loss is of shape \(2,\): it must be a scalar"):
        client_update(model, images, labels, loss=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(UpdateError, match="the client's loss is a float: it must be a scalar"):
        client_update(model, images, labels, loss=lambda *_: 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(UpdateError, match="depends on no parameter"):
        client_update(model, images, labels, loss=lambda logits, y: nn.functional.cross_entropy(logits.detach(), y))


# --- Outputs ------------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """A linear model whose output has another form."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(3, 2), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.linear(x))


Output = namedtuple("Output", ["hidden", "logits"])


class Dictionary(dict):
    """As transformers' outputs: a dictionary with fields."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


FORMS = {
    "tensor": lambda y: y,
    "object": lambda y: SimpleNamespace(logits=y, hidden=None),
    "dictionary": lambda y: {"hidden": y * 0, "logits": y},
    "both": lambda y: Dictionary(logits=y),
    "tuple with hidden states (MONAI)": lambda y: (y, [y * 0]),
    "tuple of one (transformers)": lambda y: (y,),
    "list": lambda y: [y, None],
    "two heads (timm, distilled)": lambda y: (y, y * 0),
    "named tuple": lambda y: Output(y * 0, y),
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found_in_outputs_of_any_form(form: str) -> None:
    model = Returns(FORMS[form])
    x = torch.ones(4, 3)
    assert torch.equal(logits_of(model, x), model.linear(x))
    update = client_update(model, x, torch.tensor([0, 1, 1, 0]))
    assert set(update.gradients) == {"linear.weight", "linear.bias"}
    assert update.gradients["linear.weight"].any()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            lambda y: SimpleNamespace(last_hidden_state=y),
            "Returns returns a SimpleNamespace, which has no log",
        ),
        (lambda y: SimpleNamespace(logits=None), "which has no logits"),
        (lambda y: {"out": y, "aux": y}, "a dict without 'logits'; it has 'out', 'aux'"),
        (lambda y: {}, "a dict without 'logits'; it has nothing"),
        (lambda y: (None, y), "a tuple whose first element is a NoneType"),
        (lambda y: [[y]], "a list whose first element is a list"),
        (lambda y: (), "an empty tuple"),
        (lambda y: None, "a NoneType, which has no logits"),
        (lambda y: y.detach().numpy(), "a ndarray, which has no logits"),
    ],
)
def test_outputs_without_logits_are_refused(form: Any, message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        logits_of(Returns(form), torch.ones(1, 3))


def test_transformers_models_return_their_logits_first() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.DeiTConfig(**shape, image_size=8, patch_size=4, num_labels=3)
    model = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    model.cls_classifier.bias.data += 1
    images = torch.ones(1, 3, 8, 8)

    class AsTuple(nn.Module):
        def forward(self, x: Tensor) -> tuple:
            output = model(x, return_dict=False)
            assert len(output) == 3
            return output

    logits = logits_of(model, images)
    assert torch.equal(logits_of(AsTuple(), images), logits)
    assert not torch.allclose(logits, model(images).cls_logits), "the mean of two heads, and not the first of them"


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 3, 9, 9), r"shape \(1, 3, 9, 9\)"),
        (torch.zeros(1, 1, 8, 8), r"shape \(1, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"images\[None\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), "float64"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        ([[0.0]], "list"),
    ],
)
def test_images_that_the_model_cannot_read_are_refused_in_a_sentence(images: Any, words: str) -> None:
    model = tiny_vit(torch.float32)
    with pytest.raises(UpdateError, match=words):
        client_update(model, images, torch.tensor([3]))
    with pytest.raises(UpdateError, match="Dict"):
        client_update(model.state_dict(), torch.zeros(1, 3, 8, 8), torch.tensor([3]))
