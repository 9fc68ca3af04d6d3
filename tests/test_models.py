"""Our Vision Transformer: patches, position embeddings, both blocks, and torchvision as the
reference.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torchvision
from conftest import private_batch, randomize, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

from aprillab.models import VisionTransformer, patchify, sinusoidal_1d, sinusoidal_2d, unpatchify


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- torchvision as the reference -------------------------------------------------------------------------------


def torchvision_names(depth: int) -> dict[str, str]:
    """Our names to torchvision's, for everything but the fused queries, keys and values."""
    pairs = {
        "patch_embedding": "conv_proj",
        "norm": "encoder.ln",
        "head": "heads.head",
        **{
            f"blocks.{i}.{ours}": f"encoder.layers.encoder_layer_{i}.{theirs}"
            for i in range(depth)
            for ours, theirs in {
                "attention_norm": "ln_1",
                "attention.out": "self_attention.out_proj",
                "mlp_norm": "ln_2",
                "mlp.0": "mlp.0",
                "mlp.2": "mlp.3",
            }.items()
        },
    }
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in pairs.items() for kind in ("weight", "bias")}
    return {**names, "class_token": "class_token", "position_embedding": "encoder.pos_embedding"}


def in_our_names(theirs: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """torchvision's tensors (weights or gradients) under our names, the fused
    projection taken apart.
    """
    ours = {a: theirs[b] for a, b in torchvision_names(depth).items()}
    for i, kind in itertools.product(range(depth), ("weight", "bias")):
        fused = theirs[f"encoder.layers.encoder_layer_{i}.self_attention.in_proj_{kind}"]
        for part, rows in zip(("query", "key", "value"), fused.chunk(3), strict=True):
            ours[f"blocks.{i}.attention.{part}.{kind}"] = rows
    return ours


def copy_from_torchvision(theirs: TorchvisionViT, depth: int, width: int, heads: int) -> VisionTransformer:
    """Our ViT with the weights of torchvision's, in its dtype."""
    ours = VisionTransformer(
        image_size=theirs.image_size,
        patch_size=theirs.patch_size,
        width=width,
        depth=depth,
        heads=heads,
        classes=theirs.num_classes,
        mlp_ratio=theirs.mlp_dim / width,
        block="prenorm",
    ).to(theirs.conv_proj.weight.dtype)
    ours.load_state_dict(in_our_names(theirs.state_dict(), depth))  # strict: nothing is left as it was drawn
    return ours


def loss_and_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    logits = model(images)
    loss = nn.functional.cross_entropy(logits, labels)
    return logits.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def small_torchvision() -> TorchvisionViT:
    model = TorchvisionViT(
        image_size=12, patch_size=4, num_layers=3, num_heads=3, hidden_dim=24, mlp_dim=40, num_classes=7
    )
    return randomize(model.double(), seed=1)  # type: ignore[return-value]


def assert_same(ours: nn.Module, theirs: nn.Module, depth: int, images: Tensor, rtol: float) -> None:
    """Logits and every gradient agree, relative to the tensor's largest entry."""
    labels = torch.arange(len(images))
    logits, gradients = loss_and_gradients(ours, images, labels)
    their_logits, their_gradients = loss_and_gradients(theirs, images, labels)
    expected = in_our_names(their_gradients, depth)
    assert set(gradients) == set(expected)
    for name, tensor in {"logits": logits, **gradients}.items():
        reference = {"logits": their_logits, **expected}[name]
        # Softmax forgets a shift of all scores of a query: the key bias's gradient is
        # zero up to rounding.
        scale = 1.0 if name.endswith("key.bias") else float(reference.abs().max())
        assert scale > 0, f"{name}: nothing to compare"
        torch.testing.assert_close(tensor, reference, rtol=0, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_the_small_torchvision_model_and_ours_agree() -> None:
    theirs = small_torchvision()
    ours = copy_from_torchvision(theirs, depth=3, width=24, heads=3)
    assert_same(ours, theirs, 3, numbers(3, 3, 12, 12), rtol=1e-11)


@pytest.mark.parametrize(
    "broken",
    ["blocks.0.attention.query.weight", "blocks.2.attention_norm.bias", "position_embedding", "class_token"],
)
def test_the_comparison_sees_one_wrong_tensor(broken: str) -> None:
    theirs = small_torchvision()
    ours = copy_from_torchvision(theirs, depth=3, width=24, heads=3)
    with torch.no_grad():
        ours.get_parameter(broken).mul_(1.0001)
    with pytest.raises(AssertionError):
        assert_same(ours, theirs, 3, numbers(3, 3, 12, 12), rtol=1e-11)


def test_the_comparison_sees_the_wrong_number_of_heads() -> None:
    theirs = small_torchvision()
    with pytest.raises(AssertionError, match="logits"):
        assert_same(copy_from_torchvision(theirs, 3, 24, heads=4), theirs, 3, numbers(3, 3, 12, 12), rtol=1e-11)


@pytest.mark.slow
def test_vit_b_16_and_ours_agree() -> None:
    """At its full width and picture, with three of its twelve blocks."""
    theirs = torchvision.models.VisionTransformer(224, 16, 3, num_heads=12, hidden_dim=768, mlp_dim=3072)
    with torch.no_grad():  # the head is zero at initialization
        theirs.heads.head.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    ours = copy_from_torchvision(theirs, depth=3, width=768, heads=12)
    assert_same(ours, theirs, 3, numbers(1, 3, 224, 224).float(), rtol=1e-5)


# --- Patches ----------------------------------------------------------------------------------------------------

shapes = st.tuples(*[st.integers(1, 4)] * 5)  # B, C, rows, columns, P


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_patchify_reads_patches_as_the_convolution_does(shape: tuple[int, ...]) -> None:
    b, c, rows, columns, patch = shape
    images = numbers(b, c, rows * patch, columns * patch)
    conv = nn.Conv2d(c, 6, patch, stride=patch).double()
    tokens = patchify(images, patch) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(tokens, conv(images).flatten(2).transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_patchify_written_out() -> None:
    images = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (1, 6, 8)
    # Second row of patches, third column: rows 2 and 3, columns 4 and 5, first channel
    # before the second.
    assert patches[0, 5].tolist() == images[0, :, 2:4, 4:6].flatten().tolist()
    assert patches[0, 1].tolist() == images[0, :, 0:2, 2:4].flatten().tolist()  # to the right before down


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_unpatchify_is_the_inverse(shape: tuple[int, ...]) -> None:
    b, c, rows, columns, patch = shape
    images = numbers(b, c, rows * patch, columns * patch)
    assert torch.equal(unpatchify(patchify(images, patch), patch, (rows * patch, columns * patch)), images)
    patches = numbers(b, rows * columns, c * patch**2)
    assert torch.equal(patchify(unpatchify(patches, patch, (rows * patch, columns * patch)), patch), patches)


def test_patches_that_do_not_tile_are_refused() -> None:
    with pytest.raises(ValueError, match=r"patch_size=4 does not tile an image of 8×6"):
        patchify(torch.zeros(1, 3, 8, 6), 4)
    with pytest.raises(ValueError, match=r"5 patches of 48 numbers do not make an image of 8×8"):
        unpatchify(torch.zeros(1, 5, 48), 4, (8, 8))
    with pytest.raises(ValueError, match="4 patches of 47 numbers"):
        unpatchify(torch.zeros(1, 4, 47), 4, (8, 8))
    # One patch fits into 3 × 2 as well, and its 12 numbers would fill two channels of that size.
    with pytest.raises(ValueError, match="do not make an image of 3×2"):
        unpatchify(torch.zeros(1, 1, 12), 2, (3, 2))


# --- Sinusoids --------------------------------------------------------------------------------------------------


def test_sinusoids_by_the_formula() -> None:
    tokens, width, base = 5, 6, 100.0
    table = sinusoidal_1d(tokens, width, base)
    assert table.dtype == torch.float64
    for t, k in itertools.product(range(tokens), range(width // 2)):
        angle = t / base ** (2 * k / width)
        assert table[t, 2 * k].item() == pytest.approx(math.sin(angle), abs=1e-15)
        assert table[t, 2 * k + 1].item() == pytest.approx(math.cos(angle), abs=1e-15)


def test_two_dimensional_sinusoids_code_the_row_first() -> None:
    table = sinusoidal_2d((2, 3), 8, base=50.0, prefix=2)
    assert table.shape == (2 + 6, 8)
    assert not table[:2].any()
    for y, x in itertools.product(range(2), range(3)):
        expected = torch.cat([sinusoidal_1d(2, 4, 50.0)[y], sinusoidal_1d(3, 4, 50.0)[x]])
        assert torch.equal(table[2 + 3 * y + x], expected)


def test_odd_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="even width, not 5"):
        sinusoidal_1d(4, 5)
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        sinusoidal_2d((2, 2), 6)


# --- The model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("position", ["learned", "frozen", "sinusoidal", "none"])
@pytest.mark.parametrize("block", ["april", "prenorm"])
def test_every_combination_has_the_gradients_it_should(
    block: str, position: str, class_token: bool, bias: bool
) -> None:
    model = tiny_vit(block=block, position=position, class_token=class_token, bias=bias)
    images, labels = private_batch(model, 2)
    logits = model(images)
    assert logits.shape == (2, 5)
    nn.functional.cross_entropy(logits, labels).backward()
    has_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    expected = {name for name, _ in model.named_parameters()} - {"position_embedding"}
    if position == "learned":
        expected.add("position_embedding")
    assert has_gradient == expected
    assert ("position_embedding" in dict(model.named_parameters())) == (position in ("learned", "frozen"))
    assert ("position_embedding" in dict(model.named_buffers())) == (position == "sinusoidal")
    biases = {name for name in expected if name.endswith("bias") and "norm" not in name}
    assert bool(biases) == bias
    assert ("class_token" in expected) == class_token
    assert any("attention_norm" in name for name in expected) == (block == "prenorm")


def test_rows_of_the_position_embedding_belong_to_class_token_and_patches_in_order() -> None:
    model = tiny_vit()
    images, _ = private_batch(model, 2)
    z = model.embed(images)
    E, c, W = model.position_embedding, model.class_token, model.patch_embedding.weight.flatten(1)
    torch.testing.assert_close(z[:, 0], (c + E[:, :1])[:, 0].expand(2, -1))
    torch.testing.assert_close(z[:, 1:], patchify(images, 4) @ W.T + model.patch_embedding.bias + E[:, 1:])


def test_the_april_block_has_no_residual_and_no_norm() -> None:
    model = tiny_vit(block="april", depth=1)
    images, _ = private_batch(model)
    attention, z = model.blocks[0].attention, model.embed(images)
    heads = []
    for h in range(3):  # one head at a time, with its own rows of the three matrices
        rows = slice(8 * h, 8 * h + 8)
        q, k, v = (
            (z @ m.weight[rows].T + m.bias[rows])[0] for m in (attention.query, attention.key, attention.value)
        )
        heads.append(torch.softmax(q @ k.T / math.sqrt(8), dim=1) @ v)
    m = attention.out(torch.cat(heads, dim=1)[None])
    torch.testing.assert_close(model.blocks(z), model.blocks[0].mlp[2](nn.functional.gelu(model.blocks[0].mlp[0](m))))


def test_without_class_token_the_head_reads_the_mean() -> None:
    model = tiny_vit(class_token=False)
    images, _ = private_batch(model)
    torch.testing.assert_close(model(images), model.head(model.norm(model.blocks(model.embed(images))).mean(1)))


@pytest.mark.parametrize("block", ["april", "prenorm"])
@pytest.mark.parametrize(
    "size",
    [{}, {"image_size": 32, "patch_size": 8, "width": 128, "heads": 4, "depth": 4, "classes": 10}],
    ids=["tiny", "chapter"],
)
def test_initialization_is_not_degenerate(block: str, size: dict[str, int]) -> None:
    model = tiny_vit(block=block, **size)
    images, labels = private_batch(model)
    _, gradients = loss_and_gradients(model, images, labels)
    G = gradients["position_embedding"][0]
    s = torch.linalg.svdvals(G)
    assert len(G) <= G.shape[1]
    assert int((s > 1e-10 * s[0]).sum()) == len(G), f"rank below n + 1 = {len(G)}: {s}"
    assert G.norm() > 1e-4
    assert all(G.norm(dim=1) > 1e-6 * G.norm())
    attention = model.blocks[0].attention
    z = model.embed(images) if block == "april" else model.blocks[0].attention_norm(model.embed(images))
    q, k = (m(z).reshape(1, len(G), model.heads, -1).transpose(1, 2) for m in (attention.query, attention.key))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    assert (weights - 1 / len(G)).abs().max() > 0.01, "attention is uniform: queries and keys get no gradient"


def test_initial_standard_deviations_are_the_documented_ones() -> None:
    model = VisionTransformer(image_size=64, patch_size=8, width=256, depth=1, heads=4, classes=100)
    attention = model.blocks[0].attention
    for tensor, std in [
        (attention.value.weight, 1 / 16),
        (attention.query.weight, math.sqrt(2) / 16),
        (attention.key.weight, math.sqrt(2) / 16),
        (model.patch_embedding.weight, 1 / math.sqrt(192)),
        (model.blocks[0].mlp[2].weight, 1 / 32),
        (model.head.weight, 1 / 16),
        (model.position_embedding, 0.02),
    ]:
        assert tensor.std().item() == pytest.approx(std, rel=0.03)
        assert tensor.mean().abs().item() < 0.05 * std
    for bias in (attention.query.bias, model.head.bias, model.patch_embedding.bias, model.class_token):
        assert bias.std().item() == pytest.approx(0.02, rel=0.25)
    assert bool((model.norm.weight == 1).all())
    assert not model.norm.bias.any()


def test_construction_leaves_the_global_generator_alone_and_follows_the_seed() -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first, second, other = (tiny_vit(seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(321)
    third = tiny_vit(seed=4)
    for (name, p), q, r, s in zip(
        first.named_parameters(), second.parameters(), other.parameters(), third.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        assert torch.equal(p, s)
        if "norm" not in name:
            assert not torch.equal(p, r), f"{name} does not follow the seed"


def test_position_values_are_taken_as_they_are() -> None:
    values = numbers(5, 24)
    for position in ("learned", "frozen", "sinusoidal"):
        model = tiny_vit(torch.float32, position=position, position_values=values)
        assert torch.equal(model.position_embedding[0], values.float())
    default = tiny_vit(torch.float32, position="sinusoidal")
    assert torch.equal(default.position_embedding[0], sinusoidal_1d(5, 24).float())
    values += 1  # the model keeps a copy
    assert not torch.equal(model.position_embedding[0], values.float())
    drawn, given_ = tiny_vit(), tiny_vit(position_values=values)
    assert torch.equal(drawn.head.weight, given_.head.weight), "values for the embedding must not move other weights"


def test_it_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        model = VisionTransformer(depth=2, position="sinusoidal")
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 9}, "patch_size=4 does not tile image_size=9"),
        ({"heads": 5}, "width=24 is not a multiple of heads=5"),
        ({"block": "postnorm"}, "block='postnorm' is none of"),
        ({"position": "rotary"}, "position='rotary' is none of"),
        ({"position": "none", "position_values": torch.zeros(5, 24)}, "takes no position_values"),
        ({"position_values": torch.zeros(4, 24)}, r"\(5, 24\), not \(4, 24\)"),
        ({"class_token": False, "position_values": torch.zeros(5, 24)}, r"\(4, 24\), not \(5, 24\)"),
        ({"position": "sinusoidal", "width": 25, "heads": 5}, "even width, not 25"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_vit(**options)


@pytest.mark.parametrize("shape", [(1, 3, 8, 12), (3, 8, 8), (1, 1, 8, 8)])
def test_wrong_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 8\), not"):
        tiny_vit()(torch.zeros(shape, dtype=torch.float64))
