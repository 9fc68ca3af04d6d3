"""The widgets, without a kernel: what each control is called, and that the page follows it."""

from __future__ import annotations

import datetime
import io
import re
from types import SimpleNamespace
from typing import Any

import ipywidgets
import nbformat.v4
import pytest
import run_notebooks
from PIL import Image

from aprillab.playground import CONTROLS, OWN, State, page, playground, showing
from aprillab.playground.page import Page, build

SMALL = State(width=96, patch=16)


@pytest.fixture
def small() -> Page:
    return build(SMALL)


def words(widget: Any) -> str:
    return re.sub(r"<[^>]+>", " ", widget.value)


def picture_file(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 40), colour).save(file, format="png")
    return file.getvalue()


def upload(page: Page, content: bytes) -> None:
    """As the browser does it, in the version of ipywidgets that is here."""
    if hasattr(page.upload, "data"):
        page.upload.metadata, page.upload.data = [{"name": "mine.png"}], [content]
        page.upload.set_trait("_counter", page.upload._counter + 1)
    else:
        now = datetime.datetime.now(datetime.UTC)
        file = {"name": "mine.png", "type": "image/png", "size": len(content), "content": memoryview(content)}
        page.upload.value = ({**file, "last_modified": now},)


def test_every_control_has_a_word_and_a_sentence(small: Page) -> None:
    assert list(small.controls) == list(CONTROLS)
    for name, control in small.controls.items():
        assert control.description == CONTROLS[name].label
        tooltip = control.tooltip if hasattr(ipywidgets.DOMWidget, "tooltip") else control.description_tooltip
        assert tooltip == CONTROLS[name].help
        assert CONTROLS[name].help.replace("'", "&#x27;") in showing.help_html()
    assert "Upload" in small.upload.description
    assert "first setting" in small.reset.description


def test_the_first_state_is_shown_with_its_evidence(small: Page) -> None:
    assert "Done in" in words(small.status)
    assert 'alt="Left, the private picture' in small.picture.value
    assert "Which attacks apply" in words(small.evidence)


def test_a_control_that_moves_changes_all_of_it(small: Page) -> None:
    before = [widget.value for widget in (small.status, small.picture, small.summary, small.evidence)]
    said = []
    small.status.observe(lambda change: said.append(words(small.status).strip()), "value")
    small.controls["noise"].value = 1.0
    after = [widget.value for widget in (small.status, small.picture, small.summary, small.evidence)]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert said[0] == "Computing …"
    assert said[-1].startswith("Done in ")
    assert small.outcome.state == State(width=96, patch=16, noise=1.0)


def test_the_patches_offered_follow_the_size() -> None:
    small = build(State(width=96, patch=4))
    small.controls["size"].value = 64
    assert [value for _, value in small.controls["patch"].options] == [8, 16]
    assert small.outcome.state == State(width=96, patch=8, size=64)
    small.controls["size"].value = 32
    assert [value for _, value in small.controls["patch"].options] == [4, 8, 16]


def test_an_upload_is_played_and_taken_out_of_the_widget(small: Page) -> None:
    assert OWN not in [value for _, value in small.controls["picture"].options]
    upload(small, picture_file())
    assert small.outcome.state.picture == OWN
    assert small.outcome.private[0, :, 5, 5].mul(255).round().tolist() == [200, 30, 30]
    assert not small.upload.value
    assert not any("content" in str(value) for value in small.upload.get_state().get("value") or ())
    small.controls["size"].value = 64
    assert small.outcome.private.shape == (1, 3, 64, 64)
    upload(small, picture_file((10, 20, 250)))
    assert small.outcome.private[0, :, 5, 5].mul(255).round().tolist() == [10, 20, 250]
    small.controls["picture"].value = "coffee"
    assert small.outcome.state.picture == "coffee"


def test_a_transparent_picture_is_taken_without_a_warning(small: Page) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (40, 40), (200, 30, 30, 0)).save(file, format="png")
    upload(small, file.getvalue())
    assert small.outcome.private[0].min() == 1.0  # white, behind what is transparent
    assert small.status.value.count("Done in") == 1


def test_a_file_that_is_no_picture_leaves_the_page_as_it_was(small: Page) -> None:
    before = small.picture.value
    upload(small, b"%PDF-1.7 no picture")
    assert "Not a picture that can be read" in words(small.status)
    assert small.picture.value == before
    assert not small.content
    assert not small.upload.value


def test_a_fault_is_said_and_not_swallowed(small: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of <memory>")

    before = small.picture.value
    monkeypatch.setattr(page, "play", broken)
    small.controls["noise"].value = 0.1
    assert "out of &lt;memory&gt;" in small.status.value
    assert small.picture.value == before


def test_back_to_the_first_setting(small: Page) -> None:
    small.controls["size"].value = 64
    small.reset.click()
    assert small.outcome.state == State()
    assert {name: control.value for name, control in small.controls.items()} == vars(State())


def test_what_is_displayed_has_a_view_for_jupyter_and_html_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    playground(SMALL)
    data = shown[0]._repr_mimebundle_()
    assert set(data) == {run_notebooks.WIDGET_VIEW, "text/html", "text/plain"}
    output = nbformat.v4.new_output("display_data", data)
    cell = nbformat.v4.new_code_cell("playground()", outputs=[output])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    run_notebooks.normalize(notebook)
    assert set(notebook.cells[0].outputs[0].data) == {"text/html", "text/plain"}


def test_both_versions_of_ipywidgets() -> None:
    seven, eight = SimpleNamespace(DOMWidget=object), SimpleNamespace(DOMWidget=SimpleNamespace(tooltip=None))
    assert page._tooltip(seven, "words") == {"description_tooltip": "words"}
    assert page._tooltip(seven, "words", button=True) == {}
    assert page._tooltip(eight, "words", button=True) == {"tooltip": "words"}
    assert page._content_of({"a.png": {"content": b"abc"}}) == b"abc"
    assert page._content_of(({"content": memoryview(b"abc")},)) == b"abc"
    assert page._content_of(()) == page._content_of({}) == b""
