"""Where the parts are: names against what the parts do, in every library we know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
import torchvision
from conftest import private_batch, randomize, tiny_vit
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

from aprillab.anatomy import Anatomy, Rows, UnknownModelError, dissect, tensors_of
from aprillab.models import VisionTransformer, patchify
from aprillab.preprocessing import HALF, IMAGENET, Preprocessing

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def of_timm(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, **{"depth": 1, "img_size": 48, "num_classes": 5, **options})


def of_torchvision() -> nn.Module:
    return TorchvisionViT(
        image_size=12, patch_size=4, num_layers=1, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=5
    )


def of_transformers(**options: object) -> nn.Module:
    config = transformers.ViTConfig(
        **{
            "image_size": 12,
            "patch_size": 4,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "intermediate_size": 48,
            "num_labels": 5,
            **options,
        }
    )
    return transformers.ViTForImageClassification(config)


# Model, expected first block, rows of the position embedding before the patches, tokens
# before the patches.
CASES: dict[str, tuple[Callable[[], nn.Module], str, int, tuple[str, ...]]] = {
    "own prenorm": (tiny_vit, "prenorm", 1, ("class_token",)),
    "own april": (lambda: tiny_vit(block="april"), "april", 1, ("class_token",)),
    "own no class token": (lambda: tiny_vit(class_token=False), "prenorm", 0, ()),
    "own no bias": (lambda: tiny_vit(bias=False), "prenorm", 1, ("class_token",)),
    "torchvision": (of_torchvision, "prenorm", 1, ("class_token",)),
    "vit_small": (lambda: of_timm("vit_small_patch16_224"), "prenorm", 1, ("cls_token",)),
    "vit_base": (lambda: of_timm("vit_base_patch16_224"), "prenorm", 1, ("cls_token",)),
    "vit_tiny": (lambda: of_timm("vit_tiny_patch16_224"), "prenorm", 1, ("cls_token",)),
    "deit_tiny": (lambda: of_timm("deit_tiny_patch16_224"), "prenorm", 1, ("cls_token",)),
    "deit distilled": (
        lambda: of_timm("deit_tiny_distilled_patch16_224"),
        "prenorm",
        2,
        ("cls_token", "dist_token"),
    ),
    "deit3": (lambda: of_timm("deit3_small_patch16_224"), "prenorm", 0, ("cls_token",)),
    "dinov2 registers": (
        lambda: of_timm("vit_small_patch14_reg4_dinov2", img_size=42),
        "prenorm",
        0,
        ("cls_token", "reg_token"),
    ),
    "siglip": (lambda: of_timm("vit_base_patch16_siglip_224"), "prenorm", 0, ()),
    "clip": (lambda: of_timm("vit_base_patch16_clip_224"), "two norms", 1, ("cls_token",)),
    "transformers": (of_transformers, "prenorm", 1, ("vit.embeddings.cls_token",)),
    "transformers no qkv bias": (
        lambda: of_transformers(qkv_bias=False),
        "prenorm",
        1,
        ("vit.embeddings.cls_token",),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Anatomy, str]:
    """A model in float64 with no zero weights, its anatomy and the name of the case."""
    model = randomize(CASES[request.param][0]().double(), std=0.05).eval()
    return model, dissect(model), request.param


def gradients_of(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    output = model(images)
    loss = nn.functional.cross_entropy(output if isinstance(output, Tensor) else output.logits, labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: g for name, g in zip(names, gradients, strict=True) if g is not None}


def first_attention(model: nn.Module, anatomy: Anatomy) -> tuple[nn.Module, str]:
    """The first attention's module and the name of its output projection."""
    assert anatomy.query is not None
    path = anatomy.query.name.rsplit(".", 1 if anatomy.family == "torchvision" else 2)[0]
    output = {"aprillab": "out", "torchvision": "out_proj", "timm": "proj", "transformers": "o_proj"}[anatomy.family]
    if f"{path}.{output}.weight" not in tensors_of(model):  # transformers 4
        path = path.rsplit(".", 1)[0]
        output = "output.dense"
    return model.get_submodule(path), f"{path}.{output}"


def attention_by_hand(u: Tensor, t: dict[str, Tensor], anatomy: Anatomy, out: str) -> Tensor:
    """Multi-head attention of u (tokens, d) from the rows that the anatomy names."""
    heads = anatomy.heads or 1

    def project(weight: Rows | None, bias: Rows | None) -> Tensor:
        assert weight is not None
        y = u @ weight.of(t).T
        y = y if bias is None else y + bias.of(t)
        return y.reshape(len(u), heads, -1).transpose(0, 1)  # (heads, tokens, d_k)

    q = project(anatomy.query, anatomy.query_bias)
    k = project(anatomy.key, anatomy.key_bias)
    v = project(anatomy.value, anatomy.value_bias)
    mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1) @ v
    return mixed.transpose(0, 1).reshape(len(u), -1) @ t[f"{out}.weight"].T + t.get(f"{out}.bias", 0)


# --- What the names stand for -----------------------------------------------------------------------------------


def test_names_exist_and_sizes_are_right(case: tuple[nn.Module, Anatomy, str]) -> None:
    model, anatomy, which = case
    _, first_block, position_prefix, prefix = CASES[which]
    tensors = tensors_of(model)
    d, c, patch, _ = tensors[anatomy.patch_weight].shape
    n = (anatomy.image_size[0] // patch) * (anatomy.image_size[1] // patch)
    assert (anatomy.first_block, anatomy.position_prefix, anatomy.prefix) == (first_block, position_prefix, prefix)
    assert c == 3
    assert anatomy.position is not None
    assert tensors[anatomy.position].flatten(0, -2).shape == (position_prefix + n, d)
    assert all(tensors[name].shape[-1] == d for name in anatomy.prefix)
    assert (anatomy.norm_weight is None) == (first_block == "april")
    for rows in (anatomy.query, anatomy.key, anatomy.value):
        assert rows is not None
        assert rows.of(tensors).shape == (d, d)
    no_qkv_bias = which in ("own no bias", "transformers no qkv bias")
    for rows in (anatomy.query_bias, anatomy.key_bias, anatomy.value_bias):
        assert (rows is None) == no_qkv_bias
        assert rows is None or rows.of(tensors).shape == (d,)
    assert anatomy.head_weight is not None
    assert len(tensors[anatomy.head_weight]) == 5
    assert (anatomy.head_bias is None) == (which == "own no bias")
    assert (anatomy.patch_bias is None) == (which in ("own no bias", "clip"))
    # Every name that is reported, parsed back, is a tensor.
    for text in anatomy.names().values():
        for name in text.split(", "):
            assert Rows.parse(name).of(tensors) is not None


def test_queries_keys_and_values_are_what_they_are_called(case: tuple[nn.Module, Anatomy, str]) -> None:
    model, anatomy, _ = case
    attention, out = first_attention(model, anatomy)
    seen: dict[str, Tensor] = {}

    def hook(_: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        seen["u"] = inputs[0][0].detach()
        seen["output"] = (output if isinstance(output, Tensor) else output[0])[0].detach()

    handle = attention.register_forward_hook(hook)
    gradients = gradients_of(model, *private_batch(model))
    handle.remove()
    tensors = tensors_of(model)
    torch.testing.assert_close(attention_by_hand(seen["u"], tensors, anatomy, out), seen["output"])
    for swapped in (
        replace(anatomy, query=anatomy.key, key=anatomy.query),
        replace(anatomy, query=anatomy.value, value=anatomy.query),
        replace(anatomy, key=anatomy.value, value=anatomy.key),
    ):
        wrong = attention_by_hand(seen["u"], tensors, swapped, out)
        assert (wrong - seen["output"]).norm() > 1e-3 * seen["output"].norm(), "a swap would not be noticed"

    # Each gradient is (∂l/∂q)ᵀ u: its rows lie in the span of u_0 … u_n.
    U = torch.linalg.qr(seen["u"].T).Q  # (d, tokens)
    assert U.shape[1] < U.shape[0]
    for rows in (anatomy.query, anatomy.key, anatomy.value):
        assert rows is not None
        g = rows.of(gradients)
        assert g is not None
        assert g.norm() > 0
        assert (g - g @ U @ U.T).norm() < 1e-9 * g.norm()
        assert (g - g @ U[:, 1:] @ U[:, 1:].T).norm() > 1e-4 * g.norm(), "the span test cannot fail"
    # Softmax forgets a shift of all scores of a query, so the key bias gets no gradient,
    # and only that one.
    if anatomy.key_bias is not None:
        q, k, v = (r.of(gradients).norm() for r in (anatomy.query_bias, anatomy.key_bias, anatomy.value_bias))
        assert k < 1e-9 * min(q, v)


def test_position_rows_after_the_prefix_are_the_patches(case: tuple[nn.Module, Anatomy, str]) -> None:
    model, anatomy, _ = case
    images, labels = private_batch(model)
    gradients = gradients_of(model, images, labels)
    W = gradients[anatomy.patch_weight].flatten(1)  # (d, p)
    X = patchify(images, gradients[anatomy.patch_weight].shape[-1])[0]  # (n, p)
    rows = gradients[anatomy.position or ""].flatten(0, -2)
    G = rows[anatomy.position_prefix :]
    assert len(G) == len(X)
    assert W.norm() > 0
    torch.testing.assert_close(G.T @ X, W, rtol=0, atol=1e-12 * float(W.abs().max()) * len(X))
    shifted = rows.roll(1, 0)[anatomy.position_prefix :]
    assert (shifted.T @ X - W).norm() > 0.1 * W.norm(), "off by one would not be noticed"


def test_the_norm_is_the_one_before_the_first_attention(case: tuple[nn.Module, Anatomy, str]) -> None:
    model, anatomy, _ = case
    if anatomy.norm_weight is None:
        pytest.skip("architecture A has none")
    attention, _ = first_attention(model, anatomy)
    inputs: list[Tensor] = []
    attention_handle = attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    norm = model.get_submodule(anatomy.norm_weight.rsplit(".", 1)[0])
    norm_handle = norm.register_forward_hook(lambda _, args, output: inputs.append(output))
    gradients_of(model, *private_batch(model))
    attention_handle.remove()
    norm_handle.remove()
    assert len(inputs) == 2
    assert torch.equal(inputs[0], inputs[1])


def test_first_block_is_prenorm_only_where_the_norm_reads_patch_plus_position() -> None:
    for which, (build, first_block, _, _) in CASES.items():
        if "own" in which or first_block == "april":
            continue
        model = randomize(build().double(), std=0.05).eval()
        anatomy = dissect(model)
        tokens: list[Tensor] = []
        handle = model.get_submodule((anatomy.norm_weight or "").rsplit(".", 1)[0]).register_forward_pre_hook(
            lambda _, args, tokens=tokens: tokens.append(args[0].detach())
        )
        images, labels = private_batch(model)
        gradients_of(model, images, labels)
        handle.remove()
        t = tensors_of(model)
        W = t[anatomy.patch_weight]
        E = t[anatomy.position or ""].flatten(0, -2)[anatomy.position_prefix :]
        z = patchify(images, W.shape[-1])[0] @ W.flatten(1).T + t.get(anatomy.patch_bias or "", 0) + E
        same = torch.allclose(tokens[0][0, -len(z) :], z, rtol=1e-9, atol=1e-9)
        assert same == (first_block == "prenorm"), which


# --- Full size, without memory ----------------------------------------------------------------------------------

FULL_SIZE = {
    "vit_b_16": (768, 12, 196),
    "vit_b_32": (768, 12, 49),
    "vit_l_16": (1024, 16, 196),
    "vit_h_14": (1280, 16, 256),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_torchvision_at_full_size(name: str) -> None:
    width, heads, patches = FULL_SIZE[name]
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    anatomy, tensors = dissect(model), tensors_of(model)
    assert (anatomy.family, anatomy.heads, anatomy.image_size) == ("torchvision", heads, (224, 224))
    assert tensors[anatomy.position or ""].shape == (1, 1 + patches, width)
    assert str(anatomy.value) == (
        f"encoder.layers.encoder_layer_0.self_attention.in_proj_weight[{2 * width}:{3 * width}]"
    )
    assert anatomy.preprocessing is IMAGENET


@pytest.mark.parametrize(
    ("name", "patches", "mean"),
    [
        ("vit_small_patch16_224", 196, 0.5),
        ("deit_tiny_distilled_patch16_224", 196, 0.485),
        ("vit_small_patch14_reg4_dinov2", 1369, 0.485),
        ("vit_base_patch16_siglip_224", 196, 0.5),
        ("vit_base_patch16_clip_224", 196, 0.48145466),
    ],
)
def test_timm_at_full_size(name: str, patches: int, mean: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    anatomy = dissect(model)
    tensors = tensors_of(model)
    assert len(tensors[anatomy.position or ""].flatten(0, -2)) == anatomy.position_prefix + patches
    assert anatomy.preprocessing.mean[0] == mean
    assert (anatomy.head_weight is None) == ("siglip" in name or "dinov2" in name)  # those come without a classifier


def test_blocks_of_timm_that_are_not_prenorm_are_unknown() -> None:
    with torch.device("meta"):
        residual_post_norm = timm.create_model("vit_base_patch16_rpn_224", depth=1)
        parallel_layers = timm.create_model("vit_small_patch16_18x2_224", depth=1)
        fused_parallel = timm.create_model("vit_base_patch16_xp_224", depth=1)
        rms = timm.create_model("vit_small_patch16_224", depth=1, norm_layer="rmsnorm")
    assert {dissect(m).first_block for m in (parallel_layers, fused_parallel)} == {"unknown"}
    assert dissect(residual_post_norm).first_block == "postnorm"
    assert dissect(residual_post_norm).norm_weight is None
    assert dissect(rms).first_block == "rmsnorm"
    assert dissect(parallel_layers).query is None
    assert dissect(fused_parallel).query is None


# --- Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_r_s16_p8_224", "patches of a CNN's feature map"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos is not a Vision Transformer known to aprillab"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer is not a Vision Transformer known to aprillab"),
        ("vit_so400m_patch14_siglip_384", r"patches of 14 pixels do not tile an image of \(384, 384\)"),
    ],
)
def test_timm_models_that_cannot_be_attacked_say_why(name: str, message: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=message):
        dissect(model)


def test_a_normalized_patch_embedding_is_refused() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", depth=1, embed_norm_layer="layernorm")
    with pytest.raises(UnknownModelError, match="normalizes the embedded patches"):
        dissect(model)


def test_a_convolutional_stem_is_refused() -> None:
    stem = torchvision.models.vision_transformer.ConvStemConfig(out_channels=8, kernel_size=3, stride=4)
    model = TorchvisionViT(
        image_size=16, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, conv_stem_configs=[stem]
    )
    with pytest.raises(UnknownModelError, match="convolutional stem"):
        dissect(model)


def test_an_unknown_model_is_told_what_was_looked_for() -> None:
    with pytest.raises(UnknownModelError) as error:
        dissect(nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.Flatten(2), nn.TransformerEncoderLayer(16, 2)))
    for word in (
        "torch.nn.modules.container.Sequential",
        "torchvision's VisionTransformer",
        "transformers' ViT, DeiT, Dinov2",
        "0.weight (16, 3, 8, 8)",
        "dissect(model, patch_weight=",
    ):
        assert word in str(error.value)
    with pytest.raises(UnknownModelError, match=r"\(kernel = stride\): none"):
        dissect(nn.Linear(3, 2))


QKV = "blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"pach_weight": "x"}, "no part is called pach_weight; there are adapters, channels, embedding_norm_bias"),
        ({"position": "pos"}, "has no tensor called pos; its tensors are cls_token"),
        ({"prefix": ("cls_token", "registers")}, "has no tensor called registers"),
        ({"query": "blocks.0.attn.q.weight[0:3]"}, r"has no tensor called blocks.0.attn.q.weight"),
        ({"query": "blocks.0.attn.qkv.weight[0:"}, r"is neither 'name' nor 'name\[start:stop\]'"),
        (
            {"patch_weight": "head.weight"},
            r"of shape \(5, 192\) is a linear map of flattened patches: give patch_size",
        ),
        ({"image_size": 50}, r"patches of 16 pixels do not tile an image of \(50, 50\)"),
        ({"image_size": (32, 48)}, r"takes pictures of 48×48 only \(dynamic_img_size=False\)"),
        ({"image_size": 0}, r"image_size must be a number of pixels or \(height, width\), not 0"),
        ({"image_size": "48xa"}, r"image_size must be a number of pixels or \(height, width\), not '48xa'"),
        ({"position": 3}, "position must be the name of a tensor, not 3"),
        ({"query": 3}, "query must be the name of a tensor, not 3"),
        ({"position_prefix": "one"}, "position_prefix must be a whole number, not 'one'"),
        ({"first_block": "preNorm"}, "first_block must be one of 'april', .*, not 'preNorm'"),
        ({"preprocessing": "half"}, "preprocessing must be a Preprocessing"),
        ({"pixel_order": "h w"}, "pixel_order must have the letters c, h and w"),
        ({"pixel_order": "h w c"}, "is a convolution's: it reads 'c h w'"),
        ({"patch_size": 8}, r"has patches of 16×16 pixels and 3 channels, not patch_size=\(8, 8\)"),
        ({"patch_weight": "head.bias"}, r"must have shape \(d, C, P, P\) or \(d, p\), not \(5,\)"),
        ({"prefix": ("head.bias",)}, r"prefix 'head.bias' must have width 192, not shape \(5,\)"),
        ({"head_weight": "head.bias"}, r"head_weight 'head.bias' must have 2 dimensions"),
        ({"vit": "encoder"}, r"vit='encoder' is no module of this model; its Vision Transformers are at ''"),
        ({"position_prefix": 0}, "position_prefix \\+ patches = 0 \\+ 9 rows"),
        ({"position": "head.weight"}, r"not shape \(5, 192\)"),
        ({"query": QKV}, r"query, key, value must be rows of one shape, \('m', 192\), not .*\(576, 192\)"),
        ({"query": f"{QKV}[0:191]"}, r"\(191, 192\)"),
        ({"query": f"{QKV}[9:9]", "key": f"{QKV}[9:9]", "value": f"{QKV}[9:9]"}, r"\(0, 192\)"),
        ({"query_bias": QKV}, r"query_bias, key_bias, value_bias must be rows of one shape, \('m',\)"),
        ({"norm_weight": "blocks.0.mlp.fc1.bias"}, r"norm_weight .* must have shape \(192,\), not \(768,\)"),
    ],
)
def test_wrong_parts_are_refused(parts: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dissect(of_timm("vit_tiny_patch16_224"), **parts)


# --- By name, nested, replaced ----------------------------------------------------------------------------------


def test_an_unknown_model_can_be_described_by_name() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut = nn.Conv2d(1, 8, 4, stride=4)
            self.where = nn.Parameter(torch.zeros(6, 8))
            self.register_buffer("qkv", torch.arange(24 * 8.0).reshape(24, 8))

    model = Embedding()
    with pytest.raises(UnknownModelError):
        dissect(model)
    with pytest.raises(UnknownModelError):
        dissect(model, patch_weight="cut.weight")
    anatomy = dissect(
        model,
        patch_weight="cut.weight",
        patch_bias="cut.bias",
        image_size=[8, 12],
        position="where",
        query="qkv[:8]",
        key="qkv[8:16]",
        value=Rows("qkv", 16),
        first_block="april",
        preprocessing=HALF,
    )
    assert anatomy.family == "described by the caller"
    assert anatomy.image_size == (8, 12)
    tensors = tensors_of(model)
    assert anatomy.key is not None
    assert anatomy.value is not None
    assert torch.equal(anatomy.key.of(tensors), tensors["qkv"][8:16])
    assert torch.equal(anatomy.value.of(tensors), tensors["qkv"][16:])
    assert anatomy.names()["query"] == "qkv[:8]"
    assert anatomy.names()["value"] == "qkv[16:]"
    assert anatomy.head_weight is None
    assert dissect(model, patch_weight="cut.weight", image_size=8).image_size == (8, 8)


def test_parts_handed_over_correct_what_was_found() -> None:
    model = of_timm("vit_tiny_patch16_224")
    found = dissect(model)
    mine = Preprocessing((0.1,), (0.9,))
    corrected = dissect(model, preprocessing=mine, prefix="cls_token", first_block="unknown")
    assert corrected == replace(found, preprocessing=mine, first_block="unknown")


@pytest.mark.parametrize(
    "build", [tiny_vit, of_torchvision, lambda: of_timm("vit_tiny_patch16_224"), of_transformers]
)
def test_a_model_in_a_wrapper_is_found_under_its_full_names(build: Callable[[], nn.Module]) -> None:
    vit = build()
    wrapped = nn.Sequential(nn.Identity(), nn.ModuleDict({"vit": vit}))
    inside, outside = dissect(vit), dissect(wrapped)
    tensors = tensors_of(wrapped)
    for field in fields(Anatomy):
        inner, outer = getattr(inside, field.name), getattr(outside, field.name)
        if isinstance(inner, Rows):
            assert outer == replace(inner, name=f"1.vit.{inner.name}")
            assert outer.name in tensors
        elif field.name == "prefix":
            assert outer == tuple(f"1.vit.{name}" for name in inner)
        elif isinstance(inner, str) and field.name not in (
            "family",
            "first_block",
            "pixel_order",
            "root",
            "vit",
            "remark",
        ):
            assert outer == f"1.vit.{inner}"
            assert outer in tensors
        elif field.name in ("root", "vit"):
            assert (inner, outer) == ("", "1.vit")
        else:
            assert outer == inner


def test_replaced_heads_are_found_or_absent() -> None:
    model = of_torchvision()
    model.heads = nn.Linear(24, 3, bias=False)
    assert (dissect(model).head_weight, dissect(model).head_bias) == ("heads.weight", None)
    model.heads = nn.Identity()
    assert dissect(model).head_weight is None
    own = tiny_vit()
    own.head = nn.Sequential(nn.Linear(24, 7), nn.GELU(), nn.Linear(7, 5, bias=False))
    assert (dissect(own).head_weight, dissect(own).head_bias) == ("head.2.weight", None)
    own.head = nn.Identity()
    assert dissect(own).head_weight is None
    hugging = of_transformers(num_labels=0)
    assert dissect(hugging).head_weight is None
    assert dissect(of_timm("vit_tiny_patch16_224", num_classes=0)).head_weight is None


def test_own_positions() -> None:
    assert dissect(tiny_vit(position="none")).position is None
    for position in ("learned", "frozen", "sinusoidal"):
        model = tiny_vit(position=position)
        assert dissect(model).position == "position_embedding"
        assert "position_embedding" in tensors_of(model)


def test_a_subclass_is_known_by_its_family() -> None:
    class Mine(VisionTransformer):
        pass

    assert dissect(Mine(image_size=8, patch_size=4, width=8, depth=1, heads=2, classes=2)).family == "aprillab"


# --- Rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a.b", "a.b[0:4]", "a.b[:4]", "a.b[4:]", "a.b[0:0]"])
def test_rows_survive_being_printed(text: str) -> None:
    rows = Rows.parse(text)
    assert str(rows) == text
    assert Rows.parse(str(rows)) == rows


def test_rows_are_the_rows() -> None:
    t = torch.arange(12).reshape(6, 2)
    assert Rows.parse(" w[2:4] ").of({"w": t}).tolist() == [[4, 5], [6, 7]]
    assert Rows("w").of({"w": t}) is not None
    assert Rows("w").of({}) is None
    for wrong in ("", "w[", "w[1]", "w[1:2", "w[a:b]", "[1:2]"):
        with pytest.raises(ValueError, match="is neither 'name' nor"):
            Rows.parse(wrong)


def test_tensors_of_holds_parameters_and_buffers_detached() -> None:
    model = tiny_vit(position="sinusoidal")
    tensors = tensors_of(model)
    assert set(tensors) == set(model.state_dict())
    assert not any(t.requires_grad for t in tensors.values())
    assert tensors["head.weight"].data_ptr() == model.head.weight.data_ptr()
