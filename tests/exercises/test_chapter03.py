"""Chapter 03's checks against the notebook's own stubs and solutions, and against the
mistakes people make.
"""

import dataclasses
from typing import Any

import notebook_tools as tools
import pytest
import torch
from exercise_tests import exercise_tests

import aprillab as al
from aprillab.exercises import chapter03

MUTANTS = [
    ("check_conditions", "n + 1 <= width", "n <= width", "class token"),
    ("check_conditions", "n + 1 <= width", "n + 1 < width", "Equality"),
    ("check_conditions", "p <= width", "p < width", "Equality"),
    ("check_conditions", "channels * patch_size**2", "patch_size**2", "channels"),
    ("check_conditions", "(image_size // patch_size) ** 2", "image_size // patch_size", "square"),
    ("check_conditions", "n + 1 <= width, p <= width", "p <= width, n + 1 <= width", "determined for"),
    (
        "check_conditions",
        "return n + 1 <= width, p <= width",
        "return n + 1 <= width and p <= width",
        "two truth values",
    ),
    ("check_tokens_from", "lstsq(G.T, M)", "lstsq(G.T, M.T)", "Mᵀ"),
    ("check_tokens_from", "torch.linalg.lstsq(G.T, M).solution", "G @ M", "forgets to divide"),
    ("check_tokens_from", ".solution", ".solution.T", "transpose"),
    ("check_tokens_from", ".solution", ".solution[1:]", "One row is missing"),
    ("check_tokens_from", "return ", "return -", "wrong sign"),
    ("check_tokens_from", "lstsq(G.T, M)", "lstsq(G, M)", "raised"),
    ("check_patches_from", " - b_e[:, None]", "", "bias b_e was not taken off"),
    ("check_patches_from", " - b_e[:, None]", " + b_e[:, None]", "bias was added"),
    ("check_patches_from", "(Z - E)[1:]", "(Z + E)[1:]", "position embedding was added"),
    ("check_patches_from", "(Z - E)[1:]", "Z[1:]", "position embedding was not taken off"),
    ("check_patches_from", "(Z - E)[1:]", "(Z[1:] - E[:-1])", "off by one token"),
    ("check_patches_from", "(Z - E)[1:]", "(Z - E)[:-1]", "class token is the first"),
    ("check_patches_from", "(Z - E)[1:]", "(Z - E)", "class token among the patches"),
    ("check_patches_from", ".solution.T", ".solution", "transpose"),
    (
        "check_patches_from",
        "torch.linalg.lstsq(W_e, (Z - E)[1:].T - b_e[:, None]).solution.T",
        "(W_e.T @ ((Z - E)[1:].T - b_e[:, None])).T",
        "multiplies by W_e where the system",
    ),
    (
        "check_patches_from",
        "torch.linalg.lstsq(W_e, (Z - E)[1:].T - b_e[:, None]).solution.T",
        "(W_e @ ((Z - E)[1:].T - b_e[:, None])).T",
        "Your code raised RuntimeError",
    ),
    ("check_most_rank", "(2 * H + 1) * T", "2 * H + 1", "count for one token"),
    ("check_most_rank", "(2 * H + 1) * T", "2 * H + T", "two directions a head of its own"),
    ("check_most_rank", "n + T, d, ", "n + T, ", "columns"),
    ("check_most_rank", "n + T, d, ", "d, ", "rows"),
    ("check_most_rank", "(2 * H + 1) * T", "2 * H * T", "a query each"),
    ("check_most_rank", "(2 * H + 1) * T", "(H + 1) * T", "two directions, the value's and the key's"),
    ("check_most_rank", "(2 * H + 1) * T", "3 * H * T", "for all heads together"),
    ("check_most_rank", ", (2 * H + 1) * T", "", "what the shape allows"),
    ("check_most_rank", "(2 * H + 1) * T", "2 * H * T + 1", "T in all, not one"),
    ("check_most_rank", "min(n + T, d, (2 * H + 1) * T)", "(2 * H + 1) * T", "rows, or than it has columns"),
    ("check_most_rank", "min(n + T,", "min(n,", "it has n + T rows"),
    ("check_most_rank", "(2 * H + 1) * T", "7 * T", "a random model has"),
    ("check_most_rank", "return min(n + T, d, (2 * H + 1) * T)", "return float(d)", "an int"),
    ("check_attack", 'weights.get("patch_embedding.bias", 0.0)', "0.0", "bias was not taken off"),
    (
        "check_attack",
        'weights["position_embedding"][0])[-n:]',
        'weights["position_embedding"][0])[:n]',
        "class token",
    ),
    ("check_attack", ' - weights["position_embedding"][0])', ")", "position embedding was not taken off"),
    ("check_attack", '(Z - weights["position_embedding"][0])', '(Z + weights["position_embedding"][0])', "was added"),
    ("check_attack", "return al.HALF.to_pixels(images)", "return images", "model-input space"),
    (
        "check_attack",
        "weights[reader].T @ gradients[reader]",
        "gradients[reader].T @ weights[reader]",
        "M is transposed",
    ),
    ("check_attack", "weights[reader].T @ gradients[reader]", "weights[reader] @ gradients[reader]", "raised"),
    (
        "check_attack",
        "al.unpatchify(X[None], model.patch_size, (model.image_size,) * 2)",
        "X.reshape(1, -1, model.image_size, model.image_size)",
        "only reshaped",
    ),
    ("check_attack", "return al.HALF.to_pixels(images)", "return al.HALF.to_pixels(images).float()", "in float32"),
    ("check_attack", '("query", "key", "value")', '("query", "key")', "The value's product is missing in M"),
    ("check_attack", '("query", "key", "value")', '("query", "value")', "The key's product is missing in M"),
    ("check_attack", '("query", "key", "value")', '("key", "value")', "The query's product is missing in M"),
    ("check_attack", 'for part in ("query"', 'for part in ("out"', "not right"),
    ("check_attack", 'weights.get("patch_embedding.bias", 0.0)', 'weights["patch_embedding.bias"]', "KeyError"),
    ("check_attack", 'readers += ["blocks.0.mlp.0.weight"]', "pass", "The MLP's product is missing in M"),
    (
        "check_attack",
        'readers += ["blocks.0.mlp.0.weight"]',
        'readers = ["blocks.0.mlp.0.weight"]',
        "MLP's product alone",
    ),
    ("check_attack", "blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight", "raised"),
]

TestExercises = exercise_tests(chapter03, MUTANTS)


# --- The chapter's own functions, where its cells do not go ------------------------------------------------------


@pytest.fixture(scope="module")
def chapter() -> dict[str, Any]:
    return tools.definitions(tools.read("03"))


@pytest.mark.parametrize(
    ("patch", "width", "signs"), [(4, 24, ">>"), (4, 48, ">≤"), (4, 96, "≤≤"), (8, 48, "≤>"), (16, 384, "≤>")]
)
def test_the_slider_figure_says_which_condition_holds(
    chapter: dict[str, Any], patch: int, width: int, signs: str
) -> None:
    picture, tokens, pixels = chapter["render"](patch=patch, width=width).axes
    n, p = (32 // patch) ** 2, 3 * patch**2
    assert tokens.get_title() == f"G: n + 1 = {n + 1} {signs[0]} {width}"
    assert pixels.get_title() == f"$W_e$: p = {p} {signs[1]} {width}"
    assert (chapter["attacked"](patch, width)[3] > 120) == (signs == "≤≤")
    assert picture.get_title().startswith(f"patch {patch}, d = {width}")


@pytest.mark.parametrize("options", [{"channels": 3, "class_token": False}, {"depth": 3, "seed": 5}])
def test_the_chapters_solves_agree_with_the_package(chapter: dict[str, Any], options: dict[str, Any]) -> None:
    model, private, update = chapter["client"]("coins", 16, width=96, **options)
    plain = chapter["picture"](model, chapter["april_plain"](model, update))
    assert torch.allclose(plain, al.april_closed_form(model, update, regularization="none").pixels, atol=1e-8)
    assert chapter["decibels"](plain, private) > 150


def test_a_model_with_two_readers_is_one_of_ours_but_for_its_first_block() -> None:
    options = {"image_size": 12, "patch_size": 4, "width": 24, "depth": 2, "heads": 3, "classes": 5}
    model, ours = chapter03.side_by_side(**options), al.VisionTransformer(block="april", **options)
    pairs = zip(model.state_dict().items(), ours.state_dict().items(), strict=True)
    assert all(name == other and w.equal(v) for (name, w), (other, v) in pairs)
    z = torch.randn(1, 10, 24, generator=torch.Generator().manual_seed(0))
    first = ours.blocks[0]
    assert torch.allclose(model.blocks[0](z), first.attention(z) + first.mlp(z))
    assert torch.allclose(model.blocks[1](z), ours.blocks[1](z))


def test_what_training_does_not_change(chapter: dict[str, Any]) -> None:
    """Step 8's factor: a gradient made smaller by any number gives the same picture."""
    model, private, update = chapter["client"]("coins", 16, width=96)
    small = {name: 1e-3 * g for name, g in update.gradients.items()}
    found = chapter["april_plain"](model, dataclasses.replace(update, gradients=small))
    assert chapter["decibels"](chapter["picture"](model, found), private) > 150
