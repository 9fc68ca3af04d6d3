"""The course's figures: what is drawn, what a screen reader reads, and that nothing
outside them changes.
"""

import matplotlib.pyplot as plt
import pytest
import torch

from aprillab import viz


def test_pictures_are_clamped_and_left_as_they_are() -> None:
    picture = torch.tensor([[[-0.5, 0.25], [1.5, 1.0]]])
    before = picture.clone()
    (ax,) = viz.figure()[1].flat
    viz.draw(ax, picture)
    assert ax.images[0].get_array().tolist() == [[0.0, 0.25], [1.0, 1.0]]
    assert torch.equal(picture, before)
    viz.draw(ax, torch.tensor([[[0.25, 0.5]]]))
    assert ax.images[1].get_clim() == (0, 1)  # greys are not stretched from black to white


def test_a_short_row_leaves_its_last_places_empty() -> None:
    pictures = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    fig = viz.picture_grid(
        {"private": list(pictures), "recovered": list(pictures[:1])}, titles=[["a", "b", "c"], ["d"]]
    )
    assert [bool(ax.images) for ax in fig.axes] == [True, True, True, True, False, False]
    assert [ax.axison for ax in fig.axes] == [True, True, True, True, False, False]
    assert [ax.get_title() for ax in fig.axes] == ["a", "b", "c", "d", "", ""]
    assert [ax.get_ylabel() for ax in fig.axes] == ["private", "", "", "recovered", "", ""]


def test_the_magnified_difference_says_by_how_much() -> None:
    private = torch.full((3, 4, 4), 0.5)
    fig = viz.before_after(private, private + 0.01, title="40.0 dB", scale=10.0)
    assert "10" in fig.axes[2].get_title()
    assert fig.axes[1].get_title() == "40.0 dB"


def test_what_a_caption_says_is_text_and_no_markup() -> None:
    bundle = viz.captioned(b"png", caption='a < b & "c"', alt='2 > 1, "so"')
    assert "a &lt; b &amp;" in bundle["text/html"]
    assert 'alt="2 &gt; 1, &quot;so&quot;"' in bundle["text/html"]
    assert bundle["text/plain"] == 'a < b & "c" [2 > 1, "so"]'


@pytest.mark.parametrize("words", [{"caption": " ", "alt": "a line"}, {"caption": "A line.", "alt": ""}])
def test_a_figure_without_words_is_not_shown(words: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="a caption and an alternative text"):
        viz.show(viz.figure()[0], **words)


def test_curves_differ_in_shape_as_well_as_in_colour() -> None:
    fig = viz.curves({str(k): ([1, 2], [k, k]) for k in range(8)}, x="rounds", y="dB", log_x=True)
    lines = fig.axes[0].lines
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == len(lines) == 8
    assert fig.axes[0].get_xscale() == "log"
    assert fig.axes[0].get_yscale() == "linear"


def test_a_rank_is_marked_where_it_is() -> None:
    fig = viz.singular_values({"G": torch.diag(torch.tensor([2.0, 1.0, 0.0]))}, mark={"n": 2})
    spectrum, mark = fig.axes[0].lines
    assert spectrum.get_ydata().tolist()[:2] == [1.0, 0.5]
    assert 0 < spectrum.get_ydata()[2] < 1e-15  # no zero on a logarithmic scale
    assert list(mark.get_xdata()) == [2, 2]


def test_nothing_is_left_behind() -> None:
    with plt.rc_context({"font.size": 7.0, "axes.grid": True}):  # other than the course's
        before, open_before = dict(plt.rcParams), plt.get_fignums()
        viz.to_png(viz.curves({"a": ([1], [2])}, x="x", y="y"))
        assert dict(plt.rcParams) == before
        assert plt.get_fignums() == open_before
