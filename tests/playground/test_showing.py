"""What is drawn and said of an outcome: pure functions, no kernel."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from aprillab.attacks.catalogue import CLOSED_FORMS
from aprillab.playground import CONTROLS, OWN, Outcome, State, play, showing

SMALL = State(width=96, patch=16, shared="no patch")


@pytest.fixture(scope="module")
def exact() -> Outcome:
    return play(State())


@pytest.fixture(scope="module")
def mixture() -> Outcome:
    return play(State(batch=2))


@pytest.fixture(scope="module")
def nothing() -> Outcome:
    return play(State(shared="head"))


def text(html: str) -> str:
    """What stands in it without the tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_one_panel_a_private_picture_and_one_for_what_came_back(exact: Outcome, mixture: Outcome) -> None:
    assert len(showing.figure(exact).axes) == 2
    drawn = showing.figure(mixture)
    assert [ax.get_title() for ax in drawn.axes] == [
        "private 1 of 2",
        "private 2 of 2",
        "came back: \na mixture, or noise",
    ]
    assert "exact" in showing.figure(exact).axes[-1].get_title()


def test_where_nothing_came_back_it_is_grey_and_says_so(nothing: Outcome) -> None:
    assert torch.equal(showing.shown(nothing), torch.full((3, 32, 32), 0.5))
    assert showing.figure(nothing).axes[-1].get_title() == "came back: nothing"
    assert "no picture came back" in showing.alt(nothing)
    assert "No closed form returned a picture" in showing.caption(nothing)
    assert "no picture came back" in text(showing.summary_html(nothing))


def test_the_alternative_text_changes_with_the_picture(exact: Outcome, mixture: Outcome, nothing: Outcome) -> None:
    assert "orange space suit" in showing.alt(exact)
    assert "no difference can be seen" in showing.alt(exact)
    assert "and 1 more" in showing.alt(mixture)
    assert "hardly anything of it can be recognized" in showing.alt(mixture)
    own = play(replace(SMALL, picture=OWN), torch.full((3, 32, 32), 0.2))
    assert "a picture of the user's own" in showing.alt(own)
    assert len({showing.alt(one) for one in (exact, mixture, nothing, own)}) == 4
    for one in (exact, mixture, nothing, own):
        assert re.search(r'alt="[^"]{60,}"', showing.picture_html(one))


def test_the_server_says_nothing_that_only_we_know(exact: Outcome) -> None:
    said = text(showing.summary_html(exact))
    server, ours = said.split("What only we can see")
    assert "Predicted PSNR" in server
    assert "True PSNR" not in server
    assert f"{exact.true_psnr[0]:.1f} dB" in ours
    assert "The server has no original" in ours


def test_every_closed_form_is_there_with_its_reason(exact: Outcome, nothing: Outcome) -> None:
    for outcome in (exact, nothing):
        said = text(showing.evidence_html(outcome))
        assert outcome.found is not None
        for attack in CLOSED_FORMS.values():
            assert attack.title in said.replace("&#x27;", "'")
        assert "not run here" in said
    assert said.count("does not apply") == 3
    assert "nothing shared is affine in the pixels" in said
    conditions = text(showing.evidence_html(exact)).partition("Which attacks apply")[0]
    assert "rank(G) = n" in conditions
    assert "holds" in conditions


def test_a_state_is_said_in_one_line() -> None:
    for name, control in CONTROLS.items():
        for value in control.choices.values():
            state = replace(State(), **{name: value})
            assert showing.setting(state).count("\n") == 0
            if name not in ("picture",) and value != getattr(State(), name):
                assert showing.setting(state) != showing.setting(State()), (name, value)


def test_what_could_not_be_played_is_said() -> None:
    failed = Outcome(State(), torch.zeros(1, 3, 32, 32), None, "the loss is <nan>", 0.1)
    assert "the loss is &lt;nan&gt;" in showing.summary_html(failed)
    assert showing.evidence_html(failed) == ""
    assert showing.status(failed) == "Done in 0.1 s: the loss is <nan>"
    assert "nothing" in showing.figure(failed).axes[-1].get_title()


def test_a_page_for_readers_without_a_kernel_has_all_of_it(exact: Outcome) -> None:
    page = showing.page_html(exact)
    said = text(page)
    for label, words in exact.state.in_words().items():
        assert label in said
        assert words in said
    assert showing.picture_html(exact) in page
    assert "Which attacks apply, and why" in said
    assert "script" not in page


def test_a_strip_has_the_private_picture_and_one_of_each(exact: Outcome, nothing: Outcome) -> None:
    drawn = showing.strip([exact, nothing], ["all", "head"])
    titles = [ax.get_title() for ax in drawn.axes]
    assert titles[0] == "private"
    assert re.fullmatch(r"all\ntrue \d+ dB", titles[1])
    assert titles[2] == "head\nno closed form"


def test_the_status_is_a_live_region() -> None:
    html = showing.status_html("Computing <now>")
    assert 'role="status"' in html
    assert 'aria-live="polite"' in html
    assert "Computing &lt;now&gt;" in html
