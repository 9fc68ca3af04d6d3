"""Checks of chapter 01 against the notebook's own stubs and solutions, and common
mistakes; widgets.
"""

import pytest
import torch
from exercise_tests import exercise_tests
from matplotlib.figure import Figure

import aprillab as al
from aprillab import viz, widgets
from aprillab.exercises import chapter01

LABEL_BODY = (
    "negative = (bias_gradient < 0).nonzero().flatten()\n    return int(negative[0]) if len(negative) == 1 else None"
)
UNMIX_RETURN = "torch.stack(images) if images else ratios[:0]"
RATIO = "weight_gradient[j] / bias_gradient[j]"
WEIGHT_BODY = "return int(r.argmin()) if (r < 0).sum() == 1 else int(r.argmax())"
NORMS = """if len(weight_gradient) > 2:
        return int(weight_gradient.norm(dim=1).argmax())
    return int(weight_gradient.sum(1).argmin()) if after_relu else None"""
LENGTH = "u * (a[on] @ Wu) / (Wu @ Wu)"

MUTANTS = [
    ("check_by_hand", "delta = [2, -1]", "delta = [-1, 4]", "That is y itself"),
    ("check_by_hand", "delta = [2, -1]", "delta = [2, -2]", "bias b is missing"),
    ("check_by_hand", "delta = [2, -1]", "delta = [-2, 1]", "wrong sign"),
    ("check_by_hand", "delta = [2, -1]", "delta = [4, -2]", "½ in front of the square"),
    ("check_by_hand", "delta = [2, -1]", "delta = None", "δ should be numbers"),
    ("check_by_hand", "[[4, -2, 6], [-2, 1, -3]]", "[[4, -2], [-2, 1], [6, -3]]", "its transpose"),
    ("check_by_hand", "[[4, -2, 6], [-2, 1, -3]]", "[[2, 0, -2], [-2, -1, 0]]", "not of W"),
    ("check_by_hand", "[[4, -2, 6], [-2, 1, -3]]", "[[2, -1, 3], [2, -1, 3]]", "every row here is x itself"),
    ("check_by_hand", "[1, 0, -2]", "[-3, 0, 6]", "That is the row"),
    ("check_by_hand", "[1, 0, -2]", "[9, 0, -18]", "where a division is asked"),
    ("check_by_hand", "[1, 0, -2]", "[2, -1, 3]", "another sent this update"),
    ("check_by_hand", "[1, 0, -2]", "[float('nan'), 0, -2]", "NaN"),
    ("check_by_hand", ", other\n", "\n", "Return three things"),
    ("check_invert_linear", ".abs()", "", "by the size of its bias entry"),
    ("check_invert_linear", "j = bias_gradient.abs().argmax()", "j = 0", "divided by a zero"),
    ("check_invert_linear", RATIO, "weight_gradient.sum(0) / bias_gradient.sum()", "zero"),
    ("check_invert_linear", " / bias_gradient[j]", "", "the row itself"),
    ("check_invert_linear", "weight_gradient[j] / bias", "weight_gradient[j] * bias", "needs a division"),
    ("check_invert_linear", RATIO, "bias_gradient[j] / weight_gradient[j]", "exchanged"),
    ("check_invert_linear", "return weight", "return -weight", "wrong sign"),
    ("check_invert_linear", "weight_gradient[j] /", "weight_gradient[:, j] /", "should have shape"),
    (
        "check_invert_noisy",
        "bias_gradient @ weight_gradient / (bias_gradient @ bias_gradient)",
        "(lambda j: weight_gradient[j] / bias_gradient[j])(bias_gradient.abs().argmax())",
        "best single row",
    ),
    (
        "check_invert_noisy",
        "bias_gradient @ weight_gradient / (bias_gradient @ bias_gradient)",
        "(lambda a: (weight_gradient[a] / bias_gradient[a, None]).mean(0))(bias_gradient != 0)",
        "plain mean",
    ),
    (
        "check_invert_noisy",
        "bias_gradient @ weight_gradient / (bias_gradient @ bias_gradient)",
        "bias_gradient.sign() @ weight_gradient / bias_gradient.abs().sum()",
        "its square",
    ),
    (
        "check_invert_noisy",
        "bias_gradient @ weight_gradient / (bias_gradient @ bias_gradient)",
        "(weight_gradient / bias_gradient[:, None]).mean(0)",
        "must get no weight",
    ),
    (
        "check_invert_noisy",
        "bias_gradient @ weight_gradient / (bias_gradient @ bias_gradient)",
        "weight_gradient.sum(0) / bias_gradient.sum()",
        "rows of opposite sign cancel",
    ),
    ("check_invert_noisy", " / (bias_gradient @ bias_gradient)", "", "division by Σ"),
    ("check_invert_noisy", "(bias_gradient @ bias_gradient)", "bias_gradient.norm()", "divides by the norm"),
    ("check_count_images", "(s > floor)", "(s > 0)", "Every singular value is counted"),
    ("check_count_images", "(s > floor)", "(s > 1e-6)", "relative to the largest"),
    ("check_count_images", "100 * torch.finfo", "1 * torch.finfo", "The tolerance is too small"),
    ("check_count_images", "100 * torch.finfo(weight_gradient.dtype).eps", "1e-2", "The tolerance is too large"),
    ("check_count_images", "100 * torch.finfo(weight_gradient.dtype).eps", "0.05", "nearly alike"),
    ("check_count_images", "torch.finfo(weight_gradient.dtype).eps", "1e-17", "Every singular value is counted"),
    ("check_count_images", "int((s > floor).sum())", "len(s)", "A gradient of zeros holds no image"),
    ("check_count_images", "(s > floor).sum()", "(s > floor).sum() + bool(s[0])", "You count 2 (1 image"),
    ("check_count_images", "int((s > floor).sum())", "s[s > floor]", "should be an integer"),
    ("check_label_from_bias", LABEL_BODY, "return int(bias_gradient.argmax())", "largest entry"),
    ("check_label_from_bias", LABEL_BODY, "return int(bias_gradient.abs().argmax())", "only the sign"),
    ("check_label_from_bias", LABEL_BODY, "return int(bias_gradient.abs().argmin())", "look at the signs"),
    ("check_label_from_bias", LABEL_BODY, "return int(bias_gradient.argmin())", "this is a batch"),
    ("check_label_from_bias", "== 1 else None", "== 2 else None", "None, though exactly one"),
    ("check_label_from_weight", WEIGHT_BODY, "return int(weight_gradient.sum(1).argmin())", "row sum"),
    ("check_label_from_weight", WEIGHT_BODY, "return int(weight_gradient.norm(dim=1).argmin())", "smallest row"),
    ("check_label_from_weight", WEIGHT_BODY, "return int(weight_gradient[:, 0].argmin())", "one column's least"),
    ("check_label_from_weight", WEIGHT_BODY, "return int(weight_gradient.sum(1).argmax())", "largest row sum"),
    (
        "check_label_from_weight",
        WEIGHT_BODY,
        "return int((weight_gradient @ weight_gradient[0]).argmin())",
        "product with the first row is the least",
    ),
    (
        "check_label_from_weight",
        WEIGHT_BODY,
        "return int((weight_gradient @ weight_gradient[-1]).argmin())",
        "product with the last row is the least",
    ),
    ("check_label_from_weight", WEIGHT_BODY, "return int(weight_gradient.norm(dim=0).argmax())", "index of a column"),
    ("check_label_from_weight", WEIGHT_BODY, "return int(r.argmin())", "product with the longest row is the least"),
    ("check_label_from_weight", "if after_relu else None", "", "so nothing tells"),
    ("check_label_from_weight", "int(weight_gradient.sum(1).argmin()) if after_relu else None", "None", "r's signs"),
    ("check_label_from_weight", "gradient.sum(1).argmin()", "gradient.sum(1).argmax()", "negative numbers"),
    ("check_label_from_weight", "len(weight_gradient) == 2", "len(weight_gradient) > 1", "None, though one row"),
    ("check_what_comes_out", '| {"decay": "neither", "Adam": "neither"}', '| {"decay": "neither"}', "said of Adam"),
    ("check_what_comes_out", '"decay": "neither"', '"decay": "picture"', "7 of 8 right. decay: you say picture"),
    ("check_what_comes_out", '"Adam": "neither"', '"Adam": "picture"', "what is left of the photograph is signs"),
    ("check_what_comes_out", '"picture")', '"mixture")', "two heads: you say mixture"),
    ("check_what_comes_out", '"mixture")', '"picture")', "as in a batch of two"),
    ("check_what_comes_out", '"mixture")', '"mix")', "'mix' is not one of"),
    ("check_no_bias", "dV[c] / dc[c]", "dV[c]", "NaN"),
    ("check_no_bias", LENGTH, "u", "a row of dW"),
    ("check_no_bias", LENGTH, "u / u.norm()", "the length 1"),
    ("check_no_bias", LENGTH, "-u * (a[on] @ Wu) / (Wu @ Wu)", "the sign is wrong"),
    ("check_no_bias", "on = a > 0", "on = a > -1", "Units that are off"),
    ("check_no_bias", "(a[on] @ Wu)", "(a[on] @ Wu).abs()", "sign is wrong"),
    ("check_no_bias", LENGTH, "torch.linalg.lstsq(W[on], a[on, None]).solution[:, 0]", "many x fit"),
    ("check_no_bias", LENGTH, "torch.linalg.lstsq(W, a[:, None]).solution[:, 0]", "with the units that are off"),
    ("check_no_bias", "u * (a[on]", "W[0] * (a[on]", "not right yet"),
    ("check_unmix_relu", UNMIX_RETURN, "weight_gradient / bias_gradient[:, None]", "zero bias gradient"),
    ("check_unmix_relu", "agree[j].sum() >= 2 and not seen[j]", "agree[j].sum() >= 2", "several times"),
    ("check_unmix_relu", "agree[j].sum() >= 2 and not seen[j]", "not seen[j]", "mixtures"),
    ("check_unmix_relu", UNMIX_RETURN, "torch.linalg.svd(weight_gradient).Vh[:1]", "of another length"),
    ("check_unmix_relu", "< 1e-6", "< 1e-30", "several times"),
    ("check_unmix_relu", "return torch.stack(images)", "return images[0][None]", "you found 1 of 2"),
    ("check_unmix_relu", " if images else ratios[:0]", "", "No ReLU, batch of 3: nothing to stack"),
    ("check_unmix_relu", "torch.stack(images) if", "images if", "Return a tensor of shape"),
    ("check_unmix_relu", "/ bias_gradient[alive, None]", "* 1", "nothing found. Look for 1 image with"),
]  # fmt: skip
#: Other right ways: the check, and the body of a function.
RIGHT = [
    ("check_label_from_weight", NORMS),
    ("check_label_from_bias", "if (bias_gradient < 0).sum() == 1:\n        return bias_gradient.argmin()"),
    ("check_count_images", "return int(torch.linalg.matrix_rank(weight_gradient))"),
    ("check_invert_noisy", "return torch.linalg.lstsq(bias_gradient[:, None], weight_gradient).solution[0]"),
]  # fmt: skip

TestExercises = exercise_tests(chapter01, MUTANTS, RIGHT)


# --- Widgets ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, dict[int, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Three small pictures, the gradients of a linear layer for one to three of them, and
    the δ behind these.
    """
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    delta = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    delta[:, 4] = 0
    x = al.HALF.to_input(pictures).flatten(1)
    gradients = {n: (delta[:n].T @ x[:n], delta[:n].sum(0)) for n in (1, 2, 3)}
    return pictures, gradients, delta


def test_mixture_weights_are_the_shares_of_the_pictures(batch) -> None:
    pictures, _, _ = batch
    wanted = torch.tensor([0.3, -0.5, 1.2], dtype=torch.float64)
    found = widgets.mixture_weights(torch.einsum("b,bchw->chw", wanted, pictures), pictures)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_linear_batch_shows_the_loudest_units_shares(batch, batch_size: int) -> None:
    pictures, gradients, delta = batch
    fig = widgets.linear_batch(pictures, gradients, batch_size=batch_size)
    unit = int(gradients[batch_size][1].abs().argmax())
    wanted = delta[:batch_size, unit] / delta[:batch_size, unit].sum()
    heights = torch.tensor([bar.get_height() for bar in fig.axes[1].patches], dtype=torch.float64)
    torch.testing.assert_close(heights, wanted)
    assert f"unit {unit}" in fig.axes[0].get_title()


def test_the_strip_has_a_mixture_and_its_shares_for_each_batch(batch) -> None:
    pictures, gradients, delta = batch
    fig = widgets.batch_strip(pictures, gradients, ["a", "b", "c"])
    for column, (size, (_, bias)) in enumerate(gradients.items()):
        unit = int(bias.abs().argmax())
        heights = torch.tensor([bar.get_height() for bar in fig.axes[6 + column].patches], dtype=torch.float64)
        torch.testing.assert_close(heights, delta[:size, unit] / delta[:size, unit].sum())
        assert fig.axes[3 + column].get_title() == f"batch of {size}"


def test_a_rank_one_gradient_stands_beside_its_factors() -> None:
    delta, x = torch.tensor([2.0, -1.0]), torch.tensor([2.0, -1.0, 3.0])
    _, above, beside, gradient = widgets.rank_one(delta, x).axes
    assert above.images[0].get_array().tolist() == [x.tolist()]
    assert beside.images[0].get_array()[:, 0].tolist() == delta.tolist()
    assert gradient.images[0].get_array().tolist() == torch.outer(delta, x).tolist()
    assert [text.get_text() for text in gradient.texts] == ["4", "-2", "6", "-2", "1", "-3"]
    assert not widgets.rank_one(torch.ones(5), torch.ones(8)).axes[3].texts


def test_linear_batch_says_that_a_silent_unit_has_no_picture(batch) -> None:
    pictures, gradients, _ = batch
    with pytest.raises(ValueError, match="unit 4 has a zero bias gradient"):
        widgets.linear_batch(pictures, gradients, batch_size=2, rank=4)


def test_the_federated_round_names_its_parts(batch) -> None:
    fig = widgets.federated_round(batch[0], batch[0])
    words = " ".join(text.get_text() for text in fig.findobj(lambda artist: hasattr(artist, "get_text")))
    for part in ("server", "client 1", "client 3", "weights", "gradient", "stays here", "makes of"):
        assert part in words
    assert viz.to_png(fig).startswith(b"\x89PNG")


def test_sliders_draw_again_with_words_for_the_new_state(monkeypatch: pytest.MonkeyPatch) -> None:
    ipywidgets = pytest.importorskip("ipywidgets")
    drawn, shown = [], []

    def render(size: int) -> Figure:
        drawn.append(size)
        return Figure()

    monkeypatch.setattr(viz, "show", lambda figure, *, caption, alt: shown.append((caption, alt)))
    slider = ipywidgets.IntSlider(2, 1, 4, continuous_update=False)
    panel = widgets.sliders(render, size=slider, caption=lambda size: f"batch of {size}", alt="the same words")
    slider.value = 3
    assert drawn == [2, 3]
    assert shown == [("batch of 2", "the same words"), ("batch of 3", "the same words")]
    assert panel.children[0] is slider
