"""The span attack: without a position gradient, with any LayerNorm, at the least width."""

import math
from dataclasses import replace

import pytest
import torch
from attacked import attack, db, make, private

import aprillab as al
from aprillab.attacks.closed_forms import smallest as smallest_module
from aprillab.attacks.closed_forms.noisy_span import noisy_span
from aprillab.attacks.closed_forms.smallest import smallest, smallest_combination
from aprillab.attacks.closed_forms.span import width_needed
from aprillab.attacks.closed_forms.token_equations import token_equations
from aprillab.audit import audit
from aprillab.federation import LocalTraining, train_locally, update_of


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
    three = [f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value")]
    with pytest.raises(al.AttackNotApplicable, match="query"):
        attack(model, private(model), "span", withhold=three)


@pytest.mark.parametrize("part", ["query", "value"])
def test_one_projection_of_three_is_enough(part):
    model = make("prenorm", "frozen")
    pixels = private(model)
    withheld = [f"blocks.0.attention.{other}.weight" for other in ("query", "key", "value") if other != part]
    result = attack(model, pixels, "span", withhold=withheld)
    assert result.diagnostics["rows_of"] == (part,)
    assert db(result, pixels) > 90
    assert result.exact, result.reason


WITHHELD = ["blocks.0.attention.query.weight", "blocks.0.attention.value.weight"]


@pytest.mark.parametrize("block", ["prenorm", "april"])
def test_the_keys_alone_do_with_a_token_that_is_public(block):
    model = make(block, "frozen")
    pixels = private(model)
    result = attack(model, pixels, "span", withhold=WITHHELD)
    assert db(result, pixels) > 100
    assert result.exact, result.reason
    assert result.diagnostics["public_rows"] == 1


def test_without_one_they_do_not_for_their_rows_are_of_differences():
    model = make("prenorm", "frozen", class_token=False)
    pixels = private(model)
    with pytest.raises(al.AttackNotApplicable, match="a shift of all keys changes no attention"):
        attack(model, pixels, "span", withhold=WITHHELD)
    assert not attack(model, pixels, "span", withhold=WITHHELD, strict=False).exact


# --- Its steps: tensors in, tensors out -----------------------------------------------------------


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outside_span(vectors, rows):
    """How much of each vector (w, n) lies outside the span of ``rows`` (m, w),
    relative to its length.
    """
    U, s, _ = torch.linalg.svd(rows.T, full_matrices=False)
    basis = U[:, s > 1e-10 * s[0]]
    return (vectors - basis @ (basis.T @ vectors)).norm(dim=0) / vectors.norm(dim=0)


@pytest.mark.parametrize("norm", ["none", "plain", "gamma", "gamma and beta", "dead features", "dead, with beta"])
def test_tokens_lie_in_the_span(norm):
    """(7.3) and (7.4): A x_i + e_i is a combination of the rows of D, whatever the LayerNorm."""
    n, d, p = 4, 20, 6
    W_e, places, X = normal(d, p), normal(n, d, seed=1), normal(n, p, seed=2)
    z = X @ W_e.T + places  # (n, d)
    gamma = None if norm == "none" else torch.ones(d).double()
    beta = normal(d, seed=4) if "beta" in norm else None
    if norm.startswith("gamma"):
        gamma = 0.2 + normal(d, seed=3).abs()
        gamma[::2] *= -1
    if norm.startswith("dead"):
        gamma[[2, 7, 11]] = 0.0
    read = z
    if gamma is not None:
        read = torch.nn.functional.layer_norm(z, (d,), gamma, beta)
    D = normal(3 * d, n, seed=5) @ read  # a sum over tokens of (something) uᵀ
    equations = token_equations(D, W_e, places, gamma, beta)
    tokens = equations.A @ X.T + equations.e  # (w, n)
    assert float(outside_span(tokens, equations.D).max()) < 1e-9
    other = equations.A @ normal(p, n, seed=6) + equations.e  # and another picture's do not
    assert float(outside_span(other, equations.D).min()) > 0.05
    alive = d - 3 * norm.startswith("dead")
    assert equations.usable == alive
    assert equations.D.shape == (3 * d, alive - (beta is not None))


def patch_is_determined(n, p, d, layernorm, seed=0):
    """Whether random tokens of width d have one solution only: no other x has its
    token in their span.

    The patch is looked for in the span of all patches, as ∂l/∂W_e gives it.
    """
    generator = torch.Generator().manual_seed(seed)
    W_e, places, X, first = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(d, p), (n, d), (n, p), (1, d)]
    )
    z = torch.cat([first, X @ W_e.T + places])  # n + 1 tokens
    if layernorm:
        z, W_e = z - z.mean(1, keepdim=True), W_e - W_e.mean(0)
    patches = torch.linalg.svd(X, full_matrices=False)[2].T  # (p, min(n, p))
    columns = torch.cat([W_e @ patches, z.T], 1)
    return int(torch.linalg.matrix_rank(columns, rtol=1e-10)) == columns.shape[1]


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize(("n", "p"), [(3, 8), (6, 4), (5, 5)])
def test_the_width_needed_is_the_least_that_works(n, p, layernorm):
    """By brute force: one solution at d = needed, more than one at d − 1."""
    needed = width_needed(n, p, 1, layernorm)
    for seed in range(3):
        assert patch_is_determined(n, p, needed, layernorm, seed)
        assert not patch_is_determined(n, p, needed - 1, layernorm, seed)


def test_smallest_is_the_least_squares_solution_and_says_its_costs():
    T, t, R, ratio = normal(15, 6), normal(15, 4, seed=1), normal(8, 6, seed=2), 0.7
    found = smallest(T, t, R, ratio, (T.T @ T, R.T @ R))
    stacked = torch.cat([T, ratio * R])
    right = torch.cat([-t, torch.zeros(8, 4).double()])
    torch.testing.assert_close(found.patches, torch.linalg.lstsq(stacked, right).solution)
    torch.testing.assert_close(found.token_cost, (T @ found.patches + t).square().sum(0))
    torch.testing.assert_close(found.pixel_cost, (R @ found.patches).square().sum(0))
    torch.testing.assert_close(found.root.T @ found.root, stacked.T @ stacked)


def test_some_of_many_patches_tell_how_pixels_weigh_against_tokens():
    """The ratio is that of the costs at ratio 1; of 196 patches 49 are asked, of 12 all."""
    equations = token_equations(normal(120, 60), normal(60, 12, seed=1), normal(196, 60, seed=2))
    sides = noisy_span(equations.D, 20, 1e-7), noisy_span(normal(60, 12, seed=3), 6, 1e-7)
    T, t = sides[0].coefficients(equations.A), sides[0].coefficients(equations.e)
    R = sides[1].coefficients()
    torch.testing.assert_close(R, sides[1].coefficients(torch.eye(12).double()))
    for count, tolerance in ((196, 0.05), (12, 1e-9)):
        some = replace(equations, e=equations.e[:, :count])
        at_one = smallest(T, t[:, :count], R, 1.0, (T.T @ T, R.T @ R))
        expected = (at_one.token_cost / at_one.pixel_cost).median().sqrt()
        found, _, ratio = smallest_combination([(some, sides[0])], sides[1])
        assert found.patches.shape == (12, count)
        assert ratio == pytest.approx(float(expected), rel=tolerance)


@pytest.fixture
def qr_calls(monkeypatch):
    """The shapes of the matrices that QR was asked for."""
    shapes, qr = [], torch.linalg.qr

    def counted(matrix, *arguments, **options):
        shapes.append(tuple(matrix.shape))
        return qr(matrix, *arguments, **options)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    return shapes


@pytest.mark.parametrize(("least", "by_qr"), [(1e-2, False), (1e-3, False), (1e-6, True), (1e-9, True)])
def test_ill_conditioned_equations_go_to_qr_and_both_ways_agree(least, by_qr, qr_calls, monkeypatch):
    """Condition 1e4 squared is where the ways part; both solve as well as QR on either side."""
    columns = torch.logspace(0, math.log10(least), 6, dtype=torch.float64)
    mixed = torch.linalg.qr(normal(6, 6, seed=3)).Q  # scaled columns alone are easy for Cholesky
    T, X = torch.linalg.qr(normal(15, 6)).Q * columns @ mixed, normal(6, 4, seed=1)
    qr_calls.clear()
    R = 1e-4 * least * normal(8, 6, seed=2)
    arguments = T, -T @ X, R, 1.0, (T.T @ T, R.T @ R)
    found = smallest(*arguments)
    assert qr_calls == ([(23, 6)] if by_qr else [])
    monkeypatch.setattr(smallest_module, "_MOST_SQUARED", 0.0)
    by_triangle = smallest(*arguments)
    assert qr_calls[-1] == (23, 6)
    # The condition is 1/least. Without its refinement the squared way is off by 7e-15 / least
    # already at 1e-2.
    torch.testing.assert_close(found.patches, by_triangle.patches, rtol=0, atol=2e-15 / least)
    assert (found.patches - X).abs().max() < 1e-5


@pytest.mark.parametrize("withheld", [True, False], ids=["withheld", "zero"])
def test_the_tokens_alone_fix_the_pixels_of_a_wide_model(withheld):
    """No patch embedding's gradient: p + n + 2 ≤ d is needed, and nothing else. Or it is
    there and zero: frozen.
    """
    model = make("prenorm", "frozen")  # p = 48, n = 16, d = 96
    pixels = private(model)
    update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([3]))
    name = "patch_embedding.weight"
    blind = (
        update.without([name])
        if withheld
        else al.ClientUpdate({**update.gradients, name: torch.zeros_like(update.gradients[name])})
    )
    found = al.span_closed_form(model, blind)
    assert db(found, pixels) > 150
    assert found.diagnostics["width_needed"] == 48 + 17 + 1
    assert found.determined
    narrow = make("prenorm", "frozen", width=63)
    update = al.client_update(narrow, al.HALF.to_input(pixels), torch.tensor([3])).without([name])
    with pytest.raises(al.AttackNotApplicable, match="48 unknowns"):
        al.span_closed_form(narrow, update)
    best = al.span_closed_form(narrow, update, strict=False)
    assert best.images.isfinite().all()
    assert not best.determined


def test_equal_places_are_refused():
    model = make("prenorm", "frozen")
    torch.nn.init.zeros_(model.position_embedding)
    update = al.client_update(model, al.HALF.to_input(private(model)), torch.tensor([3]))
    with pytest.raises(al.AttackNotApplicable, match="same at every patch"):
        al.span_closed_form(model, update)


def test_places_that_combine_to_each_other_are_said():
    model = make("prenorm", "frozen")
    table = al.sinusoidal_2d((4, 4), 96)
    model.position_embedding.data[0] = table.to(model.position_embedding)
    update = al.client_update(model, al.HALF.to_input(private(model)), torch.tensor([3]))
    found = al.span_closed_form(model, update)
    assert not found.exact
    assert {c.name: c.state for c in found.conditions}["places are independent"] == "contradicted"


def test_after_several_local_steps_only_a_replay_vouches_for_the_error():
    """From the second step on the client read other weights than the equations have."""
    model = make("prenorm", "frozen", dtype=torch.float32)
    pixels, sent, seen = private(model), model.state_dict(), set()
    for clip_norm in (None, 0.1):  # which no replay knows of
        how = LocalTraining(learning_rate=0.3, steps=5, momentum=0.9, clip_norm=clip_norm)
        back = train_locally(model, al.HALF.to_input(pixels), torch.tensor([3]), how)
        update = update_of(sent, back, how)
        result = al.span_closed_form(model, update)
        states = {condition.name: condition.state for condition in result.conditions}
        moved = states["steps at the weights that were sent"]
        assert moved == ("shown" if states["replay"] == "shown" else "not checked")
        assert result.exact <= (moved == "shown" and db(result, pixels) > 58.9)
        trust = next(f.trust for f in audit(model, update).findings if f.attack.name == "span")
        assert moved == "shown" or trust in ("unverified", "poor")
        seen.add(moved)
    assert seen == {"shown", "not checked"}
