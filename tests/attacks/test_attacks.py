"""The closed forms: exact where their conditions hold, refused or marked where they do not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aprillab as al
from aprillab.attacks import CLOSED_FORMS
from aprillab.attacks.evidence import one_image_residual

SHAPE = {"image_size": 16, "patch_size": 4, "width": 96, "depth": 2, "heads": 3, "classes": 7}


def make(block="prenorm", position="learned", dtype=torch.float64, **changes):
    model = al.VisionTransformer(**{**SHAPE, "block": block, "position": position, **changes}).to(dtype)
    return model.eval()


def private(model, batch=1, seed=0):
    """Random pictures in [0, 1] for ``model``: noise, the hardest picture for any prior."""
    parameter = model.head.weight
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.channels, model.image_size, model.image_size)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def attack(model, pixels, name, labels=(3,), withhold=(), **options):
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor(labels), withhold=withhold)
    return al.invert(model, update, attack=name, **options)


def db(reconstruction, pixels):
    return min(al.psnr(r, p) for r, p in zip(reconstruction.pixels, pixels.double(), strict=True))


BLOCKS = {"embedding": "prenorm", "april": "april", "span": "prenorm"}


@pytest.fixture(params=["embedding", "april", "span"])
def name(request):
    return request.param


# What every closed form must do


def test_exact_in_float64(name):
    model = make(BLOCKS[name])
    pixels = private(model)
    result = attack(model, pixels, name)
    assert db(result, pixels) > 150
    assert result.exact, result.reason
    assert result.labels.tolist() == [3]
    assert result.images.shape == pixels.shape
    torch.testing.assert_close(al.HALF.to_pixels(result.images), result.pixels)
    assert result.seconds > 0


def test_biases_heads_and_missing_class_token_change_nothing(name):
    for changes in ({"bias": False}, {"heads": 1}, {"heads": 8}, {"class_token": False}, {"channels": 1}):
        model = make(BLOCKS[name], **changes)
        pixels = private(model)
        assert db(attack(model, pixels, name), pixels) > 120, changes


def test_a_batch_of_two_is_never_called_exact(name):
    model = make(BLOCKS[name])
    pixels = private(model, batch=2)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3, 3]))
    silent = al.ClientUpdate(update.gradients)  # the client does not say how many images it used
    for shared in (update, silent):
        result = al.invert(model, shared, attack=name)
        assert not result.exact
        assert "one image" in result.reason


def test_the_gradient_of_another_parameter_is_noticed(name):
    model = make(BLOCKS[name])
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    bad = dict(update.gradients)
    patch = al.dissect(model).patch_weight
    bad[patch] = bad[patch].flip(1)  # channels in another order: still a gradient's shape, not this picture's
    result = al.invert(model, al.ClientUpdate(bad), attack=name, verify=True)
    assert result.diagnostics["gradient_residual"] > 1e-3


def test_verify_replays_the_client(name):
    model = make(BLOCKS[name])
    pixels = private(model)
    assert attack(model, pixels, name, verify=True).diagnostics["gradient_residual"] < 1e-8


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_not_finite_is_refused(name, poison):
    model = make(BLOCKS[name])
    update = al.client_update(model, al.HALF.to_input(private(model)), torch.tensor([3]))
    key = al.dissect(model).patch_weight
    update.gradients[key].view(-1)[5] = poison
    with pytest.raises(al.UpdateError, match="NaN or infinite"):
        al.invert(model, update, attack=name)


def test_another_models_update_is_refused(name):
    model, other = make(BLOCKS[name]), make(BLOCKS[name], width=48)
    update = al.client_update(other, al.HALF.to_input(private(other)), torch.tensor([3]))
    with pytest.raises(al.UpdateError, match="shape"):
        al.invert(model, update, attack=name)


def test_half_precision_is_attacked_and_marked(name):
    model = make(BLOCKS[name])
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3])).to(dtype=torch.bfloat16)
    result = al.invert(model, update, attack=name)
    assert result.diagnostics["precision"] == "bfloat16"
    assert not result.exact
    assert result.images.dtype == torch.float64


def test_deterministic_and_without_traces(name):
    model = make(BLOCKS[name], dtype=torch.float32)
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    sent = {key: g.clone() for key, g in update.gradients.items()}
    weights = {key: t.clone() for key, t in model.state_dict().items()}
    state, dtype, threads = torch.random.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    first, second = (al.invert(model, update, attack=name) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)
    assert all(torch.equal(update.gradients[key], g) for key, g in sent.items())
    assert all(torch.equal(model.state_dict()[key], t) for key, t in weights.items())
    assert all(p.grad is None for p in model.parameters())


def test_a_zero_gradient_below_the_head_is_refused(name):
    model = make(BLOCKS[name])
    torch.nn.init.zeros_(model.head.weight)
    update = al.client_update(model, al.HALF.to_input(private(model)), torch.tensor([3]))
    with pytest.raises(al.AttackNotApplicable, match="zero"):
        al.invert(model, update, attack=name)
    assert al.recover_labels(model, update).labels.tolist() == [3]


def test_the_scale_of_the_loss_does_not_matter(name):
    model = make(BLOCKS[name])
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    scaled = al.ClientUpdate({key: 1e-6 * g for key, g in update.gradients.items()})
    assert db(al.invert(model, scaled, attack=name), pixels) > 150


def test_the_prediction_without_the_original_is_near_the_truth(name):
    errors = []
    for seed in range(4):
        model = make(BLOCKS[name], seed=seed, dtype=torch.float32)
        pixels = private(model, seed=seed)
        result = attack(model, pixels, name)
        errors.append(result.predicted_psnr - db(result, pixels))
    assert max(abs(error) for error in errors) < 15, errors


# Each attack's own conditions


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4]),
    per_head=st.integers(12, 24),
    patch=st.sampled_from([2, 4]),
    channels=st.sampled_from([1, 3]),
    bias=st.booleans(),
    class_token=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_aprils_identity(heads, per_head, patch, channels, bias, class_token, seed):
    """Gᵀ Z = W_Qᵀ∂W_Q + W_Kᵀ∂W_K + W_Vᵀ∂W_V for any shape, in float64."""
    model = make(
        "april", image_size=8, patch_size=patch, width=heads * per_head, heads=heads, channels=channels, bias=bias,
        class_token=class_token, seed=seed,
    )  # fmt: skip
    pixels = private(model, seed=seed)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([1]))
    tokens = model.embed(al.HALF.to_input(pixels))[0].detach()  # (tokens, d)
    G = update.gradients["position_embedding"][0]  # (tokens, d)
    M = al.attention_product(al.dissect(model), dict(model.named_parameters()), update.gradients).detach()
    torch.testing.assert_close(G.T @ tokens, M, rtol=1e-9, atol=1e-12 * float(M.abs().max()) + 1e-18)


def test_april_plain_and_damped_agree_in_float64():
    model = make("april")
    pixels = private(model)
    plain = attack(model, pixels, "april", regularization="none")
    damped = attack(model, pixels, "april")
    torch.testing.assert_close(plain.images, damped.images, rtol=1e-7, atol=1e-7)
    assert plain.diagnostics["damping"] == 0.0


def test_april_damping_helps_in_float32():
    model = al.VisionTransformer(image_size=64, patch_size=8, width=192, depth=4, heads=3, classes=10, block="april")
    gains = []
    for victim in ("rocket", "retina", "chelsea"):
        pixels = al.load_victim(victim, 64)[None]
        plain = attack(model, pixels, "april", regularization="none")
        damped = attack(model, pixels, "april")
        gains.append(db(damped, pixels) - db(plain, pixels))
    assert min(gains) > -1
    assert max(gains) > 3


def test_april_with_more_pixels_than_width():
    """p = 192 > d = 96: the second step alone loses pixels, the patch embedding's row space has them."""
    model = make("april", image_size=32, patch_size=8)
    pixels = private(model)
    alone = attack(model, pixels, "april", systems="attention")
    assert alone.diagnostics["pixels_lost"] == 96
    assert not alone.exact
    assert "pixels determined" in alone.reason
    assert db(alone, pixels) < 20
    assert alone.predicted_psnr < 20
    plain = attack(model, pixels, "april", systems="attention", regularization="none")
    assert plain.predicted_psnr < 20
    default = attack(model, pixels, "april")
    assert default.diagnostics["systems"] == "row_space"
    assert default.diagnostics["pixels_lost"] == 0
    assert db(default, pixels) > 100
    assert default.exact, default.reason
    assert db(attack(model, pixels, "april", systems="both"), pixels) > 100


def test_april_refuses_a_residual_block():
    model = make("prenorm")
    with pytest.raises(al.AttackNotApplicable, match="LayerNorm"):
        attack(model, private(model), "april")


@pytest.mark.parametrize("name", ["april", "embedding"])
def test_a_withheld_position_gradient_is_refused(name):
    model = make(BLOCKS[name])
    with pytest.raises(al.AttackNotApplicable, match="position"):
        attack(model, private(model), name, withhold=["position_embedding"])


@pytest.mark.parametrize("name", ["april", "embedding"])
def test_more_tokens_than_width_are_refused(name):
    model = make(BLOCKS[name], image_size=32, patch_size=4, width=48)
    with pytest.raises(al.AttackNotApplicable, match=r"n ≤ d|n \+ 1 ≤ d"):
        attack(model, private(model), name)


def test_april_without_the_patch_embeddings_gradient():
    model = make("april")
    pixels = private(model)
    assert db(attack(model, pixels, "april", withhold=["patch_embedding.weight"]), pixels) > 150
    with pytest.raises(al.AttackNotApplicable, match="row_space"):
        attack(model, pixels, "april", withhold=["patch_embedding.weight"], systems="row_space")


def test_april_unknown_options():
    model = make("april")
    with pytest.raises(ValueError, match="regularization"):
        attack(model, private(model), "april", regularization="magic")
    with pytest.raises(ValueError, match="systems"):
        attack(model, private(model), "april", systems="all")


def test_a_shallow_model_gives_a_deficient_gradient():
    """One block read at the class token: the rows of G are spanned by two vectors a head, and one for token 0."""
    model = make("april", depth=1)
    result = attack(model, private(model), "april")
    assert result.diagnostics["rank"] <= 2 * SHAPE["heads"] + 1
    assert not result.exact
    assert "rank" in result.reason


def test_embedding_needs_no_weights():
    model, other = make("prenorm", seed=0), make("prenorm", seed=1)
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    assert db(al.invert(other, update, attack="embedding"), pixels) > 150


def test_an_off_by_one_in_the_prefix_cannot_pass():
    model = make("prenorm")
    with pytest.raises(ValueError, match="position_prefix"):
        al.dissect(model, position_prefix=0)


@pytest.mark.parametrize("block", ["prenorm", "april"])
@pytest.mark.parametrize("position", ["learned", "frozen", "sinusoidal"])
def test_span_needs_no_position_gradient(block, position):
    model = make(block, position)
    pixels = private(model)
    withhold = ["position_embedding"] if position == "learned" else []
    result = attack(model, pixels, "span", withhold=withhold)
    assert db(result, pixels) > 90
    assert result.exact, result.reason


def test_span_with_a_shifted_and_scaled_layernorm():
    """γ of either sign and β ≠ 0: β/γ joins the span, in the place of the mean's direction."""
    model = make("prenorm", "frozen")
    generator = torch.Generator().manual_seed(1)
    norm = model.blocks[0].attention_norm
    with torch.no_grad():
        size = 0.1 + torch.rand(96, generator=generator, dtype=torch.float64)
        norm.weight.copy_(size * torch.randn(96, generator=generator, dtype=torch.float64).sign())
        norm.bias.copy_(torch.randn(96, generator=generator, dtype=torch.float64))
    pixels = private(model)
    result = attack(model, pixels, "span")
    assert result.diagnostics["width_needed"] == 16 + 17 + 1
    assert result.diagnostics["usable_width"] == 96
    assert db(result, pixels) > 110


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_span_at_the_least_width(beta):
    """n = 16 patches, 17 tokens: d = 34 suffices and d = 33 is refused, with a β or without."""
    for width in (33, 34):
        model = make("prenorm", "frozen", width=width, heads=1)
        generator = torch.Generator().manual_seed(1)
        torch.nn.init.normal_(model.blocks[0].attention_norm.bias, std=beta, generator=generator)
        pixels = private(model)
        if width == 33:
            with pytest.raises(al.AttackNotApplicable, match="34 > 33"):
                attack(model, pixels, "span")
        else:
            assert db(attack(model, pixels, "span"), pixels) > 90


def test_span_with_dead_features():
    """γ = 0 hides a feature from the attention: it is left out, and the others suffice."""
    model = make("prenorm", "frozen")
    with torch.no_grad():
        model.blocks[0].attention_norm.weight[:5] = 0
    pixels = private(model)
    result = attack(model, pixels, "span")
    assert result.diagnostics["usable_width"] == 91
    assert db(result, pixels) > 110


def test_span_with_more_pixels_than_width():
    model = make("prenorm", "frozen", image_size=32, patch_size=8)  # p = 192 > d = 96, n = 16
    pixels = private(model)
    assert db(attack(model, pixels, "span"), pixels) > 90


def test_span_counts_its_equations():
    model = make("prenorm", "frozen", image_size=32, patch_size=4)  # n = 64: min(48, 64) + 65 + 1 > 96
    with pytest.raises(al.AttackNotApplicable, match="114 > 96"):
        attack(model, private(model), "span")
    marked = attack(model, private(model), "span", strict=False)
    assert not marked.exact
    assert "enough width fails" in marked.reason


def test_span_refuses_what_it_cannot_read():
    model = make("prenorm", "none")
    with pytest.raises(al.AttackNotApplicable, match="position embedding"):
        attack(model, private(model), "span")
    model = make("prenorm")
    with pytest.raises(al.AttackNotApplicable, match="query"):
        attack(model, private(model), "span", withhold=["blocks.0.attention.query.weight"])


# invert


def test_invert_takes_the_strongest_and_explains_the_rest():
    model = make("april")
    result = attack(model, private(model), "auto")
    assert result.attack == "embedding_closed_form"
    assert "not needed" in result.diagnostics["attacks"]["span"]
    frozen = make("prenorm", "frozen")
    result = attack(frozen, private(frozen), "auto")
    assert result.attack == "span_closed_form"
    assert "refused" in result.diagnostics["attacks"]["embedding"]
    assert "refused" in result.diagnostics["attacks"]["april"]
    assert set(result.diagnostics["attacks"]) == set(CLOSED_FORMS)


def test_invert_falls_back_where_pixels_exceed_the_width():
    model = make("prenorm", "none")
    with pytest.raises(al.AttackNotApplicable, match="no closed form fits") as refusal:
        attack(model, private(model), "auto")
    assert set(refusal.value.numbers) == set(CLOSED_FORMS)


def test_invert_tries_one_closed_form_on_a_batch():
    model = make("prenorm")
    result = attack(model, private(model, batch=2), "auto", labels=(3, 4))
    assert not result.exact
    assert "not tried" in result.diagnostics["attacks"]["span"]


def test_invert_with_bad_arguments():
    model = make("prenorm")
    with pytest.raises(ValueError, match="neither 'auto'"):
        attack(model, private(model), "magic")
    with pytest.raises(ValueError, match="named attack"):
        attack(model, private(model), "auto", strict=False)


def test_labels_known_to_the_attacker_are_kept():
    model = make("prenorm")
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    result = al.invert(model, update, labels=torch.tensor([5]))
    assert result.labels.tolist() == [5]
    assert "known" in result.diagnostics["labels"]


def test_one_image_residual_tells_one_from_two():
    model = make("prenorm")
    for labels in ([3], [3, 3], [3, 5]):
        update = al.client_update(model, al.HALF.to_input(private(model, len(labels))), torch.tensor(labels))
        residual = one_image_residual(update.gradients["head.weight"])
        assert (residual < 1e-12) == (len(labels) == 1)


# Other libraries' models


def torchvision_vit(**changes):
    import torchvision

    shape = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 96, "mlp_dim": 96}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(**{**shape, "num_classes": 10, **changes})
        torch.nn.init.normal_(model.heads.head.weight, std=0.02)
    return model.double().eval()


@pytest.mark.parametrize("name", ["embedding", "span"])
def test_torchvision(name):
    model = torchvision_vit()
    if name == "span":
        model.encoder.pos_embedding.requires_grad_(False)
    pixels = al.load_victim("astronaut", 32, dtype=torch.float64)[None]
    update = al.client_update(model, al.IMAGENET.to_input(pixels), torch.tensor([3]))
    assert db(al.invert(model, update, attack=name), pixels) > 100


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {"embed_dim": 192, "num_heads": 3}),
        ("vit_small_patch14_reg4_dinov2", {"embed_dim": 192, "num_heads": 3, "num_classes": 10, "patch_size": 16}),
    ],
)
def test_timm(architecture, options):
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(architecture, img_size=48, depth=2, **options).double().eval()
        for head in (model.head, getattr(model, "head_dist", None)):
            if head is not None:
                torch.nn.init.normal_(head.weight, std=0.02)
    pixels = al.load_victim("astronaut", 48, dtype=torch.float64)[None]
    anatomy = al.dissect(model)
    x = anatomy.preprocessing.to_input(pixels)
    update = al.client_update(model, x, torch.tensor([3]))
    assert db(al.invert(model, update, attack="embedding"), pixels) > 100
    assert db(al.invert(model, update, attack="span"), pixels) > 60
    assert al.recover_labels(model, update).labels.tolist() == [3]


def test_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config).double().eval()
    pixels = al.load_victim("astronaut", 32, dtype=torch.float64)[None]
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    assert db(al.invert(model, update, attack="embedding"), pixels) > 60
    assert db(al.invert(model, update, attack="span"), pixels) > 40
