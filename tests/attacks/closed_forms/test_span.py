"""The span attack: without a position gradient, with any LayerNorm, at the least width."""

import pytest
import torch
from attacked import attack, db, make, private

import aprillab as al


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
