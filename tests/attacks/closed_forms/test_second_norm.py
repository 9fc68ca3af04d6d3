"""The second look: what the MLP's gradient adds where both embeddings are frozen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import aprillab as al
from aprillab.attacks.closed_forms import second_norm
from aprillab.attacks.closed_forms.second_norm import moved, second_look
from aprillab.attacks.closed_forms.span import solve_span
from aprillab.attacks.reading import read_update

VICTIM, LABEL = "rocket", torch.tensor([3])  # much sky: its weakest token is at the rounding


def frozen_model():
    """ViT-L/16 at 224 but for the number of its blocks, both embeddings frozen:
    p + n + 2 = 966 of 1024.
    """
    torchvision = pytest.importorskip("torchvision")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(224, 16, 2, 16, 1024, 4096).eval()
        torch.nn.init.normal_(model.heads.head.weight, std=0.02)
    for parameter in (*model.conv_proj.parameters(), model.class_token, model.encoder.pos_embedding):
        parameter.requires_grad_(False)
    return model


def updated(model):
    """The victim's pixels (1, 3, 224, 224), and what its client shares."""
    pixels = al.load_victim(VICTIM, 224)[None]
    return pixels, al.client_update(model, al.dissect(model).preprocessing.to_input(pixels), LABEL)


def looked(model, change=lambda gradients: gradients):
    """PSNR of the span's patches and of the second look's, and the solution of the latter."""
    anatomy = al.dissect(model)
    pixels, update = updated(model)
    gradients = change(dict(update.gradients))
    update = replace(update, gradients=gradients, withheld=tuple(update.gradients.keys() - gradients.keys()))
    reading = read_update(model, update, anatomy)
    first = solve_span(model, update, anatomy=anatomy)
    second = second_look(model, reading, first, anatomy, anatomy.preprocessing)
    return *(float(al.psnr(anatomy.preprocessing.to_pixels(s.images)[0], pixels[0])) for s in (first, second)), second


@pytest.fixture(scope="module")
def found():
    """The model, not to be changed, and what :func:`looked` says of it."""
    model = frozen_model()
    return model, looked(model)


def test_the_second_look_gains_where_tokens_are_weak(found):
    first, second, solution = found[1]
    assert second > first + 5
    assert solution.numbers["second_look"] > 0.5


def test_the_span_attack_takes_it_and_stays_modest(found):
    model, (_, second, _) = found
    pixels, update = updated(model)
    result = al.span_closed_form(model, update)
    assert float(al.psnr(result.pixels[0], pixels[0])) == pytest.approx(second, abs=0.1)
    assert result.predicted_psnr < second
    assert not result.exact


@pytest.mark.parametrize("withheld", ["not shared", "zero"])
def test_without_the_mlps_gradient_the_first_look_stands(found, withheld):
    def without(gradients):
        for name in [name for name in gradients if "mlp" in name]:
            if withheld == "zero":
                gradients[name] = torch.zeros_like(gradients[name])
            else:
                del gradients[name]
        return gradients

    first, second, solution = looked(found[0], without)
    assert (second, solution.numbers["second_look"]) == (first, 0.0)


def test_rows_that_contradict_the_attention_do_no_harm(found):
    def scrambled(gradients):
        for name in [name for name in gradients if "mlp" in name and gradients[name].ndim == 2]:
            order = torch.randperm(gradients[name].shape[1], generator=torch.Generator().manual_seed(0))
            gradients[name] = gradients[name][:, order]
        return gradients

    first, second, _ = looked(found[0], scrambled)
    assert second > first - 0.5


def test_an_attention_that_adds_much_does_no_harm():
    """The a_i are as wrong as the picture then, and forty times as large."""
    model = frozen_model()
    with torch.no_grad():
        model.encoder.layers[0].self_attention.out_proj.weight.mul_(40)
    first, second, _ = looked(model)
    assert second > first - 0.5


def test_a_model_that_cannot_be_run_keeps_its_first_look(found, monkeypatch):
    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(second_norm, "_look", broken)
    first, second, solution = looked(found[0])
    assert (second, solution.numbers["second_look"]) == (first, 0.0)


def libraries():
    timm, torchvision, transformers = (pytest.importorskip(m) for m in ("timm", "torchvision", "transformers"))
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8
    )
    return {
        "timm": timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5),
        "torchvision": torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 128, num_classes=5),
        "transformers": transformers.ViTForImageClassification(config),
        "ours": al.VisionTransformer(image_size=32, patch_size=8, width=64, depth=2, heads=2, classes=5),
    }


def test_the_norm_and_its_readers_are_found_in_every_library():
    for library, model in libraries().items():
        anatomy = al.dissect(model.eval())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        second = second_norm._look(model, anatomy, torch.zeros(192, 16).double())
        assert len(second.readers) == 1, library
        parameter = dict(model.named_parameters())[second.readers[0]]
        assert parameter.shape[0] > parameter.shape[1], library
        assert second.norm != (anatomy.norm_weight or "").rpartition(".")[0], library
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks, library


def test_moved_stays_within_its_budget_and_goes_all_the_way_where_it_may():
    generator = torch.Generator().manual_seed(0)
    H = torch.linalg.qr(torch.randn(9, 4, generator=generator).double()).R
    T, x0, truth = (torch.randn(s, generator=generator).double() for s in ((7, 4), (4, 3), (4, 3)))
    far = float((H @ (truth - x0)).square().sum())
    found, _ = moved(x0, H, T, -T @ truth, 2 * far)
    assert torch.allclose(found, truth)
    part, _ = moved(x0, H, T, -T @ truth, far / 4)
    assert float((H @ (part - x0)).square().sum()) == pytest.approx(far / 4)
    assert (T @ (part - truth)).norm() < (T @ (x0 - truth)).norm()
    ours, theirs = H.T @ H @ (part - x0), T.T @ T @ (part - truth)
    assert float(torch.cosine_similarity(ours.flatten(), -theirs.flatten(), dim=0)) == pytest.approx(1)
