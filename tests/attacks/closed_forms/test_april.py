"""APRIL's closed form: its identity, its damping, its own conditions."""

import pytest
import torch
from attacked import SHAPE, attack, db, make, private
from hypothesis import given, settings
from hypothesis import strategies as st

import aprillab as al


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
