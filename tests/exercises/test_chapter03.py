"""Chapter 03's checks against the notebook's own stubs and solutions, and against the mistakes people make."""

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
    ("check_damped", "a * b / (a**2 + damping)", "a**2 * b / (a**2 + damping)", "not yet divided by a"),
    ("check_damped", "a * b / (a**2 + damping)", "a * b / (a**2 + damping**2)", "squared already"),
    ("check_damped", "a * b / (a**2 + damping)", "b / (a + damping)", "shifts a"),
    ("check_damped", "a * b / (a**2 + damping)", "b / a", "not damped"),
    ("check_damped", "a * b / (a**2 + damping)", "(a**2 / (a**2 + damping)) * (b / a)", "NaN"),
    ("check_damped", "a * b / (a**2 + damping)", "-a * b / (a**2 + damping)", "wrong sign"),
    ("check_choose_damping", "min(candidates", "max(candidates", "greatest"),
    ("check_choose_damping", "float(unused.sum() + spare) ** 2", "1.0", "misfit alone"),
    ("check_choose_damping", "unused.sum() + spare", "unused.square().sum() + spare", "not squared"),
    (
        "check_choose_damping",
        "(unused.sum() + spare) ** 2",
        "(unused.square().sum() + spare)",
        "not a sum of squares",
    ),
    ("check_choose_damping", " ** 2", "", "not squared"),
    ("check_choose_damping", " + rest", "", "rest is missing"),
    ("check_choose_damping", " + rest", " + rest**2", "rest is squared, but it is a squared residual already"),
    ("check_choose_damping", " + spare", "", "spare equations are missing"),
    ("check_choose_damping", "damping / (a**2 + damping)", "a**2 / (a**2 + damping)", "least V"),
    ("check_choose_damping", "return min(candidates, key=score)", "return 0.123", "one of the candidates"),
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
    ("check_attack", "weights[part].T @ gradients[part]", "gradients[part].T @ weights[part]", "M is transposed"),
    (
        "check_attack",
        "weights[part].T @ gradients[part]",
        "weights[part] @ gradients[part]",
        "a transpose is missing",
    ),
    ("check_attack", "weights[part].T @ gradients[part]", "gradients[part] @ weights[part]", "factors are exchanged"),
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
    assert torch.allclose(
        chapter["april_damped"](model, update), al.april_closed_form(model, update).pixels, atol=1e-6
    )
    assert chapter["decibels"](plain, private) > 150
